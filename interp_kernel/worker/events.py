"""A call and its event log: everything that it shows and returns, in one order, until it is acknowledged."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import IO, Any, Protocol

from interp_kernel.protocol import Buffer, Head, Packed

COALESCE_S = 0.01
SHOWN_CHARS = 5_000_000  # of a call's text; the whole of it goes to a file beyond that
FILE_CHARS = 1 << 30
FLUSH_CHARS = 1 << 16

Send = Callable[[Packed], bool]  # False once the listener is gone


def one_at_a_time(method: Callable[..., None]) -> Callable[..., None]:
    """Run a log's method under its lock; what comes back to the log in the midst of it is done after it.

    Garbage is collected anywhere, and finalizers print: `tqdm.__del__` closes its bar.
    """

    @wraps(method)
    def guarded(log: CallLog, *args: Any, **kwargs: Any) -> None:
        with log._lock:
            log._waiting.append(partial(method, log, *args, **kwargs))
            if len(log._waiting) > 1:
                return
            try:
                while log._waiting:
                    log._waiting[0]()
                    log._waiting.popleft()
            finally:
                log._waiting.clear()

    return guarded


class CallLog:
    """Numbers the events of one call and hands them to whoever listens; text is joined for 10 ms."""

    def __init__(self, call_id: str, client: str, folder: Path, flusher: Flusher) -> None:
        self.call_id, self.client, self.folder, self.flusher = call_id, client, folder, flusher
        self.done = False
        self.kept = False  # whether it outlives its client, as the log of a background call does
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()  # the first of them is being done
        self._events: list[Packed] = []
        self._listeners: list[Send] = []
        self._name, self._text, self._text_chars = "stdout", list[str](), 0
        self._chars, self._written = 0, 0
        self._history: list[str] = []
        self._file: IO[str] | None = None

    @one_at_a_time
    def emit(self, head: Head, frames: Sequence[Buffer] = (), *, last: bool = False) -> None:
        """Append an event after the text that came before it."""
        self._flush()
        self._append(head, frames, last=last)

    @one_at_a_time
    def write(self, name: str, text: str) -> None:
        """Append text of `stdout` or `stderr`; shown within 10 ms."""
        if name != self._name:
            self._flush()
            self._name = name
        if not self._text:
            self.flusher.wake(self)
        self._text.append(text)
        self._text_chars += len(text)
        if self._text_chars > FLUSH_CHARS:
            self._flush()

    @one_at_a_time
    def flush(self) -> None:
        """Turn the text that waits into an event, or into lines of the overflow file."""
        self._flush()

    @one_at_a_time
    def listen(self, send: Send, after: int) -> None:
        """Send all events after a position, then each new one."""
        self._listeners.append(send)
        for packed in self._events[after:]:
            send(packed)

    @property
    def overflow(self) -> Path:
        """The file that takes the whole text once there is more than is shown."""
        return self.folder / f"output-{self.call_id}.log"

    def _append(self, head: Head, frames: Sequence[Buffer] = (), *, last: bool = False) -> None:
        seq = len(self._events) + 1
        packed = Packed({**head, "call": self.call_id, "seq": seq, "last": last}, frames)
        self._events.append(packed)
        if last:
            self._close()
        if self._listeners:
            self._listeners = [send for send in self._listeners if send(packed)]

    def _flush(self) -> None:
        if not self._text:
            return
        text = "".join(self._text)
        self._text, self._text_chars = [], 0
        text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates can't be sent on
        room = SHOWN_CHARS - self._chars
        self._chars += len(text)
        if self._file is None and self._written == 0:
            self._history.append(text)
        if room > 0:
            self._append({"event": "stream", "name": self._name, "text": text[:room]})
        if self._chars > SHOWN_CHARS and self._written < FILE_CHARS:
            self._spill(text)

    def _spill(self, text: str) -> None:
        """Keep on writing the whole text to a file; a full disk ends that, not the call."""
        try:
            if self._file is None:
                self._file = self.overflow.open("w", encoding="utf-8")
                self._notice(f"output over {SHOWN_CHARS / 1e6:.0f} MB is not shown; all of it is in {self.overflow}")
                text, self._history = "".join(self._history), []
            self._file.write(text)
            self._file.flush()  # so that a full disk is noticed now
            self._written += len(text)
        except OSError as error:
            self._written, self._history = FILE_CHARS, []
            self._notice(f"output over {SHOWN_CHARS / 1e6:.0f} MB is lost: {self.overflow} can't be written: {error}")

    def _notice(self, text: str) -> None:
        self._append({"event": "warning", "text": text})

    def _close(self) -> None:
        self.done = True
        self._history = []
        if self._file is not None:
            with suppress(OSError):  # the disk is full, and the call has been told
                self._file.close()


class Reader(Protocol):
    """The connection of a call, which the main thread may read for a moment after it."""

    def take_call(self, within_s: float) -> bool:
        """Wait for the next message and submit it if it is a call; if none comes, the connection is given back."""

    def give_back(self) -> None:
        """Let its own thread read it again."""


@dataclass
class Call:
    """One submitted call; `head` is its message, see `Session.submit` on the near side."""

    id: str
    client: str
    head: Head
    frames: list[Buffer]
    log: CallLog
    reader: Reader
    background: bool = False
    queued: float = field(default_factory=time.monotonic)


class Flusher:
    """One thread that turns waiting text into events 10 ms after its first character."""

    def __init__(self) -> None:
        self._dirty: set[CallLog] = set()
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="interp-flush", daemon=True).start()

    def wake(self, log: CallLog) -> None:
        """Flush this log soon."""
        self._dirty.add(log)
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(COALESCE_S)
            self._wake.clear()
            while self._dirty:
                self._dirty.pop().flush()
