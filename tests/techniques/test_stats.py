"""Scores and intervals against scikit-learn and against resampling row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

from techniques._stats import (
    auroc,
    auroc_draws,
    balanced_accuracy_draws,
    mean_interval,
    percentiles,
    permutation_p,
    recalls,
    resamples,
)


@pytest.fixture
def sample() -> dict[str, Any]:
    """Scores with ties, labels, folds, and groups of unequal size that each lie in one fold."""
    torch.manual_seed(0)
    groups = torch.randint(12, (90,))
    return {
        "scores": torch.randn(90, 3).round(decimals=1),
        "positive": torch.rand(90, 3) > 0.6,
        "groups": groups,
        "folds": groups % 3,
    }


def test_auroc_is_scikit_learns_also_with_ties(sample: dict[str, Any]) -> None:
    found = auroc(sample["scores"], sample["positive"])
    for column in range(3):
        expected = roc_auc_score(sample["positive"][:, column], sample["scores"][:, column])
        assert found[column] == pytest.approx(expected, abs=1e-12)


def test_auroc_compares_within_folds_only(sample: dict[str, Any]) -> None:
    """A constant added to one fold's scores changes nothing; the value is the mean over folds, weighed by pairs."""
    scores, positive, folds = sample["scores"][:, 0], sample["positive"][:, 0], sample["folds"]
    wins = pairs = 0.0
    for fold in range(3):
        here = positive[folds == fold]
        weight = int(here.sum()) * int((~here).sum())
        wins += weight * roc_auc_score(here, scores[folds == fold])
        pairs += weight
    shifted = scores + 100 * (folds == 1)
    assert auroc(scores, positive, folds).item() == pytest.approx(wins / pairs, abs=1e-12)
    assert auroc(shifted, positive, folds).item() == pytest.approx(wins / pairs, abs=1e-12)
    assert auroc(shifted, positive).item() != pytest.approx(wins / pairs, abs=1e-3)


def test_auroc_without_a_pair_is_chance() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])).item() == 0.5


def test_draws_are_those_of_rows_resampled_by_group(sample: dict[str, Any]) -> None:
    scores, positive = sample["scores"][:, 0], sample["positive"][:, 0]
    groups, folds = sample["groups"], sample["folds"]
    draws = resamples(12, seed=3, n_boot=20)
    found = auroc_draws(scores, positive, folds, groups, draws)
    right = positive == (scores > 0)
    balanced = balanced_accuracy_draws(right, positive.long(), groups, draws)
    for value, share, counts in zip(found, balanced, draws.long(), strict=True):
        rows = torch.arange(90).repeat_interleave(counts[groups])
        assert value.item() == pytest.approx(auroc(scores[rows], positive[rows], folds[rows]).item(), abs=1e-12)
        expected = balanced_accuracy_score(positive[rows], scores[rows] > 0)
        assert share.item() == pytest.approx(expected, abs=1e-12)


def test_each_resample_draws_as_many_as_there_are() -> None:
    draws = resamples(7, seed=0, n_boot=50)
    assert torch.equal(draws.sum(1), torch.full((50,), 7.0, dtype=torch.float64))
    assert not torch.equal(draws, resamples(7, seed=1, n_boot=50))


def test_recalls_are_scikit_learns() -> None:
    torch.manual_seed(1)
    truth, chosen = torch.randint(3, (60,)), torch.randint(3, (60,))
    assert recalls(truth == chosen, truth, 3).tolist() == pytest.approx(
        recall_score(truth, chosen, average=None).tolist()
    )


def test_mean_interval_has_the_width_of_the_standard_error() -> None:
    torch.manual_seed(2)
    values = torch.randn(400, 2) * torch.tensor([1.0, 5.0]) + 3
    mean, low, high = mean_interval(values, seed=0, n_boot=4000)
    error = values.double().std(0) / 400**0.5
    assert torch.allclose(mean, values.double().mean(0))
    # 4,000 resamples leave about 3 % of noise in each end.
    assert torch.allclose((high - low) / (2 * 1.96 * error), torch.ones(2).double(), atol=0.08)
    assert bool(((low < mean) & (mean < high)).all())


def test_percentiles_leave_out_what_is_no_number() -> None:
    low, high = percentiles(torch.tensor([float("nan"), 1.0, 2.0, 3.0]), level=0.5)
    assert (low.item(), high.item()) == (1.5, 2.5)


def test_p_counts_the_observed_value_and_ties() -> None:
    assert permutation_p(0.9, torch.tensor([0.1, 0.9, 0.95])) == 3 / 4
    assert permutation_p(2.0, torch.zeros(99)) == 1 / 100
