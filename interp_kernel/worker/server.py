"""Carries the worker's verbs over a Unix socket; events are pushed."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import traceback
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


class Hub:
    """Reads all connections, in one thread at a time.

    While no call runs that is the main thread itself, so that a call begins without a change of threads, which costs
    more than the rest of a small call's way. While one runs, a thread of the hub reads, so that it can be stopped.
    """

    def __init__(self, service: Service, sock: socket.socket) -> None:
        """Start to accept connections of this user; until the first `wait` in the hub's own thread."""
        self._service, self._sock = service, sock
        self._selector = selectors.DefaultSelector()
        self._wake_fd, self._waker_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        self._selector.register(sock, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, lambda: os.read(self._wake_fd, 64))
        self._reads = threading.Lock()  # held by the thread that reads
        self._busy = threading.Event()
        self._busy.set()
        threading.Thread(target=self._watch, name="interp-hub", daemon=True).start()

    def wait(self, until: Callable[[], bool]) -> None:
        """Read in the main thread until the condition holds."""
        self._busy.clear()
        if not self._reads.acquire(blocking=False):
            os.write(self._waker_fd, b"!")  # the hub's thread waits for messages, and leaves
            self._reads.acquire()
        try:
            while not until():
                self._read()
        finally:
            self._reads.release()
            self._busy.set()

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            with self._reads:
                while self._busy.is_set():
                    self._read()

    def _read(self) -> None:
        for key, _ in self._selector.select():
            key.data()

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return  # who knocked has left already
        if peer(sock)[1] != os.getuid():
            sock.close()
            return
        connection = Connection(self._service, sock)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._serve, sock, connection))

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        if not connection.serve():
            self._selector.unregister(sock)
            connection.close()


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
        self._client: str | None = None

    def serve(self) -> bool:
        """Answer what has arrived; False once the client is gone. Its first message says who it is."""
        try:
            self._channel.fill()
            while (message := self._channel.received()) is not None:
                if self._client is None:
                    self._client = str(message[0]["client"])
                    self._service.connected(self._client)
                    self._answer(message[0], self._service.hello())
                else:
                    self._handle(*message, self._client)
        except (EOFError, OSError):
            return False  # the client has left; the tick does what follows from that
        except Exception:  # noqa: BLE001 - who talks nonsense is hung up on, and nobody else suffers
            traceback.print_exc()
            return False
        return True

    def close(self) -> None:
        """End the connection."""
        if self._client is not None:
            self._service.disconnected(self._client)
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
        if verb in ("complete", "inspect"):  # these run the objects' own code, which must not hold up a stop
            threading.Thread(target=lambda: self._answer(head, verbs[verb]()), daemon=True).start()
            return
        reply = verbs[verb]()
        if "request" in head:
            self._answer(head, reply)
