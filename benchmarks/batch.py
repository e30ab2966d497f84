"""Batches: 32 notebooks on one warm worker, the engine's cost per cell beside papermill's, 1,000 runs, memory."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.measure import Figure, Samples, Section, median
from benchmarks.notebook import OURS, connected, kernel, model_name
from interp_kernel.client import InterpClient

NOTEBOOKS, CELLS, JOBS = 32, 10, 2
CELL_S = 0.25
STARTS = 5
ENGINE_CELLS, LARGE_CELLS, LARGE_MB = {"interp": 200, "papermill": 100}, {"interp": 400, "papermill": 10}, 50
ROUNDS = 3
RUNS = 1000
FEW, MANY = 10, 100
FORWARD = "model(**tokenizer('The Eiffel Tower is in the city of', return_tensors='pt')).logits.sum().item()"


def measure() -> Section:
    """All figures of batches, one after the other."""
    with tempfile.TemporaryDirectory(prefix="ikb", dir="/tmp") as name:
        folder = Path(name)
        ratio, loads, told = one_warm_worker(folder)
        samples, figures = engines(folder)
        plan_s, report_s = many_runs(folder)
        few, many = (peak_mb(folder, runs) for runs in (FEW, MANY))
    return Section(
        "Batch",
        f"{NOTEBOOKS} notebooks of {CELLS} remote cells on one warm worker, with `-j {JOBS}`, beside the same calls "
        f"made alone by a client plus {NOTEBOOKS} kernel starts / {JOBS}. The time per cell of notebooks of trivial "
        f"cells, from the start of the second to the end of the last as papermill's metadata tell them: our engine and "
        f"papermill's own in turn, on plain ipykernel, after a first cell that put nothing or {LARGE_MB} MB into the "
        f"notebook. Planning {RUNS:,} runs and writing their report. The largest memory of the process that drives a "
        f"batch of {FEW} and of {MANY} runs.",
        "ms",
        samples,
        [
            Figure(f"batch over pure compute + starts / {JOBS}", ratio, 1.15, "times"),
            Figure("model loads in all", loads, 1, ""),
            *figures,
            Figure(f"plan and report of {RUNS:,} runs", plan_s + report_s, 10, "s"),
            Figure(f"memory with {MANY} runs over {FEW}", many / few, 1.05, "times"),
        ],
        [told, f"Plan {plan_s:.1f} s, report {report_s:.1f} s. Memory {few:.0f} MB and {many:.0f} MB."],
    )


# ----------------------------------------------------------------------------------------- one worker


def one_warm_worker(folder: Path) -> tuple[float, int, str]:
    """Total time over its parts, model loads, and both in words."""
    starts = []
    for _ in range(STARTS):
        with kernel(OURS) as started:
            starts.append(started.start_s)
    with connected() as client:
        passes = passes_for(client, CELL_S)
        alone = median([timed(client, passes) for _ in range(20)])
        body = f"%%remote\nfor _ in range({passes}):\n    {FORWARD}"
        sources = [notebook(folder / f"{i:02}.ipynb", [body] * CELLS, "interp") for i in range(NOTEBOOKS)]
        outcome = batch(folder, sources, models=[model_name()], jobs=JOBS)
        from interp_kernel.notebook.files import read_runs

        records = read_runs(Path(outcome["folder"]))
    if outcome["completed"] != NOTEBOOKS:
        raise RuntimeError(f"Of {NOTEBOOKS} notebooks {outcome['completed']} are complete.")
    loads = len({w["generation"] for r in records for w in r["workers"]}) + sum(
        r["totals"]["cold_calls"] for r in records
    )
    compute, start = alone * NOTEBOOKS * CELLS, median(starts) * NOTEBOOKS / JOBS
    told = (
        f"The batch took {outcome['seconds']:.1f} s: {NOTEBOOKS * CELLS} calls of {alone * 1e3:.0f} ms are "
        f"{compute:.1f} s, {NOTEBOOKS} kernel starts of {median(starts) * 1e3:.0f} ms by {JOBS} are {start:.1f} s."
    )
    return outcome["seconds"] / (compute + start), loads, told


def passes_for(client: InterpClient, seconds: float) -> int:
    """How many forward passes take so long."""
    timed(client, 5)
    return max(1, round(seconds / (timed(client, 20) / 20)))


def timed(client: InterpClient, passes: int) -> float:
    """Seconds of a call with so many forward passes."""
    start = time.perf_counter()
    client.run(forward, passes)
    return time.perf_counter() - start


def forward(model: Any, tokenizer: Any, passes: int) -> None:
    """What each cell of the notebooks does."""
    for _ in range(passes):
        model(**tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")).logits.sum().item()


def notebook(path: Path, cells: list[str], kernel_name: str) -> Path:
    """A notebook of code cells; the first one is tagged `parameters`."""
    ready = [new_code_cell(cell) for cell in cells]
    spec = {"name": kernel_name, "display_name": kernel_name, "language": "python"}
    nbformat.write(new_notebook(cells=ready, metadata={"kernelspec": spec}), path)
    return path


def study(folder: Path, notebooks: list[Path], **fields: Any) -> Path:
    """A study whose results go into a folder of its own."""
    output = tempfile.mkdtemp(prefix="out", dir=folder)
    path = folder / "study.yaml"
    path.write_text(json.dumps({"notebooks": [str(path) for path in notebooks], "output": output, **fields}))
    return path


def batch(folder: Path, notebooks: list[Path], **fields: Any) -> dict[str, Any]:
    """Run a study by the command; returns its line of JSON."""
    command = [sys.executable, "-m", "interp_kernel.cli", "batch", str(study(folder, notebooks, **fields))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if not ran.stdout:
        raise RuntimeError(f"The batch ended without a result: {ran.stderr[-500:]}")
    outcome: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return outcome


# -------------------------------------------------------------------------------------------- engines


def engines(folder: Path) -> tuple[Samples, list[Figure]]:
    """Milliseconds per cell of both engines, without and with much output in the notebook."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    samples: Samples = {}
    for megabytes, counts in ((0, ENGINE_CELLS), (LARGE_MB, LARGE_CELLS)):
        for _ in range(ROUNDS):
            for engine, count in counts.items():
                name = f"{engine}, {megabytes} MB in the notebook"
                samples.setdefault(name, []).append(cell_ms(folder, engine, count, megabytes))
    ours, theirs = (median(samples[f"{engine}, 0 MB in the notebook"]) for engine in ("interp", "papermill"))
    large = median(samples[f"interp, {LARGE_MB} MB in the notebook"])
    return samples, [
        Figure("our cost per cell over papermill's", ours / theirs, 1, "times"),
        Figure(f"our cost per cell with {LARGE_MB} MB over none", large / ours, 1.5, "times"),
    ]


def cell_ms(folder: Path, engine: str, count: int, megabytes: int) -> float:
    """What a trivial cell costs in a notebook of `count`."""
    import papermill
    from papermill.engines import papermill_engines

    from interp_kernel.notebook.engine import InterpEngine

    papermill_engines.register("interp", InterpEngine)
    line = "'x' * 99 + '\\n'"
    # Displayed rather than printed: what a cell prints is bounded.
    first = f"display({{'text/plain': ({line}) * {megabytes * 10_000}}}, raw=True)"
    source = notebook(folder / "engine.ipynb", [first, *["x = 1"] * count], "python3")
    target = folder / "executed.ipynb"
    name = "interp" if engine == "interp" else None
    papermill.execute_notebook(source, target, engine_name=name, progress_bar=False)
    if target.stat().st_size < megabytes * 1e6:
        raise RuntimeError(f"The executed notebook has {target.stat().st_size} bytes.")
    times = [cell.metadata.papermill for cell in nbformat.read(target, as_version=4).cells[1:]]
    end, start = (datetime.datetime.fromisoformat(t) for t in (times[-1]["end_time"], times[0]["start_time"]))
    return (end - start).total_seconds() / count * 1e3


# ------------------------------------------------------------------------------------------- many runs


def many_runs(folder: Path) -> tuple[float, float]:
    """Seconds to plan 1,000 runs, and to write the report of as many, made of one real one."""
    from interp_kernel.notebook.batch.batch import write_plan
    from interp_kernel.notebook.batch.report import write_report
    from interp_kernel.notebook.batch.study import plan, read_study
    from interp_kernel.notebook.files import RUNS as FILE
    from interp_kernel.notebook.files import append, read_runs

    cells = ["layer = 0", "import interp_kernel, matplotlib.pyplot as plt", "plt.plot([1, 2, layer]);"]
    source = notebook(folder / "one.ipynb", [*cells, "interp_kernel.record('score', layer * 2)"], "python3")
    tag_parameters(source)
    outcome = batch(folder, [source], grid={"layer": [0]})
    (record,) = read_runs(Path(outcome["folder"]))
    executed = Path(outcome["folder"], record["output"])
    start = time.perf_counter()
    many = read_study(
        study(
            folder,
            [source],
            grid={
                "layer": list(range(RUNS // 10)),
            },
            repeats=10,
        )
    )
    runs = plan(many)
    write_plan(many, runs)
    planned = time.perf_counter()
    (many.folder / FILE).touch()
    for run in runs:
        for path in (executed, executed.with_suffix(".html")):
            os.link(path, (many.folder / run.output).with_suffix(path.suffix))
        own = {"key": run.key, "parameters": run.parameters, "output": run.output, "label": run.label}
        append(many.folder, {**record, **own, "html": Path(run.output).with_suffix(".html").name, "varied": ["layer"]})
    begun = time.perf_counter()
    write_report(many.folder)
    return planned - start, time.perf_counter() - begun


def tag_parameters(path: Path) -> None:
    """Tag the first cell."""
    stored = nbformat.read(path, as_version=4)
    stored.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(stored, path)


def peak_mb(folder: Path, runs: int) -> float:
    """Largest resident memory of the process that drives a batch of so many runs, at its end."""
    source = notebook(folder / "small.ipynb", ["layer = 0", "print('x' * 1000 * layer)"], "python3")
    tag_parameters(source)
    path = study(folder, [source], grid={"layer": list(range(runs))}, jobs=JOBS)
    # The kernel's own count of resources would begin with what this process has, as it does for every child.
    code = (
        "import re, sys\nfrom interp_kernel.cli import main\ncode = main(['batch', sys.argv[1]])\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])\nsys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1]) / 1e3
