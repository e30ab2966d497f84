"""Figures of the lenses and of token probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from techniques.plots._style import AXIS, GRID, INK, LAYOUT, LINES, SCALE, label, quoted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._tokens import TokenProb
    from techniques.analyze_token_probs import TokenProbs
    from techniques.logit_diff_lens import DepthMean, LogitDiffLens
    from techniques.logit_lens import LensRow, LogitLens


def plot_logit_lens(result: LogitLens, prompt: int = 0) -> Figure:
    """Draw the lens of one prompt: the most probable token at each position and depth, coloured by its probability.

    If the lens followed targets, a second panel shows their probability at the last decoded position by depth.

    Args:
        result: What `logit_lens` returned.
        prompt: Index of the prompt to draw.

    Raises:
        ValueError: The result has no such prompt.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    if not 0 <= prompt < len(result["prompts"]):
        raise ValueError(f"prompt is {prompt}; expected 0 to {len(result['prompts']) - 1}, an index of the prompts.")
    rows = [row for row in result["rows"] if row["prompt"] == prompt]
    has_targets = bool(rows[0]["targets"])
    panels = {"cols": 2, "column_widths": [0.74, 0.26]} if has_targets else {}
    figure = make_subplots(shared_yaxes=True, horizontal_spacing=0.03, **panels)
    _add_lens_cells(figure, result, rows, prompt)
    if has_targets:
        at = result["prompts"][prompt]["tokens"][rows[-1]["position"]]
        _add_targets(figure, rows, f"probability at {quoted(at)}")
    names = _depth_names(result["n_layers"])
    figure.update_yaxes(AXIS)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, row=1, col=1)
    figure.update_layout(
        LAYOUT,
        title={"text": "Logit lens: most probable next token", "x": 0, "xref": "container"},
        height=130 + 34 * len(names),
        margin={"l": 100, "r": 20, "t": 60, "b": 70},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def plot_logit_diff_lens(result: LogitDiffLens) -> Figure:
    """Draw logit(answer) - logit(wrong) by depth: each prompt, their mean, and where the mean is decided.

    Below it stands the share of the prompts that are decided by then, counted with the prompts' own decision depths.

    Args:
        result: What `logit_diff_lens` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    names = _depth_names(result["n_layers"])
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.78, 0.22], vertical_spacing=0.05)
    _add_curves(figure, result)
    figure.add_hline(y=0, line={"color": INK, "width": 1}, row=1, col=1)
    _add_decided(figure, result)
    decided = result["mean_curve"]["decision_depth"]
    if decided is not None:
        text = f"mean decided: {names[decided]}"
        figure.add_vline(x=decided, line={"color": INK, "width": 1.5, "dash": "dot"})
        figure.add_annotation(
            x=decided, y=1.0, yref="y domain", text=text, showarrow=False, xanchor="left", yanchor="bottom", xshift=-4
        )
    step = 1 + len(names) // 20
    short = ["embedding", *(str(layer) for layer in range(result["n_layers"]))]
    figure.update_xaxes(AXIS, tickvals=list(range(len(names)))[::step], ticktext=short[::step])
    figure.update_xaxes(range=[-0.4, len(names) - 0.6], title_text="after block", row=2, col=1)
    figure.update_yaxes(AXIS)
    figure.update_yaxes(title_text="logit(answer) - logit(wrong), nats", row=1, col=1)
    figure.update_yaxes(title_text="decided", range=[-0.05, 1.1], tickformat=".0%", row=2, col=1)
    figure.update_layout(
        LAYOUT,
        title={"text": f"Logit-difference lens, {result['n']} prompts", "x": 0, "xref": "container"},
        height=500,
        margin={"l": 70, "r": 20, "t": 90, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.1, "yanchor": "bottom"},
    )
    return figure


def plot_token_probs(result: TokenProbs) -> Figure:
    """Draw the most probable next tokens as bars, a panel for each text.

    Args:
        result: What `analyze_token_probs` returned.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415 - slow to import, and needed for drawing alone

    rows = result["rows"]
    figure = make_subplots(
        len(rows),
        1,
        subplot_titles=[label(row["text"][-80:]) for row in rows],
        vertical_spacing=min(0.35 / len(rows), 0.16),
    )
    figure.update_annotations(font={"size": 13, "color": INK}, x=0, xanchor="left")
    for i, row in enumerate(rows, 1):
        _add_bars(figure, row["top"], i)
    figure.update_xaxes(AXIS, range=[0, 1.12], tickvals=[0, 0.25, 0.5, 0.75, 1], tickformat=".0%")
    figure.update_yaxes(AXIS, autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="probability", row=len(rows), col=1)
    bars = sum(len(row["top"]) for row in rows)
    figure.update_layout(
        LAYOUT, height=70 + 75 * len(rows) + 24 * bars, margin={"l": 120, "r": 20, "t": 50, "b": 60}, showlegend=False
    )
    return figure


def _depth_names(n_layers: int) -> list[str]:
    return ["embedding", *(f"after block {layer}" for layer in range(n_layers))]


def _add_curves(figure: Figure, result: LogitDiffLens) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    for i, curve in enumerate(result["curves"]):
        figure.add_trace(
            go.Scatter(
                y=curve["diffs"],
                mode="lines",
                line={"color": GRID, "width": 1.2},
                name="each prompt",
                legendgroup="each",
                showlegend=i == 0,
                hovertemplate=f"{quoted(curve['prompt'])}<br>{quoted(curve['answer'])} - {quoted(curve['wrong'])}: "
                "%{y:.2f} nats<extra></extra>",
            ),
            row=1,
            col=1,
        )
    drawn = [("mean", result["depths"], LINES[0]), ("mean of baselines", result["baseline"], LINES[2])]
    for name, depths, colour in drawn:
        if depths is not None:
            _add_mean(figure, name, depths, colour)


def _add_mean(figure: Figure, name: str, depths: list[DepthMean], colour: str) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    x = [row["depth"] for row in depths]
    band = go.Scatter(
        x=[*x, *reversed(x)],
        y=[*(row["high"] for row in depths), *(row["low"] for row in reversed(depths))],
        mode="lines",
        fill="toself",
        fillcolor=colour,
        opacity=0.25,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=x,
        y=[row["mean"] for row in depths],
        name=f"{name}, 95 %",
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        hovertemplate=f"{name}: %{{y:.2f}} nats<extra></extra>",
    )
    figure.add_traces([band, line], rows=1, cols=1)


def _add_decided(figure: Figure, result: LogitDiffLens) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    figure.add_trace(
        go.Bar(
            x=[row["depth"] for row in result["depths"]],
            y=[row["decided"] for row in result["depths"]],
            marker={"color": LINES[0]},
            opacity=0.7,
            width=0.4,
            showlegend=False,
            hovertemplate="%{y:.0%} of the prompts are decided<extra></extra>",
        ),
        row=2,
        col=1,
    )


def _add_lens_cells(figure: Figure, result: LogitLens, rows: list[LensRow], prompt: int) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    tokens = result["prompts"][prompt]["tokens"]
    positions = list(dict.fromkeys(result["prompts"][prompt]["positions"]))
    cells = {(row["depth"], row["position"]): row for row in rows}
    grid = [[cells[depth, position] for position in positions] for depth in range(result["n_layers"] + 1)]
    figure.add_trace(
        go.Heatmap(
            z=[[row["top"][0]["prob"] for row in line] for line in grid],
            text=[[label(row["top"][0]["token"]) for row in line] for line in grid],
            customdata=[[_hover(row) for row in line] for line in grid],
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=SCALE,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "probability", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        ),
        row=1,
        col=1,
    )
    labels = [label(tokens[position]) for position in positions]
    # Columns are numbered, since the same token may stand at several positions.
    figure.update_xaxes(
        AXIS, tickvals=list(range(len(positions))), ticktext=labels, title_text="at token", row=1, col=1
    )


def _add_targets(figure: Figure, rows: list[LensRow], where: str) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    last = [row for row in rows if row["position"] == rows[-1]["position"]]
    depths = [row["depth"] for row in last]
    for i, target in enumerate(last[0]["targets"]):
        seen = [row["targets"][i] for row in last]
        figure.add_trace(
            go.Scatter(
                x=[point["prob"] for point in seen],
                y=depths,
                customdata=[point["rank"] for point in seen],
                name=label(target["token"]),
                mode="lines+markers",
                line={"color": LINES[i % len(LINES)], "width": 2.5},
                hovertemplate="%{x:.3g}, rank %{customdata}",
            ),
            row=1,
            col=2,
        )
    figure.update_xaxes(AXIS, title_text=where, range=[-0.04, 1.04], tickformat=".0%", row=1, col=2)


def _add_bars(figure: Figure, tokens: list[TokenProb], row: int) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    figure.add_trace(
        go.Bar(
            x=[token["prob"] for token in tokens],
            y=list(range(len(tokens))),
            orientation="h",
            marker={"color": LINES[2]},
            text=[f"{token['prob']:.1%}" for token in tokens],
            textposition="outside",
            cliponaxis=False,
            customdata=[[quoted(token["token"]), token["id"], token["logprob"]] for token in tokens],
            hovertemplate="%{customdata[0]} (id %{customdata[1]})<br>logprob %{customdata[2]:.3f} nats<extra></extra>",
        ),
        row=row,
        col=1,
    )
    figure.update_yaxes(
        tickvals=list(range(len(tokens))), ticktext=[label(token["token"]) for token in tokens], row=row, col=1
    )


def _hover(row: LensRow) -> str:
    lines = [f"{quoted(token['token'])}  {token['prob']:.1%}" for token in row["top"]]
    lines += [f"target {quoted(t['token'])}  {t['prob']:.2%}, rank {t['rank']}" for t in row["targets"]]
    lines += [f"entropy {row['entropy']:.2f} nats", f"KL to the output {row['kl_to_final']:.2f} nats"]
    return "<br>".join(lines)
