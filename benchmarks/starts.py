"""The start of a kernel, and the way back to a warm worker after its restart."""

from __future__ import annotations

from benchmarks.measure import Figure, Samples, Section, median, scaled
from benchmarks.notebook import OURS, PLAIN, Kernel, connected, kernel

ROUNDS, RESTARTS = 9, 5
PLAIN_START, OUR_START = "plain ipykernel, start", "interp kernel, start"
ATTACH = "first remote cell after a restart"


def measure() -> Section:
    """Start both kernels in turn, then restart ours beside a warm worker."""
    samples: Samples = {PLAIN_START: [], OUR_START: [], ATTACH: []}
    for _ in range(ROUNDS):
        for name, module in ((PLAIN_START, PLAIN), (OUR_START, OURS)):
            with kernel(module) as running:
                samples[name].append(running.start_s)
    with connected() as client:
        worker = client.session.hello["pid"]
        for _ in range(RESTARTS):
            with kernel() as running:
                samples[ATTACH].append(first_remote_result(running, worker))
    samples = scaled(samples, 1e3)
    extra = median(samples[OUR_START]) - median(samples[PLAIN_START])
    return Section(
        "Kernel start and re-attach",
        "From Popen to the kernel_info reply, both kernels in turn. Then, in a kernel that has just started beside a "
        "warm worker: from the request of the first `%%remote` cell to its reply, the magics' own import included.",
        "ms",
        samples,
        [
            Figure("interp kernel over plain ipykernel", extra, 30, "ms"),
            Figure("first remote result", median(samples[ATTACH]), 300, "ms"),
        ],
        ["The worker's process was the same each time and its model was loaded once."],
    )


def first_remote_result(running: Kernel, worker: int) -> float:
    """Seconds of the first remote cell; it must have run in the worker that was there before."""
    elapsed = running.run("%%remote\nimport os\npid = os.getpid()")
    found = running.value("pid")
    if found != str(worker):
        raise RuntimeError(f"The cell ran in process {found}; the warm worker was {worker}.")
    return elapsed
