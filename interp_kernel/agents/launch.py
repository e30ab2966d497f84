"""Starts Claude Code, Codex or the Gemini CLI for one run, with our server's tools and no others.

Everything that the program is told stands on its command line, in its environment or in the run's own folder; no
settings of the user are written. With a task it runs by itself and its events are the transcript; without one it is
interactive, and keeps its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_kernel.agents import SERVER_NAME, instructions
from interp_kernel.agents.events import READERS
from interp_kernel.agents.record import STOPPED, Run
from interp_kernel.agents.server import server_command, server_variables
from interp_kernel.errors import AgentError

STOP_WAIT_S = 10.0
START_TIMEOUT_S = 60
TOOL_TIMEOUT_S = 24 * 3600
CODEX_OUTPUT_TOKENS = 20_000  # more than the server's longest answer; Codex's own limit cuts it
PACKAGES = {"claude": "@anthropic-ai/claude-code", "codex": "@openai/codex", "gemini": "@google/gemini-cli"}
# Codex's own tools: the shell, pictures from the disk, sub-agents, apps and skills of the user's account.
CODEX_FEATURES_OFF = (
    *("shell_tool", "unified_exec", "view_image", "image_generation", "multi_agent", "apps", "plugins", "hooks"),
    *("browser_use", "computer_use", "skill_search", "tool_suggest", "goals", "sleep_tool"),
)
GEMINI_POLICY = f"""\
[[rule]]
toolName = "*"
decision = "deny"
priority = 900

[[rule]]
mcpName = "{SERVER_NAME}"
toolName = "*"
decision = "allow"
priority = 999
"""


@dataclass(frozen=True)
class Start:
    """How a program is started.

    Attributes:
        command: Its command line.
        history: Folder and pattern of the transcripts that it keeps when it is interactive.
        folder: Where it runs.
        variables: Added to its environment.
    """

    command: list[str]
    history: tuple[Path, str]
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Its environment: this process's own, and what the start adds."""
        return {**os.environ, **self.variables}


def launch(agent: str, workspace: Path, task: str | None, model: str | None) -> Run:
    """Run an agent's program until it ends, and record what came of it.

    Args:
        agent: `claude`, `codex` or `gemini`.
        workspace: Folder of its notebooks; the run's folder is made in it.
        task: What it shall do, alone; None for an interactive session.
        model: Name of a model as the program knows it; None for its default.

    Raises:
        AgentError: The program is not installed.
    """
    program = find_program(agent)
    run = Run(agent, workspace, instructions(), task)
    start = STARTS[agent](run, program, task is not None, model)
    run.record.model = model
    run.record.command = start.command
    run.save()
    try:
        run.record.exit_code = _converse(run, start) if task is not None else _attach(run, start)
    except KeyboardInterrupt:
        run.finish("interrupted", STOPPED)
        return run
    except BaseException as error:
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise
    failed = run.record.exit_code != 0 or run.record.reason is not None
    run.finish("failed" if failed else "completed", run.record.reason or _last_words(run) if failed else None)
    return run


def find_program(agent: str) -> str:
    """Path of an agent's program."""
    program = shutil.which(agent)
    if program is None:
        raise AgentError(
            f"The program {agent!r} was not found on PATH. Install it with `npm install -g {PACKAGES[agent]}`, "
            f"and log in once."
        )
    return program


def start_claude(run: Run, program: str, alone: bool, model: str | None) -> Start:
    """Claude Code: no built-in tools, no other servers, our instructions after its own."""
    session = str(uuid.uuid4())
    # Without alwaysLoad the first question may be asked before the server is connected, and so without its tools.
    server = {"type": "stdio", **_server(run, "${%s}"), "alwaysLoad": True, "timeout": TOOL_TIMEOUT_S * 1000}
    servers = {SERVER_NAME: server}
    config = run.write("mcp.json", json.dumps({"mcpServers": servers}, indent=2) + "\n")
    command = [program, "--mcp-config", str(config), "--strict-mcp-config", "--tools", ""]
    command += ["--allowedTools", f"mcp__{SERVER_NAME}", "--permission-mode", "dontAsk" if alone else "default"]
    command += ["--setting-sources", "user", "--disable-slash-commands", "--append-system-prompt", instructions()]
    command += ["--model", model] if model else []
    if alone:
        command += ["--print", "--output-format", "stream-json", "--verbose", "--no-session-persistence"]
    else:
        command += ["--session-id", session]
    home = Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude")
    return Start(command, (home / "projects", f"*/{session}.jsonl"), run.workspace)


def start_codex(run: Run, program: str, alone: bool, model: str | None) -> Start:
    """Codex: everything on the command line, as TOML values."""
    server = _server(run, None)
    table = f"mcp_servers.{SERVER_NAME}"
    values: dict[str, Any] = {
        **{f"{table}.{key}": value for key, value in server.items()},
        f"{table}.startup_timeout_sec": START_TIMEOUT_S,
        f"{table}.tool_timeout_sec": TOOL_TIMEOUT_S,
        f"{table}.default_tools_approval_mode": "approve",
        f"{table}.required": True,
        "approval_policy": "never",
        "web_search": "disabled",
        "project_doc_max_bytes": 0,
        "tool_output_token_limit": CODEX_OUTPUT_TOKENS,
        "developer_instructions": instructions(),
        **{f"features.{name}": False for name in CODEX_FEATURES_OFF},
        **{f"mcp_servers.{name}.enabled": False for name in _codex_servers()},
    }
    command = [program, *(["exec", "--json", "--ephemeral", "--skip-git-repo-check"] if alone else [])]
    command += ["--sandbox", "read-only", "--cd", str(run.workspace), *(["--model", model] if model else [])]
    for key, value in values.items():
        command += ["-c", f"{key}={json.dumps(value)}"]  # a JSON string, number, flag or list is TOML too
    return Start(command, (_codex_home() / "sessions", "**/rollout-*.jsonl"), run.workspace)


def _codex_home() -> Path:
    return Path(os.environ.get("CODEX_HOME") or Path.home() / ".codex")


def _codex_servers() -> list[str]:
    """Servers of the user's own settings, to be left out; the rest of the settings, as the provider, stays."""
    try:
        settings = tomllib.loads((_codex_home() / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # none, or a file that Codex itself will complain about
    return [name for name in settings.get("mcp_servers", {}) if name != SERVER_NAME]


def start_gemini(run: Run, program: str, alone: bool, model: str | None) -> Start:
    """The Gemini CLI: its project is the run's folder, whose settings and policy name our server and no other tool."""
    server = {**_server(run, "$%s"), "trust": True, "timeout": TOOL_TIMEOUT_S * 1000}
    settings = {
        "mcpServers": {SERVER_NAME: server},
        "context": {"fileName": run.record.system_prompt},
        "skills": {"enabled": False},
        "hooksConfig": {"enabled": False},
        "general": {"enableAutoUpdate": False},
    }
    run.path(".gemini").mkdir()
    run.write(".gemini/settings.json", json.dumps(settings, indent=2) + "\n")
    policy = run.write("gemini-policy.toml", GEMINI_POLICY)
    command = [program, "--allowed-mcp-server-names", SERVER_NAME, "--extensions", "none"]
    command += ["--policy", str(policy), *(["--output-format", "stream-json"] if alone else [])]
    command += ["--model", model] if model else []
    trusted = {"GEMINI_CLI_TRUST_WORKSPACE": "true"}  # the option --skip-trust comes after the settings were read
    return Start(command, (Path.home() / ".gemini" / "tmp", "*/chats/session-*.json*"), run.folder, trusted)


STARTS: dict[str, Callable[[Run, str, bool, str | None], Start]] = {
    "claude": start_claude,
    "codex": start_codex,
    "gemini": start_gemini,
}


def _server(run: Run, reference: str | None) -> dict[str, Any]:
    """The server as configs name it. Variables go by reference, so that no value of a secret is written down."""
    command, *arguments = server_command(run.workspace)
    names = server_variables(os.environ)
    if reference is None:
        return {"command": command, "args": arguments, "cwd": str(run.workspace), "env_vars": names}
    variables = {name: reference % name for name in names}
    return {"command": command, "args": arguments, "cwd": str(run.workspace), "env": variables}


def _converse(run: Run, start: Start) -> int:
    """Give the task on stdin, keep every event, show the gist; returns the exit code."""
    reader = READERS[run.record.agent]
    with run.path(run.record.user_prompt or "").open() as task, run.path("stderr.log").open("wb") as errors:
        program = subprocess.Popen(
            run.record.command,
            cwd=start.folder,
            env=start.environment(),
            stdin=task,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    with ending(program), run.path("transcript.jsonl").open("wb") as transcript:
        for line in program.stdout or ():
            transcript.write(line)
            transcript.flush()
            for text in reader(run, _event(line)):
                print(text, file=sys.stderr, flush=True)
    return program.returncode


def _attach(run: Run, start: Start) -> int:
    """Leave the terminal to the program; afterwards, find the transcript that it kept."""
    before = set(start.history[0].glob(start.history[1]))
    program = subprocess.Popen(run.record.command, cwd=start.folder, env=start.environment())
    with ending(program), _signals_of(program):
        program.wait()
    new = sorted(set(start.history[0].glob(start.history[1])) - before, key=lambda path: path.stat().st_mtime)
    run.record.transcript = str(new[-1]) if new else None
    return program.returncode


@contextmanager
def _signals_of(program: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C is a word to the program, which stops its turn and not the run; SIGTERM ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _event(line: bytes) -> dict[str, Any]:
    """One line as an event; a program's stray words are kept in the transcript and mean nothing here."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _last_words(run: Run) -> str:
    errors = run.path("stderr.log")
    lines = errors.read_text(errors="replace").strip().splitlines() if errors.exists() else []
    said = f"; its last line was {lines[-1][:500]!r}" if lines else ""
    return f"The program ended with exit code {run.record.exit_code}{said}."


@contextmanager
def ending(program: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Wait for a program; if this run is stopped, stop it too, in kindness first."""
    with program:
        try:
            yield program
            program.wait()
        except BaseException:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                program.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    program.wait(STOP_WAIT_S)
                    break
            raise
