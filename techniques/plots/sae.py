"""Figures of sparse autoencoders: training, the trade of sparsity for error, densities, one feature, one dose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from techniques.plots._style import AXIS, GRID, INK, LAYOUT, LINES, label, quoted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from techniques.evaluate_sae import SAEMetrics
    from techniques.sae import TrainedSAE
    from techniques.sae_features import FeatureReport, FeatureRow
    from techniques.steer_feature import FeatureSteering

BEFORE, AFTER = 7, 3  # columns around an example's strongest token; more would not be readable in 800 px
LONGEST = 9  # characters of a token in its cell


def plot_train_sae(result: TrainedSAE) -> Figure:
    """Draw how training went: explained variance, active features per token, and features that no longer fire.

    Args:
        result: What `train_sae` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - slow to import, and needed for drawing alone
    from plotly.subplots import make_subplots  # noqa: PLC0415

    figure = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.06)
    steps = [point["step"] for point in result["curve"]]
    curves = (
        ("explained<br>variance", [point["explained_variance"] for point in result["curve"]]),
        ("features<br>per token", [point["l0"] for point in result["curve"]]),
        ("dead<br>features", [point["dead"] for point in result["curve"]]),
    )
    for row, (name, values) in enumerate(curves, 1):
        line = {"color": LINES[2 if row == 1 else row - 2], "width": 2}
        figure.add_trace(go.Scatter(x=steps, y=values, line=line, hovertemplate="step %{x}: %{y:.4g}"), row=row, col=1)
        figure.update_yaxes(AXIS, title_text=name, nticks=5, row=row, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)
    figure.update_yaxes(rangemode="tozero", row=3, col=1)
    figure.update_xaxes(AXIS)
    figure.update_xaxes(title_text="step", row=3, col=1)
    title = f"{result['kind']} SAE, {result['d_sae']} features, at {result['hook_name']}"
    return figure.update_layout(
        LAYOUT, title=_title(title), height=460, margin={"l": 80, "r": 20, "t": 55, "b": 55}, showlegend=False
    )


def plot_evaluate_sae(result: SAEMetrics) -> Figure:
    """Draw how often features are active: a histogram of their densities.

    Args:
        result: What `evaluate_sae` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415

    logs = [math.log10(density) for density in result["feature_density"] if density]
    dead = result["d_sae"] - len(logs)
    bars = go.Histogram(x=logs, nbinsx=40, marker={"color": LINES[2]}, hovertemplate="%{y} features<extra></extra>")
    figure = go.Figure(bars)
    ticks = list(range(math.floor(min(logs, default=-1)), 1))
    figure.update_xaxes(
        AXIS,
        tickvals=ticks,
        ticktext=[f"{100 * 10**tick:g} %" for tick in ticks],
        title_text="share of tokens on which a feature is active",
    )
    figure.update_yaxes(AXIS, title_text="features")
    facts = f"{dead} of {result['d_sae']} features never active, L0 {result['l0']:.3g}" if result["l0"] else ""
    return figure.update_layout(
        LAYOUT,
        title=_title(f"Density of features: {facts}"),
        height=340,
        bargap=0.06,
        margin={"l": 65, "r": 20, "t": 55, "b": 55},
    )


def plot_sae_frontier(results: Sequence[SAEMetrics], names: Sequence[str] | None = None) -> Figure:
    """Draw what several SAEs keep against how many features they use, beside as many principal components.

    Args:
        results: What `evaluate_sae` returned for each SAE, on the same texts.
        names: A name for each SAE; SAEs of one name are joined by a line. None joins all.

    Raises:
        ValueError: There is no result, or not as many names.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    names = ["SAE"] * len(results) if names is None else names
    if not results or len(names) != len(results):
        raise ValueError(
            f"There are {len(results)} results and {len(names)} names; expected as many of both, and some."
        )
    figure = make_subplots(1, 2, horizontal_spacing=0.11)
    for column, metric in enumerate(("explained_variance", "ce_loss_score"), 1):
        for i, name in enumerate(dict.fromkeys(names)):
            chosen = [result for result, own in zip(results, names, strict=True) if own == name]
            _add_frontier(figure, sorted(chosen, key=lambda r: r["l0"] or 0), metric, name, LINES[2 - i], column)
        baseline = {result["pca"]["n_components"]: result["pca"][metric] for result in results}  # type: ignore[literal-required]
        _add_line(figure, baseline, "principal components", column)
        figure.update_yaxes(AXIS, title_text=metric.replace("_", " ").replace("ce loss", "CE loss"), row=1, col=column)
    ticks = [2**i for i in range(12)]
    figure.update_xaxes(AXIS, type="log", tickvals=ticks, title_text="active features per token (L0)")
    return figure.update_layout(
        LAYOUT,
        title=_title("What the model keeps, by how many features"),
        height=380,
        margin={"l": 65, "r": 20, "t": 85, "b": 55},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )


def plot_feature_report(result: FeatureReport, feature: int | None = None) -> Figure:
    """Draw one feature's dashboard: strongest examples, what it writes to the logits, how active it is.

    Args:
        result: What `feature_report` returned.
        feature: Index of the feature; None takes the first of the report.

    Raises:
        ValueError: The report has no such feature, or it was never active.
    """
    from plotly.subplots import make_subplots  # noqa: PLC0415

    row = _chosen(result, feature)
    examples = len(row["examples"])
    heights = [30 * examples + 20, 250]
    figure = make_subplots(
        2,
        2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=heights,
        vertical_spacing=85 / (sum(heights) + 150),
        horizontal_spacing=0.14,
        subplot_titles=["", "logits, nats per unit of activation", "activation, where it is active"],
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    _add_examples(figure, row)
    _add_logits(figure, row)
    _add_histogram(figure, row)
    aurocs = ", ".join(f"{name} {value:.3f}" for name, value in row["auroc"].items() if value is not None)
    title = (
        f"Feature {row['feature']} at {result['hook_name']}, active on {100 * (row['density'] or 0):.2g} % of tokens"
    )
    return figure.update_layout(
        LAYOUT,
        title=_title(title + (f"<br><sup>AUROC: {label(aurocs)}</sup>" if aurocs else "")),
        height=sum(heights) + 150,
        margin={"l": 100, "r": 20, "t": 75, "b": 40},
        showlegend=False,
    )


def plot_steer_feature(result: FeatureSteering) -> Figure:
    """Draw how far the first new token's distribution moves with the coefficient, beside a random direction.

    Args:
        result: What `steer_feature` returned.
    """
    import plotly.graph_objects as go  # noqa: PLC0415

    figure = go.Figure()
    for control, name, color in ((False, f"feature {result['feature']}", LINES[0]), (True, "random direction", INK)):
        rows = [row for row in result["rows"] if row["control"] is control and row["kl_to_clean"] is not None]
        means: dict[float, float] = {}
        for coefficient in sorted({row["coefficient"] for row in rows}):
            values = [row["kl_to_clean"] or 0.0 for row in rows if row["coefficient"] == coefficient]
            means[coefficient] = sum(values) / len(values)
        hover = [f"{quoted(result['prompts'][r['prompt']][-40:])}<br>{quoted(r['text'])}" for r in rows]
        marker = {"color": color, "size": 7, "opacity": 0.55}
        x, y = [row["coefficient"] for row in rows], [row["kl_to_clean"] for row in rows]
        dots = {"mode": "markers", "marker": marker, "showlegend": False, "text": hover}
        figure.add_trace(go.Scatter(x=x, y=y, hovertemplate="%{y:.3g} nats<br>%{text}<extra></extra>", **dots))
        figure.add_trace(go.Scatter(x=[*means], y=[*means.values()], name=name, mode="lines", line={"color": color}))
    figure.update_xaxes(AXIS, title_text="coefficient, in units of the largest activation")
    figure.update_yaxes(AXIS, title_text="KL to unsteered, nats", rangemode="tozero")
    return figure.update_layout(
        LAYOUT,
        title=_title(f"Steering feature {result['feature']} at {result['hook_name']} ({result['mode']})"),
        height=360,
        margin={"l": 65, "r": 20, "t": 75, "b": 55},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
    )


def _title(text: str) -> dict[str, object]:
    return {"text": text, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 10}, "font": {"size": 16}}


def _add_frontier(
    figure: Figure, results: Sequence[SAEMetrics], metric: str, name: str, color: str, column: int
) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    values = [result[metric] for result in results]  # type: ignore[literal-required]
    ends = [result["intervals"][metric] for result in results]
    bars = {
        "type": "data",
        "array": [(high or 0) - value if high and value else 0 for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [
            value - (low or 0) if low and value else 0 for value, (low, _) in zip(values, ends, strict=True)
        ],
        "thickness": 1.2,
        "width": 3,
    }
    trace = go.Scatter(
        x=[result["l0"] for result in results],
        y=values,
        error_y=bars,
        name=name,
        legendgroup=name,
        showlegend=column == 1,
        mode="lines+markers",
        line={"color": color, "width": 2.5},
        hovertemplate="L0 %{x:.3g}: %{y:.4f}",
    )
    figure.add_trace(trace, row=1, col=column)


def _add_line(figure: Figure, baseline: dict[int, float | None], name: str, column: int) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    counts = sorted(baseline)
    trace = go.Scatter(
        x=counts,
        y=[baseline[count] for count in counts],
        name=name,
        legendgroup=name,
        showlegend=column == 1,
        mode="lines+markers",
        line={"color": INK, "width": 1.5, "dash": "dot"},
        hovertemplate="%{x} components: %{y:.4f}",
    )
    figure.add_trace(trace, row=1, col=column)


def _chosen(result: FeatureReport, feature: int | None) -> FeatureRow:
    known = [row["feature"] for row in result["features"]]
    wanted = known[0] if feature is None else feature
    if wanted not in known:
        raise ValueError(f"feature is {feature}; expected one of {known}, the features of the report.")
    row = result["features"][known.index(wanted)]
    if row["histogram"] is None:
        raise ValueError(
            f"Feature {wanted} was never active on these texts; there is nothing to draw. Give other texts."
        )
    return row


def _add_examples(figure: Figure, row: FeatureRow) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    cells = [
        {
            i - example["peak"]: cell
            for i, cell in enumerate(zip(example["tokens"], example["activations"], strict=True))
        }
        for example in row["examples"]
    ]
    used = {column for line in cells for column in line if -BEFORE <= column <= AFTER}
    columns = range(min(used), max(used) + 1)
    values = [[line[column][1] if column in line else None for column in columns] for line in cells]
    texts = [[_short(line[column][0]) if column in line else "" for column in columns] for line in cells]
    figure.add_trace(
        go.Heatmap(
            z=values,
            text=texts,
            x=list(columns),
            texttemplate="%{text}",
            textfont={"size": 12},
            hovertemplate="%{text}: %{z:.3g}<extra></extra>",
            colorscale=[[0, "rgba(128, 136, 152, 0.10)"], [1, LINES[0]]],
            zmin=0,
            zmax=row["max_activation"],
            xgap=2,
            ygap=2,
            showscale=False,
        ),
        row=1,
        col=1,
    )
    strengths = [f"{example['activations'][example['peak']]:.3g}" for example in row["examples"]]
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, zeroline=False, row=1, col=1)
    figure.update_yaxes(
        AXIS,
        tickvals=list(range(len(strengths))),
        ticktext=strengths,
        autorange="reversed",
        showgrid=False,
        row=1,
        col=1,
    )


def _short(token: str) -> str:
    text = token.strip() or token
    return label(text if len(text) <= LONGEST else text[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _add_logits(figure: Figure, row: FeatureRow) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    if row["top_logits"] is None or row["bottom_logits"] is None:
        figure.add_annotation(text="not in the residual stream", showarrow=False, row=2, col=1)
        return
    shown = [*row["top_logits"][:6], *row["bottom_logits"][:6][::-1]]
    colors = [LINES[1] if (entry["weight"] or 0) > 0 else LINES[0] for entry in shown]
    figure.add_trace(
        go.Bar(
            x=[entry["weight"] for entry in shown],
            y=list(range(len(shown))),
            orientation="h",
            marker={"color": colors},
            text=[quoted(entry["token"]) for entry in shown],
            hovertemplate="%{text}: %{x:.3g}<extra></extra>",
            textposition="none",
        ),
        row=2,
        col=1,
    )
    ticks = [label(entry["token"].strip() or entry["token"]) for entry in shown]
    figure.update_yaxes(
        AXIS, tickvals=list(range(len(shown))), ticktext=ticks, autorange="reversed", showgrid=False, row=2, col=1
    )
    figure.update_xaxes(AXIS, zeroline=True, zerolinecolor=GRID, nticks=5, row=2, col=1)


def _add_histogram(figure: Figure, row: FeatureRow) -> None:
    import plotly.graph_objects as go  # noqa: PLC0415

    assert row["histogram"] is not None  # _chosen has looked
    edges, counts = row["histogram"]["edges"], row["histogram"]["counts"]
    middles = [((low or 0) + (high or 0)) / 2 for low, high in itertools.pairwise(edges)]
    figure.add_trace(
        go.Bar(
            x=middles, y=counts, marker={"color": LINES[2]}, hovertemplate="%{y} tokens near %{x:.3g}<extra></extra>"
        ),
        row=2,
        col=2,
    )
    figure.update_xaxes(AXIS, showgrid=False, row=2, col=2)
    figure.update_yaxes(AXIS, title_text="tokens", row=2, col=2)
