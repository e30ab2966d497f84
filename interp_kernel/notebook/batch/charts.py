"""How each recorded metric lies across the grid of a batch, as SVG that scales from a phone to a printed page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import takewhile
from typing import Any

from interp_kernel.notebook.metrics import number

MAX_LINES, MAX_TICKS = 6, 12
LABEL_CHARS, LINE_CHARS = 24, 48
SIZE_INCHES = (4.6, 2.9)
COLOURS = ("#4c78d8", "#e4572e", "#2a9d8f", "#c28f00", "#9d5fd0", "#5b6470")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": "#c6ccd6",
    "axes.labelcolor": "#3c4450",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e9ee",
    "text.color": "#3c4450",
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
}


@dataclass(frozen=True)
class Chart:
    """A metric's figure as SVG, with the words under it."""

    name: str
    svg: str
    caption: str


def draw_metric(name: str, runs: Iterable[Mapping[str, Any]], varied: Sequence[str]) -> Chart | None:
    """Draw one metric over the parameters that vary: lines, or a heat map where there are many of them.

    The parameter with the most values lies across, the next one is colour or the vertical; runs that share both are
    averaged, and shown as single points behind the lines.

    Args:
        name: The metric.
        runs: Records with `values` and `metrics`.
        varied: Names of the parameters that vary.

    Returns:
        None if fewer than two runs hold it as a number, or nothing varies.
    """
    points = [(run["values"], value) for run in runs if (value := number(run["metrics"].get(name))) is not None]
    axes = _axes(points, varied)
    if len(points) < 2 or not axes:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    across, rest = axes[0], axes[1:]
    style: Any = {**STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        plane = figure.subplots()
        if rest and len(rest[0].labels) > MAX_LINES:
            _draw_heatmap(figure, plane, points, across, rest[0])
        else:
            _draw_lines(plane, points, across, rest[0] if rest else None)
        plane.set_xlabel(across.name)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    over = f"; the mean over {', '.join(axis.name for axis in rest[1:])}" if rest[1:] else ""
    return Chart(name, _inline(file.getvalue()), f"{len(points)} runs{over}")


Points = list[tuple[Mapping[str, Any], float]]


@dataclass(frozen=True)
class Axis:
    """One varied parameter: its values in order, and where each lies and what it is called."""

    name: str
    places: dict[str, float]
    labels: list[str]

    def place(self, values: Mapping[str, Any]) -> float:
        """Where a run lies."""
        return self.places[identity(values.get(self.name))]


def _axes(points: Points, varied: Sequence[str]) -> list[Axis]:
    """The parameters that vary among these runs, the one with the most values first; numbers before texts."""
    axes = []
    for name in varied:
        values: list[Any] = list({identity(run.get(name)): run.get(name) for run, _ in points}.values())
        is_scale = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        ordered = sorted(values) if is_scale else values
        places = [float(value) for value in ordered] if is_scale else [float(index) for index in range(len(ordered))]
        axes.append(Axis(name, dict(zip(map(identity, ordered), places, strict=True)), labels(ordered)))
    return sorted((axis for axis in axes if len(axis.labels) > 1), key=lambda axis: -len(axis.labels))


def _draw_lines(plane: Any, points: Points, across: Axis, colour: Axis | None) -> None:
    """A line for each value of `colour` through the means, and the single runs behind it."""
    groups = zip(colour.places.values(), colour.labels, strict=True) if colour else [(0.0, "")]
    for index, (group, text) in enumerate(groups):
        own = [(across.place(run), y) for run, y in points if colour is None or colour.place(run) == group]
        means = {x: _mean([y for other, y in own if other == x]) for x in sorted({x for x, _ in own})}
        shade = COLOURS[index % len(COLOURS)]
        plane.plot(list(means), list(means.values()), marker="o", ms=4, color=shade, label=text)
        if len(means) < len(own):
            plane.scatter(*zip(*own, strict=True), s=10, color=shade, alpha=0.35, linewidths=0)
    if colour:
        plane.legend(title=colour.name, frameon=False, fontsize=8, title_fontsize=8)
    if len(across.labels) <= MAX_TICKS or list(across.places.values()) == list(range(len(across.labels))):
        _set_ticks(plane.xaxis, list(across.places.values()), across.labels)


def _draw_heatmap(figure: Any, plane: Any, points: Points, across: Axis, down: Axis) -> None:
    import numpy as np

    columns, rows = ({key: index for index, key in enumerate(axis.places)} for axis in (across, down))
    sums = np.zeros((2, len(rows), len(columns)))  # of the metric, and of the runs
    for run, value in points:
        sums[:, rows[identity(run.get(down.name))], columns[identity(run.get(across.name))]] += value, 1
    with np.errstate(invalid="ignore"):
        picture = plane.pcolormesh(sums[0] / sums[1], cmap="viridis")
    figure.colorbar(picture, ax=plane, pad=0.02).outline.set_visible(False)
    for ticks, axis in ((plane.xaxis, across), (plane.yaxis, down)):
        _set_ticks(ticks, [index + 0.5 for index in range(len(axis.labels))], axis.labels)
    plane.invert_yaxis()
    plane.set_ylabel(down.name)
    plane.grid(visible=False)


def _set_ticks(axis: Any, places: list[float], texts: list[str]) -> None:
    """At most MAX_TICKS labels, turned where they would run into each other."""
    step = -(-len(texts) // MAX_TICKS)
    is_long = axis.axis_name == "x" and sum(map(len, texts[::step])) > LINE_CHARS
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axis.set_ticks(places[::step], texts[::step], **turned)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def identity(value: Any) -> str:
    """A value as something that can be compared, whatever its type."""
    return json.dumps(value, sort_keys=True, default=str)


def shorten(value: Any, limit: int) -> str:
    """A value in a label."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def labels(values: Sequence[Any]) -> list[str]:
    """Short labels; where they would be alike, what all values begin with is left out."""
    short = [shorten(value, LABEL_CHARS) for value in values]
    if len(set(short)) == len(short):
        return short
    texts = [str(value) for value in values]
    alike = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
    return [shorten(f"…{text[alike:]}", LABEL_CHARS) for text in texts]


def _inline(svg: str) -> str:
    """The picture's element alone, as wide as the page lets it be."""
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg[svg.index("<svg") :], count=2)
