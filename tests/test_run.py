"""What `run` refuses before it starts, and the page that comes out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from interp_kernel.errors import NotebookError
from interp_kernel.notebook.report import PLOTLY, write_html
from interp_kernel.notebook.run import findings, input_index, run_notebook

SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def code(source: Any, **more: Any) -> dict[str, Any]:
    cell = {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    return {key: value for key, value in {**cell, **more}.items() if value != "left out"}


def stored(folder: Path, *cells: Any, **fields: Any) -> Path:
    whole = {"cells": list(cells), "metadata": {"kernelspec": SPEC}, "nbformat": 4, "nbformat_minor": 5, **fields}
    (folder / "n.ipynb").write_text(json.dumps(whole))
    return folder / "n.ipynb"


def test_harmless_omissions_are_made_good(tmp_path: Path) -> None:
    path = stored(
        tmp_path, code("1", outputs="left out", execution_count="left out"), code(["a = 1\n", "a"]), metadata={}
    )
    result = run_notebook(path, tmp_path / "out.ipynb", kernel_name="python3", progress=False)
    assert result.status == "completed"
    nbformat.validate(json.loads(result.output.read_text()))


def test_kernel_must_be_named_and_installed(tmp_path: Path) -> None:
    path = stored(tmp_path, code("1"), metadata={})
    with pytest.raises(NotebookError, match=r"names no kernel: .* installed are interp, python3"):
        run_notebook(path, tmp_path / "out.ipynb")
    with pytest.raises(NotebookError, match="asks for the kernel 'julia', which is not installed"):
        run_notebook(path, tmp_path / "out.ipynb", kernel_name="julia")


def test_source_is_never_overwritten(tmp_path: Path) -> None:
    path = stored(tmp_path, code("1"))
    with pytest.raises(NotebookError, match="is the notebook itself"):
        run_notebook(path, tmp_path / "." / "n.ipynb")


def test_input_index_sees_through_what_papermill_adds_and_drops() -> None:
    marker = code("", metadata={"tags": ["papermill-error-cell-tag"]})
    parameters, injected = (code("", metadata={"tags": [tag]}) for tag in ("parameters", "injected-parameters"))
    fresh = {"cells": [marker, code("a"), parameters, code("b")]}
    executed = {"cells": [code("a"), parameters, injected, code("b")]}
    assert [input_index(fresh, executed, i) for i in range(4)] == [1, 2, None, 3]
    assert [input_index(executed, executed, i) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"text/plain": "{'a': [1, 2.5], 'b': 'x'}"}, {"a": [1, 2.5], "b": "x"}),
        ({"application/json": {"a": 1}, "text/plain": "other"}, {"a": 1}),
        ({"text/plain": "<object at 0x1>"}, "<object at 0x1>"),
        ({"text/plain": "{1, 2}"}, "{1, 2}"),
        ({"text/plain": "{'a': 1e999}"}, "{'a': 1e999}"),
    ],
)
def test_findings_are_json_where_they_can_be(data: dict[str, Any], expected: Any) -> None:
    output = {"output_type": "execute_result", "data": data}
    assert findings({"cells": [code("x", outputs=[output], metadata={"tags": ["findings"]})]}) == expected
    assert findings({"cells": [code("x", outputs=[output])]}) is None


def test_page_shows_plotly_figures_with_its_code_once(tmp_path: Path) -> None:
    figures = [go.Figure(go.Scatter(y=[1, 2, 3], name=f"trace {i}")) for i in range(2)]
    outputs = [new_output("display_data", data={PLOTLY: json.loads(figure.to_json())}) for figure in figures]
    cells = [new_code_cell("fig", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": SPEC}), tmp_path / "n.ipynb")
    before = (tmp_path / "n.ipynb").read_bytes()
    page = write_html(tmp_path / "n.ipynb").read_text()
    assert page.count("Plotly.newPlot(") >= 2
    assert all(f"trace {i}" in page for i in range(2))
    assert page.count("plotly.js v") == 1
    assert (tmp_path / "n.ipynb").read_bytes() == before
