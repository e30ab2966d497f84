"""What a sweep of patched prompts measures, and the parts of activations that it copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from techniques._hooks import HookPoint
from techniques._pairs import metric_values
from techniques._sweep import Variant, sweep
from techniques._tokens import Batch


def variant_metrics(
    model: PreTrainedModel,
    batch: Batch,
    variants: Sequence[Variant],
    answers: tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]],
    metrics: Sequence[str],
) -> Float[Tensor, "variants metrics"]:
    """Metrics after the last token of each patched run, in float64 on the CPU.

    `answers` are the ids of the right and the wrong answer to each row of `batch`.
    """

    def measure(logits: Float[Tensor, "variants d_vocab"], rows: Int[Tensor, " variants"]) -> Tensor:
        right, wrong = (ids[rows.cpu()] for ids in answers)
        return torch.stack([metric_values(logits, right, wrong, metric) for metric in metrics], -1).double()

    return sweep(model, batch, variants, measure)


def site_value(value: Tensor, point: HookPoint, positions: Sequence[int], head: int | None) -> Tensor:
    """[positions, ...] of one prompt's value, of one head or of all that it holds; a pattern has its heads first."""
    index: tuple[Any, ...] = (positions,) if head is None else (positions, head)
    return value[head][positions] if point.site == "pattern" else value[index]
