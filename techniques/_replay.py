"""Blocks called again, with the arguments that the model itself gave them, for some positions of some prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from techniques._hooks import Change, HookPoint, Stop, editors, run
from techniques._model import Decoder
from techniques._taps import Placement, before, placed
from techniques._tokens import Batch

CACHES = ("past_key_values", "layer_past")  # what blocks call the argument through which they keep keys and values


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
            raise Stop
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """How many positions stand before the new ones."""
        return 0 if self.before is None else self.before[0].shape[2]


@dataclass(frozen=True)
class PlainRun:
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


def plain_run(model: PreTrainedModel, decoder: Decoder, batch: Batch, rows: list[int]) -> PlainRun:
    """Run some rows of a batch and keep what it takes to run any part of it again."""
    resid: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    caches = [_Cache() for _ in decoder.blocks]

    def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layer = len(arguments)
        # GradientCheckpointingLayer and taps stand before the block's own forward; its class still has the names.
        names = list(inspect.signature(type(decoder.blocks[layer]).forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        resid.append(named.pop("hidden_states"))
        arguments.append(named)
        return (resid[-1],), named | {name: caches[layer] for name in CACHES if name in named}

    with placed([Placement(block, True, before(see)) for block in decoder.blocks]):
        ids = Batch(batch.input_ids[rows], batch.attention_mask[rows])
        resid.append(run(model, ids, stop_after=decoder.n_layers - 1))
    kept = {row: i for i, row in enumerate(rows)}
    return PlainRun(decoder, kept, resid, [cache.kept for cache in caches], arguments)


@dataclass(frozen=True)
class Window:
    """The positions that a call of a block computes; keys and values before `start` are those of the plain run."""

    start: int
    stop: int


@dataclass(frozen=True)
class Call:
    """A block, called again.

    Attributes:
        plain: The run that it belongs to.
        layer: Which block.
        rows: The row of what is kept that each row of the call continues.
        edits: What to change in a window.
    """

    plain: PlainRun
    layer: int
    rows: Int[Tensor, " batch"]
    edits: Callable[[Window], Mapping[HookPoint, Change]]

    def whole(self, resid: Tensor, window: Window) -> Tensor:
        """The block's output in the window."""
        return self._run(resid, window, _Cache(self._before(window.start)) if window.start else None)

    def read_only(self, resid: Tensor, window: Window, first: int) -> Tensor:
        """The block's output from position `first` on; of the positions before it only keys and values are needed."""
        cache = _Cache(self._before(window.start), stop=True)
        with suppress(Stop):
            self._run(resid, window, cache)
        assert cache.kept is not None  # or the block would have run to its end
        before = cache.kept[0][:, :, :first], cache.kept[1][:, :, :first]
        return self._run(resid[:, first - window.start :], Window(first, window.stop), _Cache(before))

    def _before(self, start: int) -> tuple[Tensor, Tensor] | None:
        kept = self.plain.keys_values[self.layer]
        if kept is None or not start:
            return None
        rows = self.rows.to(kept[0].device)
        return kept[0][:, :, :start][rows], kept[1][:, :, :start][rows]

    def _run(self, resid: Tensor, window: Window, cache: _Cache | None) -> Tensor:
        block = self.plain.decoder.blocks[self.layer]
        given = self.plain.arguments[self.layer]
        arguments = {name: self._argument(name, value, window) for name, value in given.items()}
        arguments |= {name: cache for name in CACHES if name in arguments}
        with placed(editors(self.plain.decoder, self.edits(window), set())):
            output = block(resid, **arguments)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _argument(self, name: str, value: Any, window: Window) -> Any:
        if isinstance(value, tuple):
            return tuple(self._argument(name, part, window) for part in value)
        if name == "position_bias":  # MPT's, of all heads; it is counted from the last key
            return value
        if name == "attention_mask" and value is None and window.start:
            # What attention does by itself without a mask holds only from the first position on.
            keys = torch.arange(window.stop, device=self.plain.resid_pre[self.layer].device)
            return (keys <= keys[window.start :, None])[None, None]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        n_rows, length = self.plain.resid_pre[0].shape[:2]
        rows = self.rows.to(value.device)
        if name == "alibi":  # [rows * n_heads, 1, pos]
            return value.reshape(n_rows, -1, *value.shape[1:])[rows][..., : window.stop].flatten(0, 1)
        if len(value) == n_rows > 1:
            value = value[rows]
        if value.dim() == 4 and value.shape[2] == length:  # a mask of queries and keys
            return value[:, :, window.start : window.stop, : window.stop]
        return value[:, window.start : window.stop] if value.shape[1] == length else value
