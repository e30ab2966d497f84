"""Figures of attention: patterns, scores of known jobs, and what is lost when edges are cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from techniques.plots._style import AXIS, GRID, INK, LAYOUT, LINES, SCALE, label, quoted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques.attention import AttentionPatterns, HeadPattern, HeadScores
    from techniques.attention_knockout import AttentionKnockout

JOBS = {"previous_token": "previous token", "duplicate_token": "duplicate token", "induction": "induction"}
WIDTH = 760  # of all panels together; a notebook is about 800 wide
MAX_TOKENS_NAMED = 24  # longer texts get numbers on the axes
TITLE = {"x": 0, "xref": "container"}


def plot_attention_patterns(result: AttentionPatterns) -> Figure:
    """Draw each head's pattern as a small square: queries downwards, keys to the right.

    Args:
        result: What `attention_patterns` returned, with its patterns inside or in a file that can be read here.

    Raises:
        ValueError: The file of the patterns is not there.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    rows = _with_patterns(result)
    n_cols = _columns(rows)
    n_rows = -(-len(rows) // n_cols)
    titles = [f"{row['layer']}.{row['head']}" for row in rows]
    names_top = 26 if len(result["tokens"]) <= MAX_TOKENS_NAMED else 10
    side = (WIDTH - 90) / n_cols
    height = 150 + n_rows * (side + names_top)
    figure = make_subplots(
        n_rows,
        n_cols,
        subplot_titles=titles,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.15 / n_cols,
        vertical_spacing=names_top / (height - 150),
    )
    figure.update_annotations(font={"size": 12, "color": INK})
    for i, row in enumerate(rows):
        figure.add_trace(_pattern(result["tokens"], row), row=i // n_cols + 1, col=i % n_cols + 1)
    tokens = [label(token) for token in result["tokens"]]
    named = len(tokens) <= MAX_TOKENS_NAMED
    ticks: dict[str, Any] = {"tickvals": list(range(len(tokens))), "ticktext": tokens} if named else {}
    font = {"size": 10 if n_cols > 2 else 11}
    figure.update_xaxes(AXIS, **ticks, tickangle=90, tickfont=font, showgrid=False)
    figure.update_yaxes(AXIS, **ticks, autorange="reversed", tickfont=font, showgrid=False)
    figure.update_layout(
        LAYOUT,
        title={"text": "Attention by layer.head: each row is a query, each column a key", **TITLE},
        coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": _bar("attention")},
        height=height,
        margin={"l": 75, "r": 20, "t": 70, "b": 80},
    )
    return figure


def _with_patterns(result: AttentionPatterns) -> list[HeadPattern]:
    """The rows, with patterns that lie in a file read from it."""
    rows, file = result["rows"], result["file"]
    if file is None:
        return rows
    if not Path(file["path"]).is_file():
        raise ValueError(
            f"The patterns of this result are in {file['path']}, which is not there; expected the file on this "
            "machine. Copy it from where the model ran, or call attention_patterns without save=."
        )
    from safetensors.numpy import load_file  # noqa: PLC0415

    arrays = load_file(file["path"])
    at = {layer: iter(arrays[f"layer_{layer}"].tolist()) for layer in dict.fromkeys(row["layer"] for row in rows)}
    return [{**row, "pattern": next(at[row["layer"]])} for row in rows]


def plot_head_scores(result: HeadScores) -> Figure:
    """Draw a map of layers and heads for each of the three jobs, with the scores in the cells.

    Args:
        result: What `head_scores` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    n_layers = 1 + max(row["layer"] for row in result["rows"])
    n_heads = 1 + max(row["head"] for row in result["rows"])
    titles = [f"{name}<br>(all alike: {result['uniform'][job]:.2f})" for job, name in JOBS.items()]
    figure = make_subplots(1, len(JOBS), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    figure.update_annotations(font={"size": 13, "color": INK})
    for column, job in enumerate(JOBS, 1):
        figure.add_trace(_scores(result, job, n_layers, n_heads), row=1, col=column)
    step = max(1, n_heads // 6)
    figure.update_xaxes(AXIS, title_text="head", tickvals=list(range(0, n_heads, step)), showgrid=False)
    figure.update_yaxes(AXIS, autorange="reversed", tickvals=list(range(n_layers)), showgrid=False)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_layout(
        LAYOUT,
        title={"text": f"Attention on {result['n']} lists of {result['seq_len']} random tokens, twice", **TITLE},
        coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": _bar("mean attention")},
        height=190 + max(150, 30 * n_layers),
        margin={"l": 50, "r": 20, "t": 105, "b": 60},
    )
    return figure


def plot_attention_knockout(result: AttentionKnockout) -> Figure:
    """Draw what cutting the edges changes: a curve over layers with its control, or a map of layers and heads.

    Args:
        result: What `attention_knockout` returned.
    """
    figure = _knockout_curve(result) if result["grain"] == "layer" else _knockout_map(result)
    shown = result["prompts"][0]
    cut = ", ".join(quoted(shown["tokens"][key]) for key in shown["keys"])
    from_ = ", ".join(quoted(shown["tokens"][query]) for query in shown["queries"])
    figure.update_layout(
        LAYOUT,
        title={
            "text": f"Attention knockout, {result['n']} prompts<br><sup>in the first, {from_} can't see {cut}</sup>",
            **TITLE,
        },
    )
    return figure


def _bar(title: str) -> dict[str, Any]:
    return {"thickness": 12, "outlinewidth": 0, "title": {"text": title, "side": "right", "font": {"size": 13}}}


def _columns(rows: list[HeadPattern]) -> int:
    """A line of panels for each layer where that fits."""
    per_layer = sum(row["layer"] == rows[0]["layer"] for row in rows)
    return per_layer if per_layer <= 6 else 6


def _pattern(tokens: list[str], row: HeadPattern) -> Any:
    import plotly.graph_objects as go  # noqa: PLC0415

    pattern = row["pattern"] or []
    # What a query can't see is left empty rather than drawn as 0.
    seen = [[value if key <= query else None for key, value in enumerate(line)] for query, line in enumerate(pattern)]
    names = [quoted(token) for token in tokens]
    return go.Heatmap(
        z=seen,
        customdata=[[[query, key] for key in names] for query in names],
        coloraxis="coloraxis",
        hovertemplate=f"head {row['layer']}.{row['head']}<br>%{{customdata[0]}} looks at %{{customdata[1]}}: "
        "%{z:.3f}<extra></extra>",
        hoverongaps=False,
    )


def _scores(result: HeadScores, job: str, n_layers: int, n_heads: int) -> Any:
    import plotly.graph_objects as go  # noqa: PLC0415

    cells: dict[tuple[int, int], Any] = {(row["layer"], row["head"]): row[job] for row in result["rows"]}  # type: ignore[literal-required]
    grid = [[cells[layer, head] for head in range(n_heads)] for layer in range(n_layers)]
    return go.Heatmap(
        z=[[cell["mean"] for cell in line] for line in grid],
        customdata=[[[cell["low"], cell["high"]] for cell in line] for line in grid],
        texttemplate="%{z:.2f}" if n_heads <= 6 else None,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate="head %{y}.%{x}<br>%{z:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
    )


def _knockout_curve(result: AttentionKnockout) -> Figure:
    import plotly.graph_objects as go  # noqa: PLC0415

    rows = result["rows"]
    layers = [row["layer"] for row in rows]
    figure = go.Figure()
    for name, prefix, colour in (("control: other keys", "control", INK), ("edges cut", "", LINES[0])):
        mean, low, high = (f"{prefix}_{end}" if prefix else end for end in ("mean", "low", "high"))
        mean = prefix or "effect"
        values: dict[str, list[Any]] = {end: [row[end] for row in rows] for end in (mean, low, high)}  # type: ignore[literal-required]
        if None in values[mean]:
            continue
        figure.add_scatter(
            x=[*layers, *reversed(layers)],
            y=[*values[high], *reversed(values[low])],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.22,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=layers,
            y=values[mean],
            name=f"{name}, 95 %",
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            hovertemplate=f"{name} at layer %{{x}}: %{{y:.2f}} nats<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": GRID, "width": 1})
    whole = result["all_layers"]["effect"]
    figure.add_hline(
        y=whole,
        line={"color": LINES[0], "width": 1.5, "dash": "dot"},
        annotation={"text": f"cut in all layers: {whole:.2f}", "font": {"color": INK, "size": 12}},
        annotation_position="bottom right",
    )
    window = f", windows of {result['window']}" if result["window"] > 1 else ""
    figure.update_xaxes(AXIS, title_text=f"layer{window}", tickvals=layers[:: 1 + len(layers) // 24])
    figure.update_yaxes(AXIS, title_text="change of the logit difference, nats")
    figure.update_layout(
        height=420,
        margin={"l": 70, "r": 20, "t": 90, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _knockout_map(result: AttentionKnockout) -> Figure:
    import plotly.graph_objects as go  # noqa: PLC0415

    cells = {(row["layer"], row["head"]): row for row in result["rows"]}
    layers = list(dict.fromkeys(row["layer"] for row in result["rows"]))
    heads = list(dict.fromkeys(row["head"] for row in result["rows"]))
    grid = [[cells[layer, head] for head in heads] for layer in layers]
    limit = max(abs(row["effect"] or 0.0) for row in result["rows"])
    figure = go.Figure(
        go.Heatmap(
            z=[[cell["effect"] for cell in line] for line in grid],
            x=[str(head) for head in heads],
            y=[str(layer) for layer in layers],
            customdata=[[[cell["low"], cell["high"], cell["control"]] for cell in line] for line in grid],
            texttemplate="%{z:.2f}" if len(heads) <= 12 else None,
            colorscale="RdBu",
            zmin=-limit,
            zmax=limit,
            xgap=1,
            ygap=1,
            colorbar=_bar("nats"),
            hovertemplate="head %{y}.%{x}: %{z:.3f} nats (%{customdata[0]:.2f} to %{customdata[1]:.2f}), "
            "control %{customdata[2]:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(AXIS, title_text="head", type="category", showgrid=False)
    figure.update_yaxes(AXIS, title_text="layer", type="category", autorange="reversed", showgrid=False)
    figure.update_layout(height=190 + max(150, 32 * len(layers)), margin={"l": 60, "r": 20, "t": 90, "b": 60})
    return figure
