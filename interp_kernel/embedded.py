"""Python inside IPython's own lines: what `!` and `%` lines of a body, which are calls with texts, read and assign."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator

_CALLS = frozenset({"system", "getoutput", "run_line_magic", "run_cell_magic"})
_OF_CODE = frozenset({"time", "timeit", "prun", "pinfo", "pinfo2", "pdef", "pdoc", "pfile", "psource"})
_OPTIONS = re.compile(r"(\s*-\w+(\s*\d+)?(?=\s))*\s*")  # of %timeit -n 10 f(x)
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


def embedded_code(call: ast.Call) -> Iterator[ast.stmt]:
    """Statements that a call of IPython evaluates: `{expressions}` and `$names` in a text, and the code of `%time`."""
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_ipython")), attr=method), args=given):
            texts = [part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        case _:
            return
    if method not in _CALLS:
        return
    if method.startswith("run_") and texts and texts[0] in _OF_CODE:
        sources = [_OPTIONS.sub("", "\n".join(texts[1:]), count=1)]
    else:
        sources = [part for text in texts for part in _expansions(text)]
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # IPython leaves it as it stands
        ast.increment_lineno(tree, call.lineno - 1)
        yield from tree.body


def _expansions(text: str) -> Iterator[str]:
    yield from _VARIABLE.findall(text)
    try:
        yield from (name for _, name, _, _ in string.Formatter().parse(text) if name)
    except ValueError:
        return  # a lone brace: IPython expands nothing
