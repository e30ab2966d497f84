"""Noise on the token embeddings of a part of each prompt, as its first block sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._batches import in_memory
from techniques._hooks import HookPoint, record, run
from techniques._model import Decoder
from techniques._tokens import pad


def blurred_streams(
    model: PreTrainedModel,
    decoder: Decoder,
    ids: Sequence[list[int]],
    parts: Sequence[list[int]],
    std: float,
    n_draws: int,
    seed: int,
) -> list[Float[Tensor, "draws part d_model"]]:
    """resid_pre of layer 0 at some positions of each prompt, with noise on their token embeddings."""
    generator = torch.Generator().manual_seed(seed)
    blurred = []
    for prompt, part in zip(ids, parts, strict=True):
        size = cast(int, decoder.embed.embedding_dim)
        noise = torch.randn(n_draws, len(part), size, generator=generator) * std
        draws = in_memory(
            partial(_blurred, model, decoder, prompt, part, noise), [range(n_draws)], lambda _: "A single draw"
        )
        blurred.append(torch.cat([found for _, found in draws]))
    return blurred


def _blurred(
    model: PreTrainedModel,
    decoder: Decoder,
    ids: list[int],
    part: list[int],
    noise: Float[Tensor, "n_draws part d_embed"],
    draws: Sequence[int],
) -> Float[Tensor, "draws part d_model"]:
    first = HookPoint("resid_pre", 0)
    with _noisy(decoder.embed, part, noise[list(draws)]), record(model, [first]) as found:
        run(model, pad([ids] * len(draws), "right", 0, model.device), stop_after=0)
    return found[first][:, part]


@contextmanager
def _noisy(embed: nn.Module, positions: list[int], noise: Float[Tensor, "draws positions d_embed"]) -> Iterator[None]:
    """Add noise to token embeddings; what the model makes of them before its first block is left to the model."""

    def add(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        new = embedded.clone()
        new[:, positions] += noise.to(new)
        return new

    with ExitStack() as hooks:
        hooks.callback(embed.register_forward_hook(add).remove)
        yield
