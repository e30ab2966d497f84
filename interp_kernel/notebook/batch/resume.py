"""What of a study is still to be run: the folder's lock, lost runs, and complete ones that are still what they were."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from interp_kernel.backends.local import process_exists
from interp_kernel.errors import NotebookError, SpecError
from interp_kernel.notebook import files, provenance
from interp_kernel.notebook.batch.study import Run, Study
from interp_kernel.notebook.checks import read_notebook
from interp_kernel.notebook.files import Facts

ENDING_S, LOOK_S = 30.0, 0.2
HISTORY = ("attempt", "status", "ename", "evalue", "failed_cell", "started", "seconds")
"""What the record of an attempt says about those before it."""
NEEDED = (*HISTORY, "key", "output", "model", "hashes")


def choose(study: Study, runs: list[Run], *, resume: bool, only_failed: bool) -> tuple[list[Run], list[Run]]:
    """The runs that are to be run now, and those that are complete and stay as they are.

    Raises:
        NotebookError: The folder has runs, and it was not said what to do with them.
    """
    folder = study.folder
    records = {record["key"]: record for record in attempts(folder)}
    if records and not (resume or only_failed):
        complete = sum(record["status"] == "completed" for record in records.values())
        raise NotebookError(
            f"{folder} has {len(records)} runs of an earlier batch, {complete} of them complete. Go on with --resume, "
            "run those again that failed with --only-failed, or name another folder with -o."
        )
    source_now.cache_clear()
    weights_now.cache_clear()
    hashes = {path: provenance.notebook_hash(read_notebook(path)) for path in {run.notebook for run in runs}}
    done = [run for run in runs if is_current(folder, records.get(run.key), hashes[run.notebook])]
    complete_keys = {run.key for run in done}
    if only_failed:
        return [run for run in runs if records.get(run.key, {}).get("status", "completed") != "completed"], done
    return [run for run in runs if run.key not in complete_keys], done


def attempts(folder: Path) -> list[Facts]:
    """What a batch needs to know of the folder's attempts, each run's in their order."""
    return sorted(files.read_attempts(folder, NEEDED), key=lambda record: record["attempt"])


def settle(folder: Path) -> None:
    """End the records of runs whose process was killed; nobody runs any more once the lock is ours.

    A run may have ended well and been killed before it could say so: then its notebook has the record.
    """
    lost = {(r["key"], r["attempt"]) for r in files.read_attempts(folder, NEEDED) if r["status"] == "running"}
    begun = {(r["key"], r["attempt"]): r for r in files.lines(folder) if (r["key"], r["attempt"]) in lost}
    for record in begun.values():
        files.append(folder, end_of_lost(folder, record, "with the batch"))


def end_of_lost(folder: Path, record: Facts, how: str) -> Facts:
    """The record of a run whose process ended without one."""
    stored = files.read_record(folder / str(record["output"])) or {}
    if (stored.get("key"), stored.get("attempt")) == (record["key"], record["attempt"]):
        return stored
    evalue = f"The process of this run was killed {how}. A further attempt begins anew, in a fresh kernel."
    failure = {"status": "dead-runner", "ename": "DeadRunnerError", "evalue": evalue, "is_infrastructure": True}
    return {**record, **failure, "ended": files.utc(), "seconds": None, "failed_cell": None, "traceback": []}


def is_current(folder: Path, record: Mapping[str, Any] | None, notebook_hash: str) -> bool:
    """Whether a run is complete with what its notebook, sources and weights are now; its key stands for the rest."""
    if record is None or record["status"] != "completed" or not (folder / record["output"]).is_file():
        return False
    hashes = record["hashes"]
    if hashes["notebook"] != notebook_hash or not same_sources(hashes["sources"]):
        return False
    weights = weights_now(json.dumps(record["model"])) if record["model"] else None
    return weights is None or hashes["weights"] in (None, weights)


def same_sources(hashes: Mapping[str, str]) -> bool:
    """Whether files still hold what they held."""
    return all(source_now(path) == known for path, known in hashes.items())


@cache
def source_now(path: str) -> str | None:
    """A source's hash; None if it is gone."""
    try:
        return provenance.file_hash(Path(path))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


@cache
def weights_now(model: str) -> str | None:
    """A model's weights, by its options as JSON."""
    return provenance.weights_hash(json.loads(model))


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, whose descriptor every run inherits: it is free only when the last of them has ended.

    Raises:
        SpecError: Another batch holds it.
    """
    with (folder / ".lock").open("a+") as file:
        deadline = time.monotonic() + ENDING_S
        while not try_lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip()
            pid = re.match(r"process (\d+)", owner)
            if pid is None or process_exists(int(pid[1])) or time.monotonic() > deadline:
                raise SpecError(
                    f"{folder} is in use by another batch ({owner or 'just starting'}). Wait for it, stop it, or name "
                    "another folder with -o."
                )
            time.sleep(LOOK_S)  # that batch was killed, and the runs that it leaves are saving what they have
        file.truncate(0)
        file.write(f"process {os.getpid()} since {files.utc()}")
        file.flush()
        yield file.fileno()


def try_lock(fd: int) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
