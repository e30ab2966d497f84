"""Oracles: the same losses written for autograd in float64, and SAELens' own trainer (recorded)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from techniques import _sae_training as module
from techniques._sae_training import KINDS, Losses, Trainer, Weights, initial_weights

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

    def __init__(self, weights: Weights, kind: str) -> None:
        parts = [weights.enc.T, weights.b_enc, weights.dec, weights.b_dec]
        parts += [] if weights.threshold is None else [weights.threshold]
        self.parameters = [part.clone().requires_grad_() for part in parts]
        self.kind, self.since = kind, torch.zeros(len(weights.b_enc))
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def step(self, x: Tensor) -> Losses:
        w_enc, b_enc, w_dec, b_dec, *threshold = self.parameters
        pre = (x - b_dec) @ w_enc + b_enc
        norms, dead = w_dec.norm(dim=1), self.since > WINDOW
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
        (mse + sparsity + revived).backward()
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
        return min(n_dead / (D_IN // 2), 1.0) * DEAD[self.kind] * (acts @ self.parameters[2] - rest).pow(2).sum(-1).mean()


def batches(n: int) -> list[Tensor]:
    """Sparse combinations of planted directions off the origin, so that some features soon win and some die."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(40, D_IN, generator=generator, dtype=torch.float64)
    present = torch.rand(n * BATCH, 40, generator=generator, dtype=torch.float64)
    return list((torch.where(present < 0.1, present * 20, 0.0) @ directions + 1.0).split(BATCH))


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
