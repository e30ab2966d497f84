"""Clean and corrupted runs of encoded pairs, and what attribution and circuits share in comparing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._model import UnsupportedModelError, logits_at
from techniques._pairs import Pairs, apart, metric_values
from techniques._results import number
from techniques._tokens import Batch, pad

MAX_TOKENS = 8192  # of a batch of pairs whose activations are held at once


@dataclass(frozen=True)
class Contrast:
    """A model and the pairs that it is run on."""

    model: PreTrainedModel
    pairs: Pairs

    def batch(self, ids: Sequence[Sequence[int]], which: Sequence[int]) -> Batch:
        """The chosen ones of `pairs.clean` or `pairs.corrupted`."""
        return pad([ids[i] for i in which], "right", 0, self.model.device)

    def logit_diffs(self, batch: Batch, which: Sequence[int]) -> Float[Tensor, " n"]:
        """Run a batch of the chosen pairs; the logit differences after their last tokens, in nats.

        A batch may have more rows than pairs are chosen; the first ones are read.
        """
        last = torch.tensor([len(self.pairs.clean[i]) - 1 for i in which])
        logits = logits_at(self.model, batch, torch.arange(len(which)), last)
        index = torch.tensor(which)
        return metric_values(logits, self.pairs.answer_ids[index], self.pairs.wrong_ids[index], "logit_diff")

    @property
    def lengths(self) -> list[int]:
        """Of the prompts of each pair, in tokens."""
        return [len(ids) for ids in self.pairs.clean]

    def without_small_gaps(
        self, clean: Float[Tensor, " n"], corrupted: Float[Tensor, " n"], min_gap: float
    ) -> tuple[Contrast, list[bool]]:
        """Only the pairs that are `apart`, and which these are."""
        pairs, kept = apart(self.pairs, clean, corrupted, min_gap)
        return Contrast(self.model, pairs), kept


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients for what is computed inside, and none for weights, so that nothing is kept for their sake.

    Raises:
        UnsupportedModelError: The model has no gradients, which would go unnoticed.
    """
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has 4-bit weights on the CPU, where bitsandbytes runs them by a kernel without "
            "gradients; expected a model that has them. Load it in 8 bit or in bfloat16, or on a GPU."
        )
    # Stand-ins for offloaded weights are inference tensors once the model has run in inference mode: left alone.
    trainable = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def as_leaf(value: Tensor) -> Tensor:
    """The same numbers as the start of a graph."""
    return value.detach().clone().requires_grad_()


# ---------------------------------------------------------------------------------------------- estimates


class Check(TypedDict):
    """How well estimates agree with patching, over the rows that have `exact`.

    Attributes:
        n_top: How many of them have the largest estimates.
        n_random: How many were drawn from the rest.
        pearson: Correlation of estimates and measurements; None if one of them does not vary.
        spearman: The same of their ranks.
    """

    n_top: int
    n_random: int
    pearson: float | None
    spearman: float | None


class Sample(NamedTuple):
    """Indices of estimates that are to be measured."""

    top: list[int]
    drawn: list[int]


def sample_of(estimates: Float[Tensor, " n"], size: int, seed: int) -> Sample:
    """Half of the sample has the largest estimates, half is drawn from the rest."""
    order = estimates.abs().argsort(descending=True)
    top = order[: -(-min(size, len(order)) // 2)]
    rest = order[len(top) :]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: size - len(top)]]
    return Sample(top.tolist(), drawn.tolist())


def agreement(sample: Sample, estimates: Float[Tensor, " n"], exact: Float[Tensor, " n"]) -> Check:
    """Correlations of the sampled estimates with their measurements, and of the ranks of both."""
    both = torch.stack([estimates.double().cpu(), exact.double().cpu()])
    pearson = spearman = None
    if len(exact) > 1:
        pearson = number(torch.corrcoef(both)[0, 1])
        spearman = number(torch.corrcoef(both.argsort(-1).argsort(-1).double())[0, 1])
    return Check(n_top=len(sample.top), n_random=len(sample.drawn), pearson=pearson, spearman=spearman)
