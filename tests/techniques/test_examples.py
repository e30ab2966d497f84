"""Every technique's example runs as it stands, on all three routes, and its result is plain data with a figure."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.technique_pages import PAGE, figure_of, page, run_example, with_result
from interp_kernel import InterpClient
from interp_kernel.catalogue import package_techniques
from interp_kernel.sources import Technique
from techniques._results import Header
from tests.helpers_kernel import Notebook, notebook

TECHNIQUES = {technique.name: technique for technique in package_techniques()}
HEADER = Header.__annotations__.keys()
OF_A_MODEL = {"model", "dtype"}
OF_A_FILE = {"path", "folder", "sha256"}  # the last bits differ with the number of threads


@pytest.fixture(scope="module", params=sorted(TECHNIQUES))
def technique(request: pytest.FixtureRequest) -> Technique:
    return TECHNIQUES[request.param]


@pytest.fixture(scope="module")
def direct(technique: Technique, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The example's result in this process."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp_path_factory.mktemp("direct"))
        return run_example(technique, model=demo[0], tokenizer=demo[1])


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("notebook")) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def client() -> Iterator[InterpClient]:
    with InterpClient(model_name="demo") as client:
        yield client


def test_result_is_json_with_a_header_and_finite_numbers(technique: Technique, direct: Any) -> None:
    assert direct.keys() >= (HEADER if technique.takes_model else HEADER - OF_A_MODEL)
    assert direct["n"] >= 1
    text = json.dumps(direct, allow_nan=False)
    assert json.loads(text) == plain(direct)


def test_result_has_a_figure_for_a_notebook(technique: Technique, direct: Any) -> None:
    figure = figure_of(direct)
    if figure is not None:
        drawn = figure.to_json()
        assert drawn.count('"type"') >= 1
        assert figure.layout.width is None or figure.layout.width <= 1000


def test_client_run_gives_the_same_numbers(
    technique: Technique, direct: Any, client: InterpClient, demo: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if not technique.takes_model:
        pytest.skip("it rates texts, and needs no worker")
    # What the example does first stays here; each call of a technique goes to the worker.
    code = ast.unparse(ast.fix_missing_locations(ToClient().visit(ast.parse(with_result(technique)))))
    assert "client.run(" in code
    names = {"client": client, "model": demo[0], "tokenizer": demo[1]}
    exec(code, names)
    assert_same(without_files(names["result"]), without_files(direct))


def test_a_remote_cell_gives_the_same_numbers(technique: Technique, direct: Any, nb: Notebook) -> None:
    shown = nb.ok(f"%%remote\n{with_result(technique)}\nimport json\njson.dumps(result)").value
    assert_same(without_files(json.loads(shown)), without_files(plain(direct)))


class ToClient(ast.NodeTransformer):
    """Writes `technique(model, tokenizer, ...)` as `client.run(technique, ...)`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        first = [arg.id for arg in node.args[:2] if isinstance(arg, ast.Name)]
        if first != ["model", "tokenizer"]:
            return node
        run = ast.Attribute(ast.Name("client", ast.Load()), "run", ast.Load())
        return ast.Call(run, [node.func, *node.args[2:]], node.keywords)


def test_the_page_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text() == page(list(TECHNIQUES.values())), "run `python -m docs.technique_pages`"


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def without_files(value: Any) -> Any:
    """Without where a file lies, which differs by route, and without times."""
    if isinstance(value, dict):
        kept = {
            key: part
            for key, part in value.items()
            if key not in ("path", "folder", "sha256") and not key.endswith("_s")
        }
        return {key: without_files(part) for key, part in kept.items()}
    return [without_files(part) for part in value] if isinstance(value, list | tuple) else value


def assert_same(found: Any, expected: Any, where: str = "result") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(found, float):
        assert math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4), f"{where}: {found} != {expected}"
    else:
        assert found == expected, where
