"""`interp-kernel runs`: what the records of a folder say, as a table, one by one, side by side, and for pandas.

In Python, `pandas.DataFrame(rows("out/study"))` is the table that `runs export` writes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError
from interp_kernel.notebook.files import RUNS, read_record, read_runs

Record = dict[str, Any]
SEPARATE = ("cells", "workers", "attempts", "traceback")
"""Parts of a record that hold many things of a kind; the row of a run leaves them out, but for its last worker."""
PASSING = re.compile(
    r"key|attempt|batch|folder|output|html|started|ended|seconds|worker\.(pid|generation|host|load_s)|cost\..*|totals\..*"
)
"""Columns that differ between any two runs and explain nothing."""
CELL_COLUMNS = ("CELL", "STATUS", "SECONDS", "CALLS", "COLD", "LOAD", "QUEUE", "RUN", "TRANSFER", "SENT", "RECEIVED")
HASH = re.compile(r"[0-9a-f]{64}")


def records(folder: str | Path) -> list[Record]:
    """The newest record of every run below a folder, folder by folder, each in the order in which they began.

    Raises:
        NotebookError: There are no records.
    """
    found = [
        {**record, "folder": str(file.parent)}
        for file in sorted(Path(folder).rglob(RUNS))
        for record in read_runs(file.parent)
    ]
    if not found:
        raise NotebookError(
            f"{folder} has no records of runs ({RUNS}); expected the folder in which `interp-kernel run` or "
            "`interp-kernel batch` wrote."
        )
    return found


def rows(folder: str | Path) -> list[Record]:
    """One flat row for each run below a folder, as `pandas.DataFrame` and `pandas.read_json` take them.

    Names of nested values are joined by dots, as in `parameters.layer`; `worker.` is the worker used last.

    Raises:
        NotebookError: There are no records.
    """
    return [row(record) for record in records(folder)]


def row(record: Mapping[str, Any]) -> Record:
    """A record as one flat row."""
    kept = {name: value for name, value in record.items() if name not in SEPARATE}
    workers = record.get("workers") or [{}]
    return dict(_flat({**kept, "worker": workers[-1]}))


def find(run: str, folder: str | Path) -> Record:
    """The record that a user means: an executed notebook's, or that of the run whose key begins so.

    Raises:
        NotebookError: The notebook has no record, or no key begins so, or several do.
    """
    path = Path(run)
    if path.suffix == ".ipynb":
        if not path.exists():
            raise NotebookError(f"{run} doesn't exist; expected an executed notebook or the key of a run.")
        if (record := read_record(path)) is None:
            raise NotebookError(f"{run} holds no record of a run; it was not executed by `interp-kernel`.")
        return {**record, "folder": str(path.parent)}
    known = records(folder)
    matching = [record for record in known if record["key"].startswith(run)]
    if len(matching) == 1:
        return matching[0]
    what = f"fits {len(matching)} runs" if matching else f"fits none of the {len(known)} runs"
    raise NotebookError(
        f"The key {run!r} {what} in {folder}. Give more of it, or the path of the executed notebook; "
        f"`interp-kernel runs list {folder}` shows the keys."
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Columns in which two runs differ, with both values; one that a run doesn't have counts as None."""
    left, right = row(a), row(b)
    return {
        name: (left.get(name), right.get(name))
        for name in {**left, **right}
        if not PASSING.fullmatch(name) and left.get(name) != right.get(name)
    }


def list_runs(arguments: Namespace) -> int:
    """`interp-kernel runs list`."""
    found = records(arguments.folder)
    table = [("KEY", "STATUS", "CELL", "SECONDS", "TRY", "NOTEBOOK", "VARIED", "ERROR"), *map(_listed, found)]
    _print(table)
    counts = Counter(record["status"] for record in found)
    print(f"\n{len(found)} runs: {', '.join(f'{count} {status}' for status, count in counts.most_common())}.")
    return 0


def show_run(arguments: Namespace) -> int:
    """`interp-kernel runs show`: the record as names and values, its cells as a table, earlier attempts, traceback."""
    record = find(arguments.runs[0], arguments.folder)
    packages = record["environment"].pop("packages", {})
    _print([(name, _text(value)) for name, value in row(record).items() if value not in (None, "", [], {})])
    print("packages  " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    if record.get("cells"):
        print()
        _print([CELL_COLUMNS, *map(_cell, record["cells"])])
    for earlier in record.get("attempts") or []:
        print(f"\nAttempt {earlier['attempt']} ended as {earlier['status']}. {_error(earlier)}")
    if record.get("traceback"):
        print("\n" + "\n".join(record["traceback"]))
    return 0


def diff_runs(arguments: Namespace) -> int:
    """`interp-kernel runs diff`: what differs in what went in, in where it ran, and in what came out."""
    a, b = (find(run, arguments.folder) for run in arguments.runs)
    found = differences(a, b)
    _print([("", a["key"], b["key"]), *((name, _text(x), _text(y)) for name, (x, y) in found.items())])
    if not found:
        print("Nothing differs but times.")
    return 0


def export_runs(arguments: Namespace) -> int:
    """`interp-kernel runs export`: one flat row for each run, as JSON or CSV on stdout."""
    found = rows(arguments.folder)
    print(as_csv(found) if arguments.format == "csv" else json.dumps(found, indent=1) + "\n", end="")
    return 0


VERBS = {"list": list_runs, "show": show_run, "diff": diff_runs, "export": export_runs}


def as_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with the columns of all of them; lists are JSON, None is empty."""
    columns = list({name: None for row in found for name in row})
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for one in found:
        writer.writerow({name: json.dumps(value) if isinstance(value, list) else value for name, value in one.items()})
    return text.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def _listed(record: Record) -> tuple[str, ...]:
    parameters = record.get("parameters") or {}
    varied = [name for name in record.get("varied") or parameters if name in parameters]
    failed = record.get("failed_cell")
    return (
        record["key"],
        record["status"],
        "" if failed is None else str(failed),
        f"{record.get('seconds') or 0:.1f}",
        str(record.get("attempt", 1)),
        str(record["notebook"]),
        " ".join(f"{name}={_text(parameters[name], 24)}" for name in varied),
        _error(record),
    )


def _error(record: Mapping[str, Any]) -> str:
    return _text(f"{record['ename']}: {record.get('evalue')}", 80) if record.get("ename") else ""


def _cell(cell: Mapping[str, Any]) -> tuple[str, ...]:
    calls = cell.get("calls") or []

    def total(name: str, unit: float = 1) -> str:
        return f"{sum(call.get(name) or 0 for call in calls) / unit:.3g}" if calls else ""

    source = cell.get("source_index")
    return (
        "added" if source is None else str(source),
        cell["status"],
        f"{cell.get('seconds') or 0:.3g}",
        str(len(calls) or ""),
        str(sum(bool(call.get("is_cold")) for call in calls)) if calls else "",
        *(total(name) for name in ("load_s", "queue_s", "run_s", "transfer_s")),
        *(f"{total(name, 1e6)} MB" if calls else "" for name in ("sent_bytes", "received_bytes")),
    )


def _text(value: Any, width: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    if HASH.fullmatch(text):
        return text[:12]
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _print(table: Iterable[Sequence[str]]) -> None:
    """Columns under each other; the last one is as wide as it is."""
    lines = list(table)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    for line in lines:
        print("  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip())
