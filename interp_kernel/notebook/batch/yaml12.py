"""YAML as version 1.2 reads scalars: `no` is a word, `1e-3` a number, `12:30` a word and a date no date; with lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
RULES = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (rf"{NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
}


class LineError(ValueError):
    """A text is no such YAML as was expected.

    Attributes:
        line: From 1; None if it is no line's.
    """

    def __init__(self, line: int | None, text: str) -> None:
        super().__init__(text)
        self.line = line


def entries(text: str) -> Iterator[tuple[int, Any, Any, dict[str | int, int]]]:
    """Line, key and value of each entry of a mapping, and the lines of what the value holds, by key or position.

    Raises:
        LineError: The text is no YAML, no mapping, or a key stands twice in a mapping.
    """
    import yaml

    made = loader()(text)
    try:
        node = made.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise LineError(None, "it holds no mapping; expected keys, each with its value")
        refuse_doubles(node)
        for key, value in node.value:
            inner = {part.value: part for part, _ in value.value} if isinstance(value, yaml.MappingNode) else {}
            inner |= dict(enumerate(value.value if isinstance(value, yaml.SequenceNode) else [value]))
            lines = {name: part.start_mark.line + 1 for name, part in inner.items()}
            made_key, made_value = (made.construct_object(part, deep=True) for part in (key, value))
            yield key.start_mark.line + 1, made_key, made_value, lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise LineError(mark.line + 1 if mark else None, f"it is no YAML: {problem}") from None
    finally:
        made.dispose()


def refuse_doubles(node: Any) -> None:
    """Refuse a mapping in which a key stands twice: YAML would drop the first without a word."""
    if not isinstance(node.value, list):
        return
    seen: set[str] = set()
    for child in node.value:
        pair = child if isinstance(child, tuple) else (child,)
        if len(pair) == 2:
            if pair[0].value in seen:
                line = pair[0].start_mark.line + 1
                raise LineError(line, f"{pair[0].value!r} is given twice; expected it once")
            seen.add(str(pair[0].value))
        for part in pair:
            refuse_doubles(part)


@cache
def loader() -> Any:
    """PyYAML's safe loader with these rules."""
    import yaml

    made: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for kind, (rule, first) in RULES.items():
        letters = [*first, *([""] if kind == "null" else [])]
        made.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{rule})$"), letters)
    made.add_constructor("tag:yaml.org,2002:int", lambda _, node: whole(node.value))
    made.add_constructor(
        "tag:yaml.org,2002:float", lambda _, node: float(node.value.lower().replace(".n", "n").replace(".i", "i"))
    )
    return made


def whole(text: str) -> int:
    """A whole number; one that begins with 0 is decimal too, unless with 0o or 0x."""
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
