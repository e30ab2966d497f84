"""Figures of causal interventions: patching maps, causal traces, paths and ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from techniques.plots._style import AXIS, INK, LAYOUT, LINES, label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._columns import ColumnInfo
    from techniques.ablation import Ablation, AblationRow
    from techniques.causal_tracing import CausalTracing
    from techniques.patching import ActivationPatching, PatchRow
    from techniques.path_patching import PathPatching

DIVERGING = [[0, "#3b6fd4"], [0.5, "#dfe2e8"], [1, "#d6492a"]]  # 0 is pale
MAX_ROWS = 24  # lines that a figure lists; the strongest ones
SMALLEST = 1e-3  # maps whose values are all smaller keep a scale up to 1, or rounding would be coloured
BAND = 0.18  # opacity of an interval


def plot_activation_patching(result: ActivationPatching, metric: str | None = None) -> Figure:
    """Draw the effects: a map of layers and positions for each site, of layers and heads, or of the strongest heads.

    Under each position stand the clean tokens and, where they differ, the corrupted ones in italics.

    Args:
        result: What `activation_patching` returned.
        metric: The metric to draw; the first one if None.

    Raises:
        ValueError: The result has no such metric.
    """
    metrics = [baseline["metric"] for baseline in result["baselines"]]
    chosen = metrics[0] if metric is None else metric
    if chosen not in metrics:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(metrics)}, which this result has.")
    rows = [row for row in result["rows"] if row["metric"] == chosen]
    shares = {"denoise": "recovered by the clean activation", "noise": "lost by the corrupted activation"}
    title = f"Share of the {chosen} gap {shares[result['direction']]} (n = {result['n']})"
    draw = {"layer": _layer_lines, "head_position": _head_positions}.get(result["grain"], _site_maps)
    return draw(result, rows, title)


def plot_causal_tracing(result: CausalTracing) -> Figure:
    """Draw a map of layers and positions for each site: the probability that restoring it brings back.

    Args:
        result: What `causal_tracing` returned.
    """
    sites = list(dict.fromkeys(row["site"] for row in result["rows"]))
    several = f", {result['window']} layers at once" if result["window"] > 1 else ""
    titles = [site if site == "resid_post" else site + several for site in sites]
    cells = {(row["site"], row["layer"], row["column"]): row for row in result["rows"]}
    columns = range(len(result["columns"]))
    grids = [
        [[cells[site, layer, column]["effect"] for column in columns] for layer in range(result["n_layers"])]
        for site in sites
    ]
    figure = _maps(grids, titles, "probability")
    texts = [label(column) for column in result["columns"]]
    if all("subject" not in text for text in texts):  # single positions, the same in all prompts
        subject = next(prompt["subject"] for prompt in result["prompts"] if prompt["reason"] is None)
        texts = [f"<b>{text}</b>" if i in subject else text for i, text in enumerate(texts)]
    figure.update_xaxes(tickvals=list(columns), ticktext=texts, tickangle=-35)
    clean, corrupted = result["clean"], result["corrupted"]
    return _titled(
        figure, f"Probability brought back; {clean:.2f} without noise, {corrupted:.2f} with it (n = {result['n']})"
    )


def plot_causal_tracing_curves(result: CausalTracing, columns: Sequence[int] | None = None) -> Figure:
    """Draw the effect by layer, a panel for each site and a line with its interval for each column.

    Args:
        result: What `causal_tracing` returned.
        columns: Which columns to draw; by default the three with the largest effect anywhere.

    Raises:
        ValueError: The result has no such column.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    known = range(len(result["columns"]))
    best = {i: max((row["effect"] or 0.0) for row in result["rows"] if row["column"] == i) for i in known}
    chosen = sorted(sorted(known, key=lambda i: -best[i])[:3]) if columns is None else list(columns)
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"columns is {columns!r}; expected some of 0 to {len(known) - 1}.")
    sites = list(dict.fromkeys(row["site"] for row in result["rows"]))
    figure = make_subplots(1, len(sites), subplot_titles=sites, shared_yaxes=True, horizontal_spacing=0.04)
    for panel, site in enumerate(sites, 1):
        for i, column in enumerate(chosen):
            rows = [row for row in result["rows"] if row["site"] == site and row["column"] == column]
            name = f"{label(result['columns'][column])}"
            _add_line(figure, rows, name, LINES[i % len(LINES)], panel, show=panel == 1)
    figure.update_annotations(font={"size": 13, "color": INK})
    figure.update_xaxes(AXIS, title_text="layer", dtick=max(1, result["n_layers"] // 6))
    figure.update_yaxes(AXIS, tickformat=".0%")
    figure.update_layout(
        LAYOUT, height=360, margin={"l": 60, "r": 20, "t": 115, "b": 55}, legend={"orientation": "h", "y": 1.24, "x": 0}
    )
    return _titled(figure, f"Probability brought back by restoring one layer (n = {result['n']})")


def plot_path_patching(result: PathPatching) -> Figure:
    """Draw a map for each receiver: what it hears from each head and MLP on the direct route.

    Args:
        result: What `path_patching` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    senders = [_place(name) for name in result["senders"]]
    layers = range(1 + max(layer for layer, _ in senders))
    slots = sorted({slot for _, slot in senders}, key=lambda slot: (slot == "MLP", slot.zfill(4)))
    effect = {(row["receiver"], *_place(row["sender"])): row["effect"] for row in result["rows"]}
    receivers = result["receivers"]
    n_cols = min(len(receivers), 3)
    n_rows = -(-len(receivers) // n_cols)
    height = n_rows * (70 + 30 * len(layers))
    figure = make_subplots(
        n_rows,
        n_cols,
        subplot_titles=[f"to {label(name)}" for name in receivers],
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=70 / height if n_rows > 1 else 0,
    )
    small = len(slots) * n_cols > 16
    for i, name in enumerate(receivers):
        grid = [[effect.get((name, layer, slot)) for slot in slots] for layer in layers]
        _add_map(figure, grid, i // n_cols + 1, i % n_cols + 1, with_text=not small)
    figure.update_annotations(font={"size": 13, "color": INK})
    figure.update_xaxes(AXIS, tickvals=list(range(len(slots))), ticktext=slots, showgrid=False)
    figure.update_yaxes(AXIS, dtick=max(1, len(layers) // 8), showgrid=False)
    figure.update_xaxes(title_text="head", row=n_rows)
    figure.update_yaxes(title_text="layer", col=1)
    _finish(figure, [row["effect"] for row in result["rows"]], height + 90)
    changed = {"noise": "lost by corrupting", "denoise": "recovered by restoring"}[result["direction"]]
    return _titled(figure, f"Share of the logit_diff gap {changed} one path (n = {result['n']})")


def plot_ablation(result: Ablation) -> Figure:
    """Draw what each ablation changes as bars with intervals, the largest changes of the logit difference first.

    Args:
        result: What `ablate` or `ablate_sweep` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    rows = sorted(result["rows"], key=lambda row: -abs(row["logit_diff"]["change"] or 0.0))[:MAX_ROWS]
    titles = ["logit_diff, nats", "cross-entropy of the answer, nats"]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    figure.update_annotations(font={"size": 13, "color": INK})
    _add_bars(figure, rows, "logit_diff", 1, LINES[2])
    _add_bars(figure, rows, "cross_entropy", 2, LINES[0])
    names = ["+".join(row["components"]) for row in rows]
    shown = [
        name if len(name) <= 18 else f"{len(row['components'])} parts" for name, row in zip(names, rows, strict=True)
    ]
    figure.update_xaxes(AXIS, zeroline=True, zerolinecolor=INK)
    figure.update_yaxes(AXIS, tickvals=list(range(len(rows))), ticktext=shown, autorange="reversed", showgrid=False)
    height = 130 + 24 * len(rows)
    figure.update_layout(LAYOUT, height=height, margin={"l": 80, "r": 20, "t": 85, "b": 45}, showlegend=False)
    more = len(result["rows"]) - len(rows)
    rest = f"; {more} smaller ones not shown" if more else ""
    return _titled(figure, f"Change after {result['mode']} ablation (n = {result['n']}{rest})")


# ---------------------------------------------------------------------------------------------- by grain


def _site_maps(result: ActivationPatching, rows: list[PatchRow], title: str) -> Figure:
    """Layers against positions or heads, a panel for each site."""
    by_head = result["grain"] == "head"
    places = sorted({(row["head"] if by_head else row["column"]) or 0 for row in rows})
    cells = {
        (row["site"], row["layer"], (row["head"] if by_head else row["column"]) or 0): row["effect"] for row in rows
    }
    grids = [
        [[cells.get((site, layer, place)) for place in places] for layer in range(result["n_layers"])]
        for site in result["sites"]
    ]
    figure = _maps(grids, list(result["sites"]), "effect")
    texts = [str(place) for place in places] if by_head else [_column_text(column) for column in result["columns"]]
    figure.update_xaxes(tickvals=places, ticktext=texts, tickangle=0 if by_head else None)
    if by_head:
        figure.update_xaxes(title_text="head", row=len(grids))
    return _titled(figure, title)


def _head_positions(result: ActivationPatching, rows: list[PatchRow], title: str) -> Figure:
    """The heads with the largest effect anywhere against positions."""
    by_head: dict[tuple[str, int, int], dict[int, float | None]] = {}
    for row in rows:
        by_head.setdefault((row["site"], row["layer"], row["head"] or 0), {})[row["column"] or 0] = row["effect"]
    strongest = sorted(by_head, key=lambda head: -max(abs(effect or 0.0) for effect in by_head[head].values()))
    shown = sorted(strongest[:MAX_ROWS])
    grid = [list(by_head[head].values()) for head in shown]
    figure = _maps([grid], [""], "effect")
    several = len(result["sites"]) > 1
    names = [f"{layer}.{head}{' ' + site if several else ''}" for site, layer, head in shown]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(shown))), ticktext=names, title_text="layer.head")
    texts = [_column_text(column) for column in result["columns"]]
    figure.update_xaxes(tickvals=list(range(len(texts))), ticktext=texts)
    more = len(by_head) - len(shown)
    return _titled(figure, title + (f"; {more} weaker heads not shown" if more else ""))


def _layer_lines(result: ActivationPatching, rows: list[PatchRow], title: str) -> Figure:
    """A line by layer with its interval for each site, all positions patched at once."""
    from plotly.subplots import make_subplots  # noqa: PLC0415

    figure = make_subplots(1, 1)
    for i, site in enumerate(result["sites"]):
        _add_line(figure, [row for row in rows if row["site"] == site], site, LINES[i % len(LINES)], 1, show=True)
    figure.update_xaxes(AXIS, title_text="layer, all positions", dtick=max(1, result["n_layers"] // 12))
    figure.update_yaxes(AXIS, title_text="effect")
    figure.update_layout(
        LAYOUT, height=340, margin={"l": 65, "r": 20, "t": 85, "b": 55}, legend={"orientation": "h", "y": 1.15, "x": 0}
    )
    return _titled(figure, title)


# ---------------------------------------------------------------------------------------------- parts


def _maps(grids: list[list[list[float | None]]], titles: list[str], unit: str) -> Figure:
    """Maps one below the other with a common scale; rows are layers, the first at the bottom."""
    from plotly.subplots import make_subplots  # noqa: PLC0415

    n_rows = len(grids[0])
    panel = max(110, 24 * n_rows)
    height = 160 + len(grids) * panel + (len(grids) - 1) * 40
    figure = make_subplots(
        len(grids),
        1,
        subplot_titles=titles,
        shared_xaxes=True,
        vertical_spacing=40 / (height - 160) if len(grids) > 1 else 0,
    )
    figure.update_annotations(font={"size": 13, "color": INK}, x=0, xanchor="left")
    with_text = len(grids[0][0]) <= 12
    for i, grid in enumerate(grids, 1):
        _add_map(figure, grid, i, 1, with_text=with_text)
    figure.update_xaxes(AXIS, showgrid=False)
    figure.update_yaxes(AXIS, title_text="layer", dtick=max(1, n_rows // 8), showgrid=False)
    _finish(figure, [value for grid in grids for line in grid for value in line], height, unit)
    return figure


def _add_map(figure: Figure, grid: list[list[float | None]], row: int, col: int, with_text: bool) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    text = {"texttemplate": "%{z:.2f}", "textfont": {"size": 11}} if with_text else {}
    figure.add_trace(
        go.Heatmap(
            z=grid,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="%{x}, layer %{y}: %{z:.3f}<extra></extra>",
            **text,
        ),
        row=row,
        col=col,
    )


def _finish(figure: Figure, values: Sequence[float | None], height: float, unit: str = "effect") -> None:
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    largest = largest if largest > SMALLEST else 1.0
    bar = {
        "title": {"text": unit, "side": "right", "font": {"size": 13}},
        "thickness": 12,
        "outlinewidth": 0,
        "tickformat": ".2g",
    }
    figure.update_layout(
        LAYOUT,
        height=height,
        margin={"l": 60, "r": 20, "t": 80, "b": 75},
        coloraxis={"colorscale": DIVERGING, "cmin": -largest, "cmax": largest, "colorbar": bar},
    )


def _titled(figure: Figure, text: str) -> Figure:
    figure.update_layout(title={"text": text, "x": 0, "xref": "container", "font": {"size": 15}})
    return figure


def _column_text(column: ColumnInfo) -> str:
    """The clean tokens and, below them where they differ, the corrupted ones."""
    clean, corrupted = (_first(column[side]) for side in ("clean", "corrupted"))
    if column["label"].lstrip("-").isdigit():
        return f"<b>{clean}</b><br><i>{corrupted}</i>" if column["differs"] else clean
    return f"<b>{label(column['label'])}</b><br>{clean}"


def _first(tokens: list[str]) -> str:
    return label(tokens[0].strip() or tokens[0]) + (" \N{HORIZONTAL ELLIPSIS}" if len(tokens) > 1 else "")


def _place(name: str) -> tuple[int, str]:
    """Layer and slot of a component's name: a3.h1 -> (3, "1"), m3 -> (3, "MLP")."""
    layer, _, head = name[1:].partition(".h")
    return int(layer), head or "MLP"


def _add_line(figure: Figure, rows: Sequence[Mapping[str, Any]], name: str, color: str, col: int, show: bool) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    layers = [row["layer"] for row in rows]
    band = [*(row["high"] for row in rows), *(row["low"] for row in reversed(rows))]
    figure.add_trace(
        go.Scatter(
            x=[*layers, *reversed(layers)],
            y=band,
            mode="lines",
            fill="toself",
            fillcolor=color,
            opacity=BAND,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=1,
        col=col,
    )
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=[row["effect"] for row in rows],
            name=name,
            legendgroup=name,
            showlegend=show,
            mode="lines+markers",
            line={"color": color, "width": 2.5},
            hovertemplate="layer %{x}: %{y:.3f}",
        ),
        row=1,
        col=col,
    )


def _add_bars(figure: Figure, rows: list[AblationRow], field: str, col: int, color: str) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    changes = [row[field] for row in rows]  # type: ignore[literal-required]
    figure.add_trace(
        go.Bar(
            x=[change["change"] for change in changes],
            y=list(range(len(rows))),
            orientation="h",
            marker={"color": color},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [change["high"] - change["change"] for change in changes],
                "arrayminus": [change["change"] - change["low"] for change in changes],
                "color": INK,
                "thickness": 1.2,
                "width": 3,
            },
            customdata=["+".join(row["components"]) for row in rows],
            hovertemplate="%{customdata}: %{x:.3f} nats<extra></extra>",
        ),
        row=1,
        col=col,
    )
