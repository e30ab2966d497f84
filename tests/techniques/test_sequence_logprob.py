"""Whole completions against a float64 softmax over one unpadded pass per text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import disk_offload
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from techniques import sequence_logprob as module
from techniques.sequence_logprob import sequence_logprob

PROMPTS = ["the cat sat", "a dog"]
COMPLETIONS = [" on the mat", " ran", " to a cat on the mat"]


@torch.inference_mode()
def logprobs(model: Any, ids: list[int], start: int) -> list[float]:
    """Log-probability of each token from `start` on, from one pass in double precision."""
    logits = model.double()(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]


def letters(merges: list[tuple[str, str]], *, bos: bool = False) -> Any:
    """A tokenizer of letters and merged pieces, with or without a token before each text."""
    pieces = ["<s>", *"atc ", *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend, bos_token="<s>" if bos else None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mistral", "qwen2"])
def test_every_completion_equals_one_pass_in_double_precision(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family)
    result = sequence_logprob(model, tokenizer, PROMPTS, COMPLETIONS)
    assert [(row["prompt"], row["completion"]) for row in result["rows"]] == [
        (i, completion) for i in range(2) for completion in COMPLETIONS
    ]
    for row in result["rows"]:
        prompt = PROMPTS[row["prompt"]]
        start = len(prompt.split())
        expected = logprobs(model, tokenizer(prompt + row["completion"])["input_ids"], start)
        assert [token["token"] for token in row["tokens"]] == row["completion"].split()
        assert [token["logprob"] for token in row["tokens"]] == pytest.approx(expected, abs=2e-5)
        assert row["logprob"] == pytest.approx(sum(expected), abs=1e-4)
        assert row["mean_logprob"] == pytest.approx(sum(expected) / len(expected), abs=2e-5)
        assert (row["n_tokens"], row["boundary"]) == (len(expected), "exact")


def test_double_precision_is_kept_and_half_is_close(make_model: Any, tokenizer: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        model = make_model("llama").to(dtype)
        (row,) = sequence_logprob(model, tokenizer, PROMPTS[0], COMPLETIONS[:1])["rows"]
        expected = logprobs(model, tokenizer(PROMPTS[0] + COMPLETIONS[0])["input_ids"], 3)
        assert row["logprob"] == pytest.approx(sum(expected), rel=tolerance)


def test_weights_that_lie_on_disk(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    before = sequence_logprob(model, tokenizer, PROMPTS, COMPLETIONS)["rows"]
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert sequence_logprob(model, tokenizer, PROMPTS, COMPLETIONS)["rows"] == before


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_rank_and_share_compare_the_completions_of_one_prompt(normalize: Any, make_model: Any, tokenizer: Any) -> None:
    result = sequence_logprob(make_model("gpt2"), tokenizer, PROMPTS, COMPLETIONS, normalize=normalize)
    for i in range(2):
        rows = [row for row in result["rows"] if row["prompt"] == i]
        scores = [float(row["logprob" if normalize == "sum" else "mean_logprob"] or 0) for row in rows]
        total = sum(math.exp(score) for score in scores)
        assert [row["share"] for row in rows] == pytest.approx([math.exp(s) / total for s in scores], rel=1e-4)
        assert [row["rank"] for row in rows] == [1 + sorted(scores, reverse=True).index(score) for score in scores]
    assert {row["rank"] for row in result["rows"]} == {1, 2, 3}


def test_small_batches_give_the_same_scores(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    whole = sequence_logprob(model, tokenizer, PROMPTS, COMPLETIONS)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 10 * 14)
    parts = sequence_logprob(model, tokenizer, PROMPTS, COMPLETIONS)
    assert len(shapes) > 2
    assert all(rows * length <= 14 or rows == 1 for rows, length in shapes)
    for row, expected in zip(parts["rows"], whole["rows"], strict=True):
        assert row["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)
        assert row["completion"] == expected["completion"]


def test_a_boundary_that_merges_is_scored_from_where_the_tokens_differ_and_named(make_model: Any) -> None:
    model, tokenizer = make_model("llama"), letters([("c", "a"), ("ca", "t")])
    assert tokenizer.tokenize("tca") == ["t", "ca"]
    assert tokenizer.tokenize("tcat") == ["t", "cat"]
    result = sequence_logprob(model, tokenizer, "tca", ["t", "c"])
    merged, exact = result["rows"]
    assert (merged["boundary"], exact["boundary"]) == ("merged", "exact")
    assert [token["token"] for token in merged["tokens"]] == ["cat"]
    assert merged["logprob"] == pytest.approx(sum(logprobs(model, tokenizer("tcat")["input_ids"], 1)), abs=1e-4)
    assert exact["logprob"] == pytest.approx(sum(logprobs(model, tokenizer("tcac")["input_ids"], 2)), abs=1e-4)
    assert "in 1 of 2 rows" in result["warnings"][0]


def test_an_empty_prompt_needs_a_first_token(make_model: Any) -> None:
    model = make_model("llama")
    (row,) = sequence_logprob(model, letters([], bos=True), "", ["cat"])["rows"]
    expected = logprobs(model, [0, 3, 1, 2], 1)
    assert row["logprob"] == pytest.approx(sum(expected), abs=1e-4)
    with pytest.raises(ValueError, match="The text '' has no tokens"):
        sequence_logprob(model, letters([]), "", ["cat"])


@pytest.mark.parametrize(
    ("prompt", "completions", "options", "message"),
    [
        ("the cat", [], {}, r"completions is \[\]; expected a list"),
        ("the cat", "mat", {}, "completions is the string 'mat'; expected a list"),
        ("the cat", [" mat", ""], {}, "The completion '' adds no token to 'the cat'"),
        ("the cat", [" "], {}, "The completion ' ' adds no token to 'the cat'"),
        ("the", ["re on"], {}, "The completion 're on' changes the first token of 'the'"),
        ("the cat", [" mat" * 63], {}, "The longest text has 65 tokens, but the model's context holds 64"),
        ("the cat", [" mat"], {"normalize": "max"}, 'normalize is \'max\'; expected "sum" or "mean"'),
    ],
)
def test_bad_arguments_are_refused(
    prompt: str, completions: Any, options: Any, message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_logprob(make_model("gpt2"), tokenizer, prompt, completions, **options)


def test_broken_weights_and_train_mode_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"train mode.*Call model.eval\(\) first"):
        sequence_logprob(model.train(), tokenizer, "the", [" cat"])
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        sequence_logprob(model.eval(), tokenizer, "the", [" cat"])


def test_known_fact_and_json(demo: tuple[Any, Any]) -> None:
    prompts = ["The Eiffel Tower is located in the city of", "The Prado Museum is located in the city of"]
    result = sequence_logprob(*demo, prompts, [" Paris.", " Madrid.", " Zanzibar."])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    best = [row["completion"] for row in result["rows"] if row["rank"] == 1]
    assert best == [" Paris.", " Madrid."]
    assert min(row["n_tokens"] for row in result["rows"] if row["completion"] == " Zanzibar.") > 3
    assert (result["technique"], result["n"], result["seed"], result["dtype"]) == (
        "sequence_logprob",
        2,
        None,
        "float32",
    )
