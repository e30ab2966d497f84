"""What a kernel has written down of its calls to workers (`calls.py`), read from outside of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from interp_kernel.notebook.files import Facts

CALLS_MODULE, CALLS_VARIABLE = "interp_kernel.notebook.calls", "INTERP_CALLS"
TOTALS = ("load_s", "queue_s", "run_s", "return_s", "transfer_s", "sent_bytes", "received_bytes")


class CallsFile:
    """Follows the file while the kernel adds to it.

    Attributes:
        workers: Who was called so far, by generation.
        sources: Local modules that calls took along, path to SHA-256.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet, and the file need not be there."""
        self.path = path
        self.workers: dict[str, Facts] = {}
        self.sources: dict[str, str] = {}
        self._read = 0

    def new(self) -> list[Facts]:
        """The calls that ended since the last look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                added = file.read()
        except FileNotFoundError:
            return []
        added = added[: added.rfind(b"\n") + 1]  # the rest of the last line is on its way
        self._read += len(added)
        lines = [json.loads(line) for line in added.splitlines()]
        for line in lines:
            self.sources |= line.get("sources", {})
            if "worker" in line:
                self.workers.setdefault(line["worker"]["generation"], line["worker"])
        return [line["call"] for line in lines if "call" in line]

    def cost(self) -> Facts | None:
        """Totals of the calls since the last look, and where the last of them ran; None if there was none."""
        if not (calls := self.new()):
            return None
        worker = self.workers.get(calls[-1]["worker"], {})
        return {**totals(calls), **{name: worker.get(name) for name in ("backend", "gpu", "model_name")}}


def totals(calls: Sequence[Facts]) -> Facts:
    """Seconds and bytes of calls, how many there were, and how many met a worker that had yet to load."""
    sums: Facts = {name: round(sum(call[name] for call in calls), 6) for name in TOTALS}
    return sums | {"calls": len(calls), "cold_calls": sum(call["is_cold"] for call in calls)}
