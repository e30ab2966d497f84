"""Running a whole notebook again, and what came out differently."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

from interp_kernel.errors import SessionError
from interp_kernel.mcp.outputs import Output, comparable
from interp_kernel.mcp.runs import Runner

EXCERPT_CHARS = 160
STOPPED = ("KeyboardInterrupt", "KernelDiedError")
"""Errors that end a cell which would otherwise have gone on, or which would take the kernel along."""


@dataclass
class Replay:
    """All code cells of a notebook, run in order in a fresh kernel; the first that fails otherwise than before ends it.

    A cell that was stopped, or in which the kernel ended, would do the same again: it is skipped. `rows` holds a row
    per cell: cell_id, state, changed, and where it changed, how: before, after.
    """

    why: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    state: str = "running"
    started: float = field(default_factory=time.monotonic)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, runner: Runner) -> None:
        """Run the cells."""
        cells = [cell for cell in runner.document.cells if cell.kind == "code" and cell.source.strip()]
        self.total = len(cells)
        try:
            for cell in cells:
                before = list(cell.data["outputs"])
                last = runner.runs.get(cell.id)
                if error_in(before) in STOPPED and (last is None or last.source == cell.source):
                    self.rows.append({**row(cell.id, "skipped", [], []), "before": error_in(before)})
                    continue
                run = runner.submit(cell)
                await run.done.wait()
                after = run.outputs.render()
                self.rows.append(row(cell.id, run.state, before, after))
                is_expected = run.state == "failed" and error_in(before) == error_in(after)
                is_expected |= "raises-exception" in cell.data["metadata"].get("tags", [])
                if run.state != "done" and not is_expected:
                    self.state = "failed"
                    return
            self.state = "done"
        except SessionError:
            self.state = "failed"  # the kernel has died or was stopped, as the row of its last cell says
        finally:
            self.done.set()

    def elapsed_s(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started

    def facts(self) -> dict[str, Any]:
        """How far it is, and what differed."""
        ran = [row["cell_id"] for row in self.rows if row["state"] != "skipped"]
        changed = [row for row in self.rows if row["changed"]]
        return {"state": self.state, "total": self.total, "ran": ran, "rows": self.rows, "changed": len(changed)}


def row(cell_id: str, state: str, before: list[Output], after: list[Output]) -> dict[str, Any]:
    """A cell's state and the first difference between its outputs before and now."""
    olds, news = comparable(before), comparable(after)
    found = {"cell_id": cell_id, "state": state, "changed": olds != news}
    if not before or olds == news:
        return {**found, "changed": bool(before) and olds != news, "before": "", "after": ""}
    old_lines, new_lines = described(olds), described(news)
    place = next((i for i, pair in enumerate(zip(old_lines, new_lines, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(old_lines), len(new_lines))
    shown = [lines[place][:EXCERPT_CHARS] if place < len(lines) else "(nothing)" for lines in (old_lines, new_lines)]
    return {**found, "before": shown[0], "after": shown[1]}


def error_in(outputs: list[Output]) -> str:
    """Name of the error that a cell's outputs show; empty if none."""
    return next((str(output["ename"]) for output in outputs if output["output_type"] == "error"), "")


def described(outputs: list[Output]) -> list[str]:
    """Outputs as lines of text; an image is one line."""
    lines: list[str] = []
    for output in outputs:
        if output["output_type"] == "stream":
            lines += output["text"].splitlines()
        elif output["output_type"] == "error":
            lines.append(f"{output['ename']}: {output['evalue']}")
        else:
            data = output.get("data", {})
            lines += str(data.get("text/plain", "")).splitlines()
            lines += [f"{mime} ({hash_of(value)})" for mime, value in data.items() if mime != "text/plain"]
    return lines


def hash_of(value: Any) -> str:
    """A few letters that differ for different data."""
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:8]
