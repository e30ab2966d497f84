"""The SDK's own client, connected over stdio to a real server in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult, TextContent


def command(folder: Path, *options: str, **environment: str) -> StdioServerParameters:
    """How an agent's configuration starts our server."""
    arguments = ["-m", "interp_kernel.cli", "mcp", "--workspace", str(folder), *options]
    return StdioServerParameters(command=sys.executable, args=arguments, env={**os.environ, **environment})


@asynccontextmanager
async def server(folder: Path, *options: str, **environment: str) -> AsyncIterator[ClientSession]:
    """A server whose workspace is `folder`, and a client of it that has said hello."""
    with (folder / ".server.log").open("a") as log:
        async with (
            stdio_client(command(folder, *options, **environment), errlog=log) as (reader, writer),
            ClientSession(reader, writer) as client,
        ):
            with anyio.fail_after(60):
                await client.initialize()
            yield client


async def call(client: ClientSession, tool: str, **arguments: Any) -> dict[str, Any]:
    """Facts of a call that must not be refused."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.isError, text_of(answer)
    return dict(answer.structuredContent or {})


async def refused(client: ClientSession, tool: str, **arguments: Any) -> str:
    """Why a call was refused."""
    answer = await client.call_tool(tool, arguments)
    assert answer.isError, text_of(answer)
    return text_of(answer)


async def read(client: ClientSession, tool: str, **arguments: Any) -> str:
    """What an agent reads of a call that must not be refused."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.isError, text_of(answer)
    return text_of(answer)


def text_of(answer: CallToolResult) -> str:
    """The text of an answer."""
    return "\n".join(block.text for block in answer.content if isinstance(block, TextContent))
