"""The notebook file of a session: its bytes, and what becomes of edits by several hands. nbformat is the oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from interp_kernel.errors import NotebookError, SessionError
from interp_kernel.mcp.document import MARK, Document, open_document
from interp_kernel.mcp.log import INLINE_CHARS, MAX_TEXT_BYTES, AttemptLog
from interp_kernel.mcp.mask import Mask
from interp_kernel.mcp.outputs import HEAD_CHARS, MAX_OUTPUTS, TAIL_CHARS, Outputs

TEXT = [{"output_type": "stream", "name": "stdout", "text": "one\ntwo\n"}]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.ipynb"


@pytest.fixture
def document(path: Path) -> Document:
    """Three code cells a, b, c, saved."""
    made = Document(path, "me", {})
    for source in "abc":
        made.insert(source, "code", None)
    made.save()
    assert not made.problem
    return made


def by_hand(path: Path, edit: Edit) -> None:
    """What another program does: read the file, change it, write it."""
    save_old(path, path.read_text(), edit)


def save_old(path: Path, text: str, edit: Edit) -> None:
    """What an editor does that has had the file open since it held `text`."""
    notebook = json.loads(text)
    edit(notebook)
    path.write_text(json.dumps(notebook))


def sources(path: Path) -> list[str]:
    return [cell["source"] for cell in nbformat.read(path, as_version=4).cells]


def ids(document: Document) -> list[str]:
    return [cell.id for cell in document.cells]


# --------------------------------------------------------------------------------------------- its bytes


def test_file_has_the_bytes_that_nbformat_writes(path: Path) -> None:
    document = Document(path, "me", {})
    cell = document.insert("x = 'é'\nprint(x)\n\n", "code", None)
    document.insert("# Title\ntext", "markdown", "")
    data: dict[str, Any] = {
        "text/plain": "a\nb",
        "text/html": "<p>\n</p>",
        "image/png": "AA\nBB",
        "image/svg+xml": "<svg>\n</svg>",
    }
    data |= {"application/javascript": "1;\n2", "application/x+json": {"b": [1, {"a": None}], "a": "x\ny"}}
    shown = {"output_type": "display_data", "data": data, "metadata": {}}
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["a\n", "b"]}
    document.set_outputs(cell, [*TEXT, shown, error], 3)
    document.save()
    document.set_source(cell, "x = 2")  # the other cell's text is taken from before
    document.save()
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.read_text() == nbformat.writes(notebook) + "\n"
    assert notebook.cells[1].source == "x = 2"
    assert notebook.cells[1].outputs[1].data == data


def test_empty_notebook_is_valid(path: Path) -> None:
    Document(path, "me", {}).save()
    nbformat.validate(nbformat.read(path, as_version=4))


def test_file_is_replaced_in_one_step_and_keeps_its_mode(document: Document, path: Path) -> None:
    path.chmod(0o640)
    before = path.read_text()
    with path.open() as reader:
        document.insert("d", "code", None)
        document.save()
        assert reader.read() == before
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == [path.name]


def test_numbers_without_json_become_null(document: Document, path: Path) -> None:
    data = {"application/json": {"a": [float("nan"), float("inf"), 1.5]}}
    document.set_outputs(document.cells[0], [{"output_type": "display_data", "data": data, "metadata": {}}], 1)
    document.save()
    assert json.loads(path.read_text())["cells"][0]["outputs"][0]["data"]["application/json"]["a"] == [None, None, 1.5]


def test_unchanged_file_is_not_read_again(document: Document, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_kernel.mcp.document.read_cells", pytest.fail)
    document.set_source(document.cells[0], "A")
    document.save()
    assert not document.problem
    assert sources(path) == ["A", "b", "c"]


# ---------------------------------------------------------------------------------------- several hands


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda nb: nb["cells"].insert(0, new_markdown_cell("mine")), ["mine", "a", "b", "c", "d"]),
        (lambda nb: nb["cells"].pop(1), ["a", "c", "d"]),
        (lambda nb: nb["cells"][1].update(source=["B\n", "2"]), ["a", "B\n2", "c", "d"]),
        (lambda nb: nb["cells"].reverse(), ["c", "d", "b", "a"]),
    ],
    ids=["insert", "delete", "edit", "reorder"],
)
def test_edits_of_others_are_kept_beside_ours(document: Document, path: Path, edit: Edit, expected: list[str]) -> None:
    old = path.read_text()
    document.insert("d", "code", ids(document)[2])
    document.save()
    save_old(path, old, edit)  # an editor that never saw d
    document.set_outputs(document.cells[0], TEXT, 1)
    document.save()
    assert sources(path) == expected
    by_source = {cell["source"]: cell for cell in nbformat.read(path, as_version=4).cells}
    assert by_source["a"]["outputs"][0]["text"] == "one\ntwo\n"


def test_editor_that_saw_our_cell_may_delete_it(document: Document, path: Path) -> None:
    document.insert("d", "code", None)
    document.save()
    by_hand(path, lambda nb: nb["cells"].pop(3))
    document.save()
    assert sources(path) == ["a", "b", "c"]
    assert any("was deleted" in note for note in document.news())


def test_output_that_an_editor_never_saw_is_put_back(document: Document, path: Path) -> None:
    old = path.read_text()
    document.set_outputs(document.cells[1], TEXT, 7)
    document.save()
    save_old(path, old, lambda nb: nb["cells"][0].update(source="A"))
    document.save()
    cells = nbformat.read(path, as_version=4).cells
    assert (cells[0].source, cells[1].execution_count, cells[1].outputs[0].text) == ("A", 7, "one\ntwo\n")


def test_outputs_that_an_editor_cleared_stay_cleared(document: Document, path: Path) -> None:
    document.set_outputs(document.cells[1], TEXT, 7)
    document.save()
    by_hand(path, lambda nb: nb["cells"][1].update(outputs=[], execution_count=None))
    document.save()
    assert nbformat.read(path, as_version=4).cells[1].outputs == []


def test_our_source_stays_unless_somebody_changed_the_same_cell(document: Document, path: Path) -> None:
    old = path.read_text()
    document.set_source(document.cells[0], "ours")
    document.set_source(document.cells[1], "ours too")
    document.save()
    save_old(path, old, lambda nb: nb["cells"][1].update(source="theirs"))
    document.save()
    assert sources(path) == ["ours", "theirs", "c"]
    assert any(ids(document)[1] in note and "changed" in note for note in document.news())


def test_cell_that_we_deleted_does_not_come_back_unless_it_was_edited(document: Document, path: Path) -> None:
    old = path.read_text()
    document.delete(document.cells[0])
    document.delete(document.cells[0])
    document.save()
    save_old(path, old, lambda nb: nb["cells"][1].update(source="still needed"))
    document.save()
    assert sources(path) == ["still needed", "c"]


def test_notebook_metadata_of_others_are_kept(document: Document, path: Path) -> None:
    by_hand(path, lambda nb: nb["metadata"].update(title="T"))
    document.save()
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["title"] == "T"
    assert metadata[MARK] == {"session": "me", "revision": document.revision}


def test_file_written_between_merge_and_replace_is_merged_too(
    document: Document, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, edits = Document._chunks, [lambda nb: nb["cells"].append(new_markdown_cell("late"))]

    def chunks_and_an_edit(self: Document) -> Any:
        yield from chunks(self)
        if edits:
            by_hand(path, edits.pop())

    monkeypatch.setattr(Document, "_chunks", chunks_and_an_edit)
    document.set_source(document.cells[0], "A")
    document.save()
    assert sources(path) == ["A", "b", "c", "late"]


# ------------------------------------------------------------------------------------------- the rest


def test_moving_and_finding(document: Document) -> None:
    a, b, c = document.cells
    document.move(a, c.id)
    assert document.cells == [b, c, a]
    document.move(c, "")
    assert document.cells == [c, b, a]
    with pytest.raises(SessionError, match="can't be moved after itself"):
        document.move(a, a.id)
    with pytest.raises(SessionError, match=rf"'zz' is not in study.ipynb. Its cells are: {c.id}, {b.id}, {a.id}"):
        document.find("zz")


def test_opened_notebook_is_what_nbformat_reads(path: Path) -> None:
    notebook = new_notebook(
        cells=[new_markdown_cell("m"), new_code_cell("a\nb", outputs=[new_output("stream", text="t")])]
    )
    nbformat.write(notebook, path)
    document = open_document(path, "me")
    assert [cell.data for cell in document.cells] == [dict(cell) for cell in notebook.cells]
    path.write_text("{}")
    with pytest.raises(NotebookError, match="no list `cells`"):
        open_document(path, "me")


def test_what_cannot_be_written_is_saved_elsewhere(document: Document, path: Path) -> None:
    path.write_text("no notebook")
    document.insert("d", "code", None)
    document.save()
    assert "can't be read as a notebook any more" in document.problem
    assert path.read_text() == "no notebook"
    place = document.save_elsewhere()
    assert place is not None
    assert sources(place) == ["a", "b", "c", "d"]


# --------------------------------------------------------------------------------------- outputs and log


def make_outputs(log: list[str]) -> Outputs:
    def keep(text: str) -> str:
        log.append(text)
        return text

    return Outputs(keep, Mask({}))


def stream(outputs: Outputs, *texts: str, name: str = "stdout") -> None:
    for text in texts:
        outputs.add("stream", {"name": name, "text": text})


def test_long_text_keeps_its_ends_and_the_log_has_all() -> None:
    log: list[str] = []
    outputs = make_outputs(log)
    lines = [f"{n:09}\n" for n in range(60_000)]
    stream(outputs, *("".join(lines[i : i + 100]) for i in range(0, 60_000, 100)))
    outputs.close()
    [output] = outputs.render()
    head, tail = output["text"].split("\n[... ")[0], output["text"].split("left out here ...]\n")[1]
    assert head == "".join(lines)[:HEAD_CHARS]
    assert tail == "".join(lines)[-TAIL_CHARS:]
    assert f"{600_000 - HEAD_CHARS - TAIL_CHARS} characters" in output["text"]
    assert "".join(log) == "".join(lines)
    assert outputs.is_cut


def test_endless_line_is_bounded() -> None:
    outputs = make_outputs([])
    stream(outputs, *["x" * 1000] * 400)
    assert len(outputs.render()[0]["text"]) < HEAD_CHARS + TAIL_CHARS + 10_000


def test_streams_that_alternate_without_end_are_bounded() -> None:
    outputs = make_outputs([])
    for n in range(3000):
        stream(outputs, f"out {n}\n")
        stream(outputs, f"err {n}\n", name="stderr")
    rendered = outputs.render()
    assert len(rendered) == MAX_OUTPUTS
    assert [output["text"].splitlines()[-1] for output in rendered[-2:]] == ["out 2999", "err 2999"]


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["0%\r", "50%\r", "100%\n", "end\n"], "100%\nend\n"),
        (["ab\b", "c\n"], "ac\n"),
        (["line\r\n", "next\r", "\n"], "line\nnext\n"),
        (["10%\r20%"], "20%"),
        (["x\r"], "x"),
    ],
)
def test_overwriting_is_shown_as_a_terminal_does(texts: list[str], shown: str) -> None:
    outputs = make_outputs([])
    stream(outputs, *texts)
    assert outputs.render()[0]["text"] == shown
    outputs.close()
    assert outputs.render()[0]["text"] == shown


def test_too_many_displays_are_counted() -> None:
    kept: list[str] = []
    outputs = make_outputs(kept)
    for n in range(MAX_OUTPUTS + 7):
        outputs.add("display_data", {"data": {"text/plain": str(n)}, "metadata": {}})
    outputs.add("error", {"ename": "E", "evalue": "v", "traceback": ["t"]})
    kinds = [output["output_type"] for output in outputs.render()]
    assert kinds == ["display_data"] * MAX_OUTPUTS + ["error", "stream"]
    assert outputs.render()[-1]["text"].startswith("[7 more outputs")
    assert "".join(kept) == "".join(f"{n}\n" for n in range(MAX_OUTPUTS + 7)) + "t\n"  # the log has the text of all


def test_log_is_only_appended_to_and_bounded(path: Path) -> None:
    log = AttemptLog(path)
    log.append("one", source="é")
    log.append("two", value=Path("x"))
    entries = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(entry["event"], entry.get("source")) for entry in entries] == [("one", "é"), ("two", None)]
    run = log.run_text("r")
    run.add("x" * INLINE_CHARS)
    assert not run.is_in_file
    assert run.read() == "x" * INLINE_CHARS
    run.add("y")
    assert run.is_in_file
    assert run.path.read_text() == run.read() == "x" * INLINE_CHARS + "y"
    run.nbytes = MAX_TEXT_BYTES
    run.add("z")
    assert run.read().endswith("y")


def test_log_that_cannot_be_written_says_so(path: Path) -> None:
    path.with_suffix(".attempts").write_text("a file is in the way")
    log = AttemptLog(path)
    log.append("one")
    assert "can't be written" in log.problem
