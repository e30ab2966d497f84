"""Record TransformerLens' attributions of the demo model: needs transformer-lens 3.9, the last with HookedTransformer.

    PYTHONPATH=. python tests/techniques/oracles/record_attribution.py

Writes attribution.npz beside this file, all of four pairs of indirect-object prompts: attribution patching of heads and
MLPs, direct logit attribution, and edge scores as Hanna et al. define them (with split query, key and value inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model
from tests.techniques.contrasts import ANSWERS, PAIRS, STEPS


def main() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model.path())
    hf_model = AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype=torch.float32)
    model = hooked(hf_model, fold_ln=False)
    clean, corrupted = (torch.tensor([tokenizer(pair[side])["input_ids"] for pair in PAIRS]) for side in (0, 1))
    answers = torch.tensor([[tokenizer(text)["input_ids"][0] for text in pair] for pair in ANSWERS])
    np.savez_compressed(
        Path(__file__).with_name("attribution.npz"),
        **attribution_patching(model, clean, corrupted, answers),
        eap=edge_scores(model, clean, corrupted, answers, [1.0]),
        eap_ig=edge_scores(model, clean, corrupted, answers, [k / STEPS for k in range(STEPS)]),
        **direct(hooked(hf_model, fold_ln=True), clean, answers),
    )


def hooked(hf_model: Any, fold_ln: bool) -> Any:
    """The same weights, unprocessed but for the norms' gains."""
    c = hf_model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        original_architecture="GPT2LMHeadModel",
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf_model, config),
        fold_ln=fold_ln,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids), hf_model(ids).logits, rtol=1e-4, atol=1e-3)
    return model


def logit_diff(logits: Tensor, answers: Tensor) -> Tensor:
    last = logits[:, -1]
    return last.gather(1, answers[:, :1])[:, 0] - last.gather(1, answers[:, 1:])[:, 0]


def attribution_patching(model: Any, clean: Tensor, corrupted: Tensor, answers: Tensor) -> dict[str, Any]:
    """(clean - corrupted) * gradient on the corrupted run, [n, layers, heads] and [n, layers]."""
    _, cache = model.run_with_cache(clean)
    gradients: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def keep(kind: dict[str, Tensor], value: Tensor, hook: Any) -> None:
        kind[hook.name] = value.detach().clone()

    wanted = lambda name: name.endswith(("hook_z", "hook_mlp_out"))  # noqa: E731
    with model.hooks([(wanted, partial(keep, values))], [(wanted, partial(keep, gradients))]):
        torch.autograd.backward(logit_diff(model(corrupted), answers).sum())
    scores = {name: ((cache[name] - values[name]) * gradients[name]).sum((1, -1)) for name in values}
    heads = [scores[f"blocks.{layer}.attn.hook_z"] for layer in range(model.cfg.n_layers)]
    mlps = [scores[f"blocks.{layer}.hook_mlp_out"] for layer in range(model.cfg.n_layers)]
    return {"heads": torch.stack(heads, 1).numpy(), "mlps": torch.stack(mlps, 1).numpy()}


def direct(model: Any, clean: Tensor, answers: Tensor) -> dict[str, Any]:
    """Embedding, each layer's attention and MLP, and heads: what each adds to the logit difference.

    TransformerLens leaves the final norm's gain out unless it is folded into the unembedding.
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        layers, labels = cache.decompose_resid(mode="all", pos_slice=-1, return_labels=True)
        heads = cache.stack_head_results(pos_slice=-1)
        found = {
            name: cache.logit_attrs(stack, tokens=answers[:, 0], incorrect_tokens=answers[:, 1], pos_slice=-1)
            for name, stack in (("direct_layers", layers), ("direct_heads", heads))
        }
    assert labels[:2] == ["embed", "pos_embed"]
    return {name: value.numpy() for name, value in found.items()}


def edge_scores(model: Any, clean: Tensor, corrupted: Tensor, answers: Tensor, shares: list[float]) -> Any:
    """Mean over pairs and shares of (clean - corrupted) of each sender * gradient at each receiver's input."""
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    with torch.no_grad():
        caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    layers = range(model.cfg.n_layers)
    senders: list[Callable[[Any], Tensor]] = [lambda cache: cache["hook_embed"][:, :, None]]
    for layer in layers:
        senders.append(lambda cache, at=layer: cache[f"blocks.{at}.attn.hook_result"])  # type: ignore[misc]
        senders.append(lambda cache, at=layer: cache[f"blocks.{at}.hook_mlp_out"][:, :, None])  # type: ignore[misc]
    moved = torch.cat([sender(caches[0]) - sender(caches[1]) for sender in senders], 2)
    receivers = [
        name
        for layer in layers
        for name in (*(f"blocks.{layer}.hook_{slot}_input" for slot in "qkv"), f"blocks.{layer}.hook_mlp_in")
    ]
    receivers.append(f"blocks.{layers[-1]}.hook_resid_post")
    total = torch.zeros(())
    for share in shares:
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, found: dict[str, Tensor] = found) -> None:
            found[hook.name] = value.detach().clone()

        def start(value: Tensor, hook: Any, share: float = share) -> Tensor:
            mixed = caches[1]["hook_embed"] + share * (caches[0]["hook_embed"] - caches[1]["hook_embed"])
            leaf: Tensor = mixed.clone().requires_grad_()
            return leaf

        with model.hooks([("hook_embed", start)], [(lambda name: name in receivers, keep)]):
            torch.autograd.backward(logit_diff(model(clean), answers).sum())
        parts = [found[name] if found[name].dim() == 4 else found[name][:, :, None] for name in receivers]
        total = total + torch.einsum("bpsd,bprd->sr", moved, torch.cat(parts, 2)) / len(clean) / len(shares)
    return total.numpy()


if __name__ == "__main__":
    main()
