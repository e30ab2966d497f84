"""Figures of steering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from techniques.plots._style import AXIS, INK, LAYOUT, LINES, quoted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._steering_sweep import SweepRow
    from techniques.steering import SteeringSweep

KINDS = (("random", LINES[3], "rgba(194, 143, 0, 0.28)"), ("shuffled", LINES[4], "rgba(157, 95, 208, 0.22)"))


def plot_steering_sweep(result: SteeringSweep) -> Figure:
    """Draw the dose-response: the metric and the KL to the clean model by coefficient, with the range of the controls.

    Args:
        result: What `steering_sweep` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    layers = list(dict.fromkeys(row["layer"] for row in result["rows"]))
    figure = make_subplots(
        2,
        len(layers),
        shared_xaxes=True,
        shared_yaxes=True,
        row_heights=[0.65, 0.35],
        vertical_spacing=0.06,
        horizontal_spacing=0.04,
        column_titles=[f"layer {layer}" for layer in layers],
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    for column, layer in enumerate(layers, 1):
        rows = sorted((row for row in result["rows"] if row["layer"] == layer), key=lambda row: row["coefficient"])
        for kind, _, fill in KINDS:
            _add_range(figure, [row for row in rows if row["kind"] == kind], kind, fill, column)
        _add_direction(figure, [row for row in rows if row["kind"] == "direction"], column)
        figure.add_hline(y=result["clean_metric"], line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=column)
    figure.update_xaxes(AXIS)
    figure.update_yaxes(AXIS)
    unit = {"difference": "distances between the class means", "resid_norm": "mean norms", "absolute": "units"}
    figure.update_xaxes(title_text=f"coefficient, in {unit[result['units']]}", row=2)
    figure.update_yaxes(title_text=_metric(result), row=1, col=1)
    figure.update_yaxes(title_text="KL to clean, nats", rangemode="tozero", row=2, col=1)
    figure.update_layout(
        LAYOUT,
        title={
            "text": f"Steering towards {result['positive_class']!r} (n = {result['n']})",
            "x": 0,
            "xref": "container",
        },
        height=520,
        margin={"l": 70, "r": 20, "t": 120, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1.07, "yanchor": "bottom"},
    )
    return figure


def _metric(result: SteeringSweep) -> str:
    asked, compared = (", ".join(quoted(token) for token in result[side]) for side in ("targets", "against"))
    return f"ln p({asked})" + (f" / p({compared})" if compared else "") + ", nats"


def _add_direction(figure: Figure, rows: list[SweepRow], column: int) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    x = [row["coefficient"] for row in rows]
    band = [row["metric_high"] for row in rows] + [row["metric_low"] for row in reversed(rows)]
    style = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure.add_trace(
        go.Scatter(x=[*x, *reversed(x)], y=band, fill="toself", fillcolor="rgba(76, 120, 216, 0.25)", **style),
        row=1,
        col=column,
    )
    for place, key in ((1, "metric"), (2, "kl_to_clean")):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[row[key] for row in rows],  # type: ignore[literal-required]
                name="direction",
                showlegend=column == 1 and place == 1,
                mode="lines+markers",
                line={"color": LINES[2], "width": 2.5},
                customdata=[[row["kl_to_clean"], row["n_changed"], row["perplexity"]] for row in rows],
                hovertemplate="%{y:.3g} at %{x}<br>KL %{customdata[0]:.3g}<br>changed texts %{customdata[1]}"
                "<br>perplexity %{customdata[2]:.3g}<extra></extra>",
            ),
            row=place,
            col=column,
        )


def _add_range(figure: Figure, rows: list[SweepRow], kind: str, fill: str, column: int) -> None:
    """The range over draws of a control, as a band."""
    import plotly.graph_objects as go  # noqa: PLC0415

    x = sorted({row["coefficient"] for row in rows})
    for place, key in ((1, "metric"), (2, "kl_to_clean")):
        values = [[row[key] or 0.0 for row in rows if row["coefficient"] == at] for at in x]  # type: ignore[literal-required]
        figure.add_trace(
            go.Scatter(
                x=[*x, *reversed(x)],
                y=[*map(max, values), *map(min, reversed(values))],
                fill="toself",
                fillcolor=fill,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                name=f"{kind} vectors, range",
                showlegend=column == 1 and place == 1,
            ),
            row=place,
            col=column,
        )
