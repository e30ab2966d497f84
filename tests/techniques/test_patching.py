"""Activation patching against the same model written out by hand, and on models whose circuit is known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model

from interp_kernel.demo_model import corpus
from techniques import _pairs
from techniques._model import UnsupportedModelError
from techniques.patching import ActivationPatching, PatchRow, activation_patching
from tests.techniques import by_hand, contrasts, handmade
from tests.techniques.oracles.record_patching import PAIRS

CLEAN, CORRUPTED = "the cat sat on a mat", "the dog ran on a mat"
N_LAYERS = 3
TINY: dict[str, Any] = {"min_gap": 1e-6, "n_boot": 10}  # random models hardly tell prompts apart
# Llama with grouped heads: 2 query heads share a key-value head.
MODELS = [("gpt2", {}), ("llama", {"num_key_value_heads": 1})]


def oriented(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """For each pair two answers of which the first one gains from clean over corrupted; neither ends the prompt."""
    answers = []
    for clean, corrupted in pairs:
        a, b = (by_hand.forward(model, tokenizer(text)["input_ids"])[-1] for text in (clean, corrupted))
        gain = a - b
        gain[[0, tokenizer(clean)["input_ids"][-1]]] = 0
        answers.append((tokenizer.decode([int(gain.argmax())]), tokenizer.decode([int(gain.argmin())])))
    return answers


def at(result: ActivationPatching, **where: Any) -> PatchRow:
    (row,) = [row for row in result["rows"] if all(row.get(key) == value for key, value in where.items())]
    return row


def patched_by_hand(
    model: Any, base: list[int], source: list[int], row: PatchRow, positions: list[tuple[int, int]]
) -> torch.Tensor:
    """Last logits of the base run with one place copied from the source run; positions are (base, source)."""
    acts = by_hand.activations(model, source)

    def change(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if (site, layer) != (row["site"], row["layer"]):
            return value
        new = value.clone()
        for here, there in positions:
            if site == "pattern":
                new[row["head"], here] = acts[site, layer][row["head"], there]
            elif row["head"] is None:
                new[here] = acts[site, layer][there]
            else:
                new[here, row["head"]] = acts[site, layer][there, row["head"]]
        return new

    return by_hand.forward(model, base, change)[-1]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("grain", "sites"),
    [
        ("position", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_pre", "mlp_post"]),
        ("layer", ["attn_out", "mlp_out"]),
        ("head", ["z", "q", "k", "v", "pattern"]),
        ("head_position", ["z", "pattern"]),
    ],
)
@pytest.mark.parametrize(("family", "options"), MODELS)
def test_every_cell_equals_the_model_written_out(
    family: str, options: Any, grain: Any, sites: list[str], direction: Any, make_model: Any, tokenizer: Any
) -> None:
    model = make_model(family, **options)
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    result = activation_patching(
        model, tokenizer, [(CLEAN, CORRUPTED)], answers, sites=sites, grain=grain, direction=direction, **TINY
    )
    texts = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    base, source = (tokenizer(text)["input_ids"] for text in texts)
    right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in answers[0])
    heads = {"k": model.config.num_key_value_heads, "v": model.config.num_key_value_heads} if options else {}
    n_heads = sum(heads.get(site, 2) for site in sites) if grain.startswith("head") else len(sites)
    assert len(result["rows"]) == n_heads * N_LAYERS * (6 if "position" in grain else 1)
    baseline = result["baselines"][0]
    clean, corrupted = baseline["clean"], baseline["corrupted"]
    for row in result["rows"]:
        positions = range(6) if row["column"] is None else [row["column"]]
        logits = patched_by_hand(model, base, source, row, [(p, p) for p in positions])
        expected = (logits[right] - logits[wrong]).item()
        assert row["patched"] == pytest.approx(expected, abs=2e-5)
        recovered = (expected - corrupted) / (clean - corrupted)  # type: ignore[operator]
        assert row["recovered"] == pytest.approx(recovered, abs=1e-3)
        assert row["effect"] == pytest.approx(recovered if direction == "denoise" else 1 - recovered, abs=1e-3)


def test_many_pairs_are_averaged_and_metrics_agree_with_the_model_written_out(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    pairs = [(CLEAN, CORRUPTED), ("a dog sat on the cat", "a mat sat to the cat"), ("on a mat ran", "on the mat sat")]
    answers = oriented(model, tokenizer, pairs)
    result = activation_patching(
        model, tokenizer, pairs, answers, ["z"], "head", metrics=["logit_diff", "logprob", "rank"], **TINY
    )
    assert (result["n"], len(result["rows"])) == (3, N_LAYERS * 2 * 3)
    for row in result["rows"]:
        found: list[float] = []
        for (clean, corrupted), pair in zip(pairs, answers, strict=True):
            ids = [tokenizer(text)["input_ids"] for text in (corrupted, clean)]
            logits = patched_by_hand(model, ids[0], ids[1], row, [(p, p) for p in range(len(ids[0]))])
            right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in pair)
            values = {
                "logit_diff": logits[right] - logits[wrong],
                "logprob": logits.log_softmax(-1)[right],
                "rank": 1 + (logits > logits[right]).sum(),
            }
            found.append(values[row["metric"]].item())
        assert row["patched"] == pytest.approx(sum(found) / 3, abs=2e-5)


def test_prompts_of_unequal_length_are_matched_from_the_end(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    pair = ("the cat sat on a mat", "dog ran a mat")
    answers = oriented(model, tokenizer, [pair])
    result = activation_patching(model, tokenizer, [pair], answers, ["mlp_out"], align="end", **TINY)
    assert [column["label"] for column in result["columns"]] == ["-4", "-3", "-2", "-1"]
    assert "aligned at their ends" in result["warnings"][0]
    clean, corrupted = (tokenizer(text)["input_ids"] for text in pair)
    right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in answers[0])
    for row in result["rows"]:
        column = row["column"] or 0
        logits = patched_by_hand(model, corrupted, clean, row, [(column, column + 2)])
        assert row["patched"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=2e-5)


ORACLE = np.load(Path(__file__).parent / "oracles" / "patching.npz")


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_cells_equal_those_of_transformer_lens_and_nnsight(name: str, demo: tuple[Any, Any]) -> None:
    pair, answer = PAIRS[name]
    grains: dict[Any, dict[str, str]] = {
        "position": {
            "resid_pre": "resid_pre", "resid_mid": "resid_mid", "attn_out": "attn_out", "mlp_out": "mlp_out",
            "nnsight_resid_post": "resid_post", "nnsight_mlp_out": "mlp_out",
        },
        "head": {site: site for site in ("z", "q", "k", "v", "pattern")},
        "head_position": {"z_by_position": "z"},
    }  # fmt: skip
    clean, corrupted = ORACLE[f"{name}_baselines"].tolist()
    for grain, arrays in grains.items():
        result = activation_patching(*demo, [pair], [answer], sorted(set(arrays.values())), grain)
        assert result["baselines"][0]["clean"] == pytest.approx(clean, abs=1e-4)
        assert result["baselines"][0]["corrupted"] == pytest.approx(corrupted, abs=1e-4)
        for array, site in arrays.items():
            rows = [row for row in result["rows"] if row["site"] == site]
            expected = ORACLE[f"{name}_{array}"]
            if grain == "head_position":
                expected = expected.transpose(0, 2, 1)  # theirs is [layer pos head]
            assert [row["patched"] for row in rows] == pytest.approx(expected.flatten().tolist(), abs=2e-4), array


# ---------------------------------------------------------------------------------------------- known circuits


@pytest.fixture(scope="module")
def words() -> Any:
    return handmade.word_tokenizer()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_induction_circuit_is_found(direction: Any, words: Any) -> None:
    pair = ("plum red blue green red", "plum red gold green red")
    found: dict[tuple[Any, ...], float] = {}
    grains: list[tuple[Any, Any]] = [("position", None), ("head", ["z", "q", "k", "v", "pattern"])]
    for grain, sites in grains:
        result = activation_patching(
            handmade.induction(),
            words,
            [pair],
            [("blue", "gold")],
            sites,
            grain,
            direction,
        )
        for row in result["rows"]:
            assert row["effect"] is not None
            if abs(row["effect"]) > 1e-5:
                found[row["site"], row["layer"], row["head"], row["column"]] = row["effect"]
    # The word after the first `red` is read where it stands, by the values of head 1.0, and written at the last word.
    assert found == pytest.approx(
        {
            ("resid_pre", 0, None, 2): 1.0,
            ("resid_pre", 1, None, 2): 1.0,
            ("attn_out", 1, None, 4): 1.0,
            ("z", 1, 0, None): 1.0,
            ("v", 1, 0, None): 1.0,
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_in_a_linear_model_each_head_has_its_share(direction: Any, words: Any) -> None:
    model = handmade.copies([(0, 0, 1.0), (0, 1, 5.0), (1, 1, 2.0)])
    pair = ("red blue green", "red gold green")
    result = activation_patching(model, words, [pair], [("blue", "gold")], grain="head", direction=direction)
    shares = {(0, 0): 1 / 8, (0, 1): 5 / 8, (1, 0): 0.0, (1, 1): 2 / 8}
    for (layer, head), share in shares.items():
        row = at(result, layer=layer, head=head)
        assert row["effect"] == pytest.approx(share, abs=1e-5)
        assert row["recovered"] == pytest.approx(share if direction == "denoise" else 1 - share, abs=1e-5)


def fact_pairs(n: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Landmarks of different cities, both in the same sentence."""
    names = list(corpus.LANDMARKS)
    usable = list(zip(names, names[8:], strict=False))[:n]
    assert all(corpus.LANDMARKS[a] != corpus.LANDMARKS[b] for a, b in usable)
    pairs = [(corpus.fact_prompt("city", a), corpus.fact_prompt("city", b)) for a, b in usable]
    return pairs, [(corpus.fact_answer("city", a), corpus.fact_answer("city", b)) for a, b in usable]


def test_facts_of_the_demo_model_go_from_the_subject_to_the_end(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(12)
    result = activation_patching(*demo, pairs, answers, ["resid_pre"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["seed"], result["technique"]) == (12, 0, "activation_patching")
    assert [column["differs"] for column in result["columns"]] == [False, True, True, *[False] * 6]
    assert result["baselines"][0]["clean"] > 5 > -5 > result["baselines"][0]["corrupted"]  # type: ignore[operator]
    effect = {(row["layer"], row["column"]): row["effect"] for row in result["rows"]}
    assert all(effect[layer, 0] == 0 for layer in range(4))  # before the subject nothing differs
    assert all(effect[0, column] == 0 for column in range(3, 9))
    assert effect[0, 1] + effect[0, 2] > 0.8  # type: ignore[operator]
    assert effect[3, 8] > 0.3 > 0.01 > abs(effect[1, 8])  # type: ignore[operator, arg-type]
    for row in result["rows"]:
        assert row["low"] <= row["effect"] <= row["high"]  # type: ignore[operator]


def test_the_whole_subject_or_the_whole_stream_brings_the_answer_back(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(6)
    # Another sentence, of another length, in which the subject stands elsewhere.
    pairs += [(a.replace("The", "Guides at the", 1), b.replace("The", "Guides at the", 1)) for a, b in pairs]
    answers += answers
    subjects = [next(name for name in corpus.LANDMARKS if name in clean) for clean, _ in pairs]
    first_words = [name.split()[0] for name in subjects]
    spans = {"subject": subjects, "first word": first_words, "end": ["city of"] * len(subjects)}
    whole = activation_patching(*demo, pairs, answers, ["resid_pre"], spans=spans)
    assert [column["label"] for column in whole["columns"]] == list(spans)
    assert at(whole, layer=0, column=0)["effect"] == pytest.approx(1, abs=1e-5)
    assert at(whole, layer=0, column=1)["effect"] < 0.95  # type: ignore[operator]
    assert at(whole, layer=0, column=2)["effect"] == 0  # there nothing differs yet
    stream = activation_patching(*demo, pairs, answers, ["resid_pre", "resid_post"], "layer")
    assert [row["effect"] for row in stream["rows"]] == pytest.approx([1.0] * 8, abs=1e-5)
    assert [row["low"] for row in stream["rows"]] == pytest.approx([1.0] * 8, abs=1e-5)
    assert "1 by construction" in stream["warnings"][0]


def test_a_patch_that_changes_nothing_stands_beside_one_of_a_longer_prompt(demo: tuple[Any, Any]) -> None:
    (short,), (answer,) = fact_pairs(1)
    long = (short[0].replace("The", "Guides at the"), short[1].replace("The", "Guides at the"))

    def patched(pairs: list[tuple[str, str]], parts: list[str]) -> list[float | None]:
        answers = [answer] * len(pairs)
        rows = activation_patching(*demo, pairs, answers, ["resid_pre"], spans={"part": parts})["rows"]
        return [row["patched"] for row in rows]

    both = patched([short, long], ["The", "the city of"])
    alone = zip(patched([short], ["The"]), patched([long], ["the city of"]), strict=True)
    assert both == pytest.approx([(a + b) / 2 for a, b in alone], abs=1e-4)  # type: ignore[operator]


def test_the_persona_moves_to_the_end_in_one_block_and_past_the_question(demo: tuple[Any, Any]) -> None:
    personas = [
        ("Medical Doctor", "Little Kid"),
        ("Research Chemist", "Young Pupil"),
        ("Senior Engineer", "First Grader"),
    ]
    questions = [question for question in corpus.QUESTIONS if question.text.endswith("?")][:4]
    given = list(itertools.product(personas, questions))
    pairs = [(corpus.persona_prompt(a, question), corpus.persona_prompt(b, question)) for (a, b), question in given]
    spans = {"persona": [a for (a, _), _ in given], "question": ["?"] * len(given), "end": ["Answer:"] * len(given)}
    answers = [(" Therefore", " So")] * len(given)
    result = activation_patching(*demo, pairs, answers, ["resid_pre"], spans=spans)
    assert result["n"] == len(given) == 12
    effect = {(row["layer"], list(spans)[row["column"] or 0]): row["effect"] for row in result["rows"]}
    assert [effect[layer, "persona"] for layer in range(4)] == pytest.approx([1, 1, 0, 0], abs=0.05)
    assert [effect[layer, "end"] for layer in range(4)] == pytest.approx([0, 0, 1, 1], abs=0.05)
    assert [effect[layer, "question"] for layer in range(4)] == pytest.approx([0] * 4, abs=0.02)


# ---------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_of_the_model_is_kept(dtype: torch.dtype, make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    result = activation_patching(model.to(dtype), tokenizer, [(CLEAN, CORRUPTED)], answers, ["resid_pre"], **TINY)
    assert result["dtype"] == str(dtype).removeprefix("torch.")
    ids = [tokenizer(text)["input_ids"] for text in (CORRUPTED, CLEAN)]
    right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in answers[0])
    for row in result["rows"]:
        logits = patched_by_hand(model, ids[0], ids[1], row, [(row["column"], row["column"])])  # type: ignore[list-item]
        tolerance = 1e-6 if dtype == torch.float64 else 0.1
        assert row["patched"] == pytest.approx((logits[right] - logits[wrong]).item(), rel=1e-5, abs=tolerance)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_counts(make_model: Any, tokenizer: Any) -> None:
    plain = make_model("llama")
    model: Any = get_peft_model(plain, LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False)).eval()
    merged = get_peft_model(make_model("llama"), model.peft_config["default"]).eval()
    merged.load_state_dict(model.state_dict())
    merged = merged.merge_and_unload()
    answers = oriented(merged, tokenizer, [(CLEAN, CORRUPTED)])
    rows = [
        activation_patching(m, tokenizer, [(CLEAN, CORRUPTED)], answers, grain="head", **TINY)["rows"]
        for m in (model, merged)
    ]
    assert [row["patched"] for row in rows[0]] == pytest.approx([row["patched"] for row in rows[1]], abs=1e-4)


def test_weights_that_lie_on_disk(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])

    def effects() -> list[float | None]:
        sites = ["resid_pre", "mlp_out"]
        return [
            row["effect"]
            for row in activation_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, sites, **TINY)["rows"]
        ]

    before = effects()
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert effects() == pytest.approx(before, abs=1e-5)


def test_nothing_is_left_behind_by_an_interrupt(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = 0

    def stop(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == last_run:
            raise KeyboardInterrupt

    def patch() -> None:
        activation_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, None, "head", **TINY)

    patch()  # proves the model's sites, which is done once
    last_run = 0
    handle = model.transformer.h[2].mlp.register_forward_hook(stop)
    patch()
    last_run, runs = runs, 0
    with pytest.raises(KeyboardInterrupt):
        patch()
    handle.remove()
    assert last_run > 3  # it came in the sweep, not in a run without a patch
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
    )
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_seed_decides_the_interval(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(5)
    first, again, other = (
        activation_patching(*demo, pairs, answers, ["attn_out"], "layer", seed=seed)["rows"] for seed in (0, 0, 1)
    )
    assert first == again
    assert [row["low"] for row in first] != [row["low"] for row in other]
    assert [row["effect"] for row in first] == [row["effect"] for row in other]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grain": "neuron"}, "grain is 'neuron'; expected one of position, layer, head, head_position"),
        ({"direction": "both"}, 'direction is \'both\'; expected "denoise" or "noise"'),
        ({"metrics": ["kl"]}, r"metrics is \['kl'\]; expected a list of some of logit_diff, logprob, rank"),
        ({"metrics": []}, r"metrics is \[\]"),
        ({"sites": ["z"]}, r"sites is \['z'\]; expected a list of some of resid_pre, .* for the grain 'position'"),
        ({"sites": ["resid_pre"], "grain": "head"}, r"sites is \['resid_pre'\]; expected .* z, q, k, v, pattern"),
        ({"sites": "z", "grain": "head"}, "sites is 'z'"),
        ({"spans": {"s": ["cat"]}, "grain": "head"}, "spans were given with the grain 'head'"),
        ({"min_gap": 1e6}, "No pair of 1 has a gap to be recovered"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    with pytest.raises(ValueError, match=message):
        activation_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, **{**TINY, **options})


def test_a_site_that_the_model_lacks_is_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt_neox")
    with pytest.raises(UnsupportedModelError, match="has no resid_mid"):
        activation_patching(model, tokenizer, [(CLEAN, CORRUPTED)], [("to", "dog")], ["resid_mid"], min_gap=1e-9)


def test_patterns_of_unequal_prompts_are_refused(make_model: Any, tokenizer: Any) -> None:
    model, pair = make_model("gpt2"), ("the cat sat on a mat", "dog ran a mat")
    answers = oriented(model, tokenizer, [pair])
    with pytest.raises(ValueError, match="The site 'pattern' was asked for with prompts of unequal length"):
        activation_patching(model, tokenizer, [pair], answers, ["z", "pattern"], "head", align="end", **TINY)


def test_broken_weights_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        activation_patching(model, tokenizer, [(CLEAN, CORRUPTED)], [("to", "dog")], **TINY)


def test_groups_of_pairs_give_the_same_rows(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, answers = fact_pairs(5)
    whole = activation_patching(*demo, pairs, answers, ["mlp_out"])
    monkeypatch.setattr(_pairs, "CHUNK_ROWS", 2)
    groups = activation_patching(*demo, pairs, answers, ["mlp_out"])
    for row, same in zip(groups["rows"], whole["rows"], strict=True):
        assert row["effect"] == pytest.approx(same["effect"], abs=1e-5)
        assert row["low"] == pytest.approx(same["low"], abs=1e-5)


def test_pairs_left_out_are_told(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(3)
    pairs[0] = (pairs[0][0], pairs[0][1] + " of")
    result = activation_patching(
        *demo, [*pairs, (pairs[1][0], pairs[1][0])], [*answers, answers[1]], ["attn_out"], "layer"
    )
    assert [left_out["pair"] for left_out in result["excluded"]] == [0, 3]
    assert [pair["pair"] for pair in result["pairs"]] == [1, 2]
    assert result["warnings"] == ["2 pairs were left out; `excluded` says why."]


def test_a_full_name_stands_for_its_layer(demo: tuple[Any, Any]) -> None:
    pairs, answers = contrasts.ioi_pairs(2)
    named = activation_patching(*demo, pairs, answers, ["blocks.1.attn.hook_z"], "head")
    every = activation_patching(*demo, pairs, answers, ["z"], "head")
    assert named["sites"] == ["z"]
    assert [row["effect"] for row in named["rows"]] == [row["effect"] for row in every["rows"] if row["layer"] == 1]
