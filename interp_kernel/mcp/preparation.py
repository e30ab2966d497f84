"""The first cell of a session, which makes `client`, and the worker that it finds warm."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]


def is_hidden(model: Facts) -> bool:
    """Whether a model has options that the notebook's author must not see."""
    return "hidden_system_prompt" in model


def setup_code(model: Facts) -> str:
    """The cell that makes `client`."""
    lines = ["from interp_kernel import InterpClient", "", "client = InterpClient()", "client.model_info()"]
    if is_hidden(model):
        lines[:1] = ["import json", "import os", "", *lines[:1]]
        lines[-2] = 'client = InterpClient(**json.loads(os.environ["INTERP_MODEL"]))'
    elif model:
        lines[-2] = f"client = InterpClient({', '.join(f'{name}={value!r}' for name, value in model.items())})"
    return "\n".join(lines)


def warm_worker(options: Facts) -> None:
    """Start the worker of some options on this machine, if none is warm; its load is then followed by the kernel."""
    from interp_kernel.client import InterpClient

    with InterpClient(**options) as client:
        if client.mode == "local":
            link, _ = client.backend.open("interp-keeper")
            link.close()
