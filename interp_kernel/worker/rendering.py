"""Tracebacks as IPython shows them, with the cell's own lines, capped, and without frames of the worker.

IPython's own renderer needs 1 s for the first error inside `generate` and 4.6 s for a RecursionError, so the few
lines it would print are made here from `linecache`.
"""

from __future__ import annotations

import linecache
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from interp_kernel.errors import InterpError

HEAD_FRAMES, TAIL_FRAMES = 4, 6
CONTEXT = 2
VALUE_CHARS = 4_000
RED, GREEN, CYAN, PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[36m", "\x1b[0m"
OWN_FOLDER = str(Path(__file__).parents[1])

Numbers = dict[str, int]  # file name of a cell -> its execution count


def render(error: BaseException, numbers: Numbers) -> list[str]:
    """Lines of a traceback, chained exceptions included; also drops the references that it holds to frames."""
    if isinstance(error, InterpError):
        return error._render_traceback_()
    lines: list[str] = []
    for link, why in chain(error):
        lines += [f"{RED}{'-' * 75}{PLAIN}" if not why else f"\n{why}\n"]
        lines += render_one(link, numbers)
    for link, _ in chain(error):
        traceback.clear_frames(link.__traceback__)  # else they keep tensors alive
        link.__traceback__ = None
    return lines


def chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """The exception after those that led to it, each with the words that join it to the one before."""
    links: list[tuple[BaseException, str]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        cause, context = current.__cause__, current.__context__
        if cause is not None:
            why = "The above exception was the direct cause of the following exception:"
        else:
            why = "During handling of the above exception, another exception occurred:"
        current_links = cause if cause is not None else (None if current.__suppress_context__ else context)
        links.append((current, why if current_links is not None else ""))
        current = current_links
    return links[::-1]


def render_one(error: BaseException, numbers: Numbers) -> list[str]:
    """One exception without those that it is chained to; of a stop, only where it met the cell's own code."""
    name = type(error).__name__
    lines = [f"{RED}{name}{PLAIN}{'Traceback (most recent call last)':>{75 - len(name)}}"]
    frames = [] if isinstance(error, KeyboardInterrupt) and not error.args else list(own_free(error.__traceback__))
    frames = frames or list(own_free(error.__traceback__))[:1]
    hidden = len(frames) - HEAD_FRAMES - TAIL_FRAMES
    for index, (frame, lineno) in enumerate(frames):
        if hidden > 0 and HEAD_FRAMES <= index < HEAD_FRAMES + hidden:
            if index == HEAD_FRAMES:
                lines.append(f"    ... {hidden} more frames ...\n")
            continue
        lines.append(render_frame(frame, lineno, numbers))
    if isinstance(error, SyntaxError):
        return [*lines, "".join(traceback.format_exception_only(error)).rstrip()]
    return [*lines, f"{RED}{name}{PLAIN}: {evalue(error)}", *getattr(error, "__notes__", ()), *members(error)]


def members(error: BaseException) -> list[str]:
    """One line for each exception of a group."""
    if not isinstance(error, BaseExceptionGroup):
        return []
    return [f"  {i}. {type(e).__name__}: {evalue(e)}" for i, e in enumerate(error.exceptions, 1)]


def evalue(error: BaseException) -> str:
    """The exception's message, also when its own `__str__` fails."""
    try:
        text = str(error)
    except BaseException as inner:  # noqa: BLE001 - a hostile __str__ must not end the worker
        return f"<its message could not be made: {type(inner).__name__}>"
    return text if len(text) <= VALUE_CHARS else f"{text[:VALUE_CHARS]}... ({len(text)} characters)"


def own_free(tb: types.TracebackType | None) -> Iterator[tuple[types.FrameType, int]]:
    """The frames of a traceback that are not the worker's own."""
    while tb is not None:
        if not tb.tb_frame.f_code.co_filename.startswith(OWN_FOLDER):
            yield tb.tb_frame, tb.tb_lineno
        tb = tb.tb_next


def render_frame(frame: types.FrameType, lineno: int, numbers: Numbers) -> str:
    """Where a frame is and the lines around."""
    code = frame.f_code
    where = f"File {GREEN}{code.co_filename}:{lineno}{PLAIN}"
    if code.co_filename in numbers:
        where = f"Cell {GREEN}In[{numbers[code.co_filename]}]{PLAIN}, line {lineno}"
    name = "" if code.co_name == "<module>" else f", in {CYAN}{code.co_qualname}{PLAIN}"
    lines = [where + name]
    for n in range(max(1, lineno - CONTEXT), lineno + CONTEXT + 1):
        if text := linecache.getline(code.co_filename, n).rstrip():
            lines.append(f"{GREEN}----> {n}{PLAIN} {text}" if n == lineno else f"{n:>7} {text}")
    return "\n".join(lines) + "\n"
