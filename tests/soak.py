"""Kill the worker in mid-call, again and again: each time one clear error, soon, and the next call works.

`make soak` runs it 100 times through `test_soak.py`.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from interp_kernel.errors import WorkerDiedError
from interp_kernel.session import Session
from tests.helpers_worker import Answer, run_cell

SOON = "threading.Timer(random.random() / 10, os.kill, (os.getpid(), 9)).start()\nwhile True: "
WAYS = {
    "SIGKILL, a child holds on": (
        "if not os.fork():\n    time.sleep(3)\n    os._exit(0)\nos.kill(os.getpid(), 9)",
        "killed by SIGKILL",
    ),
    "segfault": ("ctypes.string_at(0)", "killed by SIGSEGV (a crash in native code; see the log)"),
    "os._exit": ("os._exit(7)", "it exited with status 7 by its own code"),
    "SIGKILL inside generate": (SOON + "model.generate(max_new_tokens=9)", "killed by SIGKILL"),
    "SIGKILL while it prints": (SOON + "print('last words')", "killed by SIGKILL"),
}
ERROR_S = 1.5


@dataclass
class Death:
    """One killed worker."""

    way: str
    error_s: float  # from the last words of the call to its error
    recovery_s: float  # from the error to the result of the next call
    problems: list[str]


def die(session: Session, way: str, rng: random.Random) -> Death:
    """Kill the worker at a random point of a call, and use its successor."""
    name = f"handle_{rng.randrange(1000)}"
    handle = run_cell(session, f"{name} = [1]", head={"keep": [name]})[name]
    fatal, reason = WAYS[way]
    before = rng.choice(["for i in range(9999): print(i)", "model.generate(max_new_tokens=5)", ""])
    body = f"import ctypes, os, random, threading, time\nrandom.seed({rng.random()})\n{before}\n"
    answer, problems, text = Answer(), [], ""
    words: list[float] = []
    answer.on_event = lambda event: words.append(time.monotonic())
    try:
        run_cell(session, f"{body}print('last words', flush=True)\ntime.sleep(0.02)\n{fatal}", answer=answer)
        problems.append("the call returned")
    except WorkerDiedError as error:
        text = str(error)
    died = time.monotonic()
    if reason not in text:
        problems.append(f"the error does not say {reason!r}: {text[:200]}")
    if f"Lost with it: {name}." not in text:
        problems.append(f"the error does not name {name}: {text[:200]}")
    if "last words\n" not in answer.stdout:
        problems.append(f"output was lost: {answer.stdout[-40:]!r}")
    if not handle.is_lost:
        problems.append("the handle does not know that it is lost")
    if run_cell(session, "v = 6 * 7")["v"] != 42:
        problems.append("the next call is wrong")
    return Death(way, died - (words or [died])[-1], time.monotonic() - died, problems)


def soak(session: Session, n: int, seed: int = 0) -> list[Death]:
    """Kill the worker `n` times, in every way in turn."""
    rng = random.Random(seed)
    return [die(session, list(WAYS)[i % len(WAYS)], rng) for i in range(n)]


def table(deaths: list[Death]) -> str:
    """One line for each way to die."""
    lines = [
        f"{'way':24} {'n':>4} {'error s: median':>16} {'worst':>6} {'recovery s: median':>19} {'worst':>6} {'wrong':>6}"
    ]
    for way in dict.fromkeys(death.way for death in deaths):
        ours = [death for death in deaths if death.way == way]
        errors, recoveries = [d.error_s for d in ours], [d.recovery_s for d in ours]
        wrong = sum(bool(d.problems) or d.error_s > ERROR_S for d in ours)
        lines.append(
            f"{way:24} {len(ours):4} {statistics.median(errors):16.3f} {max(errors):6.2f}"
            f" {statistics.median(recoveries):19.2f} {max(recoveries):6.2f} {wrong:6}"
        )
    return "\n".join(lines)
