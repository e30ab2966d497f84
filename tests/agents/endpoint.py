"""A local endpoint that speaks OpenAI's chat completions and replays recorded answers, faults among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.agents.loopback import Loopback, Reply
from tests.agents.studies import Call, Turn, filled

TOKENS = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


@dataclass(frozen=True)
class Fault:
    """An answer that is none: a status, its headers and an error."""

    status: int
    message: str = "stub"
    headers: dict[str, str] = field(default_factory=dict)


class Endpoint(Loopback):
    """Serves `/v1/chat/completions` on loopback; after the last recorded answer it says "Done."."""

    def __init__(self, replies: Iterable[Turn | Fault], usage: dict[str, Any] | None = None) -> None:
        """Starts to listen; `usage` is what each answer is said to have cost."""
        self.replies = list(replies)
        self.usage = TOKENS if usage is None else usage
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._calls: list[Call] = []  # made so far, in the order in which their answers come back
        super().__init__()
        self.base_url = f"{self.url}/v1"

    def reply(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Reply:
        """See `Loopback.reply`."""
        assert path == "/v1/chat/completions"
        self.keys.append(headers.get("authorization"))
        answer = self.answer(body)
        if isinstance(answer, Fault):
            error = {"error": {"message": answer.message, "type": "stub"}}
            return Reply(json.dumps(error), status=answer.status, headers=answer.headers)
        return Reply(json.dumps(answer))

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
