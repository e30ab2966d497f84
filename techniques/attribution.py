"""Attribution patching: the effect of patching every component, estimated by gradients.

Sources: Neel Nanda, "Attribution patching: activation patching at industrial scale" (2023),
https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Kramár et al., "AtP*: an efficient and
scalable method for localizing LLM behaviour to components" (2024), https://arxiv.org/abs/2403.00745
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from techniques._batches import in_batches
from techniques._columns import Column, ColumnInfo, position_columns
from techniques._contrast import (
    MAX_TOKENS,
    Check,
    Contrast,
    agreement,
    as_leaf,
    frozen,
    sample_of,
)
from techniques._hooks import HookPoint, check_sites, edit, points_in, record
from techniques._model import SITES, Decoder
from techniques._pairs import ExcludedPair, encode_pairs
from techniques._results import Header, few, header, number
from techniques._stats import mean_interval
from techniques._tokens import Batch

Direction = Literal["denoise", "noise"]
TOKENS_TOGETHER = 128  # of both sides of a batch, up to which a pass takes as long as reading the weights does


class AttributedCell(TypedDict):
    """The estimated effect of one component, at one position or at all.

    Attributes:
        site: Hook point, as `z` or `mlp_out`.
        layer: Its layer.
        head: Its head; None where the site has none. `k` and `v` count key-value heads.
        position: Label of the position; None if the effect is that of all positions together.
        score: Estimated change of the logit difference, in nats, mean over pairs.
        low: Lower end of the 95 % bootstrap interval over pairs.
        high: Upper end.
        share: `score` as a share of the change that patching everything makes; 1 is all of it.
        exact: The same change measured by patching, in nats, where it was; None elsewhere.
    """

    site: str
    layer: int
    head: int | None
    position: str | None
    score: float | None
    low: float | None
    high: float | None
    share: float | None
    exact: float | None


class AttributionPatching(Header):
    """What `attribution_patching` returns.

    Attributes:
        direction: "denoise" or "noise".
        clean_logit_diff: Mean over pairs, nats.
        corrupted_logit_diff: Mean over pairs, nats.
        columns: The positions of the rows; empty if positions were summed.
        rows: A row per component and position.
        check: Agreement with patching; None if nothing was checked.
        excluded: Pairs that were left out, with reasons.
    """

    direction: Direction
    clean_logit_diff: float | None
    corrupted_logit_diff: float | None
    columns: list[ColumnInfo]
    rows: list[AttributedCell]
    check: Check | None
    excluded: list[ExcludedPair]


class _Component(NamedTuple):
    point: HookPoint
    head: int | None


class _Scored(NamedTuple):
    clean: Float[Tensor, ""]
    corrupted: Float[Tensor, ""]
    scores: Float[Tensor, "pos components"]


@dataclass(frozen=True)
class _Task:
    """What is asked about the pairs."""

    contrast: Contrast
    points: list[HookPoint]
    direction: Direction

    def batches(self, which: list[int]) -> tuple[Batch, Batch]:
        """Of the chosen pairs: the prompts that are patched, and those that the activations come from."""
        sides = self.contrast.pairs.clean, self.contrast.pairs.corrupted
        clean, corrupted = (self.contrast.batch(ids, which) for ids in sides)
        return (corrupted, clean) if self.direction == "denoise" else (clean, corrupted)


def attribution_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    *,
    sites: Sequence[str] = ("z", "mlp_out"),
    by_position: bool = False,
    direction: Direction = "denoise",
    verify: int = 16,
    min_gap: float = 0.5,
    seed: int = 0,
) -> AttributionPatching:
    """Estimate the effect of patching every component at once, from two forward passes and one backward pass.

    Answers which heads, MLPs or positions would move the logit difference if their activation were exchanged between
    the clean and the corrupted prompt. The estimate is the difference of the activations times the gradient of the
    logit difference, which is what patching would do if the model were linear. The largest estimates, and as many
    others, are then measured by patching.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        pairs: (clean prompt, corrupted prompt), of equal length in tokens; others are left out.
        answers: (right answer, wrong answer) after the clean prompt, a token each, with their leading space.
        sites: Hook points, in all layers, or by full names, as blocks.3.attn.hook_z, in theirs: of z, q, k and v each
            head is a component, of the others the whole vector.
        by_position: A row per position instead of the sum over positions. Prompts of several lengths are counted from
            the end.
        direction: "denoise" puts clean activations into the corrupted run (positive scores restore the answer), "noise"
            corrupted ones into the clean run (negative scores harm it).
        verify: How many components are measured by patching: half of them those with the largest estimates, half drawn
            at random from the rest. 0 measures none.
        min_gap: Pairs whose logit difference falls by less, in nats, from clean to corrupted are left out.
        seed: Of that draw and of the bootstrap.

    Returns:
        A row per component, in the order of `sites`, layers, positions and heads, and `check`, the agreement of
        estimates and measurements.

    Raises:
        ValueError: The pairs or answers can't be compared, a site is unknown or has no single vector per token, the
            model is in train mode, or no pair has the gap.
        UnsupportedModelError: The model has no such site.

    Misleads: The gradient is local. Where attention is saturated it is near zero although patching would move the
    answer, and effects of opposite sign can cancel over positions; so a small score is no proof of no effect. Look at
    `check`, and confirm what you report with activation_patching.

    Cost: 1 forward of both prompts of all pairs and 1 backward of one of them, plus `verify` forwards; about 0.1 s on
        the demo model.

    Example:
        prompt = "When Mary and John went to the store, {} gave a drink to"
        pairs = [(prompt.format("John"), prompt.format("Tom")), (prompt.format("Mary"), prompt.format("Tom"))]
        answers = [(" Mary", " John"), (" John", " Mary")]
        attribution_patching(model, tokenizer, pairs, answers)
    """
    decoder = check_sites(model)
    points = _points(decoder, sites)
    if direction not in ("denoise", "noise"):
        raise ValueError(f'direction is {direction!r}; expected "denoise" or "noise".')
    if verify < 0:
        raise ValueError(f"verify is {verify}; expected 0 or more.")
    task = _Task(Contrast(model, encode_pairs(model, tokenizer, pairs, answers)), points, direction)
    scored = in_batches(task.contrast.lengths, MAX_TOKENS, lambda which: _estimate(task, which))
    clean, corrupted = torch.stack([s.clean for s in scored]), torch.stack([s.corrupted for s in scored])
    contrast, kept = task.contrast.without_small_gaps(clean, corrupted, min_gap)
    task = replace(task, contrast=contrast)
    columns = position_columns(contrast.pairs) if by_position else []
    components = _components(decoder, points)
    scores = [_at_columns(s.scores, i, columns) for i, s in enumerate(compress(scored, kept))]
    gap = (clean - corrupted)[kept].mean() * (1 if direction == "denoise" else -1)
    rows = _rows(torch.stack(scores), components, columns, float(gap), seed)
    check = _verify(task, components, columns, rows, verify, seed) if verify else None
    n = len(contrast.pairs)
    return AttributionPatching(
        **header(model, "attribution_patching", n=n, seed=seed, warnings=few(n, "pair")),
        direction=direction,
        clean_logit_diff=number(clean[kept].mean()),
        corrupted_logit_diff=number(corrupted[kept].mean()),
        columns=[column.info(contrast.pairs) for column in columns],
        rows=rows,
        check=check,
        excluded=contrast.pairs.excluded,
    )


def _points(decoder: Decoder, sites: Sequence[str]) -> list[HookPoint]:
    """Each site in all layers, or in that of its full name."""
    if isinstance(sites, str) or not sites:
        raise ValueError(f"sites is {sites!r}; expected a list of hook points, as ['z', 'mlp_out'].")
    if "pattern" in sites:
        raise ValueError(
            "The site 'pattern' holds a value per pair of positions; expected a site with a vector per position: "
            f"{', '.join(site for site in SITES if site != 'pattern')}."
        )
    return points_in(decoder, sites)


def _components(decoder: Decoder, points: list[HookPoint]) -> list[_Component]:
    """What the columns of the scores are."""
    n_heads = {"z": decoder.n_heads, "q": decoder.n_heads, "k": decoder.n_kv_heads, "v": decoder.n_kv_heads}
    return [
        _Component(point, head)
        for point in points
        for head in (range(n_heads[point.site]) if point.site in n_heads else [None])
    ]


def _estimate(task: _Task, which: list[int]) -> list[_Scored]:
    """The scores of some pairs; few tokens are run together, so that the weights are read for both sides at once."""
    n = len(which)
    patched, donor = task.batches(which)
    if 2 * patched.input_ids.numel() <= TOKENS_TOGETHER:
        both = (torch.cat([getattr(side, name) for side in (patched, donor)]) for name in Batch.__annotations__)
        with _gradients_of_first(task.contrast.model, n):
            diffs, values, gradients = _gradients(task, Batch(*both), [*which, *which])
        diff, donor_diff = diffs[:n], diffs[n:]
        given = {point: value[n:] for point, value in values.items()}
    else:
        with torch.no_grad(), record(task.contrast.model, task.points) as given:
            donor_diff = task.contrast.logit_diffs(donor, which)
        diff, values, gradients = _gradients(task, patched, which)
    parts = []
    for point, gradient in zip(task.points, gradients, strict=True):
        moved = (given[point] - values[point][:n]).detach()
        part = (moved * gradient[:n]).sum(-1, dtype=torch.float32)  # [batch, pos (, heads)]
        parts.append(part if part.dim() == 3 else part[..., None])
    ends = (donor_diff, diff) if task.direction == "denoise" else (diff, donor_diff)
    scores = torch.cat([part.cpu() for part in parts], -1)
    return [_Scored(*row) for row in zip(*(end.cpu() for end in ends), scores, strict=True)]


def _gradients(
    task: _Task, batch: Batch, which: list[int]
) -> tuple[Float[Tensor, " n"], dict[HookPoint, Tensor], tuple[Tensor, ...]]:
    """Logit differences of prompts, the values at each point, and the first pairs' gradients with respect to them."""
    model, n = task.contrast.model, len(set(which))
    start = {HookPoint("resid_pre", min(point.layer for point in task.points)): as_leaf}
    with frozen(model), edit(model, start), record(model, task.points) as values:
        diffs = task.contrast.logit_diffs(batch, which)
        gradients = torch.autograd.grad(diffs[:n].sum(), [values[point] for point in task.points])
    return diffs.detach(), values, gradients


class _Product(torch.autograd.Function):
    """A linear map of all rows of a batch whose gradient is computed for the first ones, and is zero for the others."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "batch pos d_in"], linear: Callable[[Tensor], Tensor], weight: Tensor, n: int
    ) -> Float[Tensor, "batch pos d_out"]:
        ctx.weight, ctx.n, ctx.shape = weight, n, x.shape
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].new_zeros(ctx.shape)
        gradient[: ctx.n] = gradients[0][: ctx.n] @ ctx.weight.to(gradient.dtype)
        return gradient, None, None, None


@contextmanager
def _gradients_of_first(model: PreTrainedModel, n: int) -> Iterator[None]:
    """Spare the gradients' matrix products for a batch's other half: no row's logits depend on another row.

    Plain linear maps with frozen weights only; of any other module, all rows have their gradients as ever.
    """
    plain = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    maps = [module for module in plain if "forward" not in module.__dict__]  # accelerate's own, where sharded
    try:
        for module in maps:
            module.__dict__["forward"] = partial(_product, module, module.forward, n)
        yield
    finally:
        for module in maps:
            module.__dict__.pop("forward", None)


def _product(module: nn.Module, linear: Callable[[Tensor], Tensor], n: int, x: Tensor) -> Tensor:
    if x.dim() != 3 or len(x) != 2 * n:  # experts get lists of tokens
        return linear(x)
    weight = cast(Tensor, module.weight)  # [d_out d_in], of a Conv1D [d_in d_out]
    product: Any = _Product  # torch leaves its `apply` without types
    return cast(Tensor, product.apply(x, linear, weight if isinstance(module, nn.Linear) else weight.T, n))


def _at_columns(scores: Float[Tensor, "pos components"], pair: int, columns: list[Column]) -> Tensor:
    """[components] summed over positions, or [components, columns]."""
    if not columns:
        return scores.sum(0)
    return torch.stack([scores[[clean for clean, _ in column.positions[pair]]].sum(0) for column in columns], -1)


def _rows(
    scores: Float[Tensor, "n components *columns"],
    components: list[_Component],
    columns: list[Column],
    gap: float,
    seed: int,
) -> list[AttributedCell]:
    mean, low, high = (value.reshape(len(components), -1) for value in mean_interval(scores, seed))
    labels: list[str | None] = [column.label for column in columns]
    return [
        AttributedCell(
            site=component.point.site,
            layer=component.point.layer,
            head=component.head,
            position=label,
            score=number(mean[i, j]),
            low=number(low[i, j]),
            high=number(high[i, j]),
            share=number(mean[i, j] / gap),
            exact=None,
        )
        for i, component in enumerate(components)
        for j, label in enumerate(labels or [None])
    ]


# ---------------------------------------------------------------------------------------------- against patching


def _verify(
    task: _Task,
    components: list[_Component],
    columns: list[Column],
    rows: list[AttributedCell],
    verify: int,
    seed: int,
) -> Check:
    """Patch some of the rows for real, and write what that changes into them."""
    estimates = torch.tensor([row["score"] or 0.0 for row in rows])
    sample = sample_of(estimates, verify, seed)
    chosen = [*sample.top, *sample.drawn]
    cells = [(components[i // max(1, len(columns))], columns[i % len(columns)] if columns else None) for i in chosen]
    changes = in_batches(task.contrast.lengths, MAX_TOKENS, lambda which: _patched_changes(task, which, cells))
    exact = torch.stack(changes).mean(0)
    for i, value in zip(chosen, exact, strict=True):
        rows[i]["exact"] = number(value)
    return agreement(sample, estimates[chosen], exact)


@torch.no_grad()
def _patched_changes(
    task: _Task, which: list[int], cells: list[tuple[_Component, Column | None]]
) -> list[Float[Tensor, " cells"]]:
    """Change of the logit difference of some pairs by patching each cell."""
    contrast, model = task.contrast, task.contrast.model
    patched, donor = task.batches(which)
    with record(model, {component.point for component, _ in cells}) as given:
        contrast.logit_diffs(donor, which)
    before = contrast.logit_diffs(patched, which)
    changes = []
    for component, column in cells:
        where = None if column is None else [[at for at, _ in column.positions[i]] for i in which]
        with edit(model, {component.point: partial(_exchange, given[component.point], component.head, where)}):
            changes.append(contrast.logit_diffs(patched, which) - before)
    return list(torch.stack(changes, -1).cpu())


def _exchange(given: Tensor, head: int | None, where: list[list[int]] | None, value: Tensor) -> Tensor:
    """The value with one head, at some positions of each row, taken from `given`."""
    is_given = torch.zeros(value.shape[:-1], dtype=torch.bool, device=value.device)  # [batch, pos (, heads)]
    part = is_given if head is None else is_given[..., head]
    for row, positions in enumerate(where or [list(range(value.shape[1]))] * len(value)):
        part[row, positions] = True
    return torch.where(is_given[..., None], given, value)
