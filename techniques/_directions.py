"""A direction as all techniques pass it on: a unit vector, the point it belongs to, and what its length means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from techniques._hooks import HookPoint
from techniques._results import number, numbers
from techniques._stats import auroc, auroc_draws, percentiles, resamples


class Direction(TypedDict):
    """A unit vector at one point of the model; it points from the negative to the positive class.

    Attributes:
        direction: The unit vector.
        layer: The layer.
        site: Where in the block, in TransformerLens' words.
        positive_class: Name of the class that it points to.
        negative_class: Name of the class that it points away from.
        positive_mean: Mean projection of the positive class on it, in the activation's own units; None for a vector
            that comes from elsewhere.
        negative_mean: The same of the negative class.
        separation: positive_mean - negative_mean, never negative; the unit "difference" of steering.
        norm: Mean norm of the activations there, the unit "resid_norm" of steering; None where it was not measured.
        norm_ratio: separation / norm.
        held_out_auroc: Probability that a held-out positive text projects above a held-out negative one.
        held_out_low: Lower end of its 95 % interval, groups resampled.
        held_out_high: Upper end.
    """

    direction: list[float]
    layer: int
    site: str
    positive_class: str
    negative_class: str
    positive_mean: float | None
    negative_mean: float | None
    separation: float
    norm: float | None
    norm_ratio: float | None
    held_out_auroc: float | None
    held_out_low: float | None
    held_out_high: float | None


def check_direction(direction: object) -> None:
    """Refuse what is no direction, as a bare vector or a whole result that holds several.

    Raises:
        ValueError: It is none.
    """
    if isinstance(direction, Mapping) and {"direction", "layer", "site"} <= direction.keys():
        return
    given = f"of the type {type(direction).__name__}"
    if isinstance(direction, Mapping) and "technique" in direction:
        given = f"all of what {direction['technique']} returned"
    raise ValueError(
        f"The direction is {given}; expected what concept_direction returned, a row of persona_vector, or a vector "
        "of your own by vector_direction(vector, layer)."
    )


def unit_vector(direction: Direction, width: int) -> Float[Tensor, " d"]:
    """The direction as a tensor of exactly unit length, float32 on the CPU.

    Raises:
        ValueError: It is of another width than the activations it is meant for.
    """
    vector = torch.tensor(direction["direction"])
    if len(vector) != width:
        raise ValueError(
            f"The direction has {len(vector)} entries, but {direction['site']} of this model has {width}; expected a "
            "direction that was found in this model."
        )
    unit: Tensor = vector / vector.norm()
    return unit


def oriented(vector: Float[Tensor, " d"], found: Float[Tensor, "n d"], positive: Bool[Tensor, " n"]) -> Tensor:
    """A unit vector on which the positive class has the higher mean."""
    gap = (found[positive].mean(0) - found[~positive].mean(0)) @ vector
    if not float(gap.abs()) > 0:
        raise ValueError(
            "Both classes have the same mean activation; expected a difference. Read them at a position and a layer "
            "where the model has seen what differs."
        )
    unit: Tensor = vector / vector.norm() * gap.sign()
    return unit


class HeldOut(NamedTuple):
    """Held-out activations."""

    found: Float[Tensor, "n d"]
    positive: Bool[Tensor, " n"]
    groups: Int[Tensor, " n"]
    seed: int


def described(
    vector: Float[Tensor, " d"],
    found: Float[Tensor, "n d"],
    positive: Bool[Tensor, " n"],
    test: HeldOut,
    point: HookPoint,
    classes: tuple[str, str],
) -> Direction:
    above, below = (float((found[part] @ vector).mean()) for part in (positive, ~positive))
    norm = float(found.norm(dim=1).mean())
    scores, one_fold = test.found @ vector, torch.zeros(len(test.found), dtype=torch.long)
    draws = resamples(int(test.groups.max()) + 1, test.seed)
    low, high = percentiles(auroc_draws(scores, test.positive, one_fold, test.groups, draws))
    return Direction(
        direction=numbers(vector),
        layer=point.layer,
        site=point.site,
        positive_class=classes[0],
        negative_class=classes[1],
        positive_mean=digits(above),
        negative_mean=digits(below),
        separation=digits(above - below),
        norm=digits(norm),
        norm_ratio=digits((above - below) / norm),
        held_out_auroc=number(auroc(scores, test.positive)),
        held_out_low=number(low),
        held_out_high=number(high),
    )


def digits(value: float | Tensor) -> float:
    """As `number`, of a value that is known to be finite."""
    return number(value) or 0.0
