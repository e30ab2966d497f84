"""Keeps one call from changing the model under the next: repairs what it can, reports what it can't.

Checked after every call, for about 1 us per module: hooks, train mode, requires_grad, gradients, grad mode, patched
`forward`s, the module tree, identity, place and version of every weight, the configurations, the tokenizer's settings.
Writes that PyTorch does not count (through `.data` or numpy) are found by a checksum after calls that took long enough
to hide its cost, or whose code names such a route.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

LIBRARIES = {"torch", "transformers", "accelerate", "peft", "bitsandbytes"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_FLAGS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}
UNCOUNTED_WRITES = {"data", "numpy", "set_", "storage", "untyped_storage", "from_numpy", "data_ptr", "load_state_dict"}
TOKENIZER_SETTINGS = ("padding_side", "truncation_side", "chat_template", "pad_token")
HIDDEN_COST_S = 0.02
SAMPLE = 4096
CURE = "`%remote restart` loads the model anew"


class Guard:
    """The state of a model as loaded, compared and restored after each call."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        """Take the present state as the right one."""
        self.model, self.tokenizer = model, tokenizer
        self.damage: list[str] = []  # what could not be restored since the model was loaded
        self._names, self._modules = map(list, zip(*model.named_modules(), strict=True))
        self._param_names, self._params = map(list, zip(*model.named_parameters(), strict=True))
        self._hook_dicts = [getattr(m, attr) for m in self._modules for attr in HOOKS]
        self._hooks = [dict(d) for d in self._hook_dicts]
        self._n_hooks = sum(map(len, self._hooks))
        self._children = [(m._modules, dict(m._modules)) for m in self._modules]
        self._own_params = [(m._parameters, dict(m._parameters)) for m in self._modules]
        self._slot_dicts = [d for d, _ in chain(self._children, self._own_params)]
        self._used_slot_dicts = [d for d in self._slot_dicts if d]
        self._in_slots = list(chain.from_iterable(map(dict.values, self._used_slot_dicts)))
        self._spaces = [vars(m) for m in self._modules]
        self._dicts = {attr: [space[attr] for space in self._spaces] for attr in ("_modules", "_parameters", *HOOKS)}
        self._forwards = [space.get("forward") for space in self._spaces]
        kinds: set[Any] = {type(m) for m in self._modules}
        self._class_forwards = {kind: kind.forward for kind in kinds}
        self._training = [m.training for m in self._modules]
        self._requires_grad = [p.requires_grad for p in self._params]
        self._configs = [(c, dict(vars(c))) for c in self._config_objects()]
        self._settings = [getattr(tokenizer, name, None) for name in TOKENIZER_SETTINGS]
        self._default_dtype = torch.get_default_dtype()
        self._next_hook = RemovableHandle.next_id
        self._accept_weights()

    def check(self, elapsed_s: float, codes: Iterable[types.CodeType]) -> list[str]:
        """Compare and restore after a call.

        Args:
            elapsed_s: How long the call ran.
            codes: Its code objects, searched for writes that PyTorch does not count.

        Returns:
            A sentence for each thing that was restored or can't be.
        """
        self._put_dicts_back()
        return [
            *self._check_tree(),
            *self._check_hooks(),
            *self._check_forwards(),
            *self._check_modes(),
            *self._check_configs(),
            *self._check_weights(elapsed_s, codes),
        ]

    # --------------------------------------------------------------------------------------- restored

    def _put_dicts_back(self) -> None:
        """`del modules[-1]` gives a ModuleList another dict, as `module._forward_hooks = {}` does."""
        for attr, dicts in self._dicts.items():
            if all(map(is_, map(itemgetter(attr), self._spaces), dicts)):
                continue
            for space, own in zip(self._spaces, dicts, strict=True):
                if (other := space[attr]) is not own:
                    own.clear()
                    own.update(other)
                    space[attr] = own

    def _check_tree(self) -> Iterator[str]:
        if sum(map(len, self._slot_dicts)) == len(self._in_slots):
            in_slots = chain.from_iterable(map(dict.values, self._used_slot_dicts))
            if all(map(is_, in_slots, self._in_slots)):
                return
        for current, saved in chain(self._children, self._own_params):
            current.clear()
            current.update(saved)
        yield "modules or parameters of the model that the call had replaced were put back"

    def _check_hooks(self) -> Iterator[str]:
        if RemovableHandle.next_id == self._next_hook and sum(map(len, self._hook_dicts)) == self._n_hooks:
            return
        self._next_hook = RemovableHandle.next_id
        removed = 0
        for index, (current, saved) in enumerate(zip(self._hook_dicts, self._hooks, strict=True)):
            for key in [k for k in current if k not in saved]:
                if _root_module(current[key]) in LIBRARIES:
                    saved[key] = current[key]  # transformers installs permanent ones; without them it returns nothing
                else:
                    self._remove_hook(index, key)
                    removed += 1
            current.update(saved)
        self._n_hooks = sum(map(len, self._hooks))
        if removed:
            hooks = f"{removed} hooks" if removed > 1 else "1 hook"
            yield f"the call left {hooks} on the model: removed"

    def _remove_hook(self, index: int, key: int) -> None:
        module, attr = self._modules[index // len(HOOKS)], HOOKS[index % len(HOOKS)]
        for name in (attr, *HOOK_FLAGS.get(attr, ())):
            getattr(module, name).pop(key, None)

    def _check_forwards(self) -> Iterator[str]:
        restored = False
        if list(map(dict.get, self._spaces, repeat("forward"))) != self._forwards:
            for space, forward in zip(self._spaces, self._forwards, strict=True):
                space.pop("forward", None)
                if forward is not None:
                    space["forward"] = forward
            restored = True
        for kind, forward in self._class_forwards.items():
            if kind.forward is not forward:
                kind.forward = forward
                restored = True
        if restored:
            yield "a `forward` that the call had patched was put back"

    def _check_modes(self) -> Iterator[str]:
        if not torch.is_grad_enabled():
            torch.set_grad_enabled(True)
            yield "gradients were switched on again (use `with torch.no_grad():`)"
        if torch.get_default_dtype() != self._default_dtype:
            torch.set_default_dtype(self._default_dtype)
            yield f"torch's default dtype was set back to {self._default_dtype}"
        if list(map(itemgetter("training"), self._spaces)) != self._training:
            for module, training in zip(self._modules, self._training, strict=True):
                module.training = training
            yield "train/eval mode was set back"
        if list(map(attrgetter("requires_grad"), self._params)) != self._requires_grad:
            for param, requires_grad in zip(self._params, self._requires_grad, strict=True):
                param.requires_grad_(requires_grad)
            yield "requires_grad of the weights was set back"
        if any(grad is not None for grad in map(attrgetter("grad"), self._params)):
            self.model.zero_grad(set_to_none=True)
            yield "the weights' gradients were freed; take what you need of them in the same call"

    def _config_objects(self) -> Iterable[Any]:
        return [c for c in (getattr(self.model, n, None) for n in ("config", "generation_config")) if c is not None]

    def _check_configs(self) -> Iterator[str]:
        for config, saved in self._configs:
            if _equal(vars(config), saved):
                continue
            changed = [k for k in saved.keys() | vars(config).keys() if not _equal(vars(config).get(k), saved.get(k))]
            vars(config).clear()
            vars(config).update(saved)
            if public := sorted(k for k in changed if not k.startswith("_")):
                yield f"{type(config).__name__}.{', '.join(public)} was set back"
        current = [getattr(self.tokenizer, name, None) for name in TOKENIZER_SETTINGS]
        for name, now, loaded in zip(TOKENIZER_SETTINGS, current, self._settings, strict=True):
            if not _equal(now, loaded):
                setattr(self.tokenizer, name, loaded)
                yield f"tokenizer.{name} was set back to {loaded!r}; set it in each call that needs it"

    # --------------------------------------------------------------------------------------- reported

    def _accept_weights(self) -> None:
        self._versions = [p._version for p in self._params]
        self._pointers = [p.data_ptr() for p in self._params]
        self._places = [(p.device, p.dtype) for p in self._params]
        self._sums = [_checksum(p) for p in self._params]

    def _check_weights(self, elapsed_s: float, codes: Iterable[types.CodeType]) -> Iterator[str]:
        versions = list(map(attrgetter("_version"), self._params))
        pointers = list(map(torch.Tensor.data_ptr, self._params))
        if versions == self._versions and pointers == self._pointers:
            if elapsed_s < HIDDEN_COST_S and not _names(codes) & UNCOUNTED_WRITES:
                return
            if [_checksum(p) for p in self._params] == self._sums:
                return
        moved = [p for p, place in zip(self._params, self._places, strict=True) if (p.device, p.dtype) != place]
        sums = [_checksum(p) for p in self._params]
        changed = [n for n, a, b in zip(self._param_names, sums, self._sums, strict=True) if a != b]
        self._accept_weights()
        if moved:
            note = f"the call moved {_weights(moved)} to {moved[0].device}, {moved[0].dtype}: {CURE}"
        elif changed:
            shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            note = f"the call changed {_weights(changed)} of the model ({shown}): {CURE}"
        else:
            return
        self.damage.append(note)
        yield note


def _weights(found: Sized) -> str:
    return f"{len(found)} weight{'s' * (len(found) != 1)}"


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are the same; those that can't say so, as two tensors or arrays, are not."""
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001 - a setting may be anything, and its `__eq__` is its own code
        return False


def _checksum(param: torch.Tensor) -> float:
    """A number that changes with the values; of a sample, where a weight is large."""
    if param.is_meta or param.numel() == 0:
        return 0.0
    flat = param.detach().reshape(-1) if param.is_contiguous() else param.detach().flatten()
    step = 1 if param.numel() <= 1 << 20 else param.numel() // SAMPLE
    raw = flat[::step].contiguous().view(torch.uint8)
    size = {1: torch.uint8, 2: torch.int16}.get(param.element_size(), torch.int32)
    return float(raw.view(size).double().mul_(_ramp(raw.view(size).numel(), raw.device)).sum())


_ramps: dict[tuple[int, torch.device], torch.Tensor] = {}


def _ramp(n: int, device: torch.device) -> torch.Tensor:
    """Weights that make a checksum notice swapped values."""
    if (n, device) not in _ramps:
        _ramps[n, device] = torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=device)
    return _ramps[n, device]


def _names(codes: Iterable[types.CodeType]) -> set[str]:
    """Attribute and global names in code objects and those inside them."""
    found: set[str] = set()
    for code in codes:
        found |= set(code.co_names) | _names(c for c in code.co_consts if isinstance(c, types.CodeType))
    return found


def _root_module(hook: Any) -> str:
    """Top-level package in which a hook was written."""
    while hasattr(hook, "func"):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    name = getattr(hook, "__module__", None) or getattr(type(hook), "__module__", "")
    return str(name).partition(".")[0]
