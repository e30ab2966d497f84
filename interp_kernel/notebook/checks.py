"""What is looked at before a notebook runs: a fault found now costs nothing, one found later costs the run.

papermill and nbformat let most of these pass: a cell of type `python` is silently skipped, source lines without line
ends are joined to `a = 1print(a)`, an unknown parameter is set where no cell reads it.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError

CELL_TYPES = ("code", "markdown", "raw")


def read_notebook(path: Path) -> dict[str, Any]:
    """Read a notebook of format 4 and refuse it unless every cell will run as it reads.

    Raises:
        NotebookError: The file is no notebook, or a cell is malformed; the message names the cell, counted from 0.
    """
    notebook = _parse(path)
    for index, cell in enumerate(notebook["cells"]):
        _check_cell(path, index, cell)
    _check_ids(path, notebook["cells"])
    _check_schema(path, notebook)
    return notebook


def kernel_of(path: Path, notebook: Mapping[str, Any], kernel_name: str | None) -> tuple[str, str]:
    """Name and language of the kernel that the notebook runs on.

    Raises:
        NotebookError: None is named, or it is not installed here.
    """
    from jupyter_client.kernelspec import NoSuchKernel

    from interp_kernel.notebook.runner import SpecManager

    name = kernel_name or notebook["metadata"].get("kernelspec", {}).get("name")
    manager = SpecManager()
    installed = ", ".join(sorted({*manager.find_kernel_specs(), "interp"}))
    if not name:
        raise NotebookError(
            f"{path} names no kernel: metadata.kernelspec.name is missing. Write one into it or pass kernel_name; "
            f"installed are {installed}."
        )
    try:
        return name, str(manager.get_kernel_spec(name).language)
    except NoSuchKernel:
        raise NotebookError(
            f"{path} asks for the kernel {name!r}, which is not installed; installed are {installed}."
        ) from None


def check_parameters(path: Path, notebook: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse parameters that the cell tagged `parameters` doesn't assign.

    Raises:
        NotebookError: A name is unknown, or there is no such cell.
    """
    names = list(names)
    if not names:
        return
    known = _parameter_names(path, notebook)
    if known is None:
        raise NotebookError(
            f"{path} has no cell tagged `parameters`, so {names[0]!r} can't be set. Tag the cell that assigns it."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise NotebookError(f"{path} has no parameter {unknown[0]!r}; it takes {', '.join(known) or 'none'}.")


def _parse(path: Path) -> dict[str, Any]:
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotebookError(f"{path} doesn't exist; expected a notebook.") from None
    except (ValueError, OSError) as error:
        raise NotebookError(f"{path} can't be read as a notebook: {error}.") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise NotebookError(f"{path} is JSON but no notebook of format 4: it has no list `cells`.")
    if notebook.get("nbformat") != 4 or not isinstance(notebook.get("nbformat_minor"), int):
        found = f"{notebook.get('nbformat')!r}.{notebook.get('nbformat_minor')!r}"
        raise NotebookError(f"{path} has notebook format {found}; expected 4.0 to 4.5.")
    if not isinstance(notebook.get("metadata"), dict):
        raise NotebookError(f"{path} has no `metadata`; expected an object that names the kernel.")
    return notebook


def _check_cell(path: Path, index: int, cell: Any) -> None:
    where = f"Cell {index} of {path}"
    kind = cell.get("cell_type") if isinstance(cell, dict) else None
    if kind not in CELL_TYPES:
        raise NotebookError(f"{where} has cell_type {kind!r}; expected one of {', '.join(CELL_TYPES)}.")
    source = cell.get("source")
    lines = [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise NotebookError(f"{where} has a source of type {type(source).__name__}; expected text or a list of lines.")
    joined = next((line for line in lines[:-1] if not line.endswith("\n")), None)
    if joined is not None:
        raise NotebookError(f"{where} has the source line {joined!r} without a line end; it would join the next line.")
    try:
        "".join(lines).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise NotebookError(f"{where} holds {found!a}, half of a character, which no file can store.") from None


def _check_ids(path: Path, cells: list[dict[str, Any]]) -> None:
    counts = Counter(cell["id"] for cell in cells if "id" in cell)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        where = [index for index, cell in enumerate(cells) if cell.get("id") == twice[0]]
        raise NotebookError(f"Cells {where} of {path} share the id {twice[0]!r}; expected each to have its own.")


def _check_schema(path: Path, notebook: dict[str, Any]) -> None:
    import nbformat

    # Tools leave out ids and empty outputs so often, and so harmlessly, that they count as present.
    cells = [
        {**({"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}), **cell}
        | ({"id": cell.get("id", f"cell-{index}")} if notebook["nbformat_minor"] >= 5 else {})
        for index, cell in enumerate(notebook["cells"])
    ]
    try:
        nbformat.validate({**notebook, "cells": cells})
    except nbformat.ValidationError as error:
        steps = list(error.absolute_path)
        place = f"Cell {steps[1]} of {path}" if steps[:1] == ["cells"] and len(steps) > 1 else str(path)
        raise NotebookError(f"{place} is not valid: {error.message[:300]}.") from None


def _parameter_names(path: Path, notebook: Mapping[str, Any]) -> list[str] | None:
    tagged = [
        (index, cell)
        for index, cell in enumerate(notebook["cells"])
        if "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if not tagged:
        return None
    index, cell = tagged[0]
    lines = "".join(cell["source"]).splitlines()
    try:
        tree = ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in lines))
    except SyntaxError as error:
        raise NotebookError(f"Cell {index} of {path}, tagged `parameters`, is not Python: {error}.") from None
    return [
        node.id
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
