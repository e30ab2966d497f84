"""Two runs of a notebook, cell by cell: equal, equal within tolerance, or changed, with the numbers that moved.

What a cell shows is taken apart into facts: texts, numbers, arrays of a figure, pictures. Left out is what no two runs
share: standard error, progress bars, execution counts, addresses of objects, and where a worker runs. A cell tagged
`volatile` is not compared at all.
"""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from interp_kernel.notebook.metrics import METRIC

RTOL, ATOL = 1e-5, 1e-8
PIXEL_TOLERANCE = 8
"""Of 255: how far a pixel may move in a picture that still counts as close."""
MAX_CHANGES = 20
TEXT_CHARS = 200
VOLATILE = "volatile"
EQUAL, CLOSE, CHANGED, MISSING = STATUSES = ("equal", "close", "changed", "missing")

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
_NOISE = (
    (re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), ""),
    (re.compile(r"\b0x[0-9a-fA-F]+\b"), "0x"),
    (re.compile(r"^(Worker .* is ready: |\[interp\] ).*\n?", re.MULTILINE), ""),
)
_SVG_NOISE = re.compile(r"<metadata>.*?</metadata>|(?<=[\"#])[a-z][0-9a-f]{10}\b", re.DOTALL)  # matplotlib's ids, time
_PICTURES = ("image/png", "image/jpeg")
_WIDGET = "application/vnd.jupyter.widget-view+json"

Fact = tuple[str, Any]


@dataclass(frozen=True)
class Change:
    """One fact that differs.

    Attributes:
        where: In words, as `stdout, line 2` or `output 1, data.0.y (3 of 8 numbers)`.
        before: A number or a text, or None where there was nothing.
        after: The same in the later run.
        is_close: Whether it is within tolerance.
    """

    where: str
    before: Any
    after: Any
    is_close: bool = False

    def __str__(self) -> str:
        before, after = ("nothing" if v is None else repr(v).removesuffix(".0") for v in (self.before, self.after))
        return f"{self.where}: {before} -> {after}"


@dataclass(frozen=True)
class CellComparison:
    """One cell of two runs.

    Attributes:
        index: Its place among all cells of the later notebook; of the earlier, if it is in that alone.
        id: Its id in the file.
        status: `equal`, `close` (equal within tolerance), `changed`, or `missing` if it ran in one of the two only.
        changes: What differs, the largest first, at most MAX_CHANGES.
        n_changes: How many differ in all.
    """

    index: int
    id: str
    status: str
    changes: tuple[Change, ...] = ()
    n_changes: int = 0


@dataclass(frozen=True)
class Tolerance:
    """Two numbers are close if they differ by at most `atol + rtol * abs(before)`."""

    rtol: float = RTOL
    atol: float = ATOL

    def allows(self, before: Any, after: Any) -> bool:
        """Whether two numbers are close."""
        return bool(abs(before - after) <= self.atol + self.rtol * abs(before))


def compare_notebooks(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerance: Tolerance | None = None
) -> list[CellComparison]:
    """Compare what the code cells of two executed notebooks show.

    Cells are paired by their ids if both files have them, else in order.

    Args:
        before: Notebook of format 4, as read from JSON.
        after: A later run of it.
        tolerance: How far a number may move; the default is for runs on one machine.
    """
    compared = []
    for index, old, new in _pairs(before, after):
        if VOLATILE in _tags(new or old):
            continue
        ran, changes = _compare_cells(old, new, tolerance or Tolerance())
        status = max((CLOSE if change.is_close else CHANGED for change in changes), key=STATUSES.index, default=EQUAL)
        largest = tuple(sorted(changes, key=_rank)[:MAX_CHANGES])
        name = str((new or old).get("id", ""))
        compared.append(CellComparison(index, name, status if ran else MISSING, largest, len(changes)))
    return compared


def worst_status(cells: Iterable[CellComparison]) -> str:
    """The status of the cell that differs most."""
    return max((cell.status for cell in cells), key=STATUSES.index, default=EQUAL)


def unpacked(packed: Mapping[str, Any]) -> Any:
    """The numbers of plotly's packed form: base64 of little-endian ones, and a shape where there are two dimensions."""
    import numpy as np

    array = np.frombuffer(base64.b64decode(packed["bdata"]), np.dtype(packed["dtype"]).newbyteorder("<"))
    shape = [int(size) for size in str(packed.get("shape", array.size)).split(",")]
    return array.reshape(shape).astype(float)


def _rank(change: Change) -> tuple[bool, float]:
    is_number = isinstance(change.before, float) and isinstance(change.after, float)
    return change.is_close, -abs(change.before - change.after) if is_number else float("-inf")


# ------------------------------------------------------------------------------------------------ cells


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[int, Any, Any]]:
    """Index, earlier cell, later cell; {} stands for a cell that one of the two lacks."""
    old, new = _code(before), _code(after)
    nothing: tuple[int, dict[str, Any]] = (-1, {})
    if not all(cell.get("id") for _, cell in old + new):
        for left, right in itertools.zip_longest(old, new, fillvalue=nothing):
            yield max(left[0], right[0]), left[1], right[1]
        return
    alone = {cell["id"]: (index, cell) for index, cell in old}
    for index, cell in new:
        yield index, alone.pop(cell["id"], nothing)[1], cell
    for index, cell in alone.values():
        yield index, cell, {}


def _code(notebook: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(index, cell) for index, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))


def _compare_cells(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: Tolerance) -> tuple[bool, list[Change]]:
    """Whether the cell ran in both or in neither, and what differs."""
    states = ["is not there" if not cell else "ran" if _ran(cell) else "did not run" for cell in (old, new)]
    if states[0] != states[1]:
        return False, [Change("cell", states[0], states[1])]
    sources = ["".join(cell["source"]) for cell in (old, new)]
    if sources[0] != sources[1]:
        return True, list(_text_changes("source", sources[0], sources[1], Tolerance(0, 0)))
    facts = [_by_place(_facts(cell["outputs"])) for cell in (old, new)]
    places = {**facts[0], **facts[1]}
    return True, [
        change for place in places for change in _changes(place, facts[0].get(place), facts[1].get(place), tolerance)
    ]


def _ran(cell: Mapping[str, Any]) -> bool:
    return cell.get("execution_count") is not None or bool(cell.get("outputs"))


# ------------------------------------------------------------------------------------------------ facts


class Picture(str):
    """A picture as base64."""


def _facts(outputs: Iterable[Mapping[str, Any]]) -> Iterator[Fact]:
    """Everything that a cell shows, as (where, value); a value is a text, a number, an array or a picture."""
    printed, shown = [], 0
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            printed += ["".join(output["text"])] if output["name"] == "stdout" else []
        elif kind == "error":
            yield "error", f"{output['ename']}: {output['evalue']}"
        elif METRIC in output["data"]:
            yield f"metric {output['data'][METRIC]['name']!r}", output["data"][METRIC]["value"]
        elif not _is_progress(output["data"]):
            shown += 1
            yield from _bundle_facts(f"output {shown}", output["data"])
    yield "stdout", _quiet("".join(printed))


def _by_place(facts: Iterable[Fact]) -> dict[str, Any]:
    """The facts by where they are; a place that comes again, as a metric in a loop, gets a number."""
    found: dict[str, Any] = {}
    counts = Counter[str]()
    for where, value in facts:
        counts[where] += 1
        found[where if counts[where] == 1 else f"{where} ({counts[where]})"] = value
    return found


def _is_progress(data: Mapping[str, Any]) -> bool:
    page, text = ("".join(data.get(mime, "")) for mime in ("text/html", "text/plain"))
    is_gone = not any(data.values())  # a bar that was taken away again
    return is_gone or _WIDGET in data or "<progress " in page or page == f"<code>{html.escape(text)}</code>"


def _bundle_facts(where: str, data: Mapping[str, Any]) -> Iterator[Fact]:
    """The richest form of an output; the others say the same in less detail."""
    structured = next((mime for mime in sorted(data) if mime.endswith("json")), None)
    picture = next((mime for mime in _PICTURES if mime in data), None)
    if structured is not None:
        yield from _tree_facts(where, "", data[structured])
    elif picture is not None:
        yield where, Picture("".join(data[picture]))
    elif "text/html" in data:
        yield from _page_facts(where, "".join(data["text/html"]))
    else:
        for mime in sorted(data, key=lambda mime: mime == "text/plain")[:1]:
            text = "".join(data[mime])
            yield where, _SVG_NOISE.sub("", text) if mime == "image/svg+xml" else _quiet(text)


def _tree_facts(where: str, path: str, value: Any) -> Iterator[Fact]:
    """Leaves of JSON; a list of numbers is one leaf, also as plotly packs it."""
    place = f"{where}, {path.strip('.')}" if path else where
    if isinstance(value, dict) and {"dtype", "bdata"} <= value.keys():
        yield place, unpacked(value)
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _tree_facts(where, f"{path}.{name}", value[name])
    elif isinstance(value, list) and (array := _array(value)) is not None:
        yield place, array
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _tree_facts(where, f"{path}.{index}", part)
    else:
        yield place, value


def _array(values: list[Any]) -> Any:
    """The list as an array if it, or each list in it, holds only numbers and gaps; else None."""
    import numpy as np

    rows = values if values and all(isinstance(row, list) for row in values) else [values]
    kinds = {type(value) for row in rows for value in row}
    if not kinds <= {int, float, type(None)} or len({len(row) for row in rows}) > 1:
        return None
    return np.array(values, dtype=float)


def _page_facts(where: str, page: str) -> Iterator[Fact]:
    """The cells of tables by row and column, then the other text."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    for unseen in soup(["style", "script"]):
        unseen.decompose()
    for count, table in enumerate(soup("table"), 1):
        rows = [[cell.get_text(strip=True) for cell in row(["th", "td"])] for row in table("tr")]
        head = rows[0] if table.find("th") else []
        for index, row in enumerate(rows):
            for column, text in enumerate(row):
                name = head[column] if column < len(head) and head.count(head[column]) == 1 else column
                yield f"{where}, table {count}, row {index}, column {name}", _quiet(text)
        table.decompose()
    yield where, _quiet(soup.get_text(" ", strip=True))


def _quiet(text: str) -> str:
    for pattern, calm in _NOISE:
        text = pattern.sub(calm, text)
    return text


# ---------------------------------------------------------------------------------------------- changes


def _changes(where: str, old: Any, new: Any, tolerance: Tolerance) -> Iterator[Change]:
    import numpy as np

    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
        yield from _array_changes(where, old, new, tolerance)
    elif isinstance(old, Picture) and isinstance(new, Picture):
        yield from _picture_changes(where, old, new)
    elif isinstance(old, str) and isinstance(new, str):
        yield from _text_changes(where, old, new, tolerance)
    elif _is_number(old) and _is_number(new):
        if old != new:
            yield Change(where, float(old), float(new), tolerance.allows(old, new))
    elif type(old) is not type(new) or not np.array_equal(old, new):
        yield Change(where, _brief(old), _brief(new))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _array_changes(where: str, old: Any, new: Any, tolerance: Tolerance) -> Iterator[Change]:
    """One change for all numbers of an array; it shows the one that moved most beyond tolerance."""
    import numpy as np

    moved = (old != new) & ~(np.isnan(old) & np.isnan(new))
    if not moved.any():
        return
    with np.errstate(invalid="ignore"):
        beyond = np.abs(new - old) - tolerance.atol - tolerance.rtol * np.abs(old)
    beyond = np.where(moved, np.where(np.isnan(beyond), np.inf, beyond), -np.inf)
    most = np.unravel_index(int(np.argmax(beyond)), old.shape)
    place = f"{where}[{', '.join(map(str, most))}] ({int(moved.sum())} of {old.size} numbers moved)"
    yield Change(place, float(old[most]), float(new[most]), bool(beyond[most] <= 0))


def _text_changes(where: str, old: str, new: str, tolerance: Tolerance) -> Iterator[Change]:
    """The numbers that moved if the text around them is the same, else the first line that differs."""
    if old == new:
        return
    left, right = old.splitlines(), new.splitlines()
    for count, (before, after) in enumerate(itertools.zip_longest(left, right), 1):
        if before is None or after is None or _frame(before) != _frame(after):
            yield Change(f"{where}, line {count}" if "\n" in old + new else where, _brief(before), _brief(after))
            return
    for count, (before, after) in enumerate(zip(left, right, strict=True), 1):
        for a, b in zip(_NUMBER.findall(before), _NUMBER.findall(after), strict=True):
            if float(a) != float(b):
                place = f"{where}, line {count}" if len(left) > 1 else where
                yield Change(place, float(a), float(b), tolerance.allows(float(a), float(b)))


def _frame(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def _picture_changes(where: str, old: Picture, new: Picture) -> Iterator[Change]:
    """Pictures are compared as they look: another encoding of the same pixels is equal."""
    if old == new:
        return
    import numpy as np
    from PIL import Image

    before, after = (Image.open(BytesIO(base64.b64decode(picture))).convert("RGBA") for picture in (old, new))
    if before.size != after.size:
        sizes = [f"a picture of {width} x {height} pixels" for width, height in (before.size, after.size)]
        yield Change(where, sizes[0], sizes[1])
        return
    apart = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max(axis=-1)
    if apart.any():
        share, most = float((apart > 0).mean()), int(apart.max())
        text = f"{share:.2%} of the pixels differ, by up to {most} of 255"
        yield Change(where, "a picture", text, is_close=most <= PIXEL_TOLERANCE)


def _brief(value: Any) -> Any:
    if isinstance(value, Picture):
        return "a picture"
    if hasattr(value, "shape"):
        return f"numbers of shape {tuple(value.shape)}"
    if isinstance(value, str) and len(value) > TEXT_CHARS:
        return value[:TEXT_CHARS] + "..."
    return value
