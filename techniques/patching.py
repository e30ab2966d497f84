"""Causal interventions on activations: activation patching and causal tracing.

Sources: Vig et al., "Investigating gender bias in language models using causal mediation analysis" (2020),
https://arxiv.org/abs/2004.12265; Meng et al., "Locating and editing factual associations in GPT" (2022),
https://arxiv.org/abs/2202.05262; Zhang and Nanda, "Towards best practices of activation patching in language models"
(2023), https://arxiv.org/abs/2309.16042; Heimersheim and Nanda, "How to use and interpret activation patching" (2024),
https://arxiv.org/abs/2404.15255.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_memory
from techniques._columns import Column, ColumnInfo, position_columns, span_columns
from techniques._hooks import HookPoint, check_sites, hook_point, points_in, record, run
from techniques._model import Decoder
from techniques._pairs import (
    METRICS,
    Align,
    Baselines,
    ExcludedPair,
    Metric,
    PairInfo,
    Pairs,
    encode_pairs,
    pair_infos,
    with_gap,
)
from techniques._results import Header, few, header, number
from techniques._stats import N_BOOT, recovered_interval
from techniques._sweep import Patch, Variant
from techniques._tokens import pad
from techniques._variants import site_value, variant_metrics

Grain = Literal["position", "layer", "head", "head_position"]
Direction = Literal["denoise", "noise"]
GRAINS = ("position", "layer", "head", "head_position")
HEAD_SITES = ("z", "q", "k", "v", "pattern")
STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_pre", "mlp_post")


class PatchRow(TypedDict):
    """The effect of one patch on one metric.

    Attributes:
        site: Where: resid_pre, attn_out, z, ...
        layer: At which layer.
        head: Which head (for k and v: which key-value head); None where the site has none or all were patched.
        column: Index in `columns`; None where all positions were patched.
        metric: What was measured.
        patched: Mean of the metric over the pairs in the patched run.
        recovered: (patched - corrupted) / (clean - corrupted), of the means; None where the means do not differ.
        effect: Share of the way from the run that was patched to the run that the activation came from: `recovered`
            when denoising, 1 - `recovered` when noising. 0 is no effect, 1 all of it.
        low: Lower end of the 95 % bootstrap interval of `effect` over pairs.
        high: Its upper end.
    """

    site: str
    layer: int
    head: int | None
    column: int | None
    metric: str
    patched: float | None
    recovered: float | None
    effect: float | None
    low: float | None
    high: float | None


class Baseline(TypedDict):
    """Mean of one metric over the pairs in the two unpatched runs."""

    metric: str
    clean: float | None
    corrupted: float | None


class ActivationPatching(Header):
    """Result of `activation_patching`; `n` is the number of pairs that were used.

    Attributes:
        direction: "denoise" (clean activations into the corrupted run) or "noise" (corrupted ones into the clean run).
        grain: "position", "layer", "head" or "head_position".
        sites: The sites that were patched.
        align: How positions of a pair correspond: from the start ("equal") or from the end ("end").
        n_layers: Blocks of the model.
        n_heads: Query heads per block.
        columns: The columns of positions; empty where all positions were patched at once.
        pairs: The pairs that were used.
        excluded: The pairs that were not, with reasons.
        baselines: The unpatched runs, one entry per metric.
        rows: By site, layer, head, column, metric.
    """

    direction: str
    grain: str
    sites: list[str]
    align: str
    n_layers: int
    n_heads: int
    columns: list[ColumnInfo]
    pairs: list[PairInfo]
    excluded: list[ExcludedPair]
    baselines: list[Baseline]
    rows: list[PatchRow]


class _Cell(NamedTuple):
    """One cell of the map: what is patched together in each pair."""

    point: HookPoint
    head: int | None
    column: int | None


@torch.inference_mode()
def activation_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    sites: Sequence[str] | None = None,
    grain: Grain = "position",
    direction: Direction = "denoise",
    metrics: Sequence[Metric] = ("logit_diff",),
    align: Align = "equal",
    spans: Mapping[str, Sequence[str]] | None = None,
    min_gap: float = 0.5,
    seed: int = 0,
    n_boot: int = N_BOOT,
) -> ActivationPatching:
    """Copy activations from one run into another, one place at a time, and see which of them carry the answer.

    A denoising effect of 1 says that this activation alone is enough to bring the clean answer back; a noising effect
    of 1 says that the clean answer is lost without it. Neither says that the place *computes* the answer: it may
    only pass it on.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; special tokens are added as it does by default.
        pairs: (clean prompt, corrupted prompt); the best pairs differ in one word and have as many tokens. They end
            where the answer should follow.
        answers: (right answer, wrong answer) of each pair, each one token with its leading space; the right one
            belongs to the clean prompt, the wrong one usually to the corrupted prompt.
        sites: For the grains "position" and "layer": some of resid_pre, resid_mid, resid_post, attn_out, mlp_out,
            mlp_pre, mlp_post; default resid_pre, attn_out, mlp_out. For the head grains: z, q, k, v, pattern;
            default z. A full name, as blocks.3.attn.hook_z, stands for its layer alone.
        grain: "position": each layer and position. "layer": each layer, all positions at once. "head": each head, all
            positions at once. "head_position": each head at each position.
        direction: "denoise" patches clean activations into the corrupted run, "noise" corrupted ones into the clean
            run.
        metrics: Some of logit_diff (nats), logprob (of the right answer, nats), rank (of the right answer, from 1).
        align: "equal" leaves out pairs of unequal length; "end" matches positions counted from the end.
        spans: Named pieces of text, {name: one piece of the clean prompt for each pair}. Columns are then these spans,
            each patched as a whole, which lets prompts of different length share a column.
        min_gap: A pair counts only if its logit difference falls by at least this from clean to corrupted, in nats.
        seed: Of the bootstrap.
        n_boot: Bootstrap resamples.

    Returns:
        One row per place and metric, with a 95 % interval over pairs; with one pair the interval has no width.

    Raises:
        ValueError: An unknown site, grain, direction or metric; pairs or answers that do not fit (see the message); a
            gap between the runs below `min_gap` in every pair; logits that are not finite; a model in train mode.
        UnsupportedModelError: The model has no such site, or is built in a way that is not understood.
        MemoryError: A single pair does not fit in memory; a batch that does not is halved.

    Misleads:
        The residual stream at all positions has effect 1 by construction. Later layers of the stream at the last
        position are near 1 in every model, since they hold whatever was computed. Denoising misses parts that back
        each other up, noising misses parts that are not needed because of a backup; run both. Effects need not add
        up to 1.

    Cost:
        Positions x layers forwards per site and pair (heads x layers for heads), batched, of which only the layers
        and positions after the patch are computed; about 10 ms per pair and site on the demo model.

    Example:
        ```python
        from techniques.patching import activation_patching

        pairs = [("The Eiffel Tower is located in the city of", "The Big Ben is located in the city of")]
        result = activation_patching(model, tokenizer, pairs, [(" Paris", " London")])
        max(result["rows"], key=lambda row: row["effect"])
        ```
    """
    decoder = check_sites(model)
    asked, missing = _check_options(decoder, sites, grain, direction, metrics)
    points = points_in(decoder, asked)
    chosen = list(dict.fromkeys(point.site for point in points))
    encoded = encode_pairs(model, tokenizer, pairs, answers, align)
    if "pattern" in chosen and _has_unequal(encoded):
        raise ValueError(
            "The site 'pattern' was asked for with prompts of unequal length, whose keys do not match; expected pairs "
            "of equal length. Patch z instead, or leave the unequal pairs out."
        )
    encoded, baselines = with_gap(model, encoded, min_gap)
    columns = _columns(tokenizer, encoded, grain, spans, len(pairs))
    cells = _cells(decoder, points, grain, len(columns))
    patched = _patched_metrics(model, encoded, cells, columns, direction, metrics)
    rows = [
        row
        for i, metric in enumerate(metrics)
        for row in _rows(cells, metric, patched[..., i], baselines.of(metric), direction, seed, n_boot)
    ]
    return ActivationPatching(
        **header(
            model, "activation_patching", n=len(encoded), seed=seed, warnings=_warnings(encoded, chosen, missing, grain)
        ),
        direction=direction,
        grain=grain,
        sites=chosen,
        align=align,
        n_layers=decoder.n_layers,
        n_heads=decoder.n_heads,
        columns=[column.info(encoded) for column in columns],
        pairs=pair_infos(encoded, baselines),
        excluded=encoded.excluded,
        baselines=[_baseline(baselines, metric) for metric in metrics],
        rows=rows,
    )


def _check_options(
    decoder: Decoder, sites: Sequence[str] | None, grain: str, direction: str, metrics: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The sites that are patched, and those of the default that this model does not have."""
    if grain not in GRAINS:
        raise ValueError(f"grain is {grain!r}; expected one of {', '.join(GRAINS)}.")
    if direction not in ("denoise", "noise"):
        raise ValueError(f'direction is {direction!r}; expected "denoise" or "noise".')
    if not metrics or isinstance(metrics, str) or not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics is {metrics!r}; expected a list of some of {', '.join(METRICS)}.")
    by_head = grain.startswith("head")
    known = HEAD_SITES if by_head else STREAM_SITES
    if sites is None:
        default = ["z"] if by_head else ["resid_pre", "attn_out", "mlp_out"]
        missing = [site for site in default if site not in decoder.layers[0].sites and not by_head]
        return [site for site in default if site not in missing], missing
    chosen = list(sites)
    names = {hook_point(site).site if site.startswith("blocks.") else site for site in chosen}
    if not chosen or isinstance(sites, str) or not names <= set(known):
        raise ValueError(f"sites is {sites!r}; expected a list of some of {', '.join(known)} for the grain {grain!r}.")
    return chosen, []


def _columns(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    grain: str,
    spans: Mapping[str, Sequence[str]] | None,
    n_given: int,
) -> list[Column]:
    by_position = grain in ("position", "head_position")
    if spans is not None and not by_position:
        raise ValueError(
            f'spans were given with the grain {grain!r}; expected the grain "position" or "head_position".'
        )
    if not by_position:
        return []
    return position_columns(pairs) if spans is None else span_columns(tokenizer, pairs, spans, n_given)


def _cells(decoder: Decoder, points: Sequence[HookPoint], grain: str, n_columns: int) -> list[_Cell]:
    columns = range(n_columns) if n_columns else [None]
    return [
        _Cell(point, head, column)
        for point in points
        for head in (_heads(decoder, point.site) if grain.startswith("head") else [None])
        for column in columns
    ]


def _heads(decoder: Decoder, site: str) -> range:
    return range(decoder.n_kv_heads if site in ("k", "v") else decoder.n_heads)


def _patched_metrics(
    model: PreTrainedModel,
    pairs: Pairs,
    cells: list[_Cell],
    columns: list[Column],
    direction: str,
    metrics: Sequence[str],
) -> Float[Tensor, "n cells metrics"]:
    """Every metric of every pair in every cell's patched run, in float64 on the CPU."""
    base, source = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    sides = (1, 0) if direction == "denoise" else (0, 1)  # of the base and the source in a match
    points = {cell.point for cell in cells}

    def patched(which: Sequence[int]) -> Float[Tensor, "variants metrics"]:
        with record(model, points) as values:
            batch = pad([source[i] for i in which], "right", 0, model.device)
            run(model, batch, stop_after=max(point.layer for point in points))
        variants = []
        for (row, pair), cell in itertools.product(enumerate(which), cells):
            matches = pairs.matches(pair) if cell.column is None else columns[cell.column].positions[pair]
            here, there = ([match[side] for match in matches] for side in sides)
            value = site_value(values[cell.point][row], cell.point, there, cell.head)
            variants.append(Variant(row, [Patch(cell.point, value, here, cell.head)]))
        answers = pairs.answer_ids[list(which)], pairs.wrong_ids[list(which)]
        batch = pad([base[i] for i in which], "right", 0, model.device)
        return variant_metrics(model, batch, variants, answers, metrics)

    found = [part for _, part in in_memory(patched, pairs.chunks(), pairs.name)]
    return torch.cat(found).reshape(len(pairs), len(cells), len(metrics))


def _rows(
    cells: list[_Cell],
    metric: str,
    patched: Float[Tensor, "n cells"],
    baselines: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    direction: str,
    seed: int,
    n_boot: int,
) -> list[PatchRow]:
    clean, corrupted = baselines
    start, goal = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    interval = recovered_interval(patched - start[:, None], goal - start, seed, n_boot)
    means = patched.mean(0).tolist()
    return [
        PatchRow(
            site=cell.point.site,
            layer=cell.point.layer,
            head=cell.head,
            column=cell.column,
            metric=metric,
            patched=number(mean),
            recovered=number(effect if direction == "denoise" else 1 - effect),
            effect=number(effect),
            low=number(low),
            high=number(high),
        )
        for cell, mean, effect, low, high in zip(cells, means, *(part.tolist() for part in interval), strict=True)
    ]


def _baseline(baselines: Baselines, metric: str) -> Baseline:
    clean, corrupted = baselines.of(metric)
    return Baseline(metric=metric, clean=number(clean.mean()), corrupted=number(corrupted.mean()))


def _warnings(pairs: Pairs, sites: Sequence[str], missing: Sequence[str], grain: str) -> list[str]:
    found = []
    if missing:
        found.append(f"The blocks of this model have no {' and no '.join(missing)}, which could not be patched.")
    if pairs.excluded:
        found.append(f"{len(pairs.excluded)} pairs were left out; `excluded` says why.")
    if grain == "layer" and any(site.startswith("resid") for site in sites) and not _has_unequal(pairs):
        found.append("The residual stream at all positions is all there is: its effect is 1 by construction.")
    if _has_unequal(pairs):
        found.append("Prompts of unequal length were aligned at their ends, so matching tokens differ in position.")
    return found + few(len(pairs), "pair")


def _has_unequal(pairs: Pairs) -> bool:
    return any(len(a) != len(b) for a, b in zip(pairs.clean, pairs.corrupted, strict=True))
