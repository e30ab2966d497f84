"""The worker behind its verbs, whatever carries them: hello, submit, events, interrupt, and what belongs to values.

The main thread loads the model and then runs calls one at a time; any other thread may use the verbs meanwhile.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
import threading
import time
import traceback
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from interp_kernel.protocol import PROTOCOL, BlobFile, BlobStore, Head
from interp_kernel.spec import WorkerSpec
from interp_kernel.worker import introspection, modules
from interp_kernel.worker.events import Call, CallLog, Flusher, Reader, Send
from interp_kernel.worker.interrupts import Interrupter
from interp_kernel.worker.streams import Streams
from interp_kernel.worker.values import Values

if TYPE_CHECKING:  # these load torch, which the worker does only once clients can see that it does
    from interp_kernel.worker.execution import Runner

LOAD = "load"  # the id of the first call, which loads the model
ORPHAN_S = 5.0
PAUSE_S = 0.002
REMEMBERED_IDS = 10_000


@dataclass
class Client:
    """A notebook or script that uses this worker."""

    connections: int = 0
    gone_since: float = field(default_factory=time.monotonic)
    holds: bool = False


class Service:
    """One warm worker."""

    def __init__(self, spec: WorkerSpec, folder: Path, scaledown_window: float, min_containers: int) -> None:
        """Must be made in the main thread.

        Args:
            spec: What to load.
            folder: Where output files may be written.
            scaledown_window: Seconds without a call after which the worker ends.
            min_containers: With 1 or more it never ends by itself.
        """
        self.spec, self.folder = spec, folder
        self.scaledown_window, self.min_containers = scaledown_window, min_containers
        self.generation = uuid.uuid4().hex
        self._version = version("interp-kernel")  # it is in a file, and a call may take all descriptors
        self.info: dict[str, Any] = {}
        self.interrupter = Interrupter()
        self.streams = Streams(self.interrupter.shield)
        self.values, self.blobs = Values(), BlobStore()
        self.exit_reason: str | None = None
        self._runner: Runner | None = None
        self._flusher = Flusher()
        self._logs: dict[str, CallLog] = {}
        self._calls: dict[str, Call] = {}
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._queues: OrderedDict[str, deque[Call]] = OrderedDict()
        self._running: Call | None = None
        self._reader: Reader | None = None  # by which the last call came
        self._clients: dict[str, Client] = {}
        self._active = time.monotonic()
        self._state = threading.RLock()
        self._ready: SimpleQueue[None] = SimpleQueue()  # one item for each call that was queued
        self._new_log(LOAD, "")

    # ---------------------------------------------------------------------------------------- verbs

    def hello(self) -> Head:
        """Who this worker is and what it does now."""
        runner = self._runner
        return {
            "protocol": PROTOCOL,
            "version": self._version,
            "python": list(sys.version_info[:3]),
            "generation": self.generation,
            "pid": os.getpid(),
            "host": platform.node(),
            "state": "loading" if runner is None else "busy" if self._running else "idle",
            "running": self._running.id if self._running else None,
            "queued": sum(map(len, self._queues.values())),
            "clients": sum(c.connections > 0 for c in list(self._clients.values())),
            "damage": runner.guard.damage if runner else [],
            "scaledown_window": self.scaledown_window,
            "min_containers": self.min_containers,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "info": self.info,
        }

    def submit(
        self, head: Head, inline: Sequence[bytearray], file: BlobFile | None, send: Send, reader: Reader
    ) -> Head | None:
        """Queue a call whose events go to `send`; a second submission of the same id changes nothing.

        After the call, the main thread waits for the next one at `reader` for a moment.

        Returns:
            An empty dict if the call is queued, or has failed at once; None if its id was submitted before; or what the
            client must send along in a new submission: `digests` and `modules`, or `generation` if it was meant for
            another worker.
        """
        if head["generation"] != self.generation:
            return {"generation": self.generation}
        with self._state:
            if head["id"] in self._logs or head["id"] in self._finished:
                return None
            blobs = self.blobs.missing(head)
            sources = modules.missing(m["digest"] for m in head.get("modules", ()) if m["source"] is None)
            if blobs or sources:
                return {"digests": blobs, "modules": sources}
            log = self._new_log(head["id"], head["client"])
            log.listen(send, 0)
            try:
                frames = self.blobs.frames(head, inline, file)
            except (OSError, MemoryError) as error:
                text = f"The inputs do not fit into the worker's memory: {error}"
                failure = {"ename": "MemoryError", "evalue": text, "traceback": [f"MemoryError: {text}"]}
                log.emit({"event": "result", "error": failure}, last=True)
                return {}
            call = Call(head["id"], head["client"], head, frames, log, reader, bool(head.get("background")))
            log.kept = call.background
            self._calls[call.id] = call
            if call.client not in self._queues:
                self._queues[call.client] = deque()
                self._queues.move_to_end(call.client, last=False)  # it never had a turn
            self._queues[call.client].append(call)
            self._announce_queue(call)
        self._ready.put(None)  # the last thing: from here on two threads want Python's lock
        return {}

    def events(self, call_id: str, after: int, send: Send) -> bool:
        """Send the events of a call from a position on, then each new one; False if the call is not known."""
        with self._state:
            log = self._logs.get(call_id)
        if log is None:
            return False
        log.listen(send, after)
        return True

    def acknowledge(self, call_id: str) -> None:
        """The client has the result of a call, which is then forgotten."""
        with self._state:
            log = self._logs.get(call_id)
            if log is not None and call_id != LOAD and log.done:
                self._forget(call_id)

    def interrupt(self, call_id: str, client: str) -> bool:
        """Stop a call, queued or running; True if it was there. A load is stopped only for all who wait for it."""
        if call_id == LOAD and any(c.connections for name, c in list(self._clients.items()) if name != client):
            return False
        with self._state:
            call = self._calls.get(call_id)
            for queue in self._queues.values():
                if call is not None and call in queue:
                    queue.remove(call)
                    self._cancel(call)
                    return True
        return self.interrupter.interrupt(call_id) or call is not None

    def release(self, value_ids: list[int]) -> None:
        """Free values that no notebook refers to any more."""
        self.values.release(value_ids)

    def complete(self, text: str, names: dict[str, int]) -> list[str]:
        """Completions of the dotted name that `text` ends with; also while a call runs."""
        return introspection.complete(text, self._visible(names))

    def inspect(self, name: str, names: dict[str, int]) -> str | None:
        """Signature and documentation of a dotted name; also while a call runs."""
        return introspection.inspect_name(name, self._visible(names))

    def hold(self, client: str) -> None:
        """Stay as long as this client is connected."""
        with self._state:
            self._clients[client].holds = True

    def set_window(self, scaledown_window: float, min_containers: int) -> None:
        """Change how long the worker stays without calls; the last client that says so decides."""
        self.scaledown_window, self.min_containers = scaledown_window, min_containers

    def stop(self, reason: str) -> NoReturn:
        """End this process; the reason is what every client is told."""
        with suppress(OSError):  # the disk is full
            (self.folder / "reason").write_text(reason)
        os._exit(0)

    # -------------------------------------------------------------------------------------- clients

    def connected(self, client: str) -> None:
        """A connection of a client was made."""
        with self._state:
            entry = self._clients.setdefault(client, Client())
            entry.connections += 1

    def disconnected(self, client: str) -> None:
        """A connection of a client has ended."""
        with self._state:
            entry = self._clients[client]
            entry.connections -= 1
            entry.gone_since = time.monotonic()

    def tick(self) -> None:
        """What time brings: orphaned calls are stopped, an idle worker ends. Called twice a second."""
        now = time.monotonic()
        with self._state:
            gone = [n for n, c in self._clients.items() if not c.connections and now - c.gone_since > ORPHAN_S]
            orphans = [c for c in self._calls.values() if c.client in gone and not c.background]
        for call in orphans:
            self.interrupt(call.id, call.client)
        with self._state:
            for client in gone:
                if all(call.client != client for call in self._calls.values()):
                    self._forget_client(client)
            busy = self._running is not None or any(self._queues.values()) or self._runner is None
            held = self.min_containers > 0 or any(c.holds and c.connections for c in self._clients.values())
            if busy:
                self._active = now
            elif not held and now - self._active > self.scaledown_window:
                self.stop(f"idle for {self.scaledown_window:g} s")

    # ---------------------------------------------------------------------------------- main thread

    def run(self) -> None:
        """Load the model, then run calls until the process ends. Main thread only."""
        log = self._logs[LOAD]
        self.streams.begin(log)
        runner, error = self.interrupter.run(LOAD, self._load)
        self.streams.end()
        if error is not None:
            self._fail_load(log, error)
        self._runner = runner
        log.emit({"event": "result", "info": self.info}, last=True)
        while True:
            call = self._next()
            self.streams.begin(call.log)
            try:
                runner.run(call, self.streams.end)
            except BaseException as failure:  # noqa: BLE001 - the run loop: whatever a result does, the model stays
                log_failure(call, failure)
            with self._state:
                self._running = None
                self._active = time.monotonic()
                del self._calls[call.id]
            self._reader = call.reader
            del call  # else its inputs stay until the next one

    def _next(self) -> Call:
        """The oldest call of the client that has waited longest for a turn."""
        while True:
            self._await_call()
            with self._state:
                client, queue = next(((c, q) for c, q in self._queues.items() if q), ("", None))
                if queue:  # else the call was stopped before its turn came
                    self._queues.move_to_end(client)
                    call = self._running = queue.popleft()
                    break
        if self._reader is not None and self._reader is not call.reader:
            self._reader.give_back()
        return call

    def _await_call(self) -> None:
        """Sleep until a call is queued. A pause is the time to check the model, if the last calls left that out.

        The next call often comes by the connection of the last one, which is read here until there is a pause. Another
        connection's call is seen at once if it came during a call, else at the end of that wait.
        """
        while self._reader is not None and self._ready.empty():
            if not self._reader.take_call(PAUSE_S):
                self._reader = None
        if self._runner is not None and self._runner.unchecked:
            try:
                self._ready.get(timeout=PAUSE_S)
                return
            except Empty:
                self._runner.check()
        self._ready.get()

    def _load(self) -> Runner:
        with few_collections():
            from interp_kernel.worker.display import Display
            from interp_kernel.worker.execution import Runner
            from interp_kernel.worker.loading import load

            loaded = load(self.spec, self._show_load)
            self.info = loaded.info
            return Runner(loaded.model, loaded.tokenizer, self.values, Display(self._emit), self.interrupter)

    def _show_load(self, text: str, fraction: float | None) -> None:
        n = None if fraction is None else round(100 * fraction)
        head = {"event": "progress", "id": LOAD, "text": text, "n": n, "total": n and 100, "unit": "%"}
        with self.interrupter.shield():
            self._logs[LOAD].emit({**head, "done": False, "leave": False})

    def _fail_load(self, log: CallLog, error: BaseException) -> NoReturn:
        from interp_kernel.errors import LoadError
        from interp_kernel.worker.rendering import render

        ename, text = type(error).__name__, str(error)
        traceback = [] if isinstance(error, LoadError | KeyboardInterrupt) else render(error, {})
        log.emit(
            {"event": "result", "error": {"ename": ename, "evalue": text, "traceback": traceback}},
            last=True,
        )
        deadline = time.monotonic() + 2
        while self._is_used() and time.monotonic() < deadline:  # until those who wait have been told and have left
            time.sleep(0.05)
        why = "its load was stopped" if ename == "KeyboardInterrupt" else f"{ename}: {text}"
        self.stop(f"the model was not loaded: {why}")

    # ------------------------------------------------------------------------------------- internal

    def _is_used(self) -> bool:
        with self._state:
            return any(client.connections for client in self._clients.values())

    def _new_log(self, call_id: str, client: str) -> CallLog:
        log = CallLog(call_id, client, self.folder, self._flusher)
        self._logs[call_id] = log
        return log

    def _emit(self, head: Head) -> None:
        """Events of displays and progress bars, which belong to the call that runs."""
        call = self._running
        if call is None or self.streams.is_late():
            return
        if threading.current_thread() is threading.main_thread():
            with self.interrupter.shield():
                call.log.emit(head)
        else:
            call.log.emit(head)

    def _announce_queue(self, call: Call) -> None:
        is_running = self._running is not None and not self._running.log.done
        ahead = sum(map(len, self._queues.values())) - 1 + is_running
        if ahead and self._runner is not None:
            text = f"waiting for {ahead} other call{'s' * (ahead > 1)} on this worker"
            call.log.emit({"event": "queued", "text": text})

    def _cancel(self, call: Call) -> None:
        """End a call that never ran."""
        error = {"ename": "KeyboardInterrupt", "evalue": "stopped before it began", "traceback": []}
        del self._calls[call.id]
        call.log.emit({"event": "result", "error": error}, last=True)

    def _forget(self, call_id: str) -> None:
        del self._logs[call_id]
        self._finished[call_id] = None
        while len(self._finished) > REMEMBERED_IDS:
            self._finished.popitem(last=False)

    def _forget_client(self, client: str) -> None:
        del self._clients[client]
        self._queues.pop(client, None)
        self.values.release_client(client)
        for call_id in [i for i, log in self._logs.items() if log.client == client and not log.kept]:
            self._forget(call_id)
        if self._runner is not None:
            self._runner.random.forget(client)

    def _visible(self, names: dict[str, int]) -> dict[str, Any]:
        space: dict[str, Any] = {}
        if self._runner is not None:
            space.update(model=self._runner.model, tokenizer=self._runner.tokenizer)
        for name, value_id in names.items():
            try:
                space[name] = self.values.get(value_id)
            except LookupError:
                continue
        return space


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for garbage seldom while libraries are imported, which takes a sixth off a start."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def log_failure(call: Call, error: BaseException) -> None:
    """End a call whose result could not be made, with the reason."""
    from interp_kernel.worker.rendering import evalue, render

    text = f"The call ran, but its result could not be returned: {evalue(error)}"
    failure = {"ename": type(error).__name__, "evalue": text, "traceback": render(error, {})}
    call.log.emit({"event": "result", "error": failure}, last=True)


def tick_forever(service: Service) -> None:
    """Run `tick` in a thread."""

    def loop() -> None:
        while True:
            time.sleep(0.5)
            try:
                service.tick()
            except Exception:  # noqa: BLE001 - without ticks the worker never ends, and keeps what gone clients held
                traceback.print_exc()

    threading.Thread(target=loop, name="interp-tick", daemon=True).start()
