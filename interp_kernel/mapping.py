"""`InterpClient.map` over several containers: pickles the function and each input, and sends them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from interp_kernel.backends.modal.backend import ModalBackend
from interp_kernel.backends.modal.fanout import Batch, run_batch
from interp_kernel.client import (
    InterpClient,
    call_head,
    check_function,
    current_shell,
    modules_of,
    shippable,
    working_folder,
)
from interp_kernel.errors import ShipError, SpecError
from interp_kernel.output import Screen
from interp_kernel.protocol import PYTHON, Shipment
from interp_kernel.sources import collect_modules

MOST_CONTAINERS = 1_000  # of one map


def fan_out(
    client: InterpClient, fn: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any], max_containers: int
) -> Iterator[Any]:
    """Yield what each call returned, or a Failure, in the order of the inputs.

    Raises:
        SpecError: `max_containers` is no number of containers.
        ShipError: The function or an input does not pickle, or holds a value of the warm worker.
    """
    check_function(fn)
    if not isinstance(max_containers, int) or not 1 <= max_containers <= MOST_CONTAINERS:
        raise SpecError(f"max_containers is {max_containers!r}; expected a number from 1 to {MOST_CONTAINERS}.")
    assert isinstance(client.backend, ModalBackend)
    screen = Screen(current_shell())
    shipped = shippable(fn)
    function = ship_alone(client, (shipped, kwargs), lambda: {"fn": shipped, **kwargs})
    values = [ship_alone(client, value, partial(dict, {f"inputs[{i}]": value})) for i, value in enumerate(inputs)]
    local = modules_of(fn, function)
    for value in values:
        local |= collect_modules(value.modules, search=[working_folder(os.getcwd())])
    client.backend.ready(screen.show)
    batch = Batch({"kind": "function", "python": PYTHON, **call_head(function, local)}, function, values)
    yield from run_batch(client.backend.place, batch, max_containers, screen.show)


def ship_alone(client: InterpClient, value: Any, names: Callable[[], dict[str, Any]]) -> Shipment:
    """Pickle a value for a container that has no remote values."""
    shipment = client.ship_named(value, names)
    if shipment.held:
        raise ShipError(
            f"{shipment.held[0]!r} is on the warm worker, which the containers of a map do not reach. Fetch it "
            "first, or make it in the function."
        )
    return shipment
