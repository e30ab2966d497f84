"""Runs of cells on one kernel: one at a time, in order, each bound to its cell by the messages' parent id."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from interp_kernel.errors import SessionError
from interp_kernel.mcp.document import Cell, Document
from interp_kernel.mcp.kernels import Kernel, Message
from interp_kernel.mcp.log import AttemptLog, RunText
from interp_kernel.mcp.mask import Mask
from interp_kernel.mcp.outputs import Outputs, comparable

TICK_S = 0.1
SILENT_S = 2.0  # then the kernel is asked for a sign, which it gives once the cell has ended
LOST_S = 1.0  # after that sign; by then the end of the cell would have come
SAVE_EVERY_S = 1.0
SAVE_SHARE = 20
"""Between two saves in mid-cell lies at least this many times the duration of the last."""
LATE_MESSAGES = 10
"""Threads of a kernel may hand over as many in another order than they were counted in."""
FINISHED = ("done", "failed", "interrupted", "died", "cancelled")


@dataclass
class Run:
    """One execution of a cell.

    `state` is queued, running, done, failed (it raised), interrupted, died (its kernel did), or cancelled (never ran).
    """

    cell_id: str
    source: str
    number: int
    text: RunText
    outputs: Outputs
    timeout_s: float | None = None
    state: str = "queued"
    message_id: str = ""
    started: float = 0.0
    seconds: float = 0.0
    count: int | None = None
    error: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    reply: dict[str, Any] | None = None
    is_idle: bool = False
    is_stopped: bool = False
    heard: float = 0.0
    sign_id: str = ""
    sign: float | None = None
    first: int = 0  # the kernel counts its messages: the number of the first that is of this run
    last: int = 0
    taken: int = 0  # how many have come since the first
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def elapsed_s(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started if self.state == "running" else self.seconds

    def count_message(self, number: int) -> None:
        """Note that a message of the kernel has come."""
        self.first = self.first or number
        if number >= self.first:
            self.last, self.taken = max(self.last, number), self.taken + 1

    def lost(self) -> int:
        """How many messages the kernel has sent in this run that never came; a few may only be late."""
        missing = self.last - self.first + 1 - self.taken
        return missing if missing > LATE_MESSAGES else 0

    def facts(self) -> dict[str, Any]:
        """The run as answers tell it."""
        return {
            "cell_id": self.cell_id,
            "state": self.state,
            "execution_count": self.count,
            "seconds": round(self.elapsed_s(), 3),
            "error": self.error,
            "outputs": self.outputs.render(),
            "is_cut": self.outputs.is_cut,
            "chars": self.text.chars,
            "log": str(self.text.path) if self.text.is_in_file else None,
            "notes": list(self.notes),
        }


class Runner:
    """Runs cells of a document on a kernel, and writes down what comes of it."""

    def __init__(self, kernel: Kernel, document: Document, log: AttemptLog, mask: Mask) -> None:
        self.kernel, self.document, self.log, self.mask = kernel, document, log, mask
        self.current: Run | None = None
        self.waiting: deque[Run] = deque()
        self.runs: dict[str, Run] = {}
        self.lost = "it has not been started"
        self.cells_run = 0
        self._number = 0
        self._by_message: dict[str, Run] = {}
        self._asked: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._unsaved: set[str] = set()
        self._saved, self._save_cost_s = 0.0, 0.0

    # ------------------------------------------------------------------------------------------ kernel

    @property
    def state(self) -> str:
        """State of the kernel: idle, busy or dead."""
        if self.lost:
            return "dead"
        return "busy" if self.current or self.waiting else "idle"

    async def start(self, *, fresh: bool = False) -> None:
        """Start the kernel; a `fresh` one has no variables of anybody."""
        await self.kernel.start(fresh=fresh)
        self.lost, self.cells_run = "", 0
        self.log.append("kernel started", pid=self.kernel.pid)
        self._tasks = [asyncio.create_task(work()) for work in (self._read, self._tick)]
        for task in self._tasks:
            task.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """A fault of this program ends the cell with a word, instead of leaving it running for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)
            self._died(f"its keeper failed ({type(error).__name__}: {error})")

    async def stop(self, why: str) -> None:
        """End the kernel; a running cell ends as interrupted, waiting ones are cancelled."""
        self.lost = self.lost or why
        for run in [self.current] if self.current else []:
            self._finish(run, "interrupted", why)
        self._drop_waiting(why)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self.kernel.stop()
        self.log.append("kernel stopped", why=why)

    async def restart(self, why: str) -> None:
        """A fresh kernel in place of this one."""
        await self.stop(why)
        await self.start(fresh=True)

    async def interrupt(self, cell_id: str | None = None) -> bool:
        """Stop the running cell, or take a waiting one out of the queue; returns whether there was one.

        Args:
            cell_id: Only if it is this one.
        """
        for run in [run for run in self.waiting if run.cell_id == cell_id]:
            self.waiting.remove(run)
            self._finish(run, "cancelled", "it was taken out of the queue before it ran")
            return True
        run_now = self.current
        if run_now is None or cell_id not in (None, run_now.cell_id):
            return False
        run_now.is_stopped = True
        await self.kernel.interrupt()
        return True

    # -------------------------------------------------------------------------------------------- runs

    def check(self, cell: Cell, *, runs: bool) -> None:
        """Refuse to change a cell that runs or waits, and to run what can't be run.

        Raises:
            SessionError: It runs or waits already, or it shall run and the kernel is dead.
        """
        if (before := self.runs.get(cell.id)) is not None and before.state not in FINISHED:
            raise SessionError(f"Cell {cell.id} is {before.state}. Use wait to see its end, or interrupt to stop it.")
        if runs and self.lost:
            raise SessionError(
                f"The kernel is dead ({self.lost}) and all of its variables are gone; nothing runs until you call "
                "restart_kernel. run_all then runs the notebook's cells again."
            )

    def submit(self, cell: Cell, timeout_s: float | None = None) -> Run:
        """Put a code cell into the queue; it is refused as `check` says."""
        self.check(cell, runs=True)
        self._number += 1
        text = self.log.run_text(f"{self.document.session_id}-{self._number:04}-{cell.id}")
        outputs = Outputs(lambda piece: self._keep(text, piece), self.mask)
        run = Run(cell.id, cell.source, self._number, text, outputs, timeout_s)
        self.runs[cell.id] = run
        self.waiting.append(run)
        if self.current is None:
            self._begin_next()
        else:
            self.save()
        return run

    def _keep(self, text: RunText, piece: str) -> str:
        piece = self.mask.text(piece)
        text.add(piece)
        return piece

    def _begin_next(self) -> None:
        if not self.waiting or self.lost:
            return
        run = self.current = self.waiting.popleft()
        run.state, run.started = "running", time.monotonic()
        run.heard = run.started
        self._show(run)
        self.save()
        content = {"code": run.source, "silent": False, "store_history": True, "user_expressions": {}}
        asked = {**content, "allow_stdin": False, "stop_on_error": False}
        self.log.append("begin", number=run.number, cell_id=run.cell_id, source=self.mask.text(run.source))
        run.message_id = self.kernel.send("execute_request", asked)
        self._by_message[run.message_id] = run
        self.cells_run += 1

    def _how_it_ended(self, run: Run) -> str:
        reply = run.reply or {}
        run.count = reply.get("execution_count")
        if reply.get("status") == "ok":
            return "done"
        run.error = {name: self.mask.text(str(reply.get(name, ""))) for name in ("ename", "evalue")}
        if run.error["ename"] == "KeyboardInterrupt" and run.is_stopped:
            return "interrupted"
        return "failed"

    def _finish(self, run: Run, state: str, why: str = "") -> None:
        if run.state in FINISHED:
            return
        run.seconds = run.elapsed_s()
        run.state = state
        if lost := run.lost():
            said = f"[{lost} messages of the kernel got lost, for they came too fast: there was more output.]\n"
            run.outputs.add("stream", {"name": "stderr", "text": said})
        run.outputs.close()
        if why:
            run.error = run.error or {"ename": "KernelDiedError" if state == "died" else "CellStopped", "evalue": why}
        if state == "died":
            run.outputs.add("error", {**(run.error or {}), "traceback": [f"KernelDiedError: {why}"]})
        self._show(run)
        self._unsaved.discard(run.cell_id)
        self.save()
        self._log(run)
        run.done.set()
        if run is self.current:
            self.current = None
            self._begin_next()

    def _drop_waiting(self, why: str) -> None:
        while self.waiting:
            self._finish(self.waiting.popleft(), "cancelled", why)

    def _show(self, run: Run) -> None:
        """Put the outputs of a run into its cell."""
        try:
            cell = self.document.find(run.cell_id)
        except SessionError:
            note = "The cell was deleted from the notebook while it ran; its output is in the log alone."
            run.notes = [note]
            return
        if cell.kind == "code" and run.state not in ("queued", "cancelled"):
            # A cell that has a count has ended, also if its keeper should be killed now.
            self.document.set_outputs(cell, run.outputs.render(), run.count if run.state in FINISHED else None)

    def _log(self, run: Run) -> None:
        outputs = run.outputs.render()
        digest = hashlib.sha256(json.dumps(comparable(outputs), sort_keys=True).encode("utf-8", "replace")).hexdigest()
        self.log.append(
            "run",
            number=run.number,
            cell_id=run.cell_id,
            source=self.mask.text(run.source),
            state=run.state,
            execution_count=run.count,
            seconds=round(run.seconds, 3),
            error=run.error,
            cost=self.kernel.calls.cost() if self.kernel.calls else None,
            output_sha256=digest,
            output_chars=run.text.chars,
            output=run.text.path.name if run.text.is_in_file else run.text.read(),
        )

    # ------------------------------------------------------------------------------------------ messages

    async def ask(self, expression: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """Value of an expression in the idle kernel, as `user_expressions` reply with it.

        Raises:
            SessionError: The kernel is busy or dead, or doesn't answer in time.
        """
        if self.lost:
            raise SessionError(f"The kernel is dead ({self.lost}), so it has no variables. Call restart_kernel.")
        if self.current is not None:
            raise SessionError(
                f"The kernel has been busy with cell {self.current.cell_id} for {self.current.elapsed_s():.0f} s and "
                "can't be asked. Use wait to see its end, or interrupt to stop it."
            )
        message_id = self._ask_for(expression)
        self._asked[message_id] = asyncio.get_running_loop().create_future()
        try:
            reply = await asyncio.wait_for(self._asked[message_id], timeout_s)
        except TimeoutError:
            raise SessionError(
                f"The kernel did not answer within {timeout_s:g} s; a thread of it may hold it up."
            ) from None
        finally:
            self._asked.pop(message_id, None)
        return dict(reply.get("user_expressions", {}).get("value", {}))

    def _ask_for(self, expression: str) -> str:
        """Send a request for a value, and return its id."""
        content = {"code": "", "silent": True, "store_history": False, "allow_stdin": False, "stop_on_error": False}
        return self.kernel.send("execute_request", {**content, "user_expressions": {"value": expression}})

    async def _read(self) -> None:
        async for message in self.kernel.messages():
            self._take(message)

    def _take(self, message: Message) -> None:
        kind, content = message["header"]["msg_type"], message["content"]
        parent = message.get("parent_header", {}).get("msg_id", "")
        if kind == "execute_reply" and (asked := self._asked.get(parent)) is not None and not asked.done():
            asked.set_result(content)
        if self.current is not None and kind == "execute_reply" and parent == self.current.sign_id:
            self.current.sign = time.monotonic()
        run = self._by_message.get(parent)
        self._count(message["header"], parent)
        if run is None:
            return
        run.heard = time.monotonic()
        if kind == "execute_reply":
            run.reply = content
        elif kind == "status":
            run.is_idle = content["execution_state"] == "idle"
        elif kind == "execute_input":
            run.count = content.get("execution_count")
        elif kind == "update_display_data":
            self._update_display(content)
        else:
            run.outputs.add(kind, content)
            self._unsaved.add(run.cell_id)
        if run is self.current and run.reply is not None and run.is_idle:
            self._finish(run, self._how_it_ended(run))

    def _count(self, header: dict[str, Any], parent: str) -> None:
        """Count a message in, where all that a kernel sends comes here: a Jupyter server has other clients too."""
        now, number = self.current, header["msg_id"].rpartition("_")[2]
        if now is None or self.kernel.url is not None or not number.isdecimal():
            return
        if parent == now.message_id or (now.first and (not parent or parent != now.sign_id)):
            now.count_message(int(number))

    def _update_display(self, content: dict[str, Any]) -> None:
        display_id = content.get("transient", {}).get("display_id", "")
        for run in self.runs.values():
            if run.outputs.update(display_id, content):
                self._unsaved.add(run.cell_id)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._save_if_due()
            run = self.current
            if run is not None and run.timeout_s and not run.is_stopped and run.elapsed_s() > run.timeout_s:
                run.notes.append(f"It ran longer than its timeout_s of {run.timeout_s:g} and was interrupted.")
                await self.interrupt(run.cell_id)
            if run is not None and run is self.current:
                self._look_for_a_lost_end(run)
            if why := self.kernel.why_ended():
                await asyncio.sleep(TICK_S)  # what it sent last is read first
                self._died(why)
                return

    def _look_for_a_lost_end(self, run: Run) -> None:
        """Finish a run whose reply or idle status was lost, as in a full queue of the kernel or on a broken line.

        A kernel runs one after the other what it is asked to run. Other questions it may answer while the cell
        runs: ours does so while it waits for a worker.
        """
        now = time.monotonic()
        if not run.sign_id and now - run.heard > SILENT_S:
            run.sign_id = self._ask_for("None")
        if run.sign is None or now - run.sign < LOST_S:
            return
        if run.reply is None:
            error = next((output for output in run.outputs.render() if output["output_type"] == "error"), None)
            run.reply = {"execution_count": run.count, "status": "ok" if error is None else "error", **(error or {})}
        run.notes.append("The kernel's word that the cell had ended did not arrive; it has ended, for it answers.")
        self._finish(run, self._how_it_ended(run))

    def _died(self, why: str) -> None:
        lost = f"; the variables that its {self.cells_run} cells made are gone, and a warm worker keeps its model"
        self.lost = why
        self.log.append("kernel died", why=why)
        if self.current is not None:
            self._finish(self.current, "died", f"The kernel ended: {why}{lost}. Call restart_kernel to go on.")
        self._drop_waiting(f"the kernel ended before it ran: {why}")

    # --------------------------------------------------------------------------------------------- file

    def save(self) -> None:
        """Write the notebook."""
        start = time.monotonic()
        self.document.save()
        self._saved = time.monotonic()
        self._save_cost_s = self._saved - start

    def _save_if_due(self) -> None:
        if self._unsaved and time.monotonic() - self._saved >= max(SAVE_EVERY_S, SAVE_SHARE * self._save_cost_s):
            for run in [self.runs[cell_id] for cell_id in self._unsaved if cell_id in self.runs]:
                self._show(run)
            self._unsaved.clear()
            self.save()
