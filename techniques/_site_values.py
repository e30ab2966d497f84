"""Where a site's value lies in what its module gets or gives: looked at, replaced, or noted while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from techniques._model import Heads, Site, UnsupportedModelError
from techniques._taps import Forward, Placement, Wrap, after, before

Look = Callable[[Tensor], Tensor | None]  # None leaves the value as it is
Key = TypeVar("Key")


def placement(site: Site, look: Look) -> Placement:
    """Look at a site's value, heads lying side by side, or replace it."""
    return Placement(site.module, site.is_input, on_input(look) if site.is_input else on_output(look))


def on_input(look: Look) -> Wrap:
    """Look at the hidden states that a module gets."""

    def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if args:
            new = look(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = look(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return before(see)


def on_output(look: Look) -> Wrap:
    """Look at what a module gives, the first where it gives several values."""

    def see(output: Any) -> Any:
        if type(output) is tuple:
            new = look(output[0])
            return None if new is None else (new, *output[1:])
        return look(output)

    return after(see)


# `before` and `after` of a function that notes the value, written out: a call less for each module of a small model.


def note_input(key: Key, found: dict[Key, Tensor]) -> Wrap:
    """Put what a module gets into `found`."""

    def wrap(forward: Forward) -> Forward:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            found[key] = args[0] if args else kwargs["hidden_states"]
            return forward(*args, **kwargs)

        return tapped

    return wrap


def note_output(key: Key, found: dict[Key, Tensor]) -> Wrap:
    """Put what a module gives into `found`."""

    def wrap(forward: Forward) -> Forward:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            found[key] = output[0] if type(output) is tuple else output
            return output

        return tapped

    return wrap


def note_heads(key: Key, found: dict[Key, Tensor], heads: Heads, with_grad: Wrap) -> Wrap:
    """Put the heads that a module gets into `found`; `with_grad` is used where a gradient is wanted of them."""
    sizes = heads.stop, heads.d_head

    def wrap(forward: Forward) -> Forward:
        slow = with_grad(forward)

        def tapped(*args: Any, **kwargs: Any) -> Any:
            raw: Tensor = args[0] if args else kwargs["hidden_states"]
            if raw.requires_grad:
                return slow(*args, **kwargs)
            found[key] = torch.unflatten(raw, -1, sizes)
            return forward(*args, **kwargs)

        return tapped

    return wrap


def split_heads(raw: Tensor, heads: Heads) -> Tensor:
    """[batch pos width] -> [batch pos heads d_head], a view where the memory allows it."""
    groups, start, stop, d_head = heads
    if groups == 1:
        slots = raw.reshape(*raw.shape[:-1], -1, d_head)
        return slots if stop - start == slots.shape[-2] else slots[..., start:stop, :]
    return raw.reshape(*raw.shape[:-1], groups, -1, d_head)[..., start:stop, :].flatten(-3, -2)


def join_heads(raw: Tensor, heads: Heads, value: Tensor) -> Tensor:
    """`raw` with `value` in place of these heads."""
    groups, start, stop, d_head = heads
    slots = raw.reshape(*raw.shape[:-1], groups, -1, d_head)
    middle = value.to(raw.dtype).reshape(*raw.shape[:-1], groups, stop - start, d_head)
    return torch.cat([slots[..., :start, :], middle, slots[..., stop:, :]], -2).reshape(raw.shape)


def pattern_of(output: Any) -> Tensor:
    """The pattern in what an attention module gives.

    Raises:
        UnsupportedModelError: There is none.
    """
    pattern = output[1] if type(output) is tuple and len(output) > 1 else None
    if not isinstance(pattern, Tensor):
        raise UnsupportedModelError(
            "The attention module returned no pattern, although eager attention was asked for. Load the model with "
            "attn_implementation='eager'."
        )
    return pattern


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let attention compute its pattern: fused kernels never have it."""
    held: list[Any] = [part.config for part in model.modules() if hasattr(part, "config")]
    configs = {id(config): config for config in held if getattr(config, "_attn_implementation", None) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def weighted(
    pattern: Float[Tensor, "batch n_heads query key"], values: Float[Tensor, "batch key n_kv_heads d_head"]
) -> Float[Tensor, "batch query n_heads d_head"]:
    """z, from a pattern and the values that it weighs."""
    repeats = pattern.shape[1] // values.shape[2]
    by_head = values.transpose(1, 2).repeat_interleave(repeats, 1)
    return (pattern.to(by_head.dtype) @ by_head).transpose(1, 2)
