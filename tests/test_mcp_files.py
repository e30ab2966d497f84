"""The notebook file while an agent works in it: invalid, edited by hand, deleted, moved, read-only, on a full disk."""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_agent import Agent, Gate, agent, cells, edit_by_hand, keeper_of, log_of, outputs_of

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with agent(tmp_path_factory.mktemp("workspace")) as one:
        yield one
        for facts in one.sessions():
            one.call("shutdown_session", session_id=facts["session_id"])


@pytest.fixture(scope="module")
def kernel(opened: Agent) -> str:
    """A session that the tests share, each with cells of its own."""
    opened.start("shared")
    return opened.session


@pytest.fixture
def study(opened: Agent, kernel: str) -> Path:
    opened.session = kernel
    return Path(opened.info()["notebook_path"])


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path, "gate")


def code_cell(source: Any = "1", **more: Any) -> Facts:
    return {
        "cell_type": "code",
        "id": "c1",
        "metadata": {},
        "source": source,
        "outputs": [],
        "execution_count": None,
    } | more


def notebook_of(*cells: Facts, minor: Any = 5, **more: Any) -> str:
    spec = {"kernelspec": {"name": "interp", "display_name": "interp", "language": "python"}}
    return json.dumps({"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": minor} | more)


def without(cell: Facts, name: str) -> Facts:
    return {key: value for key, value in cell.items() if key != name}


MARKDOWN = {"cell_type": "markdown", "id": "m1", "metadata": {}, "source": "text"}
STREAM = {"output_type": "stream", "name": "stdout", "text": "x"}


# --------------------------------------------------------------------------------------- invalid notebooks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "can't be read as a notebook", id="empty file"),
        pytest.param("{", "can't be read as a notebook", id="half a file"),
        pytest.param("[]", "no notebook", id="other JSON"),
        pytest.param("\ud800".encode("utf-8", "surrogatepass"), "can't be read", id="not UTF-8"),
        pytest.param(notebook_of(code_cell(), nbformat=3), "format 3", id="old format"),
        pytest.param(notebook_of(code_cell(cell_type="python")), "cell_type 'python'", id="unknown type of cell"),
        pytest.param(notebook_of(code_cell(["a = 1", "print(a)"])), "without a line end", id="lines that join"),
        pytest.param(notebook_of(code_cell("'\ud800'")), "half of a character", id="lone surrogate"),
        pytest.param(notebook_of(code_cell(5)), "source of type int", id="source that is no text"),
    ],
)
def test_an_invalid_notebook_is_refused_and_left_as_it_is(
    opened: Agent, request: pytest.FixtureRequest, text: str | bytes, words: str
) -> None:
    name = f"{request.node.callspec.id.replace(' ', '-')}.ipynb"
    path = opened.workspace / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data)
    sessions = len(opened.sessions())
    for tool in ("start_session_resume_notebook", "start_session_continue_notebook"):
        assert words in opened.refused(tool, notebook_path=name)
    assert path.read_bytes() == data
    assert list(opened.workspace.glob(f"*{path.stem}*")) == [path]
    assert len(opened.sessions()) == sessions


def test_small_faults_are_mended_with_a_word(opened: Agent) -> None:
    faulty = [
        without(code_cell("print(0)"), "id"),
        code_cell("print(1)", id="has space"),
        code_cell("print(2)", id="twice"),
        code_cell("print(3)", id="twice"),
        MARKDOWN | {"outputs": []},
        code_cell("print(5)", id="c5", metadata={"tags": "parameters"}),
        code_cell("print(6)", id="c6", outputs=[{"output_type": "stream"}]),
        without(without(code_cell("print(7)", id="c7"), "metadata"), "execution_count"),
    ]
    path = opened.workspace / "mended.ipynb"
    path.write_text(notebook_of(*faulty, minor=None))
    answer = opened.read("start_session_resume_notebook", notebook_path="mended.ipynb")
    assert len(re.findall("^Note: .*mended.ipynb", answer, re.MULTILINE)) >= 5
    opened.switch_to(path)
    assert [outputs_of(path, cell["id"]) for cell in cells(path) if cell["cell_type"] == "code"] == [
        f"{n}\n" for n in (0, 1, 2, 3, 5, 6, 7)
    ]
    opened.shutdown()


def test_numbers_that_json_does_not_have_are_written_so_that_browsers_can_read_them(opened: Agent, study: Path) -> None:
    opened.ok("from IPython.display import JSON, display\ndisplay({'application/json': {'x': float('nan')}}, raw=True)")
    json.loads(study.read_text(), parse_constant=lambda name: pytest.fail(f"the file holds {name}"))


def test_half_a_character_breaks_neither_session_nor_file(opened: Agent, study: Path) -> None:
    assert opened.ok("print('half \\ud800 pair')") == "half ? pair"
    facts = opened.run("'whole ✓'")
    assert outputs_of(study, facts["cell_id"]) == "'whole ✓'"


# ------------------------------------------------------------------------------------------------ resume


def test_a_resumed_notebook_tells_what_failed_and_what_differs(opened: Agent) -> None:
    path = opened.workspace / "resumed.ipynb"
    old = [{"output_type": "stream", "name": "stdout", "text": "one\n"}]
    sources = ["print('one')", "print('two')", "open('gone.csv')", "print('never')"]
    listed = [code_cell(source, id=f"cell{n}", outputs=old) for n, source in enumerate(sources)]
    path.write_text(notebook_of(*listed))
    answer = opened.read("start_session_resume_notebook", notebook_path="resumed.ipynb")
    opened.switch_to(path)
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'gone.csv'" in answer
    assert "cell cell1 (done): was 'one', is now 'two'" in answer
    assert "cell0" not in answer.replace("Cells that ran: cell0", "")
    assert outputs_of(path, "cell3") == "one\n"
    opened.shutdown()


# ------------------------------------------------------------------------------------- edited by a person


def test_a_cell_that_a_person_inserts_above_a_running_one_takes_none_of_its_output(
    opened: Agent, study: Path, gate: Gate
) -> None:
    cell = opened.begin_cell(f"print('early', flush=True)\n{gate.code}\nprint('late')")
    gate.wait()
    edit_by_hand(study, lambda cells: cells.insert(0, code_cell("print('a person')", id="person1")))
    gate.open()
    assert opened.wait(cell)["text"].split() == ["early", "late"]
    assert outputs_of(study, cell) == "early\nlate\n"
    assert cells(study)[0]["source"] == "print('a person')"
    assert outputs_of(study, "person1") == ""


def test_a_persons_edits_during_a_run_survive(opened: Agent, study: Path, gate: Gate) -> None:
    other = opened.run("print('other')")["cell_id"]
    doomed = opened.run("print('doomed')")["cell_id"]
    cell = opened.begin_cell(f"{gate.code}\nprint('mine')")
    gate.wait()

    def edit(cells: list[Facts]) -> None:
        cells[:] = [one for one in cells if one["id"] != doomed]
        for one in cells:
            if one["id"] == other:
                one["source"] = "print('better')"
            if one["id"] == cell:
                one["source"] = ["# as a person sees it\n", *one["source"]]

    edit_by_hand(study, edit)
    gate.open()
    opened.wait(cell)
    found = {one["id"]: one for one in cells(study)}
    assert found[other]["source"] == "print('better')"
    assert doomed not in found
    assert found[cell]["source"].startswith("# as a person sees it")
    assert outputs_of(study, cell) == "mine\n"
    assert "'better'" in opened.read("read_notebook", session_id=opened.session, view="cells", limit=100)


def test_a_running_cell_that_a_person_deletes_ends_with_a_word(opened: Agent, study: Path, gate: Gate) -> None:
    cell = opened.begin_cell(f"{gate.code}\nprint('homeless')")
    gate.wait()
    edit_by_hand(study, lambda cells: cells.__delitem__(slice(-1, None)))
    gate.open()
    facts = opened.wait(cell)
    assert "homeless" in facts["text"]
    assert any("deleted" in note for note in facts["notes"])
    assert cell not in study.read_text()
    [entry] = [entry for entry in log_of(study) if entry["event"] == "run" and entry["cell_id"] == cell]
    assert entry["output"] == "homeless\n"


def test_every_attempt_is_in_the_log(opened: Agent, study: Path) -> None:
    cell = opened.run("print(1 / 0)")["cell_id"]
    ask = {"session_id": opened.session, "cell_id": cell}
    opened.call("edit_cell", **ask, source="print(1 / 1)")
    opened.call("edit_cell", **ask, source="print('not run')", run=False)
    opened.call("delete_cell", **ask)
    mine = [entry for entry in log_of(study) if entry.get("cell_id") == cell]
    assert [(entry["event"], entry["source"]) for entry in mine] == [
        ("begin", "print(1 / 0)"),
        ("run", "print(1 / 0)"),
        ("edit", "print(1 / 1)"),
        ("begin", "print(1 / 1)"),
        ("run", "print(1 / 1)"),
        ("edit", "print('not run')"),
        ("delete", "print('not run')"),
    ]
    assert [(run["state"], run["output_chars"] > 0) for run in mine if run["event"] == "run"] == [
        ("failed", True),
        ("done", True),
    ]
    assert cell not in study.read_text()


# -------------------------------------------------------------------------- taken away from under the agent


def damaged(opened: Agent, study: Path, gate: Gate, damage: Callable[[], Any]) -> tuple[str, Facts]:
    """Run a cell during which something happens to the file; its id and facts."""
    cell = opened.begin_cell(f"{gate.code}\nprint('done anyway')")
    gate.wait()
    damage()
    gate.open()
    facts = opened.wait(cell)
    assert (facts["state"], facts["text"]) == ("done", "done anyway")
    return cell, facts


def test_a_deleted_notebook_is_written_again(opened: Agent, study: Path, gate: Gate) -> None:
    kept = [cell["id"] for cell in cells(study)]
    cell, facts = damaged(opened, study, gate, study.unlink)
    assert any("gone" in note for note in facts["notes"])
    assert [one["id"] for one in cells(study)] == [*kept, cell]
    assert outputs_of(study, cell) == "done anyway\n"


def test_a_moved_notebook_stays_whole_where_it_went(opened: Agent, study: Path, gate: Gate) -> None:
    moved = study.with_name("moved.ipynb")
    cell, facts = damaged(opened, study, gate, lambda: study.rename(moved))
    assert any("moved" in note for note in facts["notes"])
    assert cells(moved)[-1]["id"] == cell
    assert outputs_of(study, cell) == "done anyway\n"


def test_a_read_only_notebook_is_not_written_until_it_may_be(opened: Agent, study: Path, gate: Gate) -> None:
    cell, facts = damaged(opened, study, gate, lambda: study.chmod(0o444))
    before = study.read_bytes()
    assert any("read-only" in note for note in facts["notes"])
    assert "done anyway" in opened.read("read_output", session_id=opened.session, cell_id=cell)
    assert study.read_bytes() == before
    study.chmod(0o644)
    later = opened.run("1")
    assert not later["notes"]
    assert outputs_of(study, cell) == "done anyway\n"


def test_a_notebook_that_a_person_broke_is_left_to_them(opened: Agent, study: Path, gate: Gate) -> None:
    good = study.read_bytes()
    cell, facts = damaged(opened, study, gate, lambda: study.write_text("<<<<<<< HEAD\n"))
    assert any("can't be read as a notebook" in note for note in facts["notes"])
    assert study.read_text() == "<<<<<<< HEAD\n"
    study.write_bytes(good)
    opened.run("1")
    assert outputs_of(study, cell) == "done anyway\n"


def test_a_full_disk_is_told_and_costs_nothing_but_the_file(opened: Agent, study: Path, gate: Gate) -> None:
    keeper = keeper_of(opened.session)
    before = study.read_bytes()
    limit = len(before) // 2
    _, hard = keeper.rlimit(resource.RLIMIT_FSIZE)
    keeper.rlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the kernel refuses writes beyond it, as a full disk does
    try:
        facts = opened.run("big = 'x' * 30_000\nprint(big)")
        assert facts["state"] == "done"
        assert any("can't be written" in note for note in facts["notes"])
        assert study.read_bytes() == before
        assert not list(study.parent.glob(f".{study.name}*"))
    finally:
        keeper.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert opened.ok("len(big)") == "30000"
    assert "x" * 100 in outputs_of(study, facts["cell_id"])


def test_nobody_ever_sees_half_a_notebook(opened: Agent) -> None:
    path = opened.start("whole")
    opened.run("from IPython.display import HTML, display\nfor _ in range(4):\n    display(HTML('x' * 900_000))")
    is_over, reads = threading.Event(), [0]

    def watch() -> None:
        while not is_over.is_set():
            json.loads(path.read_text())
            reads[0] += 1

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch)
        try:
            last = [opened.run(f"print({n})") for n in range(15)][-1]
            keeper_of(opened.session).send_signal(signal.SIGKILL)
        finally:
            is_over.set()
        watching.result(20)
    assert reads[0] > 5
    assert outputs_of(path, last["cell_id"]) == "14\n"
