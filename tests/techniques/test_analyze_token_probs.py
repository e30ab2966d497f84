"""Token probabilities against a softmax over one unpadded pass per text."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from techniques.analyze_token_probs import analyze_token_probs

TEXTS = ["the cat sat on a mat", "a dog", "the"]


@torch.inference_mode()
def distribution(model: Any, ids: list[int], position: int) -> torch.Tensor:
    probs: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, position].double().softmax(-1)
    return probs


def test_a_batch_equals_its_texts_alone(architecture: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(architecture)
    rows = analyze_token_probs(model, tokenizer, TEXTS, top_k=10)["rows"]
    for text, row in zip(TEXTS, rows, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = distribution(model, ids, -1)
        assert (row["text"], row["n_tokens"], row["position"]) == (text, len(ids), len(ids) - 1)
        assert row["token"] == text.split()[-1]
        assert row["actual"] is None
        assert row["entropy"] == pytest.approx(-(expected * expected.log()).sum().item(), abs=1e-4)
        assert [token["rank"] for token in row["top"]] == list(range(1, 11))
        assert {token["id"] for token in row["top"]} == set(range(10))
        for token in row["top"]:
            assert token["prob"] == pytest.approx(expected[token["id"]].item(), rel=1e-3, abs=1e-6)
            assert token["logprob"] == pytest.approx(math.log(token["prob"]), abs=1e-4)
            assert tokenizer.convert_tokens_to_ids(token["token"]) == token["id"]


@pytest.mark.parametrize("position", [0, 1, -2])
def test_a_position_inside_shows_what_really_follows(position: int, make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    text = "the cat sat on a mat"
    ids = tokenizer(text)["input_ids"]
    (row,) = analyze_token_probs(model, tokenizer, text, top_k=2, position=position)["rows"]
    expected = distribution(model, ids, position)
    following = ids[position + 1]
    assert row["position"] == position % len(ids)
    assert row["actual"] is not None
    assert row["actual"]["id"] == following
    assert row["actual"]["prob"] == pytest.approx(expected[following].item(), rel=1e-4)
    assert row["actual"]["rank"] == 1 + int((expected > expected[following]).sum())
    assert row["top"][0]["id"] == int(expected.argmax())


def test_equal_tokens_share_a_rank(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (row,) = analyze_token_probs(model, tokenizer, "the", top_k=3)["rows"]
    assert [token["rank"] for token in row["top"]] == [1, 1, 1]
    assert row["entropy"] == pytest.approx(math.log(10), abs=1e-5)


def test_half_precision_and_double(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gemma2")
    ids = tokenizer(TEXTS[0])["input_ids"]
    expected = distribution(model.double(), ids, -1)
    (double,) = analyze_token_probs(model, tokenizer, TEXTS[0], top_k=1)["rows"]
    assert double["top"][0]["prob"] == pytest.approx(expected.max().item(), rel=1e-12)
    (half,) = analyze_token_probs(model.bfloat16(), tokenizer, TEXTS[:1], top_k=1)["rows"]
    assert half["top"][0]["prob"] == pytest.approx(expected.max().item(), rel=0.1)


def test_result_is_json_and_nothing_is_left_behind(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    result = analyze_token_probs(model, tokenizer, TEXTS)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "The text '' has no tokens"),
        (["the cat", "the"], {"position": 1}, "Position 1 is outside the text 'the', which has 1 tokens"),
        ("the", {"top_k": 11}, "top_k is 11; expected 1 to 10"),
        ("the " * 65, {}, "The longest text has 65 tokens, but the model's context holds 64. Shorten"),
    ],
)
def test_bad_arguments_are_refused(
    text: Any, options: dict[str, Any], message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        analyze_token_probs(make_model("gpt2"), tokenizer, text, **{"top_k": 3, **options})


def test_train_mode_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"train mode, in which dropout .* Call model.eval\(\) first"):
        analyze_token_probs(make_model("gpt2").train(), tokenizer, "the")


def test_known_fact(demo: tuple[Any, Any]) -> None:
    result = analyze_token_probs(*demo, "The Eiffel Tower is located in the city of")
    assert (result["technique"], result["n"], result["seed"]) == ("analyze_token_probs", 1, None)
    (row,) = result["rows"]
    assert row["top"][0]["token"] == " Paris"
    assert row["top"][0]["prob"] > 0.9
