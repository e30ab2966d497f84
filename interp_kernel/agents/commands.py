"""`interp-kernel agent`: its options, and what they start."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_kernel.agents.record import Run

AGENTS = ("claude", "codex", "gemini", "openai")
EDITORS = ("claude-desktop", "cursor", "vscode")
EXIT_CODES = {"completed": 0, "interrupted": 130}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options; nothing is imported for it."""
    parser.add_argument("agent", nargs="?", choices=AGENTS, metavar="AGENT", help=", ".join(AGENTS))
    parser.add_argument(
        "task", nargs="?", type=Path, metavar="TASK.md", help="what to do; without it you talk to the agent"
    )
    parser.add_argument("--workspace", type=Path, default=Path(), metavar="DIR", help="folder of its notebooks (.)")
    parser.add_argument("--model", metavar="M", help="the agent's own model, by its provider's name for it")
    parser.add_argument("--base-url", metavar="URL", help="openai: an endpoint that speaks OpenAI's chat completions")
    parser.add_argument("--max-turns", type=_count, default=100, metavar="N", help="openai: answers of the model (100)")
    parser.add_argument("--max-tokens", type=_count, default=2_000_000, metavar="N", help="openai: tokens (2000000)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print-instructions", action="store_true", help="print what agents are told, and do no more")
    what.add_argument("--print-config", choices=EDITORS, help="print how an editor's own agent finds the server")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no limit; expected 1 or more")
    return value


def run_agent(arguments: argparse.Namespace) -> int:
    """Carry out `interp-kernel agent`; 0 if the agent came to an end by itself."""
    from interp_kernel.agents import instructions

    if arguments.print_instructions:
        print(instructions(), end="")
        return 0
    if arguments.print_config:
        print(editor_config(arguments.print_config, arguments.workspace.resolve()))
        return 0
    task = read_task(arguments.task) if arguments.task else None
    # A service manager's stop ends a run as Ctrl-C does, so that its record is finished.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run = _start(arguments, task)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(summary(run), file=sys.stderr)
    print(json.dumps({"status": run.record.status, "run": str(run.folder), "notebooks": run.record.notebooks}))
    return EXIT_CODES.get(run.record.status, 1)


def _start(arguments: argparse.Namespace, task: str | None) -> Run:
    from interp_kernel.errors import AgentError

    agent, workspace = arguments.agent, arguments.workspace
    if agent is None:
        raise AgentError(f"No agent was named; expected one of {', '.join(AGENTS)}.")
    if not workspace.is_dir():
        raise AgentError(
            f"The workspace {str(workspace)!r} is not a folder. Make it, or name another with --workspace."
        )
    if agent != "openai":
        from interp_kernel.agents.launch import launch

        return launch(agent, workspace, task, arguments.model)
    missing = [name for name in ("task", "base_url", "model") if getattr(arguments, name) is None]
    if missing:
        words = {"task": "TASK.md", "base_url": "--base-url", "model": "--model"}
        raise AgentError(
            f"`agent openai` was given no {', '.join(map(words.__getitem__, missing))}; it needs all three."
        )
    from interp_kernel.agents.loop import Limits, run_loop

    limits = Limits(arguments.max_turns, arguments.max_tokens)
    return run_loop(workspace, task or "", arguments.base_url, arguments.model, limits)


def read_task(path: Path) -> str:
    """The text of a task.

    Raises:
        AgentError: The file can't be read as text, or is empty.
    """
    from interp_kernel.errors import AgentError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AgentError(
            f"The task {str(path)!r} can't be read: {error}. Give a text file that says what to do."
        ) from None
    if not text.strip():
        raise AgentError(f"The task {str(path)!r} is empty; expected a text that says what to do.")
    return text


def summary(run: Run) -> str:
    """What a run came to, for a person."""
    record = run.record
    spent = [f"{record.duration_s:.0f} s", f"{record.tool_calls} tool calls"]
    spent += [f"{record.cost_usd:.2f} USD"] if record.cost_usd is not None else []
    lines = [f"{record.agent}: {record.status} after {', '.join(spent)}."]
    lines += [record.reason] if record.reason else []
    lines += [f"Notebook    {run.workspace / name}" for name in record.notebooks]
    lines += [f"Transcript  {run.folder / record.transcript}"] if record.transcript else []
    return "\n".join([*lines, f"Record      {run.path('run.json')}"])


def editor_config(editor: str, workspace: Path) -> str:
    """The entry that an editor's own agent needs, and where it goes."""
    from interp_kernel.agents import SERVER_NAME
    from interp_kernel.agents.server import server_command, server_variables

    command, *arguments = server_command(workspace)
    wanted = [name for name in server_variables(os.environ) if name.startswith("INTERP_")]
    server: dict[str, Any] = {"command": command, "args": arguments}
    if wanted:
        server["env"] = {name: os.environ[name] for name in wanted}
    if editor == "vscode":
        return json.dumps({"servers": {SERVER_NAME: {"type": "stdio", **server}}}, indent=2)
    return json.dumps({"mcpServers": {SERVER_NAME: server}}, indent=2)
