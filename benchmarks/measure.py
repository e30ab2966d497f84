"""Samples, their medians and quartiles, and the tables that they become."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """One promised figure: what was measured, what was promised, and whether it holds."""

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the promise was kept in this run."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> str:
        """Its line in the table of figures."""
        bound = "at least" if self.at_least else "at most"
        verdict = "yes" if self.holds else "**no**"
        return f"| {self.what} | {self.value:.3g} {self.unit} | {bound} {self.limit:.3g} {self.unit} | {verdict} |"


@dataclass
class Section:
    """What one group measured.

    Attributes:
        title: Heading in the report.
        how: What was measured and how, in a few sentences.
        unit: Unit of all samples.
        samples: By contender, in the order of the table.
        figures: The promises that this group checks.
        notes: Sentences below the tables.
    """

    title: str
    how: str
    unit: str
    samples: Samples
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The section as Markdown."""
        table = [f"| | median, {self.unit} | quartiles | n |", "|---|---|---|---|"]
        table += [sample_row(name, values) for name, values in self.samples.items()]
        promised = ["| figure | here | target | holds |", "|---|---|---|---|", *(f.row() for f in self.figures)]
        parts = [f"## {self.title}", self.how, "\n".join(table), "\n".join(promised), *self.notes]
        return "\n\n".join(parts)


def sample_row(name: str, values: list[float]) -> str:
    """One contender's line: median, quartiles and number of samples."""
    low, middle, high = quartiles(values)
    return f"| {name} | {middle:.4g} | {low:.4g} to {high:.4g} | {len(values)} |"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median(values: list[float]) -> float:
    """The middle of the samples."""
    return statistics.median(values)


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, block: int = 1) -> Samples:
    """Time every contender in turn, `block` calls each, so that what disturbs the machine disturbs all alike.

    The first call of each block is not counted: it pays for what the contender before it left in the caches.
    With a block of 1 every call counts.

    Returns:
        Seconds per call, `rounds * block` samples for each contender.
    """
    samples: Samples = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            if block > 1:
                call()
            for _ in range(block):
                started = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - started)
    return samples


def scaled(samples: Samples, factor: float) -> Samples:
    """The samples in another unit."""
    return {name: [value * factor for value in values] for name, values in samples.items()}
