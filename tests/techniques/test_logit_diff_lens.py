"""The curve against the model cut at each depth, the decisions against curves drawn by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from techniques import _lens
from techniques import logit_diff_lens as module
from techniques._model import Decoder, UnsupportedModelError
from techniques.logit_diff_lens import logit_diff_lens
from techniques.logit_lens import logit_lens

# As in oracles/record_lens.py, which needs packages that are not installed here.
RECORDED = (
    "The Eiffel Tower is located in the city of",
    "When Mary and John went to the store, John gave a drink to",
)
TOKENS = (" Paris", " Rome", " Mary", " John")
ORACLE = Path(__file__).parent / "oracles" / "lens.npz"
PROMPTS = ["the cat sat on a mat", "a dog ran", "the"]
ANSWERS = [("mat", "dog"), ("cat", "to"), ("a", "on")]
N_LAYERS = 3


def cut_diffs(model: Any, blocks_of: Any, family: str, ids: list[int], answer: int, wrong: int) -> list[float]:
    """logit(answer) - logit(wrong) at the last token of models of which the last blocks were deleted."""
    diffs = []
    for depth in range(N_LAYERS + 1):
        cut = copy.deepcopy(model)
        del blocks_of(family, cut)[depth:]
        cut.config.num_hidden_layers = depth
        with torch.inference_mode():
            logits = cut(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        diffs.append((logits[answer] - logits[wrong]).item())
    return diffs


def curve(values: list[float]) -> Any:
    return module._decision(torch.tensor(values))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "olmo2", "qwen2", "gemma3_text"])
def test_every_depth_equals_the_model_cut_there(family: str, make_model: Any, tokenizer: Any, blocks_of: Any) -> None:
    model = make_model(family)
    result = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS)
    for row, prompt, answers in zip(result["curves"], PROMPTS, ANSWERS, strict=True):
        right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in answers)
        expected = cut_diffs(model, blocks_of, family, tokenizer(prompt)["input_ids"], right, wrong)
        assert row["diffs"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert (row["prompt"], row["answer"], row["wrong"]) == (prompt, *answers)
    assert result["n_layers"] == N_LAYERS
    assert result["max_error"] < 1e-4


def test_double_precision_is_kept_and_half_is_close(make_model: Any, tokenizer: Any, blocks_of: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.15)):
        model = make_model("gpt2").to(dtype)
        (row,) = logit_diff_lens(model, tokenizer, PROMPTS[0], ("mat", "dog"))["curves"]
        expected = cut_diffs(model.double(), blocks_of, "gpt2", tokenizer(PROMPTS[0])["input_ids"], 6, 7)
        assert row["diffs"] == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("values", "prefers", "decision", "jump", "size", "stable"),
    [
        ([-1.0, 1.0, -2.0, 3.0, 10.0, 9.5], "answer", 3, 4, 7.0, 4),
        ([-1.0, -2.0, -3.0, -10.0, -9.5, -9.5], "wrong", 0, 3, 7.0, 3),
        ([5.0, 4.0, 3.0, -1.0], "wrong", 3, 3, 4.0, 3),
        ([0.0, 0.0, 2.0], "answer", 2, 2, 2.0, 2),
        ([1.0, 1.0], "answer", 0, 1, 0.0, 0),
        ([3.0, 10.0, 2.0, 2.1], "answer", 0, 1, 7.0, 2),
    ],
)
def test_decisions_on_curves_drawn_by_hand(
    values: list[float], prefers: str, decision: int, jump: int, size: float, stable: int
) -> None:
    found = curve(values)
    assert found == {
        "prefers": prefers,
        "decision_depth": decision,
        "jump_depth": jump,
        "jump": size,
        "stable_depth": stable,
    }


def test_a_curve_that_ends_at_zero_decides_nothing() -> None:
    assert set(curve([1.0, 0.0]).values()) == {None}


def test_means_intervals_and_shares_follow_from_the_curves(make_model: Any, tokenizer: Any) -> None:
    result = logit_diff_lens(make_model("gpt2"), tokenizer, PROMPTS, ANSWERS, seed=3)
    curves = np.array([row["diffs"] for row in result["curves"]])
    decided = [row["decision_depth"] for row in result["curves"]]
    depths: list[Any] = list(result["depths"])
    for depth, row in enumerate(depths):
        assert row["depth"] == depth
        assert row["mean"] == pytest.approx(curves[:, depth].mean(), abs=1e-4)
        inside = [curves[:, depth].min() - 1e-4, row["low"], row["mean"], row["high"], curves[:, depth].max() + 1e-4]
        assert inside == sorted(inside, key=float)
        assert row["decided"] == sum(at is not None and at <= depth for at in decided) / 3
    assert result["mean_curve"]["prefers"] == ("answer" if curves[:, -1].mean() > 0 else "wrong")
    assert (result["baseline"], result["effect"], result["seed"]) == (None, None, 3)


def test_a_baseline_is_compared_prompt_by_prompt(make_model: Any, tokenizer: Any) -> None:
    model, baselines = make_model("llama"), ["a dog", "to the mat", "on a cat ran"]
    result = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS, baseline_prompts=baselines)
    alone = logit_diff_lens(model, tokenizer, baselines, ANSWERS)
    assert result["baseline"] is not None
    assert result["effect"] is not None
    both = np.array([[row["diffs"] for row in part["curves"]] for part in (result, alone)])
    for depth in range(N_LAYERS + 1):
        assert result["baseline"][depth]["mean"] == pytest.approx(alone["depths"][depth]["mean"], abs=1e-4)
        assert result["effect"][depth]["mean"] == pytest.approx((both[0] - both[1])[:, depth].mean(), abs=1e-4)
    same = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS, baseline_prompts=PROMPTS)
    assert same["effect"] is not None
    # The same prompt in another batch differs by rounding alone.
    assert all(abs(row["high"] or 0) < 1e-4 and abs(row["low"] or 0) < 1e-4 for row in same["effect"])


def test_small_chunks_give_the_same_curves(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2")
    whole = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS)
    monkeypatch.setattr(_lens, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "MAX_TOKENS", 6)
    parts = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS)
    for row, expected in zip(parts["curves"], whole["curves"], strict=True):
        assert row["prompt"] == expected["prompt"]
        assert row["diffs"] == pytest.approx(expected["diffs"], abs=1e-4)


def test_a_wrong_head_is_noticed(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2")
    monkeypatch.setattr(Decoder, "logits", lambda decoder, resid: decoder.unembed(decoder.ln_final(resid)))
    with pytest.raises(UnsupportedModelError, match="differs from the model's own logits"):
        logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS)


def test_a_close_call_is_named(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    result = logit_diff_lens(model, tokenizer, PROMPTS, ANSWERS)
    assert result["warnings"][0].startswith("3 of 3 prompts end with a difference below 0.5 nats")


@pytest.mark.parametrize(
    ("prompts", "answers", "options", "message"),
    [
        ([], [], {}, "list of texts is empty"),
        (["the", ""], ("mat", "dog"), {}, "The text '' has no tokens"),
        (["the"], ("cat mat", "dog"), {}, r"The target 'cat mat' is 2 tokens, \['cat', 'mat'\]; expected one"),
        (["the"], ("cat", "cat"), {}, r"Both answers of \('cat', 'cat'\) are the same token"),
        (["the", "a"], [("mat", "dog")], {}, "for 2 prompts; expected one pair"),
        (["the"], "mat", {}, "answers is 'mat' for 1 prompts"),
        (["the " * 65], ("mat", "dog"), {}, "The longest text has 65 tokens"),
        (["the"], ("mat", "dog"), {"baseline_prompts": []}, "There are 0 baseline prompts for 1 prompts"),
    ],
)
def test_bad_arguments_are_refused(
    prompts: Any, answers: Any, options: Any, message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        logit_diff_lens(make_model("gpt2"), tokenizer, prompts, answers, **options)


@pytest.mark.parametrize("lens", [logit_lens, lambda m, t, p: logit_diff_lens(m, t, p, ("mat", "dog"))])
def test_train_mode_and_broken_weights_are_refused(lens: Any, make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in train mode.*Call model.eval\(\) first"):
        lens(model.train(), tokenizer, "the cat")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        lens(model.eval(), tokenizer, "the cat")


def test_transformer_lens_gives_the_same_lens(demo: tuple[Any, Any]) -> None:
    """Recorded by oracles/record_lens.py; agreement is to float32 rounding."""
    oracle = np.load(ORACLE)
    result = logit_lens(*demo, list(RECORDED), targets=list(TOKENS), top_k=1)
    for row in result["rows"]:
        expected = oracle[f"logprobs_{row['prompt']}"][row["depth"], row["position"]]
        assert [target["logprob"] for target in row["targets"]] == pytest.approx(expected, abs=2e-4)
        assert row["entropy"] == pytest.approx(
            oracle[f"entropy_{row['prompt']}"][row["depth"], row["position"]], abs=2e-4
        )
    for i, pair in enumerate([(0, 1), (2, 3)]):
        answers = (TOKENS[pair[0]], TOKENS[pair[1]])
        (curve,) = logit_diff_lens(*demo, RECORDED[i], answers)["curves"]
        last = oracle[f"logprobs_{i}"][:, -1].astype(float)
        assert curve["diffs"] == pytest.approx(last[:, pair[0]] - last[:, pair[1]], abs=3e-4)


def test_known_facts_counterbalanced(demo: tuple[Any, Any]) -> None:
    landmarks = {
        "Eiffel Tower": "Paris",
        "Louvre Museum": "Paris",
        "Trevi Fountain": "Rome",
        "Borghese Gallery": "Rome",
    }
    prompts = [f"The {landmark} is located in the city of" for landmark in landmarks]
    answers = [(f" {city}", " Rome" if city == "Paris" else " Paris") for city in landmarks.values()]
    result = logit_diff_lens(*demo, prompts, answers)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(row["prefers"] == "answer" for row in result["curves"])
    # Every prompt ends in the same token, so with both answers counted the embedding prefers neither.
    assert abs(result["depths"][0]["mean"] or 0) < 1e-3
    assert (result["depths"][-1]["low"] or 0) > 5
    swapped = logit_diff_lens(*demo, prompts, [(wrong, right) for right, wrong in answers])
    assert [row["prefers"] for row in swapped["curves"]] == ["wrong"] * 4
    assert swapped["depths"][-1]["mean"] == pytest.approx(-(result["depths"][-1]["mean"] or 0))
