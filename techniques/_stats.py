"""Intervals for what was measured on a sample."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

N_BOOT = 1000


def mean_interval(
    values: Float[Tensor, "n *cells"], seed: int, n_boot: int = N_BOOT, level: float = 0.95
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """Mean over the sample and its percentile bootstrap interval: (mean, low, high), in float64 on the CPU.

    All cells of one resample share its draw, so comparisons between cells see the same sample. With one value the
    interval has no width.
    """
    sample = values.detach().double().cpu()
    n = len(sample)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_boot, n), generator=generator)
    # How often each value was drawn, so that all resampled means are one matrix product.
    weights = torch.zeros(n_boot, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double()) / n
    means = (weights @ sample.flatten(1)).reshape(n_boot, *sample.shape[1:]) if sample.dim() > 1 else weights @ sample
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return sample.mean(0), low, high
