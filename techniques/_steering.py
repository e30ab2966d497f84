"""What the steering techniques share: vectors added while the model runs, and what they change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import points_of
from techniques._batches import in_batches
from techniques._directions import Direction, unit_vector
from techniques._generation import continue_tokens
from techniques._hooks import Change, HookPoint, check_sites, edit, record
from techniques._model import logits_at
from techniques._results import number
from techniques._stats import mean_interval
from techniques._tokens import log_probs, pad, single_token_id

MAX_TOKENS = 8192  # of a batch, padding included
Positions = Literal["all", "prompt", "last", "response"]
POSITIONS = ("all", "prompt", "last", "response")
Units = Literal["difference", "resid_norm", "absolute"]
UNITS = ("difference", "resid_norm", "absolute")


class SweepRow(TypedDict):
    """One vector at one strength, over all prompts.

    Attributes:
        layer: Where the vector was added.
        coefficient: Its strength, in the sweep's units.
        kind: "direction"; "random", a random vector of the same norm; or "shuffled", the direction's own entries in
            random order.
        draw: Which random vector, from 0; 0 for the direction itself.
        metric: Mean over prompts.
        metric_low: Lower end of its 95 % interval, prompts resampled.
        metric_high: Upper end.
        kl_to_clean: Mean KL(clean || steered) of the next token's distribution, in nats.
        n_changed: Prompts whose greedy continuation differs from the clean one; None if none was written.
        perplexity: Of the steered continuations, by the model without steering; None if none was written.
        clean_perplexity: Of the clean continuations; None if none was written.
    """

    layer: int
    coefficient: float
    kind: Literal["direction", "random", "shuffled"]
    draw: int
    metric: float | None
    metric_low: float | None
    metric_high: float | None
    kl_to_clean: float | None
    n_changed: int | None
    perplexity: float | None


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


class NamedVector(NamedTuple):
    """A vector of a sweep."""

    kind: Literal["direction", "random", "shuffled"]
    draw: int
    values: Float[Tensor, " d"]


def with_controls(
    vector: Float[Tensor, " d"], controls: Sequence[Literal["random", "shuffled"]], n_draws: int, seed: int
) -> list[NamedVector]:
    """The direction's vector, then vectors of its norm that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    named = [NamedVector("direction", 0, vector)]
    for kind in dict.fromkeys(controls):
        for draw in range(n_draws):
            noise = torch.randn(len(vector), generator=generator)
            mixed = vector[torch.randperm(len(vector), generator=generator)]
            named.append(NamedVector(kind, draw, noise / noise.norm() * vector.norm() if kind == "random" else mixed))
    return named


class Measure:
    """What a sweep compares every variant with: the prompts' next token and continuation without steering."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[list[int]],
        targets: list[int],
        against: list[int],
        positions: Positions,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.ids, self.seed = model, tokenizer, ids, seed
        self.targets, self.against, self.positions, self.max_new_tokens = targets, against, positions, max_new_tokens
        self.clean = log_probs(next_logits(model, ids))
        self.clean_metric = self.metric(self.clean)
        self.clean_texts = self.continued(None, None) if max_new_tokens else []

    def metric(self, logprobs: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        """ln p(targets), minus ln p(against) where there are any."""
        asked = logprobs[:, self.targets].logsumexp(-1)
        return asked - logprobs[:, self.against].logsumexp(-1) if self.against else asked

    def rows(self, point: HookPoint, vectors: list[NamedVector], coefficients: list[float]) -> list[SweepRow]:
        """Every vector at every strength, at one point."""
        variants = [(vector, coefficient) for vector in vectors for coefficient in coefficients]
        added = torch.stack([vector.values * coefficient for vector, coefficient in variants])
        n = len(self.ids)

        def run(which: list[int]) -> list[tuple[float, float]]:
            prompts = [i % n for i in which]
            steered = next_logits(
                self.model, [self.ids[i] for i in prompts], point, added[[i // n for i in which]], self.positions
            )
            logprobs = log_probs(steered)
            kl = kl_divergence(self.clean[prompts], logprobs)
            return list(zip(self.metric(logprobs).tolist(), kl.tolist(), strict=True))

        found = in_batches([len(ids) for _ in variants for ids in self.ids], MAX_TOKENS, run)
        metric, kl = torch.tensor(found, dtype=torch.float64).view(len(variants), n, 2).unbind(-1)
        if any(coefficients) and not bool((kl > 0).any()):
            raise RuntimeError(
                f"No vector at {point} changed a next token's probability at any strength; expected a change. Raise "
                "the coefficients or choose another layer."
            )
        mean, low, high = mean_interval(metric.T, self.seed)
        return [
            SweepRow(
                layer=point.layer,
                coefficient=coefficient,
                kind=vector.kind,
                draw=vector.draw,
                metric=number(mean[i]),
                metric_low=number(low[i]),
                metric_high=number(high[i]),
                kl_to_clean=number(kl[i].mean()),
                **self.texts(point, added[i]),
            )
            for i, (vector, coefficient) in enumerate(variants)
        ]

    def texts(self, point: HookPoint, vector: Float[Tensor, " d"]) -> _Written:
        """How many greedy continuations the vector changes, and their perplexity."""
        if not self.max_new_tokens:
            return _Written(n_changed=None, perplexity=None)
        steered = self.continued(point, vector)
        changed = sum(a != b for a, b in zip(steered, self.clean_texts, strict=True))
        return _Written(n_changed=changed, perplexity=self.perplexity(steered))

    def continued(self, point: HookPoint | None, vector: Float[Tensor, " d"] | None) -> list[list[int]]:
        """Greedy continuations of all prompts."""

        def push(longest: int) -> dict[HookPoint, Change]:
            return {} if point is None or vector is None else {point: Push(vector, self.positions, longest)}

        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0, "seed": 0}
        found = continue_tokens(self.model, self.tokenizer, self.ids, edits=push, **options)
        return [row["token_ids"] for row in found]

    def perplexity(self, continuations: list[list[int]]) -> float | None:
        """Of the tokens that follow the prompts, by the model without steering; None where there is no token."""
        whole = [[*ids, *new] for ids, new in zip(self.ids, continuations, strict=True)]
        points = [
            (i, at, whole[i][at + 1]) for i, ids in enumerate(self.ids) for at in range(len(ids) - 1, len(whole[i]) - 1)
        ]

        def run(which: list[int]) -> list[list[float]]:
            here = [(which.index(i), at, token) for i, at, token in points if i in which]
            batch = pad([whole[i] for i in which], "right", 0, self.model.device)
            rows, columns, tokens = torch.tensor(here, dtype=torch.long).view(-1, 3).unbind(1)
            logprobs = log_probs(logits_at(self.model, batch, rows, columns))
            chosen = logprobs.gather(-1, tokens[:, None].to(logprobs.device))[:, 0].tolist()
            return [
                [value for value, row in zip(chosen, rows.tolist(), strict=True) if row == j] for j in range(len(which))
            ]

        with torch.inference_mode():
            values = [value for row in in_batches([len(ids) for ids in whole], MAX_TOKENS, run) for value in row]
        return number(torch.tensor(values).double().mean().neg().exp()) if values else None


class _Written(TypedDict):
    n_changed: int | None
    perplexity: float | None


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


def word_sets(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], against: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Ids of the tokens that a metric asks for and of those that it compares them with.

    Raises:
        ValueError: A text is not one token, there are none, or both sides share one.
    """
    if isinstance(targets, str) or isinstance(against, str) or not targets:
        raise ValueError(f"targets is {targets!r} and against {against!r}; expected lists of texts of one token each.")
    asked, compared = ([single_token_id(tokenizer, text) for text in part] for part in (targets, against))
    if set(asked) & set(compared):
        raise ValueError(f"targets {list(targets)} and against {list(against)} share a token; expected different ones.")
    return asked, compared
