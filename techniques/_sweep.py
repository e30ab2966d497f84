"""Many patched runs of the same prompts for little more than what is different in them.

A variant is one run of a prompt with some activations changed. Up to its first change it is the plain run, so it starts
there: at the layer of that change, from the plain run's residual stream, and at its first changed position, with the
plain run's keys and values for the positions before. Variants join one growing batch at their layers; each block is
called with the arguments that the model itself gave it, so masks, rotary embeddings and sliding windows are the model's
own. Of the last block only the positions that are read are computed, and only these are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._batches import in_memory
from techniques._hooks import Change, HookPoint, check_sites, find_site, record
from techniques._model import Decoder, UnsupportedModelError, widths
from techniques._patches import Patch, Variant, changed_positions, writer
from techniques._replay import Call, PlainRun, Window, plain_run
from techniques._site_values import eager_attention
from techniques._tokens import Batch, check_finite

__all__ = ["Patch", "Variant", "sweep"]

CPU_BUDGET_BYTES = 2**27  # what is worked on at once still fits the processor's caches in part
CALL_POSITIONS = {"cpu": 32, "cuda": 512}  # positions of one layer that take as long as calling a block does


Metric = Callable[[Float[Tensor, "variants d_vocab"], Int[Tensor, " variants"]], Tensor]


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    batch: Batch,
    variants: Sequence[Variant],
    metric: Metric | None = None,
    *,
    readout: Sequence[int] | None = None,
    budget_bytes: int | None = None,
) -> Float[Tensor, "variants *metric"]:
    """Run many variants of the prompts of one batch and read each at one position.

    Args:
        model: A decoder-only Hugging Face model in eval mode.
        batch: Prompts, padded on the right.
        variants: What to run.
        metric: From logits and the prompts' rows to one result for each variant; the logits themselves if None.
        readout: Position at which each prompt of the batch is read; its last token if None.
        budget_bytes: Memory for what is kept of the plain runs and for what is worked on at once; a quarter of what a
            GPU has left, 128 MiB on the CPU, if None. One prompt and one variant are the least.

    Returns:
        Results in the order of `variants`, on the CPU.

    Raises:
        ValueError: A variant names a row, a layer or a position that does not exist, a value has a shape that does not
            fit, or a logit is not finite.
        UnsupportedModelError: The model lacks a site, or its blocks give other results when they are called again.
        MemoryError: Not even one variant fits into memory.
    """
    if not variants:
        raise ValueError("The list of variants is empty; expected at least one.")
    decoder = check_sites(model)
    reads = (batch.attention_mask.sum(-1) - 1).tolist() if readout is None else list(readout)
    _check_positions(reads, batch)
    moved = [_checked(decoder, variant, batch) for variant in variants]
    budget = budget_bytes if budget_bytes is not None else _free_bytes(batch.input_ids.device)
    resid: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if any(_has_pattern(variant) for variant in moved):
            stack.enter_context(eager_attention(model))
        run_rows = partial(_run_rows, model, decoder, batch, moved, reads, budget)
        for _, found in in_memory(run_rows, _row_groups(decoder, moved, batch, budget), _alone):
            resid.update(found)
    rows = [variant.row for variant in variants]
    size = max(1, budget // (16 * decoder.d_vocab * _itemsize(decoder)))
    chunks = [list(range(len(variants)))[start : start + size] for start in range(0, len(variants), size)]
    decoded = in_memory(partial(_decode, decoder, resid, rows, metric), chunks, _alone)
    return torch.cat([found for _, found in decoded])


def _run_rows(
    model: PreTrainedModel,
    decoder: Decoder,
    batch: Batch,
    variants: Sequence[Variant],
    reads: Sequence[int],
    budget: int,
    rows: Sequence[int],
) -> dict[int, Float[Tensor, " d_model"]]:
    """The stream after the last block where each variant of some prompts is read, by the variant's index."""
    mine = {i: variant for i, variant in enumerate(variants) if variant.row in rows}
    with record(model, {patch.point for variant in mine.values() for patch in variant.patches}) as values:
        plain = plain_run(model, decoder, batch, list(rows))
    _check_replay(model, plain, reads)
    jobs = _jobs(plain, mine, values, reads)
    values.clear()
    resid: dict[int, Tensor] = {}
    for _, found in in_memory(partial(_run_jobs, plain), _chunks(plain, jobs, budget // 2), _alone):
        resid.update(found)
    return resid


def _alone(_: object) -> str:
    return "One variant of one prompt"


def _decode(
    decoder: Decoder, resid: Mapping[int, Tensor], rows: Sequence[int], metric: Metric | None, chunk: Sequence[int]
) -> Float[Tensor, "chunk *metric"]:
    logits = decoder.logits(torch.stack([resid[i] for i in chunk]))
    check_finite(logits)
    if metric is None:
        return logits.cpu()
    # A copy, as a metric that picks some logits would keep all of them alive.
    return metric(logits, torch.tensor([rows[i] for i in chunk], device=logits.device)).to("cpu", copy=True)


def _checked(decoder: Decoder, variant: Variant, batch: Batch) -> Variant:
    if not 0 <= variant.row < len(batch.input_ids):
        raise ValueError(f"Row {variant.row} does not exist; the batch has {len(batch.input_ids)} prompts.")
    for patch in variant.patches:
        find_site(decoder, patch.point)
        _check_positions(patch.positions or (), batch)
    return Variant(variant.row, [_moved(decoder, patch) for patch in variant.patches])


def _check_positions(positions: Sequence[int], batch: Batch) -> None:
    length = batch.input_ids.shape[1]
    if wrong := [position for position in positions if not 0 <= position < length]:
        raise ValueError(f"Position {wrong[0]} does not exist; choose one from 0 to {length - 1}.")


def _has_pattern(variant: Variant) -> bool:
    return any(patch.point.site == "pattern" for patch in variant.patches)


def _moved(decoder: Decoder, patch: Patch) -> Patch:
    """resid_post of one layer is resid_pre of the next, where less is left to compute."""
    layer = patch.point.layer
    if patch.point.site == "resid_post" and 0 <= layer < decoder.n_layers - 1:
        return replace(patch, point=HookPoint("resid_pre", layer + 1))
    return patch


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CPU_BUDGET_BYTES


def _row_groups(decoder: Decoder, variants: Sequence[Variant], batch: Batch, budget: int) -> list[list[int]]:
    """The prompts that are run, in groups whose plain runs take half of the budget at most."""
    rows = sorted({variant.row for variant in variants})
    per_layer = 2 * decoder.d_model + 2 * decoder.n_kv_heads * decoder.d_head
    row_bytes = decoder.n_layers * per_layer * batch.input_ids.shape[1] * _itemsize(decoder)
    size = max(1, budget // 2 // row_bytes)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _itemsize(decoder: Decoder) -> int:
    return max(parameter.dtype.itemsize for parameter in decoder.embed.parameters())


@dataclass(frozen=True)
class _Job:
    """A variant as it is run: from which layer and position on, and to which position."""

    index: int
    row: int
    patches: Sequence[Patch]
    layer: int
    start: int
    read: int
    has_pattern: bool


def _jobs(
    plain: PlainRun, variants: Mapping[int, Variant], values: Mapping[HookPoint, Tensor], reads: Sequence[int]
) -> list[_Job]:
    """Variants as jobs; what a patch leaves as it is in the plain run needs no work."""
    flat = [(i, patch) for i, variant in variants.items() for patch in variant.patches]
    changed = [changed_positions(patch, values[patch.point][plain.rows[variants[i].row]]) for i, patch in flat]
    # One copy from the device for all of them.
    flags = iter(torch.cat([flag.to(plain.resid_pre[0].device) for flag in changed]).tolist() if flat else [])
    found: dict[int, list[tuple[Patch, int]]] = {i: [] for i in variants}
    for (i, patch), mine in zip(flat, changed, strict=True):
        positions = range(len(mine)) if patch.positions is None else patch.positions
        where = [position for position, flag in zip(positions, islice(flags, len(mine)), strict=True) if flag]
        if where:
            found[i].append((patch, min(where)))
    return [_job(plain, i, variants[i], changes, reads) for i, changes in found.items()]


def _job(
    plain: PlainRun, index: int, variant: Variant, changes: Sequence[tuple[Patch, int]], reads: Sequence[int]
) -> _Job:
    read = reads[variant.row]
    has_pattern = any(patch.point.site == "pattern" for patch, _ in changes)
    start = 0 if has_pattern else min([read, *(first for _, first in changes)])
    layer = min([plain.decoder.n_layers, *(patch.point.layer for patch, _ in changes)])
    # A patch that keeps the plain value holds it against what the variant's other patches change before it.
    return _Job(index, variant.row, variant.patches if changes else [], layer, start, read, has_pattern)


# The changed runs.


def _run_jobs(plain: PlainRun, jobs: Sequence[_Job]) -> dict[int, Float[Tensor, " d_model"]]:
    """The stream after the last block where each job is read, by index; `jobs` are in the order of their layers."""
    n_layers = plain.decoder.n_layers
    reads = [job.read for job in jobs]
    is_whole = any(job.has_pattern for job in jobs) or not plain.can_skip
    window = Window(0 if is_whole else min(job.start for job in jobs), max(reads) + 1)
    rows = torch.tensor([plain.rows[job.row] for job in jobs])
    resid: Tensor | None = None
    for layer in range(min(job.layer for job in jobs), n_layers):
        n = sum(job.layer <= layer for job in jobs)
        resid = _joined(resid, plain.resid_pre[layer], rows[:n], window)
        call = Call(plain, layer, rows[:n], partial(_edits, jobs[:n], layer))
        if layer == n_layers - 1 and min(reads) > window.start and not is_whole:
            resid = call.read_only(resid, window, min(reads))
            window = Window(min(reads), window.stop)
        else:
            resid = call.whole(resid, window)
    resid = _joined(resid, plain.resid_pre[n_layers], rows, window)
    at = torch.tensor(reads, device=resid.device) - window.start
    read = resid[torch.arange(len(jobs), device=resid.device), at]
    return dict(zip((job.index for job in jobs), read, strict=True))


def _joined(resid: Tensor | None, plain: Tensor, rows: Int[Tensor, " jobs"], window: Window) -> Tensor:
    """The stream of the jobs so far, and the plain stream for those that join now."""
    new = rows[0 if resid is None else len(resid) :].to(plain.device)
    joining = plain[:, window.start : window.stop][new]
    return joining if resid is None else torch.cat([resid.to(plain.device), joining])


def _edits(jobs: Sequence[_Job], layer: int, window: Window) -> dict[HookPoint, Change]:
    by_point: dict[HookPoint, list[tuple[int, Patch]]] = {}
    for i, job in enumerate(jobs):
        for patch in job.patches:
            if patch.point.layer == layer:
                by_point.setdefault(patch.point, []).append((i, patch))
    return {point: writer(patches, window) for point, patches in by_point.items()}


# Chunks of jobs.


def _chunks(plain: PlainRun, jobs: Sequence[_Job], budget: int) -> list[list[_Job]]:
    """The cheapest of some ways to run the jobs in chunks that fit the budget."""
    length = plain.resid_pre[0].shape[1]
    widths = {length} | {2**i for i in range(length.bit_length())} if plain.can_skip else {length}
    return min((_plan(plain, jobs, width, budget) for width in widths), key=partial(_cost, plain))


def _plan(plain: PlainRun, jobs: Sequence[_Job], width: int, budget: int) -> list[list[_Job]]:
    """Jobs in chunks that fit the budget: those whose first positions lie in the same `width`, in order of layers."""
    chunks: list[list[_Job]] = []
    bucket: tuple[bool, int] | None = None
    size = 0
    for job in sorted(jobs, key=lambda job: (job.has_pattern, job.start // width, job.layer)):
        if (job.has_pattern, job.start // width) != bucket:
            bucket = job.has_pattern, job.start // width
            size = max(1, budget // _job_bytes(plain, bucket[1] * width))
            chunks.append([])
        elif len(chunks[-1]) == size:
            chunks.append([])
        chunks[-1].append(job)
    return chunks


def _job_bytes(plain: PlainRun, start: int) -> int:
    """About what one job takes while its chunk is worked on: activations of a block, keys and values."""
    decoder, (_, length, d_model) = plain.decoder, plain.resid_pre[0].shape
    mlp_post = decoder.layers[0].sites.get("mlp_post")
    d_mlp = (widths(mlp_post.module) or (0,))[0] if mlp_post else 4 * d_model
    width = length - start
    per_position = 10 * d_model + 4 * d_mlp + 3 * decoder.n_heads * length
    numbers = width * per_position + 4 * length * decoder.n_kv_heads * decoder.d_head
    return numbers * plain.resid_pre[0].dtype.itemsize


def _cost(plain: PlainRun, chunks: Sequence[Sequence[_Job]]) -> int:
    """Positions times layers that are computed, and what each call of a block costs beside them."""
    resid = plain.resid_pre[0]
    per_call = CALL_POSITIONS["cuda" if resid.is_cuda else "cpu"]
    total = 0
    for chunk in chunks:
        width = max(job.read for job in chunk) + 1 - min(job.start for job in chunk)
        left = [plain.decoder.n_layers - job.layer for job in chunk]
        total += sum(left) * width + max(left) * per_call
    return total


_replayed: WeakKeyDictionary[nn.Module, tuple[Decoder, str]] = WeakKeyDictionary()


def _check_replay(model: PreTrainedModel, plain: PlainRun, reads: Sequence[int]) -> None:
    """Prove on the model at hand that its blocks, called again for half of a prompt, give what they gave before."""
    proven = plain.decoder, str(model.config.get_text_config(decoder=True)._attn_implementation)
    if _replayed.get(model) == proven:
        return
    row, kept = list(plain.rows.items())[-1]
    job = _Job(0, row, [], 0, reads[row] // 2, reads[row], False)
    again, before = _run_jobs(plain, [job])[job.index], plain.resid_pre[-1][kept, reads[row]]
    gap, size = (again - before).abs().max().item(), before.abs().max().item()
    if not gap <= max(1e-3, 16 * torch.finfo(before.dtype).eps) * size:
        raise UnsupportedModelError(
            f"The blocks of this model, called a second time, differ by up to {gap:.3g} from the first time, where the "
            f"largest value is {size:.3g}; expected no difference. Its blocks share more than their arguments say; "
            "those of an 8-bit model do unless it is loaded with llm_int8_threshold=0."
        )
    _replayed[model] = proven
