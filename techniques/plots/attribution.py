"""Figures of attributions: estimates against measurements, head maps, and what each part adds to the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from techniques.plots._style import AXIS, INK, LAYOUT, LINES, label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._columns import ColumnInfo
    from techniques.attribution import AttributedCell, AttributionPatching
    from techniques.direct_logit_attribution import DirectLogitAttribution, LogitPart
    from techniques.eap import EdgeAttribution

DIVERGING = [[0, "#3b6fd4"], [0.5, "#dfe2e8"], [1, "#d6492a"]]  # 0 is pale
MAX_BARS = 24  # edges that a figure lists; the strongest ones
PART_COLOURS = {"embedding": INK, "attn": LINES[2], "mlp": LINES[0], "constant": INK}


def plot_attribution_patching(result: AttributionPatching) -> Figure:
    """Draw estimates as maps of layers and heads or positions, and measured against estimated effects.

    Args:
        result: What `attribution_patching` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    sites = list(dict.fromkeys(row["site"] for row in result["rows"]))
    check = result["check"]
    panels = [*sites, *([f"against patching, r = {check['pearson'] or 0:.2f}"] if check else [])]
    n_columns = min(2 if result["columns"] else 3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    places = [{"row": i // n_columns + 1, "col": i % n_columns + 1} for i in range(len(panels))]
    figure = make_subplots(
        n_rows, n_columns, subplot_titles=panels, vertical_spacing=0.38 / n_rows, horizontal_spacing=0.1
    )
    bound = max((abs(row["score"] or 0) for row in result["rows"]), default=1.0)
    for site, place in zip(sites, places, strict=False):
        _add_map(figure, result, [row for row in result["rows"] if row["site"] == site], place)
    if check:
        _add_agreement(figure, [_point(row) for row in result["rows"]], places[-1])
    n_layers = len({row["layer"] for row in result["rows"]})
    gap = (result["clean_logit_diff"] or 0) - (result["corrupted_logit_diff"] or 0)
    verb = {"denoise": "restores", "noise": "takes"}[result["direction"]]
    title = f"Estimated change of the logit difference; patching everything {verb} {gap:.2f} nats (n = {result['n']})"
    figure.update_layout(
        LAYOUT,
        title={"text": title, "x": 0, "xref": "container", "font": {"size": 15}},
        height=150 + n_rows * max(210, 60 + 26 * n_layers) + (60 if result["columns"] else 0),
        margin={"l": 60, "r": 20, "t": 90, "b": 80 if result["columns"] else 60},
        showlegend=False,
        coloraxis={
            "colorscale": DIVERGING,
            "cmin": -bound,
            "cmax": bound,
            "colorbar": {"title": {"text": "nats", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        },
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def plot_direct_logit_attribution(result: DirectLogitAttribution) -> Figure:
    """Draw what each layer's attention and MLP add as bars, and what each head adds as a map.

    Args:
        result: What `direct_logit_attribution` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone
    from plotly.subplots import make_subplots  # noqa: PLC0415

    heads = [row for row in result["rows"] if row["part"] == "head"]
    figure = make_subplots(1, 2 if heads else 1, column_widths=[0.62, 0.38] if heads else None, horizontal_spacing=0.12)
    n_layers = 1 + max(row["layer"] or 0 for row in result["rows"])
    names = ["embedding", *(f"layer {layer}" for layer in range(n_layers)), "biases"]
    for part in ("embedding", "attn", "mlp", "constant"):
        sums = _layer_sums(result["rows"], part, n_layers)
        shown = {"attn": "attention", "mlp": "MLP"}.get(part)
        figure.add_trace(
            go.Bar(
                x=list(sums.values()),
                y=[names[at] for at in sums],
                orientation="h",
                name=shown or part,
                showlegend=shown is not None,
                marker={"color": PART_COLOURS[part]},
                hovertemplate="%{y}: %{x:.3f} nats<extra>" + (shown or part) + "</extra>",
            ),
            row=1,
            col=1,
        )
    figure.update_yaxes(AXIS, categoryorder="array", categoryarray=names, showgrid=False, row=1, col=1)
    figure.update_xaxes(AXIS, zeroline=True, zerolinecolor=INK, title_text="logit difference, nats", row=1, col=1)
    if heads:
        _add_heads(figure, heads)
    figure.update_layout(
        LAYOUT,
        title={
            "text": f"What adds up to {result['logit_diff']:.2f} nats (n = {result['n']})",
            "x": 0,
            "xref": "container",
        },
        barmode="relative",
        bargap=0.35,
        height=150 + 44 * (n_layers + 2),
        margin={"l": 90, "r": 20, "t": 70, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def plot_eap(result: EdgeAttribution) -> Figure:
    """Draw the strongest edges as bars, with what patching measured, and measured against estimated effects.

    Args:
        result: What `eap` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone
    from plotly.subplots import make_subplots  # noqa: PLC0415

    rows = result["rows"][:MAX_BARS]
    has_check = result["check"] is not None
    widths = [0.56, 0.44] if has_check else None
    figure = make_subplots(1, 2 if has_check else 1, column_widths=widths, horizontal_spacing=0.13)
    names = [label(row["edge"]).replace("-&gt;", " \N{RIGHTWARDS ARROW} ") for row in rows]
    scores = [row["score"] or 0 for row in rows]
    figure.add_trace(
        go.Bar(
            x=scores,
            y=names,
            orientation="h",
            marker={"color": [LINES[0] if score > 0 else LINES[2] for score in scores]},
            error_x=_interval(rows),
            hovertemplate="%{y}: %{x:.3f} nats<extra></extra>",
        ),
        row=1,
        col=1,
    )
    figure.update_yaxes(AXIS, autorange="reversed", showgrid=False, tickfont={"size": 12}, row=1, col=1)
    figure.update_xaxes(AXIS, zeroline=True, zerolinecolor=INK, title_text="estimated fall, nats", row=1, col=1)
    if has_check:
        _add_agreement(
            figure, [(row["edge"], row["score"], row["exact"]) for row in result["rows"]], {"row": 1, "col": 2}
        )
    title = f"Strongest {len(rows)} of {result['n_edges']} edges by {result['method']} (n = {result['n']})"
    figure.update_layout(
        LAYOUT,
        title={"text": title, "x": 0, "xref": "container"},
        height=150 + 22 * len(rows),
        margin={"l": 150, "r": 20, "t": 60, "b": 60},
        showlegend=False,
    )
    return figure


def _interval(rows: Any) -> dict[str, Any]:
    above = [max(0.0, (row["high"] or 0) - (row["score"] or 0)) for row in rows]
    below = [max(0.0, (row["score"] or 0) - (row["low"] or 0)) for row in rows]
    return {"type": "data", "array": above, "arrayminus": below, "color": INK, "thickness": 1, "width": 2}


def _point(row: AttributedCell) -> tuple[str, float | None, float | None]:
    head = "" if row["head"] is None else f" head {row['head']}"
    at = "" if row["position"] is None else f" at {row['position']}"
    return f"{row['site']} {row['layer']}{head}{at}", row["score"], row["exact"]


def _add_map(figure: Figure, result: AttributionPatching, cells: list[AttributedCell], where: dict[str, int]) -> None:
    """Layers upwards; heads, positions or both to the right."""
    import plotly.graph_objects as go  # noqa: PLC0415

    layers = sorted({row["layer"] for row in cells})
    heads: list[int | None] = [*sorted({row["head"] for row in cells if row["head"] is not None})]
    positions: list[str | None] = [column["label"] for column in result["columns"]]
    texts = {column["label"]: _column_text(column) for column in result["columns"]}
    columns = [(head, position) for head in heads or [None] for position in positions or [None]]
    by_cell = {(row["layer"], row["head"], row["position"]): row["score"] for row in cells}
    figure.add_trace(
        go.Heatmap(
            z=[[by_cell[layer, head, position] for head, position in columns] for layer in layers],
            y=layers,
            xgap=1,
            ygap=1,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}" if len(columns) <= 8 else None,
            textfont={"size": 11},
            hovertemplate="layer %{y}, %{x}: %{z:.3f} nats<extra></extra>",
            x=list(range(len(columns))),
        ),
        **where,
    )
    named = [
        " ".join(part for part in (None if head is None else str(head), texts.get(position or "")) if part)
        for head, position in columns
    ]
    step = -(-len(columns) // 24)  # labels that fit beside each other
    figure.update_xaxes(
        AXIS,
        tickvals=list(range(0, len(columns), step)),
        ticktext=named[::step],
        title_text="head" if heads and not positions else "",
        tickangle=-40 if positions else 0,
        showgrid=False,
        **where,
    )
    figure.update_yaxes(AXIS, title_text="layer", dtick=1 if len(layers) <= 12 else 4, showgrid=False, **where)


def _column_text(column: ColumnInfo) -> str:
    """The clean token, bold where the corrupted one differs; an ellipsis where pairs differ from each other."""
    text = label(column["clean"][0]) + ("\N{HORIZONTAL ELLIPSIS}" if len(column["clean"]) > 1 else "")
    return f"<b>{text}</b>" if column["differs"] else text


def _add_agreement(figure: Figure, points: list[tuple[str, float | None, float | None]], where: dict[str, int]) -> None:
    """Measured over estimated effects, with the line on which they are equal."""
    import plotly.graph_objects as go  # noqa: PLC0415

    known = [(name, score, exact) for name, score, exact in points if score is not None and exact is not None]
    ends = [min(min(p[1:]) for p in known), max(max(p[1:]) for p in known)]
    line = {"color": INK, "width": 1, "dash": "dot"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip"), **where)
    figure.add_trace(
        go.Scatter(
            x=[score for _, score, _ in known],
            y=[exact for *_, exact in known],
            customdata=[label(name) for name, *_ in known],
            mode="markers",
            marker={"color": LINES[1], "size": 8},
            hovertemplate="%{customdata}<br>estimated %{x:.3f}, measured %{y:.3f} nats<extra></extra>",
        ),
        **where,
    )
    figure.update_xaxes(AXIS, title_text="estimated, nats", **where)
    figure.update_yaxes(AXIS, title_text="measured, nats", **where)


def _layer_sums(rows: list[LogitPart], part: str, n_layers: int) -> dict[int, float]:
    """Place on the axis and sum, of the rows that a bar stands for."""
    of = {"attn": ("attn", "head", "attn_bias")}.get(part, (part,))
    outer = {"embedding": 0, "constant": n_layers + 1}
    sums: dict[int, float] = {}
    for row in rows:
        if row["part"] in of:
            at = outer[part] if row["layer"] is None else row["layer"] + 1
            sums[at] = sums.get(at, 0.0) + (row["score"] or 0.0)
    return sums


def _add_heads(figure: Figure, heads: list[LogitPart]) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    n_layers, n_heads = (1 + max(row[key] or 0 for row in heads) for key in ("layer", "head"))
    grid = [[heads[layer * n_heads + head]["score"] for head in range(n_heads)] for layer in range(n_layers)]
    bound = max(abs(row["score"] or 0) for row in heads)
    figure.add_trace(
        go.Heatmap(
            z=grid,
            colorscale=DIVERGING,
            zmin=-bound,
            zmax=bound,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.2f}" if n_heads <= 8 else None,
            textfont={"size": 11},
            colorbar={"title": {"text": "nats", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="layer %{y}, head %{x}: %{z:.3f} nats<extra></extra>",
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(AXIS, title_text="head", dtick=1 if n_heads <= 12 else 4, showgrid=False, row=1, col=2)
    figure.update_yaxes(AXIS, title_text="layer", dtick=1 if n_layers <= 12 else 4, showgrid=False, row=1, col=2)
