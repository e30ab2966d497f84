"""How a worker is reached. A backend finds or starts the worker of one spec and opens links to it; nothing else.

To write one, give a class with the five methods of `Backend`, whose links carry the verbs that `worker/server.py`
answers. `local.py` is the shortest example.
"""

from __future__ import annotations

from typing import Protocol

from interp_kernel.protocol import BlobFile, Head, Packed

Message = tuple[Head, list[bytearray], BlobFile | None]


class Link(Protocol):
    """One connection to a worker, used by one thread at a time."""

    hello: Head

    def send(self, packed: Packed) -> None:
        """Send a message. Raises OSError when the worker is gone."""

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> Message | None:
        """The next message, or None at the timeout or when `wake_fd` is readable. Raises EOFError at the end."""

    def close(self) -> None:
        """End the connection."""


class Backend(Protocol):
    """Where the worker of one spec lives."""

    def open(self, client: str) -> tuple[Link, bool]:
        """Connect, starting the worker if there is none; also whether it was started just now.

        Raises:
            WorkerError: It can't be started, or the process there is not ours.
        """

    def attach(self, client: str) -> Link | None:
        """Connect to the worker that runs, or None."""

    def why_ended(self, pid: int) -> str | None:
        """Why the worker with this process id ended, in words, or None if it has not."""

    def kill(self, pid: int) -> None:
        """End the worker at once, whatever it does."""

    def log_tail(self, nbytes: int) -> str:
        """The end of the worker's own log."""
