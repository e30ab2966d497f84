"""GPT-2 and Llama written out from their weights, with a way to step in at every site: an oracle without hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

Change = Callable[[str, int, Tensor], Tensor]


def unchanged(_site: str, _layer: int, value: Tensor) -> Tensor:
    return value


def forward(model: Any, ids: Sequence[int], change: Change = unchanged) -> Tensor:
    """Logits [pos, d_vocab] of one prompt in float64; `change(site, layer, value)` may replace what passes a site.

    Values have no batch dimension: resid_pre [pos, d_model], z [pos, n_heads, d_head], pattern [n_heads, query, key].
    The token embeddings pass as the site "embed" of layer 0.
    """
    with torch.no_grad():
        weights = {name: value.detach().double() for name, value in model.state_dict().items()}
        run = _gpt2 if model.config.model_type == "gpt2" else _llama
        return run(model.config, weights, torch.tensor(list(ids)), change)


def activations(model: Any, ids: Sequence[int], change: Change = unchanged) -> dict[tuple[str, int], Tensor]:
    """The values at all sites, after the change."""
    found = {}

    def keep(site: str, layer: int, value: Tensor) -> Tensor:
        found[site, layer] = change(site, layer, value)
        return found[site, layer]

    forward(model, ids, keep)
    return found


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: int, change: Change) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    masked = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    pattern = change("pattern", layer, masked.softmax(-1))
    return change("z", layer, torch.einsum("hqk,khd->qhd", pattern, v))


def _gpt2(config: Any, w: dict[str, Tensor], ids: Tensor, change: Change) -> Tensor:
    eps, n_heads = config.layer_norm_epsilon, config.n_head
    act = torch.relu if config.activation_function == "relu" else lambda x: gelu(x, approximate="tanh")

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = change("embed", 0, w["transformer.wte.weight"][ids]) + w["transformer.wpe.weight"][: len(ids)]
    for layer in range(config.n_layer):
        at = f"transformer.h.{layer}"
        x = change("resid_pre", layer, x)
        parts = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1)
        q, k, v = (change(s, layer, p.reshape(len(p), n_heads, -1)) for s, p in zip("qkv", parts, strict=True))
        z = _attend(q, k, v, layer, change)
        x = change("resid_mid", layer, x + change("attn_out", layer, linear(z.flatten(1), f"{at}.attn.c_proj")))
        pre = change("mlp_pre", layer, linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"))
        post = change("mlp_post", layer, act(pre))
        x = change("resid_post", layer, x + change("mlp_out", layer, linear(post, f"{at}.mlp.c_proj")))
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def _llama(config: Any, w: dict[str, Tensor], ids: Tensor, change: Change) -> Tensor:
    d_head = config.head_dim
    theta = config.rope_parameters["rope_theta"]
    angles = torch.outer(torch.arange(len(ids)).double(), theta ** -(torch.arange(0, d_head, 2).double() / d_head))
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        scale: Tensor = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * w[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned: Tensor = x * cos + torch.cat([-second, first], -1) * sin
        return turned

    x = change("embed", 0, w["model.embed_tokens.weight"][ids])
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        x = change("resid_pre", layer, x)
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            change(s, layer, (h @ w[f"{at}.self_attn.{s}_proj.weight"].T).reshape(len(h), -1, d_head)) for s in "qkv"
        )
        z = _attend(rotated(q), rotated(k), v, layer, change)
        x = x + change("attn_out", layer, z.flatten(1) @ w[f"{at}.self_attn.o_proj.weight"].T)
        x = change("resid_mid", layer, x)
        h = norm(x, f"{at}.post_attention_layernorm")
        pre = change("mlp_pre", layer, h @ w[f"{at}.mlp.gate_proj.weight"].T)
        post = change("mlp_post", layer, silu(pre) * (h @ w[f"{at}.mlp.up_proj.weight"].T))
        x = change("resid_post", layer, x + change("mlp_out", layer, post @ w[f"{at}.mlp.down_proj.weight"].T))
    return norm(x, "model.norm") @ w["lm_head.weight"].T
