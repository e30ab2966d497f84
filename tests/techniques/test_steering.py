"""Steering against the same change made to a copy's weights, and against generation that computes everything anew."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch

from interp_kernel.demo_model import corpus
from techniques import directions, steering
from techniques._steering_sweep import with_controls
from techniques.directions import project, vector_direction
from techniques.plots.steering import plot_steering_sweep

# `*demo` and results that may be None: typed as Any, since the values are what is tested.
concept_direction: Any = directions.concept_direction
steer_generate: Any = steering.steer_generate
steering_sweep: Any = steering.steering_sweep
ablate_direction: Any = steering.ablate_direction

PROMPTS = ["the cat sat on", "a dog", "the"]  # of unequal length, so that generation pads on the left
TARGETS, AGAINST = ["cat", "dog"], ["mat"]
KINDS = ("expert", "novice")
FOUND_ON, TESTED_ON = corpus.QUESTIONS[::2], corpus.QUESTIONS[1::2]
EXPERTS, NOVICES = (
    [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in FOUND_ON] for kind in KINDS
)
NEUTRAL = [corpus.persona_prompt(None, q) for q in TESTED_ON]


def own_direction(width: int = 16, layer: int = 1, seed: int = 0) -> Any:
    return vector_direction(torch.randn(width, generator=torch.Generator().manual_seed(seed)), layer)


def with_bias(model: Any, vector: Any, layer: int) -> Any:
    """A copy of a GPT-2 whose block adds the vector at every token."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.h[layer].mlp.c_proj.bias += vector
    return changed


def next_logits(model: Any, tokenizer: Any, text: str) -> Any:
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0, -1]


@pytest.fixture(scope="module")
def register(demo: Any) -> Any:
    """The direction from novice to expert, of prompts whose questions are in no test."""
    return concept_direction(*demo, EXPERTS, NOVICES, 1, classes=KINDS)


@pytest.fixture(scope="module")
def dose(demo: Any, register: Any) -> Any:
    return steering_sweep(
        *demo, NEUTRAL, register, [-2, -1, 0, 1, 2], [" Therefore"], [" So"], n_draws=3, max_new_tokens=8
    )


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("positions", ["all", "prompt", "last", "response"])
def test_generation_is_that_of_passes_without_a_cache(
    make_model: Any, tokenizer: Any, architecture: str, positions: Any, blocks_of: Any
) -> None:
    model, direction = make_model(architecture), own_direction()
    found = steer_generate(model, tokenizer, PROMPTS, direction, 3.0, positions=positions, max_new_tokens=6)
    vector = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    for row in found["rows"]:
        length = len(row["prompt"].split())
        assert row["clean"] == slow(
            model, tokenizer, blocks_of(architecture, model)[1], row["prompt"], 0 * vector, "all"
        )
        block = blocks_of(architecture, model)[1]
        assert row["steered"] == slow(model, tokenizer, block, row["prompt"], vector, positions), length
    assert found["n_changed"] == sum(row["clean"] != row["steered"] for row in found["rows"])


def slow(model: Any, tokenizer: Any, block: Any, prompt: str, vector: Any, positions: str) -> str:
    """Greedy text of one prompt, every pass over the whole sequence, with the vector added by torch's own hook."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    chosen = {"all": slice(None), "prompt": slice(length), "last": slice(length - 1, length)}
    where = chosen.get(positions, slice(length - 1, None))

    def add(_: Any, __: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).clone()
        state[:, where] += vector
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = block.register_forward_hook(add)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    return str(tokenizer.decode(ids[0, length:]))


@pytest.mark.parametrize("positions", ["prompt", "last", "response"])
def test_a_prompt_of_one_token_is_told_from_its_response(
    make_model: Any, tokenizer: Any, positions: Any, blocks_of: Any
) -> None:
    model = make_model("gpt2")
    (row,) = steer_generate(model, tokenizer, "the", own_direction(), 3.0, positions=positions, max_new_tokens=6)[
        "rows"
    ]
    vector = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    assert row["steered"] == slow(model, tokenizer, blocks_of("gpt2", model)[1], "the", vector, positions)


@pytest.mark.parametrize("positions", ["prompt", "last", "response"])
def test_a_model_without_cache_is_steered_alike(make_model: Any, tokenizer: Any, positions: Any) -> None:
    model = make_model("gpt2")
    widths: list[int] = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    options: dict[str, Any] = {"positions": positions, "max_new_tokens": 5}
    cached = steer_generate(model, tokenizer, PROMPTS, own_direction(), 3.0, **options)
    assert widths[-5:] == [4, 1, 1, 1, 1]
    model.generation_config.use_cache = model.config.use_cache = False
    assert steer_generate(model, tokenizer, PROMPTS, own_direction(), 3.0, **options)["rows"] == cached["rows"]
    assert widths[-5:] == [4, 5, 6, 7, 8]


def test_steering_everywhere_is_a_bias_of_the_block(make_model: Any, tokenizer: Any) -> None:
    model, direction = make_model("gpt2"), own_direction(layer=0)
    found = steer_generate(model, tokenizer, PROMPTS, direction, -2.0, max_new_tokens=6)
    unit = torch.tensor(direction["direction"])
    changed = with_bias(model, -2 * direction["separation"] * unit, 0)
    expected = steer_generate(changed, tokenizer, PROMPTS, direction, 1e-3, max_new_tokens=6)
    assert [row["steered"] for row in found["rows"]] == [row["clean"] for row in expected["rows"]]
    for row in found["rows"]:
        clean, steered = (next_logits(m, tokenizer, row["prompt"]).log_softmax(-1) for m in (model, changed))
        assert row["kl_to_clean"] == pytest.approx(float((clean.exp() * (clean - steered)).sum()), rel=1e-3)


@pytest.mark.parametrize("units", ["difference", "resid_norm", "absolute"])
def test_units(demo: Any, register: Any, units: Any) -> None:
    found = steer_generate(*demo, NEUTRAL[:1], register, -0.5, units=units, max_new_tokens=1)
    size = {"difference": register["separation"], "resid_norm": register["norm"], "absolute": 1.0}[units]
    assert found["added_norm"] == pytest.approx(0.5 * size, rel=1e-4)


def test_a_persona_direction_changes_the_register_and_no_more(demo: Any, register: Any) -> None:
    for coefficient, kind in ((1.0, "expert"), (-1.0, "novice")):
        found = steer_generate(*demo, NEUTRAL, register, coefficient, max_new_tokens=8)
        openers = [row["steered"].split(",")[0].strip() for row in found["rows"]]
        assert sum(opener in corpus.OPENERS[kind] for opener in openers) >= 7
    assert found["positive_class"] == "expert"


def test_chat_prompts_are_laid_out(demo: Any, register: Any) -> None:
    plain = "System: You are a Helpful Assistant.\nUser: What is an audit?\nAssistant:"
    options: dict[str, Any] = {"chat": True, "system": "You are a Helpful Assistant.", "max_new_tokens": 4}
    chat = steer_generate(*demo, "What is an audit?", register, 1.0, **options)["rows"]
    raw = steer_generate(*demo, plain, register, 1.0, max_new_tokens=4)["rows"]
    assert [row["steered"] for row in chat] == [row["steered"] for row in raw]


# ---------------------------------------------------------------------------------------------- sweep


def test_sweep_equals_biased_copies(make_model: Any, tokenizer: Any) -> None:
    model, direction = make_model("gpt2"), own_direction()
    sweep = steering_sweep(
        model, tokenizer, PROMPTS, direction, [-1, 0, 2], TARGETS, AGAINST, layers=[0, 2], controls=()
    )
    words = {word: tokenizer.convert_tokens_to_ids(word) for word in (*TARGETS, *AGAINST)}
    assert [(row["layer"], row["coefficient"]) for row in sweep["rows"]] == [
        (at, c) for at in (0, 2) for c in (-1, 0, 2)
    ]
    for row in sweep["rows"]:
        vector = row["coefficient"] * direction["separation"] * torch.tensor(direction["direction"])
        changed = with_bias(model, vector, row["layer"])
        odds, kl = [], []
        for text in PROMPTS:
            clean, steered = (next_logits(m, tokenizer, text).double().softmax(-1) for m in (model, changed))
            odds.append(math.log(sum(steered[words[w]] for w in TARGETS) / steered[words["mat"]]))
            kl.append(float((clean * (clean / steered).log()).sum()))
        assert row["metric"] == pytest.approx(sum(odds) / 3, abs=1e-3)
        assert row["kl_to_clean"] == pytest.approx(sum(kl) / 3, rel=1e-2, abs=1e-5)
        assert row["metric_low"] <= row["metric"] <= row["metric_high"]
        if row["coefficient"] == 0:
            assert row["metric"] == pytest.approx(sweep["clean_metric"], abs=1e-4)


def test_the_dose_decides_and_random_vectors_do_not(dose: Any) -> None:
    by_kind: dict[str, list[float]] = {"direction": [], "random": [], "shuffled": []}
    for row in dose["rows"]:
        by_kind[row["kind"]].append(row["metric"] - dose["clean_metric"])
    steered = by_kind["direction"]
    assert steered == sorted(steered)
    assert steered[-1] - steered[0] > 10
    for kind in ("random", "shuffled"):
        assert len(by_kind[kind]) == 3 * 5
        assert max(map(abs, by_kind[kind])) < 0.5 * min(-steered[0], steered[-1])
    kl = {row["coefficient"]: row["kl_to_clean"] for row in dose["rows"] if row["kind"] == "direction"}
    assert kl[0] < 1e-6
    assert kl[2] > kl[1] > 0.1


def test_controls_are_as_long_as_the_direction() -> None:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 7
    first, *others = with_controls(vector, ("random", "shuffled"), 3, seed=0)
    assert torch.equal(first.values, vector)
    assert len({tuple(one.values.tolist()) for one in others}) == 6
    for one in others:
        assert one.values.norm().item() == pytest.approx(vector.norm().item(), rel=1e-5)
        assert (sorted(one.values.tolist()) == sorted(vector.tolist())) is (one.kind == "shuffled")


def test_one_token_each_is_the_logit_difference(demo: Any, dose: Any) -> None:
    model, tokenizer = demo
    ids = [tokenizer(word)["input_ids"][0] for word in (" Therefore", " So")]
    gaps = [
        next_logits(model, tokenizer, text)[ids[0]] - next_logits(model, tokenizer, text)[ids[1]] for text in NEUTRAL
    ]
    assert dose["clean_metric"] == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-3)


def test_perplexity_is_that_of_the_model_itself(demo: Any, register: Any, dose: Any) -> None:
    model, tokenizer = demo
    (row,) = [r for r in dose["rows"] if (r["kind"], r["coefficient"]) == ("direction", 2)]
    steered = steer_generate(model, tokenizer, NEUTRAL, register, 2.0, max_new_tokens=8)["rows"]
    for texts, expected in (
        ([r["steered"] for r in steered], row["perplexity"]),
        ([r["clean"] for r in steered], dose["clean_perplexity"]),
    ):
        losses: list[float] = []
        for prompt, text in zip(NEUTRAL, texts, strict=True):
            ids, start = tokenizer(prompt + text, return_tensors="pt")["input_ids"], len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            losses += [-float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]
        assert expected == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert row["n_changed"] == sum(r["changed"] for r in steered)
    assert row["perplexity"] > dose["clean_perplexity"]


def test_several_directions_go_to_their_own_layers(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    both = [own_direction(layer=0), own_direction(layer=2, seed=1)]
    sweep = steering_sweep(model, tokenizer, PROMPTS, both, [1], ["cat"], controls=("random",), n_draws=2)
    assert [(row["layer"], row["kind"], row["draw"]) for row in sweep["rows"]] == [
        (layer, kind, draw) for layer in (0, 2) for kind, draw in (("direction", 0), ("random", 0), ("random", 1))
    ]
    assert sweep["metric"] == "ln p(targets)"
    assert len({row["metric"] for row in sweep["rows"]}) == 6
    for direction in both:
        alone = steering_sweep(model, tokenizer, PROMPTS, direction, [1], ["cat"], controls=())["rows"][0]
        assert alone in [{**row} for row in sweep["rows"]]


# ---------------------------------------------------------------------------------------------- ablation


def test_ablation_equals_weights_that_can_not_write_along_the_direction(make_model: Any, tokenizer: Any) -> None:
    model, direction = make_model("gpt2"), own_direction()
    unit = torch.tensor(direction["direction"])
    orthogonal = copy.deepcopy(model)
    with torch.no_grad():
        parts = [orthogonal.transformer.wte.weight, orthogonal.transformer.wpe.weight]
        for block in orthogonal.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                parts += [projection.weight, projection.bias]
        orthogonal.lm_head.weight = torch.nn.Parameter(orthogonal.lm_head.weight.clone())  # not what the model reads
        for part in parts:
            part -= (part @ unit)[..., None] * unit if part.dim() == 2 else (part @ unit) * unit
    found = ablate_direction(model, tokenizer, PROMPTS, direction, max_new_tokens=6)
    expected = steer_generate(orthogonal, tokenizer, PROMPTS, own_direction(seed=1), 1e-2, max_new_tokens=6)
    assert [row["ablated"] for row in found["rows"]] == [row["clean"] for row in expected["rows"]]
    for row in found["rows"]:
        clean, ablated = (next_logits(m, tokenizer, row["prompt"]).log_softmax(-1) for m in (model, orthogonal))
        assert row["kl_to_clean"] == pytest.approx(float((clean.exp() * (clean - ablated)).sum()), rel=1e-3)
    assert found["clean_cosine"] > 0.1
    assert found["ablated_cosine"] < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "olmo2"])
def test_nothing_writes_along_the_direction_in_other_families(
    make_model: Any, tokenizer: Any, architecture: str
) -> None:
    found = ablate_direction(make_model(architecture), tokenizer, PROMPTS, own_direction(), max_new_tokens=2)
    assert found["ablated_cosine"] < 1e-5 < found["clean_cosine"]


# ---------------------------------------------------------------------------------------------- guards


def test_nothing_is_left_behind(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    steer_generate(model, tokenizer, PROMPTS, own_direction(), 1.0, max_new_tokens=2)
    handle = model.transformer.h[2].register_forward_pre_hook(stop)
    for call in (steer_generate, ablate_direction):
        with pytest.raises(KeyboardInterrupt):
            call(model, tokenizer, PROMPTS, own_direction())
    handle.remove()
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_vector_that_is_lost_in_rounding_is_told(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2").to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"A vector of norm .* at blocks\.1\.hook_resid_post changed no logit"):
        steer_generate(model, tokenizer, PROMPTS, own_direction(), 1e-6)
    with pytest.raises(RuntimeError, match=r"No vector at blocks\.1\.hook_resid_post changed"):
        steering_sweep(model, tokenizer, PROMPTS, own_direction(), [1e-6, 0], TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": 0}, "coefficient is 0, which adds nothing"),
        ({"coefficient": math.inf}, "The coefficient is inf; expected a finite number"),
        ({"positions": "end"}, "positions is 'end'; expected one of all, prompt, last, response"),
        ({"units": "alpha"}, "units is 'alpha'; expected one of difference, resid_norm, absolute"),
        ({"units": "resid_norm"}, "the direction does not say how long activations are"),
        ({"direction": own_direction(8)}, "The direction has 8 entries, but resid_post of this model has 16"),
        ({"layer": 3}, r"layers is \[3\]; expected"),
        ({"system": "be brief"}, "A system message was given for plain text"),
        ({"prompts": []}, "The list of texts is empty"),
        ({"max_new_tokens": 70}, "70 new ones were asked for, but the model's context holds 64"),
    ],
)
def test_wrong_options_of_steering_are_refused(make_model: Any, tokenizer: Any, options: Any, message: str) -> None:
    given = {"prompts": PROMPTS, "direction": own_direction(), "coefficient": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        steer_generate(make_model("gpt2"), tokenizer, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": []}, r"coefficients is \[\]; expected one other than 0 at least"),
        ({"controls": ("zero",)}, r"controls \['zero'\]; expected"),
        ({"targets": "cat"}, "targets is the string 'cat'; expected a list"),
        ({"targets": ["cat dog"]}, "is 2 tokens"),
        ({"against": ["dog"]}, "share a token"),
        ({"directions": []}, "There are 0 directions and layers is None"),
        (
            {"directions": [own_direction(), own_direction()], "layers": [0]},
            r"There are 2 directions and layers is \[0\]",
        ),
    ],
)
def test_wrong_options_of_the_sweep_are_refused(make_model: Any, tokenizer: Any, options: Any, message: str) -> None:
    given = {"directions": own_direction(), "coefficients": [1.0], "targets": TARGETS, **options}
    with pytest.raises(ValueError, match=message):
        steering_sweep(make_model("gpt2"), tokenizer, PROMPTS, **given)


def test_what_is_no_direction_is_refused_with_how_to_make_one(make_model: Any, tokenizer: Any) -> None:
    model, vector = make_model("gpt2"), torch.ones(16)
    whole = {"technique": "persona_vector", "rows": [own_direction()]}
    bare = r"The direction is of the type Tensor; expected .*vector_direction\(vector, layer\)"
    with pytest.raises(ValueError, match=bare):
        ablate_direction(model, tokenizer, PROMPTS, vector)
    with pytest.raises(ValueError, match=bare):
        steer_generate(model, tokenizer, PROMPTS, vector)
    with pytest.raises(ValueError, match=bare):
        project(model, tokenizer, PROMPTS, vector)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"The direction is all of what persona_vector returned; expected .*a row of"):
        steering_sweep(model, tokenizer, PROMPTS, whole, [1.0], ["cat"], ["dog"])


def test_ablation_refuses_what_is_no_direction_of_the_stream(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="The direction belongs to z; expected one of the residual stream"):
        ablate_direction(make_model("gpt2"), tokenizer, PROMPTS, {**own_direction(), "site": "z"})


def test_train_mode_is_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2").train()
    for call, *arguments in ((steer_generate, 1.0), (steering_sweep, [1.0], TARGETS), (ablate_direction,)):
        with pytest.raises(ValueError, match="train mode"):
            call(model, tokenizer, PROMPTS, own_direction(), *arguments)


def test_the_figure_shows_the_rows(dose: Any) -> None:
    assert json.loads(json.dumps(dose, allow_nan=False)) == dose
    figure = plot_steering_sweep(dose)
    lines = [trace for trace in figure.data if trace.name == "direction"]
    rows = [row for row in dose["rows"] if row["kind"] == "direction"]
    assert list(lines[0].y) == [row["metric"] for row in rows]
    assert list(lines[1].y) == [row["kl_to_clean"] for row in rows]
    (band,) = [trace for trace in figure.data if trace.name == "random vectors, range" and trace.showlegend]
    random = [row["metric"] for row in dose["rows"] if row["kind"] == "random"]
    assert (max(band.y), min(band.y)) == (max(random), min(random))
    assert figure.layout.yaxis.title.text == "ln p(' Therefore') / p(' So'), nats"
