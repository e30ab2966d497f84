"""Inside a kernel that our engine runs: bounds what a cell prints, so that a gigabyte of it fills no one's memory.

It has to happen where it is printed. A kernel prints faster than it sends and sends faster than a runner reads, and
nothing bounds what waits in between.
"""

from __future__ import annotations

import sys
from typing import Any

HEAD, TAIL = 8_000_000, 2_000_000
"""Characters that are kept of what a cell prints to one stream: the first and the last ones."""


def load_ipython_extension(shell: Any) -> None:
    """Bound both streams of the kernel, and keep IPython from holding a copy of all outputs for its history."""
    shell.history_manager.outputs = Forgetful()
    for stream in (sys.stdout, sys.stderr):
        shell.events.register("post_run_cell", Bound(stream).end)


class Forgetful(dict[int, list[Any]]):
    """Takes lists of outputs by cell and keeps none."""

    def __missing__(self, key: int) -> list[Any]:
        return []

    def setdefault(self, key: int, default: Any = None) -> Any:
        """A list that no one else has."""
        return []


class Bound:
    """Lets through the first texts of a cell, and at the cell's end the last ones."""

    def __init__(self, stream: Any) -> None:
        """Takes the place of the stream's method `write`."""
        self.pass_on = stream.write
        self.begin()
        stream.write = self.write

    def begin(self) -> None:
        """Start to count anew."""
        self.room, self.held, self.waiting = HEAD, 0, 0
        self.tail: list[str] = []

    def write(self, text: str) -> Any:
        """Write a text, or hold back what is beyond the head; half a character becomes `?`.

        The kernel's sending thread would trip over it, and keep what comes after it, perhaps the cell's end, to itself.
        """
        if isinstance(text, str) and not text.isascii():
            text = text.encode("utf-8", "replace").decode()
        if not isinstance(text, str) or len(text) <= self.room:
            done = self.pass_on(text)
            self.room -= len(text)
            return done
        if self.room:
            self.pass_on(text[: self.room])
        self.hold_back(text[self.room :])
        self.room = 0
        return len(text)

    def hold_back(self, text: str) -> None:
        """Keep a text for the cell's end, instead of earlier ones."""
        self.tail.append(text)
        self.held += len(text)
        self.waiting += len(text)
        if self.waiting > 2 * TAIL:
            self.tail = ["".join(self.tail)[-TAIL:]]
            self.waiting = TAIL

    def end(self, _result: Any) -> None:
        """Write what was held back, with a word on how much is missing."""
        last, held = "".join(self.tail)[-TAIL:], self.held
        self.begin()
        if held > len(last):
            last = f"\n[{held - len(last):,} characters were left out here, of what this cell printed.]\n{last}"
        if last:
            self.pass_on(last)
