"""What the cell tagged `parameters` declares, and whether given values fit it.

papermill itself sets any name to anything: an unknown one where no cell reads it, a tuple or a
number of numpy's as text.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError, did_you_mean

TAG = "parameters"
NONE = type(None)
ANNOTATIONS: dict[str, frozenset[type]] = {
    "int": frozenset({int}),
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
    "str": frozenset({str}),
    "list": frozenset({list}),
    "dict": frozenset({dict}),
    "None": frozenset({NONE}),
}
DEFAULTS: dict[type, frozenset[type]] = {
    # `rate = 1` is how one writes a rate; who means whole numbers can annotate.
    int: frozenset({int, float}),
    float: frozenset({int, float}),
    bool: frozenset({bool}),
    str: frozenset({str}),
    list: frozenset({list}),
    tuple: frozenset({list}),
    dict: frozenset({dict}),
}


@dataclass(frozen=True)
class Parameter:
    """A name that the cell tagged `parameters` assigns or declares.

    Attributes:
        name: The name.
        text: Its declaration as it is written, such as `layer: int = 3`.
        kinds: Types that a value may have; None if the declaration doesn't tell.
        is_required: Whether it is annotated without a value, as in `layer: int`.
    """

    name: str
    text: str
    kinds: frozenset[type] | None
    is_required: bool = False

    def takes(self, value: Any) -> bool:
        """Whether the value is of a declared type; True and False are no numbers."""
        return self.kinds is None or type(value) in self.kinds or (isinstance(value, str) and str in self.kinds)


def declared_parameters(path: Path, notebook: Mapping[str, Any]) -> dict[str, Parameter] | None:
    """The notebook's parameters by name; None if no cell is tagged `parameters`.

    Raises:
        NotebookError: Several cells are tagged so, or the tagged one is no Python code.
    """
    tagged = [(index, cell) for index, cell in enumerate(notebook["cells"]) if TAG in _tags(cell)]
    if not tagged:
        return None
    if len(tagged) > 1:
        raise NotebookError(
            f"Cells {[index for index, _ in tagged]} of {path} are all tagged `parameters`; expected one. "
            "Values are set after the first of them, so the others would overwrite them."
        )
    index, cell = tagged[0]
    if cell["cell_type"] != "code":
        raise NotebookError(f"Cell {index} of {path}, tagged `parameters`, is {cell['cell_type']}; expected code.")
    lines = "".join(cell["source"]).splitlines()
    try:
        tree = ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in lines))
    except SyntaxError as error:
        raise NotebookError(f"Cell {index} of {path}, tagged `parameters`, is not Python: {error}.") from None
    return {found.name: found for statement in tree.body for found in _declared_by(statement)}


def check_parameters(path: Path, notebook: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that the cell tagged `parameters` doesn't declare, or not so, and a lack of those it needs.

    Raises:
        NotebookError: A name is unknown or missing, a value is of the wrong type or none that a notebook can store.
    """
    known = declared_parameters(path, notebook)
    if known is None:
        if parameters:
            name = next(iter(parameters))
            raise NotebookError(
                f"{path} has no cell tagged `parameters`, so {name!r} can't be set. Tag the cell that assigns it."
            )
        return
    for name, value in parameters.items():
        if name not in known:
            takes = ", ".join(known) or "none"
            raise NotebookError(f"{path} has no parameter {name!r}; it takes {takes}.{did_you_mean(name, known)}")
        _check_value(path, known[name], value)
    missing = [parameter for name, parameter in known.items() if parameter.is_required and name not in parameters]
    if missing:
        raise NotebookError(
            f"{path} needs the parameter {missing[0].name!r}, declared as `{missing[0].text}` without a value. "
            "Pass one, or write a default into the cell."
        )


def _check_value(path: Path, parameter: Parameter, value: Any) -> None:
    where = f"Parameter {parameter.name!r} of {path}"
    odd = next(_unstorable(value), None)
    if odd is not None:
        raise NotebookError(
            f"{where} holds {odd}, which a notebook can't store. Pass None, True, False, numbers, text, and lists and "
            "dictionaries of them."
        )
    if not parameter.takes(value):
        expected = " or ".join(sorted("None" if kind is NONE else kind.__name__ for kind in parameter.kinds or ()))
        raise NotebookError(
            f"{where} is {_short(value)} of type {type(value).__name__}; expected {expected}, since the notebook "
            f"declares `{parameter.text}`. Pass such a value, or annotate the name with what it may be."
        )


def _unstorable(value: Any) -> Iterator[str]:
    """What papermill would write wrongly into the notebook, in words."""
    if isinstance(value, dict):
        yield from (f"the key {_short(key)} of type {type(key).__name__}" for key in value if not isinstance(key, str))
        for part in value.values():
            yield from _unstorable(part)
    elif isinstance(value, list):
        for part in value:
            yield from _unstorable(part)
    elif type(value) not in (NONE, bool, int, float) and not isinstance(value, str):
        yield f"{_short(value)} of type {type(value).__name__}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield str(value)
    elif isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
        yield f"half a character in {_short(value)}"


def _declared_by(statement: ast.stmt) -> Iterator[Parameter]:
    text = ast.unparse(statement)
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield Parameter(statement.target.id, text, _kinds(statement.annotation), statement.value is None)
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            for name, value in _pairs(target, statement.value):
                shown = text if name == getattr(target, "id", None) else f"{name} in {text}"
                yield Parameter(name, shown, _default_kinds(value))


def _pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr | None]]:
    """Each name that is assigned, with its own part of the value where the syntax shows it."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple | ast.List):
        values = value.elts if isinstance(value, ast.Tuple | ast.List) else []
        starred = any(isinstance(part, ast.Starred) for part in [*target.elts, *values])
        matched = values if len(values) == len(target.elts) and not starred else [None] * len(target.elts)
        for part, own in zip(target.elts, matched, strict=True):
            yield from _pairs(part, own)
    elif isinstance(target, ast.Starred):
        yield from _pairs(target.value, None)


def _kinds(annotation: ast.expr) -> frozenset[type] | None:
    """Types that an annotation names; None if it says more than can be checked here."""
    match annotation:
        case ast.Constant(value=None):
            return ANNOTATIONS["None"]
        case ast.Constant(value=str(text)):
            return _kinds(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return ANNOTATIONS.get(name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _any_of([left, right])
        case ast.Subscript(value=base, slice=inner):
            name = ast.unparse(base).rpartition(".")[2]
            if name in ("Optional", "Union"):
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                return _any_of([*parts, *([ast.Constant(None)] if name == "Optional" else [])])
            return ANNOTATIONS.get(name)
    return None


def _any_of(annotations: list[ast.expr]) -> frozenset[type] | None:
    found = [_kinds(annotation) for annotation in annotations]
    known = [kinds for kinds in found if kinds is not None]
    return frozenset().union(*known) if len(known) == len(found) else None


def _default_kinds(value: ast.expr | None) -> frozenset[type] | None:
    try:
        return DEFAULTS.get(type(ast.literal_eval(value))) if value is not None else None
    except (ValueError, TypeError):
        return None


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))
