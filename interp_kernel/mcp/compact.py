"""Outputs of a cell as text that a language model reads well: no colours, no markup, no long lists of numbers."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from itertools import chain
from typing import Any

Output = Mapping[str, Any]

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-~])")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f\ud800-\udfff]")
HEADING = re.compile(r"-*|\S+ +Traceback \(most recent call last\)")
LIBRARY = re.compile(r"^File .*(?:site-packages|dist-packages|/lib/python3\.\d+)/")
PLACE = re.compile(r"^File (?P<place>\S+:\d+)(?:, in (?P<name>[\w.<>]+))?")
NUMBERS = {"f8": "d", "f4": "f", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I"}
"""Element types of plotly's packed arrays, and their letters in `struct`."""
CELL = "\x1f"
DRAWN = ("x", "y", "z", "values", "labels", "text", "error_y")


def text_of_output(output: Output) -> str:
    """What one nbformat output says, as text; a picture is one line."""
    kind = output["output_type"]
    if kind == "stream":
        return plain(joined(output["text"])).rstrip("\n")
    if kind == "error":
        return error_text(output)
    return bundle_text(output["data"])


def joined(text: Any) -> str:
    """Text that a notebook's file may hold as a list of lines."""
    return text if isinstance(text, str) else "".join(map(str, text)) if isinstance(text, list) else str(text)


def plain(text: str) -> str:
    """Text without colours and control characters, lines as they stand after their last carriage return."""
    if "\x1b" in text:
        text = ESCAPES.sub("", text)
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return CONTROLS.sub("�", text)


def bundle_text(data: Mapping[str, Any]) -> str:
    """The most telling text of a MIME bundle."""
    own = plain(joined(data["text/plain"])) if "text/plain" in data else ""
    if WIDGET in data:
        return f"[widget, as it first looked] {own}".rstrip()
    if PLOTLY in data:
        try:
            return figure_text(data[PLOTLY])
        except (AttributeError, TypeError, ValueError, KeyError, struct.error):  # any code may publish this type
            return "[a figure that can't be read]"
    if any(kind in data for kind in IMAGES):
        return "" if own.startswith("<") else own
    html = joined(data.get("text/html") or data.get("image/svg+xml") or "")
    if "<table" in html and (found := html_text(html)):
        return found
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            return plain(joined(data[kind]))
    if html and (not own or re.fullmatch(r"<[^\n]*>", own)):
        return html_text(html) or own
    if own:
        return own
    if "application/json" in data:
        return plain(json.dumps(data["application/json"], ensure_ascii=False))
    return f"[output of type {', '.join(data) or 'none'}, not shown]"


# ------------------------------------------------------------------------------------------------ errors


def error_text(output: Output) -> str:
    """An error with the frames of the user's own code; of the libraries' frames only the last and their number."""
    name = str(output.get("ename", ""))
    frames = [plain(str(frame)).strip("\n") for frame in output.get("traceback") or []]
    text = "\n".join(trimmed(frame for frame in frames if not HEADING.fullmatch(frame)))
    if re.search(rf"^{re.escape(name)}(:|$)", text, re.MULTILINE):
        return text
    return f"{text}\n{name}: {plain(str(output.get('evalue', '')))}".lstrip("\n")


def trimmed(frames: Iterable[str]) -> Iterator[str]:
    """Frames of a traceback, those of a library that follow one another reduced to their count and the last place."""
    hidden: list[str] = []
    for frame in [*frames, ""]:
        if LIBRARY.match(frame):
            hidden.append(frame)
            continue
        if hidden:
            yield library_frames(hidden)
            hidden = []
        if frame:
            yield frame


def library_frames(frames: list[str]) -> str:
    """One line for frames of a library."""
    found = PLACE.match(frames[-1])
    place = f"{found['place']}, in {found['name'] or '<module>'}" if found else frames[-1].splitlines()[0]
    code = next((line.split(None, 2)[2] for line in frames[-1].splitlines() if re.match(r"-+> \d+ \S", line)), "")
    count = f" ({len(frames)} frames of libraries, the last is shown)" if len(frames) > 1 else ""
    return f"File {place}{count}" + (f"\n----> {code}" if code else "")


# -------------------------------------------------------------------------------------------------- HTML


class _Reader(HTMLParser):
    """Gathers the text of a page: a table's row is a line, its cells are joined by ` | `."""

    BLOCKS = frozenset(
        {"p", "div", "br", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ul", "ol", "pre", "hr"}
    )
    SILENT = frozenset({"style", "script", "head", "template"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self.silent += 1
        elif tag == "tr":
            self.cells = 0
        elif tag in ("td", "th"):
            self.parts.append(CELL if self.cells else "")
            self.cells += 1
        elif tag == "img":
            self.parts.append(f"[image {dict(attrs).get('alt') or ''}]".replace(" ]", "]"))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", plain(data)))


def html_text(html: str) -> str:
    """The text of HTML: rows of tables as `a | b`, nothing of styles, scripts and drawings."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    rows = "".join(reader.parts).split("\n")
    lines = (" | ".join(cell.strip() for cell in row.split(CELL)).strip() for row in rows)
    return "\n".join(line for line in lines if line)


# ------------------------------------------------------------------------------------------------ figures


def figure_text(figure: Mapping[str, Any]) -> str:
    """A Plotly figure in a few lines: title, axes, and for each trace its size, range and labels."""
    layout = figure.get("layout", {})
    axes = [f"{name}: {title}" for name, axis in layout.items() if "axis" in name and (title := _title(axis))]
    head = f"[figure{' ' + repr(title) if (title := _title(layout)) else ''}{'; ' * bool(axes)}{'; '.join(axes)}]"
    traces = figure.get("data", [])
    lines = [f"{trace_text(trace)}" for trace in traces[:20]]
    return "\n".join([head, *lines, *([f"and {len(traces) - 20} more traces"] if len(traces) > 20 else [])])


def trace_text(trace: Mapping[str, Any]) -> str:
    """One trace in a line."""
    name = f" {trace['name']!r}" if trace.get("name") else ""
    told = [f"{key} {summary}" for key in DRAWN if (summary := values_text(trace.get(key)))]
    return f"- {trace.get('type', 'scatter')}{name}: {'; '.join(told) or 'empty'}"


def values_text(values: Any) -> str:
    """How many values there are, their range, or the first few if they are names."""
    values, shape = unpacked(values)
    if not values:
        return ""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    count = f"({' x '.join(map(str, shape))})"
    if not numbers:
        shown = ", ".join(plain(str(value))[:40] for value in values[:8])
        return f"{count} {shown}{', ...' if len(values) > 8 else ''}"
    if len(values) <= 12:
        return f"{count} {', '.join(f'{v:.4g}' if isinstance(v, int | float) else str(v)[:20] for v in values)}"
    return f"{count} from {min(numbers):.4g} to {max(numbers):.4g}"


def unpacked(values: Any) -> tuple[list[Any], list[int]]:
    """A flat list of plotly's values, nested, packed as base64 or plain, and their shape."""
    if isinstance(values, Mapping) and "bdata" in values:
        letter = NUMBERS.get(values.get("dtype", ""))
        if letter is None:
            return [], []
        data = base64.b64decode(values["bdata"])
        flat = list(struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data))
        shape = [int(n) for n in re.findall(r"\d+", str(values.get("shape", "")))] or [len(flat)]
        return flat, shape
    if not isinstance(values, list):
        return [], []
    if values and all(isinstance(row, list) for row in values):
        return list(chain.from_iterable(values)), [len(values), len(values[0])]
    return values, [len(values)]


def _title(part: Any) -> str:
    title = part.get("title", "") if isinstance(part, Mapping) else ""
    return html_text(str(title.get("text") or "") if isinstance(title, Mapping) else str(title))
