"""Carries the worker's verbs over a Unix socket: one thread per connection reads, events are pushed."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from interp_kernel.protocol import BlobFile, Channel, Head, Packed, peer
from interp_kernel.worker.service import Service


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
            connection, _ = sock.accept()
            if peer(connection)[1] != os.getuid():
                connection.close()
                continue
            threading.Thread(
                target=Connection(service, connection).serve, name="interp-connection", daemon=True
            ).start()

    threading.Thread(target=accept, name="interp-accept", daemon=True).start()


class Outbox:
    """Sends messages in order and never blocks who sends: what the socket won't take now goes to a thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: deque[tuple[memoryview, BlobFile | None]] = deque()
        self._wake = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
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
        self._wake.release()
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="interp-outbox", daemon=True)
            self._thread.start()

    def _drain(self) -> None:
        while True:
            self._wake.acquire()
            data, file = self._waiting[0]
            try:
                self._channel.send_rest(data[self._channel.send_some(data, file) :])
            except OSError:
                self._gone = True
                return
            with self._lock:
                self._waiting.popleft()


class Connection:
    """One connection of a client."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._channel = Channel(sock)
        self._outbox = Outbox(self._channel)

    def serve(self) -> None:
        """Answer until the client is gone. Its first message says who it is."""
        client = None
        try:
            head, _, _ = self._channel.receive()
            client = str(head["client"])
            self._service.connected(client)
            self._answer(head, self._service.hello())
            while True:
                self._handle(*self._channel.receive(), client)
        except (EOFError, OSError):
            pass  # the client has left; the tick does what follows from that
        finally:
            if client is not None:
                self._service.disconnected(client)
            self._channel.close()

    def _answer(self, head: Head, reply: Any) -> None:
        self._outbox.send(Packed({"event": "reply", "request": head.get("request"), "value": reply}))

    def _handle(self, head: Head, inline: list[bytearray], file: BlobFile | None, client: str) -> None:
        verb = head["verb"]
        if verb == "submit":
            missing = self._service.submit(head, inline, file, self._outbox.send)
            for call_id in head.get("acknowledge", ()):
                self._service.acknowledge(call_id, 1 << 62)
            if missing:
                self._outbox.send(Packed({"event": "missing", "call": head["id"], **missing}))
            if missing is not None:
                return
        if verb in ("submit", "events"):
            if not self._service.events(head["id"], head.get("after", 0), self._outbox.send):
                gone = "unknown" if verb == "events" else "forgotten"  # what was submitted and has no log has run
                self._outbox.send(Packed({"event": gone, "call": head["id"]}))
            return
        service = self._service
        verbs: dict[str, Callable[[], Any]] = {
            "hello": service.hello,
            "interrupt": lambda: service.interrupt(head["id"], client),
            "acknowledge": lambda: service.acknowledge(head["id"], head["upto"]),
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
