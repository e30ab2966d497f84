"""Completion and documentation of what lives on the worker, answered also while a call runs."""

from __future__ import annotations

import inspect
import re
from typing import Any

DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w*)*$")
MOST = 500


def complete(text: str, space: dict[str, Any]) -> list[str]:
    """Full dotted names that begin with the dotted name at the end of `text`."""
    match = DOTTED.search(text)
    if match is None:
        return []
    path, dot, start = match.group().rpartition(".")
    if not dot:
        return sorted(name for name in space if name.startswith(start))
    found, value = look_up(path, space)
    if not found:
        return []
    names = [n for n in dir(value) if n.startswith(start) and (start.startswith("_") or not n.startswith("_"))]
    return [f"{path}.{n}" for n in names[:MOST]]


def inspect_name(name: str, space: dict[str, Any]) -> str | None:
    """Type, signature and docstring of a dotted name, or None if there is no such thing."""
    found, value = look_up(name, space)
    if not found:
        return None
    try:
        signature = f"{name}{inspect.signature(value)}" if callable(value) else name
    except (TypeError, ValueError):
        signature = name
    lines = [f"Signature: {signature}", f"Type:      {type(value).__qualname__} (on the worker)"]
    if not callable(value) or isinstance(value, type):
        lines.append(f"Value:     {repr(value)[:2000]}")
    return "\n".join([*lines, "", inspect.getdoc(value) or "(no documentation)"])


def look_up(path: str, space: dict[str, Any]) -> tuple[bool, Any]:
    """The object that a dotted name stands for."""
    first, *rest = path.split(".")
    if first not in space:
        return False, None
    value = space[first]
    for name in rest:
        try:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
        except Exception:  # noqa: BLE001 - a property runs the object's own code, and Tab must not fail
            return False, None
    return True, value
