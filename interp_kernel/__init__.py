"""A Jupyter kernel whose `%%remote` cells run on a warm worker that holds a language model.

`%load_ext interp_kernel` gives any IPython kernel the same magics; `InterpClient` does the same from Python.
Importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_kernel.client import InterpClient as InterpClient

__all__ = ["InterpClient", "load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(shell: Any) -> None:
    """Register `%%remote` and `%remote`."""
    from interp_kernel.magics import RemoteMagics

    shell.register_magics(RemoteMagics(shell))


def unload_ipython_extension(shell: Any) -> None:
    """Take the magics and the completion away again; workers stay."""
    from interp_kernel import completion

    for kind in ("cell", "line"):
        shell.magics_manager.magics[kind].pop("remote", None)
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != completion.MATCHER]
    completion.uninstall_inspection(shell)


def __getattr__(name: str) -> Any:
    if name == "InterpClient":
        from interp_kernel.client import InterpClient

        return InterpClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
