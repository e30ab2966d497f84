"""What the agents' programs print as they work: one reader each, which notes figures and says the gist for a person."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from interp_kernel.agents import SERVER_NAME
from interp_kernel.agents.record import Run

WIDTH = 200


def read_claude(run: Run, event: dict[str, Any]) -> Iterable[str]:
    """Claude Code's `--output-format stream-json`."""
    if event.get("type") == "system" and event.get("subtype") == "init":
        run.record.model = event.get("model") or run.record.model
        yield from _missing(run, {server.get("name"): server.get("status") for server in event.get("mcp_servers", ())})
    elif event.get("type") == "assistant":
        for part in event["message"].get("content", ()):
            if part.get("type") == "text":
                yield gist(part["text"])
            elif part.get("type") == "tool_use":
                yield called(run, part["name"], part.get("input"))
    elif event.get("type") == "result":
        run.record.turns, run.record.cost_usd = event.get("num_turns", 0), event.get("total_cost_usd")
        run.add_tokens(_numbers(event.get("usage"), "input_tokens", "cache_read_input_tokens", "output_tokens"))
        run.record.answer = event.get("result")
        if event.get("is_error") or event.get("subtype") != "success":
            run.record.reason = f"Claude Code ended with {event.get('subtype')}: {event.get('result', '')}".rstrip(": ")


def read_codex(run: Run, event: dict[str, Any]) -> Iterable[str]:
    """Codex's `exec --json`."""
    item = event.get("item", {})
    if event.get("type") == "item.started" and item.get("type") == "mcp_tool_call":
        yield called(run, item.get("tool", ""), item.get("arguments"))
    elif event.get("type") == "item.completed" and item.get("type") == "agent_message":
        run.record.answer = item.get("text", "")
        yield gist(item.get("text", ""))
    elif event.get("type") == "turn.completed":
        run.record.turns += 1
        run.add_tokens(_numbers(event.get("usage"), "input_tokens", "cached_input_tokens", "output_tokens"))
    elif event.get("type") in ("turn.failed", "error"):
        error = event.get("error", {})
        run.record.reason = f"Codex ended with an error: {error.get('message') or event.get('message')}"


def read_gemini(run: Run, event: dict[str, Any]) -> Iterable[str]:
    """The Gemini CLI's `--output-format stream-json`."""
    kind = event.get("type")
    if kind == "init":
        run.record.model = event.get("model") or run.record.model
    elif kind == "message" and event.get("role") == "assistant":
        run.record.answer = ((run.record.answer or "") if event.get("delta") else "") + event.get("content", "")
        yield gist(event.get("content", ""))
    elif kind == "tool_use":
        run.record.answer = None
        yield called(run, event.get("tool_name", ""), event.get("parameters"))
    elif kind == "result":
        stats = event.get("stats") or {}
        run.add_tokens(_numbers(stats, "input_tokens", "cached", "output_tokens"))
        if event.get("status") != "success":
            run.record.reason = f"The Gemini CLI ended with an error: {(event.get('error') or {}).get('message')}"


READERS: dict[str, Callable[[Run, dict[str, Any]], Iterable[str]]] = {
    "claude": read_claude,
    "codex": read_codex,
    "gemini": read_gemini,
}


def called(run: Run, name: str, arguments: Any) -> str:
    """Count a tool call and say it."""
    run.record.tool_calls += 1
    values = arguments if isinstance(arguments, dict) else {}
    shown = ", ".join(f"{key}={value!r}" for key, value in values.items() if key != "session_id")
    return gist(f"-> {re.sub(f'^mcp_+{SERVER_NAME}_+', '', name)}({shown})")


def gist(text: str) -> str:
    """One line of a text, cut to a terminal's patience."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _missing(run: Run, servers: dict[Any, Any]) -> Iterable[str]:
    for name, status in servers.items():
        if status not in ("connected", "pending"):
            run.record.reason = f"The agent's program could not use the server {name!r}: {status}."
            yield run.record.reason


def _numbers(counts: Any, *names: str) -> dict[str, int]:
    return {name: counts[name] for name in names if isinstance(counts, dict) and isinstance(counts.get(name), int)}
