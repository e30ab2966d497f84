"""Scores of classifiers, and intervals and p values for what was measured on a sample."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_BOOT = 1000
LEVEL = 0.95


def mean_interval(
    values: Float[Tensor, "n *cells"], seed: int, n_boot: int = N_BOOT, level: float = LEVEL
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """Mean over the sample and its percentile bootstrap interval: (mean, low, high), in float64 on the CPU.

    All cells of one resample share its draw, so comparisons between cells see the same sample. With one value the
    interval has no width.
    """
    sample = values.detach().double().cpu()
    weights = resamples(len(sample), seed, n_boot) / len(sample)
    means = (weights @ sample.flatten(1)).reshape(n_boot, *sample.shape[1:]) if sample.dim() > 1 else weights @ sample
    return sample.mean(0), *percentiles(means, level)


def recovered_interval(
    changes: Float[Tensor, "n *cells"], gaps: Float[Tensor, " n"], seed: int, n_boot: int = N_BOOT, level: float = LEVEL
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """Ratio of the mean change to the mean gap, with its percentile bootstrap interval over pairs: (ratio, low, high).

    A ratio of means, so that a pair with a small gap does not count for more than one with a large gap. Numerator and
    denominator share each resample. A resample whose mean gap is 0 has no ratio; it is left out, and if that is all of
    them, everything is NaN.
    """
    changes, gaps = changes.detach().double().cpu(), gaps.detach().double().cpu()
    weights = resamples(len(gaps), seed, n_boot)
    below = weights @ gaps
    weights, below = weights[below != 0], below[below != 0]
    if not len(below):
        return (torch.full(changes.shape[1:], torch.nan, dtype=torch.float64),) * 3
    ratios = (weights @ changes.flatten(1)) / below[:, None]
    return changes.sum(0) / gaps.sum(), *percentiles(ratios.reshape(-1, *changes.shape[1:]), level)


def resamples(n: int, seed: int, n_boot: int = N_BOOT) -> Float[Tensor, "boot n"]:
    """How often each of n things is drawn in each bootstrap sample, so that resampled sums are one matrix product."""
    drawn = torch.randint(n, (n_boot, n), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(n_boot, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def percentiles(
    draws: Float[Tensor, "boot *cells"], level: float = LEVEL
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """The interval that holds the middle `level` of the draws; draws that are not a number are left out."""
    tail = (1 - level) / 2
    low, high = draws.nanquantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)
    return low, high


def permutation_p(observed: float, null: Float[Tensor, " permutations"]) -> float:
    """Share of shuffles that reach the observed value, which counts as one of them (so p is never 0)."""
    # Rounding must not decide between equal scores that were summed in another order.
    return (1 + int((null >= observed - 1e-9).sum())) / (1 + len(null))


def auroc(
    scores: Float[Tensor, "n *cells"], positive: Bool[Tensor, "n *cells"], folds: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "*cells"]:
    """Probability that a positive scores above a negative, ties counting half; 0.5 where there is no such pair.

    With `folds`, only pairs of the same fold are compared: scores of different classifiers have no common scale.
    """
    wins = torch.zeros(scores.shape[1:], dtype=torch.float64, device=scores.device)
    pairs = torch.zeros_like(wins)
    for rows in _rows_of(folds, len(scores), scores.device):
        ranks, above = _midranks(scores[rows]), positive[rows].double()
        n_positive = above.sum(0)
        wins += (ranks * above).sum(0) - n_positive * (n_positive + 1) / 2
        pairs += n_positive * (len(rows) - n_positive)
    return torch.where(pairs > 0, wins / pairs.clamp(min=1), 0.5)


def _rows_of(folds: Int[Tensor, " n"] | None, n: int, device: torch.device) -> list[Int[Tensor, " rows"]]:
    if folds is None:
        return [torch.arange(n, device=device)]
    return [(folds == fold).nonzero()[:, 0].to(device) for fold in torch.unique(folds)]


def _midranks(scores: Float[Tensor, "n *cells"]) -> Float[Tensor, "n *cells"]:
    columns = scores.movedim(0, -1).contiguous()
    ordered = columns.sort(-1).values
    first, last = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return ((first + last + 1).double() / 2).movedim(-1, 0)


def auroc_draws(
    scores: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
    folds: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    draws: Float[Tensor, "boot n_groups"],
) -> Float[Tensor, " boot"]:
    """`auroc` of each bootstrap sample of whole groups; `draws` is how often each group is in each.

    A resampled value is a quadratic form: pairs won between two groups, times how often each of both was drawn.
    """
    wins, pairs = torch.zeros(2, len(draws), dtype=torch.float64)
    for rows in _rows_of(folds, len(scores), scores.device):
        here, member = torch.unique(groups[rows], return_inverse=True)
        drawn, is_positive, value = draws[:, here], positive[rows], scores[rows].double()
        gap = value[is_positive, None] - value[~is_positive]
        one_hot = torch.nn.functional.one_hot(member, len(here)).double()
        won = one_hot[is_positive].T @ ((gap.sign() + 1) / 2) @ one_hot[~is_positive]
        compared = torch.outer(one_hot[is_positive].sum(0), one_hot[~is_positive].sum(0))
        wins += ((drawn @ won) * drawn).sum(1)
        pairs += ((drawn @ compared) * drawn).sum(1)
    values: Tensor = wins / pairs
    return values


def recalls(
    right: Bool[Tensor, "n *cells"], classes: Int[Tensor, "n *cells"], n_classes: int
) -> Float[Tensor, "n_classes *cells"]:
    """Share of each class that was classified rightly; not a number for a class that is absent."""
    members = [(classes == k) for k in range(n_classes)]
    return torch.stack([(right & member).double().sum(0) / member.sum(0) for member in members])


def balanced_accuracy_draws(
    right: Bool[Tensor, " n"],
    classes: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    draws: Float[Tensor, "boot n_groups"],
) -> Float[Tensor, " boot"]:
    """Balanced accuracy, the mean of `recalls`, of each bootstrap sample of whole groups."""
    cell = torch.nn.functional.one_hot(classes).double()
    total = torch.zeros(draws.shape[1], cell.shape[1], dtype=torch.float64).index_add_(0, groups, cell)
    won = torch.zeros_like(total).index_add_(0, groups, cell * right[:, None])
    return ((draws @ won) / (draws @ total)).mean(1)
