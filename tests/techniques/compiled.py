"""The recorded Tracr program as a Hugging Face GPT-2: a circuit that is known because a compiler made it.

The program answers with TABLE[the token two places back]. The head of layer 0 copies the previous token, the head of
layer 1 copies what that left at the previous position, the MLP of layer 1 looks it up; the MLP of layer 0 does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from tests.techniques.handmade import EPSILON, word_tokenizer

RECORDED = Path(__file__).parent / "oracles" / "tracr.npz"
TABLE = {"a": "b", "b": "d", "c": "a", "d": "c"}
NODES = {"a0.h0", "a1.h0", "m1"}
EDGES = ("input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->m1", "m1->logits")  # what carries the token two places back


def compiled() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase, Any]:
    """The model, its tokenizer and what was recorded.

    GPT-2's norms subtract the mean, which Tracr has not: the residual stream is [x, -x], whose mean is 0, and with a
    huge epsilon a norm is the identity. Only x is read.
    """
    recorded = np.load(RECORDED)
    n_layers, n_heads, _, d_mlp = recorded["sizes"].tolist()
    features, tokens = recorded["features"].tolist(), recorded["tokens"].tolist()
    width = len(features)
    config = GPT2Config(
        vocab_size=len(tokens),
        n_positions=len(recorded["pos_embed/embeddings"]),
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=2 * width,
        n_inner=d_mlp,
        activation_function="relu",
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(EPSILON**0.5 if "ln_" in name and name.endswith("weight") else 0.0)
        body: Any = model.transformer
        body.wte.weight.copy_(_written(recorded["token_embed/embeddings"]))
        body.wpe.weight.copy_(_written(recorded["pos_embed/embeddings"]))
        for i, block in enumerate(body.h):
            layer = f"transformer/layer_{i}"
            _set_attention(block.attn, recorded, f"{layer}/attn")
            block.mlp.c_fc.weight[:width] = torch.tensor(recorded[f"{layer}/mlp/linear_1/w"])
            block.mlp.c_fc.bias.copy_(torch.tensor(recorded[f"{layer}/mlp/linear_1/b"]))
            block.mlp.c_proj.weight.copy_(_written(recorded[f"{layer}/mlp/linear_2/w"]))
            block.mlp.c_proj.bias.copy_(_written(recorded[f"{layer}/mlp/linear_2/b"]))
        for token, word in enumerate(tokens):
            if word in TABLE:
                model.lm_head.weight[token, features.index(f"answer_1:{word}")] = 1.0
    return model, word_tokenizer(tokens), recorded


def _written(rows: Any) -> Tensor:
    """What adds x to one half of the stream adds -x to the other."""
    x = torch.tensor(rows)
    return torch.cat([x, -x], -1)


def _set_attention(attn: Any, recorded: Any, name: str) -> None:
    """One head: Tracr's is narrower than GPT-2's, which scales its scores by its own width."""
    d_key = recorded[f"{name}/query/w"].shape[1]
    width, d_model = recorded[f"{name}/query/w"].shape[0], attn.c_proj.weight.shape[1]
    scale = {"query": (d_model / d_key) ** 0.5}
    for i, part in enumerate(("query", "key", "value")):
        start = i * d_model
        factor = scale.get(part, 1.0)
        attn.c_attn.weight[:width, start : start + d_key] = factor * torch.tensor(recorded[f"{name}/{part}/w"])
        attn.c_attn.bias[start : start + d_key] = factor * torch.tensor(recorded[f"{name}/{part}/b"])
    attn.c_proj.weight[:d_key] = _written(recorded[f"{name}/linear/w"])
    attn.c_proj.bias.copy_(_written(recorded[f"{name}/linear/b"]))
