"""Functions around a module's `forward`, which are gone when the block ends.

torch's own hooks cost several microseconds per module and call, which is a tenth of a small model's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

Forward = Callable[..., Any]
Wrap = Callable[[Forward], Forward]
# What they return goes on in place of the arguments or the output, unless it is None.
Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
After = Callable[[Any], Any]


class Placement(NamedTuple):
    """A function to wrap a module's `forward` in, which acts on the arguments (`is_input`) or on the output."""

    module: nn.Module
    is_input: bool
    wrap: Wrap


class _Tap(NamedTuple):
    """What a module's own `forward` is wrapped in."""

    before: list[Wrap]
    after: list[Wrap]
    forward: Forward
    is_own: bool


def before(function: Before) -> Wrap:
    """A wrap that sees the arguments."""

    def wrap(forward: Forward) -> Forward:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if (changed := function(args, kwargs)) is not None:
                args, kwargs = changed
            return forward(*args, **kwargs)

        return tapped

    return wrap


def after(function: After) -> Wrap:
    """A wrap that sees the output."""

    def wrap(forward: Forward) -> Forward:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            new = function(output)
            return output if new is None else new

        return tapped

    return wrap


@contextmanager
def placed(placements: Sequence[Placement]) -> Iterator[None]:
    """Place functions on modules; those placed later see what those placed earlier have made of a value."""
    taps: dict[nn.Module, _Tap] = {}
    try:
        for module, is_input, wrap in placements:
            if module not in taps:
                taps[module] = _tap(module)
            (taps[module].before if is_input else taps[module].after).append(wrap)
        for module, tap in taps.items():
            _lay(module, tap)
        yield
    finally:
        for module, is_input, wrap in placements:
            if module in taps:  # an interrupt may have come before
                wraps = taps[module].before if is_input else taps[module].after
                wraps[:] = [other for other in wraps if other is not wrap]
        for module, tap in taps.items():
            if _laid(module) is tap:
                _lay(module, tap)


def _laid(module: nn.Module) -> _Tap | None:
    return getattr(module.__dict__.get("forward"), "_tap", None)


def _tap(module: nn.Module) -> _Tap:
    """The tap in place of a module's `forward`, or a new one."""
    is_own = "forward" in module.__dict__  # accelerate leaves one on a sharded model
    return _laid(module) or _Tap([], [], module.forward, is_own)


def _lay(module: nn.Module, tap: _Tap) -> None:
    """Wrap the module's own `forward` anew, or put it back where nothing is left to wrap it in."""
    forward: Any = tap.forward
    for wrap in [*tap.after, *reversed(tap.before)]:
        forward = wrap(forward)
    if forward is not tap.forward:
        forward._tap, forward.forward = tap, tap.forward
    if forward is not tap.forward or tap.is_own:
        module.__dict__["forward"] = forward
    else:
        module.__dict__.pop("forward", None)
