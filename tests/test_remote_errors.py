"""Errors of remote cells have their own names and the cell's own lines; modules beside the notebook are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_kernel import Notebook, notebook, remote


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("errors")) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A kernel in which no cell asks for a worker."""
    with notebook(tmp_path_factory.mktemp("unstarted")) as kernel:
        yield kernel


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("cell", "line", "text"),
    [
        ("%%remote\n1/0", 2, "1/0"),
        ("%%remote\n\n\nx = 1\n\n1/0", 6, "1/0"),
        ("\n\n%%remote --quiet\n\n1/0", 5, "1/0"),
        ("%%time\n%%remote\nx = 1\n1/0", 4, "1/0"),
        ("%%capture out\n\n%%remote\n\n1/0", 5, "1/0"),
        ("%%remote\nx = [\n  1,\n]\n1/0", 5, "1/0"),
        ("%%remote\n!echo \\\n  hi\n1/0", 4, "1/0"),
        ("%%remote\ndef inner():\n    return 1/0\n\ninner()", 3, "    return 1/0"),
    ],
)
def test_an_error_has_its_name_and_the_cells_own_line(nb: Notebook, cell: str, line: int, text: str) -> None:
    ran = nb.run(cell)
    assert (ran.ename, ran.evalue) == ("ZeroDivisionError", "division by zero")
    assert f"----> {line} {text}" in ran.traceback
    # IPython runs what stands under %%capture as a cell of the next number, its own errors say the same.
    number = ran.reply["execution_count"] + cell.startswith("%%capture")
    assert f"Cell In[{number}], line {line}" in ran.traceback
    assert "interp_kernel/" not in ran.traceback


def test_lines_of_functions_from_other_cells_are_shown(nb: Notebook) -> None:
    here = nb.ok("# a local cell\ndef local_part(x):\n    return 1 / x").reply["execution_count"]
    there = nb.ok(remote("def remote_part(x):\n\n    return local_part(x)")).reply["execution_count"]
    failed = nb.run(remote("\nremote_part(0)"))
    rows = failed.traceback
    assert f"Cell In[{failed.reply['execution_count']}], line 3" in rows
    assert f"Cell In[{there}], line 4, in remote_part" in rows
    assert f"Cell In[{here}], line 3, in local_part" in rows
    assert "----> 3     return 1 / x" in rows
    assert "----> 4     return local_part(x)" in rows


def test_a_remote_function_that_fails_here_shows_its_cell(nb: Notebook) -> None:
    there = nb.ok(remote("def fails():\n    raise ValueError('here')")).reply["execution_count"]
    failed = nb.run("fails()")
    assert (failed.ename, failed.evalue) == ("ValueError", "here")
    assert f"Cell In[{there}], line 3" in failed.traceback
    assert "raise ValueError('here')" in failed.traceback


def test_chained_exceptions_are_both_told(nb: Notebook) -> None:
    body = "try:\n    {}['gone']\nexcept KeyError as error:\n    raise RuntimeError('outer') from error"
    failed = nb.run(remote(body))
    assert (failed.ename, failed.evalue) == ("RuntimeError", "outer")
    first, _, second = failed.traceback.partition("direct cause of the following exception")
    assert "KeyError: 'gone'" in first
    assert "----> 3" in first
    assert "RuntimeError: outer" in second
    assert "----> 5" in second


def test_an_exception_of_the_cells_own_class_keeps_its_name(nb: Notebook) -> None:
    define = "class OddError(ValueError):\n    def __str__(self): return 'odd ' + str(self.args[0])\n"
    failed = nb.run(remote(define + "raise OddError(7)"))
    assert (failed.ename, failed.evalue) == ("OddError", "odd 7")


@pytest.mark.parametrize(
    ("body", "ename", "fragment"),
    [
        ("import sys\nsys.exit(3)", "SystemExit", "3"),
        ("input('name? ')", "EOFError", "'name? '"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError", "recursion"),
        ("import no_such_module_9", "ModuleNotFoundError", "no_such_module_9"),
        ("raise KeyboardInterrupt('own')", "KeyboardInterrupt", "own"),
    ],
)
def test_what_would_end_or_stall_a_process_is_an_ordinary_error(
    nb: Notebook, body: str, ename: str, fragment: str
) -> None:
    failed = nb.run(remote(body))
    assert failed.ename == ename
    assert fragment in failed.evalue
    assert len(failed.traceback) < 5_000
    assert nb.ok(remote("6 * 7")).value == 42


@pytest.mark.parametrize(
    ("cell", "line"),
    [("%%remote\nx = 1\n1 +", 3), ("%%time\n%%remote\n\nreturn 3", 4), ("%%remote\n%%time\n1", 2)],
)
def test_a_syntax_error_needs_no_worker_and_names_its_line(unstarted: Notebook, cell: str, line: int) -> None:
    failed = unstarted.run(cell)
    assert failed.ename == "SyntaxError"
    assert f"line {line}" in failed.traceback
    assert unstarted.ok("%remote status").stdout.startswith("No worker yet")


# ------------------------------------------------------------------------------------------------------ modules


def test_a_module_beside_the_notebook_is_shipped_and_follows_edits(nb: Notebook) -> None:
    nb.ok("from pathlib import Path\nPath('beside.py').write_text('VALUE = 1\\ndef f():\\n    return VALUE / 0')")
    assert nb.ok(remote("import beside\nbeside.VALUE")).value == 1
    failed = nb.run(remote("import beside\nbeside.f()"))
    assert failed.ename == "ZeroDivisionError"
    assert "beside.py:3" in failed.traceback
    nb.ok("Path('beside.py').write_text('VALUE = 2')")
    assert nb.ok(remote("from beside import VALUE\nVALUE")).value == 2
    assert nb.ok(remote("beside.VALUE")).value == 2


def test_a_package_with_relative_imports_is_shipped(nb: Notebook) -> None:
    one = "from . import two\ndef one(): return two.TWO - 1"
    files = {"bundle/__init__.py": "from .one import one", "bundle/one.py": one, "bundle/two.py": "TWO = 2"}
    nb.ok(f"import os\nos.mkdir('bundle')\nfor name, text in {files!r}.items(): open(name, 'w').write(text)")
    use = remote("from bundle import one as first\nfrom bundle.two import TWO\nfirst(), TWO")
    assert nb.ok(use).value == (1, 2)
    assert nb.ok(remote("'bundle' in __import__('sys').modules")).value is False
    assert nb.ok(use).value == (1, 2)
    nb.ok("open('bundle/two.py', 'w').write('TWO = 30')")
    assert nb.ok(remote("import bundle\nbundle.one()")).value == 29
    assert nb.value("first()") == 29


@pytest.mark.parametrize("place", ["os.environ['JPY_SESSION_NAME']", "__vsc_ipynb_file__"])
def test_a_module_is_found_beside_the_notebook_also_where_the_kernel_works_elsewhere(
    nb: Notebook, tmp_path: Path, place: str
) -> None:
    (tmp_path / "far_away.py").write_text(f"PLACE = {place!r}")
    nb.ok(f"import os\n{place} = {str(tmp_path / 'a.ipynb')!r}")
    try:
        assert nb.ok(remote("import far_away\nfar_away.PLACE")).value == place
    finally:
        nb.ok(f"del {place}")
    assert nb.run(remote("import far_away")).ename == "ModuleNotFoundError"
