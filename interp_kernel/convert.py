"""Old-style techniques, `def f(self, ...)` on self.model and self.tokenizer, become `def f(model, tokenizer, ...)`.

Positions come from the syntax tree and the text is edited there, so comments, strings and formatting stay. The
result is then parsed and compared with the same change made to the tree itself, so a wrong edit can't go unseen.
"""

from __future__ import annotations

import ast
import copy
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from interp_kernel.errors import TechniqueError
from interp_kernel.scopes import arguments, bindings

Function = ast.FunctionDef | ast.AsyncFunctionDef
_PARTS = ("model", "tokenizer")
_Edit = tuple[int, int, str]  # bytes from, to, replacement


@dataclass(frozen=True)
class _Target:
    """A function to convert, the class that it is taken out of, and the names of its two new parameters."""

    function: Function
    owner: ast.ClassDef | None
    names: dict[str, str]


def takes_model_first(function: Function) -> bool:
    """Whether a function takes model and tokenizer first."""
    names = [a.arg for a in [*function.args.posonlyargs, *function.args.args]][:2]
    return len(names) == 2 and all(name in (part, f"the_{part}") for name, part in zip(names, _PARTS, strict=True))


def is_old_style(function: Function) -> bool:
    """Whether a function's first parameter is `self`."""
    positional = [*function.args.posonlyargs, *function.args.args]
    return bool(positional) and positional[0].arg == "self"


def old_style_functions(tree: ast.Module) -> list[Function]:
    """Functions with `self` at the top of a module; without any, methods that use self.model or self.tokenizer."""
    top = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f for f in top if is_old_style(f)] or [function for _, function in _methods(tree)]


def convert_technique_to_standalone(source: str, name: str | None = None) -> str:
    """Rewrite old-style techniques as functions of model and tokenizer.

    Functions keep their place; methods are taken out of their class, which is dropped, as is its `__init__`. Async
    and decorated functions, annotations, defaults, comments and strings survive. Where a function has another use
    for the name `model` or `tokenizer`, the new parameter is called `the_model` or `the_tokenizer`. Source whose
    function takes model and tokenizer already is returned as it is.

    Args:
        source: Text of a module.
        name: Convert this function alone; by default all that are in the old style.

    Raises:
        TechniqueError: The text is no Python, has no such function, or the function uses `self` for anything
            but self.model and self.tokenizer; the message names the line.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise TechniqueError(f"Line {error.lineno}: {error.msg}. Expected Python source.") from error
    targets = _targets(tree, name)
    expected = ast.dump(_changed_tree(tree, targets))
    for whole_fstrings in (False, True):
        # Before Python 3.12 some positions inside f-strings are wrong; then those literals are written anew.
        result = _changed_text(source, targets, whole_fstrings=whole_fstrings)
        if _dump(result) == expected:
            return result
    lines = ", ".join(str(target.function.lineno) for target in targets)
    raise TechniqueError(
        f"The text of the function at line {lines} can't be edited safely. Write it as f(model, tokenizer, ...) "
        "by hand."
    )


def _dump(source: str) -> str | None:
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


# What to convert


def _methods(tree: ast.Module) -> list[tuple[ast.ClassDef, Function]]:
    return [
        (owner, node)
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and is_old_style(node)
        and node.name != "__init__"
        and any(isinstance(use, ast.Attribute) for use in _uses_of_self(node))
    ]


def _targets(tree: ast.Module, name: str | None) -> list[_Target]:
    top = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found: list[tuple[ast.ClassDef | None, Function]] = [(None, f) for f in top if is_old_style(f)]
    found = found or list(_methods(tree))
    done = [f.name for f in top if takes_model_first(f)]
    wanted = [pair for pair in found if name is None or pair[1].name == name]
    if not wanted and not (name in done if name else done):
        there = ", ".join(sorted({f.name for _, f in found} | set(done))) or "none"
        raise TechniqueError(
            f"There is no old-style technique{f' named {name!r}' if name else ''} in the source; expected "
            f"`def f(self, ...)` that uses self.model or self.tokenizer. Techniques in it: {there}."
        )
    return [_Target(function, owner, _new_names(function)) for owner, function in wanted if _check(function, owner)]


def _check(function: Function, owner: ast.ClassDef | None) -> bool:
    for use in _uses_of_self(function):
        if isinstance(use, ast.Name):
            raise _refused(function, use, "uses `self` itself")
        if use.attr not in _PARTS:
            raise _refused(function, use, f"uses self.{use.attr}")
        if not isinstance(use.ctx, ast.Load):
            raise _refused(function, use, f"assigns or deletes self.{use.attr}")
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == "super" and owner is not None:
            raise _refused(function, node, "uses super()")
    if owner is not None:
        own, _ = bindings(owner.body)
        for part in [*_around(function), *function.decorator_list]:
            for node in ast.walk(part):
                if isinstance(node, ast.Name) and node.id in own:
                    raise _refused(function, node, f"uses {node.id}, which is defined in class {owner.name}")
    return True


def _refused(function: Function, node: ast.expr, what: str) -> TechniqueError:
    return TechniqueError(
        f"Line {node.lineno}: {function.name} {what}. A standalone technique has only model, tokenizer and its "
        "parameters; pass what it needs as one of these."
    )


def _around(function: Function | ast.Lambda) -> list[ast.AST]:
    """Defaults and annotations, which are evaluated outside the function."""
    args = function.args
    parts = [*args.defaults, *args.kw_defaults, *(a.annotation for a in arguments(args))]
    parts.append(None if isinstance(function, ast.Lambda) else function.returns)
    return [part for part in parts if part is not None]


def _uses_of_self(function: Function) -> Iterator[ast.Attribute | ast.Name]:
    """`self.x` and bare `self` that mean the function's first parameter, in nested functions too."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        match node:
            case ast.Attribute(value=ast.Name(id="self")) | ast.Name(id="self"):
                yield node
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if _rebinds_self(node):
                stack += [*_around(node), *getattr(node, "decorator_list", [])]
            case _:
                stack += ast.iter_child_nodes(node)


def _rebinds_self(node: Function | ast.Lambda) -> bool:
    body: Sequence[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else node.body
    return "self" in {a.arg for a in arguments(node.args)} | bindings(body)[0]


def _new_names(function: Function) -> dict[str, str]:
    """`model` and `tokenizer`, or `the_...` where the function has its own use for the name."""
    aliases = set(map(id, _aliases(function)))
    taken = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
    for node in ast.walk(function):
        match node:
            case ast.Name(id=identifier, ctx=ast.Store() | ast.Del()) if id(node) not in aliases:
                taken.add(identifier)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                taken.update(names)
            case ast.alias(name=module, asname=asname):
                taken.add(asname or module.split(".")[0])
            case ast.ExceptHandler(name=str(other)) | ast.MatchAs(name=str(other)) | ast.MatchStar(name=str(other)):
                taken.add(other)
            case ast.MatchMapping(rest=str(other)) | ast.ClassDef(name=other):
                taken.add(other)
            case ast.FunctionDef(name=other) | ast.AsyncFunctionDef(name=other) if node is not function:
                taken.add(other)
    aliased = {node.id for node in _aliases(function)}
    loaded = {n.id for part in function.body for n in ast.walk(part) if isinstance(n, ast.Name)}
    taken |= loaded - aliased  # a name of the module that the parameter would hide
    return {part: f"the_{part}" if part in taken else part for part in _PARTS}


def _aliases(function: Function) -> list[ast.Name]:
    """Targets of `model = self.model` at the function's own level, which a parameter `model` leaves as it is."""
    found: list[ast.Name] = []
    for statement in ast.walk(function):
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(target, value)]
        for left, right in pairs:
            match left, right:
                case ast.Name(id=name), ast.Attribute(value=ast.Name(id="self"), attr=attr) if name == attr:
                    found.append(left)
    nested = {id(n) for inner in ast.walk(function) if _is_inner(inner, function) for n in ast.walk(inner)}
    return [name for name in found if id(name) not in nested]


def _is_inner(node: ast.AST, function: Function) -> bool:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
    return node is not function and isinstance(node, kinds)


# The same change, to the tree


class _Replace(ast.NodeTransformer):
    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if id(node) in self._names:
            return ast.Name(self._names[id(node)], ast.Load())
        return self.generic_visit(node)


def _changed_tree(tree: ast.Module, targets: Sequence[_Target]) -> ast.Module:
    """A copy with the change made; the text is right if it parses to this."""
    memo: dict[int, object] = {}
    result = copy.deepcopy(tree, memo)
    for target in targets:
        function = memo[id(target.function)]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        names = {
            id(memo[id(use)]): target.names[use.attr]
            for use in _uses_of_self(target.function)
            if isinstance(use, ast.Attribute)
        }
        _Replace(names).visit(function)
        first = function.args.posonlyargs or function.args.args
        first[:1] = [ast.arg(target.names[part]) for part in _PARTS]
    body: list[ast.stmt] = []
    for node, original in zip(result.body, tree.body, strict=True):
        taken = [t for t in targets if t.owner is original]
        functions = [memo[id(t.function)] for t in taken]
        body += [f for f in functions if isinstance(f, ast.stmt)] if taken else [node]
    result.body = body
    return result


# The same change, to the text


def _changed_text(source: str, targets: Sequence[_Target], *, whole_fstrings: bool) -> str:
    text = source.encode()
    starts = _line_starts(text)
    edits: list[_Edit] = []
    for target in targets:
        edits += _function_edits(target, starts, whole_fstrings=whole_fstrings)
    for owner in dict.fromkeys(t.owner for t in targets if t.owner is not None):
        functions = [t.function for t in targets if t.owner is owner]
        edits = _class_edit(text, starts, owner, functions, edits)
    return _apply(text, edits).decode()


def _line_starts(text: bytes) -> list[int]:
    return [0, *(match.end() for match in re.finditer(rb"\r\n|\r|\n", text))]


def _span(node: ast.expr | ast.arg | ast.stmt, starts: Sequence[int]) -> tuple[int, int]:
    end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
    return starts[node.lineno - 1] + node.col_offset, starts[min(end_line, len(starts)) - 1] + end_column


def _function_edits(target: _Target, starts: Sequence[int], *, whole_fstrings: bool) -> list[_Edit]:
    function = target.function
    first = [*function.args.posonlyargs, *function.args.args][0]
    edits = [(*_span(first, starts), ", ".join(target.names[part] for part in _PARTS))]
    names = {id(u): target.names[u.attr] for u in _uses_of_self(function) if isinstance(u, ast.Attribute)}
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if whole_fstrings and isinstance(node, ast.JoinedStr) and any(id(n) in names for n in ast.walk(node)):
            edits.append((*_span(node, starts), _unparsed(node, names)))
        elif isinstance(node, ast.Attribute) and id(node) in names:
            edits.append((*_span(node, starts), names[id(node)]))
        else:
            stack += ast.iter_child_nodes(node)
    return edits


def _unparsed(node: ast.JoinedStr, names: dict[int, str]) -> str:
    memo: dict[int, object] = {}
    changed = copy.deepcopy(node, memo)
    return ast.unparse(_Replace({id(memo[n]): name for n, name in names.items() if n in memo}).visit(changed))


def _apply(text: bytes, edits: Sequence[_Edit]) -> bytes:
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement.encode() + text[end:]
    return text


def _class_edit(
    text: bytes, starts: Sequence[int], owner: ast.ClassDef, functions: Sequence[Function], edits: list[_Edit]
) -> list[_Edit]:
    """Replace a class by its converted functions, each moved to the margin with the comments right above it."""
    in_strings = _lines_inside_strings(text.decode())
    pieces: list[str] = []
    for function in functions:
        first = _first_line(function)
        while _is_comment(text, starts, first - 1) and first - 1 > owner.lineno:
            first -= 1
        begin, end = starts[first - 1], _end_with_comment(text, _span(function, starts)[1])
        own = [edit for edit in edits if begin <= edit[0] and edit[1] <= end]
        lines = [n for n in range(first, (function.end_lineno or first) + 1) if n not in in_strings]
        own += _dedents(text, starts, lines, function.col_offset)
        pieces.append(_apply(text[:end], own)[begin:].decode())
    whole = starts[_first_line(owner) - 1], _end_with_comment(text, _span(owner, starts)[1])
    outside = [edit for edit in edits if not (whole[0] <= edit[0] and edit[1] <= whole[1])]
    return [*outside, (*whole, "\n\n\n".join(pieces))]


def _first_line(node: Function | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _end_with_comment(text: bytes, end: int) -> int:
    comment = re.compile(rb"[ \t]*#[^\r\n]*").match(text, end)
    return comment.end() if comment else end


def _is_comment(text: bytes, starts: Sequence[int], line: int) -> bool:
    return text[starts[line - 1] : starts[line]].lstrip().startswith(b"#")


def _dedents(text: bytes, starts: Sequence[int], lines: Sequence[int], indent: int) -> Iterator[_Edit]:
    for line in lines:
        start = starts[line - 1]
        margin = text[start : start + indent]
        yield start, start + len(margin) - len(margin.lstrip(b" \t")), ""


def _lines_inside_strings(source: str) -> set[int]:
    """Lines that start within a string, whose indentation is part of the value."""
    kinds = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in kinds]
    return {line for token in tokens for line in range(token.start[0] + 1, token.end[0] + 1)}
