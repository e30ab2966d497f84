"""Figures show the numbers of the results that they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from techniques.analyze_token_probs import analyze_token_probs
from techniques.attention import attention_patterns, head_scores
from techniques.attention_knockout import attention_knockout
from techniques.logit_diff_lens import logit_diff_lens
from techniques.logit_lens import logit_lens
from techniques.plots import plot
from techniques.plots.attention import plot_attention_knockout, plot_attention_patterns, plot_head_scores
from techniques.plots.lens import plot_logit_diff_lens, plot_logit_lens, plot_token_probs

PROMPTS = ["the cat sat on the mat", "a dog ran"]


def test_lens_cells_are_the_most_probable_tokens(make_model: Any, tokenizer: Any) -> None:
    result = logit_lens(make_model("gpt2"), tokenizer, PROMPTS, positions=[1, 0, -1])
    figure = plot_logit_lens(result, prompt=1)
    (cells,) = figure.data
    assert len(result["rows"]) == 2 * 3 * 4
    for row in result["rows"]:
        if row["prompt"] == 1:
            column = result["prompts"][1]["positions"].index(row["position"])
            assert cells.z[row["depth"]][column] == row["top"][0]["prob"]
            assert cells.text[row["depth"]][column] == row["top"][0]["token"]
    assert list(figure.layout.xaxis.ticktext) == ["dog", "a", "ran"]
    assert figure.layout.yaxis.ticktext[0] == "embedding"
    assert len(figure.layout.yaxis.ticktext) == result["n_layers"] + 1


def test_target_lines_are_their_probabilities_at_the_last_position(make_model: Any, tokenizer: Any) -> None:
    result = logit_lens(make_model("gpt2"), tokenizer, PROMPTS[0], targets=["mat", "dog"])
    lines = plot_logit_lens(result).data[1:]
    assert [line.name for line in lines] == ["mat", "dog"]
    last = [row for row in result["rows"] if row["position"] == 5]
    for i, line in enumerate(lines):
        assert list(line.x) == [row["targets"][i]["prob"] for row in last]
        assert list(line.y) == [row["depth"] for row in last]


def test_bars_are_the_probabilities(make_model: Any, tokenizer: Any) -> None:
    result = analyze_token_probs(make_model("gpt2"), tokenizer, PROMPTS, top_k=4)
    figure = plot_token_probs(result)
    for bars, row, axis in zip(figure.data, result["rows"], ("yaxis", "yaxis2"), strict=True):
        assert list(bars.x) == [token["prob"] for token in row["top"]]
        assert list(figure.layout[axis].ticktext) == [token["token"] for token in row["top"]]
    assert [title.text for title in figure.layout.annotations] == PROMPTS


def test_curves_are_the_differences_and_the_decision_is_marked(make_model: Any, tokenizer: Any) -> None:
    answers = [("mat", "dog"), ("cat", "to")]
    result = logit_diff_lens(make_model("gpt2"), tokenizer, PROMPTS, answers, baseline_prompts=["the", "on a"])
    figure = plot_logit_diff_lens(result)
    lines = [trace for trace in figure.data if trace.type == "scatter" and trace.fill is None]
    assert [list(line.y) for line in lines[:2]] == [curve["diffs"] for curve in result["curves"]]
    assert result["baseline"] is not None
    for line, depths in zip(lines[2:], (result["depths"], result["baseline"]), strict=True):
        assert list(line.y) == [row["mean"] for row in depths]
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert list(band.y[:4]) == [row["high"] for row in result["depths"]]
    assert list(band.y[:3:-1]) == [row["low"] for row in result["depths"]]
    (bars,) = (trace for trace in figure.data if trace.type == "bar")
    assert list(bars.y) == [row["decided"] for row in result["depths"]]
    marks = [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1]
    assert set(marks) == {result["mean_curve"]["decision_depth"]}


def test_a_panel_for_each_head_shows_its_pattern(make_model: Any, tokenizer: Any) -> None:
    result = attention_patterns(make_model("gpt2"), tokenizer, PROMPTS[0], layers=[2, 0])
    figure = plot_attention_patterns(result)
    assert [title.text for title in figure.layout.annotations] == ["2.0", "2.1", "0.0", "0.1"]
    for panel, row in zip(figure.data, result["rows"], strict=True):
        assert row["pattern"] is not None
        for query, line in enumerate(row["pattern"]):
            assert list(panel.z[query]) == [value if key <= query else None for key, value in enumerate(line)]
    assert list(figure.layout.xaxis.ticktext) == PROMPTS[0].split()
    assert figure.layout.yaxis.autorange == "reversed"


def test_maps_of_scores_are_the_scores(make_model: Any, tokenizer: Any) -> None:
    result = head_scores(make_model("gpt2"), tokenizer, seq_len=4, n=3)
    figure = plot_head_scores(result)
    for panel, job in zip(figure.data, ("previous_token", "duplicate_token", "induction"), strict=True):
        for row in result["rows"]:
            score = row[job]  # type: ignore[literal-required]
            assert panel.z[row["layer"]][row["head"]] == score["mean"]
            assert list(panel.customdata[row["layer"]][row["head"]]) == [score["low"], score["high"]]


def test_a_knockout_is_a_curve_with_its_control_or_a_map(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    layers = attention_knockout(model, tokenizer, PROMPTS, ("mat", "dog"), keys=1)
    heads = attention_knockout(model, tokenizer, PROMPTS[0], ("mat", "dog"), keys=1, grain="head")
    assert layers["rows"][0]["control"] is None, "the short prompt leaves nothing to draw"
    (line,) = (trace for trace in plot_attention_knockout(layers).data if trace.fill is None)
    assert list(line.y) == [row["effect"] for row in layers["rows"]]
    controlled = attention_knockout(model, tokenizer, PROMPTS[0], ("mat", "dog"), keys=1)
    lines = [trace for trace in plot_attention_knockout(controlled).data if trace.fill is None]
    assert [list(line.y) for line in lines] == [
        [row["control"] for row in controlled["rows"]],
        [row["effect"] for row in controlled["rows"]],
    ]
    (cells,) = plot_attention_knockout(heads).data
    for row in heads["rows"]:
        assert cells.z[row["layer"]][row["head"]] == row["effect"]
    assert cells.zmin == -cells.zmax


def test_tokens_are_no_markup_and_white_space_is_seen(make_model: Any, tokenizer: Any) -> None:
    result = analyze_token_probs(make_model("gpt2"), tokenizer, "the", top_k=3)
    for token, text in zip(result["rows"][0]["top"], ["<b>", "\n", " "], strict=True):
        token["token"] = text
    figure = plot_token_probs(result)
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;", "\u21b5", "\u2423"]


def test_figures_survive_json_and_stand_on_any_background(make_model: Any, tokenizer: Any) -> None:
    lens = json.loads(json.dumps(logit_lens(make_model("gpt2"), tokenizer, "the", targets=["a"])))
    probs = json.loads(json.dumps(analyze_token_probs(make_model("gpt2"), tokenizer, "the", top_k=3)))
    model, answers = make_model("gpt2"), ("mat", "dog")
    diffs = json.loads(json.dumps(logit_diff_lens(model, tokenizer, "the", answers)))
    patterns = json.loads(json.dumps(attention_patterns(model, tokenizer, "the cat")))
    scores = json.loads(json.dumps(head_scores(model, tokenizer, 3, 2)))
    knockout = json.loads(json.dumps(attention_knockout(model, tokenizer, "the cat sat", answers, keys=1)))
    attention = [plot_attention_patterns(patterns), plot_head_scores(scores), plot_attention_knockout(knockout)]
    for figure in (plot_logit_lens(lens), plot_token_probs(probs), plot_logit_diff_lens(diffs), *attention):
        assert "NaN" not in figure.to_json()
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


def test_unknown_prompt_is_refused(make_model: Any, tokenizer: Any) -> None:
    result = logit_lens(make_model("gpt2"), tokenizer, "the")
    with pytest.raises(ValueError, match="prompt is 1; expected 0 to 0"):
        plot_logit_lens(result, prompt=1)


def test_importing_plots_loads_neither_plotly_nor_torch() -> None:
    heavy = "{'plotly', 'torch', 'numpy', 'transformers'}"
    code = f"import sys, techniques.plots, techniques.plots.attention; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_no_result_or_has_no_figure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"plot\(\) was given None; expected what a technique returned, a dict"):
        plot(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="The result is of 'nope', which has no figure; those with one: ablate, "):
        plot({"technique": "nope"})
