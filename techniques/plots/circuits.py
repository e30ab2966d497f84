"""Figures of circuits: faithfulness by size, pruning, and the graph of components with its weighted edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from techniques.plots._style import AXIS, GRID, INK, LAYOUT, LINES, label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._circuit_tests import RandomNull
    from techniques.circuits import CircuitEvaluation, CircuitGraph, GraphEdge, GraphNode
    from techniques.iterative_pruning import CircuitPruning

SIGNS = {True: LINES[0], False: LINES[2]}  # for and against the answer
DASHES = {"q": "dot", "k": "dash"}
NODES = {"input": INK, "head": LINES[1], "mlp": LINES[3], "logits": INK}
WIDTH = 760  # of the plot in a notebook, in pixels; what the graph's curves are fitted to
ROW = 46  # pixels between nodes above each other
CURVE = 16  # points of a curve


def plot_evaluate_circuit(result: CircuitEvaluation) -> Figure:
    """Draw faithfulness by size with its interval and random circuits, and what each part is needed for.

    Args:
        result: What `evaluate_circuit` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    losses = result["minimality"][:20]
    figure = make_subplots(
        1,
        2,
        column_widths=[0.6, 0.4],
        horizontal_spacing=0.16,
        subplot_titles=["faithfulness by size", "lost without one part"],
    )
    _add_curve(figure, result)
    _add_losses(figure, [(row["part"], row["loss"] or 0) for row in losses])
    value, others = (round(share or 0, 2) + 0.0 for share in (result["faithfulness"]["value"], result["complement"]))
    rest = f"{len(result['circuit'])} of {result['n_parts']} {result['level']}: {value:.2f}, all others: {others:.2f}"
    height = max(360, 150 + 20 * len(losses))
    areas = "" if result["cpr"] is None else f"; CPR {result['cpr']:.2f}, CMD {result['cmd']:.2f}"
    figure.update_layout(
        LAYOUT,
        title={"text": f"{rest}{areas} (n = {result['n']})", "x": 0, "xref": "container", "font": {"size": 15}},
        height=height,
        margin={"l": 60, "r": 20, "t": 80, "b": 90},
        legend={"orientation": "h", "x": 0, "y": -50 / (height - 170), "yanchor": "top"},
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def plot_iterative_pruning(result: CircuitPruning) -> Figure:
    """Draw faithfulness as parts go, on the pairs that choose and on the pairs that decide when to stop.

    Args:
        result: What `iterative_pruning` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone

    steps = result["steps"]
    places = list(range(len(steps)))
    figure = go.Figure()
    low, high = result["threshold"], 2 - result["threshold"]
    figure.add_hrect(y0=low, y1=high, fillcolor=GRID, line_width=0, layer="below", annotation_text="accepted")
    for key, name, colour in (("train", "pairs that choose", LINES[2]), ("held_out", "held-out pairs", LINES[0])):
        figure.add_trace(
            go.Scatter(
                x=places,
                y=[step[key] for step in steps],  # type: ignore[literal-required]
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                hovertemplate="without %{x}: %{y:.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(
        AXIS,
        tickvals=places,
        ticktext=[f"{step['removed']}<br>{step['n_kept']}" for step in steps],
        title_text="removed, and how many are left",
    )
    figure.update_yaxes(AXIS, title_text="faithfulness")
    kept = ", ".join(sorted(result["circuit"][:12])) + (", ..." if len(result["circuit"]) > 12 else "")
    figure.update_layout(
        LAYOUT,
        title={"text": f"Left: {kept}", "x": 0, "xref": "container", "font": {"size": 15}},
        height=360,
        margin={"l": 60, "r": 20, "t": 70, "b": 80},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def plot_circuit_graph(graph: CircuitGraph) -> Figure:
    """Draw a circuit from the embedding at the left to the output at the right, edges as wide as their scores.

    Args:
        graph: What `circuit_graph` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone

    places = _places(graph["nodes"])
    n_rows = max(y for _, y in places.values()) + 2
    height = 150 + ROW * n_rows
    x_end = max(x for x, _ in places.values())
    unit = WIDTH / (x_end + 1), ROW
    figure = go.Figure()
    largest = max(abs(edge["weight"]) for edge in graph["edges"])
    for edge in sorted(graph["edges"], key=lambda edge: abs(edge["weight"])):
        _add_edge(figure, edge, places, largest, unit)
    for node in graph["nodes"]:
        _add_node(figure, node, places[node["name"]])
    keys = [("for the answer", SIGNS[True], "solid"), ("against it", SIGNS[False], "solid")]
    keys += [(f"as {slot}", INK, DASHES[slot]) for slot in DASHES if any(e["slot"] == slot for e in graph["edges"])]
    for name, colour, dash in keys:
        line = {"color": colour, "width": 3, "dash": dash}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line))
    layers = sorted({node["layer"] for node in graph["nodes"] if node["layer"] is not None})
    figure.update_xaxes(
        range=[-0.5, x_end + 0.5],
        tickvals=[1.5 + 2 * i for i in range(len(layers))],
        ticktext=[f"layer {layer}" if len(layers) <= 8 else str(layer) for layer in layers],
        showgrid=False,
        zeroline=False,
        ticks="",
    )
    figure.update_yaxes(range=[-1.6, n_rows - 1.4], visible=False)
    names = dict.fromkeys(edge["edge"] for edge in graph["edges"])
    figure.update_layout(
        LAYOUT,
        title={"text": f"Circuit of {len(names)} edges, up to {largest:.2f} nats", "x": 0, "xref": "container"},
        height=height,
        margin={"l": 20, "r": 20, "t": 70, "b": 40},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _add_curve(figure: Figure, result: CircuitEvaluation) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    curve = result["curve"]
    sizes = [point["n_parts"] for point in curve]
    _add_null(figure, [(point["n_parts"], point["null"]) for point in curve if point["null"]])
    points = [point["faithfulness"] for point in curve]
    above = [max(0.0, (point["high"] or 0) - (point["value"] or 0)) for point in points]
    below = [max(0.0, (point["value"] or 0) - (point["low"] or 0)) for point in points]
    figure.add_trace(
        go.Scatter(
            x=sizes,
            y=[point["value"] for point in points],
            error_y={"array": above, "arrayminus": below, "color": LINES[0], "thickness": 1, "width": 3},
            mode="lines+markers",
            line={"color": LINES[0], "width": 2.5},
            name="largest parts first",
            hovertemplate="%{x} parts: %{y:.3f}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=1)
    figure.update_xaxes(
        AXIS, type="log", tickvals=sizes, ticktext=[str(size) for size in sizes], title_text="parts kept", row=1, col=1
    )
    figure.update_yaxes(AXIS, title_text="faithfulness", row=1, col=1)


def _add_null(figure: Figure, null: Sequence[tuple[int, RandomNull]]) -> None:
    """A band from the low to the high percentile of random circuits."""
    import plotly.graph_objects as go  # noqa: PLC0415

    band: dict[str, Any] = {"x": [size for size, _ in null], "mode": "lines", "hoverinfo": "skip", "line": {"width": 0}}
    figure.add_trace(go.Scatter(**band, y=[one["high"] for _, one in null], showlegend=False), row=1, col=1)
    figure.add_trace(
        go.Scatter(
            **band,
            y=[one["low"] for _, one in null],
            fill="tonexty",
            fillcolor=GRID,
            name="95 % of random circuits",
            showlegend=bool(null),
        ),
        row=1,
        col=1,
    )


def _add_losses(figure: Figure, losses: Sequence[tuple[str, float]]) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    figure.add_trace(
        go.Bar(
            x=[loss for _, loss in losses],
            y=[label(part).replace("-&gt;", " \N{RIGHTWARDS ARROW} ") for part, _ in losses],
            orientation="h",
            marker={"color": [SIGNS[loss >= 0] for _, loss in losses]},
            showlegend=False,
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(AXIS, zeroline=True, zerolinecolor=INK, title_text="faithfulness lost", row=1, col=2)
    figure.update_yaxes(AXIS, autorange="reversed", showgrid=False, tickfont={"size": 12}, row=1, col=2)


def _places(nodes: Sequence[GraphNode]) -> dict[str, tuple[float, float]]:
    """Two columns for each layer that has nodes, heads and then the MLP; MLPs lie lowest, heads above one another."""
    layers = sorted({node["layer"] for node in nodes if node["layer"] is not None})
    places: dict[str, tuple[float, float]] = {}
    for node in nodes:
        if node["layer"] is None:
            places[node["name"]] = (0.0 if node["kind"] == "input" else 2.0 * len(layers) + 1, 0.0)
        else:
            heads = [one["name"] for one in nodes if one["layer"] == node["layer"] and one["kind"] == "head"]
            x = 1.0 + 2 * layers.index(node["layer"])
            is_head = node["kind"] == "head"
            places[node["name"]] = (x, 1.0 + heads.index(node["name"])) if is_head else (x + 1, 0.0)
    return places


def _add_edge(
    figure: Figure,
    edge: GraphEdge,
    places: dict[str, tuple[float, float]],
    largest: float,
    unit: tuple[float, float],
) -> None:
    """A curve from node to node; long ones bend away from the nodes that they pass."""
    import plotly.graph_objects as go  # noqa: PLC0415

    (x0, y0), (x1, y1) = places[edge["sender"]], places[edge["receiver"]]
    is_low = y0 == y1 == 0 and any(y == 0 and x0 < x < x1 for x, y in places.values())
    bend = -0.16 * (x1 - x0) if is_low else 0.0
    size = abs(edge["weight"]) / largest
    # Ends at the rim of the receiver's marker, 17 pixels from its middle.
    length = (((x1 - x0) * unit[0]) ** 2 + ((y1 - y0) * unit[1]) ** 2) ** 0.5
    last = max(0.5, 1 - 19 / length)
    steps = [last * i / CURVE for i in range(CURVE + 1)]
    x, y = [], []
    for t in steps:
        eased = t if is_low else t * t * (3 - 2 * t)
        x.append(x0 + (x1 - x0) * t)
        y.append(y0 + (y1 - y0) * eased + 4 * bend * t * (1 - t))
    slot = f" as {edge['slot']}" if edge["slot"] else ""
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            line={"color": SIGNS[edge["weight"] > 0], "width": 1 + 7 * size, "dash": DASHES.get(edge["slot"], "solid")},
            opacity=0.35 + 0.55 * size,
            marker={
                "symbol": "arrow",
                "angleref": "previous",
                "size": [*[0] * CURVE, 8 + 10 * size],
                "color": SIGNS[edge["weight"] > 0],
                "line": {"width": 0},
            },
            text=f"{edge['sender']} to {edge['receiver']}{slot}: {edge['weight']:.3f} nats",
            hoverinfo="text",
            showlegend=False,
        )
    )


def _add_node(figure: Figure, node: GraphNode, place: tuple[float, float]) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    marker: dict[str, Any] = {"symbol": "circle" if node["kind"] == "head" else "square", "size": 34}
    text = {"input": "in", "logits": "out"}.get(node["name"], node["name"])
    figure.add_trace(
        go.Scatter(
            x=[place[0]],
            y=[place[1]],
            mode="markers+text",
            marker={**marker, "color": NODES[node["kind"]], "line": {"width": 0}},
            text=text.replace(".", "<br>"),
            textfont={"size": 11, "color": "white"},
            hovertext=node["name"],
            hoverinfo="text",
            showlegend=False,
        )
    )
