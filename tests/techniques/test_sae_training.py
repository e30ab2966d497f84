"""Oracles: the same losses written for autograd in float64, and SAELens' own trainer (recorded)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from techniques import _sae_training as module
from techniques._sae_training import KINDS, Losses, Trainer, Weights, initial_weights

ORACLES = Path(__file__).parent / "oracles"
D_IN, D_SAE, K, BATCH = 12, 64, 4, 48
LEARNING_RATE, WINDOW = 3e-3, 2
COEFFICIENT = {"topk": 0.0, "batchtopk": 0.0, "jumprelu": 0.3, "relu": 0.4}
DEAD = {"topk": 1.0, "batchtopk": 1.0, "jumprelu": 0.05, "relu": 0.05}


class _Gate(torch.autograd.Function):
    """A step at the threshold whose derivative is a rectangle of width 0.05 and area 1, for the threshold alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        return None, -(((pre - threshold).abs() < 0.025) * grads[0] / 0.05).sum(0)


class Plain:
    """The oracle: dense, by autograd, with parameters W_enc [d_in, d_sae] as SAELens has them."""

    def __init__(self, weights: Weights, kind: str, window: int = WINDOW) -> None:
        parts = [weights.enc.T, weights.b_enc, weights.dec, weights.b_dec]
        parts += [] if weights.threshold is None else [weights.threshold]
        self.parameters = [part.clone().requires_grad_() for part in parts]
        self.kind, self.since, self.window = kind, torch.zeros(len(weights.b_enc)), window
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def step(self, x: Tensor) -> Losses:
        w_enc, b_enc, w_dec, b_dec, *threshold = self.parameters
        pre = (x - b_dec) @ w_enc + b_enc
        norms, dead = w_dec.norm(dim=1), self.since > self.window
        gate = _Gate.apply(pre, threshold[0]) if threshold else None  # type: ignore[no-untyped-call]
        acts = self.activations(pre, norms, gate)
        out = acts @ w_dec + b_dec
        mse = (out - x).pow(2).sum(-1).mean()
        sparsity = torch.zeros(())
        if self.kind == "relu":
            sparsity = COEFFICIENT["relu"] * (acts * norms).sum(-1).mean()
        elif gate is not None:
            sparsity = COEFFICIENT["jumprelu"] * (2 / K * (gate.sum(-1) - K) ** 2).mean()
        revived = self.revive(pre, norms, dead, (x - out).detach()) if dead.any() else torch.zeros(())
        fired = acts > 0
        self.since = torch.where(fired.any(0), torch.zeros(()), self.since + 1)
        self.optimizer.zero_grad()
        torch.autograd.backward(mse + sparsity + revived)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if threshold:
            threshold[0].data.clamp_(min=0)
        return Losses(mse.item(), sparsity.item(), revived.item(), fired.sum(-1).double().mean().item())

    def activations(self, pre: Tensor, norms: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            # d(pre * step)/d(threshold) carries the threshold itself, not pre, in the estimate of the paper.
            threshold = self.parameters[4]
            return pre * gate.detach() + threshold * (gate - gate.detach())
        if self.kind == "relu":
            return pre.relu()
        score = (pre * norms).relu()
        lowest = score.topk(K).values[:, -1:] if self.kind == "topk" else score.flatten().topk(K * len(pre)).values[-1]
        return torch.where(score >= lowest, score, 0.0) / norms

    def revive(self, pre: Tensor, norms: Tensor, dead: Tensor, rest: Tensor) -> Tensor:
        if self.kind in ("jumprelu", "relu"):
            threshold = self.parameters[4] if self.kind == "jumprelu" else torch.zeros(())
            return DEAD[self.kind] * ((threshold - pre).relu() * dead * norms).sum(-1).mean()
        n_dead = int(dead.sum())
        score = torch.where(dead, pre * norms, -torch.inf)
        top = score.topk(min(D_IN // 2, n_dead))
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values) / norms
        return (
            min(n_dead / (D_IN // 2), 1.0) * DEAD[self.kind] * (acts @ self.parameters[2] - rest).pow(2).sum(-1).mean()
        )


def batches(n: int) -> list[Tensor]:
    """Sparse combinations of planted directions off the origin, so that some features soon win and some die."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(40, D_IN, generator=generator, dtype=torch.float64)
    present = torch.rand(n * BATCH, 40, generator=generator, dtype=torch.float64)
    return list(torch.where(present < 0.1, present * 20, 0.0).matmul(directions).add(1.0).view(n, BATCH, D_IN))


def weights_of(kind: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    weights = initial_weights(D_SAE, kind, torch.zeros(D_IN, dtype=torch.float64), generator)
    weights.dec *= 0.5 + torch.rand(D_SAE, 1, generator=generator, dtype=torch.float64)  # so that their norms count
    weights.b_enc -= torch.rand(D_SAE, generator=generator, dtype=torch.float64) * 8 * (torch.arange(D_SAE) % 3 == 0)
    return weights


@pytest.mark.parametrize("sparse_below", [0.0, 1.1], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_autograd(kind: str, sparse_below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARSE_BELOW", sparse_below)
    weights = weights_of(kind)
    plain = Plain(copy.deepcopy(weights), kind)
    trainer = Trainer(weights, kind, K, WINDOW, DEAD[kind])
    seen_dead = 0.0
    for x in batches(12):
        ours = trainer.step(x, LEARNING_RATE, COEFFICIENT[kind])
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain.step(x)), rtol=1e-9, atol=1e-12)
        seen_dead += ours.dead
    assert seen_dead > 0
    for i, (mine, theirs) in enumerate(zip(weights.tensors(), plain.parameters, strict=True)):
        torch.testing.assert_close(mine, theirs.detach().T if i == 0 else theirs.detach(), rtol=1e-8, atol=1e-10)


def test_few_dead_features_are_charged_less() -> None:
    """AuxK weighs less where fewer features are dead than half the width of the activations."""
    weights, window = weights_of("topk"), 8
    weights.b_enc[:] = torch.where(torch.arange(D_SAE) < 1, -1000.0, 0.0)
    plain, trainer = Plain(copy.deepcopy(weights), "topk", window), Trainer(weights, "topk", K, window, 1.0)
    for x in torch.cat(batches(330)).view(11, -1, D_IN):  # big batches, so that few features miss all of them
        n_dead = int(trainer.dead.sum())
        ours, theirs = trainer.step(x, LEARNING_RATE), plain.step(x)
        assert ours.dead == pytest.approx(theirs.dead, rel=1e-9)
    assert 1 <= n_dead < D_IN // 2


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with np.load(ORACLES / "sae.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind == "f"}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_saelens(kind: str, recorded: dict[str, Tensor]) -> None:
    def part(when: str) -> Weights:
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        found = [recorded.get(f"{kind}/{when}/{name}") for name in names]
        w_enc, b_enc, w_dec, b_dec, threshold = (None if value is None else value.clone() for value in found)
        assert w_enc is not None
        assert b_enc is not None
        assert w_dec is not None
        assert b_dec is not None
        return Weights(w_enc.T.contiguous(), b_enc, w_dec, b_dec, threshold)

    expected = part("after")
    coefficient, dead = {"relu": (0.4, 0.0), "jumprelu": (0.3, 0.05)}.get(kind, (0.0, 1.0))
    trainer = Trainer(part("before"), kind, 4, 2, dead)
    for x, losses in zip(recorded["batches"], recorded[f"{kind}/losses"], strict=True):
        ours = trainer.step(x, 3e-3, coefficient)
        torch.testing.assert_close(
            torch.tensor([ours.mse, ours.sparsity + ours.dead]).double(), losses, rtol=2e-5, atol=1e-6
        )
    if expected.threshold is not None:
        expected.threshold.clamp_(min=0)  # SAELens does this at the next step
    for mine, theirs in zip(trainer.weights.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if kind == "batchtopk":
        assert trainer.threshold == pytest.approx(recorded["batchtopk/threshold"].item(), rel=1e-5)


def test_planted_features_are_found() -> None:
    """16 planted directions, 2 of them present at a time on average; each must be close to some feature's row."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(16, 24, generator=generator), dim=1)
    trainer = Trainer(initial_weights(32, "topk", torch.zeros(24), generator), "topk", 3, 50, 1 / 32)
    for step in range(600):
        present = torch.rand(256, 16, generator=generator)
        x = torch.where(present < 0.125, 1 + present * 8, 0.0) @ planted
        trainer.step(x, 3e-3 * min(1.0, (600 - step) / 200))
    cosines = planted @ trainer.result().w_dec.T
    assert cosines.max(1).values.mean() > 0.95
    assert cosines.max(1).values.min() > 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_result_has_unit_rows_and_the_function_that_was_trained(kind: str) -> None:
    weights = weights_of(kind)
    trainer = Trainer(weights, kind, K, WINDOW, DEAD[kind])
    data = batches(30)
    for x in data:
        trainer.step(x, LEARNING_RATE, COEFFICIENT[kind])
    sae, x = trainer.result(), data[-1]
    torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    pre = (x - weights.b_dec) @ weights.enc.T + weights.b_enc
    if kind in ("topk", "relu"):
        acts = Plain(weights, kind).activations(pre, weights.dec.norm(dim=1), None)
    elif weights.threshold is not None:
        acts = pre * (pre > weights.threshold)
    else:
        assert sae.threshold is not None
        acts = pre.relu() * (pre * weights.dec.norm(dim=1) > sae.threshold)
    assert (acts > 0).any()
    torch.testing.assert_close(sae.decode(sae.encode(x)), (acts @ weights.dec + weights.b_dec).detach())


@pytest.mark.parametrize(("d_sae", "k"), [(48, 3), (320, 5), (330, 5), (320, 1)])
def test_largest_activations_of_each_token(d_sae: int, k: int) -> None:
    pre = torch.randn(50, d_sae, generator=torch.Generator().manual_seed(3))
    found = module._largest_in_rows(pre, k)
    assert torch.equal(found.sort(1).values, pre.topk(k).indices.sort(1).values)


@pytest.mark.parametrize("d_sae", [48, 50])  # a multiple of the group size, and none
def test_largest_activations_of_a_batch(d_sae: int) -> None:
    trainer = Trainer(initial_weights(d_sae, "batchtopk", torch.zeros(8), torch.Generator()), "batchtopk", 3, 9, 0.0)
    generator = torch.Generator().manual_seed(2)
    for floor in (None, -1.0, 0.0, 0.5, 1.2, 100.0):
        pre = torch.randn(20, d_sae, generator=generator)
        trainer._floor = floor
        expected = pre.flatten().topk(60).indices.sort().values
        assert torch.equal(trainer._largest(pre), expected)


def test_fewer_positive_activations_than_k() -> None:
    trainer = Trainer(initial_weights(32, "batchtopk", torch.zeros(8), torch.Generator()), "batchtopk", 16, 9, 0.0)
    trainer._floor = 0.0
    pre = torch.full((4, 32), -1.0)
    pre[1, 5] = pre[3, 30] = 2.0
    assert trainer._largest(pre).tolist() == [37, 126]


def test_batchtopk_goes_on_where_no_activation_is_positive() -> None:
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    weights = initial_weights(D_SAE, "batchtopk", x.mean(0), torch.Generator().manual_seed(1))
    trainer = Trainer(weights, "batchtopk", K, WINDOW, 0.0)
    weights.b_enc -= 100
    for _ in range(3):
        losses = trainer.step(x, LEARNING_RATE)
    assert losses.l0 == 0
