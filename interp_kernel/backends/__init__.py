"""How a worker is reached. A backend finds or starts the worker of one spec and opens links to it; nothing else.

To write one, give a class with the methods of `Backend`, whose links carry the verbs that `worker/server.py`
answers. `local.py` is the shortest example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from interp_kernel.protocol import BlobFile, Buffer, Head, Packed

HELLO_S = 10.0  # a worker that is inside one long operation answers late

Message = tuple[Head, list[bytearray], BlobFile | None]
OnEvent = Callable[[Head], None]


class Link(Protocol):
    """One connection to a worker, used by one thread at a time."""

    hello: Head
    is_untaken: bool  # set when the link ends: whether a call that was submitted surely did not reach the worker

    def pack(self, head: Head, frames: Sequence[Buffer], known: Collection[str]) -> Packed:
        """Make a message of large frames; those whose digest is `known` to the worker are left out."""

    def send(self, packed: Packed, wake_fd: int | None = None) -> None:
        """Send a message.

        Raises:
            OSError: The worker is gone.
            KeyboardInterrupt: `wake_fd` became readable while the worker took nothing; the link has ended then.
        """

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> Message | None:
        """The next message, or None at the timeout or when `wake_fd` is readable. Raises EOFError at the end."""

    def close(self) -> None:
        """End the connection."""


class Backend(Protocol):
    """Where the worker of one spec lives."""

    def open(self, client: str, on_event: OnEvent = ..., stop_fd: int | None = None) -> tuple[Link, bool]:
        """Connect, starting the worker if there is none; also whether it was started just now.

        A start that takes long tells `on_event` how far it is, and ends when `stop_fd` is readable.

        Raises:
            WorkerError: It can't be started, or the process there is not ours.
            KeyboardInterrupt: It was stopped.
        """

    def attach(self, client: str, within_s: float | None = None) -> Link | None:
        """Connect to the worker that runs, or None; it has HELLO_S to answer, or as long as is said.

        Raises:
            WorkerRefusedError: It does not answer in time, or is none that this client can use.
        """

    def why_ended(self, pid: int) -> str | None:
        """Why the worker with this process id ended, in words, or None if it has not."""

    def kill(self, pid: int) -> None:
        """End the worker at once, whatever it does."""

    def log_tail(self, nbytes: int) -> str:
        """The end of the worker's own log."""

    def release(self) -> None:
        """Give back the place where a worker ran that was ended for good."""
