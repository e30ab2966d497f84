"""The MCP server: the tools, the instructions as prompt and resource, over stdio or HTTP on this machine alone.

A client that cancels a call interrupts the cell that the call runs. A client that vanishes does not: the cell goes on,
and the next server finds it.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
import sys
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from interp_kernel.errors import InterpError, SessionError
from interp_kernel.mcp.replies import Answer
from interp_kernel.mcp.schemas import CELL, SESSION, Schema, description, input_schema, result_schema
from interp_kernel.mcp.tools import Settings, Tools, listed, model_settings
from interp_kernel.notebook.schemas import without_iris

NAME = "interp"
TOKEN_VARIABLE = "INTERP_MCP_TOKEN"
SHOW_FACTS_ALONE = {"claude-code", "codex-mcp-client"}
"""Clients that show their model the structured content *instead* of text and images; they get text and images alone."""
CANCELLED: ContextVar[set[Any]] = ContextVar("cancelled")
"""Requests of the present connection that their client has cancelled."""
RESOURCE = "interp://instructions"
PROMPT = "study"
READERS = {"list_sessions", "read_notebook", "read_output", "list_variables", "list_techniques", "describe_technique"}
READERS |= {"wait"}
DESTROYERS = {"shutdown_session", "restart_kernel", "delete_cell", "run_all"}
CELLS = {"execute_code", "edit_cell", "add_markdown", "insert_cell", "init_session"}
SESSIONS = {"start_new_session", "shutdown_session", "restart_kernel", "delete_cell", "move_cell", "read_notebook"}
SESSIONS |= {"list_variables", "start_session_resume_notebook", "start_session_continue_notebook", "run_all"}


with without_iris():  # mcp imports jsonschema
    import anyio
    import mcp.server.lowlevel
    from mcp import types


class Server(mcp.server.lowlevel.Server[Any, Any]):
    """The SDK's server, which also remembers which requests their client has cancelled."""

    def __init__(self, settings: Settings) -> None:
        """Register what the server offers."""
        from importlib.metadata import version

        from interp_kernel.agents import instructions

        super().__init__(NAME, version=version("interp-kernel"), instructions=instructions())
        self.settings = settings
        self.tools = {name: _tool(name) for name in listed()}
        self.validators = {name: _validator(tool.inputSchema) for name, tool in self.tools.items()}
        self._offer()

    def _offer(self) -> None:
        from interp_kernel.agents import instructions

        async def tools() -> list[types.Tool]:
            tools = list(self.tools.values())
            return [tool.model_copy(update={"outputSchema": None}) for tool in tools] if self._reads_text() else tools

        async def prompts() -> list[types.Prompt]:
            return [
                types.Prompt(name=PROMPT, description="How to carry out an interpretability study with these tools.")
            ]

        async def prompt(name: str, arguments: dict[str, str] | None) -> types.GetPromptResult:
            content = types.TextContent(type="text", text=instructions())
            return types.GetPromptResult(messages=[types.PromptMessage(role="user", content=content)])

        async def resources() -> list[types.Resource]:
            uri: Any = RESOURCE
            return [types.Resource(uri=uri, name="instructions", mimeType="text/markdown")]

        async def resource(uri: Any) -> str:
            return instructions()

        offer: Any = self
        offer.list_tools()(tools)
        offer.call_tool(validate_input=False)(self.call)
        offer.list_prompts()(prompts)
        offer.get_prompt()(prompt)
        offer.list_resources()(resources)
        offer.read_resource()(resource)

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Answer a tool call; what is refused is an error of the tool, in words."""
        if name not in self.tools:
            return _refusal(f"There is no tool {name!r}. Those that there are: {', '.join(self.tools)}.")
        faults = [": ".join([*error.path, error.message]) for error in self.validators[name].iter_errors(arguments)]
        if faults:
            takes = ", ".join(self.tools[name].inputSchema["properties"]) or "none"
            return _refusal(f"The arguments of {name} are not right: {'; '.join(faults)}. It takes: {takes}.")
        request = self.request_context
        tools = Tools(self.settings, self._progress(request))
        try:
            answer: Answer = await getattr(tools, name)(**arguments)
        except asyncio.CancelledError:
            if request.request_id in CANCELLED.get():
                await asyncio.shield(tools.stop())
            raise
        except (InterpError, OSError) as error:
            return _refusal(str(error))
        content: Any = answer.blocks
        return types.CallToolResult(content=content, structuredContent=None if self._reads_text() else answer.facts)

    def _reads_text(self) -> bool:
        """Whether the client would show its agent the facts *instead* of the text and the images."""
        client = self.request_context.session.client_params
        return client is not None and client.clientInfo.name in SHOW_FACTS_ALONE

    async def run(self, read_stream: Any, write_stream: Any, *args: Any, **kwargs: Any) -> None:
        """Serve one client, noting its cancellations as they pass: the SDK doesn't tell them from a client's end."""
        cancelled: set[Any] = set()
        CANCELLED.set(cancelled)
        writer, reader = anyio.create_memory_object_stream[Any](0)

        async def pass_on() -> None:
            with suppress(anyio.ClosedResourceError):  # a client over HTTP has said goodbye
                await pass_on_all()

        async def pass_on_all() -> None:
            async with read_stream, writer:
                async for message in read_stream:
                    cancelled.update(cancellation(message))
                    await writer.send(message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pass_on)
            await super().run(reader, write_stream, *args, **kwargs)
            tasks.cancel_scope.cancel()

    def _progress(self, request: Any) -> Any:
        token = request.meta.progressToken if request.meta else None

        async def tell(facts: dict[str, Any]) -> None:
            if token is not None:
                message = f"{facts['state']} {facts['line']}".strip()
                await request.session.send_progress_notification(token, facts["seconds"], message=message)

        return tell


def _tool(name: str) -> types.Tool:
    method = getattr(Tools, name)
    fields = CELL if name in CELLS else SESSION if name in SESSIONS else None
    return types.Tool(
        name=name,
        description=description(method),
        inputSchema=input_schema(method),
        outputSchema=result_schema(fields) if fields else None,
        annotations=types.ToolAnnotations(
            readOnlyHint=name in READERS, destructiveHint=name in DESTROYERS, openWorldHint=False
        ),
    )


def _validator(schema: Schema) -> Any:
    import jsonschema  # type: ignore[import-untyped]

    return jsonschema.Draft202012Validator(schema)


def cancellation(message: Any) -> set[Any]:
    """The request that a message cancels, if it does."""
    content = getattr(getattr(message, "message", None), "root", None)
    if isinstance(content, types.JSONRPCNotification) and content.method == "notifications/cancelled":
        return {(content.params or {}).get("requestId")}
    return set()


def _refusal(text: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], isError=True)


async def serve_stdio(settings: Settings) -> None:
    """Serve one client on stdin and stdout, until it closes them."""
    from mcp.server.stdio import stdio_server

    server = Server(settings)
    async with stdio_server() as (reader, writer):
        await server.run(reader, writer, server.create_initialization_options())


async def serve_http(settings: Settings, port: int) -> None:
    """Serve clients on this machine that have the token: $INTERP_MCP_TOKEN, else a new one, which is told on stderr."""
    import uvicorn
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp.server.transport_security import TransportSecuritySettings

    listener = socket.create_server(("127.0.0.1", port))
    names = [f"{name}:{listener.getsockname()[1]}" for name in ("127.0.0.1", "localhost")]
    security = TransportSecuritySettings(allowed_hosts=names, allowed_origins=[f"http://{name}" for name in names])
    manager = StreamableHTTPSessionManager(Server(settings), security_settings=security)
    given = os.environ.get(TOKEN_VARIABLE)
    token = given or secrets.token_urlsafe(32)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(sent, f"Bearer {token}".encode()):
            await manager.handle_request(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Bearer")]})
            await send({"type": "http.response.body", "body": b"The bearer token is missing or wrong."})

    told = f"the token of ${TOKEN_VARIABLE}" if given else f"the token {token}"
    print(f"interp-kernel mcp: http://{names[0]}/mcp with {told}", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, lifespan="off", log_level="error")
    async with manager.run():
        await uvicorn.Server(config).serve([listener])


def serve(arguments: Any) -> int:
    """`interp-kernel mcp`, by its parsed command line."""
    workspace = arguments.workspace.resolve()
    if not workspace.is_dir():
        raise SessionError(f"The workspace {workspace} is no folder; name one that exists with --workspace.")
    settings = Settings(workspace, model_settings(arguments.model), arguments.idle_window, arguments.jupyter_url)
    if arguments.http is None:
        anyio.run(serve_stdio, settings)
    else:
        anyio.run(serve_http, settings, arguments.http)
    return 0
