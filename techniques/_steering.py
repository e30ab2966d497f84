"""What the steering techniques share: vectors added while the model runs, and what they change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import points_of
from techniques._batches import in_batches
from techniques._directions import Direction, check_direction, unit_vector
from techniques._generation import Edits, continue_tokens
from techniques._hooks import Change, HookPoint, check_sites, edit, record
from techniques._model import logits_at
from techniques._results import numbers
from techniques._tokens import log_probs, pad

MAX_TOKENS = 8192  # of a batch, padding included
Positions = Literal["all", "prompt", "last", "response"]
POSITIONS = ("all", "prompt", "last", "response")
Units = Literal["difference", "resid_norm", "absolute"]
UNITS = ("difference", "resid_norm", "absolute")


class SteeredPrompt(TypedDict):
    """One prompt, continued with and without steering.

    Attributes:
        prompt: The prompt.
        clean: What the model wrote by itself.
        steered: What it wrote when it was steered.
        changed: Whether the two differ.
        kl_to_clean: KL(clean || steered) of the first token's distribution, in nats.
    """

    prompt: str
    clean: str
    steered: str
    changed: bool
    kl_to_clean: float | None


class AblatedPrompt(TypedDict):
    """One prompt, continued with and without the direction.

    Attributes:
        prompt: The prompt.
        clean: What the model wrote by itself.
        ablated: What it wrote without the direction.
        changed: Whether the two differ.
        kl_to_clean: KL(clean || ablated) of the first token's distribution, in nats.
    """

    prompt: str
    clean: str
    ablated: str
    changed: bool
    kl_to_clean: float | None


class Push:
    """Adds a vector at some tokens of a generation, whose passes bring first the prompts and then a token each."""

    def __init__(self, vector: Float[Tensor, " d"], positions: Positions, prompt_length: int) -> None:
        self.vector, self.positions, self.prompt_length = vector, positions, prompt_length
        self.seen = 0

    def __call__(self, value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        width = value.shape[1]
        # Without a cache, every pass brings the whole sequence again, a token longer.
        start = 0 if width > self.seen else self.seen
        self.seen = start + width
        columns = torch.arange(start, start + width, device=value.device)
        return value + _where(columns, self.prompt_length, self.positions)[:, None] * self.vector.to(value)


def _where(columns: Int[Tensor, " pos"], prompt_length: int, positions: Positions) -> Bool[Tensor, " pos"]:
    if positions == "prompt":
        return columns < prompt_length
    if positions == "last":
        return columns == prompt_length - 1
    return columns >= (prompt_length - 1 if positions == "response" else 0)


@torch.inference_mode()
def next_logits(
    model: PreTrainedModel,
    ids: list[list[int]],
    point: HookPoint | None = None,
    vectors: Float[Tensor, "n d"] | None = None,
    positions: Positions = "all",
) -> Float[Tensor, "n d_vocab"]:
    """Next-token logits of each prompt, with its vector added at a point."""

    def run(which: list[int]) -> list[Tensor]:
        lengths = torch.tensor([len(ids[i]) for i in which])
        batch = pad([ids[i] for i in which], "right", 0, model.device)
        columns = torch.arange(batch.input_ids.shape[1])
        edits: dict[HookPoint, Change] = {}
        if point is not None and vectors is not None:
            mask = torch.stack([_where(columns, int(length), positions) for length in lengths])
            added = mask[..., None] * vectors[which][:, None]
            edits = {point: lambda value: value + added.to(value)}
        with edit(model, edits):
            return list(logits_at(model, batch, torch.arange(len(which)), lengths - 1))

    return torch.stack(in_batches([len(row) for row in ids], MAX_TOKENS, run))


def kl_divergence(clean: Float[Tensor, "n d_vocab"], other: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """KL(clean || other) of log-probabilities, in nats."""
    return (clean.exp() * (clean - other)).sum(-1).clamp(min=0)


def point_of(model: PreTrainedModel, direction: Direction, layer: int | None) -> HookPoint:
    check_direction(direction)
    return points_of(model, direction["site"], [direction["layer"] if layer is None else layer])[0]


def vector_of(model: PreTrainedModel, direction: Direction, units: Units) -> Float[Tensor, " d"]:
    """What a coefficient of 1 adds."""
    if units not in UNITS:
        raise ValueError(f"units is {units!r}; expected one of {', '.join(UNITS)}.")
    size = {"difference": direction["separation"], "resid_norm": direction["norm"], "absolute": 1.0}[units]
    if size is None:
        raise ValueError(
            f'units is {units!r}, but the direction does not say how long activations are; expected "difference" or '
            '"absolute" for a vector of your own.'
        )
    return unit_vector(direction, check_sites(model).d_model) * size


def finite(coefficient: float) -> float:
    if not math.isfinite(coefficient):
        raise ValueError(f"The coefficient is {coefficient}; expected a finite number.")
    return float(coefficient)


def check_positions(positions: str) -> None:
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}.")


def without(vector: Float[Tensor, " d"]) -> Change:
    """Takes what lies along a unit vector away."""

    def project_out(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        unit = vector.to(value.device)
        return (value.float() - (value.float() @ unit)[..., None] * unit).to(value.dtype)

    return project_out


@torch.inference_mode()
def next_and_cosine(
    model: PreTrainedModel, ids: list[list[int]], vector: Float[Tensor, " d"], edits: Mapping[HookPoint, Change]
) -> tuple[Float[Tensor, "n d_vocab"], float]:
    """Next-token logits under edits, and the largest |cosine| of the residual stream after any block."""
    points = points_of(model, "resid_post", "all")

    def run(which: list[int]) -> list[tuple[Float[Tensor, " d_vocab"], float]]:
        batch = pad([ids[i] for i in which], "right", 0, model.device)
        real = batch.attention_mask.bool()
        last = torch.tensor([len(ids[i]) - 1 for i in which])

        def keep(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, " batch"]:
            cosine = torch.nn.functional.cosine_similarity(value.float(), vector.to(value.device), dim=-1)
            return cosine.abs().masked_fill(~real.to(value.device), 0).amax(1)

        with edit(model, edits), record(model, points, keep) as seen:
            logits = logits_at(model, batch, torch.arange(len(which)), last)
        largest = torch.stack([seen[point].cpu() for point in points]).amax(0)
        return list(zip(logits, largest.tolist(), strict=True))

    found = in_batches([len(row) for row in ids], MAX_TOKENS, run)
    return torch.stack([logits for logits, _ in found]), max(cosine for _, cosine in found)


class Continued(NamedTuple):
    """A prompt's continuations without and with a change, whether they differ, and the first token's KL in nats."""

    clean: str
    edited: str
    changed: bool
    kl_to_clean: float | None


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    edits: Edits,
    next_tokens: tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]],
    options: dict[str, Any],
) -> list[Continued]:
    """Continue each prompt without and with edits; `next_tokens` are its next-token logits, (without, with)."""
    clean = continue_tokens(model, tokenizer, ids, **options)
    edited = continue_tokens(model, tokenizer, ids, edits=edits, **options)
    moved = numbers(kl_divergence(*map(log_probs, next_tokens)))
    return [
        Continued(before["text"], after["text"], before["token_ids"] != after["token_ids"], kl)
        for before, after, kl in zip(clean, edited, moved, strict=True)
    ]
