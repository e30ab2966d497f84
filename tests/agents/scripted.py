"""A deterministic MCP client that plays a study to the server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mcp import ClientSession
from mcp.types import CallToolResult, TextContent

from tests.agents.studies import Call, Turn, filled


@dataclass(frozen=True)
class Answer:
    """What the server answered to one call of a script."""

    call: Call
    result: CallToolResult

    @property
    def text(self) -> str:
        """What an agent reads."""
        return "\n".join(block.text for block in self.result.content if isinstance(block, TextContent))

    @property
    def facts(self) -> dict[str, Any]:
        """The structured part."""
        return dict(self.result.structuredContent or {})


async def play(client: ClientSession, study: Iterable[Turn], ids: dict[str, str] | None = None) -> list[Answer]:
    """Make every call of a study, in order; what one answers is known to the next.

    Args:
        client: Connected to a server.
        study: What to play.
        ids: Ids that are known already, by what stands for them; new ones are added.
    """
    ids = {} if ids is None else ids
    answers = []
    for call in (call for turn in study for call in turn.calls):
        answer = Answer(call, await client.call_tool(call.tool, filled(call.arguments, ids)))
        answers.append(answer)
        if "session_id" in answer.facts:
            ids["session"] = answer.facts["session_id"]
        if call.label and "cell_id" in answer.facts:
            ids[call.label] = answer.facts["cell_id"]
    return answers
