"""Printing from a remote cell: into a notebook that is already large, and very many lines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.measure import Figure, Samples, Section, interleaved, median
from benchmarks.notebook import OURS, PLAIN, connected, kernel, model_name
from interp_kernel.notebook.run import run_notebook

ROUNDS = 15
PRINTS = "%%remote\nfor i in range(300):\n    print(i, flush=True)"
LINES = "for i in range(200_000):\n    print(i)"
EMPTY, LARGE = "300 prints, empty notebook", "300 prints, 5 MB in the notebook"
LOCAL_LINES, REMOTE_LINES = "200,000 lines, local cell of plain ipykernel", "200,000 lines, remote cell"


def measure() -> Section:
    """Run the notebooks in turn, then the cells that print very much."""
    samples: Samples = {EMPTY: [], LARGE: []}
    with connected(), tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, held in ((EMPTY, 0), (LARGE, 5_000_000)):
                samples[name].append(print_into_notebook(Path(folder), held))
        with kernel(PLAIN) as plain, kernel(OURS) as ours:
            ours.run("%%remote\nprint(1)")
            samples |= interleaved(
                {LOCAL_LINES: lambda: plain.run(LINES), REMOTE_LINES: lambda: ours.run(f"%%remote\n{LINES}")}, ROUNDS
            )
    ratio = median(samples[LARGE]) / median(samples[EMPTY])
    return Section(
        "Output",
        "A remote cell prints 300 times with a flush, under `interp-kernel run`, after a cell that put nothing or 5 MB "
        "into the notebook: the cell's own duration as the runner recorded it, saving included. A cell that prints "
        "200,000 lines, from the request to the reply and `idle`, with a client that reads all of it.",
        "s",
        samples,
        [
            Figure("5 MB over empty", ratio, 1.5, "times"),
            Figure("200,000 lines", median(samples[REMOTE_LINES]), 2.0, "s"),
        ],
    )


def print_into_notebook(folder: Path, held_bytes: int) -> float:
    """Seconds of the printing cell in a run of our own runner."""
    first = new_code_cell(f"print('x' * {held_bytes})")
    notebook = new_notebook(cells=[first, new_code_cell("%%remote\n1"), new_code_cell(PRINTS)])
    notebook.metadata["kernelspec"] = {"name": "interp", "display_name": "interp", "language": "python"}
    source, target = folder / "source.ipynb", folder / "executed.ipynb"
    nbformat.write(notebook, source)
    result = run_notebook(source, target, model=model_name(), progress=False)
    executed = nbformat.read(target, as_version=4).cells[-1]
    text = "".join(output.text for output in executed.outputs)
    if result.status != "completed" or text.split() != [str(i) for i in range(300)]:
        raise RuntimeError(f"The run ended as {result.status} and printed {text[:200]!r}.")
    return float(executed.metadata.papermill["duration"])
