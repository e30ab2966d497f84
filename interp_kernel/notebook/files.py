"""The files that runs leave: replaced in one step or added to line by line, so that a kill or a full disk tears none.

Beside the executed notebooks, `runs.jsonl` gets a line when a run begins and one when it ends; nothing is ever
rewritten there, and of each run's attempts the last line counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUNS = "runs.jsonl"
Facts = dict[str, Any]


def utc() -> str:
    """The time now, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def replace(path: Path, text: str) -> Path:
    """Write a file in one step, for others may be reading it; its mode stays, and lone surrogates become `?`.

    Raises:
        OSError: It can't be written; then it is what it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_bytes(text.encode("utf-8", "replace"))
        with suppress(FileNotFoundError):
            scratch.chmod(path.stat().st_mode)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # a full disk leaves a part of it
    return path


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line to the folder's file of runs, whole or not at all, while others add theirs.

    Raises:
        OSError: The disk is full or the file can't be written.
    """
    line = json.dumps(record, default=str).encode() + b"\n"
    with (folder / RUNS).open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line  # what stands there was cut off
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def lines(folder: Path) -> Iterator[Facts]:
    """Every line of the folder's file of runs, in the order in which they were written."""
    try:
        with (folder / RUNS).open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    _ = record["key"], record["attempt"]
                except (ValueError, LookupError, TypeError):
                    continue  # torn by a full disk or a loss of power
                yield record
    except FileNotFoundError:
        return


def read_attempts(folder: Path, fields: Iterable[str] | None = None) -> list[Facts]:
    """The newest line of every attempt in the folder, in the order in which they began; of each some fields, or all."""
    newest: dict[tuple[str, int], Facts] = {}
    for record in lines(folder):
        kept = record if fields is None else {name: record.get(name) for name in fields}
        newest[record["key"], record["attempt"]] = kept
    return list(newest.values())


def read_runs(folder: Path) -> list[Facts]:
    """The newest record of every run in the folder, in the order in which the runs first began."""
    return list(
        {record["key"]: record for record in sorted(read_attempts(folder), key=lambda r: r["attempt"])}.values()
    )


def read_record(notebook: Path) -> Facts | None:
    """The record in an executed notebook; None if it has none or can't be read."""
    try:
        given = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["interp"]
        found = given["run"] if isinstance(given, dict) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, dict) else None
