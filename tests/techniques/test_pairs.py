"""Pairs are encoded, aligned and measured as they say, and what cannot be compared is refused in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from techniques import _pairs
from techniques._columns import position_columns, span_columns
from techniques._pairs import METRICS, encode_pairs, logit_diffs, metric_values, pair_metrics, with_gap
from techniques._stats import recovered_interval
from techniques._tokens import span_positions

CLEAN, CORRUPTED, SHORT = "the cat sat on a mat", "the dog sat on a mat", "the dog sat"
ANSWER = ("cat", "dog")


def test_equal_pairs_are_kept_in_order(make_model: Any, tokenizer: Any) -> None:
    pairs = encode_pairs(make_model("gpt2"), tokenizer, [(CLEAN, CORRUPTED), (CORRUPTED, CLEAN)], [ANSWER, ANSWER])
    assert pairs.clean == [tokenizer(CLEAN)["input_ids"], tokenizer(CORRUPTED)["input_ids"]]
    assert pairs.corrupted == pairs.clean[::-1]
    assert pairs.answer_ids.tolist() == [2, 2]
    assert pairs.wrong_ids.tolist() == [7, 7]
    assert pairs.tokens[0][1] == ["the", "dog", "sat", "on", "a", "mat"]
    assert (len(pairs), pairs.indices, pairs.excluded) == (2, [0, 1], [])


def test_unequal_pairs_are_left_out_with_a_reason(make_model: Any, tokenizer: Any) -> None:
    given = [(CLEAN, SHORT), (CLEAN, CORRUPTED)]
    pairs = encode_pairs(make_model("gpt2"), tokenizer, given, [ANSWER, ("dog", "cat")])
    assert (pairs.texts, pairs.indices, pairs.answers) == ([given[1]], [1], [("dog", "cat")])
    assert [left_out["pair"] for left_out in pairs.excluded] == [0]
    assert "has 6 tokens" in pairs.excluded[0]["reason"]
    assert "corrupted one 3, ['the', 'dog', 'sat']" in pairs.excluded[0]["reason"]


def test_positions_match_from_the_start_or_from_the_end(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    equal = encode_pairs(model, tokenizer, [(CLEAN, CORRUPTED)], [ANSWER])
    assert equal.matches(0) == [(i, i) for i in range(6)]
    ends = encode_pairs(model, tokenizer, [(CLEAN, SHORT), (SHORT, SHORT)], [ANSWER, ANSWER], align="end")
    assert ends.matches(0) == [(3, 0), (4, 1), (5, 2)]
    assert [column.label for column in position_columns(ends)] == ["-3", "-2", "-1"]
    assert [column.positions[0] for column in position_columns(ends)] == [[(3, 0)], [(4, 1)], [(5, 2)]]
    assert [column.label for column in position_columns(equal)] == ["0", "1", "2", "3", "4", "5"]


def test_columns_name_the_tokens_that_stand_there(make_model: Any, tokenizer: Any) -> None:
    given = [(CLEAN, CORRUPTED), ("a cat sat on the mat", "a dog sat on the mat")]
    pairs = encode_pairs(make_model("gpt2"), tokenizer, given, [ANSWER, ANSWER])
    infos = [column.info(pairs) for column in position_columns(pairs)]
    assert infos[0] == {"label": "0", "clean": ["the", "a"], "corrupted": ["the", "a"], "differs": False}
    assert infos[1] == {"label": "1", "clean": ["cat"], "corrupted": ["dog"], "differs": True}


def test_spans_are_the_tokens_that_hold_the_text(demo: tuple[Any, Any]) -> None:
    text = "The Eiffel Tower is located in the city of"
    assert span_positions(demo[1], text, "Eiffel Tower") == [1, 2]
    assert span_positions(demo[1], text, " Tower is") == [2, 3]
    assert span_positions(demo[1], text, "iff") == [1]
    assert span_positions(demo[1], text, "The") == [0]


def test_spans_carry_over_to_the_corrupted_prompt(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    given = [
        ("The Eiffel Tower is located in the city of", "The Big Ben is located in the city of"),
        ("Guides at the Eiffel Tower speak", "Oh Guides at the Big Ben speak"),
    ]
    pairs = encode_pairs(model, tokenizer, given, [(" Paris", " London")] * 2, align="end")
    shift = len(pairs.corrupted[1]) - len(pairs.clean[1])
    (column,) = span_columns(tokenizer, pairs, {"subject": ["Eiffel Tower", "Eiffel Tower"]}, 2)
    assert shift > 0
    assert column.positions == [[(1, 1), (2, 2)], [(3, 3 + shift), (4, 4 + shift)]]
    assert column.info(pairs)["clean"] == [" Eiffel Tower"]
    assert column.info(pairs)["corrupted"] == [" Big Ben"]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"s": ["cat"]}, r"The span 's' is \['cat'\]; expected a list of 2 texts"),
        ({"s": "cat"}, "The span 's' is 'cat'; expected a list"),
        ({"s": ["dog", "dog"]}, "The span 'dog' occurs 0 times in 'the cat sat on a mat'; expected once"),
        ({"s": ["at", "at"]}, "The span 'at' occurs 3 times"),
        ({"s": ["", ""]}, "The span '' occurs 0 times"),
        ({"s": ["the", "the"]}, "The span 'the' of 'the cat sat on a mat' begins before the corrupted prompt does"),
    ],
)
def test_bad_spans_are_refused(spans: Any, message: str, make_model: Any, tokenizer: Any) -> None:
    given = [(CLEAN, SHORT), (CLEAN, CORRUPTED)]
    pairs = encode_pairs(make_model("gpt2"), tokenizer, given, [ANSWER, ANSWER], align="end")
    with pytest.raises(ValueError, match=message):
        span_columns(tokenizer, pairs, spans, 2)


def test_spans_need_a_tokenizer_that_tells_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="does not tell where its tokens lie in a text"):
        span_positions(tokenizer, CLEAN, "cat")


@pytest.mark.parametrize(
    ("pairs", "answers", "options", "message"),
    [
        ([], [], {}, r"pairs is \[\]; expected a list of \(clean prompt, corrupted prompt\)"),
        ([CLEAN], [ANSWER], {}, r"pairs is \['the cat"),
        ([(CLEAN, CORRUPTED)], [], {}, r"answers is \[\] for 1 pairs; expected one"),
        ([(CLEAN, CORRUPTED)], ["at"], {}, r"answers is \['at'\] for 1 pairs"),
        ([(CLEAN, CORRUPTED)], [ANSWER], {"align": "left"}, 'align is \'left\'; expected "equal" or "end"'),
        ([("", CORRUPTED)], [ANSWER], {}, "The text '' has no tokens"),
        ([("the " * 65, CORRUPTED)], [ANSWER], {}, "has 65 tokens, but the model's context holds 64"),
        ([(CLEAN, CORRUPTED)], [("cat mat", "dog")], {}, r"'cat mat' is 2 tokens, \['cat', 'mat'\]; expected one"),
        ([(CLEAN, CORRUPTED)], [("dog", "dog")], {}, "Both answers to 'the cat sat on a mat' are 'dog'"),
        ([(CLEAN, CORRUPTED)], [("mat", "dog")], {}, "ends with its own answer 'mat'; .* Cut the answer off"),
        ([(CLEAN, SHORT)], [ANSWER], {}, 'No pair has prompts of equal length; in the first, .*align="end"'),
    ],
)
def test_bad_pairs_are_refused(
    pairs: Any, answers: Any, options: Any, message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_pairs(make_model("gpt2"), tokenizer, pairs, answers, **options)


def test_a_model_in_train_mode_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"train mode, .* Call model.eval"):
        encode_pairs(make_model("gpt2").train(), tokenizer, [(CLEAN, CORRUPTED)], [ANSWER])


def test_metrics_are_what_they_are_called() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 5.0, -1.0]], dtype=torch.float64)
    right, wrong = torch.tensor([2, 2]), torch.tensor([0, 1])
    assert metric_values(logits, right, wrong, "logit_diff").tolist() == [1.0, 5.0]
    assert metric_values(logits, right, wrong, "rank").tolist() == [3.0, 1.0]
    expected = [2 - math.log(sum(math.exp(x) for x in (1, 3, 2, 3))), 5 - math.log(math.exp(5) + 2 + math.exp(-1))]
    assert metric_values(logits, right, wrong, "logprob").tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="The metric 'prob' is not known; expected one of logit_diff, logprob, rank"):
        metric_values(logits, right, wrong, "prob")
    with pytest.raises(ValueError, match="logits are not all finite"):
        metric_values(logits * math.nan, right, wrong, "logprob")


def test_metrics_of_prompts_are_read_after_their_last_token(
    make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    pairs = encode_pairs(model, tokenizer, [(CLEAN, SHORT), (SHORT, CLEAN)], [ANSWER, ANSWER], align="end")
    monkeypatch.setattr(_pairs, "MAX_TOKENS", 1)
    found = pair_metrics(model, pairs.clean, pairs)
    for row, ids in zip(found, pairs.clean, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected = [logits[2] - logits[7], logits.log_softmax(-1)[2], 1 + (logits > logits[2]).sum()]
        torch.testing.assert_close(row, torch.stack(expected).double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logit_diffs(logits[None], pairs.keep([True, False], ["", ""]))[0], expected[0])


def test_pairs_without_a_gap_are_left_out(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    pairs = encode_pairs(model, tokenizer, [(CLEAN, CORRUPTED), (CORRUPTED, CLEAN)], [ANSWER, ANSWER])
    gaps = (pair_metrics(model, pairs.clean, pairs) - pair_metrics(model, pairs.corrupted, pairs))[:, 0]
    better = int(gaps.argmax())
    kept, baselines = with_gap(model, pairs, min_gap=gaps[better].item() * 0.99)
    assert kept.indices == [better]
    clean, corrupted = baselines.of("logit_diff")
    assert (clean - corrupted).item() == pytest.approx(gaps[better].item())
    assert "a gap of" in kept.excluded[0]["reason"]
    assert baselines.clean.shape == (1, len(METRICS))
    with pytest.raises(ValueError, match=r"No pair of 2 has a gap to be recovered: for the first, its logit"):
        with_gap(model, pairs, min_gap=1e9)
    with pytest.raises(ValueError, match=r"min_gap is 0; expected more than 0 nats"):
        with_gap(model, pairs, min_gap=0)


def test_recovered_is_a_ratio_of_means_with_a_bootstrap_over_pairs() -> None:
    rng = np.random.default_rng(0)
    gaps = torch.tensor(rng.uniform(1, 5, 200))
    changes = torch.stack([gaps * 0.25, gaps * torch.tensor(rng.normal(0.5, 0.2, 200))], -1)
    mean, low, high = recovered_interval(changes, gaps, seed=0, n_boot=2000)
    assert mean.tolist() == pytest.approx((changes.sum(0) / gaps.sum()).tolist())
    assert (low[0].item(), high[0].item()) == pytest.approx((0.25, 0.25))
    resampled = [rng.integers(200, size=200) for _ in range(2000)]
    ratios = [changes[rows, 1].sum().item() / gaps[rows].sum().item() for rows in resampled]
    expected = np.quantile(ratios, [0.025, 0.975])
    assert [low[1].item(), high[1].item()] == pytest.approx(expected, abs=0.004)  # another draw of the same bootstrap


def test_no_gap_has_no_ratio() -> None:
    mean, low, high = recovered_interval(torch.ones(3, 2), torch.zeros(3), seed=0)
    assert all(part.isnan().all() and part.shape == (2,) for part in (mean, low, high))


def test_prompts_that_do_not_fit_together_are_measured_apart(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    pairs = encode_pairs(model, tokenizer, [(CLEAN, CORRUPTED)] * 3, [ANSWER] * 3)
    whole = pair_metrics(model, pairs.clean, pairs)

    def full(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (args[0] if args else kwargs["hidden_states"]).shape[0] > 1:
            raise torch.OutOfMemoryError

    hook = model.model.layers[1].register_forward_pre_hook(full, with_kwargs=True)
    try:
        torch.testing.assert_close(pair_metrics(model, pairs.clean, pairs), whole)
    finally:
        hook.remove()
