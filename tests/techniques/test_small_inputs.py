"""What people pass beside what the annotations say: one number for a list, numpy's numbers, a string for a list."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from techniques.ablation import ablate
from techniques.analyze_token_probs import analyze_token_probs
from techniques.attention import attention_patterns, head_scores
from techniques.attention_knockout import attention_knockout
from techniques.causal_tracing import causal_tracing
from techniques.circuits import evaluate_circuit
from techniques.direct_logit_attribution import direct_logit_attribution
from techniques.directions import concept_direction, vector_direction
from techniques.eap import eap
from techniques.evaluate_sae import evaluate_sae
from techniques.extract import extract
from techniques.generate_text import generate_text
from techniques.iterative_pruning import iterative_pruning
from techniques.logit_diff_lens import logit_diff_lens
from techniques.logit_lens import logit_lens
from techniques.patching import activation_patching
from techniques.path_patching import path_patching
from techniques.persona_vector import persona_vector
from techniques.plots import plot
from techniques.prefill_attack import prefill_attack
from techniques.probes import linear_probe, probe_transfer
from techniques.sequence_logprob import sequence_logprob
from techniques.steer_feature import steer_feature
from techniques.steering import steering_sweep
from tests.techniques import contrasts
from tests.techniques.test_memory import ANSWERS, CASES, LANDMARKS, PROMPTS, assert_same, direction, usual

Demo = tuple[Any, Any]
PAIRS, PAIR_ANSWERS = contrasts.ioi_pairs(2)
TEXTS = [f"{prompt} {word}" for prompt in PROMPTS for word in ("a", "the", "red", "blue")]
ARRAY: Any = np.array([1.0])
LABELS = [i % 2 for i in range(len(TEXTS))]


# Numbers of numpy and torch, and one where several are asked for.


@pytest.mark.parametrize("layers", [1, np.int64(1), np.array([1]), torch.tensor([1]), (1,), range(1, 2)])
def test_layers_in_other_guises(layers: Any, demo: Demo) -> None:
    vector = direction(demo[0])
    assert extract(*demo, PROMPTS, layers=layers)["layers"] == [1]
    assert {row["layer"] for row in attention_patterns(*demo, PROMPTS[0], layers=layers, heads=layers)["rows"]} == {1}
    cut = attention_knockout(*demo, PROMPTS, ANSWERS, keys=2, layers=layers)
    assert [row["layer"] for row in cut["rows"]] == [1]
    swept = steering_sweep(*demo, PROMPTS, vector, ARRAY, [" Paris"], layers=layers, n_draws=1)
    assert {row["layer"] for row in swept["rows"]} == {1}
    assert json.loads(json.dumps(swept, allow_nan=False)) == swept


@pytest.mark.parametrize("layers", [[1.0], 1.5, "1", [True], None, [[1]]])
def test_layers_that_are_none(layers: Any, demo: Demo) -> None:
    with pytest.raises(ValueError, match="expected whole numbers, as 1 or"):
        extract(*demo, PROMPTS, layers=layers)
    if layers is not None:
        with pytest.raises(ValueError, match=r"layers is .*; expected whole numbers, as 1 or"):
            attention_patterns(*demo, PROMPTS[0], layers=layers)


@pytest.mark.parametrize("positions", [-1, np.int64(-1), np.array([-1]), torch.tensor([-1])])
def test_positions_in_other_guises(positions: Any, demo: Demo) -> None:
    assert logit_lens(*demo, PROMPTS, positions=positions) == logit_lens(*demo, PROMPTS, positions=[-1])
    cut = attention_knockout(*demo, PROMPTS, ANSWERS, keys=2, queries=positions)
    assert cut == attention_knockout(*demo, PROMPTS, ANSWERS, keys=2)
    each = positions if np.ndim(positions) == 0 else [positions[0]] * len(PROMPTS)
    assert extract(*demo, PROMPTS, position=each)["texts"] == extract(*demo, PROMPTS)["texts"]


def test_coefficients_in_other_guises(demo: Demo) -> None:
    vector = direction(demo[0])
    expected = steering_sweep(*demo, PROMPTS, vector, [2.0], [" Paris"], n_draws=1)
    given: list[Any] = [2.0, np.float32(2), torch.tensor([2.0])]
    for same in given:
        assert steering_sweep(*demo, PROMPTS, vector, same, [" Paris"], n_draws=1) == expected


@pytest.mark.parametrize("coefficients", [[0], [0.0, 0], [], np.zeros(2)])
def test_a_sweep_of_nothing_is_refused(coefficients: Any, demo: Demo) -> None:
    with pytest.raises(ValueError, match=r"coefficients is .*; expected one other than 0 at least"):
        steering_sweep(*demo, PROMPTS, direction(demo[0]), coefficients, [" Paris"])


# Labels.


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda values: [torch.tensor(value) for value in values]])
def test_labels_and_groups_in_other_guises(make: Any, demo: Demo) -> None:
    options: dict[str, Any] = {"layers": 1, "n_permutations": 2, "n_boot": 10}
    expected = linear_probe(*demo, TEXTS, LABELS, **options)
    assert linear_probe(*demo, TEXTS, make(LABELS), **options) == expected
    groups = [i // 8 for i in range(len(TEXTS))]
    transfer = probe_transfer(*demo, TEXTS, LABELS, groups, layer=1, n_boot=10)
    assert probe_transfer(*demo, TEXTS, make(LABELS), make(groups), layer=1, n_boot=10) == transfer


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_missing_label_is_named(make: Any, demo: Demo) -> None:
    labels = [float(label) for label in LABELS]
    labels[3] = math.nan
    with pytest.raises(ValueError, match=r"Label 3 is nan; expected a value\. Leave the text out"):
        linear_probe(*demo, TEXTS, make(labels))


def test_a_text_with_both_labels_is_told(demo: Demo) -> None:
    options: dict[str, Any] = {"layers": 1, "n_permutations": 0, "n_boot": 10}
    result = linear_probe(*demo, [*TEXTS, TEXTS[0], TEXTS[0]], [*LABELS, 0, 1], **options)
    note = "1 of the texts stand under several labels, so no probe can be right about all of them."
    assert note in result["warnings"]
    assert note not in linear_probe(*demo, [*TEXTS, TEXTS[0]], [*LABELS, 0], **options)["warnings"]
    groups = [i // 8 for i in range(len(TEXTS))]
    both = probe_transfer(*demo, [*TEXTS, TEXTS[0]], [*LABELS, 1], [*groups, 0], layer=1, n_boot=10)
    assert both["warnings"] == [note]


# Texts.


def test_what_is_no_text_is_refused(demo: Demo) -> None:
    for technique in (generate_text, analyze_token_probs, logit_lens):
        with pytest.raises(ValueError, match="The text is 5; expected a string or a list of strings"):
            technique(*demo, 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="The text None is of type NoneType; expected a string"):
            technique(*demo, [PROMPTS[0], None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="The text is 5; expected a string or a list of strings"):
        sequence_logprob(*demo, 5, [" a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((5, "Sure"), "user_prompt"),
        ((["a"], "Sure"), "user_prompt"),
        (("a", None), "prefill_text"),
        (("a", "b", 3), "system"),
    ],
)
def test_a_prefill_attack_takes_strings(arguments: Any, name: str, demo: Demo) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; expected a string\. Call prefill_attack once for each"):
        prefill_attack(*demo, *arguments)


def strings_for_lists(demo: Demo) -> dict[str, Any]:
    text, pair = PROMPTS[0], [PROMPTS[0]] * 2
    return {
        "positive_systems": lambda: persona_vector(*demo, text, pair, pair),
        "negative_systems": lambda: persona_vector(*demo, pair, text, pair),
        "questions": lambda: persona_vector(*demo, pair, pair, text),
        "texts": lambda: evaluate_sae(*demo, "nowhere", text),
        "reference_texts": lambda: steer_feature(*demo, "nowhere", 0, pair, text),
        "words": lambda: head_scores(*demo, words=text),
        "targets": lambda: logit_lens(*demo, pair, targets=" Paris"),
        "labels": lambda: linear_probe(*demo, TEXTS, "ab" * 8),
        "positive": lambda: concept_direction(*demo, text, pair, layer=1),
        "prompts": lambda: ablate(*demo, text, ANSWERS, ["m1"]),
        "components": lambda: ablate(*demo, PROMPTS, ANSWERS, "m1"),
        "subjects": lambda: causal_tracing(*demo, PROMPTS, text, [" Paris"] * 4),
    }


@pytest.mark.parametrize("name", sorted(strings_for_lists((None, None))))
def test_a_string_for_a_list_is_refused_by_its_name(name: str, demo: Demo) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is the string '.*'; expected a list of strings\. Put it in a list"):
        strings_for_lists(demo)[name]()


def test_a_string_for_prompts_is_not_read_letter_by_letter(demo: Demo) -> None:
    with pytest.raises(ValueError, match="is the string 'The Eiffel"):
        steering_sweep(*demo, PROMPTS[0], direction(demo[0]), [1.0], [" Paris"])


# Files.


def test_a_folder_for_a_file_is_refused_before_the_work(demo: Demo, tmp_path: Path) -> None:
    calls: list[Any] = []
    hook = demo[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for work in (
            lambda: extract(*demo, PROMPTS, save=tmp_path),
            lambda: attention_patterns(*demo, PROMPTS[0], save=str(tmp_path)),
            lambda: eap(*demo, PAIRS, PAIR_ANSWERS, save=tmp_path),
        ):
            with pytest.raises(ValueError, match=r"save is '.*', which is a folder; expected the path of a file"):
                work()
    finally:
        hook.remove()
    assert not calls


def test_saved_patterns_are_drawn_like_those_inside(demo: Demo, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": [2, 0], "heads": [3, 1]}
    inside = attention_patterns(*demo, PROMPTS[0], **options)
    saved = attention_patterns(*demo, PROMPTS[0], **options, save=tmp_path / "patterns.safetensors")
    assert saved["rows"][0]["pattern"] is None
    drawn, expected = (json.loads(plot(result).to_json())["data"] for result in (saved, inside))
    assert len(drawn) == 4
    assert [trace["hovertemplate"] for trace in drawn] == [trace["hovertemplate"] for trace in expected]
    for trace, same in zip(drawn, expected, strict=True):
        for row, other in zip(trace["z"], same["z"], strict=True):
            assert [v for v in row if v is not None] == pytest.approx([v for v in other if v is not None], rel=1e-5)
    Path(saved["file"]["path"]).unlink()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"patterns\.safetensors, which is not there; expected the file on this"):
        plot(saved)


# Surroundings.


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_caller_s_gradient_mode_does_not_matter(name: str, mode: Any, demo: Demo) -> None:
    with mode():
        found = CASES[name](*demo)
    assert_same(found, usual(name, demo))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_are_taken_in_the_caller_s_mode_too(mode: Any, demo: Demo) -> None:
    expected = eap(*demo, PAIRS, PAIR_ANSWERS, verify=4)
    with mode():
        assert_same(eap(*demo, PAIRS, PAIR_ANSWERS, verify=4), expected)


def test_default_sites_that_a_model_lacks_are_left_out(make_model: Any, tokenizer: Any) -> None:
    """OPT's MLP is no module of its own."""
    model = make_model("opt")
    pairs, answers = [("the cat sat on a mat", "the dog ran on a mat")], [("to", "dog"), ("dog", "to")]
    ends = [
        curve["diffs"][-1] or 0 for curve in logit_diff_lens(model, tokenizer, list(pairs[0]), answers[0])["curves"]
    ]
    answer = answers[0] if ends[0] > ends[1] else answers[1]
    result = activation_patching(model, tokenizer, pairs, [answer], min_gap=1e-6)
    assert result["sites"] == ["resid_pre", "attn_out"]
    assert "The blocks of this model have no mlp_out, which could not be patched." in result["warnings"]
    with pytest.raises(ValueError, match="has no mlp_out; expected one of resid_pre"):
        activation_patching(model, tokenizer, pairs, [answer], ["mlp_out"], min_gap=1e-6)
    traced = causal_tracing(model, tokenizer, [pairs[0][0]], ["cat"], ["to"], ["resid_post"], min_drop=-1)
    assert {row["site"] for row in traced["rows"]} == {"resid_post"}


# One thing alone.


def alone(demo: Demo) -> dict[str, Any]:
    prompt, answer, name = PROMPTS[:1], ANSWERS[:1], list(LANDMARKS)[:1]
    pair, said = PAIRS[:1], PAIR_ANSWERS[:1]
    vector = vector_direction([1.0] * demo[0].config.hidden_size if demo[0] else [1.0], layer=1)
    return {
        "prompt": [
            lambda: ablate(*demo, prompt, answer, ["m1"], "zero"),
            lambda: attention_knockout(*demo, prompt, answer, keys=name),
            lambda: direct_logit_attribution(*demo, prompt, answer),
            lambda: logit_diff_lens(*demo, prompt, answer),
            lambda: steering_sweep(*demo, prompt, vector, [1.0], [" Paris"], n_draws=1),
        ],
        "pair": [
            lambda: activation_patching(*demo, pair, said, ["z"], "head"),
            lambda: path_patching(*demo, pair, said, "heads", ["logits"]),
            lambda: evaluate_circuit(*demo, ["m0", "m3"], pair, said, n_random=2),
            lambda: eap(*demo, pair, said, verify=0),
        ],
        "sequence": [lambda: head_scores(*demo, seq_len=4, n=1)],
        "draw of one prompt": [lambda: causal_tracing(*demo, prompt, name, [" Paris"], n_draws=1)],
        "held-out pair": [lambda: iterative_pruning(*demo, PAIRS, PAIR_ANSWERS)],
    }


@pytest.mark.parametrize("what", sorted(alone((None, None))))
def test_intervals_over_one_thing_carry_a_warning(what: str, demo: Demo) -> None:
    for work in alone(demo)[what]:
        note = f"The intervals rest on one {what}, so they have no width and say nothing about others."
        assert note in work()["warnings"]
