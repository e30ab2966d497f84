"""The log of attempts beside a notebook: every source, edit, output, time and cost, in the order in which they came.

The notebook shows where a study ended; the log shows how it got there, with all that was edited away or failed. A run
has an entry when it begins and one when it ends, so that one whose keeper is killed is there too.
`NAME.attempts/log.jsonl` is only ever appended to. What a cell put out beyond what its notebook keeps is in
`NAME.attempts/RUN.txt`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from interp_kernel.notebook.files import utc

MAX_TEXT_BYTES = 64_000_000
INLINE_CHARS = 20_000


class AttemptLog:
    """Appends to the log of one notebook; `problem` says why it can't, if it can't."""

    def __init__(self, notebook: Path) -> None:
        self.folder = folder_of(notebook)
        self.problem = ""

    @property
    def path(self) -> Path:
        """The file of entries, one JSON object a line."""
        return self.folder / "log.jsonl"

    def append(self, event: str, **fields: Any) -> None:
        """Add an entry; a disk that refuses it is told in `problem` and doesn't stop the work."""
        entry = {"time": utc(), "event": event, **fields}
        line = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        self._write(self.path, line)

    def unended(self) -> list[str]:
        """Ids of cells whose last run has begun and has no end here, for whoever kept it was killed."""
        begun: dict[str, None] = {}
        with suppress(OSError), self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError):  # the last line of a full disk
                    entry = json.loads(line)
                    begun |= {entry["cell_id"]: None} if entry["event"] == "begin" else {}
                    if entry["event"] in ("run", "lost"):
                        begun.pop(entry["cell_id"], None)
        return list(begun)

    def run_text(self, run: str) -> RunText:
        """Where the text of one run goes."""
        return RunText(self, self.folder / f"{run}.txt")

    def _write(self, path: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, data)
            finally:
                os.close(file)
            self.problem = ""
        except OSError as error:
            self.problem = f"The log of attempts {path} can't be written: {error.strerror}."


class RunText:
    """The whole text of one run: in memory while it is short, else in a file of its own."""

    def __init__(self, log: AttemptLog, path: Path) -> None:
        self._log, self.path = log, path
        self._parts: list[str] = []
        self.chars = self.nbytes = 0
        self.is_in_file = False

    def add(self, text: str) -> None:
        """Take in more of it."""
        self.chars += len(text)
        if not self.is_in_file:
            self._parts.append(text)
            if self.chars <= INLINE_CHARS:
                return
            self.is_in_file, text, self._parts = True, "".join(self._parts), []
        data = text.encode("utf-8", "replace")[: max(0, MAX_TEXT_BYTES - self.nbytes)]
        self.nbytes += len(data)
        if data:
            self._log._write(self.path, data)

    def read(self) -> str:
        """All of it, as far as it was kept."""
        if not self.is_in_file:
            return "".join(self._parts)
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return f"[{self.path} can't be read: {error.strerror}.]"


def folder_of(notebook: Path) -> Path:
    """Folder of a notebook's log."""
    return notebook.with_suffix(".attempts")
