"""A `%%remote` cell beside a local one in the same kernel."""

from __future__ import annotations

from functools import partial

from benchmarks.measure import Figure, Section, interleaved, median, scaled
from benchmarks.notebook import kernel

ROUNDS, BLOCK = 20, 10
BODY = "y = {'a': x * 3, 'b': x + 1}"
LOCAL, REMOTE = "local cell", "%%remote cell"


def measure() -> Section:
    """Time both in turn, from the request to `idle` and the reply."""
    with kernel() as running:
        running.run("x = 2")
        contenders = {LOCAL: partial(running.run, BODY), REMOTE: partial(running.run, f"%%remote\n{BODY}")}
        for call in contenders.values():
            for _ in range(BLOCK):
                call()
        samples = scaled(interleaved(contenders, ROUNDS, BLOCK), 1e3)
        if running.value("y") != "{'a': 6, 'b': 3}":
            raise RuntimeError(f"The cells left y = {running.value('y')}.")
    extra = median(samples[REMOTE]) - median(samples[LOCAL])
    return Section(
        "Remote cell",
        "The same line in a live interp kernel, locally and under `%%remote`: from execute_request to the reply and "
        "`idle`.",
        "ms",
        samples,
        [Figure("remote cell over local cell", extra, 2.0, "ms")],
    )
