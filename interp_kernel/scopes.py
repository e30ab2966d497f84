"""Scopes of Python source: which names a block binds itself, and where any other name is looked up."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Scope:
    """One block of names inside others.

    Attributes:
        kind: module, class, function (lambdas and type parameters too) or comprehension.
        parent: The block around it; None for the module.
        local: Names that the block binds.
        declared_global: Names under its `global` statements.
        prefix: Tells a class's own names from the module's where both are kept in one set.
    """

    kind: str
    parent: Scope | None = None
    local: frozenset[str] = frozenset()
    declared_global: frozenset[str] = frozenset()
    prefix: str = ""

    def owner(self, name: str) -> Scope:
        """The scope in which `name` is looked up first; class scopes are not seen from scopes inside them."""
        scope = self
        while scope.parent is not None:
            if name in scope.declared_global and (scope is self or scope.kind != "class"):
                break
            if name in scope.local and (scope is self or scope.kind != "class"):
                return scope
            scope = scope.parent
        while scope.parent is not None:
            scope = scope.parent
        return scope


def arguments(args: ast.arguments) -> list[ast.arg]:
    """All parameters of a function, in their order."""
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [argument for argument in every if argument is not None]


def bindings(body: Sequence[ast.AST]) -> tuple[frozenset[str], frozenset[str]]:
    """Names that a function or class body binds itself, and those that it declares global."""
    bound: set[str] = set()
    declared_global: set[str] = set()
    outer: set[str] = set()
    stack: list[tuple[ast.AST, bool]] = [(node, False) for node in body]
    while stack:
        node, in_comprehension = stack.pop()
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        match node:
            case ast.Global(names=names):
                declared_global.update(names)
            case ast.Nonlocal(names=names):
                outer.update(names)
            case ast.NamedExpr(target=target):
                bound.add(target.id)
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if not in_comprehension:
                bound.add(name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
                bound.update([node.name] if not isinstance(node, ast.Lambda) else [])
                children = _evaluated_outside(node)
            case _:
                bound.update(_bound_by(node))
        inside = in_comprehension or isinstance(node, COMPREHENSIONS)
        stack.extend((child, inside) for child in children)
    return frozenset(bound - declared_global - outer), frozenset(declared_global)


def _bound_by(node: ast.AST) -> Sequence[str]:
    match node:
        case ast.Import(names=names):
            return [alias.asname or alias.name.split(".")[0] for alias in names]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
    return []


def _evaluated_outside(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda) -> list[ast.AST]:
    """The parts of a definition that run in the scope around it."""
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list, *node.bases, *node.keywords]
    parts: list[ast.AST | None] = [*node.args.defaults, *node.args.kw_defaults]
    if not isinstance(node, ast.Lambda):
        parts += [*node.decorator_list, *(a.annotation for a in arguments(node.args)), node.returns]
    return [part for part in parts if part is not None]
