"""Finding a decoder's parts, checked against module paths written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertLMHeadModel

from techniques._model import UnsupportedModelError, find_decoder, logits_at, record_inputs
from techniques._tokens import pad
from techniques.generate_text import generate_text

# PEFT asks transformers 5 for an attribute under its older name.
uses_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_parts_are_the_known_ones(architecture: str, make_model: Any, blocks_of: Any, final_norm_of: Any) -> None:
    model = make_model(architecture)
    found = find_decoder(model)
    assert found.blocks is blocks_of(architecture, model)
    assert found.ln_final is final_norm_of(architecture, model)
    assert found.unembed is model.get_output_embeddings()


@pytest.mark.parametrize("given", ["gpt2", None])
def test_what_is_no_model_is_refused(given: Any, tokenizer: Any) -> None:
    for wrong in (given, tokenizer):
        with pytest.raises(ValueError, match=f"The model is of the type {type(wrong).__name__}; expected a loaded"):
            find_decoder(wrong)
        with pytest.raises(
            ValueError, match=r"Pass the model first, then its tokenizer; of a wrapper, the plain model"
        ):
            generate_text(wrong, tokenizer, "the cat")


def test_what_is_no_tokenizer_is_refused(make_model: Any, tokenizer: Any) -> None:
    wrongs: tuple[Any, ...] = (make_model("gpt2"), None)
    for wrong in wrongs:
        with pytest.raises(
            ValueError, match=f"The tokenizer is of the type {type(wrong).__name__}; expected a Hugging"
        ):
            generate_text(tokenizer, wrong, "the cat")


@pytest.mark.parametrize(
    ("family", "options", "n_heads", "n_kv_heads", "d_head"),
    [
        ("gpt2", {}, 2, 2, 8),
        ("llama", {"num_attention_heads": 4}, 4, 2, 4),
        ("gemma2", {"num_attention_heads": 4}, 4, 2, 8),
        ("phi3", {"num_attention_heads": 4}, 4, 2, 4),
        ("falcon", {}, 2, 1, 8),
        ("falcon", {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2}, 4, 2, 4),
    ],
)
def test_sizes_are_those_of_the_config(
    family: str, options: dict[str, Any], n_heads: int, n_kv_heads: int, d_head: int, make_model: Any
) -> None:
    found = find_decoder(make_model(family, **options))
    assert (found.n_layers, found.d_model, found.d_vocab) == (3, 16, 10)
    assert (found.n_heads, found.n_kv_heads, found.d_head) == (n_heads, n_kv_heads, d_head)
    assert found.embed is not found.unembed


@uses_peft
@pytest.mark.parametrize(
    ("family", "targets", "norm"), [("llama", ["q_proj", "embed_tokens"], "norm"), ("gpt2", ["c_attn", "wte"], "ln_f")]
)
def test_parts_are_found_under_an_adapter_that_wraps_embedding_and_norm(
    family: str, targets: list[str], norm: str, make_model: Any, blocks_of: Any, final_norm_of: Any
) -> None:
    model = make_model(family)
    config = LoraConfig(target_modules=targets, modules_to_save=[norm], fan_in_fan_out=family == "gpt2")
    adapted: Any = get_peft_model(model, config)
    found = find_decoder(adapted)
    assert found.blocks is blocks_of(family, model)
    assert found.ln_final is final_norm_of(family, model)
    assert "ModulesToSave" in type(found.ln_final).__name__


def test_base_model_without_unembedding_is_refused(make_model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no token embedding.*AutoModelForCausalLM"):
        find_decoder(make_model("llama").model)


def test_encoder_decoder_is_refused() -> None:
    config = BartConfig(
        vocab_size=10,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        forced_eos_token_id=None,
    )
    with pytest.raises(UnsupportedModelError, match="decoder-only language model was expected"):
        find_decoder(BartForConditionalGeneration(config))


def test_model_of_another_build_is_refused() -> None:
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel has no token embedding beside a list of 2 blocks"):
        find_decoder(BertLMHeadModel(config))


def test_hooks_are_removed_when_the_forward_pass_fails(make_model: Any) -> None:
    model = make_model("llama")
    n_hooks = []

    def fail() -> None:
        with record_inputs(model.model.layers, lambda hidden: hidden):
            n_hooks.append(sum(len(module._forward_pre_hooks) for module in model.modules()))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert n_hooks == [len(model.model.layers)]
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.inference_mode()
def test_logits_at_points_equal_those_of_a_full_pass(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    ids = [[1, 2, 3, 4, 5], [6, 7]]
    rows, positions = torch.tensor([0, 1, 0]), torch.tensor([3, 1, 0])
    own = logits_at(model, pad(ids, "right", 0, model.device), rows, positions)
    full = [model(torch.tensor([row])).logits[0] for row in ids]
    torch.testing.assert_close(own, torch.stack([full[0][3], full[1][1], full[0][0]]), rtol=1e-4, atol=1e-5)


@uses_peft
@pytest.mark.parametrize("with_adapter", [False, True])
@torch.inference_mode()
def test_only_the_asked_positions_are_unembedded(with_adapter: bool, make_model: Any) -> None:
    model = make_model("llama")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if with_adapter else model
    logits_at(adapted, pad([[1, 2, 3, 4, 5]], "right", 0, model.device), torch.tensor([0]), torch.tensor([4]))
    assert shapes == [(1, 1, 10)]
