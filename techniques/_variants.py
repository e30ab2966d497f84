"""Many patched runs of one batch of prompts, and the metrics of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from techniques._hooks import HookPoint, edit
from techniques._model import logits_at
from techniques._pairs import CHUNK_ROWS, metric_values
from techniques._tokens import Batch


@dataclass(frozen=True)
class Write:
    """Put `value` at some positions of a hook point, for one head or all of it.

    Attributes:
        point: Where.
        positions: Which positions, in the prompt that is patched.
        value: [len(positions), ...] as the site has it; without the head dimension where `head` is given.
        head: Index in the site's head dimension; None writes all of the site.
    """

    point: HookPoint
    positions: list[int]
    value: Tensor
    head: int | None = None


@dataclass(frozen=True)
class Variant:
    """One patched run: the row of the batch that it starts from and what is written into it."""

    row: int
    writes: Sequence[Write]


def variant_metrics(
    model: PreTrainedModel,
    batch: Batch,
    last: Int[Tensor, " rows"],
    variants: Sequence[Variant],
    answers: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
    metrics: Sequence[str],
) -> Float[Tensor, "variants metrics"]:
    """Metrics after the last token of each patched run, in float64 on the CPU.

    `answers` are the ids of the right and the wrong answer to each row of `batch`, whose last token is at `last`.
    """
    found = []
    for start in range(0, len(variants), CHUNK_ROWS):
        part = variants[start : start + CHUNK_ROWS]
        rows = torch.tensor([variant.row for variant in part])
        points = {write.point for variant in part for write in variant.writes}
        ids = Batch(batch.input_ids[rows], batch.attention_mask[rows])
        with edit(model, {point: _writer(point, part) for point in points}):
            logits = logits_at(model, ids, torch.arange(len(part)), last[rows])
        right, wrong = (ids[rows] for ids in answers)
        found.append(torch.stack([metric_values(logits, right, wrong, m) for m in metrics], -1).double().cpu())
    return torch.cat(found)


def _writer(point: HookPoint, variants: Sequence[Variant]) -> Callable[[Tensor], Tensor]:
    def write(value: Tensor) -> Tensor:
        value = value.clone()
        for row, variant in enumerate(variants):
            for w in variant.writes:
                if w.point == point:
                    value[site_index(point, row, w.positions, w.head)] = w.value.to(value)
        return value

    return write


def site_value(value: Tensor, point: HookPoint, row: int, positions: list[int], head: int | None) -> Tensor:
    """[positions, ...] of one row, of one head or of all that the site holds."""
    return value[site_index(point, row, positions, head)]


def site_index(point: HookPoint, row: int, positions: list[int], head: int | None) -> tuple[Any, ...]:
    """Index of one row's positions, for one head or all of the site; a pattern has its heads before its positions."""
    if head is None:
        return (row, positions)
    return (row, head, positions) if point.site == "pattern" else (row, positions, head)
