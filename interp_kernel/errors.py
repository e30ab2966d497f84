"""Every error that interp-kernel raises itself; what a cell's own code raised keeps its own name.

InterpError
+-- SpecError            an option of a worker or a study is wrong, found before anything starts (also a ValueError)
+-- ShipError            a value or function can't travel; the message names the variable (also a TypeError)
+-- CallTimeoutError     a call ran past its time limit (also a TimeoutError)
+-- LostValueError       a RemoteValue whose worker has ended (also a LookupError)
+-- TechniqueError       a technique file can't be read or names no technique (also a ValueError)
+-- NotebookError        a notebook or its parameters are refused before anything runs (also a ValueError)
+-- SessionError         a session or cell of an agent's is not known, or can't do now what it is asked for
+-- AgentError           an agent can't be started, or its endpoint can't be used (also a RuntimeError)
+-- RemoteError          the call's own code raised; `ename`, `evalue`, `traceback` are the remote ones
|                        (a stopped call's is also a KeyboardInterrupt)
`-- WorkerError          the worker itself
    +-- LoadError        the model could not be loaded; no worker is left behind
    +-- WorkerDiedError  it ended in mid-call; the message says why, what was lost and what to do
    `-- WorkerRefusedError  the process on the socket is not ours or speaks another protocol
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from functools import cache
from typing import Any


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question, after a space, for what was meant by a name; empty if nothing known is near."""
    import difflib

    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


class InterpError(Exception):
    """Base of every error of this package."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the message says all, and frames of this package would say nothing to its user."""
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


class SpecError(InterpError, ValueError):
    """An option of a worker, or a study of a batch, is wrong."""


class ShipError(InterpError, TypeError):
    """A value or function can't travel between the notebook and the worker."""


class CallTimeoutError(InterpError, TimeoutError):
    """A call ran past its time limit and was stopped; the worker and its model were kept if it reacted."""


class LostValueError(InterpError, LookupError):
    """A RemoteValue was used after the worker that held it had ended or released it."""


class TechniqueError(InterpError, ValueError):
    """A technique file can't be read or holds no technique."""


class NotebookError(InterpError, ValueError):
    """A notebook can't be run as it is, or was given parameters that it doesn't take."""


class SessionError(InterpError):
    """A session or cell is not known, or can't do now what it is asked for; the message says what it can."""


class AgentError(InterpError, RuntimeError):
    """An agent can't be started, or its endpoint can't be used."""


class RemoteError(InterpError):
    """The call's own code raised on the worker.

    Attributes:
        ename: Name of the exception's class on the worker.
        evalue: Its message.
        traceback: Lines rendered on the worker, with the cell's own line numbers.
        result: What the call had made by then, see `session.Result`; None after a pickle.
    """

    result: Any = None

    def __init__(self, ename: str, evalue: str, traceback: list[str]) -> None:
        """As the worker sent them."""
        super().__init__(evalue)
        self.ename, self.evalue, self.traceback = ename, evalue, traceback

    def __str__(self) -> str:
        return self.evalue

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of the frames that led here from the notebook."""
        return self.traceback

    def __reduce__(self) -> tuple[object, ...]:
        return remote_error, (self.ename, self.evalue, self.traceback)


# Built-in exceptions that a class can be derived from beside RemoteError, so that `except ValueError` works here too.
_CATCHABLE = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError),
    *(KeyboardInterrupt, NameError, RuntimeError, TypeError, ValueError),
)


@cache
def _remote_class(ename: str) -> type[RemoteError]:
    own = globals().get(ename)
    base = own if isinstance(own, type) and issubclass(own, InterpError) else getattr(builtins, ename, None)
    if not isinstance(base, type) or not issubclass(base, (*_CATCHABLE, InterpError)):
        return type(ename, (RemoteError,), {"__module__": "remote"})
    if issubclass(base, RemoteError | UnicodeError):  # the latter can't be made without its five arguments
        return type(ename, (RemoteError,), {"__module__": "remote"})
    return type(ename, (RemoteError, base), {"__module__": "remote"})


def remote_error(ename: str, evalue: str, traceback: list[str]) -> RemoteError:
    """An exception of a class made for it, so that its real name shows in every notebook tool.

    It can be caught as RemoteError, and under its own name if that is a common built-in one or one of ours.
    """
    return _remote_class(ename)(ename, evalue, traceback)


def stopped(text: str) -> RemoteError:
    """A KeyboardInterrupt that shows its text and no frames of ours."""
    return remote_error("KeyboardInterrupt", text, [f"KeyboardInterrupt: {text}"])


class WorkerError(InterpError):
    """Something is wrong with the worker itself, not with the code that it ran."""


class LoadError(WorkerError):
    """The model could not be loaded."""


class WorkerDiedError(WorkerError):
    """The worker ended while a call or a handle needed it."""


class WorkerRefusedError(WorkerError):
    """The process at the other end belongs to another user or speaks another protocol."""
