"""The record of a run in the notebook's own metadata: what each cell's state is, and how it reaches the disk."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from papermill.engines import NotebookExecutionManager
from papermill.iorw import LocalHandler, papermill_io

from interp_kernel.notebook.files import replace
from interp_kernel.notebook.provenance import Ledger, OnCell
from interp_kernel.notebook.terminal import shown

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

    def __init__(self, nb: NotebookNode, *papermills: Any, ledger: Ledger, on_cell: OnCell | None = None) -> None:
        """The first arguments are papermill's; `on_cell` is called as each cell begins."""
        super().__init__(nb, *papermills)
        self.ledger, self.on_cell = ledger, on_cell

    def save(self, **_: Any) -> None:
        """Save if the last save is long enough ago; what a full disk refuses now may be taken at the end."""
        pause = max(SAVE_EVERY_S, SAVE_SHARE * self.save_cost_s)
        if self.output_path and self.autosave_cell_every and time.monotonic() - self.saved >= pause:
            self.saved = time.monotonic()
            with contextlib.suppress(OSError):
                # nbformat's own layout takes ten times as long for numbers; the last save has it.
                self.write(self.output_path, functools.partial(json.dumps, ensure_ascii=False))

    def autosave_cell(self, **_: Any) -> None:
        """What papermill calls at every output."""
        self.save()

    def write(self, path: str, encode: Callable[[NotebookNode], str] = nbformat.writes) -> None:
        """Save now."""
        start = time.monotonic()
        write_atomically(encode(self.nb), path)
        self.saved = time.monotonic()
        self.save_cost_s = self.saved - start

    def cell_start(self, cell: NotebookNode, cell_index: int | None = None, **_: Any) -> None:
        """Mark the cell running and show the heading above it in the progress bar."""
        if cell.cell_type == "markdown" and cell.source.lstrip().startswith("#"):
            self.heading = cell.source.lstrip().splitlines()[0].strip("# ")[:40]
        if self.pbar is not None:
            self.pbar.set_description_str(self.heading, refresh=sys.stderr.isatty())
        if self.on_cell is not None and cell_index is not None:
            self.on_cell(cell_index, len(self.nb.cells))
        super().cell_start(cell, cell_index)
        self.ledger.cell_begins()

    def cell_complete(self, cell: NotebookNode, cell_index: int | None = None, **_: Any) -> None:
        """Mark the cell completed unless it failed, and take down how it went."""
        super().cell_complete(cell, cell_index)
        cell.metadata.papermill["duration"] = self.ledger.cell_seconds()  # papermill's own follows a clock that jumps
        if cell.cell_type == "code" and cell_index is not None:
            self.ledger.cell_ended(cell_index, cell)

    def finish(self, failure: Failure | None, path: str | None) -> None:
        """Write the end of the run into the metadata and save; what never ran stays pending."""
        self.end_time = self.now()
        ended: dict[str, Any] = {"status": "completed"}
        if failure:
            ended = {"status": failure.status, "failed_cell": failure.index}
            ended |= {"ename": failure.ename, "evalue": failure.evalue}
        run = self.ledger.finish(self.nb, ended)
        options = model_options(self.nb) or {}
        self.nb.metadata["interp"] = {**({"model": options} if isinstance(options, str) else options), "run": run}
        self.nb.metadata.papermill.update(
            end_time=self.end_time.isoformat(),
            duration=run["seconds"],
            exception=True if failure else None,
            interp=ended,
        )
        self.cleanup_pbar()
        if path:
            self.write(path)


def model_options(nb: NotebookNode) -> Any:
    """The model that a notebook names for its remote cells, without the record of an earlier run beside it."""
    given = nb.metadata.get("interp")
    return {name: value for name, value in given.items() if name != "run"} if isinstance(given, dict) else given


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
            output.text = shown("".join(output.pop("parts", [output.text]))).rstrip("\r")
    return joined


def write_atomically(text: str, path: str) -> None:
    """Replace the file in one step, so that a killed run leaves a whole notebook; lone surrogates become `?`."""
    handler = papermill_io.get_handler(path)
    if isinstance(handler, LocalHandler):
        # papermill may have changed directory for the kernel; its handler remembers where paths start.
        replace(Path(handler._cwd or ".", path).resolve(), text)
    else:
        papermill_io.write(text.encode("utf-8", "replace").decode(), path)
