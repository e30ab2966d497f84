"""An agent of our own: any endpoint that speaks OpenAI's chat completions, and the tools of our MCP server.

The server is asked over the SDK's client, as every other agent asks it. What the model says and what the tools answer
is written to the run's transcript as it happens. The endpoint's key stays in this process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_kernel.agents import instructions
from interp_kernel.agents.events import called, gist
from interp_kernel.agents.record import STOPPED, Run
from interp_kernel.agents.server import server_command, server_variables
from interp_kernel.errors import AgentError

if TYPE_CHECKING:
    from mcp import ClientSession
    from mcp.types import CallToolResult, Tool
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIES = 8  # of one request, by the SDK: after the wait that the endpoint asks for, else after 0.5, 1, 2, ... 8 s
REQUEST_TIMEOUT_S = 600.0
INTERRUPT_WAIT_S = 5.0
NEWEST = 8  # messages that are sent whole even if the model's context is full
CLIPPED = 400  # characters that are sent of an older one then
MOST_SLIPS = 5  # answers in a row without a usable tool call or a word
WARN_AT = 0.9  # share of a budget after which the agent is told to come to an end

Message = dict[str, Any]
Outcome = tuple[str, str | None]  # a status, and why it is not `completed`


@dataclass(frozen=True)
class Limits:
    """After how much an agent is stopped.

    Attributes:
        turns: Answers of the model.
        tokens: Tokens read and written, as the endpoint counts them.
    """

    turns: int
    tokens: int


@dataclass
class Study:
    """One conversation: what the model was told and has answered so far."""

    run: Run
    endpoint: AsyncOpenAI
    server: ClientSession
    model: str
    limits: Limits
    tools: list[Message]
    messages: list[Message]
    slips: int = 0
    warned: bool = False

    def add(self, message: Message) -> None:
        """Append a message, and write it to the transcript."""
        self.messages.append(message)
        self.run.log(message)


def run_loop(workspace: Path, task: str, base_url: str, model: str, limits: Limits) -> Run:
    """Let a model carry out a task, until it answers without a tool call or a limit is reached.

    Args:
        workspace: Folder of its notebooks; the run's folder is made in it.
        task: What it shall do.
        base_url: The endpoint, with its `/v1` where it has one. Its key is the variable OPENAI_API_KEY, if it is set.
        model: Name of a model there.
        limits: When to stop it.

    Raises:
        AgentError: `openai` or `mcp` is not installed.
    """
    _check_installed()
    run = Run("openai", workspace, instructions(), task)
    run.record.model, run.record.command = model, server_command(run.workspace)
    _tell_retries()
    try:
        run.finish(*asyncio.run(_carry_out(run, task, base_url, limits)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        run.finish("interrupted", STOPPED)
    except BaseException as error:
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise
    return run


def _check_installed() -> None:
    from importlib.util import find_spec

    for package in ("mcp", "openai"):
        if find_spec(package) is None:
            raise AgentError(f"The package {package!r} is not installed. Run: pip install 'interp-kernel[agents]'")


def _tell_retries() -> None:
    """The SDK waits without a word; a person shall see what for."""
    logger = logging.getLogger("openai._base_client")
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: "Retrying request" in record.msg)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


async def _carry_out(run: Run, task: str, base_url: str, limits: Limits) -> Outcome:
    from anyio import BrokenResourceError, ClosedResourceError
    from mcp import ClientSession, StdioServerParameters, stdio_client
    from openai import AsyncOpenAI

    key = os.environ.get(KEY_VARIABLE) or "none"  # an endpoint on this machine takes any
    endpoint = AsyncOpenAI(base_url=base_url, api_key=key, max_retries=RETRIES, timeout=REQUEST_TIMEOUT_S)
    command, *arguments = run.record.command
    variables = {name: os.environ[name] for name in server_variables(os.environ)}
    parameters = StdioServerParameters(command=command, args=arguments, env=variables, cwd=run.workspace)
    outcome: Outcome | None = None
    with run.write("server.log", "").open("w") as log:
        try:
            async with endpoint, stdio_client(parameters, errlog=log) as streams, ClientSession(*streams) as server:
                outcome = await _told(run, task, endpoint, server, limits)
        except BaseExceptionGroup as group:  # the tasks of the client met the dead server before we did
            if group.split((BrokenResourceError, ClosedResourceError))[1] is not None:
                raise
    return outcome or _server_ended(run, "it closed the connection")


async def _told(run: Run, task: str, endpoint: AsyncOpenAI, server: ClientSession, limits: Limits) -> Outcome:
    """The study, and its failures in words: what is raised here would leave the client in a group of exceptions."""
    from anyio import BrokenResourceError, ClosedResourceError
    from mcp import McpError
    from openai import OpenAIError

    try:
        await server.initialize()
        tools = [_described(tool) for tool in (await server.list_tools()).tools]
        study = Study(run, endpoint, server, run.record.model or "", limits, tools, [])
        study.add({"role": "system", "content": instructions()})
        study.add({"role": "user", "content": task})
        return await _converse(study)
    except OpenAIError as error:
        return "failed", f"The endpoint {endpoint.base_url} refused: {type(error).__name__}: {gist(str(error))}"
    except (McpError, BrokenResourceError, ClosedResourceError) as error:
        return _server_ended(run, str(error) or type(error).__name__)


def _server_ended(run: Run, reason: str) -> Outcome:
    return "failed", f"The MCP server ended: {reason}. Its sessions live on; its log is {run.path('server.log')}."


def _described(tool: Tool) -> Message:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.inputSchema}
    return {"type": "function", "function": function}


async def _converse(study: Study) -> Outcome:
    while _used(study) < 1:
        answer = await _ask(study)
        _count(study.run, answer)
        message = _answered(study, answer)
        if message.get("tool_calls"):
            await _use_tools(study, message["tool_calls"])
        elif message["content"] and answer.choices[0].finish_reason != "length":
            study.run.record.answer = message["content"]
            return "completed", None
        else:
            study.slips += 1
            study.add(_user("Your answer was empty or cut off. Call a tool, or say in words that the study is done."))
        if study.slips >= MOST_SLIPS:
            return "failed", f"{study.slips} answers in a row of the model {study.model!r} held no usable tool call."
        _warn(study)
        study.run.save()
    record, limits = study.run.record, study.limits
    spent = f"{record.turns} of {limits.turns} turns and {_tokens(study.run)} of {limits.tokens} tokens"
    return "budget", f"The agent was stopped after {spent}."


async def _ask(study: Study) -> ChatCompletion:
    """The model's next answer; if the endpoint refuses what it is sent, less of the past is sent."""
    from openai import APIStatusError, OpenAIError

    while True:
        try:
            answer = await study.endpoint.chat.completions.create(
                model=study.model,
                messages=study.messages,  # type: ignore[arg-type]
                tools=study.tools,  # type: ignore[arg-type]
            )
        except APIStatusError as error:
            if error.status_code not in (400, 413, 422) or not shorten(study.messages):
                raise
            study.run.log({"note": f"{gist(str(error))} Sent again with less of the past."})
            continue
        if not getattr(answer, "choices", None):  # the SDK hands on whatever came with status 200, a web page too
            raise OpenAIError(f"the answer is no chat completion: {gist(str(getattr(answer, 'error', answer)))}")
        return answer


def shorten(messages: list[Message]) -> bool:
    """Leave out pictures, which some models can't read, or else the middle of older answers; False if neither helps."""
    pictures = [message for message in messages if isinstance(message["content"], list)]
    for message in pictures:
        message["content"] = "(Pictures were left out: the endpoint refused them.)"
    if pictures:
        return True
    long = [m for m in messages[2:-NEWEST] if m["role"] == "tool" and len(m["content"]) > 2 * CLIPPED]
    for message in long:
        text = message["content"]
        message["content"] = f"{text[:CLIPPED]}\n... (cut; read_output has the rest)\n{text[-CLIPPED // 2 :]}"
    return bool(long)


def _answered(study: Study, answer: ChatCompletion) -> Message:
    """The model's message as it is sent back; arguments that are no JSON are kept in the transcript alone."""
    message = answer.choices[0].message
    calls = [call for call in message.tool_calls or () if call.type == "function"]
    study.run.log(message.model_dump(exclude_none=True))
    if message.content:
        print(gist(message.content), file=sys.stderr)
    sent: Message = {"role": "assistant", "content": message.content or ""}
    if calls:
        sent["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in calls]
    study.messages.append(sent)
    return sent


async def _use_tools(study: Study, calls: list[Message]) -> None:
    usable, pictures = 0, []
    for call in calls:
        function = call["function"]
        arguments, problem = _arguments(study, function)
        if problem:
            function["arguments"] = "{}"  # templates of some models fail on what is no JSON
            text = problem
        else:
            print(called(study.run, function["name"], arguments), file=sys.stderr)
            text, shown = _content(await _call(study.server, function["name"], arguments))
            pictures += shown
            usable += 1
        study.add({"role": "tool", "tool_call_id": call["id"], "content": text})
    study.slips = 0 if usable else study.slips + 1
    if pictures:
        study.add({"role": "user", "content": [{"type": "text", "text": "Pictures of these answers:"}, *pictures]})


def _arguments(study: Study, function: Message) -> tuple[Message, str | None]:
    names = [tool["function"]["name"] for tool in study.tools]
    if function["name"] not in names:
        return {}, f"There is no tool {function['name']!r}; the tools are {', '.join(names)}."
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (TypeError, ValueError) as error:
        return {}, f"The arguments of {function['name']} are not JSON ({error}); nothing was run. Send the call again."
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        return {}, f"The arguments of {function['name']} are a {kind}; expected an object. Send the call again."
    return arguments, None


async def _call(server: ClientSession, name: str, arguments: Message) -> CallToolResult:
    """One tool call. If this run is stopped meanwhile, the cell is stopped too."""
    try:
        return await server.call_tool(name, arguments)
    except asyncio.CancelledError:
        if "session_id" in arguments:
            stop = server.call_tool("interrupt", {"session_id": arguments["session_id"]})
            await asyncio.wait_for(stop, INTERRUPT_WAIT_S)
        raise


def _content(result: CallToolResult) -> tuple[str, list[Message]]:
    """A result's text, and its pictures as parts of a message: a tool's own message may hold text alone."""
    texts: list[str] = []
    pictures: list[Message] = []
    for block in result.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "image":
            texts.append(f"(picture {len(pictures) + 1})")
            url = f"data:{block.mimeType};base64,{block.data}"
            pictures.append({"type": "image_url", "image_url": {"url": url}})
    return "\n".join(texts), pictures


def _count(run: Run, answer: ChatCompletion) -> None:
    run.record.turns += 1
    if usage := answer.usage:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        run.add_tokens({name: getattr(usage, name) or 0 for name in names})
        if (cost := (usage.model_extra or {}).get("cost")) is not None:
            run.record.cost_usd = round((run.record.cost_usd or 0.0) + float(cost), 6)


def _tokens(run: Run) -> int:
    return run.record.tokens.get("total_tokens", 0)


def _used(study: Study) -> float:
    """Share of the tighter limit that is used up."""
    return max(study.run.record.turns / study.limits.turns, _tokens(study.run) / study.limits.tokens)


def _warn(study: Study) -> None:
    if study.warned or _used(study) < WARN_AT:
        return
    study.warned = True
    study.add(_user("The budget of this study is nearly used up. Write the findings now, as far as they carry."))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
