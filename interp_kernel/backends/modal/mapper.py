"""The far side of `map`: containers that each hold a worker, keep nothing, and take a few inputs at a time."""

# No `from __future__ import annotations`: Modal reads the types of a class's parameters as objects.
import asyncio
import json
import pickle
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import modal

from interp_kernel.backends.local import LocalLink
from interp_kernel.backends.modal.gateway import prepare_worker, reason
from interp_kernel.backends.modal.wire import Wire, to_wire
from interp_kernel.protocol import PYTHON, Head, Packed, dumps

Frames = list[bytearray]
Outcome = tuple[list[Head], Wire]  # what one input showed, and its result
CLIENT = "interp-map"


class Joined:
    """A pickle made of two: the function with its settings, sent once, and one input."""

    def __init__(self, function: Frames, value: Frames) -> None:
        self._parts = function, value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Frames, Frames]]:
        return join, self._parts


def join(function: Frames, value: Frames) -> tuple[Any, tuple[Any], dict[str, Any]]:
    """The function, its input and its settings; called by the worker's unpickler."""
    fn, kwargs = pickle.loads(function[0], buffers=function[1:])
    return fn, (pickle.loads(value[0], buffers=value[1:]),), kwargs


@dataclass
class Group:
    """Inputs of one function that came together."""

    head: Head
    function: Frames
    values: list[Frames]
    running: str = ""
    is_stopped: bool = False


class Crew:
    """One container's worker, and the group of inputs that it is busy with."""

    def __init__(self, settings: Head) -> None:
        """Start the worker; its model loads from now on."""
        self.worker = prepare_worker(settings)
        self.pid = self.worker.start()
        self._link: LocalLink | None = None
        self._one_group = threading.Lock()  # one that was stopped may not be gone yet when the next comes

    def run(self, group: Group) -> list[Outcome]:
        """Call the function on each value in turn, until the group is stopped."""
        with self._one_group:
            return [self._run_one(group, value) for value in group.values if not group.is_stopped]

    def stop(self, group: Group) -> None:
        """Stop a group and the call of it that runs."""
        group.is_stopped = True
        if self._link is not None and group.running:
            self._link.send(Packed({"verb": "interrupt", "id": group.running}))

    def _run_one(self, group: Group, value: Frames) -> Outcome:
        link = self._link = self._link or self.worker.open(CLIENT)[0]
        self.pid = link.hello["pid"]
        group.running = call_id = uuid.uuid4().hex
        shown: list[Head] = []
        about = {"verb": "submit", "client": CLIENT, "generation": link.hello["generation"], "id": call_id}
        try:
            link.send(Packed({**group.head, **about}, dumps(Joined(group.function, value)).frames))
            if group.is_stopped:
                self.stop(group)  # the stop came before there was a call to stop
            while True:
                message = link.receive(None)
                assert message is not None
                head = message[0]
                if head.get("last") and head["call"] == call_id:
                    link.send(Packed({"verb": "acknowledge", "id": call_id}))
                    return shown, to_wire(*message)
                shown += [head] if head.get("call") == call_id else []
        except (EOFError, OSError):
            self._link = None
            return shown, self._died(link.hello["pid"])

    def _died(self, pid: int) -> Wire:
        text = f"The worker died during this call: {reason(self.worker, pid)}. Other inputs are not affected."
        return failure("WorkerDiedError", text)


def failure(ename: str, text: str) -> Wire:
    """The result of a call that never was one of the worker's."""
    return to_wire({"error": {"ename": ename, "evalue": text, "traceback": [f"{ename}: {text}"]}}, [], None)


def other_python(python: list[int]) -> str:
    """Why a function does not run here."""
    theirs, ours = (".".join(map(str, version)) for version in (python, PYTHON))
    return (
        f"The function travels as bytecode of Python {theirs}, and the container has {ours}. Use an image with Python "
        f"{theirs}, or put the function into a .py file beside the notebook."
    )


class Mapper:
    """The class that Modal runs, in as many containers as there is work for."""

    settings: str = modal.parameter()

    @modal.enter()
    def start(self) -> None:
        """Start the worker."""
        self.crew = Crew(json.loads(self.settings))

    @modal.method()
    async def run(self, python: list[int] | None, head: Head, function: Frames, values: list[Frames]) -> list[Outcome]:
        """See `Crew.run`; `python` is the version whose bytecode is in it, if any is."""
        if python is not None and python != PYTHON:
            return [([], failure("ShipError", other_python(python))) for _ in values]
        group = Group(head, function, values)
        try:
            return await asyncio.to_thread(self.crew.run, group)
        except asyncio.CancelledError:
            self.crew.stop(group)
            raise

    @modal.exit()
    def end(self) -> None:
        """End the worker with the container."""
        self.crew.worker.kill(self.crew.pid)
