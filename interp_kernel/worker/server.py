"""Carries the worker's verbs over a Unix socket: one thread per connection reads, events are pushed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from interp_kernel.protocol import BlobFile, Channel, Head, Packed, peer
from interp_kernel.worker.service import Service

LENT_S = 0.01  # after a call, or two, of this length a connection's own thread reads again, for a stop may come

RETRY_S = 0.05

Message = tuple[Head, list[bytearray], BlobFile | None]


def listen(path: Path) -> socket.socket:
    """Bind the worker's socket, for this user only."""
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    sock.listen(64)
    os.register_at_fork(after_in_child=sock.close)  # or what a call forks would answer for a worker that has ended
    return sock


def serve_forever(service: Service, sock: socket.socket) -> None:
    """Accept connections of this user in a thread."""

    def accept() -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                time.sleep(RETRY_S)  # a call has taken all descriptors
                continue
            try:
                if peer(connection)[1] != os.getuid():
                    raise PermissionError("the client is another user's")
                serve = Connection(service, connection).serve
                threading.Thread(target=serve, name="interp-connection", daemon=True).start()
            except (OSError, RuntimeError):  # or it has left already (macOS), or no thread can be started now
                connection.close()

    threading.Thread(target=accept, name="interp-accept", daemon=True).start()


class Outbox:
    """Sends messages in order and never blocks who sends: what the socket won't take now goes to a thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: deque[tuple[memoryview, BlobFile | None]] = deque()
        self._gone = False

    def send(self, packed: Packed) -> bool:
        """Send or queue a message; False once the other side is gone."""
        with self._lock:
            data, file = memoryview(packed.encode()), packed.file
            if not self._waiting and not self._gone:
                try:
                    sent = self._channel.send_some(data, file, socket.MSG_DONTWAIT)
                    data, file = data[sent:], file if not sent else None
                except BlockingIOError:
                    pass
                except OSError:
                    self._gone = True
            if data and not self._gone:
                self._queue(data, file)
            return not self._gone

    def _queue(self, data: memoryview, file: BlobFile | None) -> None:
        self._waiting.append((data, file))
        if len(self._waiting) == 1:
            threading.Thread(target=self._drain, name="interp-outbox", daemon=True).start()

    def _drain(self) -> None:
        while True:
            data, file = self._waiting[0]
            try:
                self._channel.send_rest(data[self._channel.send_some(data, file) :])
            except OSError:
                self._gone = True
            with self._lock:
                self._waiting.popleft()
                if self._gone:
                    self._waiting.clear()
                if not self._waiting:
                    return  # under the lock: the next message starts a new thread


class Connection:
    """One connection of a client.

    A thread of its own reads it. After a call, though, the main thread reads it for a moment, since a call that comes
    at once then needs no second thread: waking one costs a fifth of a small call. Its own thread looks after it again
    when that moment is over, when something else than a call has come, or when a call takes long.
    """

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._channel = Channel(sock)
        self._outbox = Outbox(self._channel)
        self._reading = threading.Lock()  # held by the thread that takes a message from the channel
        self._lent = False  # set at each call: the main thread may read
        self._returned = threading.Event()
        self._left: Message | Exception | None = None  # what the main thread got and left to this connection's own

    def serve(self) -> None:
        """Answer until the client is gone. Its first message says who it is."""
        client = None
        try:
            head, _, _ = self._channel.receive()
            client = str(head["client"])
            self._service.connected(client)
            self._answer(head, self._service.hello())
            while True:
                self._handle(*self._next_message(), client)
        except (EOFError, OSError):
            pass  # the client has left; the tick does what follows from that
        finally:
            if client is not None:
                self._service.disconnected(client)
            self._channel.close()

    def take_call(self, within_s: float) -> bool:
        """See `Reader.take_call`."""
        if self._left is not None or not self._reading.acquire(blocking=False):
            return False  # its own thread is about to read, or does
        try:
            message = self._channel.received()
            if message is None and self._channel.arrives(within_s):
                self._channel.fill()
                message = self._channel.received()
            if message is not None and message[0]["verb"] == "submit":
                self._submit(*message)
                return True
            self._left = message
        except Exception as error:  # noqa: BLE001 - a client that leaves or writes nonsense ends its own thread only
            self._left = error
        finally:
            self._reading.release()
        self.give_back()
        return False

    def give_back(self) -> None:
        """See `Reader.give_back`."""
        self._returned.set()

    def _next_message(self) -> Message:
        while self._lent:  # and again, if the main thread has taken another call meanwhile
            self._lent = False
            if self._returned.wait(LENT_S):
                break
        with self._reading:
            left, self._left = self._left, None
            if isinstance(left, Exception):
                raise left
            return left or self._channel.receive()

    def _answer(self, head: Head, reply: Any) -> None:
        self._outbox.send(Packed({"event": "reply", "request": head.get("request"), "value": reply}))

    def _handle(self, head: Head, inline: list[bytearray], file: BlobFile | None, client: str) -> None:
        verb = head["verb"]
        if verb == "submit":
            self._submit(head, inline, file)
            return
        if verb == "events":
            self._follow(head, "unknown")
            return
        service = self._service
        verbs: dict[str, Callable[[], Any]] = {
            "hello": service.hello,
            "interrupt": lambda: service.interrupt(head["id"], client),
            "acknowledge": lambda: service.acknowledge(head["id"]),
            "release": partial(service.release, head.get("values", [])),
            "complete": lambda: service.complete(head["text"], head["names"]),
            "inspect": lambda: service.inspect(head["name"], head["names"]),
            "settings": lambda: service.set_window(head["scaledown_window"], head["min_containers"]),
            "hold": lambda: service.hold(client),
            "stop": lambda: service.stop(head["reason"]),
        }
        reply = verbs[verb]()
        if "request" in head:
            self._answer(head, reply)

    def _submit(self, head: Head, inline: list[bytearray], file: BlobFile | None) -> None:
        self._returned.clear()
        self._lent = True
        missing = self._service.submit(head, inline, file, self._outbox.send, self)
        for call_id in head.get("acknowledge", ()):
            self._service.acknowledge(call_id)
        if missing == {}:
            return
        self.give_back()
        if missing is None:
            self._follow(head, "forgotten")  # what was submitted and has no log has run
        else:
            self._outbox.send(Packed({"event": "missing", "call": head["id"], **missing}))

    def _follow(self, head: Head, otherwise: str) -> None:
        if not self._service.events(head["id"], head.get("after", 0), self._outbox.send):
            self._outbox.send(Packed({"event": otherwise, "call": head["id"]}))
