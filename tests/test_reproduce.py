"""`interp-kernel reproduce`, and the promise behind it: a notebook gives the same numbers however it is run."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from interp_kernel.cli import main
from interp_kernel.errors import NotebookError, SpecError
from interp_kernel.kernelspec import notebook_folder
from interp_kernel.notebook.compare import CLOSE, EQUAL, Tolerance, compare_notebooks, worst_status
from interp_kernel.notebook.metrics import read_metrics
from interp_kernel.notebook.reproduce import reproduce
from interp_kernel.notebook.run import run_notebook
from tests.helpers_kernel import notebook
from tests.modal_loopback import Loopback

SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
STUDY = notebook_folder() / "layer_prompt_grid.ipynb"
RECORDED = "from interp_kernel import record\nvalue = float(open('value.txt').read())\n"


def write(folder: Path, *cells: Any) -> Path:
    """A notebook of code cells, given as source text or as ready cells."""
    ready = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    nbformat.write(new_notebook(cells=ready, metadata={"kernelspec": SPEC}), folder / "in.ipynb")
    return folder / "in.ipynb"


def ran(folder: Path, *cells: Any, **options: Any) -> Path:
    """An executed notebook in a folder of its own, as `interp-kernel run` leaves it."""
    result = run_notebook(write(folder, *cells), folder / "out" / "first.ipynb", progress=False, **options)
    return result.output


def tagged(source: str, *tags: str) -> Any:
    return new_code_cell(source, metadata={"tags": list(tags)})


def last_json(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


def test_what_moved_is_named_cell_by_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "value.txt").write_text("0.5")
    before = ran(
        tmp_path,
        new_markdown_cell("# Title"),
        f"{RECORDED}record('recovered', value)",
        "print('same')\nprint(f'value {value}')",
        tagged("import time; time.time()", "volatile"),
        "value > 0",
    )
    stored = before.read_bytes()
    again = ["reproduce", str(before), "-o", str(tmp_path / "again")]
    assert main(again) == 0
    verdict = last_json(capsys.readouterr().out)
    assert (verdict["status"], verdict["is_reproduced"], verdict["n_cells"], verdict["cells"]) == ("equal", True, 3, [])
    assert Path(verdict["run"]["output"]) == tmp_path / "again" / "first.ipynb"

    (tmp_path / "value.txt").write_text("0.75")
    assert main(again) == 1
    said = capsys.readouterr()
    assert "cell 1" in said.err
    assert "metric 'recovered': 0.5 -> 0.75" in said.err
    assert "stdout, line 2: 0.5 -> 0.75" in said.err
    assert "3 code cells: 1 equal, 2 changed." in said.err
    changed = last_json(said.out)
    assert [(cell["index"], cell["status"]) for cell in changed["cells"]] == [(1, "changed"), (2, "changed")]
    assert changed["cells"][0]["changes"][0] == {
        "where": "metric 'recovered'",
        "before": 0.5,
        "after": 0.75,
        "is_close": False,
    }

    assert main([*again, "--atol", "0.15", "--rtol", "0.25"]) == 0  # neither would be enough
    assert last_json(capsys.readouterr().out)["status"] == "close"
    assert before.read_bytes() == stored


def test_runs_with_its_own_parameters_in_the_folder_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "value.txt").write_text("2")
    cells = tagged("factor = 1", "parameters"), "print(factor * int(open('value.txt').read()))"
    before = ran(tmp_path, *cells, parameters={"factor": 21})
    found = reproduce(before, tmp_path / "again.ipynb", progress=False)
    assert (found.status, found.run.status) == (EQUAL, "completed")
    assert "42\n" in found.run.output.read_text().replace("\\n", "\n")


def test_code_that_was_edited_in_between_is_named(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def answer():\n    return 42\n")
    before = ran(tmp_path, "from helper import answer\nprint(answer())")
    (tmp_path / "helper.py").write_text("def answer():\n    return 43\n")
    found = reproduce(before, tmp_path / "again.ipynb", progress=False)
    lines = found.describe()
    assert "    stdout: 42 -> 43" in lines
    assert "what else differs between the two runs:" in lines
    ((name, (first, second)),) = found.around.items()
    assert name == f"hashes.sources.{tmp_path / 'helper.py'}"
    assert first != second
    assert f"    {name}: {first[:12]} -> {second[:12]}" in lines


def test_a_run_that_breaks_where_the_first_did_not(tmp_path: Path) -> None:
    (tmp_path / "value.txt").write_text("1")
    before = ran(tmp_path, "print(1 / int(open('value.txt').read()))", "print('after')")
    (tmp_path / "value.txt").write_text("0")
    found = reproduce(before, tmp_path / "again.ipynb", progress=False)
    assert (found.run.status, found.is_reproduced) == ("failed", False)
    assert [cell.status for cell in found.cells] == ["changed", "missing"]
    assert "2 code cells: 1 changed, 1 ran in one of the two runs only." in found.describe()


def test_a_failure_that_fails_again_is_reproduced(tmp_path: Path) -> None:
    before = ran(tmp_path, "print(1)", "1 / 0", "print('never')")
    found = reproduce(before, tmp_path / "again.ipynb", progress=False)
    assert (found.run.status, found.status) == ("failed", EQUAL)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotebookError, match=r"in\.ipynb holds no outputs, .* Run it first: interp-kernel run"):
        reproduce(write(tmp_path, "print(1)"), tmp_path / "again.ipynb")
    before = write(tmp_path, new_code_cell("1", execution_count=1))
    with pytest.raises(NotebookError, match="is the notebook itself"):
        reproduce(before, before)
    with pytest.raises(SpecError, match="'colour' is not known"):
        reproduce(before, tmp_path / "again.ipynb", model='{"colour": 1}')
    with pytest.raises(SystemExit):
        main(["reproduce", str(before), "--rtol", "-1"])
    assert "-1 is not a tolerance; expected 0 or a number above" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the same, however it is run


def by_run(folder: Path, mode: str = "local") -> Any:
    """`interp-kernel run`."""
    result = run_notebook(STUDY, folder / f"{mode}.ipynb", {"mode": mode}, progress=False)
    assert result.status == "completed", (result.ename, result.evalue)
    return json.loads(result.output.read_text())


def by_modal(folder: Path) -> Any:
    """The same with its worker in a container at Modal, through the control plane on loopback."""
    with Loopback():
        return by_run(folder, "modal")


def by_papermill(folder: Path) -> Any:
    """papermill's own command and engine, with our kernel from its kernelspec."""
    target = folder / "papermill.ipynb"
    assert main(["kernelspec", "install", "--user"]) == 0
    command = [sys.executable, "-m", "papermill", str(STUDY), str(target), "-p", "mode", "local", "--no-progress-bar"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


def by_kernel(folder: Path) -> Any:
    """A front end: each cell sent to the kernel over Jupyter's protocol, its messages stored as JupyterLab does."""
    nb = nbformat.read(STUDY, as_version=4)
    with notebook(folder, PLOTLY_RENDERER="plotly_mimetype") as kernel:
        for cell in nb.cells:
            if cell.cell_type == "code":
                ran = kernel.ok(cell.source)
                cell.execution_count = ran.reply["execution_count"]
                cell.outputs = [
                    nbformat.v4.output_from_msg({"header": {"msg_type": kind}, "content": content})
                    for kind, content in ran.outputs
                    if kind in ("stream", "display_data", "execute_result")
                ]
    return json.loads(nbformat.writes(nb))


def by_mcp(folder: Path) -> Any:
    """An agent, through the MCP server."""
    from tests.helpers_mcp import call, server

    path = Path(shutil.copy(STUDY, folder / "agent.ipynb"))

    async def run() -> None:
        async with server(folder) as client:
            opened = await call(client, "start_session_resume_notebook", notebook_path=str(path), rerun=False)
            session = opened["session_id"]
            state = await call(client, "run_all", session_id=session, wait_s=60)
            while state.get("state") in ("running", "queued"):
                state = await call(client, "wait", session_id=session, wait_s=60)
            await call(client, "shutdown_session", session_id=session)

    asyncio.run(run())
    return json.loads(path.read_text())


PATHS: dict[str, Callable[[Path], Any]] = {
    "kernel": by_kernel,
    "papermill": by_papermill,
    "modal": by_modal,
    "mcp": by_mcp,
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return by_run(tmp_path_factory.mktemp("local"))


def without_injected(executed: Any) -> Any:
    """The cells of the source alone: papermill gives the cell that it adds a random id."""
    ids = {cell["id"] for cell in json.loads(STUDY.read_text())["cells"]}
    return {**executed, "cells": [cell for cell in executed["cells"] if cell["id"] in ids]}


@pytest.mark.parametrize("way", PATHS)
def test_every_way_to_run_a_notebook_gives_the_same_numbers(way: str, local: Any, tmp_path: Path) -> None:
    other = PATHS[way](tmp_path)
    cells = compare_notebooks(without_injected(local), without_injected(other), Tolerance(1e-6))
    assert worst_status(cells) in (EQUAL, CLOSE), [str(change) for cell in cells for change in cell.changes]
    assert len(cells) >= 6
    metrics = read_metrics(local)
    assert read_metrics(other) == pytest.approx(metrics, rel=1e-6)
    assert metrics["recovered at the landmark"] == pytest.approx(0.63, abs=0.01)
