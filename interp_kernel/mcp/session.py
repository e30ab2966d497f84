"""One session, as it is kept: its notebook, kernel and log, and all that can be asked of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from interp_kernel.errors import InterpError, SessionError
from interp_kernel.mcp.document import Cell, Document, open_document
from interp_kernel.mcp.jupyter_server import ServerKernel
from interp_kernel.mcp.kernels import Kernel, LocalKernel
from interp_kernel.mcp.log import AttemptLog
from interp_kernel.mcp.mask import Mask, kernel_environment
from interp_kernel.mcp.preparation import is_hidden, setup_code, warm_worker
from interp_kernel.mcp.replay import Replay
from interp_kernel.mcp.runs import FINISHED, Run, Runner

REPORT_EVERY_S = 0.5
INTERRUPT_S = 5.0
WORKER = re.compile(r"^%%remote\b|\bInterpClient\(", re.MULTILINE)
"""What a cell has that asks a worker."""
Facts = dict[str, Any]
Progress = Callable[[Facts], Awaitable[None]]


class Session:
    """A notebook and its kernel; every public method of which a server may ask is a coroutine, a verb of the socket."""

    def __init__(self, settings: Facts) -> None:
        """Open or make the notebook; the kernel starts with `start`.

        Args:
            settings: id, folder, notebook, how, is_new, model, jupyter_url.

        Raises:
            NotebookError: The notebook can't be opened.
        """
        self.id, self.folder = str(settings["id"]), Path(settings["folder"])
        path = Path(settings["notebook"])
        self.model: Facts = settings["model"]
        self.is_new = bool(settings["is_new"])
        self.document = Document(path, self.id, {}) if self.is_new else open_document(path, self.id)
        if self.model and not is_hidden(self.model):
            self.document.metadata.setdefault("interp", self.model)
        log = AttemptLog(path)
        kernel = self._make_kernel(path, settings["jupyter_url"])
        self.runner = Runner(kernel, self.document, log, Mask(os.environ, self.model.get("hidden_system_prompt", "")))
        self.replay: Replay | None = None
        self.is_ending = asyncio.Event()
        self.has_ended = False
        self._background: set[asyncio.Task[None]] = set()
        log.append("session", session_id=self.id, notebook=str(path), how=settings["how"])
        for cell_id in log.unended():
            self.document.tell(
                f"Cell {cell_id} was running when its session was killed; it shows what came until then."
            )
            log.append("lost", cell_id=cell_id)

    def _make_kernel(self, path: Path, jupyter_url: str | None) -> Kernel:
        if jupyter_url:
            return ServerKernel(jupyter_url, path, {"session": self.id})
        environment = {**kernel_environment(os.environ), "JPY_SESSION_NAME": str(path)}
        environment.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
        environment.pop("INTERP_MODEL", None)  # the notebook's own metadata say it, so that papermill runs the same
        if is_hidden(self.model):
            environment["INTERP_MODEL"] = json.dumps(self.model)
            environment.pop(str(self.model["hidden_system_prompt"]).removeprefix("secret:"), None)
        return LocalKernel(self.folder, path.parent, environment)

    async def start(self) -> None:
        """Write the notebook and start the kernel; a new notebook is taken away again if that fails.

        Raises:
            SessionError: The notebook can't be written, or the kernel didn't start.
        """
        self.document.save()
        try:
            if self.document.problem:
                raise SessionError(self.document.problem)
            await self.runner.start()
        except SessionError:
            await self.runner.kernel.stop()
            if self.is_new:
                self.document.path.unlink(missing_ok=True)
                shutil.rmtree(self.runner.log.folder, ignore_errors=True)
            raise

    async def end(self, why: str) -> None:
        """Stop the kernel and save for the last time."""
        self.has_ended = True
        await self.runner.stop(why)
        self.document.save()
        self.document.save_elsewhere()

    # ------------------------------------------------------------------------------------------- verbs

    async def info(self) -> Facts:
        """The session in facts; its news are left for whoever works in it."""
        return {**self.facts(self.standing()), "is_taken": self.runner.kernel.is_taken}

    def facts(self, notes: list[str] | None = None) -> Facts:
        """The session in facts."""
        running = self.runner.current
        return {
            "session_id": self.id,
            "notebook_path": str(self.document.path),
            "log_path": str(self.runner.log.path),
            "kernel": self.runner.state,
            "kernel_pid": self.runner.kernel.pid,
            "cells": len(self.document.cells),
            "running_cell_id": running.cell_id if running else None,
            "queued_cell_ids": [run.cell_id for run in self.runner.waiting],
            "jupyter_url": self.runner.kernel.url,
            "notes": self.notes() if notes is None else notes,
        }

    def notes(self) -> list[str]:
        """What others have done to the notebook since this was last asked, and what stands in the way."""
        return [*self.document.news(), *self.standing()]

    def standing(self) -> list[str]:
        """What keeps the files from being written, and how the kernel died."""
        lost = f"The kernel is dead: {self.runner.lost}. Call restart_kernel." if self.runner.lost else ""
        return list(filter(None, [self.document.problem, self.runner.log.problem, lost]))

    async def execute(
        self,
        progress: Progress,
        code: str,
        after: str | None = None,
        wait_s: float = 45,
        timeout_s: float | None = None,
    ) -> Facts:
        """Add a code cell and run it."""
        self.refuse_in_replay()
        self.take_in()
        cell = self.document.insert(code, "code", after)
        try:
            run = self.runner.submit(cell, timeout_s)
        except SessionError:
            self.document.cells.remove(cell)
            raise
        self.replay = None
        return await self.watch(run, progress, wait_s)

    async def init(self, progress: Progress, model: Facts | None = None, wait_s: float = 45) -> Facts:
        """Run a cell that makes `client`."""
        self.refuse_in_replay()
        self.take_in()
        if model and is_hidden(self.model):
            raise SessionError("Whoever started the server has chosen the model; call init_session without `model`.")
        if model:
            self.model = model
            self.document.metadata["interp"] = model
        await self.warm()
        return await self.execute(progress, setup_code(self.options()), wait_s=wait_s)

    async def edit(
        self,
        progress: Progress,
        cell_id: str,
        source: str,
        run: bool = True,
        wait_s: float = 45,
        timeout_s: float | None = None,
    ) -> Facts:
        """Replace the source of a cell, and run it if it is code."""
        self.refuse_in_replay()
        self.take_in()
        cell = self.document.find(cell_id)
        runs = run and cell.kind == "code"
        self.runner.check(cell, runs=runs)
        before = cell.source
        self.document.set_source(cell, source)
        self.log("edit", cell, before=before)
        if runs:
            self.replay = None
            return await self.watch(self.runner.submit(cell, timeout_s), progress, wait_s)
        self.runner.save()
        return self.cell_facts(cell)

    async def insert(self, source: str, kind: str, after: str | None = None) -> Facts:
        """Add a cell without running it."""
        self.take_in()
        cell = self.document.insert(source, kind, after)
        self.log("insert", cell)
        self.runner.save()
        return self.cell_facts(cell)

    async def delete(self, cell_id: str) -> Facts:
        """Take a cell out of the notebook; the log keeps it."""
        self.take_in()
        cell = self.document.find(cell_id)
        self.runner.check(cell, runs=False)
        self.document.delete(cell)
        self.log("delete", cell)
        self.runner.save()
        return self.facts()

    async def move(self, cell_id: str, after: str) -> Facts:
        """Put a cell elsewhere."""
        self.take_in()
        cell = self.document.find(cell_id)
        self.document.move(cell, after)
        self.log("move", cell, after=after)
        self.runner.save()
        return self.facts()

    async def wait(self, progress: Progress, cell_id: str | None = None, wait_s: float = 45) -> Facts:
        """See the end of a cell: of the one named, else of the one that runs, else of the last that ran."""
        if cell_id is None and self.replay is not None:
            return await self.watch_replay(self.replay, progress, wait_s)
        run = self.runner.runs.get(cell_id) if cell_id else self.runner.current or self.last_run()
        if run is not None:
            return await self.watch(run, progress, wait_s)
        if cell_id is None:
            raise SessionError("Nothing runs in this session and nothing has run, so there is nothing to wait for.")
        return self.cell_facts(self.document.find(cell_id))

    async def interrupt(self, cell_id: str | None = None) -> Facts:
        """Stop the running cell, or the one named if it runs or waits."""
        run = self.runner.runs.get(cell_id) if cell_id else self.runner.current
        if cell_id and run is None:
            self.document.find(cell_id)
        if not await self.runner.interrupt(cell_id) or run is None:
            return {"interrupted": False, **self.facts()}
        with suppress(TimeoutError):
            await asyncio.wait_for(run.done.wait(), INTERRUPT_S)
        return {"interrupted": True, **self.run_facts(run)}

    async def restart(self) -> Facts:
        """A fresh kernel; every variable is gone."""
        await self.end_replay()
        await self.runner.restart("the kernel was restarted")
        return self.facts()

    async def run_all(self, progress: Progress, wait_s: float = 45, fresh: bool = True) -> Facts:
        """Run every code cell in order in a fresh kernel and compare its outputs with those before."""
        self.refuse_in_replay()
        self.take_in()
        if any(WORKER.search(cell.source) for cell in self.document.cells if cell.kind == "code"):
            await self.warm()
        if fresh:
            await self.restart()
        self.replay = replay = Replay("run_all" if fresh else "resume")
        self.spawn(replay.run(self.runner))
        return await self.watch_replay(replay, progress, wait_s)

    async def variables(self) -> Facts:
        """The kernel's variables."""
        from interp_kernel.mcp.variables import expression, from_reply

        rows = self.runner.mask.output(from_reply(await self.runner.ask(expression())))
        return {"variables": rows, **self.facts()}

    async def read(self, start: int = 0, limit: int = 20, outputs: bool = True) -> Facts:
        """A stretch of the notebook's cells, from the file as it is now."""
        self.take_in()
        cells = self.document.cells[max(0, start) : max(0, start) + max(0, limit)]
        rows = [
            {"index": self.document.cells.index(cell), **self.last_facts(cell), "source": cell.source} for cell in cells
        ]
        for row in [] if outputs else rows:
            del row["outputs"]
        return {**self.facts(), "rows": rows, "start": max(0, start)}

    async def output(self, cell_id: str) -> Facts:
        """The whole text that a cell has put out."""
        from interp_kernel.mcp.answers import text_of

        cell = self.document.find(cell_id)
        run = self.runner.runs.get(cell_id)
        if run is not None and run.outputs.is_cut:
            return {"text": text_of([{"output_type": "stream", "name": "stdout", "text": run.text.read()}])}
        return {"text": text_of(run.outputs.render() if run else cell.data.get("outputs", []))}

    async def shutdown(self) -> Facts:
        """End the session."""
        self.is_ending.set()
        facts = self.facts()
        await self.end("the session was shut down")
        unsaved = self.document.save_elsewhere()
        return {**facts, "kernel": "dead", "unsaved_path": str(unsaved) if unsaved else None}

    # ------------------------------------------------------------------------------------------- parts

    def options(self) -> Facts:
        """Options of the model that the notebook is about."""
        return self.model or self.document.metadata.get("interp") or {}

    async def warm(self) -> None:
        """Start the worker from here, where the tokens are that it may need: the kernel has none."""
        with suppress(InterpError):  # the cell meets the same error, and tells it
            await asyncio.to_thread(warm_worker, self.options())

    def take_in(self) -> None:
        """Read the file if somebody else has written it; one that can't be read is told with the next save."""
        with suppress(InterpError, OSError):
            self.document.take_in()

    def log(self, event: str, cell: Cell, **fields: Any) -> None:
        """Write down a change of a cell."""
        masked = self.runner.mask.output({"source": cell.source, **fields})
        self.runner.log.append(event, cell_id=cell.id, cell_type=cell.kind, **masked)

    def refuse_in_replay(self) -> None:
        """Keep other cells out of the fresh kernel of `run_all`."""
        if self.replay is not None and not self.replay.done.is_set():
            progress = f"{len(self.replay.rows)} of {self.replay.total} cells so far"
            raise SessionError(
                f"{self.replay.why} is running the notebook ({progress}). Use wait to see its end, or interrupt."
            )

    async def end_replay(self) -> None:
        """Make sure that no cells of an earlier `run_all` go into the next kernel."""
        if self.replay is not None and not self.replay.done.is_set():
            await self.runner.interrupt()
            await self.replay.done.wait()

    def last_run(self) -> Run | None:
        """The run that began last."""
        return max(self.runner.runs.values(), key=lambda run: run.number, default=None)

    async def watch(self, run: Run, progress: Progress, wait_s: float) -> Facts:
        """Wait for the end of a run, for `wait_s` at most, reporting meanwhile."""

        async def report() -> None:
            line = self.runner.mask.text(run.outputs.last_line())
            facts = {
                "session_id": self.id,
                "cell_id": run.cell_id,
                "seconds": run.elapsed_s(),
                "state": run.state,
                "line": line,
            }
            await progress(facts)

        await report()
        await wait_reporting(run.done, report, wait_s)
        return self.run_facts(run)

    async def watch_replay(self, replay: Replay, progress: Progress, wait_s: float) -> Facts:
        """The same for a whole notebook."""

        async def report() -> None:
            line = f"{len(replay.rows)} of {replay.total} cells"
            facts = {"session_id": self.id, "cell_id": None, "seconds": replay.elapsed_s(), "state": replay.state}
            await progress({**facts, "line": line})

        await report()
        await wait_reporting(replay.done, report, wait_s)
        return {"replay": replay.facts(), **self.facts()}

    def run_facts(self, run: Run) -> Facts:
        """A run with the session's own news."""
        facts = run.facts()
        return {"session_id": self.id, **facts, "notes": [*facts["notes"], *self.notes()]}

    def cell_facts(self, cell: Cell) -> Facts:
        """A cell with the session's own news."""
        facts = self.last_facts(cell)
        return {**facts, "notes": [*facts["notes"], *self.notes()]}

    def last_facts(self, cell: Cell) -> Facts:
        """A cell, as its last run left it or as the file has it."""
        run = self.runner.runs.get(cell.id)
        facts: Facts = {"cell_id": cell.id, "state": "not run here", "chars": 0, "notes": []}
        if run is not None and (run.source == cell.source or run.state not in FINISHED):
            facts = run.facts()
        outputs = cell.data.get("outputs", [])
        stored = {"outputs": outputs, "execution_count": cell.data.get("execution_count")}
        return {
            "session_id": self.id,
            "cell_type": cell.kind,
            "seconds": 0.0,
            "error": None,
            "is_cut": False,
            **stored,
            **facts,
        }

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the others."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def wait_reporting(done: asyncio.Event, report: Callable[[], Awaitable[None]], wait_s: float) -> None:
    """Wait for an event, for `wait_s` at most; report now and then."""
    deadline = time.monotonic() + wait_s
    while not done.is_set() and (left := deadline - time.monotonic()) > 0:
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), min(left, REPORT_EVERY_S))
            return
        await report()
