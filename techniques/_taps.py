"""Functions around a module's `forward`, which are gone when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import nn

# What they return goes on in place of the arguments or the output, unless it is None.
Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
After = Callable[[Any], Any]


class _Tap(NamedTuple):
    """Functions that see a module's arguments and its output; what they return, unless None, goes on in its place."""

    before: list[Before]
    after: list[After]
    forward: Callable[..., Any]
    is_own: bool


class Placement(NamedTuple):
    """A function for the arguments (`Before`) or the output (`After`) of a module."""

    module: nn.Module
    is_input: bool
    function: Before | After


def _tap(module: nn.Module) -> _Tap:
    """The tap in place of a module's `forward`, laid if there is none.

    torch's own hooks cost several microseconds per module and call, which is a tenth of a small model's forward pass.
    """
    own = module.__dict__.get("forward")  # accelerate leaves one on a sharded model
    if (known := getattr(own, "_tap", None)) is not None:
        return cast(_Tap, known)
    before: list[Before] = []
    after: list[After] = []
    forward = module.forward

    def tapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            for see in before:
                if (changed := see(args, kwargs)) is not None:
                    args, kwargs = changed
            if not after:
                return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        for look in after:
            if (new := look(output)) is not None:
                output = new
        return output

    tap = _Tap(before, after, forward, own is not None)
    tapped._tap, tapped.forward = tap, forward  # type: ignore[attr-defined]
    module.__dict__["forward"] = tapped
    return tap


@contextmanager
def placed(placements: Sequence[Placement]) -> Iterator[None]:
    """Place functions on modules; those placed later see what those placed earlier have made of a value."""
    try:
        for module, is_input, function in placements:
            tap = _tap(module)
            (tap.before if is_input else tap.after).append(function)  # type: ignore[arg-type]
        yield
    finally:
        for module, is_input, function in placements:
            _remove(module, is_input, function)


def _remove(module: nn.Module, is_input: bool, function: Before | After) -> None:
    tap: _Tap | None = getattr(module.__dict__.get("forward"), "_tap", None)
    if tap is None:  # an interrupt came before it was laid
        return
    functions: list[Any] = tap.before if is_input else tap.after
    if function in functions:
        functions.remove(function)
    if not tap.before and not tap.after:
        if tap.is_own:
            module.__dict__["forward"] = tap.forward
        else:
            del module.__dict__["forward"]
