"""Logistic regression for many label sets over the same rows at once.

The objective is scikit-learn's, `|w|^2 / 2 + C * sum of log-losses` with an intercept that is not penalised. All label
sets share each pass over the rows (two matrix products), and all share one preconditioner: the Hessian never exceeds
`C / 4 * x^T x + 1` (Boehning & Lindsay, "Monotonicity of quadratic-approximation algorithms", 1988,
https://doi.org/10.1007/BF00049423). L-BFGS (Liu & Nocedal, 1989, https://doi.org/10.1007/BF01589116) starts from its
inverse, and so needs a fraction of the passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOLERANCE = 1e-5  # of the gradient's largest entry, per row of mean log-loss; scikit-learn's default is 1e-4
MAX_ITERATIONS = 300
HISTORY = 12  # pairs of steps and gradient changes that L-BFGS keeps
LINE_STEPS = 8


@dataclass(frozen=True)
class Fit:
    """Linear scores `x @ weights + bias` of each label set; positive where the label is likelier than not.

    Attributes:
        converged: Whether the gradient of each label set came below the tolerance.
    """

    weights: Float[Tensor, "d sets"]
    bias: Float[Tensor, " sets"]
    converged: Bool[Tensor, " sets"]

    def scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n sets"]:
        """Log-odds of the label in nats."""
        return x @ self.weights + self.bias


def fit_logistic(x: Float[Tensor, "n d"], positive: Bool[Tensor, "n sets"], c: float = 1.0) -> Fit:
    """Fit every label set, in the dtype and on the device of `x`."""
    basis = _row_space(x)
    fitted = _minimise(x if basis is None else x @ basis, positive.to(x.dtype) * 2 - 1, c)
    return fitted if basis is None else Fit(basis @ fitted.weights, fitted.bias, fitted.converged)


def _row_space(x: Float[Tensor, "n d"]) -> Float[Tensor, "d rank"] | None:
    """Orthonormal basis of the rows where they are fewer than the columns: the best weights lie in it."""
    n, d = x.shape
    if d <= n:
        return None
    values, vectors = torch.linalg.eigh(x.double() @ x.double().T)
    kept = values > values[-1] * 1e-10
    basis: Tensor = x.double().T @ (vectors[:, kept] / values[kept].sqrt())
    return basis.to(x.dtype)


class _State:
    """Where each label set stands; those that have converged are dropped from the passes over the rows."""

    def __init__(self, x: Float[Tensor, "n d"], signs: Float[Tensor, "n sets"], c: float) -> None:
        self.x, self.signs, self.c = x, signs, c
        n, d = x.shape
        self.theta = x.new_zeros(d + 1, signs.shape[1])  # the last row is the intercept
        self.margin = x.new_zeros(n, signs.shape[1])
        self.factor = torch.linalg.cholesky(c / 4 * (x.T @ x) + torch.eye(d, dtype=x.dtype, device=x.device))
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def gradient(self) -> Float[Tensor, "d+1 sets"]:
        slope = -self.c * self.signs * torch.sigmoid(-self.signs * self.margin)
        return torch.cat([self.x.T @ slope + self.theta[:-1], slope.sum(0, keepdim=True)])

    def precondition(self, gradient: Float[Tensor, "d+1 sets"]) -> Float[Tensor, "d+1 sets"]:
        weights = torch.cholesky_solve(gradient[:-1], self.factor)
        return torch.cat([weights, gradient[-1:] * (4 / (self.c * len(self.x)))])

    def descent(self, gradient: Float[Tensor, "d+1 sets"]) -> Float[Tensor, "d+1 sets"]:
        """L-BFGS' two loops, each label set with its own inner products."""
        q, seen = gradient.clone(), []
        for step, change, rho in reversed(self.pairs):
            a = rho * (step * q).sum(0)
            q -= a * change
            seen.append(a)
        q = self.precondition(q)
        for (step, change, rho), a in zip(self.pairs, reversed(seen), strict=True):
            q += (a - rho * (change * q).sum(0)) * step
        return -q

    def advance(self, direction: Float[Tensor, "d+1 sets"]) -> Float[Tensor, "d+1 sets"]:
        """Go to the minimum along the direction; the margins are linear in it, so that needs one pass over the rows."""
        along = self.x @ direction[:-1] + direction[-1]
        size = self._line_search(along, direction[:-1])
        step = size * direction
        self.theta += step
        self.margin += size * along
        return step

    def _line_search(
        self, along: Float[Tensor, "n sets"], direction: Float[Tensor, "d sets"]
    ) -> Float[Tensor, " sets"]:
        """Newton's method on a convex function of one number per label set, kept between too short and too long."""
        linear, square = (self.theta[:-1] * direction).sum(0), (direction * direction).sum(0)
        size, low = torch.ones_like(linear), torch.zeros_like(linear)
        high = torch.full_like(linear, torch.inf)
        towards = self.signs * along
        for _ in range(LINE_STEPS):
            wrong = torch.sigmoid(-self.signs * self.margin - size * towards)
            slope = linear + size * square - self.c * (wrong * towards).sum(0)
            bend = square + self.c * (wrong * (1 - wrong) * towards * towards).sum(0)
            low, high = torch.where(slope < 0, size, low), torch.where(slope > 0, size, high)
            newton = size - slope / bend
            if bool(((newton - size).abs() < 0.05 * size).all()):
                return newton
            middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
            size = torch.where((newton > low) & (newton < high), newton, middle)
        return size

    def remember(self, step: Float[Tensor, "d+1 sets"], change: Float[Tensor, "d+1 sets"]) -> None:
        product = (step * change).sum(0)
        # Where rounding has eaten the curvature, the pair is left out by a factor of zero.
        rho = torch.where(product > 0, 1 / product.clamp(min=torch.finfo(product.dtype).tiny), 0)
        self.pairs = [*self.pairs[1 - HISTORY :], (step, change, rho)]

    def keep(self, which: Int[Tensor, " kept"]) -> None:
        self.signs, self.theta, self.margin = self.signs[:, which], self.theta[:, which], self.margin[:, which]
        self.pairs = [(step[:, which], change[:, which], rho[which]) for step, change, rho in self.pairs]


def _minimise(x: Float[Tensor, "n d"], signs: Float[Tensor, "n sets"], c: float) -> Fit:
    state = _State(x, signs, c)
    theta = state.theta.clone()
    converged = torch.zeros(signs.shape[1], dtype=torch.bool, device=x.device)
    active = torch.arange(signs.shape[1], device=x.device)
    gradient = state.gradient()
    for _ in range(MAX_ITERATIONS):
        done = gradient.abs().amax(0) <= TOLERANCE * c * len(x)
        theta[:, active] = state.theta
        converged[active] = done
        if bool(done.all()):
            break
        if int(done.sum()) * 4 >= len(done):
            left = (~done).nonzero()[:, 0]
            active, gradient = active[left], gradient[:, left]
            state.keep(left)
        step = state.advance(state.descent(gradient))
        before, gradient = gradient, state.gradient()
        state.remember(step, gradient - before)
    return Fit(theta[:-1], theta[-1], converged)
