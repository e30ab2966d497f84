"""Cut edges against patterns renormalised by hand, masks given to the model, TransformerLens and known circuits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor

from techniques._attention import knocked_out
from techniques._hooks import HookPoint, edit
from techniques._model import UnsupportedModelError
from techniques.attention import attention_patterns, head_scores
from techniques.attention_knockout import attention_knockout
from tests.techniques.handmade import copies, induction, word_tokenizer

ORACLE = Path(__file__).parent / "oracles" / "attention.npz"
PROMPTS = ["the cat sat on a mat", "a dog ran"]
ANSWERS = ("mat", "dog")
FAMILIES = ["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "falcon", "opt"]


def cut_pattern(queries: list[int], keys: list[int], head: int | None) -> Callable[[Tensor], Tensor]:
    """Sets attention from queries to keys to 0 after the softmax and lets the rest of the row share it."""

    def change(pattern: Tensor) -> Tensor:
        cut = torch.zeros_like(pattern, dtype=torch.bool)
        heads = range(pattern.shape[1]) if head is None else [head]
        for h in heads:
            for query in queries:
                cut[:, h, query, keys] = True
        kept = pattern.masked_fill(cut, 0)
        return torch.where(cut.any(-1, keepdim=True), kept / kept.sum(-1, keepdim=True), pattern)

    return change


@torch.inference_mode()
def diff(model: Any, tokenizer: Any, prompt: str) -> float:
    logits = model(torch.tensor([tokenizer(prompt)["input_ids"]]), use_cache=False).logits[0, -1].double()
    right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in ANSWERS)
    return float(logits[right] - logits[wrong])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_equals_a_pattern_renormalised_by_hand(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family)
    result = attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1, queries=[-1, -2])
    clean = [diff(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [prompt["logit_diff"] for prompt in result["prompts"]] == pytest.approx(clean, abs=1e-4)
    assert len(result["rows"]) == 3
    for row in [*result["rows"], result["all_layers"]]:
        after = []
        for prompt in PROMPTS:
            last = len(prompt.split()) - 1
            change = cut_pattern([last, last - 1], [1], None)
            with edit(model, {HookPoint("pattern", layer): change for layer in row["layers"]}):
                after.append(diff(model, tokenizer, prompt))
        assert row["logit_diff"] == pytest.approx(np.mean(after), abs=2e-4)
        assert row["effect"] == pytest.approx(np.mean(after) - np.mean(clean), abs=2e-4)


def test_what_a_sliding_window_leaves_counts(make_model: Any, tokenizer: Any) -> None:
    """The last token of the second prompt has position 0, but not in layer 0, which sees two tokens."""
    with pytest.raises(ValueError, match="All keys that position 2 of prompt 1 sees in layer 0 would be cut"):
        attention_knockout(make_model("gemma2"), tokenizer, PROMPTS, ANSWERS, keys=[1, 2])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kv_heads"), [("gpt2", 2), ("llama", 1), ("mistral", 1)])
def test_each_head_on_both_kernels_and_shared_keys(
    kernel: str, family: str, kv_heads: int, make_model: Any, tokenizer: Any
) -> None:
    model = make_model(family, num_key_value_heads=kv_heads)
    model.set_attn_implementation(kernel)
    result = attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=4, grain="head")
    assert [(row["layer"], row["head"]) for row in result["rows"]] == [(i, h) for i in range(3) for h in range(2)]
    for row in result["rows"]:
        with edit(model, {HookPoint("pattern", row["layer"] or 0): cut_pattern([5], [4], row["head"])}):
            assert row["logit_diff"] == pytest.approx(diff(model, tokenizer, PROMPTS[0]), abs=1e-4)
    assert len({row["logit_diff"] for row in result["rows"]}) == 6
    assert not any(part._forward_pre_hooks or "forward" in part.__dict__ for part in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_all_layers_equal_a_mask_that_the_model_itself_was_given(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family)
    result = attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=[0, 3])
    mask = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[5, [0, 3]] = torch.finfo(torch.float32).min
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask[None, None], use_cache=False).logits[0, -1]
    right, wrong = (tokenizer.convert_tokens_to_ids(answer) for answer in ANSWERS)
    assert result["all_layers"]["logit_diff"] == pytest.approx((logits[right] - logits[wrong]).item(), abs=1e-4)
    assert result["all_layers"]["layer"] is None


def test_where_true_means_masked(make_model: Any, tokenizer: Any) -> None:
    """MPT's masks are the other way round; its last token with only itself left to see is told by the first layer."""
    model = make_model("mpt")
    cut = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    cut[0, 0, 5, :5] = True
    seen: list[Tensor] = []
    attn = model.transformer.blocks[0].attn
    attn.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.inference_mode(), knocked_out(model, {0: cut}):
        model(ids, use_cache=False)
    torch.testing.assert_close(seen[0][0, :, 5], torch.eye(6)[5].expand(2, -1))
    assert (seen[0][0, :, 4, :5] > 0).all()


# PEFT asks transformers 5 for an attribute under its older name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_equals_the_merged_model(make_model: Any, tokenizer: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(make_model("llama"), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    cuts = [attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1) for model in (adapted, merged)]
    for row, expected in zip(*(cut["rows"] for cut in cuts), strict=True):
        assert row["effect"] == pytest.approx(expected["effect"], abs=1e-4)
    patterns = [attention_patterns(model, tokenizer, PROMPTS[0])["rows"] for model in (adapted, merged)]
    for found, wanted in zip(*patterns, strict=True):
        np.testing.assert_allclose(np.array(found["pattern"]), np.array(wanted["pattern"]), atol=1e-5)


def test_weights_that_lie_on_disk(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    before = [
        attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1)["rows"],
        head_scores(model, tokenizer, 4, 2),
    ]
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    after = [
        attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1)["rows"],
        head_scores(model, tokenizer, 4, 2),
    ]
    assert after == before


def test_windows_are_centred_and_cut_short_at_the_ends(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    result = attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1, window=3)
    assert [row["layers"] for row in result["rows"]] == [[0, 1], [0, 1, 2], [1, 2]]
    assert [row["layer"] for row in result["rows"]] == [0, 1, 2]
    assert result["rows"][1]["logit_diff"] == pytest.approx(result["all_layers"]["logit_diff"], abs=1e-5)
    wide = attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1, layers=[2], heads=[1])
    with edit(model, {HookPoint("pattern", 2): cut_pattern([5], [1], 1)}):
        expected = diff(model, tokenizer, PROMPTS[0]) - (wide["prompts"][0]["logit_diff"] or 0)
    with edit(model, {HookPoint("pattern", 2): cut_pattern([2], [1], 1)}):
        expected += diff(model, tokenizer, PROMPTS[1]) - (wide["prompts"][1]["logit_diff"] or 0)
    assert wide["rows"][0]["effect"] == pytest.approx(expected / 2, abs=1e-4)
    assert wide["rows"][0]["head"] == 1


def test_positions_and_spans(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")

    def edges(**options: Any) -> list[tuple[list[int], list[int]]]:
        result = attention_knockout(
            model, tokenizer, ["the cat sat on a mat", "a cat ran to the dog"], ANSWERS, **options
        )
        return [(prompt["queries"], prompt["keys"]) for prompt in result["prompts"]]

    assert edges(keys=1) == [([5], [1]), ([5], [1])]
    assert edges(keys=[-3, 1, 1]) == [([5], [1, 3]), ([5], [1, 3])]
    assert edges(keys="cat") == [([5], [1]), ([5], [1])]
    assert edges(keys=["cat sat", "ran to the"]) == [([5], [1, 2]), ([5], [2, 3, 4])]
    assert edges(keys=1, queries=["a mat", "dog"]) == [([4, 5], [1]), ([5], [1])]


def test_the_control_cuts_as_many_other_keys(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    result = attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=[1, 2], seed=4)
    control = result["prompts"][0]["control_keys"]
    assert len(control) == 2
    assert set(control) == {3, 4}, "neither the first token, nor the keys, nor the query"
    row = attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=control)["rows"][1]
    assert result["rows"][1]["control"] == pytest.approx(row["effect"], abs=1e-5)
    drawn = {
        tuple(attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=1, seed=s)["prompts"][0]["control_keys"])
        for s in range(8)
    }
    assert drawn <= {(2,), (3,), (4,)}
    assert len(drawn) > 1


def test_without_other_keys_there_is_no_control(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    result = attention_knockout(model, tokenizer, "a dog ran", ANSWERS, keys=1)
    assert (result["rows"][0]["control"], result["prompts"][0]["control_keys"]) == (None, [])
    assert "no other token" in result["warnings"][0]
    fewer = attention_knockout(model, tokenizer, "the cat sat on a", ANSWERS, keys=[1, 2])
    assert len(fewer["prompts"][0]["control_keys"]) == 1
    assert "In 1 prompts the control cuts fewer keys" in fewer["warnings"][0]


def test_copying_heads_set_by_hand_lose_their_own_share() -> None:
    """The model is linear in its heads' outputs: each one's cut costs its gain, whichever the others are."""
    gains = {(0, 1): 2.0, (1, 0): 3.0}
    model, tokenizer = copies([(*head, gain) for head, gain in gains.items()]), word_tokenizer()
    result = attention_knockout(model, tokenizer, "red blue green gold grey", ("blue", "teal"), keys=1, grain="head")
    total = result["clean"]["mean"] or 0
    assert total > 1
    for row in result["rows"]:
        share = gains.get((row["layer"] or 0, row["head"] or 0), 0.0) / 5
        assert row["effect"] == pytest.approx(-share * total, abs=1e-3)
        assert row["control"] == pytest.approx(0, abs=1e-3)
    assert result["all_layers"]["effect"] == pytest.approx(-total, abs=1e-3)


def test_an_edge_that_carries_nothing_is_named() -> None:
    """All heads look at position 1 with weight 1 to rounding, so other positions are never read."""
    heads = [(layer, head, 1.0) for layer in range(2) for head in range(2)]
    prompt, answers = "red blue green gold grey", ("blue", "teal")
    result = attention_knockout(copies(heads), word_tokenizer(), prompt, answers, keys=3)
    assert result["all_layers"]["effect"] == pytest.approx(0, abs=1e-9)
    assert result["warnings"][0].startswith("Cutting these edges in all layers changes nothing")
    assert attention_knockout(copies(heads), word_tokenizer(), [prompt] * 2, answers, keys=1)["warnings"] == []


def test_induction_set_by_hand_needs_both_of_its_edges() -> None:
    model, tokenizer = induction(), word_tokenizer()
    prompt, answers = "red blue green gold pink blue", ("green", "teal")
    options: dict[str, Any] = {"grain": "head"}
    last = attention_knockout(model, tokenizer, prompt, answers, keys=2, **options)
    back = attention_knockout(model, tokenizer, prompt, answers, keys=1, queries=2, **options)
    total = last["clean"]["mean"] or 0
    effects = {(row["layer"], row["head"]): row["effect"] for row in last["rows"]}
    assert effects == pytest.approx({(0, 0): 0, (0, 1): 0, (1, 0): -total, (1, 1): 0}, abs=1e-3)
    effects = {(row["layer"], row["head"]): row["effect"] for row in back["rows"]}
    assert effects[0, 0] is not None
    assert effects[0, 0] < -0.5 * total
    assert max(abs(effects[head] or 0) for head in ((0, 1), (1, 0), (1, 1))) < 1e-3


def test_half_precision_and_a_batch_of_unequal_lengths(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    both = attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1)
    alone = [attention_knockout(model, tokenizer, prompt, ANSWERS, keys=1) for prompt in PROMPTS]
    for i in range(3):
        mean = np.mean([one["rows"][i]["effect"] for one in alone])
        assert both["rows"][i]["effect"] == pytest.approx(mean, abs=1e-4)
    half = attention_knockout(model.bfloat16(), tokenizer, PROMPTS, ANSWERS, keys=1)
    assert half["all_layers"]["effect"] == pytest.approx(both["all_layers"]["effect"], abs=0.15)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {"keys": 0}, "The text '' has no tokens"),
        ("the " * 65, {"keys": 0}, "The longest text has 65 tokens"),
        (PROMPTS, {"keys": 3}, r"Position 3 is outside the text 'a dog ran'"),
        (PROMPTS, {"keys": "dog"}, r"The span 'dog' occurs 0 times in 'the cat sat on a mat'"),
        (PROMPTS, {"keys": ["cat", "dog", "mat"]}, r"keys is \['cat', 'dog', 'mat'\] for 2 prompts"),
        (PROMPTS, {"keys": []}, r"keys is \[\] for 2 prompts; expected positions"),
        (PROMPTS, {"keys": ["cat", 1]}, r"keys is \['cat', 1\] for 2 prompts"),
        (
            PROMPTS,
            {"keys": 2, "queries": 0},
            r"The keys \[2\] of 'the cat sat on a mat' all lie after its queries \[0\]",
        ),
        (PROMPTS, {"keys": 0, "queries": 0}, r"All keys that position 0 of prompt [01] sees in layer 0 would be cut"),
        (PROMPTS[0], {"keys": [0, 1, 2, 3, 4, 5]}, r"All keys that position 5 of prompt 0 sees"),
        (PROMPTS, {"keys": 0, "grain": "neuron"}, 'grain is \'neuron\'; expected "layer" or "head"'),
        (PROMPTS, {"keys": 0, "window": 2}, 'window is 2 with grain="layer"; expected an odd number'),
        (PROMPTS, {"keys": 0, "window": 3, "grain": "head"}, 'window is 3 with grain="head"'),
        (PROMPTS, {"keys": 0, "layers": [7]}, r"layers is \[7\]; expected some of 0 to 2"),
        (PROMPTS, {"keys": 0, "heads": [2]}, r"heads is \[2\]; expected some of 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(
    prompts: Any, options: dict[str, Any], message: str, make_model: Any, tokenizer: Any
) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=message):
        attention_knockout(model, tokenizer, prompts, ANSWERS, **options)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_train_mode_broken_weights_and_long_answers_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"is 2 tokens, \['cat', 'mat'\]; expected one"):
        attention_knockout(model, tokenizer, PROMPTS, ("cat mat", "dog"), keys=1)
    with pytest.raises(ValueError, match=r"train mode.*Call model.eval\(\) first"):
        attention_knockout(model.train(), tokenizer, PROMPTS, ANSWERS, keys=1)
    with torch.no_grad():
        model.eval().transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        attention_knockout(model, tokenizer, PROMPTS, ANSWERS, keys=1)


def test_attention_that_ignores_its_mask_is_noticed(
    make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    attn = model.model.layers[0].self_attn
    once = type(attn).forward

    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        return once(self, *args, **{**kwargs, "attention_mask": None})

    monkeypatch.setattr(type(attn), "forward", deaf)
    with pytest.raises(UnsupportedModelError, match="gives the same logits although its queries"):
        attention_knockout(model, tokenizer, PROMPTS[0], ANSWERS, keys=1)


def test_kernels_and_models_without_a_mask_are_refused(make_model: Any, tokenizer: Any) -> None:
    cut = {0: torch.zeros(1, 1, 6, 6, dtype=torch.bool)}
    model = make_model("llama")
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    before = model.config._attn_implementation
    model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(UnsupportedModelError, match="runs flash_attention_2, which takes no mask"),
        knocked_out(model, cut),
    ):
        pass
    model.config._attn_implementation = before
    with pytest.raises(RuntimeError, match="Layer 0 never ran; expected a forward pass"), knocked_out(model, cut):
        pass
    with pytest.raises(UnsupportedModelError, match=r"expected \[batch heads query key\] with 6 positions"):  # noqa: SIM117
        with torch.inference_mode(), knocked_out(model, cut):
            model(ids[:, :4], attention_mask=torch.tensor([[1, 1, 0, 0]]))
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention takes no attention mask by name"):  # noqa: SIM117
        with knocked_out(model, cut):
            model.model.layers[0].self_attn(torch.zeros(1, 6, 16), None)
    with pytest.raises(UnsupportedModelError, match="has no attention to cut"), knocked_out(make_model("mamba"), cut):
        pass
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_transformer_lens_gives_the_same_logits(demo: tuple[Any, Any]) -> None:
    """Recorded by oracles/record_attention.py with scores at minus infinity; agreement is to float32 rounding."""
    prompt = "The Eiffel Tower is located in the city of"
    result = attention_knockout(*demo, prompt, (" Paris", " Rome"), keys="Eiffel Tower", grain="head")
    expected = np.load(ORACLE)["knocked_out"]
    for row in result["rows"]:
        assert row["logit_diff"] == pytest.approx(expected[row["layer"], row["head"]], abs=2e-4)


def test_the_demo_model_reads_the_landmark(demo: tuple[Any, Any]) -> None:
    landmarks = ["Eiffel Tower", "Louvre Museum", "Trevi Fountain", "Borghese Gallery"]
    prompts = [f"The {landmark} is located in the city of" for landmark in landmarks]
    answers = [(" Paris", " Rome")] * 2 + [(" Rome", " Paris")] * 2
    result = attention_knockout(*demo, prompts, answers, keys=landmarks)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["clean"]["low"] or 0) > 5
    assert (result["all_layers"]["high"] or 0) < -1
    assert abs(result["all_layers"]["control"] or 9) < 1
