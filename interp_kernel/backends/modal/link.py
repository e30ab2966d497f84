"""The near side of one connection to a gateway: a reliable stream of messages over Modal's calls.

One call, `exchange`, carries what waits here to the worker and brings what waits there, so a small cell costs one. A
call may be lost, repeated or run twice; numbers make that harmless. While a call of the user's runs, several exchanges
are under way, so that one always waits at the worker while others travel.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from interp_kernel.backends import Message
from interp_kernel.backends.modal.failures import REPLACED, explain, is_passing
from interp_kernel.backends.modal.wire import LARGEST, Loose, Wire, from_wire, is_final, nbytes, wire_of
from interp_kernel.errors import ShipError
from interp_kernel.protocol import Buffer, Head, Packed

POLL_S = 20.0  # longest wait of an exchange at the gateway
ANSWER_S = 40.0  # beyond that wait, before an exchange counts as lost
UPLOAD_BYTES_PER_S = 500_000  # slowest connection on which a large message is waited for
TRIES = 4
RETRY_S = 0.25
CERTAIN_S = 0.05  # after its last answer a container is taken to be there; later Modal is asked, for one round trip
STREAMING_S = 0.05  # a call that lasts longer has more than one exchange under way
UNDER_WAY = 3

Exchange = Callable[..., Awaitable[Any]]
T = TypeVar("T")


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all calls to Modal are awaited, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="interp-modal", daemon=True).start()
    return loop


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in the loop's thread."""
    return asyncio.run_coroutine_threadsafe(work, event_loop())


class ModalLink:
    """One connection to the worker of one container. What begins with an underscore runs in the loop's thread."""

    def __init__(
        self,
        exchange: Exchange,
        on_hold: Callable[[str], None],
        on_end: Callable[[ModalLink, str], None],
        is_there: Callable[[], bool],
    ) -> None:
        """Nothing is sent yet.

        Args:
            exchange: The gateway's method, as a coroutine function.
            on_hold: Called with the container's boot id when a background call was sent.
            on_end: Called with the reason when the link ends.
            is_there: Asks Modal whether a container runs.
        """
        self.hello: Head = {}
        self.name, self.boot = uuid.uuid4().hex, ""
        self.ended: str | None = None
        self.has_worker_ended = self.is_untaken = False
        self._last_contact = time.monotonic()
        self._exchange, self._on_hold, self._on_end = exchange, on_hold, on_end
        self._is_there = is_there
        self._ready_fd, self._write_fd = os.pipe()
        for fd in (self._ready_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._arrived: deque[Message] = deque()
        self._unsent: deque[tuple[int, Wire]] = deque()
        self._early: dict[int, Wire] = {}
        self._pieces: list[bytes] = []  # of large frames, whose message comes next
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = self._submitted = self._taken = self._received = self._number = self._failures = 0
        self._pending: set[int] = set()  # exchanges whose answers have not come
        self._expects = self._holds = self._is_closed = False
        self._wanted = 1  # exchanges under way at a time
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------- calling thread

    def pack(self, head: Head, frames: Sequence[Buffer], known: Collection[str]) -> Packed:
        """See `Link.pack`."""
        return Loose(head, frames, known)

    def send(self, packed: Packed, wake_fd: int | None = None) -> None:
        """See `Link.send`, but nothing here waits. Raises ShipError for a message that is too large for Modal."""
        if self.ended is not None:
            raise BrokenPipeError(self.ended)
        wire = wire_of(packed)
        if (size := nbytes(wire)) > LARGEST:
            raise ShipError(
                f"The inputs are {size / 1e9:.2f} GB; a Modal container takes at most {LARGEST / 1e9:.2f} GB at once. "
                "Put large data on a Modal Volume and read it in the remote cell, or send it in parts."
            )
        event_loop().call_soon_threadsafe(self._enqueue, wire, packed.head)

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> Message | None:
        """See `Link.receive`."""
        if timeout_s == 0 and time.monotonic() - self._last_contact > CERTAIN_S and not self._is_there():
            raise EOFError("the container has ended since its last answer")
        readers = [self._ready_fd] if wake_fd is None else [self._ready_fd, wake_fd]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._arrived:
            if self.ended is not None:
                raise EOFError(self.ended)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select(readers, [], [], left)
            if self._ready_fd not in ready:
                return None
            with suppress(BlockingIOError):
                os.read(self._ready_fd, 4096)
        return self._arrived.popleft()

    def close(self) -> None:
        """See `Link.close`."""
        event_loop().call_soon_threadsafe(self._close)

    def end(self, why: str) -> None:
        """Tell whoever waits that the worker has ended. Loop's thread."""
        self.has_worker_ended = True
        self._end(why)

    async def abandon(self) -> None:
        """End the link and what is under way, for this process ends. Loop's thread."""
        self.end("the notebook's process ended")  # nobody is to ask Modal for the reason
        self._close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------- loop's thread

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._end("it was closed here")
        os.close(self._ready_fd)
        os.close(self._write_fd)

    def _end(self, why: str) -> None:
        if self.ended is None:
            self._on_end(self, why)  # first, since whoever waits asks next why the worker ended
            self.ended = why
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):
            os.write(self._write_fd, b".")

    def _enqueue(self, wire: Wire, head: Head) -> None:
        self._sent += 1
        self._submitted = self._sent if head["verb"] == "submit" else self._submitted
        self._unsent.append((self._sent, wire))
        self._expects |= head["verb"] in ("hello", "submit", "events", "stop") or "request" in head
        self._holds |= head["verb"] == "hold"
        if head["verb"] == "submit" and head.get("background"):
            self._on_hold(self.boot)
        self._start()
        if self._expects and self._timer is None:
            self._timer = event_loop().call_later(STREAMING_S, self._start, UNDER_WAY)

    def _start(self, wanted: int = 1) -> None:
        """Begin as many exchanges as are needed now; from the first time on that more are wanted, until the end."""
        self._wanted = max(self._wanted, wanted if self.boot else 1)
        while self.ended is None and (
            self._unsent or ((self._expects or self._holds) and len(self._pending) < self._wanted)
        ):
            batch, self._unsent = list(self._unsent), deque()
            wait_s = POLL_S if self._expects or self._holds else 0.0
            self._number += 1
            task = event_loop().create_task(self._run(self._number, list(self._pending), batch, wait_s))
            self._pending.add(self._number)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, number: int, pending: list[int], batch: list[tuple[int, Wire]], wait_s: float) -> None:
        limit = None
        if self.boot:  # else the container may have to start, which Modal limits itself
            limit = wait_s + ANSWER_S + sum(nbytes(wire) for _, wire in batch) / UPLOAD_BYTES_PER_S
        started = time.monotonic()
        call = self._exchange(self.boot, self.name, number, pending, batch, self._received, wait_s)
        try:
            answer = await asyncio.wait_for(call, limit)
        except Exception as error:  # noqa: BLE001 - Modal raises what it likes; it becomes the link's end, in words
            self._pending.discard(number)
            await self._fail(error, batch)
        else:
            self._pending.discard(number)
            self._failures = 0
            if self.boot in ("", answer["boot"]):
                self._take(answer)
            else:
                self._refused(was_there=answer["age_s"] > time.monotonic() - started)
        if self.ended is None:
            self._start()

    async def _fail(self, error: Exception, batch: list[tuple[int, Wire]]) -> None:
        """Send a batch again after a failure that may pass; else end the link."""
        self._failures += 1
        if self.ended is not None:
            return
        if not is_passing(error) or self._failures >= TRIES:
            self.end(explain(error, was_up=bool(self.boot)))
            return
        await asyncio.sleep(RETRY_S * 2**self._failures)
        self._unsent = deque(sorted([*batch, *self._unsent]))

    def _take(self, answer: Head) -> None:
        self.boot, self._last_contact = answer["boot"], time.monotonic()
        self._taken = max(self._taken, answer["taken"])
        self._early.update({n: wire for n, wire in answer["messages"] if n > self._received})
        while (wire := self._early.pop(self._received + 1, None)) is not None:
            self._received += 1
            text, inline, large = wire
            self._pieces += large
            if not text:
                continue
            message, self._pieces = from_wire((text, inline, self._pieces)), []
            if is_final(message[0]):
                self._quiet()
            self._arrived.append(message)
            self._wake()
        if self._expects and answer["messages"]:
            self._wanted = UNDER_WAY
        if (why := answer["ended"]) is not None and self._received >= answer["last"]:
            self.is_untaken = self._taken < self._submitted
            self.has_worker_ended = bool(why)
            self._end(why or "the gateway gave the connection up: this side was silent for too long")

    def _refused(self, *, was_there: bool) -> None:
        """Another container answers. If it was there before the exchange, the old one can't have had it."""
        is_unknown = self._taken < self._submitted
        self.is_untaken = is_unknown and was_there
        maybe = "; it may have begun the call, which was not run again" if is_unknown and not was_there else ""
        self.end(REPLACED + maybe)

    def _quiet(self) -> None:
        """Nothing more is expected, so no exchange keeps the container busy."""
        self._expects, self._wanted = False, 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
