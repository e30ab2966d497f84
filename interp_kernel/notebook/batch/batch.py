"""Runs a study to its end: one process a notebook, every fault recorded, in a folder that a later call goes on from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from interp_kernel.notebook import files, provenance
from interp_kernel.notebook.batch.board import Board
from interp_kernel.notebook.batch.estimate import describe_plan, price_of
from interp_kernel.notebook.batch.launch import Launcher, launched
from interp_kernel.notebook.batch.resume import HISTORY, attempts, choose, end_of_lost, locked, settle, weights_now
from interp_kernel.notebook.batch.study import Run, Study, plan, read_study
from interp_kernel.notebook.files import Facts

TICK_S = 0.2
INTERRUPTED = 130
OUTPUT_ERRORS = {"OSError", "PermissionError", "FileNotFoundError", "NotADirectoryError", "IsADirectoryError"}


@dataclass(frozen=True)
class Outcome:
    """How a batch ended.

    Attributes:
        status: `completed` if every run of the study is complete, else `interrupted` after a signal, or `failed`.
        planned: Number of runs of the study.
        completed: How many are complete, those of earlier calls included.
        skipped: How many of these were complete before.
        failed: How many ended otherwise, interrupted ones included.
        not_begun: How many never began, or were not asked for.
        seconds: Wall time.
        folder: Where the results are.
        report: The page about them.
    """

    status: str
    planned: int
    completed: int
    skipped: int
    failed: int
    not_begun: int
    seconds: float
    folder: str
    report: str | None


def run_batch(study: Study, *, resume: bool = False, only_failed: bool = False) -> Outcome:
    """Run a study; whatever happens to a run, the others go on, and every end is in the folder's `runs.jsonl`.

    SIGINT and SIGTERM save what is there; a second one kills the kernels that do not end. Only in the main thread can
    they be heeded.

    Args:
        study: What to run.
        resume: Go on in a folder that has runs, skipping those that are complete with the same notebook, values, model,
            weights and sources.
        only_failed: Run again those that began and are not complete, and nothing else.

    Raises:
        NotebookError: A notebook is refused, or the folder has runs and neither option is given; nothing has run.
        SpecError: The study is wrong, or another batch writes into its folder; nothing has run.
        OSError: The folder can't be written.
    """
    start = time.monotonic()
    git_state.cache_clear()
    runs, folder = plan(study), study.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        settle(folder)
        todo, done = choose(study, runs, resume=resume, only_failed=only_failed)
        write_plan(study, runs)
        batch = Batch(study, todo, Board(len(todo), study.jobs))
        if todo:
            with batch.board, signals_counted(batch.signals), launched(folder, lock) as launcher:
                batch.drive(launcher)
        report = write_report(folder)
    ends = Counter(batch.ends.values())
    completed = len(done) + ends["completed"]
    status = "completed" if completed == len(runs) else "interrupted" if batch.signals else "failed"
    begun = len(done) + len(batch.ends)
    return Outcome(
        status=status,
        planned=len(runs),
        completed=completed,
        skipped=len(done),
        failed=begun - completed,
        not_begun=len(runs) - begun,
        seconds=round(time.monotonic() - start, 3),
        folder=str(folder),
        report=report,
    )


def write_plan(study: Study, runs: list[Run]) -> None:
    """Leave beside the results a line of `plan.jsonl` for each run, and a `study.yaml` that goes on from there."""
    here = {"notebooks": [str(Path(text).resolve()) for text in study.notebooks], "output": "."}
    text = json.dumps({**study.to_json(), **here}, indent=2, ensure_ascii=False)
    lines = [json.dumps({**vars(run), "output": run.output}, default=str) for run in runs]
    files.replace(study.folder / "study.yaml", text + "\n")
    files.replace(study.folder / "plan.jsonl", "\n".join(lines) + "\n")


# ----------------------------------------------------------------------------------------------- the batch


@dataclass
class Place:
    """A worker, or the right to a container, and how many notebooks may use it at once."""

    options: dict[str, Any] | None
    capacity: int
    busy: int = 0


def places_for(study: Study, model: dict[str, Any] | None) -> list[Place]:
    """Where notebooks with this model may run.

    At Modal each notebook has a container of its own, unless the app is deployed: then they share its containers, of
    which each belongs to an app of its own.
    """
    model = dict(model) if model is not None else None
    if model is None or model.get("mode", "local") == "local":
        return [Place(model, study.per_worker or study.jobs)]
    if not model.get("deploy"):
        return [Place(model, study.containers or study.jobs)]
    count, app = study.containers or 1, model.get("app_name", "interp-kernel")
    names = [app] if count == 1 else [f"{app}-{i + 1}" for i in range(count)]
    return [Place({**model, "app_name": name}, study.per_worker or study.jobs) for name in names]


class Batch:
    """The runs of one call: those that wait, those that run, and how the others ended."""

    def __init__(self, study: Study, todo: list[Run], board: Board) -> None:
        """Nothing starts yet; what is known of earlier attempts goes into the records of further ones."""
        self.study, self.board = study, board
        self.signals: list[int] = []
        self.waiting = deque(todo)
        self.running: dict[str, tuple[Run, Place]] = {}
        self.begun: dict[str, str] = {}  # when
        self.told: dict[str, dict[str, Any]] = {}  # by the run itself, about its end
        self.ends: dict[str, str] = {}  # statuses
        self.tries: Counter[str] = Counter()
        self.places = {json.dumps(run.model): places_for(study, run.model) for run in todo}
        self.history: dict[str, list[dict[str, Any]]] = {run.key: [] for run in todo}
        for record in attempts(study.folder):
            self.remember(record)
        self._heeded = 0

    def remember(self, record: Mapping[str, Any]) -> None:
        """Note an attempt for the record of the next."""
        if (history := self.history.get(record["key"])) is not None:
            history.append({name: record.get(name) for name in HISTORY})

    def attempt(self, key: str) -> int:
        """Number of the run's present or next attempt."""
        return 1 + max((earlier["attempt"] for earlier in self.history[key]), default=0)

    def drive(self, launcher: Launcher) -> None:
        """Start runs and take their ends until none is left, or a signal stops them."""
        while self.waiting or self.running:
            self.fill(launcher)
            for line in launcher.lines(TICK_S):
                self.take(line)
            if launcher.has_ended:
                for key in list(self.running):
                    self.take({"id": key, "code": -signal.SIGKILL})
                if self.waiting:
                    launcher.start()
            if len(self.signals) > self._heeded:
                self._heeded = len(self.signals)
                self.waiting.clear()
                launcher.send({"signal": self.signals[-1]})
                is_first = len(self.signals) == 1
                what = "Stopping; once more kills kernels that do not end." if is_first else "Killing the kernels."
                self.board.say(f"{what} The notebooks that run are saved.")
            self.board.refresh()

    def fill(self, launcher: Launcher) -> None:
        """Start as many waiting runs as may run now."""
        for run in list(self.waiting):
            if len(self.running) >= self.study.jobs:
                return
            free = [place for place in self.places[json.dumps(run.model)] if place.busy < place.capacity]
            if free:
                place = min(free, key=lambda place: place.busy)
                place.busy += 1
                self.waiting.remove(run)
                self.running[run.key] = (run, place)
                self.tries[run.key] += 1
                self.begun[run.key] = files.utc()
                launcher.send({"run": {"id": run.key, "options": self.options(run, place)}})
                self.board.begin(run.key, run.label or run.notebook.stem)

    def options(self, run: Run, place: Place) -> dict[str, Any]:
        """Arguments of `run_notebook`."""
        facts = {
            "key": run.key,
            "attempt": self.attempt(run.key),
            "attempts": self.history[run.key],
            "batch": self.study.name,
            "label": run.label,
            "varied": [name for name, values in self.study.grid.items() if len(values) > 1],
            "seed": run.seed,
            "repeat": run.repeat,
            "git": git_state(run.notebook.resolve().parent),
            "weights": weights_now(json.dumps(run.model)) if run.model else None,
            "price": price_of(run.model, self.study.price_per_hour),
        }
        return {
            "path": str(run.notebook),
            "output": str(self.study.folder / run.output),
            "parameters": run.parameters,
            "timeout_s": self.study.timeout,
            "model": json.dumps(place.options) if place.options is not None else None,
            "facts": facts,
        }

    def take(self, line: Mapping[str, Any]) -> None:
        """One message of a run, or about it."""
        key = line["id"]
        if "cell" in line:
            self.board.advance(key, line["cell"], line["cells"])
        elif "ended" in line:
            self.told[key] = line["ended"]
        elif key in self.running:
            self.end(key, line["code"])

    def end(self, key: str, code: int) -> None:
        """A run's process has ended: count it, or have it begun anew if nothing of its own was to blame."""
        run, place = self.running.pop(key)
        place.busy -= 1
        record = self.told.pop(key, None) or {}
        if "failed_cell" not in record:
            record = self.record_of_lost(run, place, record, code)
        self.remember({"started": self.begun.pop(key), **record, "key": key, "attempt": self.attempt(key)})
        self.ends[key] = record["status"]
        if self.may_try_again(key, record):
            self.waiting.append(run)
            self.board.retry(key, record)
            return
        self.board.end(key, record)
        if record["status"] != "completed" and self.waiting:
            if record["ename"] in OUTPUT_ERRORS and record["failed_cell"] is None:
                self.stop(f"results can't be written ({record['evalue']})")
            elif self.study.stop_on_failure:
                self.stop("a run has failed")

    def may_try_again(self, key: str, record: Mapping[str, Any]) -> bool:
        """Whether nothing of the run's own was to blame, and it has not been tried too often."""
        if self.signals or self.tries[key] > self.study.retries:
            return False
        # No signal came to the batch: the run was stopped because the process that had started it died.
        was_orphaned = record["status"] == "interrupted"
        return was_orphaned or provenance.is_infrastructure(record["status"], record["ename"], record["failed_cell"])

    def stop(self, why: str) -> None:
        """Begin nothing more."""
        self.board.say(f"Nothing more is begun: {why}. {len(self.running)} still run, {len(self.waiting)} never began.")
        self.waiting.clear()

    def record_of_lost(self, run: Run, place: Place, told: Mapping[str, Any], code: int) -> dict[str, Any]:
        """Complete the record of a run that could not do so itself."""
        folder, number = self.study.folder, self.attempt(run.key)
        known = self.options(run, place)["facts"]
        facts = {name: value for name, value in known.items() if name not in ("price", "weights")}
        base = {**facts, "notebook": str(run.notebook), "output": run.output, "parameters": run.parameters}
        base |= {"schema": provenance.SCHEMA, "model": run.model, "hashes": {}, "html": None, "started": None}
        begun = (line for line in files.lines(folder) if (line["key"], line["attempt"]) == (run.key, number))
        record = next(begun, base)
        if told:
            failure = {**told, "failed_cell": None, "traceback": [], "is_infrastructure": False}
            record = {**record, **failure, "ended": files.utc()}
        else:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            record = end_of_lost(folder, record, how)
        try:
            files.append(folder, record)
        except OSError as error:
            self.stop(f"results can't be written ({error})")  # the next batch finds that it never ended
        return record


@cache
def git_state(folder: Path) -> Facts | None:
    """`provenance.git_state`, asked once."""
    return provenance.git_state(folder)


@contextmanager
def signals_counted(signals: list[int]) -> Iterator[None]:
    """Note SIGINT and SIGTERM instead of dying of them."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def write_report(folder: Path) -> str | None:
    """The page about the batch; what fails here must not hide how the batch went."""
    from interp_kernel.notebook.batch.report import write_report as write

    try:
        return str(write(folder))
    except Exception as error:  # noqa: BLE001 - a page that can't be made must not cost the outcome
        print(f"The report could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return None


# --------------------------------------------------------------------------------------- command and plan


def command(arguments: argparse.Namespace) -> int:
    """`interp-kernel batch`."""
    study = read_study(arguments.study)
    options = {"jobs": arguments.jobs, "output": arguments.output, "stop_on_failure": arguments.stop_on_failure or None}
    study = dataclasses.replace(study, **{name: value for name, value in options.items() if value is not None})
    chosen = {"resume": arguments.resume, "only_failed": arguments.only_failed}
    if arguments.dry_run:
        runs = plan(study)
        todo, _ = choose(study, runs, resume=not arguments.only_failed, only_failed=arguments.only_failed)
        print(*describe_plan(study, runs, todo), sep="\n")
        return 0
    outcome = run_batch(study, **chosen)
    if outcome.status != "completed":
        print(
            f"{outcome.completed} of {outcome.planned} runs are complete, {outcome.failed} failed or were stopped, "
            f"{outcome.not_begun} never began. Go on with: interp-kernel batch {arguments.study} --resume"
            + (f" -o {arguments.output}" if arguments.output else ""),
            file=sys.stderr,
        )
    print(json.dumps(dataclasses.asdict(outcome)), flush=True)
    return {"completed": 0, "interrupted": INTERRUPTED}.get(outcome.status, 1)
