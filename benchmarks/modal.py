"""Our backend beside bare Modal, in one run, both through the control plane on loopback."""

# No `from __future__ import annotations`: modal reads the types of a class's parameters as objects.
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import modal

from benchmarks.measure import Figure, Samples, Section, interleaved, median, scaled
from benchmarks.notebook import notebook_function
from interp_kernel import InterpClient
from interp_kernel.session import Session
from tests.helpers_worker import run_cell
from tests.modal_loopback import Loopback

OURS, BARE = "ours", "bare Modal"
ROUNDS, BLOCK = 10, 10
LARGE_ROUNDS, MAP_ROUNDS = 9, 3
IN_BYTES, OUT_BYTES = 20_000_000, 50_000_000
N_INPUTS, N_CONTAINERS = 200, 4
LAG_RTT_S, CELL_RTT_S = 0.03, 0.05
N_LINES = 40
SOURCE = """
def tiny(model, tokenizer, x):
    return dict.fromkeys("ab", x * 3)

def take(model, tokenizer, data):
    return int(data[0]) + int(data[-1])

def give(model, tokenizer, n):
    import numpy as np

    return np.ones(n, dtype=np.float32)
"""
# Lines at no fixed distance, so that they do not fall into step with the polls.
LINES = f"""
import random, time
for i in range({N_LINES}):
    time.sleep(random.uniform(0.02, 0.15))
    print(time.time(), flush=True)
"""


class Bare:
    """What a user of plain Modal would write for the same functions."""

    @modal.method()
    async def tiny(self, x: int) -> dict[str, int]:
        return dict.fromkeys("ab", x * 3)

    @modal.method()
    async def take(self, data: Any) -> int:
        return int(data[0]) + int(data[-1])

    @modal.method()
    async def give(self, n: int) -> Any:
        import numpy as np

        return np.ones(n, dtype=np.float32)


def measure() -> Section:
    """Time ours and bare Modal in turn, then what a latency of every RPC costs."""
    functions = {name: notebook_function(SOURCE, name) for name in ("tiny", "take", "give")}
    with Loopback() as loopback, InterpClient(mode="modal", app_name="bench") as client, bare_objects() as (one, many):
        samples = warm_calls(client, one, functions["tiny"])
        samples |= large_values(client, one, functions)
        samples |= maps(client, many, functions["tiny"])
        with latency(loopback, LAG_RTT_S):
            samples[f"print to screen, {LAG_RTT_S * 1e3:g} ms added to every RPC"] = print_lags(client.session)
        samples |= cells_with_latency(loopback, client.session)
    return section(scaled(samples, 1e3))


@contextmanager
def bare_objects() -> Iterator[tuple[Any, Any]]:
    """A class of plain Modal in one container, and one that scales out."""
    Bare.__module__ = "__main__"  # modal pickles a class of an imported module by reference
    app = modal.App("bare")
    one: Any = app.cls(serialized=True, max_containers=1)(modal.concurrent(max_inputs=8)(Bare))
    many: Any = app.cls(serialized=True, max_containers=N_CONTAINERS)(type("Many", (Bare,), {"__module__": "__main__"}))
    with app.run():
        yield one(), many()


@contextmanager
def latency(loopback: Loopback, seconds: float) -> Iterator[None]:
    """Add a latency to every RPC."""
    loopback.plane.settings.rpc_latency_s = seconds
    try:
        yield
    finally:
        loopback.plane.settings.rpc_latency_s = 0.0


def warm_calls(client: InterpClient, bare: Any, tiny: Callable[..., Any]) -> Samples:
    """A tiny function whose containers are up."""
    contenders: dict[str, Callable[[], Any]] = {
        f"{OURS}, warm call": lambda: client.run(tiny, 2),
        f"{BARE}, warm call": lambda: bare.tiny.remote(2),
    }
    for name, call in contenders.items():
        expect(name, {"a": 6, "b": 6}, call())
    return interleaved(contenders, ROUNDS, BLOCK)


def large_values(client: InterpClient, bare: Any, functions: dict[str, Callable[..., Any]]) -> Samples:
    """An array that has not been sent before, the same as bytes, and a large array back."""
    import numpy as np

    array = np.random.default_rng(0).integers(0, 256, IN_BYTES, dtype=np.uint8)
    fresh = itertools.count()

    def take(call: Callable[[Any], int], make: Callable[[Any], Any] = lambda data: data) -> None:
        array[:8] = np.frombuffer(next(fresh).to_bytes(8, "big"), dtype=np.uint8)
        expect("take", int(array[0]) + int(array[-1]), call(make(array)))

    def give(call: Callable[[int], Any]) -> None:
        expect("give", OUT_BYTES, call(OUT_BYTES // 4).nbytes)

    def take_ours(data: Any) -> Any:
        return client.run(functions["take"], data)

    return interleaved(
        {
            f"{OURS}, 20 MB in": lambda: take(take_ours),
            f"{BARE}, 20 MB in": lambda: take(bare.take.remote),
            f"{OURS}, 20 MB in, as bytes": lambda: take(take_ours, bytes),
            f"{BARE}, 20 MB in, as bytes": lambda: take(bare.take.remote, bytes),
            f"{OURS}, 50 MB out": lambda: give(lambda n: client.run(functions["give"], n)),
            f"{BARE}, 50 MB out": lambda: give(bare.give.remote),
        },
        LARGE_ROUNDS,
    )


def maps(client: InterpClient, bare: Any, tiny: Callable[..., Any]) -> Samples:
    """A map over small inputs on several warm containers."""
    wanted = [{"a": 3 * i, "b": 3 * i} for i in range(N_INPUTS)]
    contenders: dict[str, Callable[[], list[Any]]] = {
        f"{OURS}, map": lambda: list(client.map(tiny, range(N_INPUTS), max_containers=N_CONTAINERS)),
        f"{BARE}, map": lambda: list(bare.tiny.map(range(N_INPUTS))),
    }
    for name, call in contenders.items():
        expect(name, wanted, call())  # which starts the containers
    return interleaved(contenders, MAP_ROUNDS)


def print_lags(session: Session) -> list[float]:
    """Seconds from a print in the container to its text here."""
    lags: list[float] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "stream":
            lags.extend(time.time() - float(line) for line in event["text"].split())

    session.run(cell(LINES), session.ship({}), on_event)
    expect("lines", N_LINES, len(lags))
    return lags


def cells_with_latency(loopback: Loopback, session: Session) -> Samples:
    """A small warm cell, with and without a latency of every RPC."""
    found: Samples = {}
    for name, seconds in (("small cell", 0.0), (f"small cell, {CELL_RTT_S * 1e3:g} ms added to every RPC", CELL_RTT_S)):
        with latency(loopback, seconds):
            found |= interleaved({f"{OURS}, {name}": lambda: run_cell(session, "v = 1 + 1")}, ROUNDS, 3)
    return found


def cell(body: str) -> dict[str, Any]:
    """A call that runs a cell's text."""
    source = {"source": body, "raw": body, "filename": "<bench>", "line_offset": 0, "writes": [], "show": "none"}
    return {"kind": "cell", "cell": source, "fetch_limit": 10_000_000}


def section(samples: Samples) -> Section:
    """The report, with the promises of the Modal backend."""

    def ratio(what: str) -> float:
        return median(samples[f"{OURS}, {what}"]) / median(samples[f"{BARE}, {what}"])

    lag = statistics.median(next(values for name, values in samples.items() if name.startswith("print")))
    quick, slow = (median(values) for name, values in samples.items() if "small cell" in name)
    return Section(
        "Modal, on loopback",
        "The real modal client and the real container, through the control plane of `tests/modal_loopback`; what a "
        "network and Modal's own scheduling add is not in these times. *Bare Modal* has the functions deployed, ours "
        "ships them. Large values are arrays, of new content in each call; *as bytes* the same lies inside the pickle. "
        f"*Map* is {N_INPUTS} small inputs on {N_CONTAINERS} containers. *Print to screen* is from the "
        "print in the container to its text here.",
        "ms",
        samples,
        [
            Figure("warm call, ours / bare", ratio("warm call"), 2.0, "times"),
            Figure("20 MB in, ours / bare", ratio("20 MB in"), 1.2, "times"),
            Figure("50 MB out, ours / bare", ratio("50 MB out"), 1.2, "times"),
            Figure("inputs of a map per second, ours / bare", 1 / ratio("map"), 0.9, "times", at_least=True),
            Figure("print to screen", lag, 50, "ms"),
            Figure("small cell, in round trips", (slow - quick) / CELL_RTT_S / 1e3, 3, "round trips"),
        ],
    )


def expect(what: str, wanted: object, found: object) -> None:
    """A contender that answers wrongly is not measured."""
    if wanted != found:
        raise RuntimeError(f"{what} returned {str(found)[:200]}; expected {str(wanted)[:200]}.")
