"""What a sweep over steering vectors measures: directions and vectors that mean nothing, at many strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._directions import Direction
from techniques._generation import continue_tokens
from techniques._hooks import Change, HookPoint
from techniques._model import logits_at
from techniques._results import Header, number
from techniques._stats import mean_interval
from techniques._steering import MAX_TOKENS, Positions, Push, Units, finite, kl_divergence, next_logits
from techniques._tokens import log_probs, pad, plain, single_token_id


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


class SteeringSweep(Header):
    """Result of `steering_sweep`.

    Attributes:
        site: Where in a block.
        positive_class: What positive coefficients steer towards.
        units: What a coefficient of 1 means.
        positions: The tokens that the vectors were added to.
        metric: What the metric is, in nats.
        targets: The tokens that it asks for.
        against: The tokens that it compares them with.
        clean_metric: Its mean without steering.
        clean_perplexity: Perplexity of the clean continuations, by the model itself; None if none was written.
        rows: By layer, then kind, draw and coefficient.
    """

    site: str
    positive_class: str
    units: Units
    positions: Positions
    metric: str
    targets: list[str]
    against: list[str]
    clean_metric: float | None
    clean_perplexity: float | None
    rows: list[SweepRow]


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


def strengths_of(coefficients: float | Sequence[float]) -> list[float]:
    """The coefficients as a list.

    Raises:
        ValueError: One is not finite, or all are 0.
    """
    given = plain(coefficients)
    found = [finite(c) for c in ([given] if isinstance(given, int | float) else given)]
    if not any(found):
        raise ValueError(f"coefficients is {found}; expected one other than 0 at least, as 0 adds nothing.")
    return found


def used_directions(
    directions: Direction | Sequence[Direction], layers: list[int] | None
) -> list[tuple[Direction, int | None]]:
    """Each direction with the layer to add it at; None for its own.

    Raises:
        ValueError: There is no direction, or there are layers for several.
    """
    several = [directions] if isinstance(directions, dict) else list(directions)
    if not several or (layers is not None and (len(several) > 1 or not layers)):
        raise ValueError(
            f"There are {len(several)} directions and layers is {layers}; expected at least one direction, and layers "
            "for a single one only."
        )
    return [(several[0], layer) for layer in layers] if layers is not None else [(one, None) for one in several]
