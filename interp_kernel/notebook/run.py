"""Run one notebook from end to end through papermill, and say in one record how it went."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError

FINDINGS = "findings"
TRACEBACK_LINES = 20
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    Attributes:
        status: `completed`, `failed`, `timeout`, `dead-kernel` or `interrupted`.
        output: The executed notebook.
        html: The same as a page.
        seconds: Wall time, kernel start included.
        failed_cell: Index, from 0, in the *input* notebook of the cell that ended the run; None if it completed or
            ended in no cell of the input, as in the one that papermill adds for parameters.
        ename: Name of the exception.
        evalue: Its message.
        traceback: Its last lines, without colours.
        findings: What the cell tagged `findings` displayed, as JSON values where it can be read so, else as text.
    """

    status: str
    output: Path
    html: Path
    seconds: float
    failed_cell: int | None = None
    ename: str | None = None
    evalue: str | None = None
    traceback: tuple[str, ...] = ()
    findings: Any = None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=str)


def run_notebook(
    path: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    model: str | None = None,
    progress: bool = True,
    kernel_name: str | None = None,
    cwd: str | Path | None = None,
) -> RunResult:
    """Run a notebook; whatever a cell does, the executed notebook and its HTML are written and the result says so.

    Args:
        path: The notebook; it is not changed.
        output: Where the executed notebook goes; its HTML goes beside it.
        parameters: Values for names that the cell tagged `parameters` assigns.
        timeout_s: Seconds that each cell may take.
        model: Model for its remote cells, instead of the one that the notebook names: a name, or a JSON object of
            InterpClient's options.
        progress: Whether a progress bar is shown on stderr.
        kernel_name: Kernel to use instead of the one that the notebook names.
        cwd: Working directory of the kernel; by default the notebook's own folder, as in JupyterLab.

    Raises:
        NotebookError: The notebook or its parameters are refused; nothing has run.
        SpecError: An option of the model is wrong; nothing has run.
    """
    path, output, parameters = Path(path), Path(output), dict(parameters or {})
    options = prepare(path, output, parameters, kernel_name)
    from papermill.exceptions import PapermillExecutionError

    from interp_kernel.notebook.report import write_html
    from interp_kernel.notebook.runner import RunInterruptedError

    start = time.monotonic()
    # The executed notebook tells how it ended; the exception would only repeat it.
    with contextlib.suppress(PapermillExecutionError, RunInterruptedError):
        papermill_run(
            path,
            output,
            parameters=parameters,
            execution_timeout=timeout_s,
            model=model,
            progress_bar=bar_options() if progress else False,
            kernel_cwd=str(Path(cwd or path.parent).resolve()),
            **options,
        )
    seconds = time.monotonic() - start
    return result(path, output, write_html(output), seconds)


def prepare(path: Path, output: Path, parameters: Mapping[str, Any], kernel_name: str | None) -> dict[str, str]:
    """Check everything that can be checked before a kernel starts; returns the kernel's name and language."""
    from interp_kernel.notebook.checks import check_parameters, kernel_of, read_notebook

    notebook = read_notebook(path)
    name, language = kernel_of(path, notebook, kernel_name)
    check_parameters(path, notebook, parameters)
    if output.resolve() == path.resolve():
        raise NotebookError(f"{output} is the notebook itself; expected another file for the executed one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return {"kernel_name": name, "language": language}


def papermill_run(path: Path, output: Path, **options: Any) -> None:
    """papermill.execute_notebook with our engine, also where its entry point isn't installed."""
    import papermill
    from nbformat.warnings import MissingIDFieldWarning
    from papermill.engines import papermill_engines

    from interp_kernel.notebook.engine import InterpEngine

    papermill_engines.register("interp", InterpEngine)
    # papermill takes a path as a format string.
    source, target = (str(p).replace("{", "{{").replace("}", "}}") for p in (path, output))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingIDFieldWarning)  # it gets its ids as it is read
        papermill.execute_notebook(source, target, engine_name="interp", **options)


def bar_options() -> dict[str, Any]:
    """tqdm's options: a moving bar on a terminal, now and then a line in a log."""
    return {
        "desc": "Starting",
        "bar_format": "{desc:<40} {bar:20} {n_fmt}/{total_fmt} cells, {elapsed}",
        "mininterval": 0.1 if sys.stderr.isatty() else 10,
    }


def result(source: Path, output: Path, html: Path, seconds: float) -> RunResult:
    """The record of a run, read from the executed notebook."""
    executed = json.loads(output.read_text(encoding="utf-8"))
    facts = executed["metadata"]["papermill"]["interp"]
    failed = facts.get("failed_cell")
    return RunResult(
        status=facts["status"],
        output=output,
        html=html,
        seconds=round(seconds, 3),
        failed_cell=None if failed is None else input_index(json.loads(source.read_text("utf-8")), executed, failed),
        ename=facts.get("ename"),
        evalue=facts.get("evalue"),
        traceback=traceback(executed["cells"][failed]) if failed is not None else (),
        findings=findings(executed),
    )


def traceback(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """The end of what the cell's errors show; a cell that was stopped shows where, then why."""
    shown = [part for output in cell["outputs"] for part in output.get("traceback", [])]
    lines = [line for part in shown for line in ANSI.sub("", part).splitlines()]
    return tuple(lines[-TRACEBACK_LINES:])


def input_index(source: Mapping[str, Any], executed: Mapping[str, Any], index: int) -> int | None:
    """Where cell `index` of the executed notebook stands in its source; None for one that papermill added.

    papermill drops its markers of an earlier failure and adds or replaces one cell of parameters.
    """
    kept = [i for i, cell in enumerate(source["cells"]) if "papermill-error-cell-tag" not in _tags(cell)]
    added = len(executed["cells"]) - len(kept)
    where = next((i for i, cell in enumerate(executed["cells"]) if "injected-parameters" in _tags(cell)), None)
    if not added or where is None or index < where:
        return kept[index]
    return None if index == where else kept[index - added]


def findings(executed: Mapping[str, Any]) -> Any:
    """What the last cell tagged `findings` displayed; None if there is none or it displayed nothing."""
    tagged = [cell for cell in executed["cells"] if cell["cell_type"] == "code" and FINDINGS in _tags(cell)]
    shown = [output["data"] for cell in tagged[-1:] for output in cell["outputs"] if "data" in output]
    if not shown:
        return None
    if "application/json" in shown[-1]:
        return shown[-1]["application/json"]
    text = "".join(shown[-1].get("text/plain", ""))
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError):
        return text
    return value


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))
