"""The spec of a batch: what YAML and Python say, what is refused with line and hint, and the plan that comes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from interp_kernel.errors import NotebookError, SpecError
from interp_kernel.notebook.batch.study import Study, plan, read_study

SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two notebooks, which is the working directory."""
    for name, source in (
        ("a.ipynb", "layer = 0\nword = 'x'\nseed = 0"),
        ("b.ipynb", "layer = 0\nmodel_name = ''\nmode = ''"),
    ):
        cell = new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": SPEC}), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, text: str, name: str = "study.yaml") -> Study:
    (folder / name).write_text(text)
    return read_study(folder / name)


def test_every_combination_is_a_run(folder: Path) -> None:
    text = "notebooks: a.ipynb\ngrid: {layer: [0, 1], word: [rain, sun]}\nseeds: [7, 8, 9]\nrepeats: 2"
    runs = plan(read(folder, text))
    assert [run.label for run in runs[:3]] == [
        "layer=0 word=rain seed=7 repeat=0",
        "layer=0 word=rain seed=7 repeat=1",
        "layer=0 word=rain seed=8 repeat=0",
    ]
    assert len(runs) == len({run.key for run in runs}) == len({run.output for run in runs}) == 24
    assert runs[-1].parameters == {"layer": 1, "word": "sun", "seed": 9}
    assert (runs[-1].seed, runs[-1].repeat) == (9, 1)
    assert runs[0].output == f"a.layer=0-word=rain-seed=7-repeat=0.{runs[0].key}.ipynb"


def test_a_run_keeps_its_key_when_the_study_grows_or_is_named_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {run.key for run in plan(read(folder, "notebooks: a.ipynb\ngrid: {layer: [0, 1]}"))}
    grown = read(folder, "notebooks: [b.ipynb, a.ipynb]\ngrid: {layer: [2, 1, 0]}")
    assert small < {run.key for run in plan(grown)}
    elsewhere = folder / "sub"
    elsewhere.mkdir()
    (folder / "study.yaml").write_text("notebooks: a.ipynb\ngrid: {layer: [0, 1]}\noutput: out/study")
    monkeypatch.chdir(elsewhere)
    assert {run.key for run in plan(read_study(Path("..", "study.yaml")))} == small
    assert {run.key for run in plan(read_study(folder / "study.yaml"))} == small


def test_models_reach_options_and_parameters(folder: Path) -> None:
    text = "notebooks: [a.ipynb, b.ipynb]\nmodels: [demo, {model: demo, dtype: bfloat16}]\ngrid: {layer: [1]}"
    runs = plan(read(folder, text))
    assert [run.model for run in runs[:2]] == [
        {"model_name": "demo"},
        {"model_name": "demo", "dtype": "bfloat16"},
    ]
    assert [run.parameters for run in runs] == [{"layer": 1}] * 2 + [
        {"layer": 1, "model_name": "demo", "mode": "local"}
    ] * 2
    assert [run.label for run in runs[:2]] == ["a demo", "a demo dtype=bfloat16"]


def test_backend_reaches_the_client(folder: Path) -> None:
    (run,) = plan(read(folder, "notebooks: b.ipynb\nmodels: [{model: demo, gpu: l4}]\nbackend: modal"))
    assert run.model == {"model_name": "demo", "gpu": "l4", "mode": "modal"}
    assert run.parameters == {"model_name": "demo", "mode": "modal"}


def test_scalars_are_those_of_yaml_1_2(folder: Path) -> None:
    text = "{word: no, a: 1e-3, b: 12:30, c: 2020-01-01, d: true, e: ~, f: 0x10, g: 010, h: -.5, i: on}"
    assert read(folder, f"notebooks: a.ipynb\nparameters: {text}").parameters == {
        "word": "no",
        "a": 0.001,
        "b": "12:30",
        "c": "2020-01-01",
        "d": True,
        "e": None,
        "f": 16,
        "g": 10,
        "h": -0.5,
        "i": "on",
    }


def test_python_and_json_say_the_same_as_yaml(folder: Path) -> None:
    yaml = read(folder, "notebooks: a.ipynb\ngrid: {layer: [0, 1]}\njobs: 3\nname: x")
    fields = {"notebooks": ["a.ipynb"], "grid": {"layer": [0, 1]}, "jobs": 3, "name": "x"}
    made = f"from interp_kernel.notebook.batch.study import Study\nstudy = Study(**{fields!r})"
    assert read(folder, json.dumps(fields), "study.json") == yaml
    assert read(folder, f"study = {fields!r}", "one.py") == yaml
    assert read(folder, made, "two.py") == yaml
    assert Study(**yaml.to_json()) == yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "notebooks: a.ipynb\ngird: {layer: [1]}",
            r"study.yaml, line 2: 'gird' is no key of a study. Did you mean 'grid'\?",
        ),
        ("notebooks: a.ipynb\nqqqq: 1", r"line 2: 'qqqq' is no key of a study. Expected one of notebooks, name"),
        ("lines: 3\nnotebooks: a.ipynb", r"line 1: 'lines' is no key"),
        ("notebooks: a.ipynb\ngrid:\n  layer: 1", r"line 2: grid gives 'layer' the value 1; expected a list of values"),
        ("notebooks: a.ipynb\ngrid: {layer: []}", r"line 2: grid gives 'layer' the value \[\]"),
        ("notebooks: a.ipynb\ngrid: [1]", r"line 2: grid is \[1\]; expected a mapping from names to lists"),
        ("notebooks: a.ipynb\nparameters: 3", r"line 2: parameters is 3; expected a mapping from names to values"),
        ("notebooks: a.ipynb\ngrid: {a b: [1]}", r"line 2: grid has the name 'a b'; expected a name that Python"),
        ("notebooks: a.ipynb\nnotebooks: b.ipynb", r"line 2: 'notebooks' is given twice; expected it once"),
        ("notebooks: a.ipynb\ngrid:\n  layer: [1]\n  layer: [2]", r"line 4: 'layer' is given twice"),
        ("notebooks: [a.ipynb\njobs: 1", r"study.yaml, line 2: it is no YAML: expected ',' or ']'"),
        ("- a", r"study.yaml: it holds no mapping"),
        ("jobs: 1", r"study.yaml names no notebooks"),
        ("notebooks: []", r"line 1: notebooks holds 'nothing'; expected a list of paths"),
        ("notebooks: [1]", r"line 1: notebooks holds 1; expected a list of paths"),
        ("notebooks: [a.ipynb, a.ipynb]", r"line 1: notebooks holds 'a.ipynb' twice"),
        ("notebooks: a.ipynb\nseeds: [1, true]", r"line 2: seeds holds True; expected a list of whole numbers"),
        ("notebooks: a.ipynb\njobs: 0", r"line 2: jobs is 0; expected a whole number of at least 1"),
        ("notebooks: a.ipynb\nretries: 1.5", r"line 2: retries is 1.5; expected a whole number of at least 0"),
        ("notebooks: a.ipynb\ntimeout: -1", r"line 2: timeout is -1; expected a number above 0"),
        ("notebooks: a.ipynb\ntimeout: .inf", r"line 2: timeout is inf; expected a number above 0"),
        ("notebooks: a.ipynb\nstop_on_failure: yes", r"line 2: stop_on_failure is 'yes'; expected true or false"),
        (
            "notebooks: a.ipynb\nbackend: modla",
            r"line 2: backend is 'modla'; expected one of local, modal. Did you mean",
        ),
        ("notebooks: a.ipynb\noutput: [x]", r"line 2: output is \['x'\]; expected text"),
        (
            "notebooks: a.ipynb\nparameters: {layer: 1}\ngrid: {layer: [1]}",
            r"'layer' stands under both parameters and grid",
        ),
        ("notebooks: a.ipynb\nbackend: modal", r"backend is 'modal' and no models are given"),
        ("notebooks: a.ipynb\nparameters: {seed: 1}\nseeds: [1]", r"seeds and a parameter `seed` are both given"),
    ],
)
def test_wrong_studies_are_refused_with_their_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(folder, text)


def test_unreadable_files_are_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"can't be read as a study: .*No such file"):
        read_study(folder / "none.yaml")
    (folder / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(SpecError, match="can't be read as a study"):
        read_study(folder / "latin.yaml")
    with pytest.raises(SpecError, match="assigns 3 to `study`; expected a Study or a dict"):
        read(folder, "study = 3", "three.py")
    with pytest.raises(SpecError, match=r"typo\.py: 'gird' is no key"):
        read(folder, "study = {'notebooks': 'a.ipynb', 'gird': {}}", "typo.py")
    with pytest.raises(SpecError, match=r"empty\.py names no notebooks"):
        read(folder, "study = {'jobs': 2}", "empty.py")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "notebooks: a.ipynb\ngrid:\n  word: [x]\n  layr: [1]",
            NotebookError,
            r"study.yaml, line 4: .*no parameter 'layr'.*'layer'",
        ),
        ("notebooks: a.ipynb\ngrid:\n  layer: [1, deep]", NotebookError, r"line 3: Parameter 'layer' of .* is 'deep'"),
        (
            "notebooks:\n  - a.ipynb\n  - d/a.ipynb",
            NotebookError,
            r"study.yaml, line 3: .*d/a.ipynb doesn't exist; expected a notebook\.$",
        ),
        ("notebooks: aa.ipynb", NotebookError, r"study.yaml, line 1: .* expected a notebook. Did you mean 'a.ipynb'\?"),
        ("notebooks: a.ipynb\nmodels:\n  - demo\n  - model: 3", SpecError, r"study.yaml, line 4: .*3"),
        ("notebooks: b.ipynb\nseeds: [1]", NotebookError, r"b.ipynb has no parameter 'seed'"),
        (
            "notebooks: a.ipynb\nmodels: [{model: demo, dtyp: float32}]",
            SpecError,
            r"study.yaml, line 2: .*'dtyp' is not known.*Did you mean 'dtype'",
        ),
    ],
)
def test_what_no_notebook_takes_is_refused_before_anything_runs(
    folder: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(read(folder, text))


def test_models_must_be_plain_data(folder: Path) -> None:
    model: dict[str, Any] = {"model": "demo", "mode": "modal", "image": object()}
    with pytest.raises(SpecError, match="Expected names, numbers and texts only"):
        plan(Study(notebooks=("a.ipynb",), models=(model,)))


def test_a_thousand_runs_are_planned_in_seconds(folder: Path) -> None:
    study = Study(notebooks=("a.ipynb",), grid={"layer": tuple(range(100))}, seeds=tuple(range(10)))
    before = os.times()
    runs = plan(study)
    after = os.times()
    assert len({run.key for run in runs}) == 1000
    assert after.user - before.user < 5
