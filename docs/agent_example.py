"""Makes the example of agents.md: a study by the scripted agent on the demo model, its transcript and its notebook.

    python -m docs.agent_example

What the agent says and calls is the script `tests/agents/studies.py`, replayed by an endpoint on this machine in a
model's place. All else is real: `interp-kernel agent openai`, the MCP server, the kernel, the worker and every answer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.agents.endpoint import Endpoint
from tests.agents.studies import HEADS_STUDY, HEADS_TASK

FOLDER = Path(__file__).resolve().parent / "agents"
LONG = 12  # lines of an answer that stand open
HEAD = """# Transcript of a study

The agent's words and calls are a script; every answer is what the server said. Made by `python -m docs.agent_example`,
together with [the notebook](study.ipynb) that it left.
"""


def main() -> None:
    """Carry out the study in a folder of its own, and write what came of it beside this file."""
    with tempfile.TemporaryDirectory(prefix="study") as folder:
        workspace = Path(folder).resolve()
        answer = carry_out(workspace)
        run = Path(answer["run"])
        FOLDER.mkdir(exist_ok=True)
        shutil.copy(workspace / answer["notebooks"][0], FOLDER / "study.ipynb")
        events = [json.loads(line) for line in (run / "transcript.jsonl").read_text().splitlines()]
        text = "\n".join([HEAD, *told(events)])
        for root in (workspace, FOLDER.parent.parent):
            text = text.replace(f"{root}/", "")
        (FOLDER / "transcript.md").write_text(text, encoding="utf-8")


def carry_out(workspace: Path) -> dict[str, Any]:
    """Run the command that a person would type; returns the line that it prints."""
    (workspace / "TASK.md").write_text(HEADS_TASK)
    command = [sys.executable, "-m", "interp_kernel.cli", "agent", "openai", "TASK.md", "--model", "scripted"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    with Endpoint(HEADS_STUDY) as endpoint:
        command += ["--base-url", endpoint.base_url]
        done = subprocess.run(command, cwd=workspace, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def told(events: list[dict[str, Any]]) -> Iterator[str]:
    """The transcript as Markdown, without the instructions that it begins with."""
    names = {}
    for event in events[1:]:
        if event["role"] == "user" and isinstance(event["content"], str):
            yield f"\n## Task\n\n{event['content']}"
        elif event["role"] == "assistant":
            if event.get("content"):
                yield f"\n**Agent:** {event['content']}"
            for call in event.get("tool_calls", ()):
                names[call["id"]] = call["function"]["name"]
                yield called(call["function"]["name"], json.loads(call["function"]["arguments"]))
        elif event["role"] == "tool":
            yield answered(names[event["tool_call_id"]], event["content"])


def called(name: str, arguments: dict[str, Any]) -> str:
    """A call; what is code or text stands below it as it is."""
    source = next((arguments[key] for key in ("code", "source", "content") if key in arguments), None)
    small = {key: value for key, value in arguments.items() if value != source}
    shown = ", ".join(f"{key}={value!r}" for key, value in small.items())
    kind = "markdown" if name == "add_markdown" else "python"
    return f"\n`{name}({shown})`" + (f"\n\n````{kind}\n{source}\n````" if source else "")


def answered(name: str, text: str) -> str:
    """An answer, folded if it is long."""
    fenced = f"````text\n{text}\n````"
    lines = text.count("\n") + 1
    if lines <= LONG:
        return f"\n{fenced}"
    return f"\n<details><summary>{name} answers, {lines} lines</summary>\n\n{fenced}\n</details>"


if __name__ == "__main__":
    main()
