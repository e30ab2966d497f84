"""Decoding the residual stream at chosen points and at every depth: what the lenses share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from techniques._model import Decoder, UnsupportedModelError, logits_at, record_inputs
from techniques._tokens import pad

CHUNK_BYTES = 2**26  # of float32 logits that are decoded at once; a few tensors of this size are alive


@dataclass(frozen=True)
class Points:
    """The (prompt, position) pairs that are decoded, in order."""

    prompts: list[int]
    positions: list[int]

    def part(self, which: slice) -> Points:
        """Some of the points, in order."""
        return Points(self.prompts[which], self.positions[which])


@dataclass(frozen=True)
class Stream:
    """The residual stream of one run at its points.

    Attributes:
        model: The model that ran.
        decoder: Its parts.
        resid: n_layers + 1 tensors, maybe on different devices: after 0, 1, ... blocks.
        own: The model's own logits at the points.
    """

    model: PreTrainedModel
    decoder: Decoder
    resid: list[Float[Tensor, "points d_model"]]
    own: Float[Tensor, "points d_vocab"]

    def decoded(self) -> Iterator[tuple[slice, Float[Tensor, "part depth d_vocab"], float]]:
        """Logits at every depth, some points at a time: (which points, logits, largest error at the last depth).

        Raises:
            UnsupportedModelError: The last depth differs from the model's own logits.
        """
        step = max(1, CHUNK_BYTES // (4 * len(self.resid) * self.own.shape[-1]))
        for part in (slice(start, start + step) for start in range(0, len(self.own), step)):
            resid = torch.stack([at_depth[part].to(self.own.device) for at_depth in self.resid], 1)
            logits = self.decoder.logits(resid)
            yield part, logits, check_head(self.model, logits[:, -1], self.own[part].to(logits.device))


def run_points(model: PreTrainedModel, decoder: Decoder, ids: list[list[int]], points: Points) -> Stream:
    """Run the model once on padded prompts and keep the residual stream and the model's own logits at `points` alone.

    Raises:
        UnsupportedModelError: The residual stream is not one vector per token through each block once.
    """
    batch = pad(ids, "right", 0, model.device)
    where = torch.tensor(points.prompts), torch.tensor(points.positions)

    def keep(hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "points d_model"]:
        if hidden.shape[:2] != batch.input_ids.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a residual stream of shape {tuple(hidden.shape)} for tokens of shape "
                f"{tuple(batch.input_ids.shape)}; expected one vector per token. Prompt tuning, which adds tokens of "
                "its own, is not supported."
            )
        return hidden[where]

    with record_inputs([*decoder.blocks, decoder.ln_final], keep) as resid:
        own = logits_at(model, batch, *where)
    if len(resid) != len(decoder.blocks) + 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} entered its {len(decoder.blocks)} blocks and final norm {len(resid)} times in one "
            "forward pass; expected once each. Its residual stream is not one line through them."
        )
    return Stream(model, decoder, resid, own)


def check_head(
    model: PreTrainedModel, lens: Float[Tensor, "points d_vocab"], own: Float[Tensor, "points d_vocab"]
) -> float:
    """Largest difference between the lens after the last block and the model's own logits, in nats.

    Raises:
        UnsupportedModelError: It is more than rounding.
    """
    gap, size = (lens - own).abs().max().item(), own.abs().max().item()
    # The same operations on the same numbers differ only by the rounding of a matrix product of another shape.
    if not gap <= max(1e-4, 4 * torch.finfo(own.dtype).eps) * size:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the lens after the last block differs from the model's own logits by up to "
            f"{gap:.3g} nats; expected none. Its head does more than final norm, unembedding and soft cap, so earlier "
            "depths would be misread as well."
        )
    return gap
