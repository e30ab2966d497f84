"""A process that starts each run of a batch as a fork of itself, with papermill and the rest imported once.

It is small and has one thread, so that forks are cheap and safe. Commands come in on stdin as JSON lines:

    {"run": {...}}       start a run; `id` names it
    {"signal": N}        pass the signal on to every run

and go out on stdout, from here and from the runs themselves:

    {"ready": true}                         it takes commands
    {"id": ..., "cell": 3, "cells": 10}     a run has come to this cell
    {"id": ..., "ended": {...}}             it has ended so; its record is written unless it was refused
    {"id": ..., "code": N}                  its process has ended

When stdin ends, so the batch is gone, every run is told to save and end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp_kernel.notebook.schemas import import_nbformat

import_nbformat()

# What every run needs, imported before the first fork.
import nbformat  # noqa: E402
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook  # noqa: E402

import interp_kernel.notebook.metrics  # noqa: E402
import interp_kernel.notebook.runner  # noqa: E402, F401
from interp_kernel.notebook.checks import read_notebook  # noqa: E402
from interp_kernel.notebook.provenance import environment  # noqa: E402
from interp_kernel.notebook.report import write_html  # noqa: E402
from interp_kernel.notebook.run import run_notebook  # noqa: E402

PR_SET_PDEATHSIG = 1
STOPS = (signal.SIGINT, signal.SIGTERM)
LONGEST = 500  # characters: a line must fit into a pipe in one piece
Job = dict[str, Any]


def main() -> None:
    """Serve commands until stdin ends and the last run has ended."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    # The batch decides, over stdin. Runs inherit the block, so that none misses a signal before it can heed it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    warm_up()
    say({"ready": True})
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    runs: dict[int, str] = {}
    is_open, rest = True, b""
    while is_open or runs:
        ready, _, _ = select.select([woken, *([0] if is_open else [])], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        for pid, code in ended():
            say({"id": runs.pop(pid), "code": code})
        if 0 in ready:
            chunk = os.read(0, 1 << 20)
            is_open = bool(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                obey(json.loads(line), runs, (woken, wake))
            if not is_open:
                pass_on(signal.SIGTERM, runs)


def warm_up() -> None:
    """Have done here what each fork would else do anew: imports, templates and schemas, half a second's worth."""
    environment()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "warm.ipynb")
        cells = [new_markdown_cell("# warm"), new_code_cell("warm = 1")]
        nbformat.write(new_notebook(cells=cells), path)
        read_notebook(path)
        write_html(path)


def obey(command: Job, runs: dict[int, str], pipes: tuple[int, int]) -> None:
    """Carry out one command."""
    if "signal" in command:
        pass_on(command["signal"], runs)
        return
    job, parent = command["run"], os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        for end in pipes:
            os.close(end)
        os._exit(run_job(job, parent))
    runs[pid] = job["id"]


def pass_on(signum: int, runs: dict[int, str]) -> None:
    """Send a signal to every run. None has been waited for, so no process id can be another's by now."""
    for pid in runs:
        os.kill(pid, signum)


def ended() -> Iterator[tuple[int, int]]:
    """Runs that have ended, and how: an exit code, or minus the signal's number."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def run_job(job: Job, parent: int) -> int:
    """In the fork: run one notebook to its end and tell how that was."""
    os.setpgid(0, 0)
    die_with(parent)
    for signum in STOPS:
        signal.signal(signum, lambda *_: None)  # while the cells run the runner heeds them; then only writing is left
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever prints in this process must not look like an answer

    def on_cell(index: int, count: int) -> None:
        say({"id": job["id"], "cell": index, "cells": count}, out)

    try:
        result = run_notebook(**job["options"], progress=False, on_cell=on_cell)
        told: Job = {name: getattr(result, name) for name in ("status", "seconds", "failed_cell", "ename", "evalue")}
    except BaseException as error:  # noqa: BLE001 - the end of a process: the batch is told, and the next run goes on
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            traceback.print_exc()
        told = {"status": "failed", "ename": type(error).__name__, "evalue": str(error)}
    say({"id": job["id"], "ended": {**told, "evalue": (told["evalue"] or "")[:LONGEST]}}, out)
    return 0


def die_with(parent: int) -> None:
    """Have the system send SIGTERM to this process when its parent dies, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def say(line: Job, to: int = 1) -> None:
    """Write a line in one piece, so that it mixes with no other process's; a batch that is gone hears nothing."""
    with contextlib.suppress(BrokenPipeError):
        os.write(to, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main()
