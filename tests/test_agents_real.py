"""The agents' programs themselves, where they are installed, with a stub of their provider on loopback.

    npm install @anthropic-ai/claude-code @openai/codex @google/gemini-cli
    PATH=$PWD/node_modules/.bin:$PATH pytest tests/test_agents_real.py

They get a home of their own and a key that is none, so that no account is touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interp_kernel.agents import instructions
from interp_kernel.agents.server import server_variables
from tests.agents.providers import WORDS, Provider
from tests.agents.studies import Call

MODELS = {"claude": "claude-sonnet-4-5", "codex": "stub", "gemini": "gemini-2.5-flash"}
# Beside our tools Codex offers reading of MCP resources and asking its user.
OWN_TOOLS: dict[str, set[str]] = {
    "claude": set(),
    "codex": {"list_mcp_resources", "list_mcp_resource_templates", "read_mcp_resource", "request_user_input"},
    "gemini": set(),
}
CODE = "print('whole text ' * 900)\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"
CALLS = (
    Call("start_new_session", {"experiment_name": "real"}),
    Call("execute_code", {"session_id": "$session", "code": CODE}),
    Call("shutdown_session", {"session_id": "$session"}),
)


@pytest.mark.parametrize("agent", MODELS)
def test_a_real_program_uses_our_tools_unasked_and_sees_text_and_pictures(agent: str, tmp_path: Path) -> None:
    if shutil.which(agent) is None:
        pytest.skip(f"{agent} is not installed.")
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    (work / "TASK.md").write_text("Draw a line.")
    with Provider(CALLS) as provider:
        prepare(home, provider.url)
        command = [sys.executable, "-m", "interp_kernel.cli", "agent", agent, "TASK.md", "--model", MODELS[agent]]
        environment = variables(home, provider.url)
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
    assert done.returncode == 0, done.stderr
    (run,) = (work / "agent-runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["tool_calls"], record["answer"]) == ("completed", len(CALLS), WORDS)
    assert len(record["notebooks"]) == 1

    heading = instructions().splitlines()[0]
    assert all(heading in json.dumps(request) for request in provider.requests)
    names = {name for request in provider.requests for name in offered(request)}
    assert {name for name in names if "interp" not in name} <= OWN_TOOLS[agent]
    assert [name for name in names if "interp" in name]
    seen = json.dumps(provider.requests[-1])
    assert seen.count("whole text") >= 900
    assert re.search(r"iVBORw0KGgo", seen), "the picture did not reach the model"


def offered(request: dict[str, Any]) -> list[str]:
    """Names of the tools that a request offers, in the words of its provider."""
    declared = [tool for tools in request["tools"] for tool in tools.get("functionDeclarations", [tools])]
    return [tool.get("name") or tool["type"] for tool in declared]


def prepare(home: Path, url: str) -> None:
    """What a user of these programs has: a provider, a way to log in, and servers of their own."""
    (home / ".codex").mkdir(parents=True)
    (home / ".gemini").mkdir()
    provider = f'name = "stub"\nbase_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "OPENAI_API_KEY"\n'
    own = '[mcp_servers.mine]\ncommand = "/bin/false"\n'
    (home / ".codex" / "config.toml").write_text(f'model_provider = "stub"\n[model_providers.stub]\n{provider}{own}')
    settings = {
        "security": {"auth": {"selectedType": "gemini-api-key"}},
        "mcpServers": {"mine": {"command": "/bin/false"}},
    }
    (home / ".gemini" / "settings.json").write_text(json.dumps(settings))


def variables(home: Path, url: str) -> dict[str, str]:
    """What the server needs of this environment, with a home, an address and keys that lead nowhere else."""
    kept = {name: os.environ[name] for name in server_variables(os.environ)}
    keys = dict.fromkeys(("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY"), "none")
    addresses = {"ANTHROPIC_BASE_URL": url, "GOOGLE_GEMINI_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    return {**kept, **keys, **addresses, **quiet, "HOME": str(home)}
