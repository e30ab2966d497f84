"""Training a sparse autoencoder, with its gradients written out and the products with few features sparse.

Sources: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), https://arxiv.org/abs/2406.04093 (topk, AuxK);
Bussmann et al., "BatchTopK Sparse Autoencoders" (2024), https://arxiv.org/abs/2412.06410; Rajamanoharan et al.,
"Jumping Ahead: JumpReLU Sparse Autoencoders" (2024), https://arxiv.org/abs/2407.14435. The losses are those of
SAELens' training SAEs, so that a step here equals a step there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from techniques._sae import SAE
from techniques._sae_active import Active, Dense, Sparse, warm_up

KINDS = ("topk", "batchtopk", "jumprelu", "relu")
CHOOSING = ("topk", "batchtopk")  # kinds that keep the k largest, by pre-activation times decoder norm
SPARSE_BELOW = 0.04  # share of features that may be active for sparse products to beat dense ones on a CPU
WARM_UP, DECAY = 0.05, 0.2  # shares of the steps in which the learning rate rises from 0 and falls to 0
THRESHOLD_RATE = 0.01  # of the running mean of batchtopk's smallest activation
MAX_GRADIENT_NORM = 1.0
BANDWIDTH = 0.05  # of jumprelu's straight-through estimate
FLOOR = 0.9  # batchtopk looks for the next batch's largest activations above this share of the last one's smallest
GROUPS = 16  # features that are looked at together when a batch's largest activations are sought


class Losses(NamedTuple):
    """What a step minimised, before its update: means over the batch.

    Attributes:
        mse: Squared error summed over d_in.
        sparsity: relu: coefficient times the sum of activations times decoder norms; jumprelu: coefficient times
            2 / k times the squared distance of L0 from k; topk and batchtopk: 0.
        dead: What the features that no longer fire were charged.
        l0: Mean number of active features per token.
    """

    mse: float
    sparsity: float
    dead: float
    l0: float


@dataclass
class Weights:
    """Parameters in training, or their gradients; the encoder lies feature by feature, as the decoder does."""

    enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None

    def tensors(self) -> list[Tensor]:
        """The parameters, in a fixed order."""
        tensors = [self.enc, self.b_enc, self.dec, self.b_dec]
        return tensors if self.threshold is None else [*tensors, self.threshold]


def initial_weights(d_sae: int, kind: str, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> Weights:
    """Random decoder rows of equal norm, the encoder tied to them, b_dec at the mean of the data.

    Rows start as unit vectors where k picks the features, and at 0.1 where a penalty on all activations does.
    """
    rows = torch.randn(d_sae, len(mean), generator=generator, dtype=mean.dtype).to(mean.device)
    rows *= (1.0 if kind in CHOOSING else 0.1) / rows.norm(dim=1, keepdim=True)
    threshold = torch.full_like(rows[:, 0], 0.01) if kind == "jumprelu" else None
    return Weights(rows.clone(), torch.zeros_like(rows[:, 0]), rows, mean.clone(), threshold)


class Trainer:
    """Adam on the loss of one kind of SAE.

    Attributes:
        weights: The parameters, updated in place.
        threshold: batchtopk's running mean of the smallest activation kept, in units of unit decoder rows.
        since_fired: Steps since each feature was last active.
        dead_window: Steps without firing after which a feature counts as dead.
    """

    def __init__(self, weights: Weights, kind: str, k: int, dead_window: int, dead_coefficient: float) -> None:
        self.weights, self.kind, self.k = weights, kind, k
        self.threshold = 0.0
        self.since_fired = torch.zeros_like(weights.b_enc)
        self.dead_window, self._dead_coefficient = dead_window, dead_coefficient
        self._steps = 0
        self._floor: float | None = None  # a little below the smallest activation that batchtopk last kept
        self._optimizer = torch.optim.Adam(weights.tensors(), betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._pre = weights.b_enc.new_empty(0)
        warm_up()

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Features that were last active more than `dead_window` steps ago."""
        return self.since_fired > self.dead_window

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch d_in"], learning_rate: float, sparsity_coefficient: float = 0.0) -> Losses:
        """One update on a batch of activations in the weights' dtype; the losses are those before it."""
        w = self.weights
        centred = x - w.b_dec
        norms = w.dec.norm(dim=1)
        dead = self.dead.nonzero().squeeze(1)
        pre = self._pre_activations(centred, norms)
        dead_pre = pre[:, dead]
        active, near = self._pick(pre, norms)
        error = active.times(w.dec).add_(w.b_dec).sub_(x)
        fires = (active.values > 0).to(x.dtype)
        l0, n_fired = active.token_sums(fires), active.feature_sums(fires)

        share = 2 / len(x)
        gradients = Weights(
            w.enc, w.b_enc, active.gathered(active.values, error).mul_(share), error.sum(0).mul_(share), w.threshold
        )
        to_pre = active.dots(error, w.dec).mul_(share)
        sparsity = 0.0
        if self.kind == "relu":
            sparsity = _l1_loss(w, active, norms, sparsity_coefficient, to_pre, gradients)
        elif near is not None:
            sparsity = _l0_loss(w, active, near, l0, self.k, sparsity_coefficient, to_pre, gradients)
        to_pre.mul_(fires)
        gradients.enc = active.gathered(to_pre, centred)
        gradients.b_enc = active.feature_sums(to_pre)
        revived = self._revive(dead, dead_pre, centred, error, norms, gradients) if len(dead) else 0.0
        # All pre-activations see b_dec through `centred`; one product with the encoder collects their shares.
        gradients.b_dec.sub_(gradients.b_enc @ w.enc)
        self._update(gradients, learning_rate)
        self._note(active, norms, n_fired)
        return Losses(error.pow(2).sum().item() / len(x), sparsity, revived, l0.mean().item())

    def result(self) -> SAE:
        """The SAE as it is now, with unit decoder rows; batchtopk becomes a jumprelu of one threshold."""
        w = self.weights
        sae = SAE(
            architecture={"relu": "standard", "batchtopk": "jumprelu"}.get(self.kind, self.kind),
            w_enc=w.enc.T.contiguous(),
            b_enc=w.b_enc,
            w_dec=w.dec,
            b_dec=w.b_dec.clone(),
            threshold=w.threshold,
            k=self.k if self.kind == "topk" else None,
        ).unit_rows()
        if self.kind != "batchtopk":
            return sae
        mean = self.threshold / (1 - (1 - THRESHOLD_RATE) ** self._steps)  # it started at 0
        return replace(sae, threshold=torch.full_like(w.b_enc, mean))

    def _pre_activations(self, centred: Tensor, norms: Tensor) -> Float[Tensor, "batch d_sae"]:
        """Pre-activations; those among which k are chosen are weighted by the norm of what they write."""
        enc, b_enc = self.weights.enc, self.weights.b_enc
        if self.kind in CHOOSING:
            enc, b_enc = enc * norms[:, None], b_enc * norms
        if self._pre.shape != (len(centred), len(enc)):
            self._pre = centred.new_empty(len(centred), len(enc))  # kept: fresh pages of this size are slow
        return torch.addmm(b_enc, centred, enc.T, out=self._pre)

    def _pick(self, pre: Float[Tensor, "batch d_sae"], norms: Tensor) -> tuple[Active, Tensor | None]:
        """The active pairs; for jumprelu also which of them lie near their threshold. May overwrite `pre`."""
        if self.kind not in CHOOSING:
            return _above(pre, self.weights.threshold)
        if self.kind == "topk":
            firsts = torch.arange(0, pre.numel(), pre.shape[1], device=pre.device)
            chosen = (_largest_in_rows(pre, self.k) + firsts[:, None]).flatten()
        else:
            chosen = self._largest(pre)
        tokens, features = chosen // pre.shape[1], chosen % pre.shape[1]
        values = pre.flatten()[chosen].relu_()
        if self.kind == "batchtopk":
            self._floor = FLOOR * values.min().item() if len(values) else 0.0
        return Sparse(tokens, features, values / norms[features], pre.shape), None

    def _largest(self, pre: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " pairs"]:
        """Indices of the k x batch largest activations, sorted; only the positive ones where those are fewer."""
        flat, wanted = pre.flatten(), min(self.k * len(pre), pre.numel())
        if self._floor is not None:
            found = _exceeding(pre, self._floor)
            if len(found) >= wanted:
                return found[flat[found].topk(wanted, sorted=False).indices].sort().values
            if self._floor == 0:
                return found.sort().values
        return flat.topk(wanted, sorted=False).indices.sort().values

    def _revive(
        self, dead: Tensor, pre: Tensor, centred: Tensor, error: Tensor, norms: Tensor, gradients: Weights
    ) -> float:
        """Charge the features that no longer fire, adding to `gradients`; the loss.

        topk and batchtopk: the best of them have to explain the error (AuxK). relu and jumprelu: what their
        pre-activations lack to their thresholds.
        """
        w, c, batch = self.weights, self._dead_coefficient, len(pre)
        if self.kind not in CHOOSING:
            threshold = torch.zeros_like(norms[dead]) if w.threshold is None else w.threshold[dead]
            lack = (threshold - pre).relu()
            to_pre = (lack > 0) * (-c / batch) * norms[dead]
            loss = c / batch * (lack.sum(0) @ norms[dead]).item()
            gradients.dec[dead] += w.dec[dead] * (c / batch * lack.sum(0) / norms[dead])[:, None]
            if gradients.threshold is not None:
                gradients.threshold[dead] -= to_pre.sum(0)
        else:
            most = error.shape[1] // 2
            c *= min(len(dead) / most, 1.0)
            best = pre.topk(min(most, len(dead)), sorted=False).indices
            chosen = torch.zeros_like(pre).scatter_(1, best, 1.0)
            values = chosen * pre / norms[dead]
            rest = torch.addmm(error, values, w.dec[dead])
            loss = c / batch * rest.pow(2).sum().item()
            rest.mul_(2 * c / batch)
            gradients.dec[dead] += values.T @ rest
            to_pre = (rest @ w.dec[dead].T) * chosen
        gradients.enc[dead] += to_pre.T @ centred
        gradients.b_enc[dead] += to_pre.sum(0)
        return loss

    def _update(self, gradients: Weights, learning_rate: float) -> None:
        grads = gradients.tensors()
        norm = math.hypot(*(torch.linalg.vector_norm(gradient).item() for gradient in grads))
        if norm > MAX_GRADIENT_NORM:
            torch._foreach_mul_(grads, MAX_GRADIENT_NORM / (norm + 1e-6))
        for parameter, gradient in zip(self.weights.tensors(), grads, strict=True):
            parameter.grad = gradient
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        if self.weights.threshold is not None:
            self.weights.threshold.clamp_(min=0)  # below zero it would let negative pre-activations pass
        self._steps += 1

    def _note(self, active: Active, norms: Tensor, n_fired: Float[Tensor, " d_sae"]) -> None:
        self.since_fired += 1
        self.since_fired[n_fired > 0] = 0
        if self.kind == "batchtopk":
            kept = active.values * active.by_feature(norms)
            if bool((kept > 0).any()):
                self.threshold += THRESHOLD_RATE * (kept[kept > 0].min().item() - self.threshold)


def train(
    trainer: Trainer, batches: Iterator[Tensor], steps: int, rate: float, coefficient: float
) -> tuple[list[tuple[Losses, int]], KeyboardInterrupt | None]:
    """Train for some steps, the learning rate rising from 0 and falling to 0 again.

    Returns:
        Losses and number of dead features of each step done, and what stopped the steps, if anything did.

    Raises:
        ValueError: A loss is not finite.
        KeyboardInterrupt: Training was stopped before its first step was done.
    """
    log: list[tuple[Losses, int]] = []
    try:
        for step in tqdm(range(steps), desc=f"{trainer.kind} SAE", unit="step", delay=2):
            warm = min(1.0, (step + 1) / max(1, WARM_UP * steps))
            down = min(1.0, (steps - step) / max(1, DECAY * steps))
            losses = trainer.step(next(batches), rate * warm * down, coefficient * warm)
            _check_finite(losses, step, rate)
            log.append((losses, int(trainer.dead.sum())))
    except KeyboardInterrupt as stop:
        if not log:
            raise
        return log, stop
    return log, None


def _check_finite(losses: Losses, step: int, rate: float) -> None:
    if not all(map(math.isfinite, losses)):
        raise ValueError(
            f"The loss at step {step + 1} is not finite with learning_rate {rate:.3g}; expected numbers. Nothing was "
            "saved. Lower learning_rate or sparsity_coefficient."
        )


def _above(pre: Float[Tensor, "batch d_sae"], threshold: Tensor | None) -> tuple[Active, Tensor | None]:
    """The pairs above their threshold, or 0 without one; with one also those near it, which its gradient needs."""
    mask = pre > (0 if threshold is None else threshold - BANDWIDTH / 2)
    at, bar = pre, threshold
    build: Callable[..., Active] = Dense
    if torch.count_nonzero(mask).item() < SPARSE_BELOW * pre.numel():
        tokens, features = mask.nonzero(as_tuple=True)
        at, bar = pre[tokens, features], None if threshold is None else threshold[features]
        build = partial(Sparse, tokens, features, shape=pre.shape)
    if bar is None:
        return build(values=at.relu_()), None
    return build(values=at * (at > bar)), ((at > bar - BANDWIDTH / 2) & (at < bar + BANDWIDTH / 2)).to(at.dtype)


def _largest_in_rows(pre: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch k"]:
    """Indices of each row's k largest, in no order."""
    batch, d_sae = pre.shape
    if d_sae % GROUPS or d_sae < 4 * GROUPS * k:
        return pre.topk(k, sorted=False).indices
    # They lie in the k groups of largest maximum: whatever another group holds, each of these k holds more.
    width = d_sae // GROUPS
    groups = pre.view(batch, GROUPS, width).amax(1).topk(k, sorted=False).indices
    members = (groups[:, None] + torch.arange(GROUPS, device=pre.device)[:, None] * width).flatten(1)
    return members.gather(1, pre.gather(1, members).topk(k, sorted=False).indices)


def _exceeding(pre: Float[Tensor, "batch d_sae"], floor: float) -> Int[Tensor, " pairs"]:
    """Indices of what exceeds a floor that few do, in no order."""
    flat, (batch, d_sae) = pre.flatten(), pre.shape
    if d_sae % GROUPS:
        return (flat > floor).nonzero().squeeze(1)
    # Maxima of groups are found several times faster than members are listed, and few groups have one.
    width = d_sae // GROUPS
    hits = (pre.view(batch, GROUPS, width).amax(1) > floor).flatten().nonzero()
    members = (hits // width * d_sae + hits % width + torch.arange(GROUPS, device=pre.device) * width).flatten()
    return members[flat[members] > floor]


def _l1_loss(
    w: Weights, active: Active, norms: Tensor, coefficient: float, to_pre: Tensor, gradients: Weights
) -> float:
    """Coefficient times activations times decoder norms, per token; adds to both gradients."""
    share = coefficient / len(active.token_sums(active.values))
    sums = active.feature_sums(active.values)
    to_pre.add_(active.by_feature(share * norms))
    gradients.dec.addcmul_(w.dec, (share * sums / norms)[:, None])
    return share * (sums @ norms).item()


def _l0_loss(
    w: Weights,
    active: Active,
    near: Tensor,
    l0: Float[Tensor, " batch"],
    k: int,
    coefficient: float,
    to_pre: Tensor,
    gradients: Weights,
) -> float:
    """Coefficient times 2 / k times (L0 - k) squared, per token; only the thresholds see it, by a straight-through
    estimate from the pairs within half a bandwidth of theirs.
    """
    assert w.threshold is not None
    off = l0 - k
    to_l0 = coefficient * 4 / k / len(l0) * off
    seen = w.threshold * active.feature_sums(near * to_pre) + active.feature_sums(near * active.by_token(to_l0))
    gradients.threshold = seen / -BANDWIDTH
    return coefficient * 2 / k * off.pow(2).mean().item()
