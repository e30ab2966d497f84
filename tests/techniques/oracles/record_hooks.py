"""Record TransformerLens' activations and patching sweeps of tiny models: needs transformer-lens 4.3.

    PYTHONPATH=. python tests/techniques/oracles/record_hooks.py

Writes hooks.npz beside this file. The models are built again by the tests: every parameter is drawn from a generator in
the order of its name, so the numbers depend on no library's way of initialising; a sum of the weights is kept too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_LAYERS, N_HEADS, D_VOCAB = 2, 4, 29
FILE = Path(__file__).with_name("hooks.npz")
CLEAN, CORRUPTED = [3, 7, 11, 2, 19, 5], [3, 13, 4, 2, 23, 5]
ANSWER, WRONG = 17, 8
SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 16,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 3},
    "gptj": {"rotary_dim": 4},
    "gpt_neox": {"use_parallel_residual": False},
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8},
    "olmo2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "phi3": {"num_key_value_heads": 2},
}
SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "mlp_pre",
    "mlp_post",
)
NAMES = {site: f"attn.hook_{site}" for site in ("q", "k", "v", "z", "pattern")}
NAMES |= {"mlp_pre": "mlp.hook_pre", "mlp_post": "mlp.hook_post"}
SWEPT = ("gpt2", "llama", "gemma2")
SWEEPS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_v_all_pos")


def build(family: str) -> Any:
    """The tiny model of a family, the same wherever it is built."""
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family])
    model = cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "norm" in name or "ln_" in name else noise)
    model.config.architectures = [type(model).__name__]
    return model


def weight_sum(model: Any) -> float:
    """Sum of all absolute weights."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def logit_diff(logits: Tensor) -> Tensor:
    """The metric of the sweeps, at the last position."""
    return logits[0, -1, ANSWER] - logits[0, -1, WRONG]


def main() -> None:
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    found: dict[str, Any] = {}
    for family in FAMILIES:
        model = build(family)
        found[f"{family}/weights"] = weight_sum(model)
        bridge = TransformerBridge.boot_transformers(family, hf_model=model, tokenizer=stand_in())
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(torch.tensor([CLEAN]))
            found[f"{family}/logits"] = logits[0].numpy()
            for site in SITES:
                for layer in range(N_LAYERS):
                    name = f"blocks.{layer}.{NAMES.get(site, f'hook_{site}')}"
                    if name in cache:
                        found[f"{family}/{site}/{layer}"] = cache[name][0].float().numpy()
                    else:
                        print(family, "has no", name)
            if family in SWEPT:
                for kind in SWEEPS:
                    patch = getattr(patching, f"get_act_patch_{kind}")
                    swept = patch(bridge, torch.tensor([CORRUPTED]), cache, logit_diff)
                    found[f"{family}/sweep/{kind}"] = swept.numpy()
    np.savez_compressed(FILE, **found)


def stand_in() -> Any:
    """A tokenizer that TransformerLens accepts; no text is encoded."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(D_VOCAB)}, unk_token="t0"))
    folder = "/tmp/interp-kernel-stand-in"
    fast = cast(Any, PreTrainedTokenizerFast)(tokenizer_object=words, bos_token="t0", eos_token="t0", pad_token="t0")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # TransformerLens asks it for the folder's name


if __name__ == "__main__":
    main()
