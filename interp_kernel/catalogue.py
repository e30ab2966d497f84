"""The techniques at hand, as a list for people and agents: read from the files' text, with nothing imported."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from interp_kernel.errors import TechniqueError
from interp_kernel.sources import Parameter, Technique, read_raters, read_techniques

# A heading of a docstring's section, as Google style has them; the text may follow on the same line.
_HEADING = re.compile(r"^([A-Z][a-z]+):(?: (.*))?$")


def package_techniques() -> list[Technique]:
    """The techniques that come with interp-kernel, by name; raters of texts, which need no model, last.

    Raises:
        TechniqueError: The package `techniques` is missing.
    """
    spec = importlib.util.find_spec("techniques")
    if spec is None or not spec.submodule_search_locations:
        raise TechniqueError("The package `techniques` is not installed; install interp-kernel again.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return [*read_techniques(folder), *read_raters(folder / "behaviour.py")]


def listing(techniques: Iterable[Technique]) -> str:
    """Call, purpose and cost of each technique; those of one file stand together."""
    families = groupby(sorted(techniques, key=lambda technique: technique.path), key=lambda technique: technique.path)
    return "\n\n".join("\n".join(map(_entry, family)) for _, family in families)


def call(technique: Technique) -> str:
    """The call as a user writes it, defaults included."""
    parameters = list(technique.parameters)
    first_keyword = next((i for i, p in enumerate(parameters) if p.kind in ("*", "keyword")), None)
    words = [_parameter(parameter) for parameter in parameters]
    if first_keyword is not None and parameters[first_keyword].kind == "keyword":
        words.insert(first_keyword, "*")
    first = ["model", "tokenizer"] if technique.takes_model else []
    return f"{technique.name}({', '.join([*first, *words])})"


def sections(docstring: str) -> dict[str, str]:
    """The docstring's sections by their headings ("Args", "Cost", ...); what stands before the first is ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in docstring.splitlines():
        if heading := _HEADING.match(line):
            name = heading[1]
            found[name] = [heading[2]] if heading[2] else []
        else:
            found[name].append(line)
    return {name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in found.items()}


def _entry(technique: Technique) -> str:
    cost = " ".join(sections(technique.docstring).get("Cost", "").split())
    lines = [call(technique), f"    {technique.purpose}", *([f"    Cost: {cost}"] if cost else [])]
    return "\n".join(lines)


def _parameter(parameter: Parameter) -> str:
    stars = parameter.kind if parameter.kind.startswith("*") else ""
    return f"{stars}{parameter.name}" + (f"={parameter.default}" if parameter.default is not None else "")
