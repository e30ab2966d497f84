"""Starting the agents' programs: the exact command and configuration of one run, and its record.

The programs themselves need accounts, so fake ones on PATH note how they are started and print what the real ones
(Claude Code 2.1.197, Codex 0.169, Gemini CLI 0.61) printed when they were started so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from mcp import ClientSession, StdioServerParameters, stdio_client

from interp_kernel.agents import instructions
from interp_kernel.cli import main
from tests.agents import fake_cli
from tests.helpers_worker import wait_until

SECRET = "hf_never_written_down"
AGENTS = ("claude", "codex", "gemini")


class Bench:
    """A workspace, a home and a PATH with fake programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workspace, self.home = folder / "work", folder / "home"
        self.report, self.task = folder / "report.json", folder / "TASK.md"
        (folder / "bin").mkdir()
        for made in (self.workspace, self.home):
            made.mkdir()
        for agent in AGENTS:
            program = folder / "bin" / agent
            program.write_text(f"#!{sys.executable}\n" + Path(fake_cli.__file__).read_text())
            program.chmod(0o755)
        (folder / "bin" / "recorded").symlink_to(fake_cli.RECORDED)
        self.task.write_text("Find the heads.")
        self.setenv = monkeypatch.setenv
        self.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.setenv("HOME", str(self.home))
        self.setenv("HF_TOKEN", SECRET)
        for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME"):
            monkeypatch.delenv(name, raising=False)
        self.order()

    def order(self, **orders: Any) -> None:
        self.setenv("FAKE_CLI", json.dumps({"report": str(self.report), **orders}))

    def arguments(self, agent: str, *more: str, alone: bool = True) -> list[str]:
        return ["agent", agent, *([str(self.task)] if alone else []), "--workspace", str(self.workspace), *more]

    def start(self, agent: str, *more: str, alone: bool = True) -> int:
        return main(self.arguments(agent, *more, alone=alone))

    @property
    def run(self) -> Path:
        (folder,) = (self.workspace / "agent-runs").iterdir()
        return folder

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "run.json").read_text()))

    @property
    def seen(self) -> dict[str, Any]:
        return dict(json.loads(self.report.read_text()))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def server_of(bench: Bench, agent: str) -> dict[str, Any]:
    """The server that an agent's program was told of, references to variables resolved as the program does."""
    if agent == "codex":
        table = codex_settings(bench.seen["argv"])["mcp_servers"]["interp"]
        return {**table, "env": {name: bench.seen["environment"][name] for name in table["env_vars"]}}
    config = bench.run / ("mcp.json" if agent == "claude" else ".gemini/settings.json")
    server = json.loads(config.read_text())["mcpServers"]["interp"]
    pattern = re.compile(r"\$\{(\w+)\}" if agent == "claude" else r"\$(\w+)")
    values = {k: pattern.sub(lambda m: bench.seen["environment"][m[1]], v) for k, v in server["env"].items()}
    return {**server, "env": values}


def codex_settings(argv: list[str]) -> dict[str, Any]:
    return tomllib.loads("\n".join(argv[i + 1] for i, part in enumerate(argv) if part == "-c"))


def test_claude_is_given_our_tools_alone(bench: Bench) -> None:
    assert bench.start("claude", "--model", "opus") == 0
    program, *argv = bench.seen["argv"]
    assert Path(program).name == "claude"
    assert argv == [
        *("--mcp-config", str(bench.run / "mcp.json"), "--strict-mcp-config", "--tools", ""),
        *("--allowedTools", "mcp__interp", "--permission-mode", "dontAsk"),
        *("--setting-sources", "user", "--disable-slash-commands", "--append-system-prompt", instructions()),
        *("--model", "opus"),
        *("--print", "--output-format", "stream-json", "--verbose", "--no-session-persistence"),
    ]
    assert bench.seen["task"] == "Find the heads."
    assert bench.seen["cwd"] == str(bench.workspace)
    servers = json.loads((bench.run / "mcp.json").read_text())["mcpServers"]
    assert list(servers) == ["interp"]
    assert servers["interp"]["alwaysLoad"] is True  # otherwise it asks its model before the tools are there
    assert servers["interp"]["env"]["HF_TOKEN"] == "${HF_TOKEN}"


def test_codex_is_given_our_tools_alone(bench: Bench) -> None:
    (bench.home / ".codex").mkdir()
    own = bench.home / ".codex" / "config.toml"
    own.write_text('model_provider = "mine"\n[mcp_servers.files]\ncommand = "files"\n')
    assert bench.start("codex", "--model", "gpt-6-sol") == 0
    argv = bench.seen["argv"]
    assert argv[1:9] == [
        *("exec", "--json", "--ephemeral", "--skip-git-repo-check", "--sandbox", "read-only", "--cd"),
        str(bench.workspace),
    ]
    assert argv[9:11] == ["--model", "gpt-6-sol"]
    settings = codex_settings(argv)
    assert settings["mcp_servers"]["files"] == {"enabled": False}
    assert settings["mcp_servers"]["interp"]["default_tools_approval_mode"] == "approve"
    assert settings["developer_instructions"] == instructions()
    assert settings["approval_policy"] == "never"
    assert settings["web_search"] == "disabled"
    assert settings["tool_output_token_limit"] == 20_000
    assert settings["features"]["shell_tool"] is False
    assert not any(settings["features"].values())
    assert "HF_TOKEN" in settings["mcp_servers"]["interp"]["env_vars"]
    assert bench.seen["task"] == "Find the heads."


def test_gemini_is_given_our_tools_alone(bench: Bench) -> None:
    assert bench.start("gemini", "--model", "gemini-3-pro") == 0
    policy = bench.run / "gemini-policy.toml"
    assert bench.seen["argv"][1:] == [
        *("--allowed-mcp-server-names", "interp", "--extensions", "none", "--policy", str(policy)),
        *("--output-format", "stream-json", "--model", "gemini-3-pro"),
    ]
    # Its project is the run's folder: the settings there are this run's, and the instructions are its context.
    assert bench.seen["cwd"] == str(bench.run)
    assert bench.seen["environment"]["GEMINI_CLI_TRUST_WORKSPACE"] == "true"
    settings = json.loads((bench.run / ".gemini" / "settings.json").read_text())
    assert (bench.run / settings["context"]["fileName"]).read_text() == instructions()
    assert settings["mcpServers"]["interp"]["cwd"] == str(bench.workspace)
    deny, allow = tomllib.loads(policy.read_text())["rule"]
    assert (deny["toolName"], deny["decision"]) == ("*", "deny")
    assert (allow["mcpName"], allow["decision"]) == ("interp", "allow")
    assert allow["priority"] > deny["priority"]
    assert bench.seen["task"] == "Find the heads."


@pytest.mark.parametrize("agent", AGENTS)
def test_the_server_of_the_configuration_starts_and_answers(bench: Bench, agent: str) -> None:
    assert bench.start(agent) == 0
    server = server_of(bench, agent)

    async def ask() -> tuple[str, list[str]]:
        parameters = StdioServerParameters(command=server["command"], args=server["args"], env=server["env"])
        async with (
            stdio_client(parameters) as (read, write),
            ClientSession(read, write, timedelta(seconds=30)) as client,
        ):
            told = await client.initialize()
            answer = await client.call_tool("list_sessions", {})
            assert not answer.isError
            return told.instructions or "", [tool.name for tool in (await client.list_tools()).tools]

    told, tools = anyio.run(ask)
    assert told == instructions()
    assert {"start_new_session", "init_session", "execute_code"} <= set(tools)
    assert server["args"][-2:] == ["--workspace", str(bench.workspace)]


@pytest.mark.parametrize(("agent", "cost"), [("claude", 0.000675), ("codex", None), ("gemini", None)])
def test_the_record_says_what_was_asked_and_what_came_of_it(bench: Bench, agent: str, cost: float | None) -> None:
    old = bench.workspace / "old.ipynb"
    old.write_text("{}")
    os.utime(old, (1, 1))
    bench.order(notebook=str(bench.workspace / "study.ipynb"))
    home = set(bench.home.rglob("*"))
    assert bench.start(agent) == 0
    record = bench.record
    assert record["status"] == "completed"
    assert record["command"] == bench.seen["argv"]
    assert record["notebooks"] == ["study.ipynb"]
    assert record["duration_s"] > 0
    assert record["cost_usd"] == cost
    assert record["tool_calls"] == 1
    assert record["tokens"]["input_tokens"] == 20
    assert record["answer"] == "All done."
    assert (bench.run / record["system_prompt"]).read_text() == instructions()
    assert (bench.run / record["user_prompt"]).read_text() == "Find the heads."
    transcript = (bench.run / record["transcript"]).read_text()
    assert transcript == (fake_cli.RECORDED / f"{agent}.jsonl").read_text() + "a word that is no event\n"
    assert set(bench.home.rglob("*")) == home
    written = [path.read_text() for path in bench.run.rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not any(SECRET in text for text in written)
    assert bench.run.stat().st_mode & 0o077 == 0


def test_a_person_sees_what_the_agent_does(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.start("claude")
    shown = capfd.readouterr()
    assert shown.err.splitlines()[:2] == ["-> list_sessions()", "All done."]
    assert f"Record      {bench.run / 'run.json'}" in shown.err
    assert json.loads(shown.out) == {"status": "completed", "run": str(bench.run), "notebooks": []}


def test_a_program_that_fails_is_told_with_its_last_words(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.order(**{"exit": 41, "last words": "Invalid auth method selected."})
    assert bench.start("codex") == 1
    reason = "The program ended with exit code 41; its last line was 'Invalid auth method selected.'."
    assert (bench.record["status"], bench.record["reason"]) == ("failed", reason)
    assert reason in capfd.readouterr().err


FAILURES = {
    "claude": ({"type": "result", "subtype": "error_max_turns", "is_error": True}, "Claude Code ended with error_max"),
    "codex": ({"type": "turn.failed", "error": {"message": "no quota"}}, "Codex ended with an error: no quota"),
    "gemini": ({"type": "result", "status": "error", "error": {"message": "no key"}}, "Gemini CLI .* error: no key"),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_an_error_in_the_events_is_no_success(bench: Bench, agent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    event, expected = FAILURES[agent]
    recorded = bench.task.parent / "bin" / "recorded"
    recorded.unlink()
    recorded.mkdir()
    (recorded / f"{agent}.jsonl").write_text(json.dumps(event) + "\n")
    assert bench.start(agent) == 1
    assert bench.record["status"] == "failed"
    assert re.search(expected, bench.record["reason"])


def test_a_server_that_claude_could_not_start_is_told(bench: Bench) -> None:
    recorded = bench.task.parent / "bin" / "recorded"
    recorded.unlink()
    recorded.mkdir()
    begin = {"type": "system", "subtype": "init", "mcp_servers": [{"name": "interp", "status": "failed"}]}
    (recorded / "claude.jsonl").write_text(json.dumps(begin) + "\n")
    assert bench.start("claude") == 1
    assert bench.record["reason"] == "The agent's program could not use the server 'interp': failed."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_stops_its_program_and_finishes_its_record(bench: Bench, number: signal.Signals) -> None:
    bench.order(wait=True)
    command = [sys.executable, "-m", "interp_kernel.cli", *bench.arguments("claude")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(bench.report.exists)
    assert bench.record["status"] == "running"
    run.send_signal(number)
    said, shown = run.communicate(timeout=20)
    assert run.returncode == 130
    assert json.loads(said) == {"status": "interrupted", "run": str(bench.run), "notebooks": []}
    assert f"Record      {bench.run / 'run.json'}" in shown
    assert (bench.record["status"], bench.record["reason"]) == ("interrupted", "It was stopped by a signal.")
    assert not psutil.pid_exists(bench.seen["pid"])


def test_in_an_interactive_run_ctrl_c_is_the_programs_and_sigterm_ends_both(bench: Bench) -> None:
    bench.order(wait=True)
    command = [sys.executable, "-m", "interp_kernel.cli", *bench.arguments("claude", alone=False)]
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(bench.report.exists)
    program, launcher = psutil.Process(bench.seen["pid"]), psutil.Process(run.pid)
    wait_until(lambda: ignores(launcher, signal.SIGINT))
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 1
    assert not program.is_running()
    assert (bench.record["status"], bench.record["exit_code"]) == ("failed", -signal.SIGTERM)


def ignores(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = re.search(r"SigIgn:\s*(\w+)", status)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


HISTORIES: dict[str, Callable[[Path], str]] = {
    "claude": lambda home: str(home / ".claude/projects/-work/SESSION.jsonl"),
    "codex": lambda home: str(home / ".codex/sessions/2026/11/21/rollout-1.jsonl"),
    "gemini": lambda home: str(home / ".gemini/tmp/work/chats/session-1.jsonl"),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_without_a_task_it_is_interactive_and_its_own_transcript_is_found(bench: Bench, agent: str) -> None:
    history = HISTORIES[agent](bench.home)
    older = Path(history).with_name("rollout-0.jsonl")
    older.parent.mkdir(parents=True)
    older.write_text("")
    bench.order(history=history)
    assert bench.start(agent, alone=False) == 0
    argv = bench.seen["argv"]
    assert not {"exec", "--print", "--output-format"} & set(argv)
    assert bench.record["transcript"] == history.replace("SESSION", argv[-1])
    assert bench.record["user_prompt"] is None
    if agent == "claude":
        assert argv[-2] == "--session-id"


@pytest.mark.parametrize("agent", AGENTS)
def test_a_missing_program_is_told_with_its_cure(
    agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["agent", agent, "--workspace", str(tmp_path)]) == 1
    assert f"The program '{agent}' was not found on PATH. Install it with `npm install -g @" in capfd.readouterr().err
    assert not (tmp_path / "agent-runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["agent"], "No agent was named; expected one of claude, codex, gemini, openai."),
        (["agent", "claude", "missing.md"], "The task 'missing.md' can't be read: "),
        (["agent", "claude", "empty.md"], "The task 'empty.md' is empty; expected a text"),
        (["agent", "claude", "--workspace", "nowhere"], "The workspace 'nowhere' is not a folder."),
        (["agent", "openai", "task.md"], "`agent openai` was given no --base-url, --model; it needs all three."),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "task.md").write_text("Do it.")
    assert main(arguments) == 1
    assert expected in capfd.readouterr().err


def test_an_editors_entry_names_a_server_that_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = []
    for editor, key in {"claude-desktop": "mcpServers", "cursor": "mcpServers", "vscode": "servers"}.items():
        assert main(["agent", "--print-config", editor, "--workspace", str(tmp_path)]) == 0
        (server,) = json.loads(capfd.readouterr().out)[key].values()
        assert server["args"][-2:] == ["--workspace", str(tmp_path)]
        assert server.get("type") == ("stdio" if editor == "vscode" else None)
        commands.append([server["command"], *server["args"]])
    assert commands[0] == commands[1] == commands[2]
    done = subprocess.run(commands[0], stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode == 0
