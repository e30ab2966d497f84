"""Cross-validation of linear classifiers by groups, for many label sets at once, and what shuffled labels give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from techniques._logistic import Fit, fit_logistic

Method = Literal["logistic", "mean_difference", "ridge"]
METHODS = ("logistic", "mean_difference", "ridge")


class Scale:
    """Mean 0 and variance 1 in the rows it was made from; what only rounding varies there becomes 0."""

    def __init__(self, x: Float[Tensor, "n d"], eps: float) -> None:
        self.mean = x.mean(0)
        self.spread = x.std(0, correction=0)
        # Standardised, the rounding of a constant would be as loud as a signal, and it follows the shape of the batch.
        constant = self.spread <= max(1e-5, eps) * x.square().mean(0).sqrt()
        self.spread[constant] = torch.inf

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Rows on this scale."""
        return (x - self.mean) / self.spread


def fit(method: Method, x: Float[Tensor, "n d"], positive: Bool[Tensor, "n sets"], c: float) -> Fit:
    """Fit each label set to rows on a `Scale`; a score is positive where the label is likelier than not.

    `logistic` minimises |w|^2 / 2 + c * log-loss, `ridge` |w|^2 / c + squared error of labels -1 and 1. For
    `mean_difference` the weights are the difference of the class means, and 0 lies halfway between them.
    """
    if method == "logistic":
        return fit_logistic(x, positive, c)
    if method == "ridge":
        return _fit_ridge(x, positive.to(x.dtype) * 2 - 1, c)
    above, below = (x.T @ part.to(x.dtype) / part.sum(0).clamp(min=1) for part in (positive, ~positive))
    weights = above - below
    middle = (weights * (above + below)).sum(0) / 2
    return Fit(weights, -middle, torch.ones_like(middle, dtype=torch.bool))


def _fit_ridge(x: Float[Tensor, "n d"], signs: Float[Tensor, "n sets"], c: float) -> Fit:
    n, d = x.shape
    bias = signs.mean(0)
    eye = torch.eye(min(n, d), dtype=x.dtype, device=x.device) / c
    if d <= n:
        weights = torch.linalg.solve(x.T @ x + eye, x.T @ (signs - bias))
    else:
        weights = x.T @ torch.linalg.solve(x @ x.T + eye, signs - bias)
    return Fit(weights, bias, torch.ones_like(bias, dtype=torch.bool))


def one_vs_rest(classes: Int[Tensor, "n sets"], n_classes: int) -> Bool[Tensor, "n sets outputs"]:
    """Which rows are positive for each classifier: one for two classes (the second is positive), else one per class."""
    outputs = torch.arange(n_classes, device=classes.device) if n_classes > 2 else torch.ones(1, device=classes.device)
    return classes[..., None] == outputs


def cross_validate(
    x: Float[Tensor, "n d"],
    classes: Int[Tensor, "n sets"],
    n_classes: int,
    folds: Int[Tensor, " n"],
    method: Method,
    c: float,
    eps: float,
) -> tuple[Float[Tensor, "n sets outputs"], bool]:
    """Score each row by classifiers that were fitted, and scaled, on the other folds; whether all fits converged."""
    positive = one_vs_rest(classes, n_classes)
    scores = x.new_zeros(positive.shape)
    converged = True
    for fold in torch.unique(folds):
        train, test = folds != fold, folds == fold
        scale = Scale(x[train], eps)
        fitted = fit(method, scale(x[train]), positive[train].flatten(1), c)
        scores[test] = fitted.scores(scale(x[test])).view(-1, *positive.shape[1:])
        converged &= bool(fitted.converged.all())
    return scores, converged


def predictions(scores: Float[Tensor, "n *sets outputs"]) -> Int[Tensor, "n *sets"]:
    """The class that each row is put in: the positive one above 0 of two, else the one with the highest score."""
    return (scores[..., 0] > 0).long() if scores.shape[-1] == 1 else scores.argmax(-1)


def merged_groups(groups: Sequence[Hashable], inputs: Sequence[Hashable]) -> tuple[list[int], list[set[Hashable]]]:
    """Number the groups, those that share an input as one: (number of each row, groups that were merged)."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for group, text in zip(groups, inputs, strict=True):
        parent[root(("input", text))] = root(("group", group))
    roots = [root(("group", group)) for group in groups]
    numbers = {found: i for i, found in enumerate(dict.fromkeys(roots))}
    members: dict[Hashable, set[Hashable]] = defaultdict(set)
    for found, group in zip(roots, groups, strict=True):
        members[found].add(group)
    return [numbers[found] for found in roots], [names for names in members.values() if len(names) > 1]


def group_folds(
    classes: Int[Tensor, " n"], groups: Int[Tensor, " n"], n_folds: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Deal whole groups to folds, those that hold a rare class first, so that each fold gets each class if it can."""
    held = held_classes(classes, groups)
    rarest = torch.where(held, held.sum(0), len(held) + 1).argmin(1)
    order = torch.randperm(len(held), generator=generator)
    order = order[rarest[order].argsort(stable=True)]
    dealt = torch.empty_like(order)
    dealt[order] = torch.arange(len(order)) % n_folds
    return dealt[groups]


def held_classes(classes: Int[Tensor, " n"], groups: Int[Tensor, " n"]) -> Bool[Tensor, "n_groups n_classes"]:
    """Which classes each group has."""
    held = torch.zeros(int(groups.max()) + 1, int(classes.max()) + 1, dtype=torch.bool)
    held[groups, classes] = True
    return held


def group_labels(
    classes: Int[Tensor, " n"], groups: Int[Tensor, " n"], n_sets: int, generator: torch.Generator
) -> Int[Tensor, "n sets"]:
    """Give each group one label at random: that of some row of another group, every group donating once."""
    n_groups = int(groups.max()) + 1
    donor = torch.empty(n_groups, dtype=torch.long)
    mixed = torch.randperm(len(groups), generator=generator)
    donor[groups[mixed]] = classes[mixed]
    sets = [donor[torch.randperm(n_groups, generator=generator)][groups] for _ in range(n_sets)]
    return torch.stack(sets, 1) if sets else classes.new_empty(len(classes), 0)


def shuffled_labels(
    classes: Int[Tensor, " n"], groups: Int[Tensor, " n"], n_sets: int, generator: torch.Generator
) -> Int[Tensor, "n sets"]:
    """Label sets under the null: labels change between groups where each group has one, else within each group."""
    if bool((held_classes(classes, groups).sum(1) == 1).all()):
        return group_labels(classes, groups, n_sets, generator)
    home = groups.argsort(stable=True)
    sets = classes[:, None].repeat(1, n_sets)
    for column in range(n_sets):
        mixed = torch.randperm(len(groups), generator=generator)
        sets[home, column] = classes[mixed[groups[mixed].argsort(stable=True)]]
    return sets
