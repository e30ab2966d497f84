"""A Jupyter kernel whose `%%remote` cells run on a warm worker that holds a language model.

`%load_ext interp_kernel` gives any IPython kernel the same magics; `InterpClient` does the same from Python.
`hf_image` is the image of Modal containers, to be extended as `hf_image.uv_pip_install("einops")`.
`record(name, value)` stores a metric in the notebook, for reports; `track(name)` keeps a folder of what a run logs.
Importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import modal

    from interp_kernel.client import InterpClient as InterpClient
    from interp_kernel.notebook.metrics import record as record
    from interp_kernel.tracking import track as track

    hf_image: modal.Image

__all__ = ["InterpClient", "hf_image", "load_ipython_extension", "record", "track", "unload_ipython_extension"]


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
    completion.uninstall(shell)


def __getattr__(name: str) -> Any:
    if name == "InterpClient":
        from interp_kernel.client import InterpClient

        return InterpClient
    if name == "hf_image":
        from interp_kernel.backends.modal.image import hf_image

        return hf_image()
    if name == "record":
        from interp_kernel.notebook.metrics import record

        return record
    if name == "track":
        from interp_kernel.tracking import track

        return track
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
