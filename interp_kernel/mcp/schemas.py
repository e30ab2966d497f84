"""Schemas of tools, read from the functions themselves: signatures give types, docstrings give words."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from interp_kernel.catalogue import sections

Schema = dict[str, Any]
NAMES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}

TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
SESSION: Schema = {
    "session_id": {"type": "string"},
    "notebook_path": {"type": "string"},
    "log_path": {"type": "string"},
    "kernel": {"enum": ["idle", "busy", "dead"]},
    "kernel_pid": {"type": ["integer", "null"]},
    "cells": {"type": "integer"},
    "running_cell_id": {"type": ["string", "null"]},
    "queued_cell_ids": TEXTS,
    "jupyter_url": {"type": ["string", "null"]},
    "notes": TEXTS,
}
CELL: Schema = {
    "session_id": {"type": "string"},
    "cell_id": {"type": "string"},
    "state": {
        "enum": ["done", "failed", "running", "queued", "interrupted", "died", "cancelled", "not run here"],
    },
    "execution_count": {"type": ["integer", "null"]},
    "seconds": {"type": "number"},
    "text": {"type": "string"},
    "text_chars": {"type": "integer"},
    "images": {"type": "integer"},
    "error": {"type": ["object", "null"]},
    "notes": TEXTS,
}


def result_schema(fields: Schema) -> Schema:
    """Schema of an answer that has all of these fields, and may have more."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def input_schema(tool: Callable[..., Any]) -> Schema:
    """Schema of a tool's arguments."""
    words = _argument_words(inspect.getdoc(tool) or "")
    hints = typing.get_type_hints(tool)
    properties, required = {}, []
    for name, parameter in inspect.signature(tool).parameters.items():
        if name == "self":
            continue
        properties[name] = {**_type(hints[name]), "description": words[name]}
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            properties[name]["default"] = parameter.default
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def description(tool: Callable[..., Any]) -> str:
    """What a tool does: its docstring without the arguments."""
    parts = sections(inspect.getdoc(tool) or "")
    returns = f"\n\nReturns: {parts['Returns']}" if "Returns" in parts else ""
    return parts[""].strip() + returns


def _type(hint: Any) -> Schema:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    return {"type": NAMES[hint]}


def _argument_words(docstring: str) -> dict[str, str]:
    words: dict[str, str] = {}
    name = ""
    for line in sections(docstring).get("Args", "").splitlines():
        head, colon, rest = line.partition(": ")
        if colon and not line.startswith(" "):
            name, words[head] = head, rest
        else:
            words[name] += " " + line.strip()
    return words
