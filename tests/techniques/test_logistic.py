"""The fast solver finds scikit-learn's optimum for every label set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from techniques._logistic import fit_logistic


def rows(n: int, d: int, seed: int = 0) -> tuple[Any, Any]:
    """Correlated features of mean 0 and variance 1, and labels that depend on them: true ones, two shuffles, few."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, 4, generator=generator) @ torch.randn(4, d, generator=generator)
    raw = raw + torch.randn(n, d, generator=generator)
    x = (raw - raw.mean(0)) / raw.std(0)
    truth = raw @ torch.randn(d, generator=generator) + torch.randn(n, generator=generator) > 0
    shuffles = [truth[torch.randperm(n, generator=generator)] for _ in range(2)]
    rare = torch.arange(n) % 10 == 0
    return x, torch.stack([truth, *shuffles, rare], 1)


@pytest.mark.parametrize(("n", "d"), [(120, 20), (60, 60), (40, 100)])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_every_label_set_gets_the_optimum(n: int, d: int, c: float) -> None:
    x, positive = rows(n, d)
    fitted = fit_logistic(x, positive, c)
    assert bool(fitted.converged.all())
    probability = torch.sigmoid(fitted.scores(x)).numpy()
    for column in range(positive.shape[1]):
        exact = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(x.double().numpy(), positive[:, column])
        # The solver stops at a gradient of 1e-5 per row, in float32: 0.002 in probability, 0.1 % of the objective.
        assert probability[:, column] == pytest.approx(exact.predict_proba(x.double().numpy())[:, 1], abs=2e-3)
        ours = objective(x, positive[:, column], fitted.weights[:, column], fitted.bias[column], c)
        best = objective(x, positive[:, column], exact.coef_[0], exact.intercept_[0], c)
        assert best - 1e-9 <= ours <= best * (1 + 1e-3)


def objective(x: Any, positive: Any, weights: Any, bias: Any, c: float) -> float:
    w = np.asarray(weights, dtype=np.float64)
    margin = (2.0 * positive.numpy() - 1) * (x.double().numpy() @ w + float(bias))
    return float(w @ w / 2 + c * np.logaddexp(0, -margin).sum())


def test_label_sets_do_not_touch_each_other() -> None:
    x, positive = rows(80, 15)
    together = fit_logistic(x, positive)
    for column in range(positive.shape[1]):
        alone = fit_logistic(x, positive[:, [column]])
        assert torch.allclose(alone.scores(x)[:, 0], together.scores(x)[:, column], atol=2e-3)


def test_float64_comes_closer() -> None:
    x, positive = rows(120, 20)
    fitted = fit_logistic(x.double(), positive)
    exact = LogisticRegression(tol=1e-12, max_iter=100_000).fit(x.double().numpy(), positive[:, 0])
    assert fitted.weights[:, 0].numpy() == pytest.approx(exact.coef_[0], abs=2e-4)


def test_the_intercept_is_not_penalised() -> None:
    """Without a usable feature, the probability is the share of the label."""
    x = torch.zeros(50, 3)
    fitted = fit_logistic(x, (torch.arange(50) < 10)[:, None], c=1e-3)
    assert torch.sigmoid(fitted.scores(x))[0, 0].item() == pytest.approx(0.2, abs=1e-4)


def test_separable_labels_and_a_single_class_stay_finite() -> None:
    x = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    fitted = fit_logistic(x, torch.stack([x[:, 0] > 0, torch.ones(20, dtype=torch.bool)], 1), c=1e6)
    assert bool(torch.isfinite(fitted.scores(x)).all())
    assert bool(((fitted.scores(x)[:, 0] > 0) == (x[:, 0] > 0)).all())
