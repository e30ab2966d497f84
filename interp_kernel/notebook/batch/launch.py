"""The near side of the process that forks the runs of a batch, see `launcher.py`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from interp_kernel.backends.local import tail
from interp_kernel.errors import NotebookError

START_S = 120.0
END_S = 3600.0


class Launcher:
    """The process that forks the runs, see `launcher.py`."""

    def __init__(self, log: Path, lock: int) -> None:
        """Start it; what it and its runs print goes to `log`."""
        self._log, self._lock = log, lock
        self.start()

    def start(self) -> None:
        """Start it, anew if it has ended."""
        self.has_ended, self._rest = False, b""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "interp_kernel.notebook.batch.launcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[self._lock],
                start_new_session=True,  # a terminal's Ctrl-C is for the batch, which passes it on once
            )
        if not any("ready" in line for line in self.lines(START_S)):
            self.process.kill()
            self.forget()
            end = tail(self._log, 2000).strip()
            raise NotebookError(f"The process that starts the runs did not come up; the end of {self._log}:\n{end}")

    def send(self, command: Mapping[str, Any]) -> None:
        """Give it a command; if it has just died, `lines` finds out."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(command, default=str).encode() + b"\n")
            self.process.stdin.flush()

    def lines(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """What has come since the last look, or comes within the time."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while select.select([fd], [], [], timeout_s)[0]:
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                self.forget()
                self.has_ended = True
                return
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            yield from map(json.loads, whole)
            timeout_s = 0.0

    def close(self) -> None:
        """End it; runs that still go on are told to save, and waited for."""
        if self.has_ended:
            return
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        for _ in self.lines(END_S):
            pass

    def forget(self) -> None:
        """Wait for its end and close what led to it."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


@contextmanager
def launched(folder: Path, lock: int) -> Iterator[Launcher]:
    """A launcher that is ended with the block."""
    launcher = Launcher(folder / "batch.log", lock)
    try:
        yield launcher
    finally:
        launcher.close()
