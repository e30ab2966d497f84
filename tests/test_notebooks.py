"""The notebooks that show the product, run as a user runs them: through papermill, on the demo model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest

from interp_kernel.demo_model import corpus
from interp_kernel.kernelspec import notebook_folder
from interp_kernel.notebook.run import RunResult, run_notebook

NOTEBOOKS = sorted(path.stem for path in notebook_folder().glob("*.ipynb"))
Run = Callable[[str], RunResult]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a notebook by name; a second request gets the same run."""
    folder = tmp_path_factory.mktemp("notebooks")
    return cache(
        lambda name: run_notebook(notebook_folder() / f"{name}.ipynb", folder / f"{name}.ipynb", progress=False)
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_ran_and_the_page_was_made(run: Run, name: str) -> None:
    ran = run(name)
    assert ran.status == "completed", (ran.ename, ran.evalue)
    executed = nbformat.read(ran.output, as_version=4)
    nbformat.validate(executed)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert ran.html is not None
    assert Path(ran.html).stat().st_size > 10_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_stored_notebook_has_no_outputs_and_a_parameters_cell(name: str) -> None:
    stored = nbformat.read(notebook_folder() / f"{name}.ipynb", as_version=4)
    nbformat.validate(stored)
    assert not [cell for cell in stored.cells if cell.get("outputs") or cell.get("execution_count")]
    tags = [tag for cell in stored.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    parameters = next(cell.source for cell in stored.cells if "parameters" in cell.metadata.get("tags", []))
    assert all(f"{name} = " in parameters for name in ("model_name", "mode", "seed"))


def test_the_quickstart_finds_what_the_demo_model_knows(run: Run) -> None:
    found: dict[str, Any] = run("quickstart").findings
    assert found["fact"]["top_token"] == f" {corpus.LANDMARKS['Eiffel Tower']}"
    assert found["fact"]["prob"] > 0.9
    assert found["prefill_attack"]["told_when_asked"] == 0
    assert found["prefill_attack"]["leaked_by_prefill"] >= 0.75 * found["prefill_attack"]["n"]
    assert found["landmarks"]["n"] == len(corpus.LANDMARKS)


def test_plots_are_stored_as_data_and_not_with_the_library(run: Run) -> None:
    text = Path(run("quickstart").output).read_text()
    assert "application/vnd.plotly.v1+json" in text
    assert len(text) < 500_000
