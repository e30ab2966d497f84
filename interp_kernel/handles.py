"""Lets a remote value go when the notebook does: IPython keeps whatever a cell has shown, in `Out`, `_` and `_7`.

For a tensor on a GPU that would mean that `del` frees nothing, and that a cell that is run again holds it once more.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

from interp_kernel.session import RemoteValue

KEPT_BY_IPYTHON = re.compile(r"_{1,3}|_\d+")
EVENT = "post_run_cell"


class Handles:
    """Watches which remote values have a name, and drops IPython's references to those that have lost theirs.

    One that never had a name stays in `_`, `__` and `___` until other results take these.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._named: weakref.WeakSet[RemoteValue] = weakref.WeakSet()

    def after_cell(self, *_: Any) -> None:
        """What IPython calls after each cell."""
        shell = self._shell
        values = [(name, value) for name, value in list(shell.user_ns.items()) if type(value) is RemoteValue]
        named = {value for name, value in values if not KEPT_BY_IPYTHON.fullmatch(name)}
        gone = self._named - named
        for space in (shell.user_ns, shell.user_ns_hidden, shell.user_ns.get("_oh", {})):
            drop(space, lambda name, value: value in gone or str(name).strip("_").isdigit())
        for name in ("_", "__", "___"):
            if type(value := getattr(shell.displayhook, name)) is RemoteValue and value in gone:
                setattr(shell.displayhook, name, None)
        self._named = weakref.WeakSet(named)


def drop(space: dict[Any, Any], is_unwanted: Callable[[Any, RemoteValue], bool]) -> None:
    """Take remote values out of a namespace."""
    for name, value in list(space.items()):
        if type(value) is RemoteValue and is_unwanted(name, value):
            del space[name]


def install(shell: Any) -> None:
    """Watch a shell; repeated calls replace."""
    for callback in list(shell.events.callbacks[EVENT]):
        if isinstance(getattr(callback, "__self__", None), Handles):
            shell.events.unregister(EVENT, callback)
    shell.events.register(EVENT, Handles(shell).after_cell)
