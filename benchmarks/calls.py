"""A warm call of a tiny notebook function, shipped anew each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.measure import Figure, Section, interleaved, median, quartiles, scaled
from benchmarks.notebook import connected, notebook_function
from benchmarks.peers import BARE, installed, started

OURS = "client.run"
ROUNDS, BLOCK = 20, 25
SOURCE = """
scale = 3
names = ["a", "b"]

def tiny(model, tokenizer, x):
    return {name: x * scale for name in names}
"""


def measure() -> Section:
    """Time ours and each peer in turn."""
    tiny = notebook_function(SOURCE, "tiny")
    with connected() as client, started([BARE, *installed()]) as peers:
        contenders: dict[str, Callable[[], Any]] = {OURS: lambda: client.run(tiny, 2)}
        contenders |= {name: partial(call, tiny, 2) for name, call in peers.items()}
        for name, call in contenders.items():
            for _ in range(BLOCK):
                check(name, call())
        samples = scaled(interleaved(contenders, ROUNDS, BLOCK), 1e6)
    ours = median(samples[OURS])
    targets = {BARE: 4.0, "Ray actor": 1 / 3, "ipyparallel apply_sync": 1 / 8}
    figures = [Figure(f"ours / {n}", ours / median(samples[n]), t, "times") for n, t in targets.items() if n in samples]
    placement = (
        "The bare connection is twice as fast when the system puts both of its ends on one core. Ours takes "
        f"{ours / quartiles(samples[BARE])[0]:.2f} times its lower quartile."
    )
    return Section(
        "Warm call",
        "A function of a notebook cell with two globals is shipped by cloudpickle at every call and returns a small "
        "dict. Far sides are one process each.",
        "us",
        samples,
        figures,
        [placement],
    )


def check(name: str, value: object) -> None:
    """A contender that answers wrongly is not measured."""
    if value != {"a": 6, "b": 6}:
        raise RuntimeError(f"{name} returned {value!r}.")
