"""The three providers' own protocols, on loopback: each replays one script of calls, in a language model's place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tests.agents.loopback import Loopback, Reply
from tests.agents.studies import Call, filled

Json = dict[str, Any]
WORDS = "All done."
_SESSION = re.compile(r"session ([0-9a-f]{8})\b")


class Provider(Loopback):
    """Serves Anthropic's messages, OpenAI's responses and Gemini's contents; notes every request that offers tools."""

    def __init__(self, calls: Iterable[Call]) -> None:
        """Starts to listen."""
        self.calls = list(calls)
        self.requests: list[Json] = []
        super().__init__()

    def reply(self, path: str, headers: Mapping[str, str], body: Json) -> Reply:
        """See `Loopback.reply`."""
        return Reply("".join(map(_server_sent, self.events(path, body))), "text/event-stream")

    def events(self, path: str, body: Json) -> list[Json]:
        """The stream that answers a request: the next call of the script, or words when it has come to its end."""
        speak, count = next(parts for route, parts in _PROTOCOLS.items() if route in path)
        call = None
        if body.get("tools"):
            self.requests.append(body)
            done = len(re.findall(count, json.dumps(body)))
            call = self.calls[done] if done < len(self.calls) else None
        found = _SESSION.findall(json.dumps(body))
        ids = {"session": found[-1]} if found else {}
        return speak(call.tool, filled(call.arguments, ids)) if call else speak(None, {})


def _anthropic(tool: str | None, arguments: Json) -> list[Json]:
    usage = {"input_tokens": 10, "output_tokens": 1}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "stub", "content": [], "usage": usage}
    if tool:
        block: Json = {
            "type": "tool_use",
            "id": f"toolu_{tool}",
            "name": f"mcp__interp__{tool}",
            "input": {},
        }
        delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    else:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": WORDS}
    return [
        {"type": "message_start", "message": head},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use" if tool else "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]


def _responses(tool: str | None, arguments: Json) -> list[Json]:
    if tool:
        item: Json = {"type": "function_call", "id": "fc_1", "call_id": f"call_{tool}", "namespace": "mcp__interp"}
        item |= {"name": tool, "arguments": json.dumps(arguments)}
    else:
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": WORDS}]}
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    return [
        {"type": "response.created", "response": {"id": "r1"}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"id": "r1", "usage": usage}},
    ]


def _gemini(tool: str | None, arguments: Json) -> list[Json]:
    part: Json = {"functionCall": {"name": f"mcp_interp_{tool}", "args": arguments}} if tool else {"text": WORDS}
    candidate = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
    return [{"candidates": [candidate], "usageMetadata": {"promptTokenCount": 10, "totalTokenCount": 15}}]


# How each speaks, and what in its request shows that a call was answered.
_PROTOCOLS = {
    "/v1/messages": (_anthropic, r'"type": "tool_result"'),
    "/responses": (_responses, r'"type": "function_call_output"'),
    "generateContent": (_gemini, r'"functionResponse"'),
    "GenerateContent": (_gemini, r'"functionResponse"'),
}


def _server_sent(event: Json) -> str:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n"
