"""Small pictures of the figures in an executed notebook, as data URIs for a page that loads nothing.

plotly's figures are stored as numbers; their traces are sketched here in a millisecond each, where plotly's own export
starts a browser. The sketch has the marks and no text: it shows which run looks different, and the notebook the rest.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import quote

from interp_kernel.notebook.compare import unpacked
from interp_kernel.notebook.report import PLOTLY

WIDTH, HEIGHT, MARGIN = 320, 200, 8
PICTURES = ("image/png", "image/jpeg")
MAX_SVG_BYTES = 20_000
PAPER, FRAME = (255, 255, 255), (226, 230, 236)
LINES = ((76, 120, 216), (228, 87, 46), (42, 157, 143), (194, 143, 0), (157, 95, 208))
BLEND = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))

ODD = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What drawing raises where a cell displayed something else under the name of a figure; the page does without it."""
BARS = ("bar", "histogram")
INSET, MAX_POINTS = 6, 2000

Colour = tuple[int, int, int]


class Panel(NamedTuple):
    """A part of the picture (left, top, right, bottom) and the axes that are drawn in it."""

    box: tuple[float, float, float, float]
    x_axis: Mapping[str, Any]
    y_axis: Mapping[str, Any]


def thumbnails(notebook: Mapping[str, Any], limit: int) -> Iterator[tuple[str, str]]:
    """Up to `limit` figures of an executed notebook in order, each as the id of its cell and a data URI."""
    drawn = (
        (str(cell.get("id", "")), uri)
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if (uri := _thumbnail(output.get("data", {}))) is not None
    )
    return itertools.islice(drawn, limit)


def _thumbnail(data: Mapping[str, Any]) -> str | None:
    from PIL import Image

    picture = next((mime for mime in PICTURES if mime in data), None)
    try:
        if PLOTLY in data:
            sketch = _sketch(data[PLOTLY])
            is_blank = sketch.getcolors(1) is not None  # as of a table or a pie
            return None if is_blank else _uri(sketch, lossless=True, quality=20, method=1)
        if picture is not None:
            return _uri(Image.open(BytesIO(base64.b64decode("".join(data[picture])))))
    except (*ODD, Image.DecompressionBombError):
        return None
    svg = "".join(data.get("image/svg+xml", ""))
    return f"data:image/svg+xml,{quote(svg)}" if 0 < len(svg) < MAX_SVG_BYTES else None


def _uri(picture: Any, **encoding: Any) -> str:
    from PIL import Image

    picture = picture.reduce(max(1, min(picture.width // WIDTH, picture.height // HEIGHT)))  # cheap, then exact
    picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    if picture.mode != "RGB":
        ink, picture = picture.convert("RGBA"), Image.new("RGB", picture.size, PAPER)
        picture.paste(ink, mask=ink)
    file = BytesIO()
    picture.save(file, "WEBP", **{"quality": 70, "method": 0, **encoding})
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------ plotly


def _sketch(figure: Mapping[str, Any]) -> Any:
    """Draw the traces of a figure, each in the part of the picture that its axes have."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(picture)
    layout = figure.get("layout", {})
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trace in figure.get("data", []):
        if trace.get("visible", True) is True:
            panels.setdefault((trace.get("xaxis", "x"), trace.get("yaxis", "y")), []).append(trace)
    for names, traces in panels.items():
        panel = _panel(layout, *names)
        if len(panels) > 1:
            pen.rectangle(panel.box, outline=FRAME)
        for trace in traces:
            if trace.get("type") == "heatmap":
                _paint_heatmap(picture, panel, trace)
        _draw_marks(pen, panel, [trace for trace in traces if trace.get("type") != "heatmap"])
    return picture


def _axis(layout: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    axis = layout.get(f"{name[0]}axis{name[1:]}") or {}
    return axis if isinstance(axis, Mapping) else {}


def _panel(layout: Mapping[str, Any], x_name: str, y_name: str) -> Panel:
    x_axis, y_axis = _axis(layout, x_name), _axis(layout, y_name)
    left, right = x_axis.get("domain", (0, 1))
    low, high = y_axis.get("domain", (0, 1))
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    top, bottom = MARGIN + (1 - high) * height, MARGIN + (1 - low) * height
    return Panel((MARGIN + left * width, top, MARGIN + right * width, bottom), x_axis, y_axis)


def _paint_heatmap(picture: Any, panel: Panel, trace: Mapping[str, Any]) -> None:
    import numpy as np
    from PIL import Image

    z = np.atleast_2d(_numbers(trace.get("z")))
    if z.ndim != 2 or not np.isfinite(z).any():
        return
    low, high = trace.get("zmin", np.nanmin(z)), trace.get("zmax", np.nanmax(z))
    share = np.clip((z - low) / ((high - low) or 1), 0, 1)
    # A scale around zero is a diverging one, whatever its colours are called.
    stops = np.array(DIVERGING if trace.get("zmid") == 0 or low == -high else BLEND, dtype=float)
    place = np.linspace(0, 1, len(stops))
    colours = np.stack([np.interp(share, place, stops[:, channel]) for channel in range(3)], axis=-1)
    colours[~np.isfinite(z)] = FRAME
    rows = colours if panel.y_axis.get("autorange") == "reversed" else colours[::-1]
    left, top, right, bottom = map(round, panel.box)
    size = max(1, right - left), max(1, bottom - top)
    picture.paste(Image.fromarray(rows.astype("uint8")).resize(size, Image.Resampling.NEAREST), (left, top))


def _draw_marks(pen: Any, panel: Panel, traces: list[Mapping[str, Any]]) -> None:
    import numpy as np

    drawn = [(trace, *found) for trace in traces if len((found := _points(trace))[0])]
    if not drawn:
        return
    xs, ys = (np.concatenate([part[axis] for part in drawn]) for axis in (1, 2))
    if any(trace.get("type") in BARS for trace, *_ in drawn):
        xs, ys = np.append(xs, (xs.min() - 0.5, xs.max() + 0.5)), np.append(ys, 0)
    (left, right), (low, high) = _range(panel.x_axis, xs), _range(panel.y_axis, ys)
    box = panel.box
    across, up = (box[2] - box[0] - 2 * INSET) / (right - left), (box[3] - box[1] - 2 * INSET) / (high - low)
    half = max(1.0, 0.35 * min(across, (box[2] - box[0]) / max(len(x) for _, x, _ in drawn)))
    base = min(max(box[3] - INSET + low * up, box[1]), box[3])
    for index, (trace, *points_of) in enumerate(drawn):
        x, y = (values[:: -(-len(values) // MAX_POINTS)] for values in points_of)
        rows = np.clip(box[3] - INSET - (y - low) * up, box[1], box[3])
        points = list(zip((box[0] + INSET + (x - left) * across).tolist(), rows.tolist(), strict=True))
        _draw_trace(pen, trace, points, base, half, _colour(trace, index))


def _range(axis: Mapping[str, Any], values: Any) -> tuple[float, float]:
    """The range that the figure asks for, else that of the values; never empty."""
    asked = axis.get("range")
    low, high = float(values.min()), float(values.max())
    if isinstance(asked, list) and len(asked) == 2 and all(isinstance(end, int | float) for end in asked):
        low, high = min(asked), max(asked)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _draw_trace(
    pen: Any, trace: Mapping[str, Any], points: list[tuple[float, float]], base: float, half: float, colour: Colour
) -> None:
    if trace.get("type") in BARS:
        for x, y in points:
            pen.rectangle((x - half, min(y, base), x + half, max(y, base)), fill=colour)
    elif "lines" in str(trace.get("mode", "lines")) and len(points) > 1:
        pen.line(points, fill=colour, width=2)
    else:
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def _points(trace: Mapping[str, Any]) -> tuple[Any, Any]:
    """The finite points of a trace; categories count 0, 1, 2."""
    import numpy as np

    values = _numbers(trace.get("y")).ravel()
    places = _numbers(trace.get("x")).ravel()
    if trace.get("type") == "histogram":
        values = places if places.size else values
        values = values[np.isfinite(values)]
        counts, edges = np.histogram(values, bins=20) if values.size else (np.empty(0), np.zeros(1))
        return (edges[:-1] + edges[1:]) / 2 if values.size else np.empty(0), counts.astype(float)
    if places.size != values.size or np.isnan(places).all():
        places = np.arange(values.size, dtype=float)
    if np.isnan(values).all() and values.size:  # bars that lie: the numbers are in x
        values = np.arange(values.size, dtype=float)
    finite = np.isfinite(places) & np.isfinite(values)
    return places[finite], values[finite]


def _numbers(values: Any) -> Any:
    """Numbers of a list or of plotly's packed form; what is none is NaN."""
    import numpy as np

    if isinstance(values, Mapping) and "bdata" in values:
        return unpacked(values)
    try:
        return np.array([] if values is None else values, dtype=float)
    except (TypeError, ValueError):
        return np.full(len(values), np.nan)


def _colour(trace: Mapping[str, Any], index: int) -> Colour:
    """The colour that the trace names in hexadecimal, else one by its number."""
    for part in ("line", "marker"):
        named = (trace.get(part) or {}).get("color")
        if isinstance(named, str) and re.fullmatch("#[0-9a-fA-F]{6}", named):
            return int(named[1:3], 16), int(named[3:5], 16), int(named[5:7], 16)
    return LINES[index % len(LINES)]
