"""The near side of one warm worker: submit a call, follow its events, stop it, and know when the worker is gone."""

from __future__ import annotations

import importlib
import itertools
import os
import queue
import signal
import sys
import threading
import time
import types
import uuid
import weakref
from _signal import signal as set_handler  # type: ignore[import-not-found]  # signal.signal costs 10 times as much
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from interp_kernel.backends import Backend, Link, Message, OnEvent
from interp_kernel.errors import (
    CallTimeoutError,
    InterpError,
    LoadError,
    LostValueError,
    ShipError,
    WorkerDiedError,
    WorkerError,
    WorkerRefusedError,
    remote_error,
    stopped,
)
from interp_kernel.protocol import PYTHON, BlobStore, Buffer, Head, Packed, Reference, Shipment, dumps, loads

LOAD = "load"
GRACE_S = 10.0  # from a stop to the offer, or on a timeout the decision, to kill the worker
ALIVE_S = 0.5  # how often a silent worker is looked after
SLOW_IMPORTS = {"transformers": b"transformers", "torch": b"_rebuild_tensor"}  # and what in a pickle needs them
END_S = 3.0  # within this a worker is gone that has said that it ends


class RemoteValue:
    """A value that stays on the worker; use it in remote code as if it were here, or `fetch()` it.

    Dropping the last reference to it frees the value on the worker.
    """

    def __init__(self, session: Session, info: dict[str, Any], name: str = "") -> None:
        """Made by a session; `info` is what `describe` told about the value on the worker."""
        self.session, self.info, self.name = session, info, name
        self.generation = session.generation
        if isinstance(info["id"], int):
            weakref.finalize(self, _releases.put, (weakref.ref(session), self.generation, info["id"])).atexit = False

    @property
    def is_lost(self) -> bool:
        """Whether the worker that held the value is gone."""
        return self.generation != self.session.generation

    def fetch(self, timeout: float | None = None) -> Any:
        """Bring the value here; tensors arrive on the CPU. Raises LostValueError when its worker has ended."""
        self.check()
        shipment = Shipment()
        shipment.held = [self]  # checked again once it is known which worker will be asked
        result = self.session.run({"kind": "fetch", "value": self.info["id"]}, shipment, timeout=timeout)
        if error := result.head.get("error"):
            raise remote_error(error["ename"], error["evalue"], error["traceback"])
        return result.value

    def check(self) -> None:
        """Raise LostValueError if the worker that held the value is gone."""
        if self.is_lost:
            what = f"{self.name!r}, a {self}," if self.name else f"{self}"
            raise LostValueError(
                f"{what} was lost: the worker that held it has ended. Run the cell that made it again."
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # what libraries look for
        raise AttributeError(
            f"{self} has no {name!r} here: the value is on the worker. Use it in a remote cell, or fetch() it first."
        )

    def _is_away(self, *_: Any) -> Any:
        """Any operation on the value itself."""
        raise TypeError(f"{self} is on the worker, so this can't be done here. Use it in a remote cell, or fetch() it.")

    __getitem__ = __iter__ = __call__ = __float__ = __int__ = __add__ = __radd__ = __sub__ = __rsub__ = _is_away
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __lt__ = __gt__ = _is_away

    def __str__(self) -> str:
        info = self.info
        parts = [info["type"]]
        if "shape" in info:
            parts.append("x".join(map(str, info["shape"])) or "scalar")
        elif "len" in info:
            parts.append(f"of {info['len']}")
        parts += [info[k] for k in ("dtype", "device") if k in info]
        if info.get("nbytes") is not None:
            parts.append(f"{info['nbytes'] / 1e6:.1f} MB" if info["nbytes"] >= 100_000 else f"{info['nbytes']} bytes")
        return "RemoteValue " + " ".join(parts)

    def __repr__(self) -> str:
        return f"<{self}{' LOST' if self.is_lost else ''}>"

    def __reduce__(self) -> Any:
        raise ShipError(f"A RemoteValue is a handle for its own notebook only ({self}). Save `.fetch()` of it instead.")


class LazyImport:
    """A function or class that a remote cell imported; imported here when first used."""

    def __init__(self, module: str, name: str) -> None:
        """Nothing is imported yet."""
        self._place = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, or make an instance of it, here."""
        return import_name(*self._place)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_name(*self._place), name)

    def __repr__(self) -> str:
        return f"<{'.'.join(self._place)}, not imported here yet>"

    def __reduce__(self) -> Any:
        return import_name, self._place


def loaded_or_lazy(module: str, name: str) -> Any:
    """A function or class of a module; to be imported at its first use unless the module is loaded here."""
    loaded = sys.modules.get(module)
    return getattr(loaded, name) if loaded is not None else LazyImport(module, name)


def import_name(module: str, name: str) -> Any:
    """A function or class by the module that has it and its name there."""
    return getattr(importlib.import_module(module), name)


class LazyModule(types.ModuleType):
    """A module that a remote cell imported; imported here when first used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)

    def __repr__(self) -> str:
        return f"<module {self.__name__!r}, not imported here yet>"


@dataclass
class Result:
    """What a call returned."""

    session: Session
    head: Head
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Any:
        """The value of a function call."""
        return self.values["value"]


@dataclass
class Failure:
    """What an input of `InterpClient.map` ended with, apart from an exception that a function returned."""

    error: Exception


class Session:
    """One client of one worker. Threads may share it: each call uses a connection of its own."""

    def __init__(self, backend: Backend) -> None:
        """Nothing is started or connected yet."""
        self.backend = backend
        self.client = uuid.uuid4().hex
        self.hello: Head = {}
        self.generation: str | None = None
        self._unreleased: list[tuple[str | None, int]] = []
        self.loads = 0  # how often this session has seen its model being loaded
        self._links: list[Link] = []
        self._acknowledge: list[str] = []
        self._known: set[str] = set()
        self._known_modules: set[str] = set()
        self._cancelled: set[str] = set()
        _sessions.add(self)
        self._values: weakref.WeakSet[RemoteValue] = weakref.WeakSet()
        self._count = itertools.count(1)
        self._is_open = False

    # ------------------------------------------------------------------------------------- connect

    def connect(self, on_event: OnEvent = lambda _: None) -> Head:
        """Make sure that the worker runs and its model is loaded; shows the load as it happens.

        Raises:
            LoadError: The model can't be loaded.
            KeyboardInterrupt: The load was stopped.
        """
        with stop_signals() as stops:
            self._give_back(self._link(on_event, stops))
        return self.hello

    def _link(self, on_event: OnEvent, stops: Stops) -> Link:
        """An idle connection, or a new one to a worker that has loaded its model."""
        self._is_open = True
        if (idle := self._idle_link()) is not None:
            return idle
        while True:
            link, started = self.backend.open(self.client, on_event, stops.fd)
            try:
                self._note_worker(link.hello, started, on_event)
                if link.hello["state"] == "loading":
                    self._follow_load(link, on_event, stops)
                return link
            except LoadError:
                link.close()
                self._forget_worker()
                raise
            except (EOFError, OSError):
                link.close()  # it ended between the hello and the next word, as a failed load does
            except BaseException:
                link.close()
                raise

    def _idle_link(self) -> Link | None:
        while True:
            try:
                link = self._links.pop()
            except IndexError:
                return None
            try:
                if link.hello["generation"] == self.generation and link.receive(0) is None:
                    return link
            except (EOFError, OSError):
                pass  # the worker has ended since
            link.close()

    def _give_back(self, link: Link) -> None:
        self._links.append(link)
        if not self._is_open:
            self.close()  # this client has left meanwhile

    def _note_worker(self, hello: Head, started: bool, on_event: OnEvent) -> None:
        before, self.hello, self.generation = self.hello, hello, hello["generation"]
        if before and before["generation"] != self.generation:
            self._known, self._known_modules, self._acknowledge = set(), set(), []
            why = self.backend.why_ended(before["pid"]) or "it was replaced"
            on_event({"event": "warning", "text": f"the worker had ended ({why}); a new one runs.{self._lost()}"})
        self.loads += started

    def _lost(self) -> str:
        """A sentence on the handles that went down with a worker."""
        gone = [value for value in self._values if value.generation != self.generation and value.name != "_"]
        lost = sorted({value.name or str(value) for value in gone})
        self._values = weakref.WeakSet(value for value in self._values if value.generation == self.generation)
        return f" Lost with it: {', '.join(lost)}." if lost else ""

    def _follow_load(self, link: Link, on_event: OnEvent, stops: Stops) -> None:
        link.send(Packed({"verb": "events", "id": LOAD, "after": 0}))
        while True:
            message = link.receive(None, stops.fd)
            if message is None:
                stops.drain()
                if stops.count >= 2:
                    self.backend.kill(link.hello["pid"])
                    raise stopped("the worker was killed by the second stop; the next call starts a new one")
                link.send(Packed({"verb": "interrupt", "id": LOAD, "request": 1}))
                continue
            head = message[0]
            if head["event"] == "reply":
                if not head["value"]:  # others wait for the same load, so only this wait ends
                    raise stopped("stopped waiting for the load, which goes on for other notebooks")
                continue
            if head["event"] == "result":
                break
            on_event(head)
        if error := head.get("error"):
            link.close()
            self._await_end(link.hello["pid"])
            if error["ename"] == "KeyboardInterrupt":
                raise stopped("the load was stopped")
            raise LoadError("\n".join([*error["traceback"], error["evalue"]]))
        info = self.hello["info"] = link.hello["info"] = head["info"]
        text = f"{info['model_name']} loaded in {info['load_s']:.1f} s"
        on_event({"event": "progress", "id": LOAD, "text": text, "n": None, "total": None, "done": True, "leave": True})

    # ---------------------------------------------------------------------------------------- calls

    def run(
        self,
        head: Head,
        shipment: Shipment,
        on_event: OnEvent = lambda _: None,
        timeout: float | None = None,
    ) -> Result:
        """Run a call on the worker and wait for it.

        Args:
            head: Kind of the call and its settings, see `worker/execution.py`.
            shipment: Its pickled inputs, made by `ship`.
            on_event: Takes every event but the last, in the calling thread.
            timeout: Seconds that the call may run; then it is stopped, or, if it does not react, the worker killed.

        Raises:
            KeyboardInterrupt: Two stops arrived, and the worker was killed.
            CallTimeoutError: The time limit was passed.
            WorkerDiedError: The worker ended in mid-call.
            WorkerError: The worker dropped the result, since this client was away for more than 5 s.
        """
        with stop_signals() as stops:
            link = self._link(on_event, stops)
            return PendingCall(self, link, {"id": self.new_id(), **head}, shipment, on_event, stops, timeout).wait()

    def follow(self, call_id: str, on_event: OnEvent = lambda _: None) -> Result:
        """Wait for a call of the worker that another client has submitted in the background, and take its result.

        Raises:
            WorkerError: The worker does not know the call.
        """
        with stop_signals() as stops:
            link = self._link(on_event, stops)
            return PendingCall(self, link, {"id": call_id}, Shipment(), on_event, stops).follow()

    def ship(self, value: Any) -> Shipment:
        """Pickle inputs for this worker. RemoteValues in them become references.

        Raises:
            LostValueError: One of them is of a worker that has ended.
            ShipError: Something in it does not travel, or bytecode would meet another Python version.
        """
        held: list[RemoteValue] = []
        shipment = dumps(value, lambda part: self._reduce(part, held))
        shipment.held = held
        self.check_python(shipment)
        return shipment

    def check_python(self, shipment: Shipment) -> None:
        """Raise ShipError if bytecode in it would meet another Python version on the worker, as far as it is known."""
        there = self.hello.get("python", PYTHON)[:2]
        if shipment.by_value and there != PYTHON:
            raise ShipError(
                f"A function or class made in the notebook travels as bytecode; Python {there[0]}.{there[1]} on "
                f"the worker can't run that of {PYTHON[0]}.{PYTHON[1]} here. Define it inside the "
                "remote cell, whose text runs on either, or in a .py file beside the notebook."
            )

    def ask(self, head: Head, timeout_s: float = 1.0) -> Any:
        """A short question that the worker answers also while a call runs; None if it doesn't in time.

        Never starts a worker.
        """
        try:
            link = self._idle_link() or self.backend.attach(self.client, timeout_s)
        except WorkerRefusedError:
            if not self.hello:
                raise
            return None  # it is known, so it is inside an operation that lets nothing else run
        if link is None:
            return None
        try:
            link.send(Packed({**head, "request": 1}))
            message = link.receive(timeout_s)
            while message is not None and message[0].get("event") != "reply":
                message = link.receive(timeout_s)
        except (EOFError, OSError):
            link.close()
            return None
        if message is None:
            link.close()  # a late answer must not meet the next question
            return None
        self._give_back(link)
        return message[0]["value"]

    def new_id(self) -> str:
        """A name for a call that no other call has."""
        return f"{self.client}-{next(self._count)}"

    def interrupt(self, call_id: str) -> bool:
        """Stop a call, running or queued."""
        return bool(self.ask({"verb": "interrupt", "id": call_id}))

    def cancel(self, call_id: str) -> None:
        """Stop a call that another thread of this session makes, also if it is not on its way yet."""
        if not self.interrupt(call_id):
            self._cancelled.add(call_id)  # its own thread looks there before it sends the call and after

    def stop(self, reason: str = "stopped by %remote stop") -> str:
        """End the worker if it runs; returns a sentence that names the remote values that are gone, or nothing."""
        try:
            link = self.backend.attach(self.client)
        except WorkerRefusedError:  # it hangs, or is another's
            pid = self.hello.get("pid")
            if pid is None or self.backend.why_ended(pid) is not None:
                raise
            self.backend.kill(pid)
            self._await_end(pid)
            return self._forget_worker()
        if link is None:
            return self._forget_worker()
        pid = link.hello["pid"]
        try:
            link.send(Packed({"verb": "stop", "reason": reason}))
            if link.receive(GRACE_S) is None:
                self.backend.kill(pid)
        except (EOFError, OSError):
            pass  # it has ended, as asked
        finally:
            link.close()
        self._await_end(pid)
        return self._forget_worker()

    def _await_end(self, pid: int) -> None:
        """Wait until a worker that ends is gone, so that the next call meets no dying one."""
        deadline = time.monotonic() + END_S
        while self.backend.why_ended(pid) is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _forget_worker(self) -> str:
        self.close()
        self.hello, self.generation = {}, None
        return self._lost()

    def close(self) -> None:
        """Leave the worker, which stays warm for others."""
        self._is_open = False
        while self._links:
            self._links.pop().close()

    # ----------------------------------------------------------------------------------- references

    def _reduce(self, value: Any, held: list[RemoteValue]) -> Reference | None:
        if type(value) is LazyImport:
            return "attribute", list(value._place)
        if type(value) is not RemoteValue:
            return None
        held.append(value)
        if value.session is not self:
            raise ShipError(f"{value!r} is on another worker than the one that this call goes to. Fetch it first.")
        value.check()
        key = value.info["id"]
        return ("value", key) if isinstance(key, int) else (key, None)

    def resolve(self, reference: Reference) -> Any:
        """The object here for what came back as a reference."""
        kind, key = reference
        if kind == "module":
            return sys.modules.get(key) or LazyModule(key)
        if kind == "attribute":
            return loaded_or_lazy(*key)
        return RemoteValue(self, {"id": kind, "type": f"the worker's {kind}"}, kind)

    def hold(self, name: str, info: dict[str, Any]) -> RemoteValue:
        """The handle of a value that stayed on the worker."""
        value = RemoteValue(self, info, name)
        self._values.add(value)
        _start_releaser()
        return value

    def _release(self, generation: str | None, value_id: int) -> None:
        waiting = [*self._unreleased, (generation, value_id)]
        self._unreleased = [v for v in waiting if v[0] == self.generation]  # the others went with their worker
        if self._unreleased and self._is_open:  # else with the next one, unless the worker has freed them by itself
            with suppress(WorkerError, OSError):
                self.ask({"verb": "release", "values": [value_id for _, value_id in self._unreleased]})
                self._unreleased = []


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_releases: queue.SimpleQueue[tuple[weakref.ref[Session], str | None, int]] = queue.SimpleQueue()


@cache
def _start_releaser() -> None:
    """Start the thread that frees what no RemoteValue names any more; a thread, since finalizers may run anywhere."""

    def release_forever() -> None:
        while True:
            reference, generation, value_id = _releases.get()
            if (session := reference()) is not None:
                session._release(generation, value_id)
            del session  # else it stays until the next one

    threading.Thread(target=release_forever, name="interp-release", daemon=True).start()


def _become_others() -> None:
    """In a forked child: its sessions are clients of their own, or parent and child would get each other's answers."""
    global _releases
    _releases = queue.SimpleQueue()  # what the child drops of the parent's values stays the parent's
    _start_releaser.cache_clear()
    for session in _sessions:
        session.client = uuid.uuid4().hex
        session._links, session._acknowledge = [], []  # dropped, not closed: they are the parent's


os.register_at_fork(after_in_child=_become_others)


class PendingCall:
    """A call on its way: sends it, follows its events over reconnections, and carries out stops and time limits."""

    def __init__(
        self,
        session: Session,
        link: Link,
        head: Head,
        shipment: Shipment,
        on_event: OnEvent,
        stops: Stops,
        timeout: float | None = None,
    ) -> None:
        """Sends nothing yet; the rest is told at `Session.run`."""
        self.session, self.link, self.shipment = session, link, shipment
        self.on_event, self.stops, self.timeout = on_event, stops, timeout
        about = {"verb": "submit", "client": session.client, "generation": session.generation}
        self.head = {"python": PYTHON, **head, **about}
        self.id: str = head["id"]
        self.is_followed = "kind" not in head  # it was submitted before, and can't be again
        self.seen = 0
        self._limit: float | None = None  # when the timeout has passed
        self._stops_seen = 0
        self._stopped_s: float | None = None
        self._why = ""  # set once a time limit has passed
        self._warned = False

    def wait(self) -> Result:
        """Submit the call and return its result; see `Session.run`."""
        try:
            if self._is_cancelled():
                raise stopped("stopped before it began")
            for value in self.shipment.held:
                value.check()  # the worker may have been replaced since they were pickled
            self.session.check_python(self.shipment)
            self._submit()
        except KeyboardInterrupt:
            self.link.close()
            raise
        except InterpError:  # one of these, or too large for this link, which is as good as before
            self.session._give_back(self.link)
            raise
        return self._until_result()

    def follow(self) -> Result:
        """Return the result of a call that was submitted before, by whomever; see `Session.follow`."""
        with suppress(OSError):  # the next receive finds out what has happened
            self.link.send(Packed({"verb": "events", "id": self.id, "after": 0}))
        return self._until_result()

    def _until_result(self) -> Result:
        try:
            head, inline, file = self._last_message()
        except BaseException:
            self.link.close()
            raise
        self.session._give_back(self.link)
        frames = BlobStore().frames(head, inline, file)
        if self.stops.count and frames:
            self._tell_of_imports(bytes(frames[0]))
        result = self._result(head, frames)  # what this raises is not the link's fault
        if self.stops.count and not head.get("stopped") and "error" not in head:  # it came when the call had just ended
            text = "stopped when the call had just ended"
            head["error"] = {"ename": "KeyboardInterrupt", "evalue": text, "traceback": [f"KeyboardInterrupt: {text}"]}
        return result

    def _last_message(self) -> Message:
        if self.timeout is not None:
            self._limit = time.monotonic() + self.timeout
        while True:
            try:
                message = self.link.receive(self._patience(), self.stops.fd)
                self._heed()  # also while events keep coming
                is_new = message is not None and self._take(message)
                if message is None:
                    self._on_silence()
            except (EOFError, OSError):
                if self.link.is_untaken:
                    self._start_over()
                else:
                    self._reconnect()
                continue
            if message is not None and is_new:
                if message[0]["last"]:
                    return message
                self.on_event(message[0])  # outside of the block above: a callback's own OSError is no lost link
            self._insist()

    # ---------------------------------------------------------------------------------------- send

    def _submit(self, missing_modules: Iterable[str] = (), all_blobs: bool = False) -> None:
        session = self.session
        known = () if all_blobs else session._known
        sources = self.head.get("modules", [])
        wanted = set(missing_modules)
        known_modules = session._known_modules - wanted
        light = [m if m["digest"] not in known_modules else {**m, "source": None} for m in sources]
        head = {**self.head, "modules": light, "acknowledge": session._acknowledge}
        try:
            packed = self.link.pack(head, self.shipment.frames, known)
        except OSError as error:
            raise ShipError(f"The inputs can't be sent: {error}. Close files, or send less at once.") from None
        session._acknowledge = []
        try:
            self.link.send(packed, self.stops.fd)
        except OSError:
            return  # the next receive finds out what has happened
        session._known = session._known | packed.digests  # a new set: another thread may be reading this one
        session._known_modules |= {m["digest"] for m in sources}

    def _start_over(self) -> None:
        """The worker had ended before it was given the call, which therefore may go to a new one."""
        self.link.close()
        self.link = self.session._link(self.on_event, self.stops)
        for value in self.shipment.held:
            value.check()
        self.head["generation"] = self.session.generation
        self._submit()

    def _reconnect(self) -> None:
        """The connection is gone: go on where it ended if the worker lives, else say why it died."""
        self.link.close()
        session = self.session
        pid = self.link.hello["pid"]
        deadline = time.monotonic() + ALIVE_S
        while True:
            link, why = None, session.backend.why_ended(pid)
            if why is None:
                link = session.backend.attach(session.client)
            if link is not None or why is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)  # it is dying, and its supervisor is about to say of what
        if link is None or link.hello["generation"] != self.head["generation"]:
            raise self._death(why or "the connection was lost and the worker no longer answers") from None
        self.link = link
        with suppress(OSError):  # the next receive finds out what has happened
            link.send(Packed({"verb": "events", "id": self.id, "after": self.seen}))

    def _death(self, why: str) -> BaseException:
        session = self.session
        lost = session._forget_worker()
        if self.stops.count >= 2:
            return stopped(f"the worker was killed by the second stop; the next call starts a new one.{lost}")
        if self._why:
            return CallTimeoutError(f"{self._why}; the worker did not react to the stop and was killed.{lost}")
        lines = session.backend.log_tail(20_000).strip().splitlines()  # a crash lists all that Python has loaded
        log = "\n".join(line for line in lines if not line.startswith("Extension modules:"))[-1500:]
        return WorkerDiedError(
            f"The worker died during this call: {why}.{lost} The next call starts a new worker and loads the model "
            "again." + (f"\nThe end of its log:\n{log}" if log else "")
        )

    # ------------------------------------------------------------------------------------- receive

    def _take(self, message: Message) -> bool:
        """Deal with a message; True if it is a new event of this call."""
        head, event = message[0], message[0]["event"]
        if event == "missing":
            if "generation" in head:
                raise EOFError  # another worker answers there: this call's own is gone
            self._submit(head["modules"], all_blobs=True)
            return False
        if event == "unknown" and self.is_followed:
            raise WorkerError(
                f"The worker knows no call {self.id!r}: it has ended and was read, or ran on another one."
            )
        if event == "unknown":
            self._submit()  # it was lost on the way; the id makes sure that it runs once
            return False
        if event == "forgotten":
            raise WorkerError("The call has run, but its result was dropped: the connection was away for too long.")
        if head.get("call") != self.id or head["seq"] <= self.seen:
            return False
        self.seen = head["seq"]
        if head["last"]:
            self.session._acknowledge.append(self.id)
            if head.get("blobs"):  # large, so the worker should not keep it until the next call
                with suppress(OSError):  # then with the next call after all
                    self.link.send(Packed({"verb": "acknowledge", "id": self.id}))
        return True

    def _tell_of_imports(self, pickled: bytes) -> None:
        """Say after a stop why the cell does not end at once."""
        missing = [name for name, mark in SLOW_IMPORTS.items() if name not in sys.modules and mark in pickled]
        if missing:
            text = f"stopped; {missing[0]} is imported here for what was assigned so far"
            self.on_event({"event": "warning", "text": text})

    def _result(self, head: Head, frames: list[Buffer]) -> Result:
        error = head.get("error")
        if self._why and error is not None and error["ename"] == "KeyboardInterrupt":
            begin = [line.replace("KeyboardInterrupt", "CallTimeoutError", 1) for line in error["traceback"][:2]]
            error["traceback"] = [*begin, *error["traceback"][2:-1], f"CallTimeoutError: {self._why}"]
            error["ename"], error["evalue"] = "CallTimeoutError", self._why
        session = self.session
        absent: list[str] = []
        values = loads(frames, session.resolve, absent) if frames else {}
        for why in absent:
            text = f"{why}, so what came back has a stand-in for it; %%remote --keep NAME leaves it on the worker"
            head["notes"] = [*head.get("notes", ()), text]
        values.update({name: session.hold(name, info) for name, info in head.get("held", {}).items()})
        values.update({name: loaded_or_lazy(*place) for name, place in head.get("imports", {}).items()})
        return Result(session, head, values)

    # ---------------------------------------------------------------------------------------- stop

    def _patience(self) -> float:
        if self._limit is None or self._why:
            return ALIVE_S
        return max(0.0, min(ALIVE_S, self._limit - time.monotonic()))

    def _heed(self) -> None:
        """Carry out stops and the time limit."""
        stops = self.stops
        if stops.count > self._stops_seen:
            stops.drain()
            self._stops_seen = stops.count
            if stops.count == 1:
                self._stop()
            else:
                self.session.backend.kill(self.link.hello["pid"])
        elif self._limit is not None and not self._why and time.monotonic() >= self._limit:
            self._why = f"the call ran past its limit of {self.timeout:g} s"
            self._stop()
        elif self._is_cancelled():
            self._stop()

    def _is_cancelled(self) -> bool:
        """Whether `Session.cancel` did not find it on the worker; once."""
        if self.id not in self.session._cancelled:
            return False
        self.session._cancelled.remove(self.id)
        return True

    def _on_silence(self) -> None:
        if self.session.backend.why_ended(self.link.hello["pid"]) is not None:
            raise EOFError  # a child of the worker may keep the connection open after its death

    def _insist(self) -> None:
        """Say that a stop has had no effect; after a time limit kill the worker, as nobody may be there to stop it."""
        if self._stopped_s is None or self._warned or time.monotonic() - self._stopped_s <= GRACE_S:
            return
        self._warned = True
        if self._why:
            self.session.backend.kill(self.link.hello["pid"])
            return
        text = f"still inside one long operation after {GRACE_S:g} s; stop again to kill the worker and lose its model"
        self.on_event({"event": "warning", "text": text})

    def _stop(self) -> None:
        self._stopped_s = time.monotonic()
        self.link.send(Packed({"verb": "interrupt", "id": self.id}), self.stops.fd)


# ----------------------------------------------------------------------------------------------- signals


class Stops:
    """Counts SIGINTs and makes a descriptor readable at each, so that a wait ends without an exception."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        self.count = 0

    def on_signal(self, *_: Any) -> None:
        """The handler of SIGINT."""
        self.count += 1
        with suppress(BlockingIOError):  # it is readable already
            os.write(self._write_fd, b"!")

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self.fd)
        os.close(self._write_fd)

    def drain(self) -> bool:
        """Whether a stop has come since the last look."""
        try:
            return bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False


_stops: dict[int, Stops] = {}  # by process: a forked child must not share the pipe


@contextmanager
def stop_signals() -> Iterator[Stops]:
    """In the main thread, turn SIGINT into a message for the block, so that no frame is ever cut in half."""
    if threading.current_thread() is not threading.main_thread():
        with closing(Stops()) as none:
            yield none
        return
    if (pid := os.getpid()) not in _stops:
        _stops[pid] = Stops()
    stops = _stops[pid]
    if stops.count:
        stops.drain()
        stops.count = 0
    before = set_handler(signal.SIGINT, stops.on_signal)
    try:
        yield stops
    finally:
        set_handler(signal.SIGINT, before)
