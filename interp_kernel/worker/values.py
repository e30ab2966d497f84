"""Values that stay on the worker: each has a number by which a notebook's RemoteValue names it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any


@dataclass
class Held:
    """A value and the client that it belongs to."""

    value: Any
    client: str


class Values:
    """The values that clients hold here, until they release them or go away."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        # No two workers give the same number, or the handle of an ended one would mean another value here.
        self._last = int.from_bytes(os.urandom(5)) << 20

    def keep(self, value: Any, client: str, nbytes: int | None = None) -> dict[str, Any]:
        """Hold a value; returns what its RemoteValue shows."""
        self._last += 1
        self._held[self._last] = Held(value, client)
        return {"id": self._last, **describe(value), **({} if nbytes is None else {"nbytes": nbytes})}

    def get(self, value_id: int) -> Any:
        """The value; raises LookupError when it was released."""
        if value_id not in self._held:
            raise LookupError(f"RemoteValue {value_id} was released on the worker; run the cell that made it again.")
        return self._held[value_id].value

    def release(self, value_ids: list[int]) -> None:
        """Forget some values; unknown ones are ignored, since a release may be repeated."""
        for value_id in value_ids:
            self._held.pop(value_id, None)

    def release_client(self, client: str) -> None:
        """Forget all values of a client that is gone."""
        self.release([i for i, held in self._held.items() if held.client == client])


def describe(value: Any) -> dict[str, Any]:
    """Type, and shape, dtype, device and bytes where the value has them."""
    kind = type(value)
    facts: dict[str, Any] = {"type": kind.__qualname__}
    if kind.__module__ not in ("builtins", "__main__"):
        facts["type"] = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        facts["nbytes"] = sum(p.nbytes for p in value.parameters())
    for name in ("shape", "dtype", "device", "nbytes"):
        attribute = getattr(value, name, None)
        if attribute is None or callable(attribute):
            continue
        if name == "shape":
            facts[name] = [int(n) for n in attribute]
        else:
            facts[name] = int(attribute) if name == "nbytes" else str(attribute).removeprefix("torch.")
    if isinstance(value, str | bytes | list | tuple | dict | set | frozenset):
        facts["len"] = len(value)
    return facts
