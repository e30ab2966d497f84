"""Run an executed notebook again from a clean kernel, and say cell by cell whether it shows the same."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError
from interp_kernel.notebook.compare import (
    CHANGED,
    CLOSE,
    STATUSES,
    CellComparison,
    Tolerance,
    compare_notebooks,
    worst_status,
)
from interp_kernel.notebook.run import RunResult, run_notebook

SHOWN_CHANGES = 5
HASH_CHARS = 64
CAUSES = re.compile(r"hashes\.(sources|weights|model)|environment\.|git\.|worker\.|model\b")


@dataclass(frozen=True)
class Reproduction:
    """How a second run compares with the first.

    Attributes:
        status: `equal`, `close` (every number within tolerance), `changed`, or `missing` if a cell ran only once.
        cells: Every code cell but those tagged `volatile`, in order.
        run: The second run.
        around: What else differs, as (first, second) by name: sources of techniques, packages, weights, commit, worker.
            Empty if the first run left no record.
    """

    status: str
    cells: tuple[CellComparison, ...]
    run: RunResult
    around: dict[str, tuple[Any, Any]]

    @property
    def is_reproduced(self) -> bool:
        """Whether nothing moved beyond tolerance."""
        return self.status not in STATUSES[STATUSES.index(CHANGED) :]

    def describe(self) -> list[str]:
        """One line for each cell that differs and each number that moved, and a line that sums up."""
        lines = []
        for cell in self.cells:
            if cell.changes:
                lines.append(f"cell {cell.index} ({cell.id}): {_in_words(cell.status)}")
                lines += [f"    {change}" for change in cell.changes[:SHOWN_CHANGES]]
                more = cell.n_changes - SHOWN_CHANGES
                lines += [f"    and {more} more"] if more > 0 else []
        if lines and self.around:
            lines.append("what else differs between the two runs:")
            lines += [
                f"    {name}: {_short(before)} -> {_short(after)}" for name, (before, after) in self.around.items()
            ]
        counts = Counter(cell.status for cell in self.cells)
        parts = [f"{counts[status]} {_in_words(status)}" for status in STATUSES if counts[status]]
        return [*lines, f"{len(self.cells)} code cells: {', '.join(parts) or 'none'}."]

    def to_json(self) -> str:
        """The verdict as one line of JSON; cells that are equal are counted only."""
        differing = [dataclasses.asdict(cell) for cell in self.cells if cell.changes]
        facts = {
            "status": self.status,
            "is_reproduced": self.is_reproduced,
            "n_cells": len(self.cells),
            "cells": differing,
            "around": self.around,
            "run": json.loads(self.run.to_json()),
        }
        return json.dumps(facts, default=str)


def reproduce(
    path: str | Path,
    output: str | Path,
    *,
    tolerance: Tolerance | None = None,
    timeout_s: float | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Reproduction:
    """Run an executed notebook once more, with its own parameters, and compare what its cells show.

    The kernel is new and works in the folder of the notebook that was run in the first place, if that still exists.

    Args:
        path: A notebook with outputs; it is not changed.
        output: Where the second run goes.
        tolerance: How far numbers may move; the default is for runs on one machine.
        timeout_s: Seconds that each cell may take.
        model: Model for its remote cells instead of the one of the first run: a name, or a JSON object of options.
        progress: Whether a progress bar is shown on stderr.

    Raises:
        NotebookError: The notebook has never run, or is refused; nothing has run.
        SpecError: An option of the model is wrong; nothing has run.
    """
    path = Path(path)
    before = _read_executed(path)
    facts = _first_run(before)
    used = facts.get("model")
    if model is None and used:
        model = json.dumps(used) if isinstance(used, dict) else str(used)
    source = Path(facts.get("notebook") or before["metadata"].get("papermill", {}).get("input_path") or path)
    folder = source.parent if source.exists() else path.parent
    ran = run_notebook(path, output, timeout_s=timeout_s, model=model, progress=progress, cwd=folder)
    after = json.loads(ran.output.read_text("utf-8"))
    cells = compare_notebooks(before, after, tolerance)
    return Reproduction(worst_status(cells), tuple(cells), ran, _around(facts, _first_run(after)))


def _read_executed(path: Path) -> dict[str, Any]:
    from interp_kernel.notebook.checks import read_notebook

    notebook = read_notebook(path)
    if not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]):
        raise NotebookError(
            f"{path} holds no outputs, so there is nothing to compare a second run with. "
            f"Run it first: interp-kernel run {path}"
        )
    return notebook


def _first_run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The record of the run that made the notebook; {} where another tool ran it."""
    interp = notebook["metadata"].get("interp")
    return dict(interp.get("run") or {}) if isinstance(interp, dict) else {}


def _around(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What may explain a change: differences of code, software, weights and machine."""
    from interp_kernel.notebook.runs import differences

    found = differences(first, second) if first and second else {}
    return {name: both for name, both in found.items() if CAUSES.match(name) and None not in both}


def _short(value: Any) -> str:
    """A value as text; of a hash the beginning."""
    text = str(value)
    return text[:12] if len(text) == HASH_CHARS else text


def _in_words(status: str) -> str:
    return {CLOSE: "equal within tolerance", "missing": "ran in one of the two runs only"}.get(status, status)
