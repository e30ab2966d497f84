"""The record of a run: what ran on what, how long it took and how it ended.

The executed notebook holds it as `metadata.interp.run`; `files.py` adds it to the file of runs beside the notebook.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from interp_kernel.notebook.called import CallsFile, totals
from interp_kernel.notebook.executed import findings, input_index, traceback
from interp_kernel.notebook.files import Facts, utc

SCHEMA = 1
KEY_DIGITS = 12
REMOTE = re.compile(r"%remote|interp_kernel")
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
GIT_S = 10.0
INFRASTRUCTURE = {"WorkerDiedError", "WorkerError", "LostValueError", "DeadKernelError"}
"""Names of errors that no cell is to blame for. A handle is lost only with its worker."""

OnCell = Callable[[int, int], None]
"""Called as a cell begins, with its index and the number of cells."""


# ------------------------------------------------------------------------------------------ before a run


def digest(value: Any) -> str:
    """SHA-256 of a text, or of plain data."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def notebook_hash(notebook: Mapping[str, Any]) -> str:
    """Hash of what runs: sources, tags and the kernel; outputs and ids do not count."""
    cells = [
        [cell["cell_type"], "".join(cell["source"]), sorted(cell.get("metadata", {}).get("tags", []))]
        for cell in notebook["cells"]
    ]
    return digest([cells, notebook["metadata"].get("kernelspec", {}).get("name")])


def source_hashes(notebook: Mapping[str, Any], folders: Iterable[Path]) -> dict[str, str]:
    """Hashes, by path, of the local modules and technique files that the notebook's cells name.

    A file that can't be read is left out; the cell that needs it will say so.
    """
    from interp_kernel.errors import TechniqueError
    from interp_kernel.sources import collect_modules

    folders = list(folders)
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    names = re.findall(r"^\s*from\s+([A-Za-z_][\w.]*)\s+import", text, re.MULTILINE)
    for listed in re.findall(r"^\s*import\s+([\w., ]+)", text, re.MULTILINE):
        names += [part.split()[0] for part in listed.split(",") if part.strip()]
    found: dict[str, str] = {}
    try:
        modules = collect_modules(dict.fromkeys(names), search=folders)
        found = {str(m.path): digest(m.source) for m in modules.values() if m.path.is_file()}
    except TechniqueError:
        pass
    for given in re.findall(r"""["']([^"'\n]+\.py)["']""", text):
        for path in (folder / given for folder in folders):
            if path.is_file():
                found[str(path.resolve())] = file_hash(path)
    return found


def facts_of(
    path: Path,
    notebook: Mapping[str, Any],
    parameters: Mapping[str, Any],
    output: Path | None,
    *,
    model: Mapping[str, Any] | None = None,
    folders: Iterable[Path] = (),
    given: Mapping[str, Any] | None = None,
) -> Facts:
    """What is known of a run before it begins.

    Args:
        path: The notebook.
        notebook: What stands in it.
        parameters: Values that are set.
        output: Where the executed notebook goes.
        model: InterpClient's options, where the notebook doesn't choose them.
        folders: Where its local modules are looked for.
        given: Facts that a batch knows better or has at hand: key, attempt, batch, label, seed, repeat, attempts, git,
            environment, weights.
    """
    given = dict(given or {})
    weights = given.pop("weights") if "weights" in given else weights_hash(model) if model else None
    place = os.path.relpath(path.resolve(), (output or path).parent.resolve())
    hashes = {
        "notebook": notebook_hash(notebook),
        "parameters": digest(dict(parameters)),
        "model": digest(model),
        "weights": weights,
        "sources": source_hashes(notebook, folders),
    }
    return {
        "key": run_key(place, parameters, model, None, 0),
        "attempt": 1,
        "batch": None,
        "notebook": str(path),
        "output": output.name if output else None,
        "html": output.with_suffix(".html").name if output else None,
        "parameters": dict(parameters),
        "seed": parameters.get("seed"),
        "repeat": 0,
        "model": dict(model) if model else None,
        "attempts": [],
        "hashes": hashes,
        "git": given.pop("git") if "git" in given else git_state(path.resolve().parent),
        "environment": environment(),
        **given,
    }


def run_key(notebook: str, parameters: Mapping[str, Any], model: Any, seed: int | None, repeat: int) -> str:
    """A name of a run, 12 hex digits, that is the same whenever it is asked for again."""
    return digest([notebook, dict(parameters), model, seed, repeat])[:KEY_DIGITS]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's text as Python reads it, as `sources.Module.digest` is."""
    return digest(importlib.util.decode_source(path.read_bytes()))


def weights_hash(options: Mapping[str, Any]) -> str | None:
    """SHA-256 over the weight files of a model that lies on this machine; None if it doesn't, or has none."""
    files = [path for path in weight_files(options) if path.suffix in WEIGHTS]
    if not files:
        return None
    return digest([[path.name, content_hash(str(path), path.stat().st_mtime_ns)] for path in sorted(files)])


def weight_files(options: Mapping[str, Any]) -> list[Path]:
    """The model's files, in a local folder or in the cache of the Hugging Face hub."""
    name = str(options.get("model_name", "demo"))
    if options.get("mode", "local") != "local":
        return []
    if name == "demo":
        from interp_kernel import demo_model

        return list(Path(demo_model.path()).iterdir())
    if (folder := Path(name).expanduser()).is_dir():
        return list(folder.iterdir())
    if options.get("commit"):
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", options["commit"])
        return list(folder.iterdir()) if folder.is_dir() else []
    return []


@functools.cache
def content_hash(path: str, _modified: int) -> str:
    """SHA-256 of a file; the hub's cache names large files by theirs."""
    name = Path(path).resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_state(folder: Path) -> Facts | None:
    """Commit, branch and dirtiness of the checkout that holds a folder; None outside of one, or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
        return ran.stdout.strip()

    try:
        state = {"commit": git("rev-parse", "HEAD"), "branch": git("rev-parse", "--abbrev-ref", "HEAD")}
        return {**state, "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def environment() -> Facts:
    """This machine, Python, and the versions of this package and of those that it needs."""
    required = importlib.metadata.requires("interp-kernel") or []
    wanted = [text for text in required if not re.search(r"extra == .(dev|bench)", text)]
    names = {match[0] for text in wanted if (match := re.match(r"[A-Za-z0-9._-]+", text))}
    packages = {}
    for name in sorted(names | {"interp-kernel"}):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": packages,
    }


def local_gpus() -> list[str]:
    """Names of NVIDIA's GPUs in this machine, as their driver tells them."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")]


# --------------------------------------------------------------------------------------------- in a run


class Ledger:
    """Gathers the facts of one run while it runs; times are of the monotonic clock, which no one sets."""

    def __init__(self, facts: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> None:
        """`facts` are known before the run, see `facts_of`; `source` is the notebook as it was given."""
        self.facts: Facts = {"schema": SCHEMA, **facts, "status": "running", "started": utc()}
        self.price = self.facts.pop("price", None)
        self.source = source
        self.cells: list[Facts] = []
        self.folder = tempfile.TemporaryDirectory(prefix="interp-run-")
        self.calls = CallsFile(Path(self.folder.name, "calls.jsonl"))
        self._start = self._cell_start = time.monotonic()

    def cell_begins(self) -> None:
        """A cell is sent."""
        self._cell_start = time.monotonic()

    def cell_seconds(self) -> float:
        """How long the cell has taken so far."""
        return round(time.monotonic() - self._cell_start, 6)

    def cell_ended(self, index: int, cell: Mapping[str, Any]) -> None:
        """A code cell has ended, well or not."""
        facts = {"index": index, "id": cell.get("id"), "status": cell["metadata"]["papermill"]["status"]}
        self.cells.append({**facts, "seconds": self.cell_seconds(), "calls": self.calls.new()})

    def finish(self, executed: Mapping[str, Any], failure: Mapping[str, Any]) -> Facts:
        """The whole record; `failure` has status, failed_cell (of the executed notebook), ename and evalue."""
        from interp_kernel.notebook.metrics import read_metrics

        self.calls.new()  # of threads that outlived their cell
        self.folder.cleanup()
        where = functools.partial(input_index, self.source or executed, executed)
        for cell in self.cells:
            cell["source_index"] = where(cell["index"])
        failed = failure.get("failed_cell")
        cell = executed["cells"][failed] if failed is not None else {}
        calls = [call for cell in self.cells for call in cell["calls"]]
        seconds = round(time.monotonic() - self._start, 3)
        hashes = self.facts["hashes"]
        self.facts |= {
            "status": failure["status"],
            "ended": utc(),
            "seconds": seconds,
            "failed_cell": None if failed is None else where(failed),
            "failed_cell_id": cell.get("id"),
            "ename": failure.get("ename"),
            "evalue": failure.get("evalue"),
            "traceback": traceback(cell) if cell else [],
            "is_infrastructure": is_infrastructure(failure["status"], failure.get("ename"), failed),
            "findings": findings(executed),
            "metrics": read_metrics(executed),
            "hashes": {**hashes, "sources": {**hashes.get("sources", {}), **self.calls.sources}},
            "workers": [known_better(worker, self.facts) for worker in self.calls.workers.values()],
            "cells": self.cells,
            "totals": {**totals(calls), "retries": len(self.facts["attempts"])},
            "cost": cost_of(self.price, seconds) if self.price else None,
        }
        return self.facts

    def give_up(self, error: BaseException) -> None:
        """Record that the run ended without an executed notebook."""
        self.folder.cleanup()
        failure = {"status": "failed", "ename": type(error).__name__, "evalue": str(error), "failed_cell": None}
        seconds = round(time.monotonic() - self._start, 3)
        self.facts |= {**failure, "ended": utc(), "seconds": seconds, "traceback": [], "is_infrastructure": False}


def cost_of(price: Facts, seconds: float) -> Facts:
    """What a container cost in so many seconds; the amount only where the study says what an hour costs."""
    hourly = price.get("price_per_hour")
    return {**price, "container_s": seconds, "amount": None if hourly is None else round(hourly * seconds / 3600, 4)}


def known_better(worker: Facts, facts: Facts) -> Facts:
    """A worker's facts with what this machine knows about its weights and GPU."""
    is_local = worker["backend"] == "local"
    gpu = local_gpus() if is_local and any("cuda" in d for d in worker.get("devices") or []) else worker["gpu"]
    held = {"mode": worker["backend"], "model_name": worker["model_name"], "commit": worker["commit"]}
    is_asked_for = (facts.get("model") or {}).get("model_name", "demo") == worker["model_name"]
    weights = facts["hashes"].get("weights") if is_asked_for else None
    return {**worker, "gpu": gpu, "weights": weights or weights_hash(held)}


def is_infrastructure(status: str, ename: str | None, failed_cell: int | None) -> bool:
    """Whether a failure is none of a cell's: a dead kernel or worker, or one that did not start."""
    if status in ("dead-kernel", "dead-runner"):
        return True
    return (status == "failed" and ename in INFRASTRUCTURE) or (status == "timeout" and failed_cell is None)
