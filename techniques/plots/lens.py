"""Figures of the lenses and of token probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from techniques.plots._style import AXIS, INK, LAYOUT, LINES, SCALE, label, quoted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques._tokens import TokenProb
    from techniques.analyze_token_probs import TokenProbs
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
    depths = range(result["n_layers"] + 1)
    names = ["embedding", *(f"after block {depth - 1}" for depth in depths if depth)]
    figure.update_yaxes(AXIS)
    figure.update_yaxes(tickvals=list(depths), ticktext=names, row=1, col=1)
    figure.update_layout(
        LAYOUT,
        title={"text": "Logit lens: most probable next token", "x": 0, "xref": "container"},
        height=130 + 34 * len(depths),
        margin={"l": 100, "r": 20, "t": 60, "b": 70},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
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
