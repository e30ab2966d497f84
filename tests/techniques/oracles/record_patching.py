"""Record what TransformerLens and nnsight make of patching the demo model, as `patching.npz` beside this file.

    PYTHONPATH=. OMP_NUM_THREADS=1 PYTHON -m tests.techniques.oracles.record_patching

PYTHON has transformer-lens 4.3.0 and nnsight 0.8.1, which are no part of this project's environment. Arrays are metrics
in nats, before any normalisation: `fact_resid_pre` [layer pos], `fact_z` [layer head], `fact_q_path` [layer head layer
head], sender first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model

PAIRS = {
    "fact": (
        ("The Eiffel Tower is located in the city of", "The Prado Museum is located in the city of"),
        (" Paris", " Madrid"),
    ),
    "ioi": (
        (
            "When Mary and John went to the store, John gave a drink to",
            "When Mary and John went to the store, Mary gave a drink to",
        ),
        (" Mary", " John"),
    ),
}


def load() -> tuple[Any, Any]:
    folder = demo_model.path()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def lens_arrays(name: str) -> dict[str, Tensor]:
    """Sweeps of TransformerLens: clean activations into the corrupted run."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = load()
    bridge: Any = TransformerBridge.boot_transformers(demo_model.path(), hf_model=model, tokenizer=tokenizer)
    (clean, corrupted), answers = PAIRS[name]
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in (clean, corrupted)]
    right, wrong = (tokenizer(answer)["input_ids"][0] for answer in answers)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    caches = [bridge.run_with_cache(tokens)[1] for tokens in ids]
    found = {"baselines": torch.stack([metric(bridge(tokens)) for tokens in ids])}
    sweeps = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "resid_mid": patching.get_act_patch_resid_mid,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
        "z": patching.get_act_patch_attn_head_out_all_pos,
        "q": patching.get_act_patch_attn_head_q_all_pos,
        "k": patching.get_act_patch_attn_head_k_all_pos,
        "v": patching.get_act_patch_attn_head_v_all_pos,
        "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
        "z_by_position": patching.get_act_patch_attn_head_out_by_pos,
    }
    for site, sweep in sweeps.items():
        found[site] = sweep(bridge, ids[1], caches[0], metric)
    for site in ("q", "k", "v"):
        found[f"{site}_path"] = patching.get_act_patch_direct_path_all_sources(
            bridge, ids[1], caches[0], caches[1], metric, site, verbose=False
        )
    return {f"{name}_{site}": values for site, values in found.items()}


def nnsight_arrays(name: str) -> dict[str, Tensor]:
    """Cells from nnsight traces: the stream after each block and each MLP's output, one position at a time."""
    from nnsight import LanguageModel

    model, tokenizer = load()
    wrapped: Any = LanguageModel(model, tokenizer=tokenizer)
    (clean, corrupted), answers = PAIRS[name]
    n_pos = len(tokenizer(clean)["input_ids"])
    right, wrong = (tokenizer(answer)["input_ids"][0] for answer in answers)
    found = {}
    for site in ("resid_post", "mlp_out"):
        cells = torch.zeros(model.config.n_layer, n_pos)
        for layer in range(model.config.n_layer):
            with wrapped.trace(clean):
                block = wrapped.transformer.h[layer]
                source = (block if site == "resid_post" else block.mlp).output
                source = (source[0] if isinstance(source, tuple) else source).save()
            for position in range(n_pos):
                with wrapped.trace(corrupted):
                    block = wrapped.transformer.h[layer]
                    value = (block if site == "resid_post" else block.mlp).output
                    (value[0] if isinstance(value, tuple) else value)[:, position] = source[:, position]
                    logits = wrapped.lm_head.output.save()
                cells[layer, position] = logits[0, -1, right] - logits[0, -1, wrong]
        found[f"{name}_nnsight_{site}"] = cells
    return found


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        arrays = {key: value for name in PAIRS for key, value in (lens_arrays(name) | nnsight_arrays(name)).items()}
    path = Path(__file__).with_name("patching.npz")
    np.savez_compressed(path, **{key: value.detach().numpy() for key, value in arrays.items()})  # type: ignore[arg-type]
    print(path, path.stat().st_size, {key: tuple(value.shape) for key, value in arrays.items()})


if __name__ == "__main__":
    main()
