"""Causal tracing against the model written out by hand, and on a model in which one head carries the subject."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_kernel.demo_model import corpus
from techniques.causal_tracing import CausalTracing, causal_tracing
from tests.techniques import by_hand, handmade
from tests.techniques.test_patching import MODELS

PROMPT, SUBJECT, ANSWER = "the cat dog ran on a", "cat dog", "mat"
N_DRAWS = 3
EVERYTHING: dict[str, Any] = {"min_drop": -1.0, "n_boot": 10}  # a random model knows nothing that noise could hide


def traced_by_hand(model: Any, ids: list[int], noise: Tensor, restored: list[tuple[str, int]], position: int) -> Tensor:
    """Last logits with noise on the embeddings of the subject, at 1 and 2, and some sites restored at one position."""
    clean = by_hand.activations(model, ids)

    def change(site: str, layer: int, value: Tensor) -> Tensor:
        new = value.clone()
        if site == "embed":
            new[[1, 2]] += noise
        if (site, layer) in restored:
            new[position] = clean[site, layer][position]
        return new

    return by_hand.forward(model, ids, change)[-1]


def window_by_hand(site: str, layer: int, width: int) -> list[tuple[str, int]]:
    """As in the paper's code: from layer - width // 2 to before layer + the other half, cut at both ends."""
    if site == "resid_post":
        return [(site, layer)]
    return [(site, i) for i in range(layer - width // 2, layer - (-width // 2)) if 0 <= i < 3]


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize(("family", "options"), MODELS)
def test_every_cell_equals_the_model_written_out(
    family: str, options: Any, window: int, make_model: Any, tokenizer: Any
) -> None:
    model = make_model(family, **options)
    result = causal_tracing(
        model, tokenizer, [PROMPT], [SUBJECT], [ANSWER], n_draws=N_DRAWS, window=window, seed=3, **EVERYTHING
    )
    ids = tokenizer(PROMPT)["input_ids"]
    answer = tokenizer.convert_tokens_to_ids(ANSWER)
    std = 3 * model.get_input_embeddings().weight.detach()[[ids[1], ids[2]]].double().std()
    noise = torch.randn(N_DRAWS, 2, 16, generator=torch.Generator().manual_seed(3)).double() * std
    assert result["noise_std"] == pytest.approx(std.item(), rel=1e-5)
    assert result["columns"] == PROMPT.split()

    def prob(restored: list[tuple[str, int]], position: int) -> float:
        logits = [traced_by_hand(model, ids, draw, restored, position) for draw in noise]
        return torch.stack(logits).softmax(-1)[:, answer].mean().item()

    assert result["clean"] == pytest.approx(by_hand.forward(model, ids)[-1].softmax(-1)[answer].item(), abs=1e-5)
    corrupted = prob([], 0)
    assert result["corrupted"] == pytest.approx(corrupted, abs=1e-5)
    assert len(result["rows"]) == 3 * 3 * 6
    for row in result["rows"]:
        expected = prob(window_by_hand(row["site"], row["layer"], window), row["column"])
        assert row["prob"] == pytest.approx(expected, abs=1e-5), row
        assert row["effect"] == pytest.approx(expected - corrupted, abs=2e-5)
        assert row["low"] <= row["effect"] <= row["high"]  # type: ignore[operator]


def prob_at(result: CausalTracing, site: str, layer: int, column: int) -> float:
    (row,) = [r for r in result["rows"] if (r["site"], r["layer"], r["column"]) == (site, layer, column)]
    assert row["prob"] is not None
    return row["prob"]


def test_the_subject_is_restored_where_the_copy_head_reads_and_writes_it() -> None:
    model = handmade.copies([(1, 0, 9.0)])  # head 1.0 copies the word at position 1 to the output
    result = causal_tracing(model, handmade.word_tokenizer(), ["red blue pink"], ["blue"], ["blue"])
    assert result["clean"] == pytest.approx(1, abs=1e-2)
    assert result["corrupted"] < 0.9  # type: ignore[operator]
    whole = {("resid_post", 0, 1), ("resid_post", 1, 2), ("attn_out", 1, 2)}
    for row in result["rows"]:
        is_whole = (row["site"], row["layer"], row["column"]) in whole
        expected = result["clean"] if is_whole else result["corrupted"]
        assert row["prob"] == pytest.approx(expected, abs=1e-5), row
        assert row["n"] == 1


def test_facts_of_the_demo_model_come_back_at_the_subjects_end_and_at_the_last_token(demo: tuple[Any, Any]) -> None:
    landmarks = ["Eiffel Tower", "Prado Museum", "Blue Mosque", "Brandenburg Gate"]
    prompts = [corpus.fact_prompt("city", name) for name in landmarks]
    answers = [corpus.fact_answer("city", name) for name in landmarks]
    result = causal_tracing(*demo, prompts, landmarks, answers, n_draws=5)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["interval_over"], result["window"]) == (4, "prompts", 1)
    assert result["columns"] == ["The", "1", "2", " is", " located", " in", " the", " city", " of"]
    assert result["clean"] > 0.9 > 0.4 > result["corrupted"]  # type: ignore[operator]
    assert prob_at(result, "resid_post", 3, 8) == pytest.approx(result["clean"], abs=1e-5)
    assert prob_at(result, "resid_post", 0, 2) > result["corrupted"] + 0.3  # type: ignore[operator]
    assert all(prob_at(result, "resid_post", layer, 0) == result["corrupted"] for layer in range(4))


def test_prompts_that_differ_are_averaged_by_their_parts(demo: tuple[Any, Any]) -> None:
    names = ["Eiffel Tower", "Prado Museum", "Big Ben"]
    prompts = [
        "The Eiffel Tower is located in the city of",
        "Guides at the Prado Museum speak",
        "The Big Ben can be found in",
    ]
    answers = [" Paris", " Spanish", " London"]
    result = causal_tracing(*demo, prompts, names, answers, ["resid_post"], n_draws=4)
    assert result["columns"] == [
        "before the subject", "first subject token", "last subject token", "first later token", "later tokens",
        "last token",
    ]  # fmt: skip
    assert [row["n"] for row in result["rows"][:6]] == [3, 3, 3, 3, 2, 3]  # ` speak` is the first and the last one
    last = dict(zip(result["columns"], result["rows"][-6:], strict=True))
    gaps = [prompt["clean"] - prompt["corrupted"] for prompt in result["prompts"]]  # type: ignore[operator]
    assert last["last token"]["effect"] == pytest.approx(sum(gaps) / 3, abs=1e-5)
    assert last["first later token"]["effect"] == pytest.approx(gaps[1] / 3, abs=1e-5)
    for part in ("before the subject", "first subject token", "last subject token", "later tokens"):
        assert last[part]["effect"] == pytest.approx(0, abs=1e-6)


def test_prompts_that_the_noise_does_not_hurt_are_left_out(demo: tuple[Any, Any]) -> None:
    prompts = ["The Eiffel Tower is located in the city of", "The Big Ben is located in the"]
    result = causal_tracing(*demo, prompts, ["Eiffel Tower", "Big Ben"], [" Paris", " city"], ["resid_post"], n_draws=4)
    assert result["n"] == 1
    assert [prompt["reason"] for prompt in result["prompts"]] == [
        None,
        "the noise lowers its probability by less than 0.1",
    ]
    assert result["warnings"] == ["1 prompts were left out, since the noise hardly lowers their answer."]
    assert result["interval_over"] == "draws"
    with pytest.raises(ValueError, match=r"The noise lowers the probability of ' city' .* that of no answer by 0.1"):
        causal_tracing(*demo, prompts[1:], ["Big Ben"], [" city"], n_draws=2)


def test_noise_follows_the_seed_and_leaves_the_global_stream_alone(demo: tuple[Any, Any]) -> None:
    options: Any = {"sites": ["resid_post"], "n_draws": 2}
    before = torch.get_rng_state()
    runs = [
        causal_tracing(*demo, ["The Big Ben can be found in"], ["Big Ben"], [" London"], seed=seed, **options)[
            "corrupted"
        ]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.get_rng_state())


def test_model_is_left_as_it_was_after_an_interrupt(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")

    def trace() -> None:
        causal_tracing(model, tokenizer, [PROMPT], [SUBJECT], [ANSWER], n_draws=2, **EVERYTHING)

    trace()
    for stop_at in (1, 4):  # in the run whose embeddings are noisy, and in the sweep
        runs = 0

        def stop(*_: Any, stop_at: int = stop_at) -> None:
            nonlocal runs
            runs += 1
            if runs == stop_at:
                raise KeyboardInterrupt

        handle = model.transformer.h[0].mlp.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            trace()
        handle.remove()
        hooks = [part for part in model.modules() if part._forward_hooks or "forward" in vars(part)]
        assert hooks == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["z"]}, r"sites is \['z'\]; expected a list of some of resid_post, attn_out, mlp_out"),
        ({"sites": "resid_post"}, "sites is the string 'resid_post'; expected a list"),
        ({"noise": 0}, "noise is 0 and n_draws is 10; expected a positive number"),
        ({"n_draws": 0}, "n_draws is 0; expected a positive number and at least 1 draw"),
        ({"window": 4}, "window is 4; expected 1 to 3, the number of layers"),
        ({"subjects": []}, "There are 1 prompts, 0 subjects and 1 answers; expected three lists of one length"),
        ({"subjects": SUBJECT}, "subjects is the string 'cat dog'; expected a list"),
        ({"subjects": ["mat"]}, "The span 'mat' occurs 0 times"),
        ({"answers": ["mat cat"]}, r"'mat cat' is 2 tokens"),
        ({"prompts": ["the cat dog " * 30]}, "has 90 tokens, but the model's context holds 64"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, make_model: Any, tokenizer: Any) -> None:
    given: dict[str, Any] = {"prompts": [PROMPT], "subjects": [SUBJECT], "answers": [ANSWER], **options}
    with pytest.raises(ValueError, match=message):
        causal_tracing(make_model("gpt2"), tokenizer, **given)
