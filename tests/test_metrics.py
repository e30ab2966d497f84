"""`record`, from a script, a local cell and a remote cell: what is stored, and what a report reads back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from interp_kernel import record
from interp_kernel.notebook.metrics import METRIC, number, plain, read_metrics
from tests.helpers_kernel import Notebook, notebook, remote


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("metrics")) as opened:
        yield opened


def stored(kernel: Notebook, code: str) -> dict[str, Any]:
    """Metrics that a cell's displays hold."""
    bundles = [content["data"] for content in kernel.ok(code).contents("display_data")]
    return {bundle[METRIC]["name"]: bundle[METRIC]["value"] for bundle in bundles if METRIC in bundle}


def test_local_cell_stores_data_and_shows_text(kernel: Notebook) -> None:
    cell = kernel.ok("from interp_kernel import record\nrecord('accuracy', 0.9)")
    (shown,) = cell.contents("display_data")
    assert shown["data"] == {METRIC: {"name": "accuracy", "value": 0.9}, "text/plain": "accuracy = 0.9"}


def test_remote_cell_stores_the_same_and_a_tensor_counts_as_its_number(kernel: Notebook) -> None:
    body = "import torch\nrecord('loss', torch.tensor([0.25]))\nrecord('half', torch.tensor(1.5).half())\n"
    kernel.ok("from interp_kernel import record")
    assert stored(kernel, remote(body)) == {"loss": 0.25, "half": 1.5}
    imported = "import interp_kernel\ninterp_kernel.record('n', len(tokenizer))"
    assert stored(kernel, remote(imported))["n"] > 1000


def test_function_that_is_run_from_python_records_too(kernel: Notebook) -> None:
    code = (
        "from interp_kernel import InterpClient\n"
        "def count(model, tokenizer):\n"
        "    from interp_kernel import record\n"
        "    record('blocks', model.config.n_layer)\n"
        "with InterpClient(model_name='demo') as client:\n    client.run(count)"
    )
    assert stored(kernel, code) == {"blocks": 4}


def test_script_without_a_notebook_prints(tmp_path: Path) -> None:
    code = "import sys\nfrom interp_kernel import record\nrecord('x', 1)\nassert 'IPython' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "x = 1\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[2.0]]), 2.0),
        ("text", "text"),
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        (np.float64("inf"), "Infinity"),
    ],
)
def test_values_are_what_json_can_hold(value: Any, expected: Any) -> None:
    found = plain("x", value)
    assert (found, type(found)) == (expected, type(expected))
    json.dumps(found, allow_nan=False)


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(TypeError, match=r"metric 'x' has the shape \(2,\); expected one number"):
        record("x", np.zeros(2))
    with pytest.raises(TypeError, match="metric 'x' is a list; expected a number, a truth value or text"):
        record("x", [1.0])
    with pytest.raises(TypeError, match="metric 'x' is a NoneType"):
        record("x", None)
    with pytest.raises(TypeError, match="name of a metric is 3; expected some text"):
        record(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name of a metric is ' '"):
        record(" ", 1.0)


def test_reading_takes_the_last_value_in_the_order_of_the_first() -> None:
    def shown(name: str, value: Any) -> Any:
        return new_output("display_data", data={METRIC: {"name": name, "value": value}, "text/plain": "x"})

    first = new_code_cell("", outputs=[shown("a", 1), shown("b", 2), new_output("stream", text="a = 7")])
    second = new_code_cell("", outputs=[shown("a", 3)])
    executed = new_notebook(cells=[first, nbformat.v4.new_markdown_cell("a = 9"), second])
    nbformat.validate(executed)
    assert list(read_metrics(json.loads(nbformat.writes(executed))).items()) == [("a", 3), ("b", 2)]


def test_only_finite_numbers_are_points_of_a_figure() -> None:
    values: list[Any] = [1, 0.5, True, "NaN", "text", None]
    assert [number(value) for value in values] == [1.0, 0.5, 1.0, None, None, None]
