"""`interp-kernel runs` on the records of real runs: one that failed, two that differ, one with a remote cell."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from interp_kernel.cli import main
from interp_kernel.errors import NotebookError
from interp_kernel.notebook.run import run_notebook
from interp_kernel.notebook.runs import as_csv, differences, find, records, row, rows

pytestmark = pytest.mark.usefixtures("no_warm_worker")

LOCAL = "if layer == 2:\n    raise ValueError('two\\nlines')"
REMOTE = "%%remote\nnorm = model.config.n_layer * layer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with records: `a` with layers 1 and 2, `b` with layer 3 on the demo model."""
    top = tmp_path_factory.mktemp("runs")
    for name, layer, body, kernel in [
        ("a/one", 1, LOCAL, "python3"),
        ("a/two", 2, LOCAL, "python3"),
        ("b/three", 3, REMOTE, "interp"),
    ]:
        cells = [
            new_code_cell("layer: int\nprompt = 'a'", metadata={"tags": ["parameters"]}, id="first"),
            new_code_cell(body, id="second"),
            new_code_cell("{'found': layer * 2, 'all': [1, None]}", metadata={"tags": ["findings"]}, id="third"),
        ]
        spec = {"name": kernel, "display_name": "p", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec, "interp": "demo"}), top / "n.ipynb")
        run_notebook(top / "n.ipynb", top / f"{name}.ipynb", {"layer": layer}, progress=False)
    return top


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_list_names_status_parameters_and_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "list", folder).splitlines()
    assert lines[0].split() == ["KEY", "STATUS", "CELL", "SECONDS", "TRY", "NOTEBOOK", "VARIED", "ERROR"]
    assert [line.split()[1] for line in lines[1:4]] == ["completed", "failed", "completed"]
    assert [next(w for w in line.split() if "=" in w) for line in lines[1:4]] == ["layer=1", "layer=2", "layer=3"]
    assert lines[2].endswith("ValueError: two lines")
    assert lines[2].split()[2] == "1"
    assert lines[-1] == "3 runs: 2 completed, 1 failed."


def test_newest_record_of_a_run_counts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text((folder / "a" / "runs.jsonl").read_text() + '{"torn')
    assert [record["status"] for record in records(tmp_path)] == ["completed", "failed"]


def test_export_is_what_pandas_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_json = pd.read_json(io.StringIO(shown(capsys, "export", folder)), orient="records")
    from_csv = pd.read_csv(io.StringIO(shown(capsys, "export", folder, "--format", "csv")))
    for frame in (from_json, from_csv, pd.DataFrame(rows(folder))):
        assert frame["parameters.layer"].tolist() == [1, 2, 3]
        assert frame["findings.found"].tolist()[::2] == [2, 6]
        assert math.isnan(frame["findings.found"][1])
        assert frame["status"].tolist() == ["completed", "failed", "completed"]
        assert frame["totals.calls"].tolist() == [0, 0, 1]
        assert (frame["seconds"] > 0).all()
        assert frame["worker.model_name"].tolist()[2] == "demo"
    assert (from_csv.columns == from_json.columns).all()
    assert from_csv["evalue"][1] == "two\nlines"
    assert json.loads(from_csv["findings.all"][0]) == [1, None]


def test_columns_of_all_rows_are_kept() -> None:
    frame = pd.read_csv(io.StringIO(as_csv([{"a": 1, "b": 'x,"y'}, {"a": None, "c": True}])))
    assert frame.columns.tolist() == ["a", "b", "c"]
    assert frame["b"][0] == 'x,"y'


def test_show_tells_cells_calls_and_worker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show", folder / "b" / "three.ipynb")
    assert "worker.model_name" in text
    assert "torch " in next(line for line in text.splitlines() if line.startswith("packages  "))
    table = text.splitlines()[next(i for i, line in enumerate(text.splitlines()) if line.startswith("CELL")) :]
    assert [line.split()[:2] for line in table[1:5]] == [
        ["0", "completed"],
        ["added", "completed"],
        ["1", "completed"],
        ["2", "completed"],
    ]
    remote = dict(zip(table[0].split(), table[3].replace(" MB", "").split(), strict=True))
    assert (remote["CALLS"], remote["COLD"]) == ("1", "1")
    assert float(remote["LOAD"]) > 0
    assert float(remote["SENT"]) > 0


def test_show_by_key_tells_the_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = records(folder)[1]["key"]
    text = shown(capsys, "show", key[:8], "--in", folder)
    assert "parameters.layer" in text
    assert "ValueError: two\nlines" in text


def test_diff_shows_what_went_in_and_came_out_but_no_times(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (folder / "a" / f"{name}.ipynb" for name in ("one", "two"))
    lines = {line.split()[0]: line.split()[1:] for line in shown(capsys, "diff", one, two).splitlines()[1:]}
    assert lines["parameters.layer"] == ["1", "2"]
    assert lines["status"] == ["completed", "failed"]
    assert lines["findings.found"] == ["2", "null"]
    assert not {"seconds", "started", "key", "output", "prompt", "hashes.notebook"} & lines.keys()
    assert len(lines["hashes.parameters"][0]) == 12
    assert shown(capsys, "diff", one, one).endswith("Nothing differs but times.\n")


def test_differences_of_records() -> None:
    a: dict[str, Any] = {
        "key": "x",
        "parameters": {"n": 1, "s": None},
        "seconds": 1,
        "totals": {"run_s": 1},
        "cells": [1],
    }
    b: dict[str, Any] = {
        **a,
        "key": "y",
        "parameters": {"n": 1.5, "delay_s": 2},
        "seconds": 9,
        "workers": [{"gpu": "L4", "pid": 3}],
    }
    assert differences(a, b) == {"parameters.n": (1, 1.5), "parameters.delay_s": (None, 2), "worker.gpu": (None, "L4")}
    assert row({"workers": [{"gpu": "A"}, {"gpu": "B"}]}) == {"worker.gpu": "B"}


def test_runs_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match=r"has no records of runs \(runs.jsonl\); expected the folder"):
        records(tmp_path)
    with pytest.raises(NotebookError, match=r"The key 'zz' fits none of the 3 runs in .*; `interp-kernel runs list"):
        find("zz", folder)
    with pytest.raises(NotebookError, match="The key '' fits 3 runs"):
        find("", folder)
    with pytest.raises(NotebookError, match=r"x\.ipynb doesn't exist; expected an executed notebook"):
        find(str(tmp_path / "x.ipynb"), folder)
    with pytest.raises(NotebookError, match=r"n\.ipynb holds no record of a run"):
        find(str(folder / "n.ipynb"), folder)
