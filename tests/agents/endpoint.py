"""A local endpoint that speaks OpenAI's chat completions and replays recorded answers, faults among them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.agents.studies import Call, Turn, filled

TOKENS = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


@dataclass(frozen=True)
class Fault:
    """An answer that is none: a status, its headers and an error."""

    status: int
    message: str = "stub"
    headers: dict[str, str] = field(default_factory=dict)


class Endpoint:
    """Serves `/v1/chat/completions` on loopback; after the last recorded answer it says "Done."."""

    def __init__(self, replies: Iterable[Turn | Fault], usage: dict[str, Any] | None = None) -> None:
        """Starts to listen; `usage` is what each answer is said to have cost."""
        self.replies = list(replies)
        self.usage = TOKENS if usage is None else usage
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._calls: list[Call] = []  # made so far, in the order in which their answers come back
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, body: dict[str, Any]) -> Fault | dict[str, Any]:
        """What comes next."""
        self.requests.append(body)
        reply = self.replies.pop(0) if self.replies else Turn("Done.")
        return reply if isinstance(reply, Fault) else self._completion(reply, self._ids(body["messages"]))

    def _ids(self, messages: list[dict[str, Any]]) -> dict[str, str]:
        """Ids as an agent finds them: in the text of the tools' answers."""
        answers = [message["content"] for message in messages if message["role"] == "tool"]
        ids = {}
        for call, text in zip(self._calls, answers, strict=False):
            if found := re.search(r"session ([0-9a-f]{8})\b", text):
                ids["session"] = found[1]
            if call.label and (found := re.search(r"cell ([0-9a-f]{8})\b", text)):
                ids[call.label] = found[1]
        return ids

    def _completion(self, turn: Turn, ids: dict[str, str]) -> dict[str, Any]:
        first = len(self._calls)
        self._calls += turn.calls
        message: dict[str, Any] = {"role": "assistant", "content": turn.words or None}
        if turn.calls:
            message["tool_calls"] = [_tool_call(call, ids, first + i) for i, call in enumerate(turn.calls)]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if turn.calls else "stop"}
        head = {"id": f"chatcmpl-{len(self.requests)}", "object": "chat.completion", "created": 0, "model": "stub"}
        return {**head, "choices": [choice], "usage": self.usage}


def _tool_call(call: Call, ids: dict[str, str], number: int) -> dict[str, Any]:
    arguments = call.raw if call.raw is not None else json.dumps(filled(call.arguments, ids))
    return {"id": f"call_{number}", "type": "function", "function": {"name": call.tool, "arguments": arguments}}


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            endpoint.keys.append(self.headers["authorization"])
            assert self.path == "/v1/chat/completions"
            reply = endpoint.answer(body)
            if isinstance(reply, Fault):
                self.reply(reply.status, {"error": {"message": reply.message, "type": "stub"}}, reply.headers)
            else:
                self.reply(200, reply, {})

        def reply(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler
