"""Many patched runs of the same prompts for little more than what is different in them.

A variant is one run of a prompt with some activations changed. Up to its first change it is the plain run, so it starts
there: at the layer of that change, from the plain run's residual stream, and at its first changed position, with the
plain run's keys and values for the positions before. Variants join one growing batch at their layers; each block is
called with the arguments that the model itself gave it, so masks, rotary embeddings and sliding windows are the model's
own. Of the last block only the positions that are read are computed, and only these are decoded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from techniques._hooks import Change, HookPoint, Placement, check_sites, eager_attention, editors, placed, run
from techniques._model import Decoder, UnsupportedModelError, widths
from techniques._tokens import Batch

CPU_BUDGET_BYTES = 2**27  # what is worked on at once still fits the processor's caches in part
CALL_POSITIONS = {"cpu": 32, "cuda": 512}  # positions of one layer that take as long as calling a block does
CACHES = ("past_key_values", "layer_past")  # what blocks call the argument through which they keep keys and values


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
        ValueError: A variant names a row, a layer or a position that does not exist.
        UnsupportedModelError: The model lacks a site, or its blocks give other results when they are called again.
        MemoryError: Not even one variant fits into memory.
    """
    decoder = check_sites(model)
    last = batch.attention_mask.sum(-1).tolist() if readout is None else list(readout)
    last = [position - 1 for position in last] if readout is None else last
    jobs = [_job(decoder, i, variant, last, batch) for i, variant in enumerate(variants)]
    budget = budget_bytes if budget_bytes is not None else _free_bytes(batch.input_ids.device)
    results: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if any(job.has_pattern for job in jobs):
            stack.enter_context(eager_attention(model))
        for group in _row_groups(decoder, jobs, batch, budget):
            plain = _plain_run(model, decoder, batch, group)
            if not results:
                _check_replay(plain, last)
            for found in _chunks(plain, [job for job in jobs if job.row in plain.rows], budget, metric):
                results.update(found)
    if not results:
        raise ValueError("The list of variants is empty; expected at least one.")
    return torch.stack([results[i] for i in range(len(variants))])


@dataclass(frozen=True)
class _Job:
    """A variant as it is run: from which layer and position on, and to which position."""

    index: int
    row: int
    patches: list[Patch]
    layer: int
    start: int
    read: int
    has_pattern: bool


def _job(decoder: Decoder, index: int, variant: Variant, last: list[int], batch: Batch) -> _Job:
    if not 0 <= variant.row < len(batch.input_ids):
        raise ValueError(f"Row {variant.row} does not exist; the batch has {len(batch.input_ids)} prompts.")
    patches = [_moved(decoder, patch) for patch in variant.patches]
    length = batch.input_ids.shape[1]
    positions = [p for patch in patches for p in (patch.positions if patch.positions is not None else [0])]
    if wrong := [p for p in positions if not 0 <= p < length]:
        raise ValueError(f"Position {wrong[0]} does not exist; choose one from 0 to {length - 1}.")
    has_pattern = any(patch.point.site == "pattern" for patch in patches)
    start = 0 if has_pattern else min([last[variant.row], *positions])
    layer = min([decoder.n_layers, *(patch.point.layer for patch in patches)])
    return _Job(index, variant.row, patches, layer, start, last[variant.row], has_pattern)


def _moved(decoder: Decoder, patch: Patch) -> Patch:
    """resid_post of one layer is resid_pre of the next, where less is left to compute."""
    layer = patch.point.layer
    if patch.point.site == "resid_post" and 0 <= layer < decoder.n_layers - 1:
        return replace(patch, point=HookPoint("resid_pre", layer + 1))
    return patch


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CPU_BUDGET_BYTES


# The plain run.


class _Cache:
    """Stands in for transformers' cache: keeps keys and values, and puts those of earlier positions before them."""

    def __init__(self, before: tuple[Tensor, Tensor] | None = None, stop: bool = False) -> None:
        self.before = before
        self.stop = stop
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention calls with new keys and values [batch n_kv_heads pos d_head]; gives all of them back."""
        if self.before is not None:
            key, value = torch.cat([self.before[0], key], 2), torch.cat([self.before[1], value], 2)
        self.kept = key, value
        if self.stop:
            raise _Stop
        return key, value


    def get_seq_length(self, *_: Any) -> int:
        """How many positions stand before the new ones."""
        return 0 if self.before is None else self.before[0].shape[2]


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a block of which only keys and values are wanted."""


@dataclass(frozen=True)
class _Plain:
    """What is kept of the plain run of some prompts.

    Attributes:
        rows: Row of the batch -> row in what is kept.
        resid_pre: By layer; the last entry is the last block's output.
        keys_values: By layer, of all positions; None where attention keeps none.
        arguments: By layer, what else the model called the block with.
    """

    decoder: Decoder
    rows: dict[int, int]
    resid_pre: list[Float[Tensor, "rows pos d_model"]]
    keys_values: list[tuple[Tensor, Tensor] | None]
    arguments: list[dict[str, Any]]

    @property
    def can_skip(self) -> bool:
        """Whether positions before the first change can be left out."""
        return all(kept is not None for kept in self.keys_values)


def _plain_run(model: PreTrainedModel, decoder: Decoder, batch: Batch, rows: list[int]) -> _Plain:
    resid: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    caches = [_Cache() for _ in decoder.blocks]

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layer = len(arguments)
        # GradientCheckpointingLayer and taps stand before the block's own forward; its class still has the names.
        names = list(inspect.signature(type(decoder.blocks[layer]).forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        resid.append(named.pop("hidden_states"))
        arguments.append(named)
        return (resid[-1],), named | {name: caches[layer] for name in CACHES if name in named}

    with placed([Placement(block, True, before) for block in decoder.blocks]):
        ids = Batch(batch.input_ids[rows], batch.attention_mask[rows])
        resid.append(run(model, ids, stop_after=decoder.n_layers - 1))
    return _Plain(decoder, {row: i for i, row in enumerate(rows)}, resid, [cache.kept for cache in caches], arguments)


def _row_groups(decoder: Decoder, jobs: Sequence[_Job], batch: Batch, budget: int) -> list[list[int]]:
    """The prompts that are run, in groups whose plain runs take half of the budget at most."""
    rows = sorted({job.row for job in jobs})
    per_layer = decoder.d_model + 2 * decoder.n_kv_heads * decoder.d_head
    row_bytes = decoder.n_layers * per_layer * batch.input_ids.shape[1] * _itemsize(decoder)
    size = max(1, budget // 2 // row_bytes)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _itemsize(decoder: Decoder) -> int:
    return max(parameter.dtype.itemsize for parameter in decoder.embed.parameters())


# The changed runs.


@dataclass(frozen=True)
class _Window:
    """The positions that a call of a block computes; keys and values before `start` are those of the plain run."""

    start: int
    stop: int


def _run_jobs(plain: _Plain, jobs: Sequence[_Job]) -> Float[Tensor, "jobs d_model"]:
    """The residual stream after the last block where each job is read; `jobs` are in the order of their layers."""
    n_layers = plain.decoder.n_layers
    reads = [job.read for job in jobs]
    is_whole = any(job.has_pattern for job in jobs) or not plain.can_skip
    window = _Window(0 if is_whole else min(job.start for job in jobs), max(reads) + 1)
    rows = torch.tensor([plain.rows[job.row] for job in jobs])
    resid: Tensor | None = None
    for layer in range(min(job.layer for job in jobs), n_layers):
        n = sum(job.layer <= layer for job in jobs)
        resid = _joined(resid, plain.resid_pre[layer], rows[:n], window)
        call = _Call(plain, layer, rows[:n], jobs[:n])
        if layer == n_layers - 1 and min(reads[:n]) > window.start and not is_whole:
            resid = call.read_only(resid, window, min(reads[:n]))
            window = _Window(min(reads[:n]), window.stop)
        else:
            resid = call.whole(resid, window)
    resid = _joined(resid, plain.resid_pre[n_layers], rows, window)
    at = torch.tensor(reads, device=resid.device) - window.start
    return resid[torch.arange(len(jobs), device=resid.device), at]


def _joined(resid: Tensor | None, plain: Tensor, rows: Int[Tensor, " jobs"], window: _Window) -> Tensor:
    """The stream of the jobs so far, and the plain stream for those that join now."""
    new = rows[0 if resid is None else len(resid) :].to(plain.device)
    joining = plain[:, window.start : window.stop][new]
    return joining if resid is None else torch.cat([resid.to(plain.device), joining])


@dataclass(frozen=True)
class _Call:
    """A block, called for some jobs."""

    plain: _Plain
    layer: int
    rows: Int[Tensor, " jobs"]
    jobs: Sequence[_Job]

    def whole(self, resid: Tensor, window: _Window) -> Tensor:
        """The block's output in the window."""
        return self._run(resid, window, _Cache(self._before(window.start)) if window.start else None)

    def read_only(self, resid: Tensor, window: _Window, first: int) -> Tensor:
        """The block's output from position `first` on; of the positions before it only keys and values are needed."""
        cache = _Cache(self._before(window.start), stop=True)
        with suppress(_Stop):
            self._run(resid, window, cache)
        assert cache.kept is not None  # or the block would have run to its end
        before = cache.kept[0][:, :, :first], cache.kept[1][:, :, :first]
        return self._run(resid[:, first - window.start :], _Window(first, window.stop), _Cache(before))

    def _before(self, start: int) -> tuple[Tensor, Tensor] | None:
        kept = self.plain.keys_values[self.layer]
        if kept is None or not start:
            return None
        rows = self.rows.to(kept[0].device)
        return kept[0][:, :, :start][rows], kept[1][:, :, :start][rows]

    def _run(self, resid: Tensor, window: _Window, cache: _Cache | None) -> Tensor:
        block = self.plain.decoder.blocks[self.layer]
        given = self.plain.arguments[self.layer]
        arguments = {name: self._argument(name, value, window) for name, value in given.items()}
        arguments |= {name: cache for name in CACHES if name in arguments}
        with placed(editors(self.plain.decoder, self._edits(window), set())):
            output = block(resid, **arguments)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _argument(self, name: str, value: Any, window: _Window) -> Any:
        if isinstance(value, tuple):
            return tuple(self._argument(name, part, window) for part in value)
        if name == "attention_mask" and value is None and window.start:
            # What attention does by itself without a mask holds only from the first position on.
            keys = torch.arange(window.stop, device=self.plain.resid_pre[self.layer].device)
            return (keys <= keys[window.start :, None])[None, None]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        n_rows, length = self.plain.resid_pre[0].shape[:2]
        rows = self.rows.to(value.device)
        if name == "alibi":  # [rows * n_heads, 1, pos]
            return value.unflatten(0, (n_rows, -1))[rows][..., : window.stop].flatten(0, 1)
        if len(value) == n_rows > 1:
            value = value[rows]
        if value.dim() == 4 and value.shape[2] == length:  # a mask of queries and keys
            return value[:, :, window.start : window.stop, : window.stop]
        return value[:, window.start : window.stop] if value.shape[1] == length else value

    def _edits(self, window: _Window) -> dict[HookPoint, Change]:
        by_point: dict[HookPoint, list[tuple[int, Patch]]] = {}
        for i, job in enumerate(self.jobs):
            for patch in job.patches:
                if patch.point.layer == self.layer:
                    by_point.setdefault(patch.point, []).append((i, patch))
        return {point: _writer(patches, window) for point, patches in by_point.items()}


def _writer(patches: Sequence[tuple[int, Patch]], window: _Window) -> Change:
    def write(value: Tensor) -> Tensor:
        value = value.clone()
        for row, patch in patches:
            _write(value[row], patch, window)
        return value

    return write


def _write(value: Tensor, patch: Patch, window: _Window) -> None:
    """Apply a patch to the value of one row in a window, in place."""
    is_pattern = patch.point.site == "pattern"
    inside: Any = slice(window.start, window.stop)
    positions: Any = slice(None)
    if patch.positions is not None:
        inside = [i for i, position in enumerate(patch.positions) if window.start <= position < window.stop]
        positions = torch.tensor([patch.positions[i] - window.start for i in inside], dtype=torch.long)
    units: Any = slice(None) if patch.units is None else patch.units
    first, second = (units, positions) if is_pattern else (positions, units)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        first = first[:, None]
    part = value[first, second]
    if callable(patch.value):
        new = patch.value(part)
    elif is_pattern:
        new = patch.value[..., : part.shape[-2], : part.shape[-1]]
    else:
        new = patch.value if patch.value.dim() < part.dim() else patch.value[inside]
    value[first, second] = new.to(value)


# Chunks of jobs.


def _chunks(
    plain: _Plain, jobs: Sequence[_Job], budget: int, metric: Metric | None
) -> Iterator[dict[int, Float[Tensor, " *metric"]]]:
    """Results by the index of the variant, chunk by chunk; a chunk that does not fit into memory is halved."""
    length = plain.resid_pre[0].shape[1]
    widths = {length} | {2**i for i in range(length.bit_length())} if plain.can_skip else {length}
    plans = [_plan(plain, jobs, width, budget // 2) for width in widths]
    waiting = min(plans, key=lambda plan: _cost(plain, plan))[::-1]
    limit = len(jobs)
    while waiting:
        chunk = waiting.pop()
        found = _results(plain, chunk, metric) if len(chunk) <= limit else None
        if found is not None:
            yield found
            continue
        if len(chunk) == 1:
            raise MemoryError(
                f"One variant of a prompt of {length} tokens does not fit into memory beside the model. Shorten the "
                "prompt, or free memory."
            )
        limit = min(limit, (len(chunk) + 1) // 2)
        waiting += [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]


def _results(plain: _Plain, jobs: Sequence[_Job], metric: Metric | None) -> dict[int, Tensor] | None:
    """Results by the index of the variant; None if memory ran out."""
    try:
        logits = plain.decoder.logits(_run_jobs(plain, jobs))
        rows = torch.tensor([job.row for job in jobs], device=logits.device)
        found = logits if metric is None else metric(logits, rows)
        return dict(zip((job.index for job in jobs), found.cpu(), strict=True))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _plan(plain: _Plain, jobs: Sequence[_Job], width: int, budget: int) -> list[list[_Job]]:
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


def _job_bytes(plain: _Plain, start: int) -> int:
    """About what one job takes while its chunk is worked on: activations of a block, keys and values, logits."""
    decoder, (_, length, d_model) = plain.decoder, plain.resid_pre[0].shape
    mlp_post = decoder.layers[0].sites.get("mlp_post")
    d_mlp = (widths(mlp_post.module) or (0,))[0] if mlp_post else 4 * d_model
    width = length - start
    per_position = 10 * d_model + 4 * d_mlp + 3 * decoder.n_heads * length
    numbers = width * per_position + 4 * length * decoder.n_kv_heads * decoder.d_head
    return numbers * plain.resid_pre[0].dtype.itemsize + 8 * decoder.d_vocab


def _cost(plain: _Plain, chunks: Sequence[Sequence[_Job]]) -> int:
    """Positions times layers that are computed, and what each call of a block costs beside them."""
    resid = plain.resid_pre[0]
    per_call = CALL_POSITIONS["cuda" if resid.is_cuda else "cpu"]
    total = 0
    for chunk in chunks:
        width = max(job.read for job in chunk) + 1 - min(job.start for job in chunk)
        left = [plain.decoder.n_layers - job.layer for job in chunk]
        total += sum(left) * width + max(left) * per_call
    return total


def _check_replay(plain: _Plain, last: Sequence[int]) -> None:
    """Prove on the model at hand that its blocks, called again for half of a prompt, give what they gave before."""
    row, kept = next(iter(plain.rows.items()))
    job = _Job(0, row, [], 0, last[row] // 2, last[row], False)
    again, before = _run_jobs(plain, [job])[0], plain.resid_pre[-1][kept, last[row]]
    gap, size = (again - before).abs().max().item(), before.abs().max().item()
    if not gap <= max(1e-3, 16 * torch.finfo(before.dtype).eps) * size:
        raise UnsupportedModelError(
            f"The blocks of this model, called a second time, differ by up to {gap:.3g} from the first time, where the "
            f"largest value is {size:.3g}; expected no difference. Its blocks share more than their arguments say."
        )
