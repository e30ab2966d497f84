"""What an executed notebook says about its run: where a cell stands in its source, its errors, its findings."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

FINDINGS = "findings"
TRACEBACK_LINES = 20
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def traceback(cell: Mapping[str, Any]) -> list[str]:
    """The end of what the cell's errors show; a cell that was stopped shows where, then why."""
    shown = [part for output in cell.get("outputs", []) for part in output.get("traceback", [])]
    return [line for part in shown for line in ANSI.sub("", part).splitlines()][-TRACEBACK_LINES:]


def input_index(source: Mapping[str, Any], executed: Mapping[str, Any], index: int) -> int | None:
    """Where cell `index` of the executed notebook stands in its source; None for one that papermill added.

    papermill drops its markers of an earlier failure and adds or replaces one cell of parameters.
    """
    kept = [i for i, cell in enumerate(source["cells"]) if "papermill-error-cell-tag" not in tags(cell)]
    added = len(executed["cells"]) - len(kept)
    where = next((i for i, cell in enumerate(executed["cells"]) if "injected-parameters" in tags(cell)), None)
    if not added or where is None or index < where:
        return kept[index]
    return None if index == where else kept[index - added]


def findings(executed: Mapping[str, Any]) -> Any:
    """What the last cell tagged `findings` displayed, as JSON if it can be; None if it is nothing."""
    tagged = [cell for cell in executed["cells"] if cell["cell_type"] == "code" and FINDINGS in tags(cell)]
    shown = [output["data"] for cell in tagged[-1:] for output in cell["outputs"] if "data" in output]
    if not shown:
        return None
    if "application/json" in shown[-1]:
        return json.loads(json.dumps(shown[-1]["application/json"]), parse_constant=str)  # NaN is no JSON
    text = "".join(shown[-1].get("text/plain", ""))
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return value


def tags(cell: Mapping[str, Any]) -> list[str]:
    """A cell's tags."""
    return list(cell.get("metadata", {}).get("tags", []))
