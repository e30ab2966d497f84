"""Numbers that a cell records: stored as data in the notebook, so that a report need not read them out of text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

METRIC = "application/vnd.interp.metric+json"
Metric = bool | int | float | str

_NO_JSON = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def record(name: str, value: Any) -> None:
    """Store a metric in the notebook, from a local or a `%%remote` cell; elsewhere it is printed.

    A name that is recorded again keeps both values in the notebook; reports show the last.

    Args:
        name: What it is called in tables and figures.
        value: A number, a truth value or a short text; an array or tensor of one element counts as its number.

    Raises:
        TypeError: The name is no text, or the value is none of these.
    """
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"The name of a metric is {name!r}; expected some text.")
    metric = plain(name, value)
    text = f"{name} = {metric}"
    shell = _shell()
    if shell is None:
        print(text)
        return
    shell.display_pub.publish({METRIC: {"name": name, "value": metric}, "text/plain": text}, {})


def read_metrics(notebook: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics that an executed notebook holds, by name in the order of their first record; the last value counts.

    Values can be stored as JSON: what is no finite number is the text `NaN`, `Infinity` or `-Infinity`.
    """
    stored = [
        output["data"][METRIC]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if METRIC in output.get("data", {})
    ]
    return {metric["name"]: metric["value"] for metric in stored}


def number(metric: Metric | None) -> float | None:
    """A metric as a point of a figure; None for text and for what is not finite."""
    return float(metric) if isinstance(metric, int | float) and math.isfinite(metric) else None


def plain(name: str, value: Any) -> Metric:
    """A value as JSON can hold it; see `record`.

    Raises:
        TypeError: It is no number, truth value or text.
    """
    if not isinstance(value, bool | int | float | str) and getattr(value, "size", None) is not None:
        value = _only_element(name, value)
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _NO_JSON[str(float(value))]
    raise TypeError(
        f"The metric {name!r} is a {type(value).__name__}; expected a number, a truth value or text. "
        "Record one value for each name, and show a list as a table or a figure."
    )


def _only_element(name: str, array: Any) -> Any:
    """numpy's `size` is a number and torch's is a method, but both have `shape` and `item`."""
    shape = tuple(array.shape)
    if math.prod(shape) != 1:
        raise TypeError(f"The metric {name!r} has the shape {shape}; expected one number. Record its mean, or parts.")
    return array.item()


def _shell() -> Any:
    """IPython's shell of this kernel or worker; None in a plain script, which must not pay for importing it."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None
