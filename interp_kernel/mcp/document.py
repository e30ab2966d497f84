"""The notebook file of a session. The file is the truth: what stands in it is merged, cell by cell, before each write.

Each write carries a revision in the notebook's metadata, which editors keep. So when somebody else has written the
file, it is known which of our changes they had seen: what they had not seen is put in, whatever else they have is
theirs. Writes replace the file in one step and make anew only the text of cells that changed.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError, SessionError
from interp_kernel.mcp.outputs import Output

MARK = "interp_session"
TOLD = 10
"""How many small faults of a notebook are told one by one."""
FORMAT = {"nbformat": 4, "nbformat_minor": 5}
KERNELSPEC = {"display_name": "Python 3 (interp)", "language": "python", "name": "interp"}


@dataclass
class Cell:
    """A cell, and the revisions at which a session has changed it."""

    data: dict[str, Any]  # as in the file, the source as one text
    created_at: int = 0
    source_at: int = 0
    outputs_at: int = 0
    sources: set[str] = field(default_factory=set)  # earlier texts of its source
    text: bytes | None = None  # as it stands in the file; None after a change

    @property
    def id(self) -> str:
        """Its id, by which everything finds it."""
        return str(self.data["id"])

    @property
    def kind(self) -> str:
        """Its type: code, markdown or raw."""
        return str(self.data["cell_type"])

    @property
    def source(self) -> str:
        """Its source."""
        return str(self.data["source"])

    def encoded(self) -> bytes:
        """Its JSON, formatted as nbformat does."""
        if self.text is None:
            text = dump({**self.data, **in_lines(self.data)})
            self.text = ("  " + text.replace("\n", "\n  ")).encode("utf-8", "replace")
        return self.text


class Document:
    """The cells of one notebook, in memory and in its file."""

    def __init__(self, path: Path, session_id: str, metadata: Mapping[str, Any], cells: Iterable[Cell] = ()) -> None:
        self.path, self.session_id = path, session_id
        self.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}, **metadata}
        self.cells = list(cells)
        self.revision = 0
        self.problem = ""
        self._seen: tuple[int, int, int] | None = None  # what the file was when it was last read or written
        self._deleted: dict[str, tuple[int, str]] = {}
        self._news: list[str] = []

    # ------------------------------------------------------------------------------------------- cells

    def find(self, cell_id: str) -> Cell:
        """The cell of that id.

        Raises:
            SessionError: There is none.
        """
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        ids = [cell.id for cell in self.cells]
        shown = ", ".join(ids[-30:]) or "none"
        rest = f" (the last 30 of {len(ids)}; read_notebook lists all)" if len(ids) > 30 else ""
        raise SessionError(f"Cell {cell_id!r} is not in {self.path.name}. Its cells are: {shown}{rest}.")

    def insert(self, source: str, kind: str, after: str | None) -> Cell:
        """Add a cell after the one named; at the end if None, at the top if empty."""
        place = len(self.cells) if after is None else 0 if after == "" else self.cells.index(self.find(after)) + 1
        data: dict[str, Any] = {"cell_type": kind, "id": new_id(), "metadata": {}, "source": source}
        if kind == "code":
            data |= {"execution_count": None, "outputs": []}
        cell = Cell(data, created_at=self.revision + 1)
        self.cells.insert(place, cell)
        return cell

    def set_source(self, cell: Cell, source: str) -> None:
        """Replace the source of a cell; its outputs stay until it is run."""
        cell.sources.add(cell.source)
        cell.data["source"] = source
        cell.source_at, cell.text = self.revision + 1, None

    def set_outputs(self, cell: Cell, outputs: list[Output], count: int | None) -> None:
        """Replace the outputs of a cell."""
        cell.data |= {"outputs": outputs, "execution_count": count}
        cell.outputs_at, cell.text = self.revision + 1, None

    def delete(self, cell: Cell) -> None:
        """Take a cell out."""
        self.cells.remove(cell)
        self._deleted[cell.id] = (self.revision + 1, cell.source)

    def move(self, cell: Cell, after: str) -> None:
        """Put a cell after another one, or at the top if `after` is empty."""
        anchor = self.find(after) if after else None
        if anchor is cell:
            raise SessionError(f"Cell {cell.id!r} can't be moved after itself.")
        self.cells.remove(cell)
        self.cells.insert(self.cells.index(anchor) + 1 if anchor else 0, cell)

    def tell(self, news: str) -> None:
        """Have something told by whoever asks next."""
        self._news.append(news)

    def news(self) -> list[str]:
        """What others did to the file since this was last asked."""
        news, self._news = self._news, []
        more = [f"{len(news) - TOLD} more changes were made; read_notebook shows all."] if len(news) > TOLD else []
        return news[:TOLD] + more

    # -------------------------------------------------------------------------------------------- file

    def take_in(self) -> None:
        """Read the file if somebody else has written it.

        Raises:
            NotebookError: It holds no notebook any more.
            OSError: It can't be read.
        """
        seen = signature(self.path)
        if seen == self._seen or self._seen is None:
            return
        if seen is None:
            self._news.append(f"{self.path.name} was gone (deleted or moved); it is written anew from what is known.")
        else:
            self.merge(read_cells(self.path))
        self._seen = seen

    def merge(self, theirs: dict[str, Any]) -> None:
        """Take over another version of the notebook, except for our changes that its author had not seen."""
        mark = theirs["metadata"].pop(MARK, {})
        known = mark.get("revision", self.revision) if mark.get("session") == self.session_id else self.revision
        self.metadata = theirs["metadata"]
        ours = {cell.id: cell for cell in self.cells}
        merged = [self._merged(ours.get(data["id"]), data, known) for data in theirs["cells"]]
        cells = [cell for cell in merged if cell is not None]
        kept = {cell.id for cell in cells}
        for place, cell in enumerate(self.cells):
            if cell.id in kept:
                continue
            if cell.created_at > known:
                before = next((c for c in reversed(self.cells[:place]) if c.id in kept), None)
                cells.insert(cells.index(before) + 1 if before else 0, cell)
                kept.add(cell.id)
            else:
                self._news.append(f"Cell {cell.id} was deleted in {self.path.name} by somebody else.")
        self.cells = cells

    def _merged(self, ours: Cell | None, data: dict[str, Any], known: int) -> Cell | None:
        if ours is None:
            deleted_at, source = self._deleted.get(data["id"], (0, ""))
            if deleted_at > known and source == data["source"]:
                return None
            self._news.append(f"Cell {data['id']} was added to {self.path.name} by somebody else.")
            return Cell(data)
        if data == ours.data:
            return ours
        if data["source"] != ours.source:
            if ours.source_at > known and data["source"] in ours.sources:
                data["source"] = ours.source
            else:
                self._news.append(f"The source of cell {ours.id} was changed in {self.path.name} by somebody else.")
        if ours.outputs_at > known and data["cell_type"] == "code" == ours.kind:
            data |= {"outputs": ours.data["outputs"], "execution_count": ours.data["execution_count"]}
        ours.data, ours.text = data, None
        return ours

    def save(self) -> None:
        """Merge with the file and replace it in one step; what keeps that from working is noted in `problem`."""
        try:
            while not self._replace():
                pass
            self.problem = ""
        except NotebookError as error:
            self.problem = f"{error} It is left as it is, and the cells are kept in memory until it can be read again."
        except OSError as error:
            reason = error.strerror or str(error)
            self.problem = f"{self.path} can't be written: {reason}. The cells are kept in memory until it can."

    def _replace(self) -> bool:
        """Write the file unless somebody else does so meanwhile."""
        self.take_in()
        mode = self._mode()
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with scratch.open("wb") as file:
                self.revision += 1
                file.writelines(self._chunks())
                os.fchmod(file.fileno(), mode)
            if self._seen is not None and signature(self.path) not in (self._seen, None):
                return False
            written = signature(scratch)
            scratch.replace(self.path)
            self._seen = written
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
        return True

    def _mode(self) -> int:
        try:
            mode = self.path.stat().st_mode & 0o777
        except FileNotFoundError:
            return 0o644
        if not mode & 0o222:
            raise PermissionError(None, "it is marked read-only")
        return mode

    def _chunks(self) -> Iterable[bytes]:
        yield b'{\n "cells": ['
        for index, cell in enumerate(self.cells):
            yield (b",\n" if index else b"\n") + cell.encoded()
        metadata = {**self.metadata, MARK: {"session": self.session_id, "revision": self.revision}}
        rest = dump({"metadata": metadata, **FORMAT}).removeprefix("{")
        yield (b"\n ]," if self.cells else b"],") + rest.encode("utf-8", "replace") + b"\n"

    def save_elsewhere(self) -> Path | None:
        """Save beside a file that can't be written, before a session ends; returns where."""
        if not self.problem:
            return None
        place = self.path.with_name(f"{self.path.stem}.unsaved-{self.session_id}.ipynb")
        try:
            place.write_bytes(b"".join(self._chunks()))
        except OSError:
            return None
        return place


# ------------------------------------------------------------------------------------------------ reading


def open_document(path: Path, session_id: str) -> Document:
    """The notebook of a file, checked before anything of it runs; small faults are mended and told.

    Raises:
        NotebookError: It is no notebook, or a cell is malformed.
    """
    from interp_kernel.notebook.checks import examine

    found = examine(path)
    if found.refused or found.notebook is None:
        raise NotebookError(found.refused[0].text)
    notebook = normal(found.notebook)
    notebook["metadata"].pop(MARK, None)
    document = Document(path, session_id, notebook["metadata"], map(Cell, notebook["cells"]))
    document._seen = signature(path)
    mended = [fault.text for fault in found.faults]
    rest = [f"{len(mended) - TOLD} more small faults of {path.name} were mended."] if len(mended) > TOLD else []
    document._news += mended[:TOLD] + rest
    return document


def read_cells(path: Path) -> dict[str, Any]:
    """Metadata and cells of a notebook that somebody else may have written, in our form."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells, metadata = notebook["cells"], notebook["metadata"]
        if not isinstance(metadata, dict) or any(
            cell["cell_type"] not in ("code", "markdown", "raw") for cell in cells
        ):
            raise TypeError("it has a cell of a type that is not known")
        return normal(notebook)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotebookError(f"{path} was changed and can't be read as a notebook any more ({error}).") from None


def normal(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with texts in one piece, an id for each cell, and outputs for each code cell."""
    ids: set[str] = set()
    for cell in notebook["cells"]:
        cell["source"] = joined(cell["source"])
        cell.setdefault("metadata", {})
        if not cell.get("id") or cell["id"] in ids:
            cell["id"] = new_id()
        ids.add(cell["id"])
        if cell["cell_type"] == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
            for output in cell["outputs"]:
                join_output(output)
    return notebook


def join_output(output: Output) -> None:
    """Put the lines of an output's texts together."""
    if "text" in output:
        output["text"] = joined(output["text"])
    data = output.get("data", {})
    for mime, value in data.items():
        if isinstance(value, list) and not is_json(mime):
            data[mime] = joined(value)


def joined(text: Any) -> str:
    """A text that may be a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def is_json(mime: str) -> bool:
    """Whether data of a type stand in a file as they are."""
    return mime.endswith("json")


def is_lines(mime: str) -> bool:
    """Whether texts of a type stand in a file as lists of lines."""
    return mime.startswith("text/") or mime in ("application/javascript", "image/svg+xml")


def new_id() -> str:
    """A cell id that is short enough to be repeated by an agent."""
    return uuid.uuid4().hex[:8]


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever somebody writes the file; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# ------------------------------------------------------------------------------------------------ writing


def dump(value: Any) -> str:
    """JSON as nbformat formats it; numbers that JSON doesn't have become null, which browsers can read."""
    options: dict[str, Any] = {"indent": 1, "sort_keys": True, "ensure_ascii": False, "separators": (",", ": ")}
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), **options)


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not -1.8e308 < value < 1.8e308 else value


def in_lines(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a cell that files hold as lists of lines."""
    fields: dict[str, Any] = {"source": data["source"].splitlines(keepends=True)}
    if data["cell_type"] == "code":
        fields["outputs"] = [output_in_lines(output) for output in data["outputs"]]
    return fields


def output_in_lines(output: Output) -> Output:
    """An output with its texts as lists of lines; JSON stays as it is."""
    lines = dict(output)
    if isinstance(text := output.get("text"), str):
        lines["text"] = text.splitlines(keepends=True)
    if "data" in output:
        lines["data"] = {
            mime: value.splitlines(keepends=True) if isinstance(value, str) and is_lines(mime) else value
            for mime, value in output["data"].items()
        }
    return lines
