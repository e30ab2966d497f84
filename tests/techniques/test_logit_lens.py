"""The oracle: depth d of the lens is the model with the blocks from d on cut off."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from techniques import _lens as module
from techniques._model import Decoder, UnsupportedModelError
from techniques.logit_lens import LogitLens, logit_lens

PROMPT = "the cat sat on a mat"
SHORT = "a dog ran"
D_VOCAB = 10
N_LAYERS = 3
# PEFT asks transformers 5 for an attribute under its older name.
uses_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def lens_logprobs(result: LogitLens, prompt: int = 0) -> Tensor:
    """The whole distributions, [depth, pos, d_vocab], from rows that list all of the vocabulary."""
    n_positions = len(result["prompts"][prompt]["positions"])
    filled = torch.full((result["n_layers"] + 1, n_positions, D_VOCAB), math.nan, dtype=torch.float64)
    where = {position: i for i, position in enumerate(result["prompts"][prompt]["positions"])}
    for row in result["rows"]:
        if row["prompt"] == prompt:
            for token in row["top"]:
                filled[row["depth"], where[row["position"]], token["id"]] = token["logprob"]
    return filled


def cut_logprobs(model: Any, blocks_of: Any, architecture: str, ids: list[int]) -> Tensor:
    """The same from N_LAYERS + 1 models of which the last blocks were deleted."""
    logprobs = []
    for depth in range(N_LAYERS + 1):
        cut = copy.deepcopy(model)
        del blocks_of(architecture, cut)[depth:]
        cut.config.num_hidden_layers = depth
        with torch.inference_mode():
            logprobs.append(cut(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1))
    return torch.stack(logprobs)


def test_every_depth_equals_the_model_cut_there(
    architecture: str, make_model: Any, tokenizer: Any, blocks_of: Any
) -> None:
    model = make_model(architecture)
    result = logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB)
    expected = cut_logprobs(model, blocks_of, architecture, tokenizer(PROMPT)["input_ids"])
    torch.testing.assert_close(lens_logprobs(result), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_prompts_alone(architecture: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(architecture)
    both = logit_lens(model, tokenizer, [SHORT, PROMPT], top_k=D_VOCAB)
    for i, prompt in enumerate([SHORT, PROMPT]):
        alone = lens_logprobs(logit_lens(model, tokenizer, prompt, top_k=D_VOCAB))
        torch.testing.assert_close(lens_logprobs(both, i), alone, rtol=1e-4, atol=1e-5)


def test_double_precision_is_kept(make_model: Any, tokenizer: Any, blocks_of: Any) -> None:
    model = make_model("gpt2").double()
    result = logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB)
    expected = cut_logprobs(model, blocks_of, "gpt2", tokenizer(PROMPT)["input_ids"])
    torch.testing.assert_close(lens_logprobs(result), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bfloat16_model(family: str, make_model: Any, tokenizer: Any, blocks_of: Any) -> None:
    model = make_model(family).bfloat16()
    result = logit_lens(model, tokenizer, [PROMPT, SHORT], top_k=D_VOCAB)
    expected = cut_logprobs(model, blocks_of, family, tokenizer(PROMPT)["input_ids"])
    torch.testing.assert_close(lens_logprobs(result), expected, rtol=0.02, atol=0.1)


def test_entropy_divergence_and_targets_follow_from_the_distributions(
    make_model: Any, tokenizer: Any, blocks_of: Any
) -> None:
    model = make_model("qwen2")
    result = logit_lens(model, tokenizer, PROMPT, targets=["mat", "dog"], top_k=2)
    expected = cut_logprobs(model, blocks_of, "qwen2", tokenizer(PROMPT)["input_ids"])
    assert [target["token"] for target in result["rows"][0]["targets"]] == ["mat", "dog"]
    assert len(result["rows"]) == (N_LAYERS + 1) * 6
    for row in result["rows"]:
        logprobs, final = expected[row["depth"], row["position"]], expected[-1, row["position"]]
        assert row["entropy"] == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-4)
        assert row["kl_to_final"] == pytest.approx((final.exp() * (final - logprobs)).sum().item(), abs=1e-4)
        assert [token["rank"] for token in row["top"]] == [1, 2]
        for target in row["targets"]:
            assert target["logprob"] == pytest.approx(logprobs[target["id"]].item(), abs=1e-4)
            assert target["prob"] == pytest.approx(math.exp(target["logprob"]))
            assert target["rank"] == 1 + int((logprobs > logprobs[target["id"]]).sum())


def test_positions_count_in_each_prompt_and_keep_their_order(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    whole = logit_lens(model, tokenizer, [PROMPT, SHORT])
    part = logit_lens(model, tokenizer, [PROMPT, SHORT], positions=[-1, 0])
    assert [prompt["positions"] for prompt in part["prompts"]] == [[5, 0], [2, 0]]
    rows = {(row["prompt"], row["position"], row["depth"]): row for row in whole["rows"]}
    assert len(part["rows"]) == 4 * (N_LAYERS + 1)
    for row in part["rows"]:
        same = rows[row["prompt"], row["position"], row["depth"]]
        assert row["top"][0]["id"] == same["top"][0]["id"]
        assert row["entropy"] == pytest.approx(same["entropy"], abs=1e-5)


def test_small_chunks_give_the_same_rows(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2")
    whole = logit_lens(model, tokenizer, [PROMPT, SHORT], targets=["mat"], top_k=D_VOCAB)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, output: sizes.append(output.numel() // D_VOCAB))
    chunked = logit_lens(model, tokenizer, [PROMPT, SHORT], targets=["mat"], top_k=D_VOCAB)
    assert sizes[1:] == [N_LAYERS + 1] * 9  # after the model's own pass: one point at a time
    for i in range(2):
        torch.testing.assert_close(lens_logprobs(chunked, i), lens_logprobs(whole, i), rtol=1e-4, atol=1e-5)
    orders = [[(row["prompt"], row["position"], row["depth"]) for row in result["rows"]] for result in [whole, chunked]]
    assert orders[0] == orders[1] == sorted(orders[0])


@uses_peft
@pytest.mark.parametrize(("family", "target"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_adapter_equals_the_merged_model(family: str, target: str, make_model: Any, tokenizer: Any) -> None:
    plain = make_model(family)
    before = lens_logprobs(logit_lens(plain, tokenizer, PROMPT, top_k=D_VOCAB))
    config = LoraConfig(target_modules=[target], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    model: Any = get_peft_model(plain, config).eval()
    adapted = lens_logprobs(logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB))
    merged = lens_logprobs(logit_lens(copy.deepcopy(model).merge_and_unload(), tokenizer, PROMPT, top_k=D_VOCAB))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (adapted - before).abs()[1:].max() > 1e-3, "the adapter had no effect, so the test says nothing"


def test_weights_that_lie_on_disk(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    before = lens_logprobs(logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB))
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    after = lens_logprobs(logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_model_is_left_as_it_was(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logit_lens(model, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="top_k is 11"):  # found only after the pass
        logit_lens(model, tokenizer, PROMPT, top_k=11)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")


@pytest.mark.parametrize(
    "broken",
    [
        lambda decoder, resid: decoder.unembed(resid),
        lambda decoder, resid: decoder.unembed(decoder.ln_final(decoder.ln_final(resid))),
        lambda decoder, resid: decoder.unembed(decoder.ln_final(resid)),
        lambda decoder, resid: decoder.unembed(decoder.ln_final(resid)).tanh() * 2 * decoder.soft_cap,
    ],
    ids=["no norm", "norm twice", "no soft cap", "wrong soft cap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_head_is_noticed(
    broken: Any, dtype: torch.dtype, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gemma2").to(dtype)
    logit_lens(model, tokenizer, PROMPT)
    monkeypatch.setattr(Decoder, "logits", broken)
    with pytest.raises(UnsupportedModelError, match="differs from the model's own logits"):
        logit_lens(model, tokenizer, PROMPT)


def test_a_block_that_stands_at_two_depths(make_model: Any, tokenizer: Any, blocks_of: Any) -> None:
    model = make_model("llama")
    model.model.layers[2] = model.model.layers[0]
    result = logit_lens(model, tokenizer, PROMPT, top_k=D_VOCAB)
    expected = cut_logprobs(model, blocks_of, "llama", tokenizer(PROMPT)["input_ids"])
    torch.testing.assert_close(lens_logprobs(result), expected, rtol=1e-4, atol=1e-5)


def test_model_that_loops_through_its_blocks_is_refused(
    make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    once = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: (once(*args, **kwargs), once(*args, **kwargs))[1]
    )
    with pytest.raises(UnsupportedModelError, match=r"3 blocks and final norm 8 times .* expected once each"):
        logit_lens(model, tokenizer, PROMPT)


def test_head_that_scales_its_logits_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"GraniteForCausalLM: .* nats; .* does more than final norm"):
        logit_lens(make_model("granite", logits_scaling=8.0), tokenizer, PROMPT)


@uses_peft
def test_prompt_tuning_is_refused(make_model: Any, tokenizer: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model: Any = get_peft_model(make_model("gpt2"), config).eval()
    with pytest.raises(UnsupportedModelError, match=r"shape \(1, 8, 16\) for tokens of shape \(1, 6\)"):
        logit_lens(model, tokenizer, PROMPT)


def test_broken_weights_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="not all finite"):
        logit_lens(model, tokenizer, PROMPT)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "The text '' has no tokens"),
        ([], {}, "list of texts is empty"),
        ("the " * 65, {}, "The longest text has 65 tokens, but the model's context holds 64"),
        (PROMPT, {"positions": [6]}, "Position 6 is outside the text 'the cat sat on a mat', which has 6 tokens"),
        (PROMPT, {"positions": []}, "positions is empty"),
        (PROMPT, {"targets": ["cat mat"]}, r"The target 'cat mat' is 2 tokens, \['cat', 'mat'\]; expected one"),
        (PROMPT, {"top_k": 0}, "top_k is 0; expected 1 to 10"),
    ],
)
def test_bad_arguments_are_refused(
    prompt: Any, options: dict[str, Any], message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        logit_lens(make_model("gpt2"), tokenizer, prompt, **options)


def test_the_fact_emerges_with_depth(demo: tuple[Any, Any]) -> None:
    result = logit_lens(*demo, "The Eiffel Tower is located in the city of", targets=[" Paris"], positions=[-1])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    paris = [row["targets"][0] for row in result["rows"]]
    assert result["rows"][-1]["top"][0]["token"] == " Paris"
    assert paris[0]["prob"] < 0.1 < 0.9 < paris[-1]["prob"]
    assert result["rows"][-1]["kl_to_final"] == 0 < result["rows"][0]["kl_to_final"]


def test_a_string_for_the_targets_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="targets is the string 'cat'; expected a list"):
        logit_lens(make_model("gpt2"), tokenizer, "the cat", targets="cat")
