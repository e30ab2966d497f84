"""The record of a run in the notebook's own metadata: what each cell's state is, and how it reaches the disk."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from papermill.engines import NotebookExecutionManager
from papermill.iorw import LocalHandler, papermill_io

SAVE_EVERY_S = 1.0
SAVE_SHARE = 20
"""Between two saves lies at least this many times the duration of the last: they take 5 % of the time at most."""


@dataclass(frozen=True)
class Failure:
    """How a run ended that did not complete; `index` counts the cells of the executed notebook, None before them."""

    status: str
    index: int | None
    ename: str
    evalue: str
    traceback: tuple[str, ...] = ()


class Record(NotebookExecutionManager):  # type: ignore[misc]
    """papermill's record of a run in the notebook's metadata, saved atomically and at a bounded cost."""

    saved, save_cost_s = float("-inf"), 0.0
    heading = "Running"

    def save(self, **_: Any) -> None:
        """Save if the last save is long enough ago."""
        pause = max(SAVE_EVERY_S, SAVE_SHARE * self.save_cost_s)
        if self.output_path and self.autosave_cell_every and time.monotonic() - self.saved >= pause:
            self.write(self.output_path)

    def autosave_cell(self, **_: Any) -> None:
        """What papermill calls at every output."""
        self.save()

    def write(self, path: str) -> None:
        """Save now."""
        start = time.monotonic()
        write_atomically(self.nb, path)
        self.saved = time.monotonic()
        self.save_cost_s = self.saved - start

    def cell_start(self, cell: NotebookNode, cell_index: int | None = None, **_: Any) -> None:
        """Mark the cell running and show the heading above it in the progress bar."""
        if cell.cell_type == "markdown" and cell.source.lstrip().startswith("#"):
            self.heading = cell.source.lstrip().splitlines()[0].strip("# ")[:40]
        if self.pbar is not None:
            self.pbar.set_description_str(self.heading, refresh=sys.stderr.isatty())
        super().cell_start(cell, cell_index)

    def finish(self, failure: Failure | None, path: str | None) -> None:
        """Write the end of the run into the metadata and save; what never ran stays pending."""
        self.end_time = self.now()
        facts = self.nb.metadata.papermill
        facts["end_time"] = self.end_time.isoformat()
        facts["duration"] = (self.end_time - self.start_time).total_seconds()
        facts["exception"] = True if failure else None
        facts["interp"] = {"status": "completed"}
        if failure:
            facts["interp"] = {
                "status": failure.status,
                "failed_cell": failure.index,
                "ename": failure.ename,
                "evalue": failure.evalue,
            }
        self.cleanup_pbar()
        if path:
            self.write(path)


def join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs in which neighbouring texts of one stream are one, without what a carriage return has overwritten.

    nbclient's own `coalesce_streams` needs time in the square of a line's length: minutes for one of 5 MB.
    """
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.setdefault("parts", [last.text]).append(output.text)
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            text = "".join(output.pop("parts", [output.text]))
            output.text = "\n".join(map(visible, text.split("\n"))) if "\r" in text or "\b" in text else text
    return joined


def visible(line: str) -> str:
    """What a terminal would show of a line, which may end in a carriage return itself, as in `\\r\\n`."""
    line = line.rstrip("\r").rpartition("\r")[2]
    if "\b" not in line:
        return line
    shown: list[str] = []
    for character in line:
        if character != "\b":
            shown.append(character)
        elif shown:
            shown.pop()
    return "".join(shown)


def write_atomically(nb: NotebookNode, path: str) -> None:
    """Replace the file in one step, so that a killed run leaves a whole notebook; lone surrogates become `?`."""
    handler = papermill_io.get_handler(path)
    text = nbformat.writes(nb).encode("utf-8", errors="replace")
    if not isinstance(handler, LocalHandler):
        papermill_io.write(text.decode(), path)
        return
    # papermill may have changed directory for the kernel; its handler remembers where paths start.
    target = Path(handler._cwd or ".", path).resolve()
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    scratch.write_bytes(text)
    scratch.replace(target)
