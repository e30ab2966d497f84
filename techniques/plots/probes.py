"""Figures of probes and directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from techniques.plots._style import AXIS, GRID, INK, LAYOUT, LINES, SCALE, label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques.directions import ConceptDirection, Projection
    from techniques.persona_vector import PersonaVector
    from techniques.probes import LinearProbe, ProbeRow, ProbeTransfer

LEGEND: dict[str, Any] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
MARGIN: dict[str, Any] = {"l": 70, "r": 20, "t": 110, "b": 60}
TEXT_WIDTH = 56  # characters of a text beside its dot


def plot_linear_probe(result: LinearProbe) -> Figure:
    """Draw AUROC by layer on held-out groups, with its interval, chance, shuffled labels and controls.

    Args:
        result: What `linear_probe` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone

    rows = result["rows"]
    layers = [row["layer"] for row in rows]
    figure = go.Figure()
    if result["n_permutations"]:
        _band(
            figure,
            layers,
            [0] * len(rows),
            [row["null_auroc_high"] for row in rows],
            GRID,
            "shuffled labels, lower 95 %",
        )
    _band(figure, layers, [r["auroc_low"] for r in rows], [r["auroc_high"] for r in rows], "rgba(76, 120, 216, 0.25)")
    if any(row["control_auroc"] is not None for row in rows):
        _line(figure, layers, [row["row_split_auroc"] for row in rows], "split by text", LINES[1], dash="dot")
        _line(figure, layers, [row["control_auroc"] for row in rows], "random label per group", LINES[0], dash="dot")
    if any(row["untrained_auroc"] is not None for row in rows):
        _line(figure, layers, [row["untrained_auroc"] for row in rows], "untrained model", LINES[3], dash="dash")
    _line(
        figure,
        layers,
        [result["bag_of_words"]["auroc"]] * len(rows),
        "bag of words",
        LINES[4],
        dash="dash",
        mode="lines",
    )
    _line(figure, layers, [row["auroc"] for row in rows], "held-out groups", LINES[2], hover=_hovers(rows))
    figure.add_hline(y=0.5, line={"color": INK, "width": 1})
    classes = " / ".join(label(name) for name in result["classes"])
    _finish(figure, f"Probe of {classes} by layer, {result['site']} (n = {result['n']}, {result['n_groups']} groups)")
    figure.update_xaxes(title_text="layer", dtick=max(1, len(rows) // 12))
    figure.update_yaxes(title_text="AUROC", range=[-0.02, 1.04])
    return figure


def plot_probe_transfer(result: ProbeTransfer) -> Figure:
    """Draw how well a probe of each group tells the classes in each other group.

    Args:
        result: What `probe_transfer` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415

    groups = result["groups"]
    cells = {(row["train"], row["test"]): row for row in result["rows"]}
    trained: list[str | None] = [*groups, None] if (None, groups[0]) in cells else [*groups]
    found = [[cells[train, test] for test in groups] for train in trained]
    figure = go.Figure(
        go.Heatmap(
            z=[[row["auroc"] for row in line] for line in found],
            customdata=[[_transfer_hover(row) for row in line] for line in found],
            texttemplate="%{z:.2f}",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=SCALE,
            zmin=0.5,
            zmax=1,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "AUROC", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        )
    )
    _finish(figure, f"Probe transfer at layer {result['layer']}, {result['site']} (n = {result['n']})")
    figure.update_xaxes(title_text="tested on", tickvals=list(range(len(groups))), ticktext=[label(g) for g in groups])
    figure.update_yaxes(
        title_text="fitted on",
        tickvals=list(range(len(trained))),
        ticktext=["all others" if g is None else label(g) for g in trained],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_layout(height=150 + 45 * len(trained), margin={"l": 110, "t": 60})
    return figure


def plot_concept_direction(result: ConceptDirection) -> Figure:
    """Draw the projections of the held-out texts of both classes on the direction.

    Args:
        result: What `concept_direction` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415

    figure = go.Figure()
    values = [text["projection"] for text in result["held_out"]]
    size = (max(values) - min(values)) / 30 or 1.0
    for positive, name, mean, color in (
        (True, result["positive_class"], result["positive_mean"], LINES[2]),
        (False, result["negative_class"], result["negative_mean"], LINES[0]),
    ):
        figure.add_trace(
            go.Histogram(
                x=[text["projection"] for text in result["held_out"] if text["positive"] is positive],
                name=label(name),
                marker={"color": color},
                opacity=0.65,
                xbins={"start": min(values), "size": size},
            )
        )
        if mean is not None:
            figure.add_vline(x=mean, line={"color": color, "width": 1.5, "dash": "dash"})
    where = f"layer {result['layer']}, {result['site']}"
    held_out = result["held_out_auroc"]
    _finish(figure, f"Held-out texts on the direction at {where} (AUROC {held_out:.2f}, n = {result['n_held_out']})")
    figure.update_layout(barmode="overlay", bargap=0.05)
    figure.update_xaxes(
        title_text="projection; dashed: mean of the texts it was found on",
        range=[min(values) - size, max(values) + 2 * size],
    )
    figure.update_yaxes(title_text="texts")
    return figure


def plot_persona_vector(result: PersonaVector) -> Figure:
    """Draw by layer how well the vector tells held-out answers, and how long it is beside the activations.

    Args:
        result: What `persona_vector` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    rows = result["rows"]
    layers = [row["layer"] for row in rows]
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    _band(
        figure,
        layers,
        [r["held_out_low"] for r in rows],
        [r["held_out_high"] for r in rows],
        "rgba(76, 120, 216, 0.25)",
    )
    _line(figure, layers, [row["held_out_auroc"] for row in rows], "held-out AUROC", LINES[2])
    _line(figure, layers, [row["norm_ratio"] for row in rows], "length / norm of activations", LINES[3], col=2)
    figure.add_hline(y=0.5, line={"color": INK, "width": 1}, row=1, col=1)
    name = label(rows[0]["positive_class"])
    _finish(figure, f"Persona vector of {name!r} by layer ({result['n']} answers)")
    figure.update_xaxes(title_text="layer", dtick=max(1, len(rows) // 12))
    figure.update_yaxes(title_text="AUROC, answers to other questions", range=[-0.02, 1.04], row=1, col=1)
    figure.update_yaxes(title_text="length / norm", rangemode="tozero", row=1, col=2)
    figure.update_layout(showlegend=False, margin={"t": 60})
    return figure


def plot_project(result: Projection) -> Figure:
    """Draw where each text lies on the direction, between the two class means.

    Args:
        result: What `project` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415

    rows = result["rows"]
    known = rows[0]["relative"] is not None
    labels = [label(_short(row["text"])) for row in rows]
    figure = go.Figure(
        go.Scatter(
            x=[row["relative"] if known else row["projection"] for row in rows],
            y=list(range(len(rows))),
            customdata=[[row["projection"], row["cosine"]] for row in rows],
            mode="markers",
            marker={"color": LINES[2], "size": 11},
            hovertemplate="projection %{customdata[0]:.3g}<br>cosine %{customdata[1]:.2f}<extra></extra>",
        )
    )
    _finish(figure, f"Projections at layer {result['layer']}, {result['site']}")
    if known:
        for at, name, color in ((0, result["negative_class"], LINES[0]), (1, result["positive_class"], LINES[2])):
            figure.add_vline(
                x=at,
                line={"color": color, "width": 1.5, "dash": "dash"},
                annotation={"text": f"mean {label(name)}", "font": {"color": color}, "y": 1.0, "yanchor": "bottom"},
                annotation_position="top",
            )
    title = "0: mean of the negative class, 1: of the positive class" if known else "projection"
    figure.update_xaxes(title_text=title)
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, autorange="reversed", automargin=True)
    figure.update_layout(height=140 + 28 * len(rows), margin={"t": 80})
    return figure


def _short(text: str) -> str:
    flat = " ".join(text.split())
    half = TEXT_WIDTH // 2
    return flat if len(flat) <= TEXT_WIDTH else f"{flat[:half]} ... {flat[-half:]}"


def _finish(figure: Figure, title: str) -> None:
    figure.update_xaxes(AXIS)
    figure.update_yaxes(AXIS)
    figure.update_layout(
        LAYOUT, title={"text": title, "x": 0, "xref": "container"}, height=400, margin=MARGIN, legend=LEGEND
    )


def _line(
    figure: Figure,
    x: Sequence[float],
    y: Sequence[float | None],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    mode: str = "lines+markers",
    hover: Sequence[str] | None = None,
    col: int | None = None,
) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    text = {"customdata": hover, "hovertemplate": "%{customdata}<extra></extra>"} if hover else {}
    trace = go.Scatter(x=x, y=y, name=name, mode=mode, line={"color": color, "dash": dash, "width": 2.5}, **text)
    figure.add_trace(trace, **({"row": 1, "col": col} if col else {}))


def _band(
    figure: Figure,
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    color: str,
    name: str | None = None,
) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    figure.add_trace(
        go.Scatter(
            x=[*x, *reversed(x)],
            y=[*high, *reversed(low)],
            fill="toself",
            fillcolor=color,
            line={"width": 0},
            mode="lines",
            name=name,
            showlegend=name is not None,
            hoverinfo="skip",
        )
    )


def _hovers(rows: Sequence[ProbeRow]) -> list[str]:
    return [
        f"layer {row['layer']}<br>AUROC {row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]"
        f"<br>balanced accuracy {row['balanced_accuracy']:.3f}"
        + (f"<br>p {row['p']:.3g}" if row["p"] is not None else "")
        for row in rows
    ]


def _transfer_hover(row: Any) -> str:
    return (
        f"AUROC {row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]"
        f"<br>balanced accuracy {row['balanced_accuracy']:.3f}<br>fitted on {row['n_train']}, tested on {row['n_test']}"
    )
