"""`map` over many containers that keep nothing: inputs go out in small groups, results come back in order."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from interp_kernel.backends import OnEvent
from interp_kernel.backends.modal.backend import Place, Ticker, wait
from interp_kernel.backends.modal.failures import explain
from interp_kernel.backends.modal.link import start
from interp_kernel.backends.modal.wire import from_wire
from interp_kernel.errors import ShipError, WorkerDiedError, remote_error
from interp_kernel.protocol import PYTHON, BlobStore, Head, Shipment, loads
from interp_kernel.session import Failure, LazyModule, stop_signals

GROUP = 16  # most inputs of one group
GROUP_S = 1.0  # about how long a group should take
GROUP_BYTES = 1_000_000
ROUNDS = 4  # groups for each container, at least, so that a slow one does not keep the others waiting
AHEAD = 4  # groups under way for each container


@dataclass
class Batch:
    """A function with its settings, and the inputs to call it on.

    Attributes:
        head: What every call has in common, see `client.call_head`.
        function: The pickled function and its keyword arguments.
        values: The pickled inputs.
    """

    head: Head
    function: Shipment
    values: Sequence[Shipment]


def run_batch(place: Place, batch: Batch, max_containers: int, on_event: OnEvent) -> Iterator[Any]:
    """Yield the value or the Failure of each input, in order; a stop, or closing the generator, stops the rest."""
    left = deque(batch.values)
    under_way: deque[Group] = deque()
    size = 1  # until it is known how long an input takes
    mapper = place.app.mapper(max_containers)
    shown = Progress(on_event, len(batch.values))
    try:
        while left or under_way:
            while left and len(under_way) < AHEAD * max_containers:
                under_way.append(Group(mapper, batch, take_group(left, size)))
            outcomes = under_way[0].wait(shown.ticker())
            under_way.popleft()
            slowest_s = 0.001
            for outcome in outcomes:
                result, run_s = unpacked(outcome, on_event)
                slowest_s = max(slowest_s, run_s)
                shown.advance()
                yield result
            size = max(1, min(GROUP, len(left) // (ROUNDS * max_containers), int(GROUP_S / slowest_s)))
    finally:
        for group in under_way:
            group.cancel()
        shown.end()


class Group:
    """A few inputs on their way."""

    def __init__(self, mapper: Any, batch: Batch, values: Sequence[Shipment]) -> None:
        """Send them."""
        self._size = len(values)
        by_value = batch.function.by_value or any(value.by_value for value in values)
        python = PYTHON if by_value else None
        pickles = [plain(value) for value in values]
        self._call: Future[Any] = start(mapper.run.spawn.aio(python, batch.head, plain(batch.function), pickles))
        self._result: Future[Any] = start(self._fetch())

    def wait(self, tick: Ticker) -> list[Any]:
        """Wait for what each input showed and returned; what Modal lost for good is an exception for each."""
        try:
            with stop_signals() as stops:
                outcomes: list[Any] = wait(self._result, tick, stops.fd, "the map was stopped")
        except KeyboardInterrupt:
            raise
        except Exception as error:  # noqa: BLE001 - whatever Modal raises; each input is told in words
            text = f"This input was lost: {explain(error)}."
            return [Failure(WorkerDiedError(text)) for _ in range(self._size)]
        return outcomes

    def cancel(self) -> None:
        """Stop it, wherever it is."""
        start(self._cancel())

    async def _fetch(self) -> Any:
        call = await asyncio.wrap_future(self._call)
        return await call.get.aio()

    async def _cancel(self) -> None:
        call = await asyncio.wrap_future(self._call)
        await call.cancel.aio()


class Progress:
    """How many of the inputs are done."""

    def __init__(self, on_event: OnEvent, total: int) -> None:
        """Nothing is shown yet."""
        self._on_event, self._total, self._n = on_event, total, 0

    def ticker(self) -> Ticker:
        """Shows a long wait for the next result."""
        return Ticker(self._on_event, f"Modal: waiting for input {self._n}")

    def advance(self) -> None:
        """One more is done."""
        self._n += 1
        self._show(done=False)

    def end(self) -> None:
        """All are done, or the rest was given up."""
        self._show(done=True)

    def _show(self, *, done: bool) -> None:
        event: Head = {"event": "progress", "id": "map", "text": "map", "n": self._n, "total": self._total}
        self._on_event({**event, "unit": "inputs", "done": done, "leave": True})


def take_group(left: deque[Shipment], size: int) -> list[Shipment]:
    """Take the next inputs: at most `size`, and about GROUP_BYTES."""
    group = [left.popleft()]
    nbytes = size_of(group[0])
    while left and len(group) < size and (nbytes := nbytes + size_of(left[0])) <= GROUP_BYTES:
        group.append(left.popleft())
    return group


def size_of(shipment: Shipment) -> int:
    """Size of a pickle in bytes."""
    return sum(memoryview(frame).nbytes for frame in shipment.frames)


def plain(shipment: Shipment) -> list[bytearray]:
    """The frames of a pickle, as Modal can carry them and as a worker may write to them."""
    return [bytearray(frame) for frame in shipment.frames]


def unpacked(outcome: Any, on_event: OnEvent) -> tuple[Any, float]:
    """Show what an input showed; its value or Failure, and how many seconds it ran."""
    if isinstance(outcome, Failure):
        return outcome, 0.0
    shown, wire = outcome
    for event in shown:
        on_event(event)
    head, inline, file = from_wire(wire)
    run_s = head.get("times", {}).get("run_s", 0.0)
    for note in head.get("notes", ()):
        on_event({"event": "warning", "text": note})
    if error := head.get("error"):
        return Failure(remote_error(error["ename"], error["evalue"], error["traceback"])), run_s
    if held := head.get("held"):
        what = next(iter(held.values()))["type"]
        text = f"The result, a {what}, does not pickle, and the containers of a map keep nothing."
        return Failure(ShipError(text)), run_s
    return loads(BlobStore().frames(head, inline, file), local_object)["value"], run_s


def local_object(reference: tuple[str, Any]) -> Any:
    """The object here for what came back as a reference: modules only, for these containers keep nothing."""
    kind, key = reference
    if kind != "module":
        raise LookupError(f"The result holds the worker's {kind}, which can't leave it.")
    return sys.modules.get(key) or LazyModule(key)
