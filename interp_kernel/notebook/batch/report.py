"""The page of a batch: what ran, what failed and why, what was measured; for people as HTML, for agents as Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from interp_kernel.notebook.batch.charts import Chart, draw_metric, identity, shorten
from interp_kernel.notebook.files import Facts, read_runs, replace
from interp_kernel.notebook.metrics import number
from interp_kernel.notebook.words import duration, plural

INDEX, SUMMARY = "index.html", "report.md"
MAX_CHARTS = 24
FIGURES_PER_RUN, MAX_FIGURES = 3, 2000
LISTED_RUNS = 20
MD_LISTED_RUNS, MD_ROWS, MD_TRACEBACK_LINES = 10, 200, 6
REASON_CHARS = 600
NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?")
COMPLETED, NOT_BEGUN = "completed", "not begun"
WORDS = {
    "failed": "a cell raised",
    "timeout": "a cell ran too long",
    "dead-kernel": "the kernel died",
    "dead-runner": "the run's own process was killed",
    "interrupted": "stopped by a signal",
    "running": "its end was never reported",
}


@dataclass(frozen=True)
class FailureGroup:
    """Runs that ended the same way in the same cell of the same notebook; `evalue` is what the first of them said."""

    status: str
    notebook: str
    cell: int | None
    ename: str
    evalue: str
    cell_id: str
    traceback: tuple[str, ...]
    runs: list[Facts]

    @property
    def title(self) -> str:
        """What ended them, in a few words."""
        return f"{len(self.runs)} x {self.ename or self.status}"

    @property
    def reason(self) -> str:
        """The message; others of the group may have other numbers in it."""
        is_same = all(clip(run.get("evalue") or "") == self.evalue for run in self.runs)
        return self.evalue if is_same else f"{self.evalue} (and so on, with other numbers)"

    @property
    def place(self) -> str:
        """What the status means, and where it happened."""
        where = "" if self.cell is None else f" in cell {self.cell}"
        return WORDS.get(self.status, self.status) + where


@dataclass
class Report:
    """What the two pages say.

    Attributes:
        folder: Output folder of the batch.
        name: Name of the study.
        runs: Records in the order of the plan, each with `values`, `metrics`, `link` and `notebook_link`; a run that
            never began has the status `not begun`.
        figures: By the key of a run, its figures: id of the cell, data URI.
    """

    folder: Path
    name: str
    runs: list[Facts]
    figures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Counter[str]:
        """Runs by status, the completed first and those that never began last."""
        counts = Counter(run["status"] for run in self.runs)
        order = [COMPLETED, *sorted(counts.keys() - {COMPLETED, NOT_BEGUN}), NOT_BEGUN]
        return Counter({status: counts[status] for status in order if counts[status]})

    @cached_property
    def varied(self) -> list[str]:
        """Names of the values that differ between runs: the table's columns and the figures' axes."""
        named = dict.fromkeys(name for run in self.runs for name in run["values"])
        return [name for name in named if len({identity(run["values"].get(name)) for run in self.runs}) > 1]

    @cached_property
    def fixed(self) -> Facts:
        """Values that all runs share."""
        values = self.runs[0]["values"] if self.runs else {}
        left_out = (*self.varied, "repeat")
        return {name: value for name, value in values.items() if name not in left_out and value is not None}

    @cached_property
    def metrics(self) -> list[str]:
        """Names that any run recorded."""
        return list(dict.fromkeys(name for run in self.runs for name in run["metrics"]))

    @cached_property
    def failures(self) -> list[FailureGroup]:
        """What ended the runs that did not complete, the most frequent first."""
        groups: dict[tuple[Any, ...], FailureGroup] = {}
        for run in self.runs:
            if run["status"] not in (COMPLETED, NOT_BEGUN):
                place = run["status"], run["values"]["notebook"], run.get("failed_cell"), run.get("ename") or ""
                reason = clip(run.get("evalue") or "")
                more = run.get("failed_cell_id") or "", tuple(run.get("traceback") or ())
                alike = *place, clip(NUMBERS.sub("0", run.get("evalue") or ""))
                groups.setdefault(alike, FailureGroup(*place, reason, *more, [])).runs.append(run)
        return sorted(groups.values(), key=lambda group: -len(group.runs))

    @cached_property
    def charts(self) -> list[Chart]:
        """A figure for each metric that varies with something."""
        done = [run for run in self.runs if run["status"] == COMPLETED]
        charts = (draw_metric(name, done, self.varied) for name in self.metrics[:MAX_CHARTS])
        return [chart for chart in charts if chart is not None]

    @cached_property
    def facts(self) -> list[str]:
        """Time, workers, retries, cost and code in a few words each."""
        spent = sum(run.get("seconds") or 0 for run in self.runs)
        retries = sum(len(run.get("attempts") or ()) for run in self.runs)
        cost = sum((run.get("cost") or {}).get("amount") or 0 for run in self.runs)
        workers = {worker.get("generation"): worker for run in self.runs for worker in run.get("workers") or ()}
        names = dict.fromkeys(str(worker.get("model_name")) for worker in workers.values())
        commits = dict.fromkeys(_commit(run["git"]) for run in self.runs if run.get("git"))
        return [
            f"{duration(wall(self.runs))} from first to last, {duration(spent)} in runs",
            *([f"{plural(len(workers), 'worker')} with {', '.join(names)}"] if workers else []),
            *([plural(retries, "attempt") + " begun anew"] if retries else []),
            *([f"cost about {cost:.2f}"] if cost else []),
            *commits,
        ]

    @property
    def is_complete(self) -> bool:
        """Whether every planned run completed."""
        return set(self.counts) <= {COMPLETED}

    @property
    def go_on(self) -> str:
        """The command that runs what is missing."""
        return f"interp-kernel batch {shlex.quote(str(self.folder / 'study.yaml'))} --resume"

    def describe(self, run: Facts) -> str:
        """What sets a run apart from the others."""
        return ", ".join(f"{name} {shorten(run['values'].get(name), 40)}" for name in self.varied) or run["key"]


def write_report(folder: Path) -> Path:
    """Write the page of a batch and its summary for agents, from what lies in the folder.

    Args:
        folder: Output folder of a batch, finished or not.

    Returns:
        Path of `index.html`, which loads nothing from anywhere; `report.md` lies beside it.
    """
    report = gather(Path(folder))
    replace(report.folder / SUMMARY, markdown(report))
    return replace(report.folder / INDEX, page(report))


# ---------------------------------------------------------------------------------------------- reading


def gather(folder: Path) -> Report:
    """Read the records of a batch and the figures of its notebooks."""
    planned = {run["key"]: {**run, "status": NOT_BEGUN} for run in _read_lines(folder / "plan.jsonl")}
    runs = list((planned | {run["key"]: run for run in read_runs(folder)}).values())
    report = Report(folder, str(_read_study(folder).get("name") or folder.resolve().name), runs)
    for run in runs:
        run["metrics"], run["seconds"] = run.get("metrics") or {}, run.get("seconds")
        run["values"] = _values(run)
        run["link"], run["notebook_link"] = (_link(folder, run.get(kind)) for kind in ("html", "output"))
    drawn = [run for run in runs if run["notebook_link"]][:MAX_FIGURES]
    limit = max(1, min(FIGURES_PER_RUN, MAX_FIGURES // max(1, len(drawn))))
    with ThreadPoolExecutor(4) as pool:  # decoding and encoding pictures leaves Python's lock free
        found = pool.map(lambda run: _figures(folder / run["output"], limit), drawn)
        report.figures |= {run["key"]: figures for run, figures in zip(drawn, found, strict=True) if figures}
    return report


def _values(run: Facts) -> Facts:
    """Everything that may set a run apart: its parameters, and what is not one of them."""
    model = run.get("model")
    name = model.get("model_name") if isinstance(model, dict) else model
    notebook = Path(run["notebook"]).stem
    return {"notebook": notebook, "model_name": name, **run["parameters"], "repeat": run.get("repeat")}


def _read_lines(path: Path) -> list[Facts]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []  # a folder of single runs has no plan


def _read_study(folder: Path) -> Facts:
    try:
        study = json.loads((folder / "study.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return study if isinstance(study, dict) else {}


def _figures(notebook: Path, limit: int) -> list[tuple[str, str]]:
    from interp_kernel.notebook.batch.thumbnails import thumbnails

    try:
        return list(thumbnails(json.loads(notebook.read_text(encoding="utf-8")), limit))
    except (OSError, ValueError, KeyError):
        return []  # half a notebook, as a full disk leaves; the record tells what happened


def _link(folder: Path, name: str | None) -> str | None:
    return quote(name) if name and (folder / name).exists() else None


# ------------------------------------------------------------------------------------------------- HTML


def page(report: Report) -> str:
    """The batch as one page."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("interp_kernel.notebook.batch")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "sort_key": sort_key}
    return environment.get_template("batch.html.j2").render(report=report, listed=LISTED_RUNS)


def sort_key(value: Any) -> str:
    """What a column is sorted by: numbers as numbers."""
    as_number = number(value)
    return repr(as_number) if as_number is not None else "" if value is None else shown(value)


# --------------------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The batch in a few kilobytes: counts, failures with the reason and the cell, then a table of runs."""
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items()) or "none"
    lines = [f"# {report.name}", "", f"Of {plural(len(report.runs), 'run')}: {counts}. {'; '.join(report.facts)}."]
    lines += [f"All runs: {', '.join(f'{name} = {shown(value)}' for name, value in report.fixed.items())}.", ""]
    for group in report.failures:
        lines += _failure_lines(report, group)
    lines += [*_table_lines(report), "", "Every record in full: runs.jsonl; the last line of a key counts."]
    if not report.is_complete:
        lines.append(f"To go on: {report.go_on}")
    return "\n".join(lines) + "\n"


def _failure_lines(report: Report, group: FailureGroup) -> list[str]:
    name = f" ({group.cell_id})" if group.cell_id else ""
    lines = [f"## {group.title}: {group.place}{name}", "", group.reason, ""]
    lines += ["```", *group.traceback[-MD_TRACEBACK_LINES:], "```", ""] if group.traceback else []
    lines += [f"- {report.describe(run)}: {run['output']}" for run in group.runs[:MD_LISTED_RUNS]]
    more = len(group.runs) - MD_LISTED_RUNS
    return [*lines, *([f"- and {more} more"] if more > 0 else []), ""]


def _table_lines(report: Report) -> list[str]:
    head = ["status", *report.varied, *report.metrics, "seconds", "notebook"]
    lines = ["## Runs", "", _row(head), _row(["---"] * len(head))]
    for run in report.runs[:MD_ROWS]:
        values = [run["values"].get(name) for name in report.varied]
        values += [run["metrics"].get(name) for name in report.metrics]
        lines.append(_row([run["status"], *map(shown, values), shown(run.get("seconds")), run["output"]]))
    more = len(report.runs) - MD_ROWS
    return [*lines, *(["", f"{plural(more, 'more row')} in runs.jsonl."] if more > 0 else [])]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# ------------------------------------------------------------------------------------------------ words


def shown(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clip(text: str) -> str:
    """The beginning of a long message."""
    return text if len(text) <= REASON_CHARS else text[:REASON_CHARS] + " ..."


def wall(runs: Iterable[Facts]) -> float:
    """Seconds from the first start to the last end."""
    times = [datetime.fromisoformat(run[name]) for run in runs for name in ("started", "ended") if run.get(name)]
    return (max(times) - min(times)).total_seconds() if times else 0.0


def _commit(git: Facts) -> str:
    return f"commit {git['commit'][:9]}{' with changes' if git.get('is_dirty') else ''}"
