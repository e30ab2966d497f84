"""The record of one agent's run: a folder with what it was told, what it said, and what came of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from interp_kernel.errors import AgentError

FOLDER = "agent-runs"
STOPPED = "It was stopped by a signal."


@dataclass
class Record:
    """What `run.json` says.

    Attributes:
        agent: `claude`, `codex`, `gemini` or `openai`.
        model: Name of the agent's own model, where it was given or told.
        command: The command line, if a program was started.
        status: `running`, `completed`, `failed`, `interrupted`, or `budget` where a limit ended the run.
        reason: Why it did not complete.
        transcript: Everything that the agent said and did, one JSON object per line; an interactive
            program's own is found at the end.
        notebooks: Those that were written during the run, by their paths in the workspace.
        tokens: As the endpoint counted them, by kind.
        cost_usd: What the run cost, if the agent or the endpoint told it.
    """

    agent: str
    workspace: str
    started: str
    model: str | None = None
    command: list[str] = field(default_factory=list)
    status: str = "running"
    reason: str | None = None
    exit_code: int | None = None
    system_prompt: str = "system_prompt.md"
    user_prompt: str | None = None
    transcript: str | None = None
    notebooks: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    turns: int = 0
    tool_calls: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    cost_usd: float | None = None
    answer: str | None = None


class Run:
    """One run and its folder; `run.json` is there from the start, so that a killed run has one too."""

    def __init__(self, agent: str, workspace: Path, system_prompt: str, task: str | None) -> None:
        """Makes the folder and writes the prompts into it."""
        now = datetime.now(UTC)
        self.workspace = workspace.resolve()
        self.folder = _new_folder(self.workspace / FOLDER, f"{now:%Y%m%d-%H%M%S}-{agent}")
        self.record = Record(agent, str(self.workspace), now.isoformat(timespec="seconds"))
        self._clock, self._began = time.monotonic(), time.time()
        self.write(self.record.system_prompt, system_prompt)
        if task is not None:
            self.record.user_prompt, self.record.transcript = "user_prompt.md", "transcript.jsonl"
            self.write(self.record.user_prompt, task)
        self.save()

    def path(self, name: str) -> Path:
        """A file of the run's folder."""
        return self.folder / name

    def write(self, name: str, text: str) -> Path:
        """Write a file of the run's folder, for its owner's eyes."""
        path = self.path(name)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return path

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to the transcript, with seconds since the start."""
        line = json.dumps({"t": round(time.monotonic() - self._clock, 3), **event}, ensure_ascii=False)
        with self.path("transcript.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def add_tokens(self, counts: dict[str, int]) -> None:
        """Add what one answer of the model used."""
        for kind, count in counts.items():
            self.record.tokens[kind] = self.record.tokens.get(kind, 0) + count

    def finish(self, status: str, reason: str | None = None) -> None:
        """Note the end and the notebooks that were written since the start."""
        self.record.status, self.record.reason = status, reason
        self.record.duration_s = round(time.monotonic() - self._clock, 3)
        self.record.notebooks = written_notebooks(self.workspace, self._began)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        self.write("run.json", json.dumps(asdict(self.record), indent=2, ensure_ascii=False) + "\n")


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that was not there; two runs may begin in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return folder
    raise AgentError(f"{parent} holds 999 runs that began in this second; expected fewer. Remove old ones.")


def written_notebooks(workspace: Path, since: float) -> list[str]:
    """Notebooks in a workspace that were written after a time, oldest first; hidden folders are left out."""
    found = []
    for path in workspace.rglob("*.ipynb"):
        inner = path.relative_to(workspace)
        if not any(part.startswith(".") for part in inner.parts) and path.stat().st_mtime >= since:
            found.append((path.stat().st_mtime, str(inner)))
    return [name for _, name in sorted(found)]
