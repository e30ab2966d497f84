"""What may be asked of Modal, under its own names, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interp_kernel.errors import SpecError, did_you_mean

# Modal's GPUs from cheap to dear: the class of their price, and memory of one in GB.
GPUS: dict[str, tuple[str, int]] = {
    "T4": ("low", 16),
    "L4": ("low", 24),
    "A10": ("low", 24),
    "A10G": ("low", 24),
    "L40S": ("middle", 48),
    "A100": ("middle", 40),
    "A100-40GB": ("middle", 40),
    "A100-80GB": ("middle", 80),
    "RTX-PRO-6000": ("middle", 96),
    "H100": ("high", 80),
    "H100!": ("high", 80),
    "H200": ("high", 141),
    "B200": ("high", 192),
    "B200+": ("high", 192),
}
MOST_GPUS = {"A10": 4, "A10G": 4}  # of the others, 8
CLOUDS = ("aws", "gcp", "oci", "auto")
WINDOW_S = (2, 3600)
TIMEOUT_S = (1, 86_400)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HF_CACHE = "interp-kernel-hf-cache"


@dataclass(frozen=True, kw_only=True)
class ModalOptions:
    """Where and how a worker runs at Modal; equal options and specs share one container.

    Attributes:
        app_name: Name of the app, under which `deploy` makes it known.
        gpu: A GPU as `A10G` or `H100:2`, several in order of preference, `any`, or None for none.
        scaledown_window: Seconds without a call after which the container ends.
        min_containers: 1 keeps the container warm until it is stopped.
        timeout: Longest call in seconds, where the call itself names no limit.
        startup_timeout: Longest start of a container in seconds; loading the model does not count.
        region: One or several of Modal's regions.
        cloud: One of CLOUDS.
        memory: Memory in MiB, or a request and a limit.
        cpu: Cores, or a request and a limit.
        volumes: Names of volumes, or Modal's own objects, by the path where they appear.
        model_volume: Name of a volume of weights that appears at `/models`.
        secrets: Names of secrets, or Modal's own objects.
        retries: How often `map` repeats what Modal lost; errors of the function itself are never repeated.
        enable_memory_snapshot: Whether Modal may restore a loaded worker from a snapshot; experimental there.
        image: Modal's own image object, or a registry's name of one; by default `hf_image`.
        deploy: Whether the app outlives this process.
    """

    app_name: str = "interp-kernel"
    gpu: str | tuple[str, ...] | None = None
    scaledown_window: int = 300
    min_containers: int = 0
    timeout: int = 86_400
    startup_timeout: int = 1_200
    region: str | tuple[str, ...] | None = None
    cloud: str | None = None
    memory: int | tuple[int, int] | None = None
    cpu: float | tuple[float, float] | None = None
    volumes: tuple[tuple[str, Any], ...] = ()
    model_volume: str | None = None
    secrets: tuple[Any, ...] = ()
    retries: int = 3
    enable_memory_snapshot: bool = False
    image: Any = None
    deploy: bool = False

    def __post_init__(self) -> None:
        """Bring lists into a form that can be hashed, and check every option."""
        self._set("gpu", check_gpu(self.gpu))
        self._set("region", frozen(self.region))
        self._set("memory", frozen(self.memory))
        self._set("cpu", frozen(self.cpu))
        self._set("secrets", (self.secrets,) if isinstance(self.secrets, str) else tuple(self.secrets))
        self._set("volumes", check_volumes(self.volumes))
        self._set("scaledown_window", check_whole("scaledown_window", self.scaledown_window, *WINDOW_S))
        self._set("min_containers", check_whole("min_containers", self.min_containers, 0, 1))
        self._set("timeout", check_whole("timeout", self.timeout, *TIMEOUT_S))
        self._set("startup_timeout", check_whole("startup_timeout", self.startup_timeout, *TIMEOUT_S))
        self._set("retries", check_whole("retries", self.retries, 0, 10))
        for name, value in (("app_name", self.app_name), ("model_volume", self.model_volume)):
            if value is not None and not (isinstance(value, str) and NAME.fullmatch(value)):
                raise SpecError(f"{name} is {value!r}; expected up to 64 letters, digits, dots, dashes or underscores.")
        if self.cloud is not None and self.cloud not in CLOUDS:
            raise SpecError(f"cloud is {self.cloud!r}; expected one of {', '.join(CLOUDS)}.")
        for name in ("memory", "cpu"):
            check_amount(name, getattr(self, name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> list[str]:
        """Every option."""
        return [f.name for f in dataclasses.fields(cls)]

    def changed(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of some options that differ from their default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def place(self) -> str:
        """Where calls run, and for how long after the last one it is paid for, in words."""
        stays = f"{self.scaledown_window / 60:g} min" if self.scaledown_window >= 60 else f"{self.scaledown_window} s"
        warm = "stays warm until it is stopped" if self.min_containers else f"stays warm {stays} after the last call"
        return f"{self.describe_gpu()}; {warm}"

    def describe_gpu(self) -> str:
        """The GPU and the class of its price, in words."""
        if self.gpu is None:
            return "the GPU that it was deployed with" if self.deploy else "no GPU"
        names = (self.gpu,) if isinstance(self.gpu, str) else self.gpu
        prices = [GPUS[name.partition(":")[0]][0] for name in names if name != "any"]
        price = f"{' to '.join(dict.fromkeys(prices))} price class" if prices else "price as it comes"
        return f"GPU {' or '.join(names)} ({price})"


def frozen(value: Any) -> Any:
    """A list as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list | tuple) else value


def check_gpu(gpu: Any) -> str | tuple[str, ...] | None:
    """One GPU, several in order of preference, or none, in Modal's own spelling."""
    if gpu is None:
        return None
    if isinstance(gpu, str):
        return check_one_gpu(gpu)
    if not isinstance(gpu, list | tuple) or not gpu:
        raise SpecError(f"gpu is {gpu!r}; expected a name as 'A10G', 'H100:2', or a list of such names.")
    return tuple(check_one_gpu(name) for name in gpu)


def check_one_gpu(text: Any) -> str:
    """A GPU's name and count."""
    name, colon, count = str(text).strip().partition(":")
    name = name.lower() if name.lower() == "any" else name.upper()
    if name != "any" and name not in GPUS:
        hint = did_you_mean(name, GPUS)
        raise SpecError(f"gpu {text!r} is not known to Modal; expected one of {', '.join(GPUS)} or any.{hint}")
    most = MOST_GPUS.get(name, 8)
    if colon and (not count.isdecimal() or not 1 <= int(count) <= most):
        raise SpecError(f"gpu {text!r} asks for {count!r} GPUs; one container has 1 to {most} of {name}.")
    return f"{name}:{int(count)}" if colon and int(count) > 1 else name


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number between two others."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    if not is_whole or not least <= value <= most:
        raise SpecError(f"{name} is {value!r}; Modal takes a whole number from {least} to {most}.")
    return int(value)


def check_amount(name: str, value: Any) -> None:
    """An amount above 0, or a request and a limit."""
    parts = value if isinstance(value, tuple) else (value,)
    if value is None:
        return
    if len(parts) > 2 or not all(isinstance(part, int | float) and part > 0 for part in parts):
        raise SpecError(f"{name} is {value!r}; expected an amount above 0, or a pair of request and limit.")


def check_volumes(volumes: Any) -> tuple[tuple[str, Any], ...]:
    """Volumes by their absolute path in the container."""
    pairs = tuple(sorted(volumes.items() if isinstance(volumes, Mapping) else volumes, key=lambda pair: str(pair[0])))
    for path, volume in pairs:
        if not str(path).startswith("/") or str(path) in ("/", "/root"):
            raise SpecError(f"volumes has the path {path!r}; expected an absolute path of its own, as '/data'.")
        if isinstance(volume, str) and not NAME.fullmatch(volume):
            raise SpecError(f"volumes[{path!r}] is {volume!r}; expected the name of a volume or a modal.Volume.")
    return tuple((str(path), volume) for path, volume in pairs)
