"""What tests whether a circuit does the task: its curve of sizes, random circuits, what it lacks or does not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from jaxtyping import Bool
from torch import Tensor

from techniques._circuit_runs import Faithfulness, Runner, Scale
from techniques._results import number
from techniques._stats import permutation_p

MAX_MINIMALITY = 32  # parts of a circuit whose need is measured: its least important ones
ROUNDING = 1e-5  # of a faithfulness: circuits that do the same are tied, whatever batches they ran in


class RandomNull(TypedDict):
    """Faithfulness of random circuits of the same size.

    Attributes:
        n: How many were drawn.
        mean: Of their faithfulness.
        low: 2.5th percentile.
        high: 97.5th percentile.
        p: Share of circuits, the tested one included, that are as faithful or more.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


class CurvePoint(TypedDict):
    """Faithfulness of the first parts of a ranking.

    Attributes:
        k: Share of all parts.
        n_parts: Their number.
        faithfulness: Of the circuit of these parts.
        null: Of random circuits of this size; None for the whole model, or if none were asked for.
    """

    k: float
    n_parts: int
    faithfulness: Faithfulness
    null: RandomNull | None


class PartLoss(TypedDict):
    """What a circuit loses with one of its parts.

    Attributes:
        part: Its name.
        loss: Faithfulness of the circuit minus that without the part.
    """

    part: str
    loss: float | None


class RandomCircuits:
    """Random subsets, in the order in which they are asked for."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.generator = torch.Generator().manual_seed(seed)

    def circuits(self, size: int, count: int) -> Bool[Tensor, "count parts"]:
        order = torch.rand(count, self.n, generator=self.generator).argsort(-1)
        return order.argsort(-1) < size

    def half_of(self, circuit: Bool[Tensor, " parts"], count: int) -> Bool[Tensor, "count parts"]:
        place = torch.rand(count, self.n, generator=self.generator).masked_fill(~circuit, 2.0).argsort(-1).argsort(-1)
        return place < (int(circuit.sum()) + 1) // 2


def curve_of(
    runs: Runner, scale: Scale, ranking: list[str], ks: Sequence[float], n_random: int, random: RandomCircuits
) -> list[CurvePoint]:
    if any(not 0 < k <= 1 for k in ks):
        raise ValueError(f"ks is {list(ks)}; expected shares above 0 and up to 1.")
    n_parts = len(runs.parts.names)
    sizes = sorted({n_parts if k == 1 else max(1, round(k * n_parts)) for k in ks})
    points = []
    for size in sizes:
        if size > len(ranking) and size < n_parts:
            continue
        chosen = runs.parts.mask(ranking[:size] if size < n_parts else runs.parts.names)
        values = runs.values(chosen[None], range(len(scale.full)))[0]
        points.append(
            CurvePoint(
                k=size / n_parts,
                n_parts=size,
                faithfulness=scale.faithfulness(values),
                null=null_of(runs, scale, chosen, n_random, random),
            )
        )
    return points


def null_of(
    runs: Runner, scale: Scale, circuit: Bool[Tensor, " parts"], n_random: int, random: RandomCircuits
) -> RandomNull | None:
    """Random circuits of a circuit's size; None if there is only one of that size."""
    if not n_random or circuit.all():
        return None
    drawn = torch.cat([circuit[None], random.circuits(int(circuit.sum()), n_random)])
    own, *others = scale.shares(runs.values(drawn, range(len(scale.full)))).double()
    null = torch.stack(others)
    low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return RandomNull(
        n=n_random,
        mean=number(null.mean()),
        low=number(low),
        high=number(high),
        p=number(permutation_p(own.item() - ROUNDING, null)),
    )


def completeness(
    runs: Runner, scale: Scale, circuit: Bool[Tensor, " parts"], n_random: int, random: RandomCircuits
) -> float | None:
    if not n_random:
        return None
    halves = random.half_of(circuit, n_random)
    damaged = scale.shares(runs.values(torch.cat([circuit & ~halves, ~halves]), range(len(scale.full))))
    return number((damaged[:n_random] - damaged[n_random:]).abs().mean())


def minimality(runs: Runner, scale: Scale, names: list[str]) -> list[PartLoss]:
    tested = names[-MAX_MINIMALITY:]
    circuits = torch.stack([runs.parts.mask(set(names) - {name}) for name in tested])
    whole = runs.parts.mask(names)[None]
    own, *without = scale.shares(runs.values(torch.cat([whole, circuits]), range(len(scale.full))))
    return [PartLoss(part=name, loss=number(own - rest)) for name, rest in zip(tested, without, strict=True)]


def areas(shares: list[float], values: list[float]) -> tuple[float, float]:
    """CPR and CMD by the trapezoid rule."""
    x = torch.tensor(shares, dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    return float(torch.trapezoid(y, x)), float(torch.trapezoid((1 - y).abs(), x))
