"""The far side in a Modal container: starts the worker and hands messages between Modal's calls and its socket.

The worker is a process of its own, so a cell that holds Python's lock, crashes or is killed for want of memory takes
neither the container nor Modal's heartbeat with it; the next connection starts the worker anew.

Every message is numbered per link. Modal may run a call twice, lose its answer, or run it again in another container:
a number that was seen is dropped, an answer that was not acknowledged is handed over again, and a container that was
replaced refuses, since its `boot` is another one.
"""

# No `from __future__ import annotations`: Modal reads the types of a class's parameters as objects.
import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any

import modal

from interp_kernel.backends.local import LocalBackend, process_exists, socket_path
from interp_kernel.backends.modal.failures import REFUSED
from interp_kernel.backends.modal.image import HF_HOME
from interp_kernel.backends.modal.line import PID_BITS, Line, Numbered
from interp_kernel.errors import WorkerError
from interp_kernel.protocol import Head
from interp_kernel.spec import WorkerSpec

DROPPED = ""  # in place of why the worker ended: it lives, but this client was silent for too long
SILENT_S = 10.0  # without a call from the client, in mid-call, before the worker is told that it has left
FORGET_S = 86_400.0  # the same while nothing runs for it
SETTLE_S = 0.02  # for the worker to notice that another link was closed, so that it counts its clients rightly
WATCH_S = 1.0
IDLE_LOOKS = 3
LOOK_S = 0.1
LOG_CHARS = 10_000
NOTE_S = 2.0


def prepare_worker(settings: Head) -> LocalBackend:
    """The worker of this container, ready to be started."""
    os.environ["INTERP_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="interp-")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the worker sees the same modules
    os.environ.setdefault("HF_HOME", HF_HOME)
    return LocalBackend(WorkerSpec.from_json(settings["spec"]), min_containers=1)


def reason(worker: LocalBackend, pid: int) -> str:
    """Why a worker ended whose connection has ended, which is a moment before it is over."""
    deadline = time.monotonic() + NOTE_S
    while (why := worker.why_ended(pid)) is None and time.monotonic() < deadline:
        time.sleep(SETTLE_S)
    return why or "it closed the connection"


class Host:
    """What one container runs: the worker, and the lines of its clients."""

    def __init__(self, settings: Head, *, wait: bool = False) -> None:
        """Start the worker, which loads its model from now on; `wait` until it has."""
        self.begin()
        self.worker = prepare_worker(settings)
        self._lines: dict[str, Line] = {}
        self._left: dict[str, int] = {}  # links that are no longer kept, with what the worker had taken from each
        self._opening = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._is_held = False
        self._pid, self._is_new = self.worker.start(), True
        self._ended: set[int] = set()
        if wait:
            self._await_load()

    def begin(self) -> None:
        """Be another container than all before, also those that were restored from the same snapshot."""
        self.boot, self._booted = uuid.uuid4().hex, time.monotonic()

    async def exchange(
        self,
        boot: str,
        name: str,
        number: int,
        pending: list[int],
        numbered: list[Numbered],
        received: int,
        wait_s: float,
        left: list[str],
    ) -> Head:
        """Take a link's messages to the worker and hand over the worker's; waits for the first of them.

        Args:
            boot: The container that is meant; empty for a new link.
            name: The link's, made by the client.
            number: The exchange's own, in the order in which the client began them.
            pending: Earlier exchanges whose answers the client waits for.
            numbered: Messages for the worker.
            received: Number up to which the client has the worker's messages.
            wait_s: Longest wait, in seconds.
            left: Links that are no longer used; their own calls may still be on the way.

        Returns:
            `boot`, this container's, and `age_s`; if it is the one that was meant, numbered `messages`, the number of
            the `last` one that there is, of the last of the client's that the worker has `taken`, and why the worker
            has `ended`, if so: empty if it lives and the link was dropped.
        """
        about = {"boot": self.boot, "age_s": time.monotonic() - self._booted}
        if boot not in ("", self.boot):
            return about
        for each in left:
            self._leave(each)
        if not boot and name not in self._lines and name not in self._left:
            await self._open(name)
        if (line := self._lines.get(name)) is None:
            return {**about, "messages": [], "last": 0, "taken": self._left.get(name, 0), "ended": DROPPED}
        line.polls += 1
        try:
            line.take(numbered)
            messages = await line.next(number, pending, received, wait_s)
        finally:
            line.polls -= 1
            line.last_poll = time.monotonic()
        ended = None if line.is_open else await self._why(line.pid)
        return {**about, "messages": messages, "last": line.last, "taken": line.taken, "ended": ended}

    async def hold(self, boot: str) -> None:
        """Keep the container busy until the worker has no call left, for clients that are away."""
        if boot != self.boot or self._is_held:
            return
        self._is_held = True
        idle = 0
        try:
            while idle < IDLE_LOOKS:
                await asyncio.sleep(WATCH_S)
                idle = 0 if await asyncio.to_thread(self._is_busy) else idle + 1
        finally:
            self._is_held = False

    async def control(self, boot: str, verb: str, value: Any) -> Any:
        """What is not for the worker: kill, why, log, end. Raises LookupError if `boot` is another's."""
        if boot not in ("", self.boot):
            raise LookupError(REFUSED)
        verbs: dict[str, Callable[[], Any]] = {
            "kill": lambda: self.worker.kill(value & ((1 << PID_BITS) - 1)),
            "why": lambda: self.worker.why_ended(value & ((1 << PID_BITS) - 1)),
            "log": lambda: self.worker.log_tail(value),
        }
        if verb == "end":
            return await modal.experimental.stop_fetching_inputs.aio()
        return verbs[verb]()

    def end(self) -> None:
        """End the worker with the container."""
        if self._watcher is not None:
            self._watcher.get_loop().call_soon_threadsafe(self._watcher.cancel)
        self.worker.kill(self._pid)

    async def _open(self, name: str) -> None:
        async with self._opening:
            if name in self._lines:
                return  # the same call, run twice
            await asyncio.sleep(SETTLE_S if self._left else 0)
            if not process_exists(self._pid):
                self._pid, self._is_new = await asyncio.to_thread(self.worker.start), True
            self._lines[name] = Line(str(socket_path(self.worker.folder)), self._pid, self.boot, is_first=self._is_new)
            self._is_new = False
            self._watcher = self._watcher or asyncio.create_task(self._watch())

    async def _why(self, pid: int) -> str:
        why = await asyncio.to_thread(reason, self.worker, pid)
        if pid not in self._ended:
            self._ended.add(pid)
            print(f"The worker ended: {why}.\n{self.worker.log_tail(LOG_CHARS)}", file=sys.stderr)  # for Modal's logs
        return why

    def _leave(self, name: str) -> None:
        line = self._lines.pop(name, None)
        self._left.setdefault(name, line.taken if line is not None else 0)
        if line is not None:
            line.close()

    async def _watch(self) -> None:
        """Close the lines of clients that have vanished."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for name, line in list(self._lines.items()):
                limit = SILENT_S if line.following or not line.is_open else FORGET_S
                if not line.polls and now - line.last_poll > limit:
                    self._leave(name)

    def _is_busy(self) -> bool:
        try:
            link = self.worker.attach("interp-gateway")
        except WorkerError:
            return True  # it holds Python's lock, as only a call does
        if link is None:
            return False
        link.close()
        return bool(link.hello["state"] != "idle" or link.hello["queued"])

    def _await_load(self) -> None:
        while (link := self.worker.attach("interp-gateway")) is not None and link.hello["state"] == "loading":
            link.close()
            time.sleep(LOOK_S)


class Gateway:
    """The class that Modal runs; one container for each value of `settings`."""

    settings: str = modal.parameter()

    @modal.enter()
    def start(self) -> None:
        """Start the worker, or be another container than all that were restored from the same snapshot."""
        if not hasattr(self, "host"):
            self.host = Host(json.loads(self.settings))
        self.host.begin()

    @modal.method()
    async def exchange(
        self,
        boot: str,
        name: str,
        number: int,
        pending: list[int],
        numbered: list[Numbered],
        received: int,
        wait_s: float,
        left: list[str],
    ) -> Head:
        """See `Host.exchange`."""
        return await self.host.exchange(boot, name, number, pending, numbered, received, wait_s, left)

    @modal.method()
    async def hold(self, boot: str) -> None:
        """See `Host.hold`."""
        await self.host.hold(boot)

    @modal.method()
    async def control(self, boot: str, verb: str, value: Any) -> Any:
        """See `Host.control`."""
        return await self.host.control(boot, verb, value)

    @modal.exit()
    def end(self) -> None:
        """See `Host.end`."""
        self.host.end()


class SnapshotGateway(Gateway):
    """The same where Modal may keep a snapshot of the container to start others from."""

    @modal.enter(snap=True)
    def load(self) -> None:
        """Start the worker and wait until its model is loaded, for that is what the snapshot is to hold."""
        self.host = Host(json.loads(self.settings), wait=True)
