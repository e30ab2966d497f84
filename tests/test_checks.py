"""What is refused before a run and what is made good, through the reader, the command and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from interp_kernel.cli import main
from interp_kernel.errors import NotebookError
from interp_kernel.notebook.checks import examine, kernel_of, read_notebook, typed
from interp_kernel.notebook.commands import parameter_value
from interp_kernel.notebook.parameters import check_parameters, declared_parameters
from interp_kernel.notebook.run import run_notebook

SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
LEFT_OUT = object()


def code(source: Any, **more: Any) -> dict[str, Any]:
    cell = {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    return {key: value for key, value in {**cell, **more}.items() if value is not LEFT_OUT}


def markdown(**more: Any) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": "# T", **more}


def stored(folder: Path, *cells: Any, **fields: Any) -> Path:
    whole = {"cells": list(cells), "metadata": {"kernelspec": SPEC}, "nbformat": 4, "nbformat_minor": 5, **fields}
    (folder / "n.ipynb").write_text(json.dumps({key: value for key, value in whole.items() if value is not LEFT_OUT}))
    return folder / "n.ipynb"


def parameters_cell(source: str) -> dict[str, Any]:
    return code(source, metadata={"tags": ["parameters"]}, id="p")


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"cell_type": "python", "source": "1"}, r"Cell 1 of .* has cell_type 'python'; .*raw\. Did you mean 'code'\?"),
        ({"cell_type": "Markdwon", "source": "1"}, r"has cell_type 'Markdwon'; .* Did you mean 'markdown'\?"),
        ({"cell_type": "zzz", "source": "1"}, r"has cell_type 'zzz'; expected one of code, markdown, raw\.$"),
        (code(["a = 1", "print(a)"]), r"Cell 1 of .* has the source line 'a = 1' without a line end"),
        (code(3), r"Cell 1 of .* has a source of type int"),
        (code(["a\n", 3]), r"Cell 1 of .* has a source of type list"),
        (code(LEFT_OUT), r"Cell 1 of .* has a source of type NoneType"),
        (code("'\ud800'"), r"Cell 1 of .* holds '\\ud800'"),
        (code("1", metadata=[]), r"Cell 1 of .* is not valid: \[\] is not of type 'object'"),
        (code("1", metadata={"tags": [3]}), r"Cell 1 of .* is not valid: 3 is not of type 'string'"),
        (code("1", execution_count="x"), r"Cell 1 of .* is not valid: 'x' is not of type"),
        ("print(1)", r"Cell 1 of .* has cell_type None"),
    ],
)
def test_cell_that_would_not_run_as_it_reads_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(NotebookError, match=message):
        read_notebook(stored(tmp_path, code("1"), bad))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as a notebook"),
        ("[]", "no list `cells`"),
        ('{"cells": {}, "nbformat": 4}', "no list `cells`"),
        ('{"cells": []}', "format None.None; expected 4.0 to 4.5"),
        ('{"cells": [], "nbformat": 4, "nbformat_minor": "5"}', r"format 4\.'5'"),
        ('{"worksheets": [], "nbformat": 3}', "format 3; expected 4. Convert it with `jupyter nbconvert"),
        ("[" * 100_000, "can't be read as a notebook"),
    ],
)
def test_file_that_is_no_notebook(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "n.ipynb").write_text(text)
    with pytest.raises(NotebookError, match=message):
        read_notebook(tmp_path / "n.ipynb")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="doesn't exist"):
        read_notebook(tmp_path / "none.ipynb")
    with pytest.raises(NotebookError, match=r"can't be read as a notebook: .*directory"):
        read_notebook(tmp_path)
    with pytest.raises(NotebookError, match="is not valid: 'python3' is not of type 'object'"):
        read_notebook(stored(tmp_path, metadata={"kernelspec": "python3"}))


def test_every_fault_is_listed_not_only_the_first(tmp_path: Path) -> None:
    bad = {"cell_type": "python", "source": "1"}
    found = examine(stored(tmp_path, bad, code("1"), bad, code(["a", "b"])))
    assert [fault.cell for fault in found.refused] == [0, 2, 3]


# --------------------------------------------------------------------------------------------- made good


@pytest.mark.parametrize(
    ("cells", "fields", "cell", "says", "key", "value"),
    [
        ([code("1", metadata=LEFT_OUT, id="a")], {}, 0, "has no `metadata`", "metadata", {}),
        ([code("1", metadata=None, id="a")], {}, 0, "has no `metadata`", "metadata", {}),
        ([code("1", outputs=LEFT_OUT, id="a")], {}, 0, "has no `outputs`;", "outputs", []),
        ([code("1", execution_count=LEFT_OUT, id="a")], {}, 0, "has no `execution_count`;", "execution_count", None),
        (
            [code("1", metadata={"tags": "a, b"}, id="a")],
            {},
            0,
            "has the text 'a, b'",
            "metadata",
            {"tags": ["a", "b"]},
        ),
        ([markdown(id="a", outputs=[])], {}, 0, "has `outputs`, which markdown cells don't have", "outputs", None),
        ([code("1", id="a", language="python")], {}, 0, "has `language`, which code cells don't", "language", None),
        ([code("1", id="a b")], {}, 0, "has an id that is not valid, 'a b'", "id", "cell-0"),
        ([code("1", id="x" * 65)], {}, 0, "has an id that is not valid", "id", "cell-0"),
        ([code("1", id=7)], {}, 0, "has an id that is not valid, 7", "id", "cell-0"),
        ([code("1")], {}, 0, "has no id of its own; it becomes 'cell-0'", "id", "cell-0"),
        ([code("1", id="x"), code("2", id="x")], {}, 1, "has no id of its own, 'x'", "id", "cell-1"),
        (
            [code("1", id="cell-1"), code("2", id="")],
            {},
            1,
            "has an id that is not valid, ''; it becomes 'cell-1-x'",
            "id",
            "cell-1-x",
        ),
        ([code("1", id="a")], {"nbformat_minor": 4}, 0, "has an id, which format 4.4 doesn't have", "id", "a"),
        (
            [code("1", id="a", outputs=[{"output_type": "stream"}])],
            {},
            0,
            "has outputs that are not valid",
            "outputs",
            [],
        ),
        ([code("1", id="a", outputs="none")], {}, 0, "has outputs that are not valid", "outputs", []),
    ],
)
def test_what_can_mean_one_thing_is_made_good(
    tmp_path: Path, cells: list[Any], fields: dict[str, Any], cell: int, says: str, key: str, value: Any
) -> None:
    path = stored(tmp_path, *cells, **fields)
    found = examine(path)
    assert found.notebook is not None
    assert [(fault.cell, fault.is_mended) for fault in found.faults] == [(cell, True)]
    assert found.faults[0].text.startswith(f"Cell {cell} of {path} {says}")
    assert found.notebook["cells"][cell].get(key) == value
    nbformat.validate(found.notebook)
    assert read_notebook(path) == found.notebook  # the same again: a hash of it tells the same notebook


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nbformat_minor": LEFT_OUT}, "has no `nbformat_minor`; it becomes 5."),
        ({"metadata": LEFT_OUT}, "has no `metadata`; it becomes empty."),
        ({"metadata": {"kernelspec": {"name": "python3"}}}, "has a kernelspec without `display_name`"),
        ({"worksheets": []}, "has `worksheets`, which notebooks don't have; it is left out."),
        ({"metadata": {"x": [math.nan, math.inf, math.nan]}}, "holds NaN, which JSON doesn't have; null .* 2 times"),
    ],
)
def test_head_is_made_good(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    found = examine(stored(tmp_path, code("1", id="a"), **fields))
    assert found.refused == []
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found.faults[0].text)
    nbformat.validate(found.notebook)
    json.dumps(found.notebook, allow_nan=False)


def test_older_notebook_without_ids_is_fine_as_it_is(tmp_path: Path) -> None:
    assert examine(stored(tmp_path, code("1"), markdown(), nbformat_minor=4)).faults == []


def test_made_good_notebook_runs_and_is_stored_valid(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "code", "source": ["n: int\n", "text = 'a'"], "metadata": {"tags": "parameters"}},
        markdown(outputs=[]),
        {"cell_type": "code", "source": "print(n * 2, text)", "id": "a b"},
        code("n", id="same", outputs=[{"output_type": "x"}]),
        code("1", id="same", language="python"),
    ]
    path = stored(tmp_path, *cells, nbformat_minor=LEFT_OUT, metadata={"kernelspec": {"name": "python3"}})
    before = path.read_bytes()
    result = run_notebook(path, tmp_path / "out.ipynb", {"n": 21, "text": "b"}, progress=False)
    assert (result.status, result.ename) == ("completed", None)
    executed = json.loads(result.output.read_text())
    nbformat.validate(executed)
    assert executed["metadata"]["papermill"]["input_path"] == str(path)
    shown = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    assert shown[2]["outputs"][0]["text"] in ("42 b\n", ["42 b\n"])
    assert len({cell["id"] for cell in executed["cells"]}) == len(executed["cells"])
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------------- parameters

DECLARED = parameters_cell(
    "%matplotlib inline\nlayer: int\nrate = 1\nname: str | None = None\nflag = False\nitems = [1]\n"
    "both: 'int | str' = 1\nshare: float = 0.5\ntable: dict[str, int] = {}\nx, (y, *z) = 1, (2, 3)\nfree = abs(1)\n"
    "maybe: Optional[int] = None\nother: Union[int, Literal['a']] = 1\nprint(q := 1)"
)


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 0.5, "flag": True, "items": ["a", {"b": None}], "both": "x", "share": 1},
        {"name": None, "table": {"a": [1, 2.5]}, "x": 2.0, "y": 3, "z": "anything", "free": [], "maybe": None},
        {"name": "Ω", "maybe": 3, "other": {"not": "told"}, "both": 3},
    ],
)
def test_values_that_fit(tmp_path: Path, given: dict[str, Any]) -> None:
    check_parameters(tmp_path, {"cells": [DECLARED]}, {"layer": 3, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"layer": 2.5},
            r"'layer' of .* is 2\.5 of type float; expected int, since the notebook declares `layer: int`",
        ),
        ({"layer": True}, "is True of type bool; expected int"),
        ({"layer": "3"}, "is '3' of type str; expected int"),
        ({"rate": "fast"}, "is 'fast' of type str; expected float or int"),
        ({"flag": 1}, "is 1 of type int; expected bool"),
        ({"items": "a"}, "is 'a' of type str; expected list"),
        ({"name": 3}, "is 3 of type int; expected None or str"),
        ({"maybe": "3"}, "expected None or int"),
        ({"x": "1"}, r"expected float or int, since the notebook declares `x in x, \(y, \*z\)"),
        ({"items": (1, 2)}, r"holds \(1, 2\) of type tuple, which a notebook can't store"),
        ({"free": [np.int64(3)]}, r"holds .*3.* of type int64"),
        ({"free": math.nan}, "holds nan, which"),
        ({"free": {1: "a"}}, "holds the key 1 of type int, which"),
        ({"free": "\ud800"}, r"holds half a character in '\\ud800', which"),
        ({"laye": 3}, r"has no parameter 'laye'; it takes layer, rate, .*\. Did you mean 'layer'\?"),
        ({"q": 3}, r"has no parameter 'q'; it takes .*other\.$"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(NotebookError, match=message):
        check_parameters(tmp_path, {"cells": [DECLARED]}, {"layer": 3, **given})


def test_parameter_without_a_value_is_needed(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="needs the parameter 'layer', declared as `layer: int` without a value"):
        check_parameters(tmp_path, {"cells": [DECLARED]}, {})


def test_cell_of_parameters_must_be_one_and_python(tmp_path: Path) -> None:
    check_parameters(tmp_path, {"cells": [code("x = 1")]}, {})
    with pytest.raises(NotebookError, match="has no cell tagged `parameters`, so 'x' can't be set"):
        check_parameters(tmp_path, {"cells": [code("x = 1")]}, {"x": 1})
    with pytest.raises(NotebookError, match=r"Cell 0 of .* is not Python"):
        declared_parameters(tmp_path, {"cells": [parameters_cell("x =")]})
    with pytest.raises(NotebookError, match=r"Cells \[0, 2\] of .* are all tagged `parameters`; expected one"):
        declared_parameters(tmp_path, {"cells": [parameters_cell("x = 1"), code("1"), parameters_cell("y = 1")]})
    with pytest.raises(NotebookError, match=r"Cell 0 of .*, tagged `parameters`, is markdown; expected code"):
        declared_parameters(tmp_path, {"cells": [{**parameters_cell("x = 1"), "cell_type": "markdown"}]})


def test_texts_of_a_command_line_take_the_declared_type(tmp_path: Path) -> None:
    path = stored(tmp_path, parameters_cell("prompt = 'a'\nlayer: int\nname: str | None = None\nfree = f()"))
    texts = {"prompt": "42", "layer": "42", "name": "42", "free": "42", "unknown": "42"}
    assert typed(path, texts, parameter_value) == {**dict.fromkeys(texts, 42), "prompt": "42", "name": "42"}
    nones = {"prompt": "None", "layer": "None", "name": "None"}
    assert typed(path, nones, parameter_value) == {"prompt": "None", "layer": None, "name": None}
    assert typed(tmp_path / "none.ipynb", texts, parameter_value) == dict.fromkeys(texts, 42)


# --------------------------------------------------------------------------------------------- the command


def test_check_says_what_would_run_and_with_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path, parameters_cell("layer: int\nprompt = 'a'"), nbformat_minor=5)
    before = path.read_bytes()
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"ok: {path} runs on python3 and takes layer: int, prompt = 'a'.\n"
    assert main(["check", str(path), "-p", "layer", "3", "-p", "prompt", "7"]) == 0
    assert main(["check", str(path), "-p", "layr", "3"]) == 1
    assert "refused: " in (shown := capsys.readouterr().out)
    assert "Did you mean 'layer'?" in shown
    assert path.read_bytes() == before


def test_check_looks_at_every_notebook_kernel_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    interp = {"model": "demo", "dtype": "int3"}
    wrong_model = stored(tmp_path / "a", code("1", id="a"), metadata={"kernelspec": SPEC, "interp": interp})
    wrong_kernel = stored(tmp_path / "b", code("1", id="a"), metadata={"kernelspec": {**SPEC, "name": "pyton3"}})
    fine = stored(tmp_path, code("1", id="a"))
    assert main(["check", str(wrong_model), str(wrong_kernel), str(fine)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert "dtype 'int3' is not known" in shown[0]
    assert shown[1].endswith("installed are interp, python3. Did you mean 'python3'?")
    assert shown[2] == f"ok: {fine} runs on python3 and takes no parameters."


def test_check_mends_the_file_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path, code("'Ω'", id="a b", outputs=LEFT_OUT), metadata={"kernelspec": SPEC, "note": "kept"})
    path.chmod(0o640)
    before = path.read_bytes()
    assert main(["check", str(path)]) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.count("mendable: ") == 2
    assert main(["check", "--fix", str(path)]) == 0
    assert capsys.readouterr().out.count("mended: ") == 2
    mended = json.loads(path.read_text())
    nbformat.validate(mended)
    assert (mended["metadata"]["note"], mended["cells"][0]["source"]) == ("kept", "'Ω'")
    assert path.stat().st_mode & 0o777 == 0o640
    assert main(["check", "--fix", str(path)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["n.ipynb"]


def test_check_leaves_a_refused_notebook_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path, code("1", outputs=LEFT_OUT), code(["a", "b"]))
    before = path.read_bytes()
    assert main(["check", "--fix", str(path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"refused: Cell 1 of {path} has the source line 'a'")
    assert second.startswith(f"mendable: Cell 0 of {path} has no `outputs`")
    assert path.read_bytes() == before


def test_kernel_must_be_named(tmp_path: Path) -> None:
    notebook = read_notebook(stored(tmp_path, metadata={}))
    with pytest.raises(NotebookError, match=r"names no kernel: .* installed are interp, python3"):
        kernel_of(tmp_path, notebook, None)
    assert kernel_of(tmp_path, notebook, "interp") == ("interp", "python")
