"""A tensor of 100 MB to the far side and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.measure import Figure, Samples, Section, interleaved, median, scaled
from benchmarks.notebook import connected, notebook_function
from benchmarks.peers import Call, installed, started
from interp_kernel.client import InterpClient
from interp_kernel.protocol import Channel, Packed

OURS = "client.run"
N_FLOATS, NBYTES = 25_000_000, 100_000_000
ROUNDS = 9
SOURCE = """
import builtins

def take(model, tokenizer, tensor):
    builtins.benchmark_tensor = tensor
    return touch(model, tokenizer, tensor)

def touch(model, tokenizer, tensor):
    return int(tensor[::1024].sum())  # a number of every page, so that lazily mapped memory is paid for

def give(model, tokenizer):
    return builtins.benchmark_tensor
"""


def measure() -> Section:
    """Time ours and each peer in turn, each way."""
    import torch

    touch, take, give = (notebook_function(SOURCE, name) for name in ("touch", "take", "give"))
    tensor = torch.randint(0, 100, (N_FLOATS,)).float()
    fresh = itertools.count(100)

    def there(call: Call) -> None:
        tensor[0] = next(fresh)  # else ours would not send it
        expect(touch(None, None, tensor), call(touch, tensor))

    def back(call: Call) -> None:
        expect(touch(None, None, tensor), touch(None, None, call(give)))

    with connected() as client, started(installed()) as peers:
        calls = {OURS: client.run, **peers}
        samples: Samples = {}
        for direction, transfer in (("in", there), ("out", back)):
            for call in calls.values():
                call(take, tensor)
            contenders: dict[str, Callable[[], Any]] = {
                f"{name}, {direction}": partial(transfer, call) for name, call in calls.items()
            }
            samples |= interleaved(contenders, ROUNDS)
        again, sent = repeated(client, touch, tensor)
    samples[f"{OURS}, in again"] = again
    return section(scaled(samples, 1e3), sent)


def repeated(client: InterpClient, touch: Any, tensor: Any) -> tuple[list[float], int]:
    """Seconds of calls with a tensor that the worker has, and the bytes that one of them sends."""
    client.run(touch, tensor)
    times = interleaved({OURS: partial(client.run, touch, tensor)}, ROUNDS)[OURS]
    with bytes_counted() as sent:
        client.run(touch, tensor)
    return times, sum(sent)


@contextmanager
def bytes_counted() -> Iterator[list[int]]:
    """The sizes of all messages that this process sends in the block, memory files included."""
    sent: list[int] = []
    send = Channel.send

    def counting(self: Channel, packed: Packed, wake_fd: int | None = None) -> bool:
        in_file = sum(nbytes for _, nbytes, offset, _ in packed.head.get("blobs", ()) if offset is not None)
        sent.append(len(packed.encode()) + in_file)
        return send(self, packed, wake_fd)

    Channel.send = counting  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Channel.send = send  # type: ignore[method-assign]


def section(samples: Samples, sent: int) -> Section:
    """The report: GB/s from the medians, each direction against the fastest peer."""
    figures = []
    for direction in ("in", "out"):
        peers = [n for n in samples if n.endswith(f", {direction}") and not n.startswith(OURS)]
        if peers:
            fastest = min(peers, key=lambda name: median(samples[name]))
            ratio = median(samples[fastest]) / median(samples[f"{OURS}, {direction}"])
            what = f"ours, {direction}, over the fastest peer ({fastest.split(',')[0]})"
            figures.append(Figure(what, ratio, 3, "times", at_least=True))
    figures.append(Figure("sent for a tensor that the worker has", sent, 10_000, "bytes"))
    speeds = ", ".join(f"{name} {NBYTES / 1e6 / median(values):.2f}" for name, values in samples.items())
    return Section(
        "Tensor of 100 MB",
        "A float32 torch tensor, changed before each call. *In* ships it and returns an int made of one number of "
        "every page; *out* returns one that lies on the far side, and reads it in the same way here. *In again* is a "
        "call with a tensor that has not changed.",
        "ms",
        samples,
        figures,
        [f"GB/s of the medians: {speeds}."],
    )


def expect(wanted: int, found: int) -> None:
    """A transfer that changes the tensor is not measured."""
    if wanted != found:
        raise RuntimeError(f"The tensor arrived with checksum {found}; expected {wanted}.")
