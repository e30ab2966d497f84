"""Everything that a call prints, from Python, from C and from its subprocesses, goes to that call's log."""

from __future__ import annotations

import io
import os
import select
import selectors
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from interp_kernel.worker.events import CallLog

SPAWNING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec"}
FDS = {"stdout": 1, "stderr": 2}
LATE_BYTES = 16_000_000  # that children of a call may write into the worker's log after its end


class Streams:
    """Owns descriptors 1 and 2 of the worker.

    Text goes to the log of the call that caused it: a thread or a subprocess that outlives its call writes to
    the worker's own log file, never into another call's cell.
    """

    def __init__(self, shield: Callable[[], AbstractContextManager[None]]) -> None:
        """Take over both descriptors; what they were before becomes the worker's own log.

        Args:
            shield: Context in which an interrupt of the main thread waits, so that no log is left half written.
        """
        self.shield = shield
        self._log_fd = os.dup(2)
        self._current: CallLog | None = None
        self._old_threads: set[int | None] = set()
        self._is_child = False
        self._spawned = False
        self._lock = threading.Lock()  # held while a pipe's text is on its way to a log
        self._selector = selectors.DefaultSelector()
        self._pipes = self._new_pipes()
        sys.stdout, sys.stderr = TextStream(self, "stdout"), TextStream(self, "stderr")
        sys.addaudithook(self._notice_spawn)
        os.register_at_fork(after_in_child=self._become_child)
        threading.Thread(target=self._read_pipes, name="interp-pipes", daemon=True).start()

    def begin(self, log: CallLog) -> None:
        """From now on output belongs to `log`."""
        # By the system's number: `ident` is an address, which the next thread gets as soon as one has ended.
        self._old_threads = {thread.native_id for thread in threading.enumerate()}
        self._current = log
        for pipe in self._pipes:
            pipe.log = log

    def end(self) -> None:
        """All that the call has written so far is in its log; from now on it gets no more."""
        with self._lock:
            if self._waiting.poll(0):
                for pipe in self._pipes:
                    pipe.pump(self._log_fd)  # once takes a full pipe; a child that never stops must not hold the call
            for pipe in self._pipes:
                pipe.log = None
            self._current = None
        # A child may still hold these pipes, or the call has closed them, so the next call gets new ones.
        if self._spawned or any(pipe.closed for pipe in self._pipes):
            with suppress(OSError):  # the call has left no descriptors: again after the next one
                self._pipes = self._new_pipes()
                self._spawned = False

    def write(self, name: str, text: str) -> None:
        """Python-level output of any thread."""
        log = self._current
        if self._is_child:
            write_all(FDS[name], text.encode("utf-8", "backslashreplace"))
            return
        if threading.current_thread() is threading.main_thread():
            if log is not None:
                with self.shield():
                    log.write(name, text)
                return
        elif log is not None and not self.is_late():
            log.write(name, text)
            return
        write_all(self._log_fd, text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        """Show at once what waits to be shown."""
        if (log := self._current) is not None and not self.is_late():
            with self.shield() if threading.current_thread() is threading.main_thread() else nullcontext():
                log.flush()

    def is_late(self) -> bool:
        """Whether this thread belongs to a call that has ended, to the worker itself, or to a child of a call."""
        thread = threading.current_thread()
        if self._is_child or thread is threading.main_thread():
            return self._is_child
        return threading.get_native_id() in self._old_threads or thread.name.startswith("interp-")

    def _become_child(self) -> None:
        """A forked child has none of the threads that serve the logs; the descriptors are the parent's pipes."""
        self._is_child = True

    def _new_pipes(self) -> list[Pipe]:
        pipes, self._waiting = [], select.poll()
        for fd in FDS.values():
            os.dup2(self._log_fd, fd)  # where a call has closed them, the pipes must not get these numbers
        for name, fd in FDS.items():
            read_fd, write_fd = os.pipe()
            os.set_blocking(read_fd, False)
            os.dup2(write_fd, fd)
            os.close(write_fd)
            pipes.append(Pipe(name, read_fd, None))
            self._selector.register(read_fd, selectors.EVENT_READ, pipes[-1])
            self._waiting.register(read_fd, select.POLLIN)
        return pipes

    def _notice_spawn(self, event: str, _: object) -> None:
        if event in SPAWNING:
            self._spawned = True

    def _read_pipes(self) -> None:
        while True:
            for key, _ in self._selector.select():
                pipe: Pipe = key.data
                with self._lock:
                    pipe.pump(self._log_fd)
                if pipe.closed:
                    self._selector.unregister(pipe.read_fd)
                    os.close(pipe.read_fd)


@dataclass
class Pipe:
    """What is written to a descriptor, from where, and whose it is."""

    name: str
    read_fd: int
    log: CallLog | None
    closed: bool = False
    late_bytes: int = 0

    def pump(self, log_fd: int) -> None:
        """Move what waits in the pipe to its log, all that fits into a pipe at once."""
        if self.closed:
            return
        try:
            data = os.read(self.read_fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.closed = True
        elif self.log is not None:
            self.log.write(self.name, data.decode("utf-8", "backslashreplace"))
        elif self.late_bytes < LATE_BYTES:
            self.late_bytes += len(data)
            write_all(log_fd, data)


def write_all(fd: int, data: bytes) -> None:
    """Write to the worker's own log; a full disk must not end a call."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass


class TextStream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of the worker."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, streams: Streams, name: str) -> None:
        super().__init__()
        self._streams, self._name = streams, name
        self.buffer = ByteStream(self)

    def write(self, text: str) -> int:
        """Append to the output of the call that this thread belongs to."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._streams.write(self._name, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        """Write several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Show at once what was written."""
        self._streams.flush()

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor that subprocesses inherit."""
        return FDS[self._name]


class ByteStream(io.RawIOBase):
    """The binary side of a TextStream; bytes that are not UTF-8 show as escapes."""

    def __init__(self, text: TextStream) -> None:
        super().__init__()
        self._text = text

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write bytes as text."""
        self._text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)
