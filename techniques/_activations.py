"""Activations of texts at chosen tokens: what `extract`, the probes and the directions are made from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._hooks import HookPoint, check_sites, hook_point, record, run
from techniques._model import find_decoder
from techniques._tokens import (
    check_context,
    check_lists,
    encode,
    pad,
    plain,
    resolve_position,
    span_positions,
    token_text,
    whole_numbers,
)

MAX_TOKENS = 8192  # of a batch, padding included

Position = int | str | Sequence[int | str | tuple[int, int]]
Layers = Literal["all"] | int | Sequence[int]


class ReadText(TypedDict):
    """Where a text was read.

    Attributes:
        text: The text.
        n_tokens: How many tokens it has, special tokens included.
        start: Index of the first token that was read.
        stop: Index after the last one; the activation is the mean over the tokens between.
        token: Text of the last token that was read.
    """

    text: str
    n_tokens: int
    start: int
    stop: int
    token: str


@dataclass(frozen=True)
class Reading:
    """Encoded texts, and the range of tokens over which each is averaged."""

    texts: list[str]
    ids: list[list[int]]
    ranges: list[tuple[int, int]]

    def inputs(self) -> list[tuple[int, ...]]:
        """The tokens that the model has seen where each text is read: what its activation depends on."""
        return [tuple(ids[:stop]) for ids, (_, stop) in zip(self.ids, self.ranges, strict=True)]

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[ReadText]:
        """Where each text is read, for a result."""
        return [
            ReadText(text=text, n_tokens=len(ids), start=start, stop=stop, token=token_text(tokenizer, ids[stop - 1]))
            for text, ids, (start, stop) in zip(self.texts, self.ids, self.ranges, strict=True)
        ]


def points_of(model: PreTrainedModel, site: str, layers: Layers) -> list[HookPoint]:
    """Hook points of a site at the given layers.

    Raises:
        ValueError: The site is unknown or has no vector per token, or a layer does not exist.
    """
    n_layers = find_decoder(model).n_layers
    is_all = isinstance(layers, str) and layers == "all"
    chosen = list(range(n_layers)) if is_all else whole_numbers("layers", layers)
    if not chosen or not all(0 <= layer < n_layers for layer in chosen):
        raise ValueError(f'layers is {layers!r}; expected "all" or some of 0 to {n_layers - 1}, the model\'s layers.')
    full = site.startswith("blocks.") and is_all  # a full name has its own layer
    points = [hook_point(site)] if full else [hook_point(site, layer) for layer in chosen]
    if not 0 <= points[0].layer < n_layers:
        raise ValueError(f"site is {site!r}; expected a layer of 0 to {n_layers - 1}, the model's layers.")
    if points[0].site == "pattern":
        raise ValueError(
            "The site is 'pattern', which holds weights between tokens; expected a site that has a vector per token, "
            "such as resid_post or z."
        )
    return points


def read_at(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], position: Position
) -> Reading:
    """Encode texts and resolve a position in each of them; see `extract`.

    Raises:
        ValueError: The model is in train mode, a text is empty or too long, or a position is not in its text.
    """
    check_sites(model)
    check_lists(texts=texts)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    position = plain(position)
    chosen = [position] * len(texts) if isinstance(position, int | str) else list(position)
    if len(chosen) != len(texts):
        raise ValueError(f"position has {len(chosen)} entries for {len(texts)} texts; expected one for each.")
    ranges = [_range(tokenizer, text, len(row), where) for text, row, where in zip(texts, ids, chosen, strict=True)]
    return Reading(list(texts), ids, ranges)


def _range(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, where: int | str | tuple[int, int]
) -> tuple[int, int]:
    if where == "mean":
        return 0, length
    if isinstance(where, tuple):
        start, stop = where
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"The range {start} to {stop} of {text!r} is not inside its {length} tokens; expected "
                "0 <= start < stop <= length."
            )
        return start, stop
    if isinstance(where, int):
        at = resolve_position(where, length, text)
    else:
        at = length - 1 if where == "last" else span_positions(tokenizer, text, where)[-1]
    return at, at + 1


@torch.no_grad()
def activations_at(
    model: PreTrainedModel, reading: Reading, points: Sequence[HookPoint], max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "n points *size"]:
    """Mean activation over each text's range at each point; float32 on the CPU, rows in the order of the texts.

    Raises:
        ValueError: An activation is infinite or not a number.
        MemoryError: One text alone does not fit the memory.
    """
    lengths = [len(ids) for ids in reading.ids]
    found = torch.stack(in_batches(lengths, max_tokens, lambda which: list(_batch(model, reading, which, points))))
    _check_finite(found, points)
    return found


def untrained_activations(
    model: PreTrainedModel, reading: Reading, points: Sequence[HookPoint], seed: int
) -> Float[Tensor, "n layers d"]:
    """Activations of the same architecture with random weights."""
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        blank = type(base)(copy.deepcopy(base.config))
    return activations_at(blank.to(model.device, model.dtype).eval(), reading, points).flatten(2)


@torch.no_grad()
def prompt_values(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    points: Collection[HookPoint],
    keep: Callable[[Float[Tensor, "pos *size"]], Tensor],
    max_tokens: int = MAX_TOKENS,
) -> list[dict[HookPoint, Tensor]]:
    """`keep` of each prompt's values at each point, which is not a pattern, without padding; on the model's devices.

    Raises:
        MemoryError: One prompt alone does not fit the memory.
    """

    def values(which: list[int]) -> list[dict[HookPoint, Tensor]]:
        with record(model, points) as seen:
            batch = pad([ids[i] for i in which], "right", 0, model.device)
            run(model, batch, stop_after=max(point.layer for point in points))
        return [
            {point: keep(value[row, : len(ids[i])]) for point, value in seen.items()} for row, i in enumerate(which)
        ]

    return in_batches([len(row) for row in ids], max_tokens, values)


def token_means(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], points: Collection[HookPoint]
) -> dict[HookPoint, Float[Tensor, " *size"]]:
    """Mean of each point over all tokens of all prompts, in the model's dtype.

    Raises:
        MemoryError: One prompt alone does not fit the memory.
    """
    sums = prompt_values(model, ids, points, lambda value: value.float().sum(0))
    n_tokens = sum(map(len, ids))
    return {point: (torch.stack([row[point] for row in sums]).sum(0) / n_tokens).to(model.dtype) for point in points}


def _batch(
    model: PreTrainedModel, reading: Reading, which: Sequence[int], points: Sequence[HookPoint]
) -> Float[Tensor, "rows points *size"]:
    batch = pad([reading.ids[i] for i in which], "right", 0, model.device)
    weights = torch.zeros(batch.input_ids.shape)
    for row, i in enumerate(which):
        start, stop = reading.ranges[i]
        weights[row, start:stop] = 1 / (stop - start)
    rows, columns = weights.nonzero(as_tuple=True)

    def keep(value: Float[Tensor, "batch pos *size"]) -> Float[Tensor, "batch *size"]:
        read = value[rows.to(value.device), columns.to(value.device)].float().flatten(1)
        share = weights[rows, columns].to(value.device)[:, None]
        total = read.new_zeros(len(which), read.shape[1]).index_add_(0, rows.to(value.device), read * share)
        return total.view(len(which), *value.shape[2:])

    with record(model, points, keep) as seen:
        run(model, batch, stop_after=max(point.layer for point in points))
    return torch.stack([seen[point].cpu() for point in points], 1)


def _check_finite(found: Float[Tensor, "n points *size"], points: Sequence[HookPoint]) -> None:
    bad = ~torch.isfinite(found).flatten(2).all(-1)
    if bool(bad.any()):
        text, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"The activation of text {text} at {points[column]} is infinite or not a number; expected numbers. "
            "Load the model in bfloat16 or float32, or check its weights."
        )
