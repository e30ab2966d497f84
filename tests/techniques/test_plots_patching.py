"""Figures of causal interventions show the numbers of the results that they were made from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from techniques.ablation import Ablation, ablate_sweep
from techniques.causal_tracing import CausalTracing, causal_tracing
from techniques.patching import ActivationPatching, activation_patching
from techniques.path_patching import PathPatching, path_patching
from techniques.plots.patching import (
    plot_ablation,
    plot_activation_patching,
    plot_causal_tracing,
    plot_causal_tracing_curves,
    plot_path_patching,
)
from tests.techniques.oracles.record_patching import PAIRS

PAIR, ANSWER = PAIRS["fact"]


def patch(demo: tuple[Any, Any], **options: Any) -> ActivationPatching:
    result = activation_patching(*demo, [PAIR], [ANSWER], **options)
    stored: ActivationPatching = json.loads(json.dumps(result))  # a stored result can be drawn again
    return stored


@pytest.fixture(scope="module")
def traced(demo: tuple[Any, Any]) -> CausalTracing:
    return causal_tracing(*demo, [PAIR[0]], ["Eiffel Tower"], [" Paris"], n_draws=3)


@pytest.fixture(scope="module")
def paths(demo: tuple[Any, Any]) -> PathPatching:
    return path_patching(*demo, [PAIR], [ANSWER], "heads+mlps", ["logits", "m2"])


@pytest.fixture(scope="module")
def ablated(demo: tuple[Any, Any]) -> Ablation:
    return ablate_sweep(*demo, list(PAIR), [ANSWER, ANSWER[::-1]], mode="mean")


def test_position_maps_have_a_panel_per_site_and_the_tokens_below(demo: tuple[Any, Any]) -> None:
    result = patch(demo, sites=["resid_pre", "mlp_out"], metrics=["logit_diff", "logprob"])
    figure = plot_activation_patching(result, metric="logprob")
    assert len(figure.data) == 2
    for row in result["rows"]:
        if row["metric"] == "logprob":
            panel = figure.data[result["sites"].index(row["site"])]
            assert panel.z[row["layer"]][row["column"]] == row["effect"]
    ticks = figure.layout.xaxis2.ticktext
    assert ticks[:4] == ("The", "<b>Eiffel</b><br><i>Prado</i>", "<b>Tower</b><br><i>Museum</i>", "is")
    assert [title.text for title in figure.layout.annotations] == result["sites"]
    assert "logprob gap recovered" in figure.layout.title.text
    with pytest.raises(ValueError, match="metric is 'rank'; expected one of logit_diff, logprob"):
        plot_activation_patching(result, metric="rank")


def test_the_scale_is_symmetric_and_does_not_blow_up_rounding(demo: tuple[Any, Any]) -> None:
    result = patch(demo, sites=["attn_out"])
    axis = plot_activation_patching(result).layout.coloraxis
    largest = max(abs(row["effect"] or 0.0) for row in result["rows"])
    assert (axis.cmin, axis.cmax) == (-largest, largest)
    for row in result["rows"]:
        row["effect"] = 1e-7
    assert plot_activation_patching(result).layout.coloraxis.cmax == 1


def test_spans_are_named_below_the_map(demo: tuple[Any, Any]) -> None:
    figure = plot_activation_patching(patch(demo, sites=["resid_pre"], spans={"sub<ject": ["Eiffel Tower"]}))
    assert figure.layout.xaxis.ticktext == ("<b>sub&lt;ject</b><br>Eiffel Tower",)


def test_head_maps_show_layers_and_heads(demo: tuple[Any, Any]) -> None:
    result = patch(demo, grain="head", direction="noise")
    (cells,) = plot_activation_patching(result).data
    for row in result["rows"]:
        assert cells.z[row["layer"]][row["head"]] == row["effect"]


def test_head_by_position_lists_the_strongest_heads(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("techniques.plots.patching.MAX_ROWS", 5)
    result = patch(demo, grain="head_position")
    figure = plot_activation_patching(result)
    (cells,) = figure.data
    best = sorted(
        {(row["layer"], row["head"]) for row in result["rows"]},
        key=lambda head: -max(abs(r["effect"]) for r in result["rows"] if (r["layer"], r["head"]) == head),  # type: ignore[arg-type]
    )[:5]
    assert list(figure.layout.yaxis.ticktext) == [f"{layer}.{head}" for layer, head in sorted(best)]
    for row in result["rows"]:
        if (row["layer"], row["head"]) in best:
            assert cells.z[sorted(best).index((row["layer"], row["head"]))][row["column"]] == row["effect"]
    assert "11 weaker heads not shown" in figure.layout.title.text


def test_layers_are_lines_with_a_band(demo: tuple[Any, Any]) -> None:
    result = patch(demo, sites=["attn_out", "mlp_out"], grain="layer")
    lines = [trace for trace in plot_activation_patching(result).data if trace.name]
    assert [line.name for line in lines] == ["attn_out", "mlp_out"]
    assert list(lines[1].y) == [row["effect"] for row in result["rows"] if row["site"] == "mlp_out"]


def test_traces_are_maps_with_the_subject_marked(traced: CausalTracing) -> None:
    figure = plot_causal_tracing(traced)
    sites = ["resid_post", "attn_out", "mlp_out"]
    for row in traced["rows"]:
        assert figure.data[sites.index(row["site"])].z[row["layer"]][row["column"]] == row["effect"]
    assert figure.layout.xaxis3.ticktext[:4] == ("The", "<b> Eiffel</b>", "<b> Tower</b>", " is")


def test_curves_are_the_strongest_columns_or_those_asked_for(traced: CausalTracing) -> None:
    lines = [trace for trace in plot_causal_tracing_curves(traced).data if trace.name]
    assert len(lines) == 9
    assert {line.name for line in lines} >= {" Tower", " of"}
    (line, *_) = [trace for trace in plot_causal_tracing_curves(traced, columns=[8]).data if trace.name]
    rows = [row for row in traced["rows"] if row["site"] == "resid_post" and row["column"] == 8]
    assert list(line.y) == [row["effect"] for row in rows]
    with pytest.raises(ValueError, match=r"columns is \[9\]; expected some of 0 to 8"):
        plot_causal_tracing_curves(traced, columns=[9])


def test_paths_have_a_map_per_receiver_with_gaps_where_there_is_no_path(paths: PathPatching) -> None:
    figure = plot_path_patching(paths)
    assert [title.text for title in figure.layout.annotations] == ["to logits", "to m2"]
    seen = {(row["receiver"], row["sender"]): row["effect"] for row in paths["rows"]}
    for receiver, cells in zip(paths["receivers"], figure.data, strict=True):
        for layer in range(4):
            names = [*(f"a{layer}.h{head}" for head in range(4)), f"m{layer}"]
            assert list(cells.z[layer]) == [seen.get((receiver, name)) for name in names]
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3", "MLP"]


def test_bars_are_changes_with_intervals_the_largest_first(ablated: Ablation) -> None:
    figure = plot_ablation(ablated)
    diffs, losses = figure.data
    changes = [row["logit_diff"]["change"] for row in ablated["rows"]]
    assert list(diffs.x) == sorted(changes, key=lambda change: -abs(change or 0.0))
    by_name = {row["components"][0]: row for row in ablated["rows"]}
    for i, name in enumerate(figure.layout.yaxis.ticktext):
        row = by_name[name]["cross_entropy"]
        assert losses.x[i] == row["change"]
        assert losses.error_x.array[i] == pytest.approx(row["high"] - row["change"])  # type: ignore[operator]
        assert losses.error_x.arrayminus[i] == pytest.approx(row["change"] - row["low"])  # type: ignore[operator]
    assert "mean ablation" in figure.layout.title.text


def test_figures_stand_on_any_background(
    demo: tuple[Any, Any], traced: CausalTracing, paths: PathPatching, ablated: Ablation
) -> None:
    figures = [plot_activation_patching(patch(demo)), plot_causal_tracing(traced), plot_causal_tracing_curves(traced)]
    for figure in [*figures, plot_path_patching(paths), plot_ablation(ablated)]:
        assert "NaN" not in figure.to_json()
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
