"""Attribution by gradients and by decomposition: which components matter, from one or two passes.

Sources: Neel Nanda, "Attribution patching: activation patching at industrial scale" (2023),
https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Kramár et al., "AtP*: an efficient and
scalable method for localizing LLM behaviour to components" (2024), https://arxiv.org/abs/2403.00745; Elhage et al., "A
mathematical framework for transformer circuits" (2021), https://transformer-circuits.pub/2021/framework/index.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._contrast import (
    MAX_TOKENS,
    Check,
    Contrast,
    agreement,
    as_leaf,
    frozen,
    sample_of,
)
from techniques._hooks import HookPoint, check_sites, edit, find_site, hook_point, record
from techniques._lens import check_head
from techniques._model import SITES, Decoder, UnsupportedModelError, logits_at
from techniques._nodes import frozen_norm, head_outputs
from techniques._pairs import (
    Column,
    ColumnInfo,
    ExcludedPair,
    encode_pairs,
    metric_values,
    position_columns,
)
from techniques._results import Header, header, number
from techniques._stats import mean_interval
from techniques._tokens import Batch, check_context, encode, pad, single_token_id

HEAD_SITES = ("z", "q", "k", "v")
Direction = Literal["denoise", "noise"]


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
        sites: Hook points, in all layers: of z, q, k and v each head is a component, of the others the whole vector.
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

    Cost: 2 forwards and 1 backward of all pairs, plus `verify` forwards; about 0.1 s on the demo model.

    Example:
        prompt = "When Mary and John went to the store, {} gave a drink to"
        pairs = [(prompt.format("John"), prompt.format("Tom")), (prompt.format("Mary"), prompt.format("Tom"))]
        answers = [(" Mary", " John"), (" John", " Mary")]
        attribution_patching(model, tokenizer, pairs, answers)
    """
    points = _points(check_sites(model), sites)
    if direction not in ("denoise", "noise"):
        raise ValueError(f'direction is {direction!r}; expected "denoise" or "noise".')
    task = _Task(Contrast(model, encode_pairs(model, tokenizer, pairs, answers)), points, direction)
    components: list[_Component] = []
    scored = in_batches(task.contrast.lengths, MAX_TOKENS, lambda which: _estimate(task, which, components))
    clean, corrupted = torch.stack([s.clean for s in scored]), torch.stack([s.corrupted for s in scored])
    contrast, kept = task.contrast.without_small_gaps(clean, corrupted, min_gap)
    task = replace(task, contrast=contrast)
    columns = position_columns(contrast.pairs) if by_position else []
    scores = [_at_columns(s.scores, i, columns) for i, s in enumerate(compress(scored, kept))]
    gap = (clean - corrupted)[kept].mean() * (1 if direction == "denoise" else -1)
    rows = _rows(torch.stack(scores), components, columns, float(gap), seed)
    check = _verify(task, components, columns, rows, verify, seed) if verify else None
    return AttributionPatching(
        **header(model, "attribution_patching", n=len(contrast.pairs), seed=seed),
        direction=direction,
        clean_logit_diff=number(clean[kept].mean()),
        corrupted_logit_diff=number(corrupted[kept].mean()),
        columns=[column.info(contrast.pairs) for column in columns],
        rows=rows,
        check=check,
        excluded=contrast.pairs.excluded,
    )


def _points(decoder: Decoder, sites: Sequence[str]) -> list[HookPoint]:
    """The sites in all layers; sites of each head first to last."""
    if isinstance(sites, str) or not sites:
        raise ValueError(f"sites is {sites!r}; expected a list of hook points, as ['z', 'mlp_out'].")
    if "pattern" in sites:
        raise ValueError(
            "The site 'pattern' holds a value per pair of positions; expected a site with a vector per position: "
            f"{', '.join(site for site in SITES if site != 'pattern')}."
        )
    points = [hook_point(site, layer) for site in sites for layer in range(decoder.n_layers)]
    for point in points:
        find_site(decoder, point)
    return points


def _estimate(task: _Task, which: list[int], components: list[_Component]) -> list[_Scored]:
    """The scores of some pairs; names what the columns of the scores are, once."""
    contrast, model = task.contrast, task.contrast.model
    patched, donor = task.batches(which)
    with torch.no_grad(), record(model, task.points) as given:
        donor_diff = contrast.logit_diffs(donor, which)
    start = {HookPoint("resid_pre", 0): as_leaf}
    with frozen(model), edit(model, start), record(model, task.points) as own:
        diff = contrast.logit_diffs(patched, which)
        gradients = torch.autograd.grad(diff.sum(), [own[point] for point in task.points])
    parts = []
    for point, gradient in zip(task.points, gradients, strict=True):
        part = ((given[point] - own[point].detach()) * gradient).sum(-1, dtype=torch.float32)  # [batch, pos (, heads)]
        parts.append(part.flatten(2) if part.dim() == 3 else part[..., None])
    if not components:
        for point, part in zip(task.points, parts, strict=True):
            heads = range(part.shape[-1]) if point.site in HEAD_SITES else [None]
            components += [_Component(point, head) for head in heads]
    scores = torch.cat([part.cpu() for part in parts], -1)
    diffs = (donor_diff, diff.detach()) if task.direction == "denoise" else (diff.detach(), donor_diff)
    return [_Scored(*values) for values in zip(*(d.cpu() for d in diffs), scores, strict=True)]


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
    labels = [column.label for column in columns] or [None]
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
        for j, label in enumerate(labels)
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


# ---------------------------------------------------------------------------------------------- direct attribution


class LogitPart(TypedDict):
    """What one part of the model adds to the logit difference directly.

    Attributes:
        part: "embedding", "head", "attn" (all heads of a layer, with its biases), "attn_bias", "mlp" or "constant"
            (the biases of the final norm and the unembedding).
        layer: Its layer; None for the embedding and the constant.
        head: Its head; None for other parts.
        score: In nats, mean over prompts; positive favours the right answer.
        low: Lower end of the 95 % bootstrap interval over prompts.
        high: Upper end.
    """

    part: str
    layer: int | None
    head: int | None
    score: float | None
    low: float | None
    high: float | None


class DirectLogitAttribution(Header):
    """What `direct_logit_attribution` returns.

    Attributes:
        grain: "head" or "layer".
        logit_diff: The model's own, in nats, mean over prompts, before its soft cap if it has one.
        logit_diff_capped: The same after the soft cap; None if the model has none.
        sum: Of all rows.
        max_abs_error: Largest difference, over prompts, of the sum of the parts and the model's own logit difference.
        rows: A row per part, in the order in which the model computes them.
    """

    grain: Literal["head", "layer"]
    logit_diff: float | None
    logit_diff_capped: float | None
    sum: float | None
    max_abs_error: float | None
    rows: list[LogitPart]


class _Part(NamedTuple):
    part: str
    layer: int | None = None
    head: int | None = None


def direct_logit_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[tuple[str, str]],
    *,
    grain: Literal["head", "layer"] = "head",
    seed: int = 0,
) -> DirectLogitAttribution:
    """Split the logit difference at the last token among the embedding, heads, MLPs and biases.

    Answers which parts write the answer into the residual stream at the last position. The final residual is a sum of
    what the parts added; with the scale of the final norm held at what it was, so is the logit difference.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompts: Of any lengths; each ends before its answer.
        answers: (right answer, wrong answer) for each prompt, a token each, with their leading space.
        grain: "head" splits attention into its heads, "layer" does not.
        seed: Of the bootstrap.

    Returns:
        A row per part. The rows add up to `logit_diff`; `max_abs_error` says how exactly.

    Raises:
        ValueError: There is no prompt, not as many answers, an answer is not one token, or the model is in train mode.
        UnsupportedModelError: The final norm is no LayerNorm or RMSNorm, or the parts do not add up.

    Misleads: Only the direct way to the output counts: a head that moves a name for a later MLP to read scores near
    zero and may still be indispensable. Parts often cancel, so a large score is not a large effect either.
    Where a norm stands between attention and the stream (Gemma 2 and 3, OLMo 2 and 3), heads are split with its scale
    held too. A soft cap is not linear, so what is split is the difference before it.

    Cost: 1 forward, and 1 backward through the unembedding; about 0.05 s on the demo model.

    Example:
        prompts = ["The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"]
        direct_logit_attribution(model, tokenizer, prompts, [(" Paris", " Rome"), (" Rome", " Paris")])
    """
    if grain not in ("head", "layer"):
        raise ValueError(f'grain is {grain!r}; expected "head" or "layer".')
    if isinstance(prompts, str) or len(answers) != len(prompts) or any(isinstance(pair, str) for pair in answers):
        raise ValueError(
            f"answers is {answers!r} for prompts {prompts!r}; expected a list of prompts and one (right answer, wrong "
            "answer) for each."
        )
    ids = encode(tokenizer, prompts)
    check_context(model, ids)
    answer_ids = torch.tensor([[single_token_id(tokenizer, text) for text in pair] for pair in answers])
    decoder = check_sites(model)
    parts = _part_names(decoder, grain)
    split = in_batches(
        [len(row) for row in ids],
        MAX_TOKENS,
        lambda which: _split(model, decoder, [ids[i] for i in which], answer_ids[which], grain),
    )
    scores = torch.stack([one.scores for one in split])
    own, capped = torch.stack([one.own for one in split]), torch.stack([one.capped for one in split])
    error = _check_sum(model, scores, own)
    mean, low, high = mean_interval(scores, seed)
    rows = [
        LogitPart(**part._asdict(), score=number(a), low=number(b), high=number(c))
        for part, a, b, c in zip(parts, mean, low, high, strict=True)
    ]
    return DirectLogitAttribution(
        **header(model, "direct_logit_attribution", n=len(ids), seed=seed),
        grain=grain,
        logit_diff=number(own.mean()),
        logit_diff_capped=None if decoder.soft_cap is None else number(capped.mean()),
        sum=number(mean.sum()),
        max_abs_error=number(error),
        rows=rows,
    )


class _Split(NamedTuple):
    own: Float[Tensor, ""]
    capped: Float[Tensor, ""]
    scores: Float[Tensor, " parts"]


def _part_names(decoder: Decoder, grain: str) -> list[_Part]:
    parts = [_Part("embedding")]
    for layer in range(decoder.n_layers):
        heads = [_Part("head", layer, head) for head in range(decoder.n_heads)]
        parts += [*heads, _Part("attn_bias", layer)] if grain == "head" else [_Part("attn", layer)]
        parts.append(_Part("mlp", layer))
    return [*parts, _Part("constant")]


def _split(
    model: PreTrainedModel, decoder: Decoder, ids: list[list[int]], answer_ids: Int[Tensor, "batch 2"], grain: str
) -> list[_Split]:
    """One forward pass, and each part's share in the logit difference after the last token."""
    at = torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])
    embedding, final = HookPoint("resid_pre", 0), HookPoint("resid_post", decoder.n_layers - 1)
    sites = ["attn_out", "mlp_out", *(["z"] if grain == "head" else [])]
    points = [embedding, final, *(HookPoint(site, layer) for site in sites for layer in range(decoder.n_layers))]
    with torch.no_grad():
        with record(model, points, keep=lambda value: value[at]) as seen:
            own = logits_at(model, pad(ids, "right", 0, model.device), *at)
        check_head(model, decoder.logits(seen[final]), own)
        normed = decoder.ln_final(seen[final])
        norm = frozen_norm(decoder.ln_final, seen[final], normed)
    diff, direction, bias = _reader(model, decoder, normed, answer_ids)
    pulled = norm.pulled(direction)
    parts = [seen[embedding].unsqueeze(1), *_layer_parts(decoder, seen, grain)]
    scores = [(part.to(pulled.device, torch.float64) * pulled[:, None]).sum(-1) for part in parts]
    constant = (direction * norm.offset).sum(-1) + bias
    capped = metric_values(own, *answer_ids.T, "logit_diff")
    return [
        _Split(*one)
        for one in zip(diff.cpu(), capped.cpu(), torch.cat([*scores, constant[:, None]], 1).cpu(), strict=True)
    ]


def _layer_parts(
    decoder: Decoder, seen: dict[HookPoint, Tensor], grain: str
) -> Iterator[Float[Tensor, "batch parts d_model"]]:
    """What each layer adds, in the order of the part names."""
    for layer, modules in enumerate(decoder.layers):
        attn = seen[HookPoint("attn_out", layer)]
        if grain == "head":
            with torch.no_grad():
                heads = head_outputs(modules, seen[HookPoint("z", layer)], attn)
            yield torch.cat([heads, (attn - heads.sum(1)).unsqueeze(1)], 1)
        else:
            yield attn.unsqueeze(1)
        yield seen[HookPoint("mlp_out", layer)].unsqueeze(1)


def _reader(
    model: PreTrainedModel, decoder: Decoder, normed: Float[Tensor, "batch d_model"], answer_ids: Int[Tensor, "batch 2"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """The logit difference before a soft cap, the direction in the normed residual that makes it, and its bias."""
    right, wrong = answer_ids.to(normed.device).T
    with frozen(model):
        leaf = as_leaf(normed)
        diff = metric_values(decoder.unembed(leaf), right, wrong, "logit_diff")
        direction = torch.autograd.grad(diff.sum(), leaf)[0]
    with torch.no_grad():
        bias = metric_values(decoder.unembed(torch.zeros_like(normed)), right, wrong, "logit_diff")
    return diff.detach().double(), direction.double(), bias.double()


def _check_sum(model: PreTrainedModel, scores: Float[Tensor, "n parts"], own: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    error = (scores.sum(-1) - own).abs().max()
    # The stream is rounded to the model's dtype at each addition, so the sum is as exact as its largest terms allow.
    if not error <= max(1e-4, 8 * torch.finfo(model.dtype).eps) * scores.abs().sum(-1).max():
        raise UnsupportedModelError(
            f"{type(model).__name__}: embedding, heads, MLPs and biases add up to within {error:.3g} nats of the logit "
            "difference; expected equality. It adds something else to its residual stream."
        )
    return error
