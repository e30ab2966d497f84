"""Stands for an agent's program on PATH: notes how it was started, then prints what the real one printed.

Run under the name `claude`, `codex` or `gemini`. What it does beside that is in the variable FAKE_CLI, a JSON object:
`report` a file for what it notes, `notebook` one to write, `exit` its exit code, `wait` to go on until it is stopped,
`history` a transcript to leave, as an interactive program does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"


def main() -> int:
    """Do as the variable says."""
    orders = json.loads(os.environ["FAKE_CLI"])
    task = "" if sys.stdin.isatty() else sys.stdin.read()
    report = {"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ), "task": task, "pid": os.getpid()}
    if "notebook" in orders:
        Path(orders["notebook"]).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    if "history" in orders:
        path = Path(orders["history"].replace("SESSION", sys.argv[-1]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    print((RECORDED / f"{Path(sys.argv[0]).name}.jsonl").read_text(), end="", flush=True)
    print("a word that is no event", flush=True)
    print(orders.get("last words", ""), file=sys.stderr)
    note = Path(orders["report"])
    note.with_suffix(".part").write_text(json.dumps(report))
    note.with_suffix(".part").rename(note)
    if orders.get("wait"):
        signal.pause()
    return int(orders.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
