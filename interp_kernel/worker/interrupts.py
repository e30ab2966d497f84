"""Stops the call that runs, and only that one, by a KeyboardInterrupt in the worker's main thread."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

AGAIN_S = 0.01  # by then the finalizer that swallowed a stop has ended


class Interrupter:
    """Owns SIGINT in this process: a signal that nobody asked for here does nothing.

    The handler runs in the main thread between two bytecodes, so plain attributes are enough: a stop that arrives
    after its call has ended finds another name in `_running` and is dropped.
    """

    def __init__(self) -> None:
        """Must be made in the main thread."""
        self._pid = os.getpid()
        self._running: str | None = None
        self._since = 0.0
        self._targets: set[str] = set()  # calls that are to be stopped, now or when they begin
        self._shields = 0
        self._waiting = False
        self._raised: KeyboardInterrupt | None = None
        self.was_reached = False  # whether a stop reached the call that runs, or ran last; it may have caught it
        signal.signal(signal.SIGINT, self._on_signal)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._on_unraisable

    def interrupt(self, call_id: str) -> bool:
        """Stop a call if it is the one that runs now, and what it has started, as Ctrl-C would; from any thread."""
        since, now = self._since, _uptime()
        self._targets.add(call_id)
        if self._running != call_id:
            return False
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        # After the call itself, which may wait for one of them and would go on, and would make the search slow.
        with suppress(OSError):  # it has taken all descriptors, so /proc can't be read
            for pid in _processes_between(since, now):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
        return True

    def run(self, call_id: str, code: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Run code that `interrupt` may stop; whatever it raises is returned, never raised."""
        value, error = None, None
        try:
            self.was_reached = False
            self._since, self._running = _uptime(), call_id
            if call_id in self._targets:  # it was stopped after it had left the queue
                raise KeyboardInterrupt
            value = code()
        except BaseException as raised:  # noqa: BLE001 - a call may raise anything, SystemExit too
            error = raised
        if os.getpid() != self._pid:  # a child that the call has forked came back with it
            os._exit(0 if error is None else 1)
        while True:  # a stop may arrive on these very lines
            try:
                self._running = None
                self._targets.discard(call_id)
                self._shields, self._waiting = 0, False
                return value, error
            except KeyboardInterrupt as late:
                error = error or late

    @contextmanager
    def shield(self) -> Iterator[None]:
        """A block that a stop does not cut in half: it is raised at the end of the block."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._waiting and not self._shields:
            self._waiting = False
            raise KeyboardInterrupt

    def _on_signal(self, *_: Any) -> None:
        if self._running not in self._targets:
            return
        self._targets.discard(self._running)
        self.was_reached = True
        if self._shields:
            self._waiting = True
        else:
            self._raised = KeyboardInterrupt()
            raise self._raised

    def _on_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Python swallows what a finalizer raises; a stop that fell into one is sent again."""
        call_id = self._running
        if self._raised is None or unraisable.exc_value is not self._raised or call_id is None:
            self._unraisable(unraisable)
            return
        again = threading.Timer(AGAIN_S, self.interrupt, [call_id])
        again.daemon = True
        again.start()


def _uptime() -> float:
    """Seconds since the machine started, which no change of its clock moves."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _processes_between(since: float, until: float) -> Iterator[int]:
    """The other processes of this one's group that were started then (`_uptime`); none where there is no /proc.

    Those of earlier calls, and those with a group of their own, are meant to live on.
    """
    group, tick = os.getpgid(0), os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            pid, its_group, its_start = int(folder.name), int(fields.split()[2]), int(fields.split()[19])
            if its_group == group and int(since * tick) <= its_start <= int(until * tick) and pid != os.getpid():
                yield pid
