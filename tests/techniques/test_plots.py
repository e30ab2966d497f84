"""Figures show the numbers of the results that they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from techniques.analyze_token_probs import analyze_token_probs
from techniques.logit_lens import logit_lens
from techniques.plots import plot_logit_lens, plot_token_probs

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


def test_tokens_are_no_markup_and_white_space_is_seen(make_model: Any, tokenizer: Any) -> None:
    result = analyze_token_probs(make_model("gpt2"), tokenizer, "the", top_k=3)
    for token, text in zip(result["rows"][0]["top"], ["<b>", "\n", " "], strict=True):
        token["token"] = text
    figure = plot_token_probs(result)
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;", "\u21b5", "\u2423"]


def test_figures_survive_json_and_stand_on_any_background(make_model: Any, tokenizer: Any) -> None:
    lens = json.loads(json.dumps(logit_lens(make_model("gpt2"), tokenizer, "the", targets=["a"])))
    probs = json.loads(json.dumps(analyze_token_probs(make_model("gpt2"), tokenizer, "the", top_k=3)))
    for figure in (plot_logit_lens(lens), plot_token_probs(probs)):
        assert "NaN" not in figure.to_json()
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


def test_unknown_prompt_is_refused(make_model: Any, tokenizer: Any) -> None:
    result = logit_lens(make_model("gpt2"), tokenizer, "the")
    with pytest.raises(ValueError, match="prompt is 1; expected 0 to 0"):
        plot_logit_lens(result, prompt=1)


def test_importing_plots_loads_neither_plotly_nor_torch() -> None:
    code = "import sys, techniques.plots; print({'plotly', 'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
