"""Options of InterpClient: older names, modes, and how long a worker stays; each checked before anything starts."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from interp_kernel.backends.modal.options import ModalOptions
from interp_kernel.errors import SpecError, did_you_mean
from interp_kernel.spec import WorkerSpec

OLDER_NAMES = {"container_idle_timeout": "scaledown_window", "keep_warm": "min_containers", "torch_dtype": "dtype"}
MODES = ("local", "modal")
FOR_BOTH = ("app_name", "scaledown_window", "min_containers")  # options that a local worker has too, or ignores


def rename_older(options: dict[str, Any]) -> dict[str, Any]:
    """Options under their present names, with a warning for each older one."""
    for old, new in OLDER_NAMES.items():
        if old in options:
            warnings.warn(f"{old} is now called {new}.", DeprecationWarning, stacklevel=3)
            options = {k: v for k, v in options.items() if k != old} | {new: options[old]}
    return options


def check_mode(mode: str, options: dict[str, Any]) -> str:
    """Refuse modes and options that do not exist, and take out those that have no effect on a local worker."""
    if mode not in MODES:
        raise SpecError(f"mode {mode!r} is not known; expected one of {', '.join(MODES)}.")
    known = [f.name for f in dataclasses.fields(WorkerSpec)] + ModalOptions.names()
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise SpecError(f"Worker option {name!r} is not known; expected one of {', '.join(known)}.{hint}")
    for name in ModalOptions.names():
        if mode == "local" and name not in FOR_BOTH and options.pop(name, None):
            advice = "device_map places the model" if name == "gpu" else "it is for mode='modal'"
            warnings.warn(f"{name} has no effect on a local worker; {advice}.", stacklevel=3)
    return mode


def check_window(options: dict[str, Any]) -> tuple[float, int]:
    """How long the worker stays without calls."""
    window, containers = options["scaledown_window"], options["min_containers"]
    if type(window) not in (int, float) or not 0 < window < float("inf"):
        raise SpecError(f"scaledown_window is {window!r}; expected a number of seconds above 0.")
    if containers not in (0, 1):
        raise SpecError(f"min_containers is {containers!r}; expected 0, or 1 to keep the worker for good.")
    return float(window), int(containers)
