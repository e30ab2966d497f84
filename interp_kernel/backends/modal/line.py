"""The far side of one link: the client's connection to the worker, and what waits to be handed over."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from interp_kernel.backends import Message
from interp_kernel.backends.modal.wire import LARGEST, PIECE, Part, Wire, from_wire, in_parts, is_final, repack
from interp_kernel.protocol import Channel, Head, frames_size
from interp_kernel.worker.server import Outbox

PID_BITS = 22  # of a process id; a number of the container's own goes before it
GATHER_S = 0.003  # after a first message, for those right behind it

Numbered = tuple[int, Wire]


@dataclass
class Waiting:
    """Something for the client, kept until the client says that it has it."""

    number: int
    part: Part
    carrier: int = 0  # the exchange that was given it last


class Line:
    """One client's link. Everything but the outbox's thread runs in the event loop."""

    def __init__(self, path: str, pid: int, boot: str, *, is_first: bool) -> None:
        """Connect to the worker that has this process id."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        self.pid, self.boot, self.is_first = pid, boot, is_first
        self.following: set[str] = set()  # calls whose end this client has not been sent
        self.polls, self.last_poll = 0, time.monotonic()
        self.taken = 0  # number of the client's last message that went on to the worker
        self.last = 0  # number of the last part of the worker's last message
        self.is_open = True
        self._channel = Channel(sock)
        self._outbox = Outbox(self._channel)
        self._early: dict[int, Wire] = {}
        self._waiting: list[Waiting] = []
        self._newest, self._pending = 0, set[int]()  # exchanges, as the newest one tells
        self._runs: dict[int, object] = {}
        self._finals = 0
        self._news = asyncio.Event()
        self._fileno = self._channel.fileno()
        asyncio.get_running_loop().add_reader(self._fileno, self._read)

    def take(self, numbered: list[Numbered]) -> None:
        """Pass the client's messages on to the worker, each once and in order."""
        self._early.update({n: wire for n, wire in numbered if n > self.taken})
        while self.is_open and (wire := self._early.pop(self.taken + 1, None)) is not None:
            self.taken += 1
            head, inline, file = from_wire(wire, in_file=True)
            if head["verb"] in ("submit", "events"):
                self.following.add(head["id"])
            if "generation" in head:
                head["generation"] = head["generation"].removeprefix(f"{self.boot}.")
            self._outbox.send(repack((head, inline, file)))

    async def next(self, number: int, pending: Collection[int], received: int, wait_s: float) -> list[Numbered]:
        """What waits for the client, as soon as there is anything.

        What an earlier exchange was given is handed over again if the client no longer waits for that exchange: its
        answer was lost. Modal may run an exchange twice, and only one run's answer is read, so the run before is sent
        away and what it took is handed over again, too.
        """
        run = self._runs[number] = object()
        if number > self._newest:
            self._newest, self._pending = number, {number, *pending}
        self._waiting = [each for each in self._waiting if each.number > received]
        for each in self._waiting:
            if each.carrier == number or each.carrier not in self._pending:
                each.carrier = 0
        self._news.set()  # for a run of the same exchange, or of one that nobody waits for
        try:
            await self._wait(number, run, wait_s)
            if not self._is_read(number, run):
                return []
            given = self._given()
            for each in given:
                each.carrier = number
            return [(each.number, each.part.make()) for each in given]
        finally:
            if self._runs.get(number) is run:
                del self._runs[number]

    def close(self) -> None:
        """End the connection; the worker stops what runs for this client alone."""
        if self.is_open:
            self.is_open = False
            asyncio.get_running_loop().remove_reader(self._fileno)
            self._channel.close()
            self._news.set()

    async def _wait(self, number: int, run: object, wait_s: float) -> None:
        deadline, finals = time.monotonic() + wait_s, self._finals
        while self.is_open and not self._unhanded() and (left := deadline - time.monotonic()) > 0:
            if self._finals != finals or not self._is_read(number, run):
                return  # another exchange has just brought the end, and this one would only keep the container
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
        if self.is_open and (given := self._unhanded()) and not given[-1].part.is_final:
            await asyncio.sleep(GATHER_S)

    def _is_read(self, number: int, run: object) -> bool:
        return self._runs.get(number) is run and (number > self._newest or number in self._pending)

    def _unhanded(self) -> list[Waiting]:
        return [each for each in self._waiting if not each.carrier]

    def _given(self) -> list[Waiting]:
        """As much as one exchange carries; others bring the rest at the same time."""
        given, size = list[Waiting](), 0
        for each in self._unhanded():
            size += each.part.nbytes
            if given and size > PIECE:
                break
            given.append(each)
        return given

    def _read(self) -> None:
        try:
            self._channel.fill()
        except (EOFError, OSError):
            self.close()
        while (message := self._channel.received()) is not None:
            self._keep(message)

    def _keep(self, message: Message) -> None:
        head = message[0]
        if head["event"] == "reply" and isinstance(head["value"], dict) and "generation" in head["value"]:
            self._localise(head["value"])
        if is_final(head):
            self._finals += 1
            self.following.discard(head.get("call", ""))
        for part in in_parts(as_allowed(message)):
            self.last += 1
            self._waiting.append(Waiting(self.last, part))
        self._news.set()

    def _localise(self, hello: Head) -> None:
        """Make a hello say which container it is from, also where two were restored from one snapshot."""
        hello["generation"] = f"{self.boot}.{hello['generation']}"
        hello["pid"] = global_pid(self.boot, hello["pid"])
        hello["place"] = os.environ.get("MODAL_TASK_ID", "")
        hello["is_first"] = self.is_first


def global_pid(boot: str, pid: int) -> int:
    """A number for a process that no process of another container has."""
    return int(boot[:7], 16) << PID_BITS | pid


def as_allowed(message: Message) -> Message:
    """A message, or if it is too large for Modal an error that says so."""
    head, inline, _ = message
    size = frames_size(head, inline)
    if size <= LARGEST:
        return message
    text = (
        f"The result is {size / 1e9:.2f} GB; a Modal container returns at most {LARGEST / 1e9:.2f} GB at once. "
        "Keep it there (%%remote --keep NAME) and return parts of it."
    )
    error = {"ename": "ShipError", "evalue": text, "traceback": [f"ShipError: {text}"]}
    return {**{k: head[k] for k in ("event", "call", "seq", "last") if k in head}, "error": error}, [], None
