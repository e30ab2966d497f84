"""A cell's body as a function: its source, its line numbers, what it reads and assigns, whether it shows a value."""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

from interp_kernel.dataflow import Names, analyse
from interp_kernel.imports import imported_modules

REMOTE_CELL = re.compile(r"(\s*%%.*\n)*\s*%%remote\b")  # other cell magics may stand above

# What a module has of its own; the worker gives its namespace other values for these.
_MODULE_ATTRIBUTES = frozenset(
    {"__annotations__", "__builtin__", "__builtins__", "__cached__", "__debug__", "__doc__", "__file__", "__loader__"}
    | {"__name__", "__package__", "__spec__", "get_ipython"}
)


@dataclass(frozen=True)
class Cell:
    """The body of a `%%remote` cell, ready to be shipped.

    Attributes:
        source: Python text that runs on the worker; IPython's `!` and `%` lines are already calls. A line that
            IPython made of several is padded, so that one offset holds for all lines.
        raw: The whole cell as the user sees it, with magic lines; what tracebacks quote.
        filename: Name under which the code is compiled.
        line_offset: Added to a line number of `source` it gives the line of `raw`.
        execution_count: The number in the cell's `In [n]`.
        reads: Names whose value may have to come from the notebook, `model` and `tokenizer` among them if used.
        writes: Names that the body may have bound at its end. `*` stands for whatever a star import brought.
        mutations: (name, line of `raw`) of changes in place of values that are read and not assigned; these stay
            on the worker.
        imports: Absolute names of modules that the body may import, anywhere in it.
        silenced: The last expression ends in a semicolon and is not shown.
        shown_name: The last expression, if it is nothing but a name; else empty.
        is_async: The body has `await` outside functions.
    """

    source: str
    raw: str
    filename: str
    line_offset: int
    execution_count: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    mutations: tuple[tuple[str, int], ...]
    imports: tuple[str, ...]
    silenced: bool
    shown_name: str
    is_async: bool


def parse_cell(
    body: str,
    *,
    raw: str,
    filename: str,
    execution_count: int,
    transform: Callable[[str], str],
    defined: Collection[str] = (),
) -> Cell:
    """Read a cell's body without running it.

    Args:
        body: Text under the `%%remote` line, as IPython hands it to a cell magic.
        raw: Whole text of the cell; where `body` is not its tail (a magic called from code) the body stands for it.
        filename: Name for tracebacks.
        execution_count: The cell's number.
        transform: IPython's `shell.transform_cell`.
        defined: The notebook's names. A name of a builtin is read from the notebook only if it is among them.

    Raises:
        SyntaxError: The body is no Python or can't be compiled; file name, line and text are those of `raw`.
    """
    before = _lines_before(body, raw)
    if before is None:
        raw, before = body, 0
    _refuse_cell_magic(body, raw, before, filename)
    source, offset = _aligned(body, transform(body))
    offset += before
    try:
        tree, is_async = _compile(source, filename)
    except SyntaxError as error:
        _renumber(error, source, raw, offset, filename)
        raise
    names = analyse(tree)
    return Cell(
        source=source,
        raw=raw,
        filename=filename,
        line_offset=offset,
        execution_count=execution_count,
        reads=_from_notebook(names, defined),
        writes=names.writes,
        mutations=tuple((name, line + offset) for name, line in names.mutations),
        imports=imported_modules(tree) if "import" in source else (),  # most cells have none, and the walk costs
        silenced=_ends_in_semicolon(tree, source),
        shown_name=_shown_name(tree),
        is_async=is_async,
    )


def _compile(source: str, filename: str) -> tuple[ast.Module, bool]:
    """The syntax tree; compiled too, as `return` outside a function and its like are found only then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the worker compiles the same text and shows its warnings once
        tree = ast.parse(source, filename)
        code = compile(tree, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return tree, bool(code.co_flags & inspect.CO_COROUTINE)


def _from_notebook(names: Names, defined: Collection[str]) -> tuple[str, ...]:
    supplied = frozenset(dir(builtins)).difference(defined) | _MODULE_ATTRIBUTES
    return tuple(name for name in names.reads if name not in supplied)


def _shown_name(tree: ast.Module) -> str:
    last = tree.body[-1] if tree.body else None
    return last.value.id if isinstance(last, ast.Expr) and isinstance(last.value, ast.Name) else ""


def _ends_in_semicolon(tree: ast.Module, source: str) -> bool:
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or last.end_lineno is None or last.end_col_offset is None:
        return False
    line = source.split("\n")[last.end_lineno - 1].encode()
    return line[last.end_col_offset :].lstrip().startswith(b";")


# Line numbers


def _lines_before(body: str, raw: str) -> int | None:
    """How many lines of the cell stand above its body; None if the body is not the cell's tail."""
    body_lines, raw_lines = body.rstrip().split("\n"), raw.rstrip().split("\n")
    before = len(raw_lines) - len(body_lines)
    if not body.strip():
        return raw.rstrip().count("\n") + 1
    # IPython takes a common indentation off the whole cell, so lines are compared without theirs.
    same = before >= 0 and all(a.strip() == b.strip() for a, b in zip(body_lines, raw_lines[before:], strict=True))
    return before if same else None


def _aligned(body: str, transformed: str) -> tuple[str, int]:
    """The transformed text with as many lines as the body has, but for blank ones at the top, which are counted."""
    lines, result = body.rstrip().split("\n"), transformed.rstrip().split("\n")
    offset = _blank_at_top(lines) - _blank_at_top(result)
    if len(result) + offset == len(lines):
        return transformed, offset
    old, new = [line.strip() for line in lines[offset:]], [line.strip() for line in result]
    aligned: list[str] = []
    for _, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        # `!ls \` and its continuation become one call: blank lines after it keep what follows in its place.
        aligned += [*result[j1:j2], *[""] * max(0, (i2 - i1) - (j2 - j1))]
    return "\n".join(aligned) + "\n", offset


def _blank_at_top(lines: list[str]) -> int:
    return next((number for number, line in enumerate(lines) if line.strip()), len(lines))


def _refuse_cell_magic(body: str, raw: str, before: int, filename: str) -> None:
    lines = body.split("\n")
    first = _blank_at_top(lines)
    if first == len(lines) or not lines[first].lstrip().startswith("%%"):
        return
    magic = lines[first].split()[0]
    number = before + first + 1
    message = f"{magic} stands below %%remote, where it would run on the worker. Put it above %%remote"
    raise SyntaxError(message, (filename, number, 1, raw.split("\n")[number - 1]))


def _renumber(error: SyntaxError, source: str, raw: str, offset: int, filename: str) -> None:
    """Make the error speak of the user's cell instead of the text that was compiled."""
    line = error.lineno or 1
    lines, compiled = raw.split("\n"), source.split("\n")
    error.filename, error.lineno = filename, min(line + offset, len(lines))
    if error.end_lineno is not None:
        error.end_lineno += offset
    error.text = lines[error.lineno - 1]
    shift = error.text.find(compiled[line - 1]) if line <= len(compiled) else -1
    if shift > 0:  # IPython took the cell's common indentation off
        error.offset = None if error.offset is None else error.offset + shift
        error.end_offset = None if error.end_offset is None else error.end_offset + shift
