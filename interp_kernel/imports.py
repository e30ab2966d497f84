"""Which modules code imports: found by reading, nothing is imported."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Iterator
from functools import lru_cache


def imported_modules(tree: ast.AST, package: str = "") -> tuple[str, ...]:
    """Absolute names of all modules that the code may import, wherever the statement stands.

    `from a import b` gives `a` and `a.b`, because only the file system knows whether b is a submodule.
    `importlib.import_module("a")` and `__import__("a")` count where the name is written out.

    Args:
        tree: Any part of a module's syntax tree.
        package: Package that the code belongs to, against which relative imports are resolved; where it is
            empty or too shallow they are left out.

    Returns:
        Each name once.
    """
    return tuple(dict.fromkeys(name for node in ast.walk(tree) for name in _imported_by(node, package)))


@lru_cache(maxsize=1024)
def imported_by_code(code: types.CodeType) -> frozenset[str]:
    """The same for compiled code and the code inside it: functions that travel as bytecode import in their bodies."""
    found: set[str] = set()
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = step.argval
            found.add(module)
        elif step.opname == "IMPORT_FROM":
            found.add(f"{module}.{step.argval}")
    inner = [imported_by_code(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(found.union(*inner))


def _imported_by(node: ast.AST, package: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = _absolute(module or "", level, package)
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in names if alias.name != "*")
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            yield from [name] if not name.startswith(".") else []
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            yield from [name] if not name.startswith(".") else []


def _absolute(module: str, level: int, package: str) -> str:
    if level == 0:
        return module
    parts = package.split(".") if package else []
    if level > len(parts):
        return ""
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])
