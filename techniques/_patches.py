"""A change of some values at one point of one prompt: what it changes, and how it is written while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from techniques._hooks import Change, HookPoint
from techniques._replay import Window


@dataclass(frozen=True)
class Patch:
    """A change of the value at one point of one prompt.

    Attributes:
        point: Where.
        value: What to write, in the shape of the chosen part, or a function of that part. A function has to work on
            each position apart, as the part may come in pieces.
        positions: Which positions of the prompt, or queries of a pattern; all if None.
        units: Which of the next dimension: heads of z, q, k, v and pattern, else coordinates; all if None.
    """

    point: HookPoint
    value: Tensor | Change
    positions: Sequence[int] | None = None
    units: int | slice | Int[Tensor, " units"] | None = None


@dataclass(frozen=True)
class Variant:
    """A run of prompt `row` of the batch with some patches; without any it is the plain run."""

    row: int
    patches: Sequence[Patch]


def changed_positions(patch: Patch, plain: Tensor) -> Bool[Tensor, " positions"]:
    """At which of its positions a patch changes the plain value of its row; what is not known counts as changed."""
    positions = slice(None) if patch.positions is None else _selector(patch.positions)
    part = plain[_index(patch, positions)]
    if callable(patch.value):
        return torch.ones(len(plain[positions]), dtype=torch.bool)
    is_pattern = patch.point.site == "pattern"
    if patch.value.shape != part.shape and (is_pattern or patch.value.shape != part.shape[1:]):
        raise ValueError(
            f"The value for {patch.point} has shape {tuple(patch.value.shape)}; expected {tuple(part.shape)}, the "
            f"shape of what it replaces, or {tuple(part.shape[1:])}, that of one position of it."
        )
    if is_pattern:
        return torch.ones(part.shape[-2], dtype=torch.bool)
    return (part != patch.value.to(part)).flatten(1).any(1)


def writer(patches: Sequence[tuple[int, Patch]], window: Window) -> Change:
    """Writes patches, each to its row, into a value of all rows in a window of positions."""

    def write(value: Tensor) -> Tensor:
        value = value.clone()
        for row, patch in patches:
            _write(value[row], patch, window)
        return value

    return write


def _write(value: Tensor, patch: Patch, window: Window) -> None:
    """Apply a patch to the value of one row in a window, in place."""
    inside: Any = slice(window.start, window.stop)
    positions: Any = slice(None)
    if patch.positions is not None:
        kept = [i for i, position in enumerate(patch.positions) if window.start <= position < window.stop]
        if not kept:
            return
        inside, positions = _selector(kept), _selector([patch.positions[i] - window.start for i in kept])
    index = _index(patch, positions)
    part = value[index]
    if callable(patch.value):
        new = patch.value(part)
    elif patch.point.site == "pattern":
        new = patch.value[..., inside, : part.shape[-1]]
    else:
        new = patch.value if patch.value.dim() < part.dim() else patch.value[inside]
    value[index] = new.to(value)


def _selector(numbers: Sequence[int]) -> slice | Tensor:
    """An index for some positions: a slice where they follow each other, as that needs no copy to the device."""
    if numbers and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, dtype=torch.long)


def _index(patch: Patch, positions: Any) -> tuple[Any, ...]:
    """Where a patch lies in the value of one row, at some positions; a pattern has its heads before its queries."""
    units: Any = slice(None) if patch.units is None else patch.units
    first, second = (units, positions) if patch.point.site == "pattern" else (positions, units)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        first = first[:, None]
    return first, second
