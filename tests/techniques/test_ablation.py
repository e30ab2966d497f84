"""Ablations against the model written out by hand, and on models in which the cost of each head is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from techniques.ablation import Ablation, ablate, ablate_sweep
from tests.techniques import by_hand, handmade
from tests.techniques.test_patching import MODELS, fact_pairs

PROMPTS = ["the cat sat on a mat", "the dog ran to a mat", "a dog ran on the cat"]
ANSWERS = [("to", "dog"), ("cat", "dog"), ("mat", "sat")]
REFERENCES = ["on a mat the dog sat", "a cat to the dog ran", "the the mat on on to"]
Fill = Callable[[str, int], Tensor]


def ablated_by_hand(model: Any, ids: list[int], components: list[str], fill: Fill) -> Tensor:
    """Last logits with components overwritten by `fill(site, layer)` [pos, ...]."""
    layers = {name: int(name[1:].split(".")[0]) for name in components}

    def change(site: str, layer: int, value: Tensor) -> Tensor:
        new = value.clone()
        for name in components:
            if layers[name] != layer:
                continue
            if site == "mlp_out" and name[0] == "m":
                new[:] = fill(site, layer)
            elif site == "z" and name[0] == "a":
                head = int(name.split(".h")[1])
                new[:, head] = fill(site, layer)[:, head]
        return new

    return by_hand.forward(model, ids, change)[-1]


def fill_for(mode: str, acts: list[dict[tuple[str, int], Tensor]]) -> Fill:
    def fill(site: str, layer: int) -> Tensor:
        values = torch.stack([found[site, layer] for found in acts])  # all references have one length
        if mode == "zero":
            return torch.zeros_like(values[0])
        by_position = values.mean(0)
        return by_position if mode == "mean_position" else by_position.mean(0, keepdim=True).expand_as(by_position)

    return fill


@pytest.mark.parametrize("mode", ["zero", "mean", "mean_position"])
@pytest.mark.parametrize(("family", "options"), MODELS)
def test_every_component_equals_the_model_written_out(
    family: str, options: Any, mode: Any, make_model: Any, tokenizer: Any
) -> None:
    model = make_model(family, **options)
    given = None if mode == "zero" else REFERENCES
    result = ablate_sweep(model, tokenizer, PROMPTS, ANSWERS, mode=mode, reference_prompts=given)
    assert [row["components"][0] for row in result["rows"]] == [
        f"a{layer}.h{head}" if head < 2 else f"m{layer}" for layer in range(3) for head in range(3)
    ]
    fill = fill_for(mode, [by_hand.activations(model, tokenizer(text)["input_ids"]) for text in REFERENCES])
    check(result, model, tokenizer, fill)


def check(result: Ablation, model: Any, tokenizer: Any, fill: Fill) -> None:
    for row in result["rows"]:
        diffs, losses = [], []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in answer)
            before, after = by_hand.forward(model, ids)[-1], ablated_by_hand(model, ids, row["components"], fill)
            diffs.append([(logits[right] - logits[wrong]).item() for logits in (before, after)])
            losses.append([-logits.log_softmax(-1)[right].item() for logits in (before, after)])
        for change, values in [(row["logit_diff"], diffs), (row["cross_entropy"], losses)]:
            clean, ablated = (sum(column) / 3 for column in zip(*values, strict=True))
            assert [change["clean"], change["ablated"]] == pytest.approx([clean, ablated], abs=2e-5)
            assert change["change"] == pytest.approx(ablated - clean, abs=4e-5)


def test_several_components_are_ablated_together(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    components: list[Any] = ["a0.h1", "m0", ("head", 2, 0), ("mlp", 2), "a0.h0"]
    result = ablate(model, tokenizer, PROMPTS, ANSWERS, components, "mean", REFERENCES)
    assert [row["components"] for row in result["rows"]] == [["a0.h1", "m0", "a2.h0", "m2", "a0.h0"]]
    assert result["reference"] == {"source": "reference_prompts", "n": 3, "first": REFERENCES[0]}
    fill = fill_for("mean", [by_hand.activations(model, tokenizer(text)["input_ids"]) for text in REFERENCES])
    check(result, model, tokenizer, fill)


def test_a_draw_is_another_prompt_of_the_same_length(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    references = [PROMPTS[0], "a mat", REFERENCES[1]]  # for the first prompt only the last one will do
    result = ablate(model, tokenizer, PROMPTS[:1], ANSWERS[:1], ["a1.h0", "m1"], "resample", references, n_draws=3)
    source = by_hand.activations(model, tokenizer(REFERENCES[1])["input_ids"])
    ids = tokenizer(PROMPTS[0])["input_ids"]
    logits = ablated_by_hand(model, ids, ["a1.h0", "m1"], lambda site, layer: source[site, layer])
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in ANSWERS[0])
    assert result["rows"][0]["logit_diff"]["ablated"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=2e-5)
    assert result["n_draws"] == 3


def test_draws_are_averaged_and_follow_the_seed(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    sources = [by_hand.activations(model, tokenizer(text)["input_ids"]) for text in REFERENCES]
    ids = tokenizer(PROMPTS[0])["input_ids"]
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in ANSWERS[0])
    each = []
    for source in sources:
        logits = ablated_by_hand(model, ids, ["m0"], lambda site, layer, source=source: source[site, layer])  # type: ignore[misc]
        each.append((logits[right] - logits[wrong]).item())

    def ablated(seed: int, n_draws: int) -> float:
        found = ablate(
            model, tokenizer, PROMPTS[:1], ANSWERS[:1], ["m0"], "resample", REFERENCES, n_draws=n_draws, seed=seed
        )
        value = found["rows"][0]["logit_diff"]["ablated"]
        assert value is not None
        return value

    singles = [ablated(seed, 1) for seed in range(8)]
    assert singles == [ablated(seed, 1) for seed in range(8)]
    assert {min(range(3), key=lambda i: abs(each[i] - value)) for value in singles} == {0, 1, 2}
    assert all(min(abs(value - one) for one in each) < 2e-5 for value in singles)
    assert ablated(0, 300) == pytest.approx(sum(each) / 3, abs=0.15 * (max(each) - min(each)))


# ---------------------------------------------------------------------------------------------- known circuits


def test_each_copy_head_costs_what_it_writes() -> None:
    model = handmade.copies([(0, 0, 1.0), (0, 1, 5.0), (1, 1, 2.0)])
    result = ablate_sweep(model, handmade.word_tokenizer(), ["red blue pink"], [("blue", "gold")], mode="zero")
    change = {row["components"][0]: row["logit_diff"]["change"] for row in result["rows"]}
    expected = {"a0.h0": -1.0, "a0.h1": -5.0, "m0": 0.0, "a1.h0": 0.0, "a1.h1": -2.0, "m1": 0.0}
    assert change == pytest.approx(expected, abs=1e-5)
    assert result["rows"][0]["logit_diff"]["clean"] == pytest.approx(8, abs=1e-5)
    assert result["reference"] == {"source": "none", "n": 0, "first": None}


def test_a_mean_keeps_what_the_references_share() -> None:
    model, words = handmade.copies([(0, 0, 4.0)]), handmade.word_tokenizer()
    options: Any = {"components": ["a0.h0"], "mode": "mean_position"}
    same = ablate(model, words, ["red blue pink"], [("blue", "gold")], reference_prompts=["pink blue red"], **options)
    other = ablate(model, words, ["red blue pink"], [("blue", "gold")], reference_prompts=["red gold pink"], **options)
    assert same["rows"][0]["logit_diff"]["change"] == pytest.approx(0, abs=1e-5)
    assert other["rows"][0]["logit_diff"]["change"] == pytest.approx(-8, abs=1e-5)


def test_the_demo_model_needs_its_first_mlp_for_facts(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(10)
    result = ablate_sweep(*demo, [clean for clean, _ in pairs], answers)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["seed"], result["mode"], result["reference"]["source"]) == (
        10,
        0,
        "resample",
        "prompts",
    )
    change = {row["components"][0]: row["logit_diff"]["change"] or 0.0 for row in result["rows"]}
    assert min(change, key=lambda name: change[name]) == "m0"
    assert change["m0"] < -5
    for row in result["rows"]:
        for part in (row["logit_diff"], row["cross_entropy"]):
            assert part["low"] <= part["change"] <= part["high"]  # type: ignore[operator]
    everything = [row["components"][0] for row in result["rows"]]
    alone = ablate(*demo, [clean for clean, _ in pairs], answers, everything)["rows"][0]
    assert alone["cross_entropy"]["change"] > 3  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------- conditions


def test_a_position_that_few_references_reach_is_their_mean(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    references = [*REFERENCES[:1], "a cat"]
    result = ablate(model, tokenizer, PROMPTS[:1], ANSWERS[:1], ["m1"], "mean_position", references)
    assert result["warnings"][:1] == [
        "The reference prompts differ in length, so a position's mean mixes different places of the sentence."
    ]
    long, short = (by_hand.activations(model, tokenizer(text)["input_ids"])["mlp_out", 1] for text in references)
    mean = long.clone()
    mean[:2] = (long[:2] + short) / 2
    logits = ablated_by_hand(model, tokenizer(PROMPTS[0])["input_ids"], ["m1"], lambda *_: mean)
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in ANSWERS[0])
    assert result["rows"][0]["logit_diff"]["ablated"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=2e-5)


def test_padding_does_not_enter_the_mean(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    references = [*REFERENCES[:1], "a cat"]
    result = ablate(model, tokenizer, PROMPTS[:1], ANSWERS[:1], ["m1"], "mean", references)
    values = [by_hand.activations(model, tokenizer(text)["input_ids"])["mlp_out", 1] for text in references]
    mean = torch.cat(values).mean(0, keepdim=True)
    logits = ablated_by_hand(model, tokenizer(PROMPTS[0])["input_ids"], ["m1"], lambda *_: mean)
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in ANSWERS[0])
    assert result["rows"][0]["logit_diff"]["ablated"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3", "mixtral"])
def test_zero_ablation_of_everything_leaves_the_embedding(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family, **({"use_parallel_residual": True} if family == "gpt_neox" else {}))
    components = [f"m{layer}" for layer in range(3)] + [f"a{layer}.h{head}" for layer in range(3) for head in range(2)]
    result = ablate(model, tokenizer, PROMPTS[:1], ANSWERS[:1], components, "zero")
    with torch.no_grad():  # the blocks cut down to what a silent attention adds
        for name, parameter in model.named_parameters():
            if "mlp" in name or "post_feedforward" in name or "expert" in name:
                parameter.zero_()
            if ("o_proj" in name or "attention.dense" in name) and name.endswith("weight"):
                parameter.zero_()
        logits = model(**tokenizer(PROMPTS[0], return_tensors="pt").data).logits[0, -1]
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in ANSWERS[0])
    assert result["rows"][0]["logit_diff"]["ablated"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "knockout"}, "mode is 'knockout'; expected one of resample, mean, mean_position, zero"),
        ({"mode": "zero", "reference_prompts": REFERENCES}, 'given with mode "zero", which uses none'),
        ({"n_draws": 0}, "n_draws is 0; expected at least 1"),
        ({"components": ["a3.h0"]}, "The component 'a3.h0' is not known; .* a0.h0 to a2.h1 or an MLP from m0 to m2"),
        ({"components": [("neuron", 1)]}, r"The component \('neuron', 1\) is not known"),
        ({"components": []}, "components is empty; expected at least one"),
        ({"reference_prompts": ["a cat"]}, "No reference prompt has the 6 tokens of 'the cat sat on a mat'"),
        ({"reference_prompts": []}, "list of texts is empty"),
        ({"reference_prompts": ["a " * 65]}, "has 65 tokens, but the model's context holds 64"),
        ({"prompts": PROMPTS[:1], "answers": ANSWERS[:1], "mode": "mean"}, "The mean over the one prompt 'the cat sat"),
        ({"mode": "mean_position", "reference_prompts": ["a cat"]}, "longest prompt has 6 .* reference prompt 2;"),
        ({"prompts": [], "answers": []}, "prompts is empty; expected at least one"),
        ({"answers": [("to", "dog")]}, "for 3 prompts; expected one"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, make_model: Any, tokenizer: Any) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "answers": ANSWERS, "components": ["m0"], **options}
    with pytest.raises(ValueError, match=message):
        ablate(make_model("gpt2"), tokenizer, **given)


def test_model_is_left_as_it_was_after_an_interrupt(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    ablate_sweep(model, tokenizer, PROMPTS, ANSWERS, mode="mean")
    runs = 0

    def stop(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 4:  # references, baseline, the plain run, then the sweep
            raise KeyboardInterrupt

    handle = model.transformer.h[2].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ablate_sweep(model, tokenizer, PROMPTS, ANSWERS, mode="mean")
    handle.remove()
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
    )


@pytest.mark.parametrize("name", ["prompts", "reference_prompts"])
def test_a_string_for_the_prompts_is_refused(name: str, make_model: Any, tokenizer: Any) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "answers": ANSWERS, "components": ["m0"], name: "cat"}
    with pytest.raises(ValueError, match=f"{name} is the string 'cat'; expected a list"):
        ablate(make_model("gpt2"), tokenizer, **given)
