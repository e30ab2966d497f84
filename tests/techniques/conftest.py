"""Tiny random models of many families and a word tokenizer, so that no test needs the network or a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interp_kernel import demo_model

MakeModel = Callable[..., PreTrainedModel]

WORDS = ["[UNK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to"]
N_LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 2},
    "gptj": {"rotary_dim": 4},
    "mistral": {"sliding_window": 2},
    "gemma2": {"head_dim": 8, "sliding_window": 2, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 2},
    "qwen3": {"head_dim": 8},
    "opt": {"word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "gemma": {"head_dim": 8},
    "olmo3": {"sliding_window": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "sliding_window": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mamba": {"state_size": 4},
}
# Where each family keeps its blocks and its final norm: written down by hand, to check what is found by structure.
PARTS = {
    "gpt2": ("transformer.h", "transformer.ln_f"),
    "gpt_neo": ("transformer.h", "transformer.ln_f"),
    "gptj": ("transformer.h", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "bloom": ("transformer.h", "transformer.ln_f"),
    "mpt": ("transformer.blocks", "transformer.norm_f"),
    "falcon": ("transformer.h", "transformer.ln_f"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "phi": ("model.layers", "model.final_layernorm"),
    "llama": ("model.layers", "model.norm"),
    "mistral": ("model.layers", "model.norm"),
    "mixtral": ("model.layers", "model.norm"),
    "qwen2": ("model.layers", "model.norm"),
    "qwen3": ("model.layers", "model.norm"),
    "phi3": ("model.layers", "model.norm"),
    "olmo": ("model.layers", "model.norm"),
    "olmo2": ("model.layers", "model.norm"),
    "olmo3": ("model.layers", "model.norm"),
    "qwen2_moe": ("model.layers", "model.norm"),
    "qwen3_moe": ("model.layers", "model.norm"),
    "gpt_oss": ("model.layers", "model.norm"),
    "gemma": ("model.layers", "model.norm"),
    "gemma2": ("model.layers", "model.norm"),
    "gemma3_text": ("model.layers", "model.norm"),
    "mamba": ("backbone.layers", "backbone.norm_f"),
}


@cache
def _built(architecture: str, overrides: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {**SIZES, **OWN_SIZES.get(architecture, {}), **dict(overrides)}
    # The auto classes and the tokenizer's constructor are not typed.
    model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(CONFIG_MAPPING[architecture](**options)).eval()
    with torch.no_grad():  # norms and biases too, so that a part left out shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine threads that wait for each other cost 7 times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model(architecture, **config)`: a copy of a random model of N_LAYERS layers that the test may change."""
    return lambda architecture, **overrides: copy.deepcopy(_built(architecture, tuple(sorted(overrides.items()))))


@pytest.fixture(scope="session", params=sorted(PARTS))
def architecture(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@pytest.fixture(scope="session")
def blocks_of() -> Callable[[str, nn.Module], nn.ModuleList]:
    return lambda architecture, model: cast(nn.ModuleList, model.get_submodule(PARTS[architecture][0]))


@pytest.fixture(scope="session")
def final_norm_of() -> Callable[[str, nn.Module], nn.Module]:
    return lambda architecture, model: model.get_submodule(PARTS[architecture][1])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of whole words without pad token, special tokens or chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return cast(PreTrainedTokenizerBase, cast(Any, PreTrainedTokenizerFast)(tokenizer_object=words, unk_token="[UNK]"))


@pytest.fixture(scope="session")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = demo_model.path()
    model = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
    return model, cast(Any, AutoTokenizer).from_pretrained(folder)
