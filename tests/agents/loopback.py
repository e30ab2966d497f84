"""An HTTP server on loopback that stands for a provider of language models."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Reply:
    """What is sent back."""

    text: str
    kind: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Loopback:
    """Serves on a free port while its block runs; subclasses say what they reply to a request of JSON."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Reply:
        """The reply to a POST."""
        raise NotImplementedError


def _handler(server: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send(server.reply(self.path, {name.lower(): value for name, value in self.headers.items()}, body))

        def do_GET(self) -> None:
            self.send(Reply('{"data": [], "models": []}'))

        def do_HEAD(self) -> None:
            self.do_GET()

        def send(self, reply: Reply) -> None:
            data = reply.text.encode()
            self.send_response(reply.status)
            length = str(len(data))
            for name, value in {"content-type": reply.kind, "content-length": length, **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler
