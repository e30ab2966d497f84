"""Shows a call's events: in the notebook's cell that made it, or as text where there is no notebook."""

from __future__ import annotations

import html
import itertools
import os
import sys
import time
from typing import Any

from interp_kernel.protocol import Head

BAR_CHARS = 20
PROCESS = f"{os.getpid()}-{time.time_ns()}"  # front ends remember displays of a kernel that was restarted

_screens = itertools.count()


class Screen:
    """Where one call's events appear."""

    def __init__(self, shell: Any = None, *, quiet: bool = False) -> None:
        """`shell` is IPython's, or None outside of it; with `quiet` only warnings are shown."""
        self.shell, self.quiet = shell, quiet
        self._drawn: set[str] = set()
        self._place = f"{PROCESS}-{next(_screens)}"  # a bar of the same name in another cell is another bar

    def show(self, event: Head) -> None:
        """Show one event."""
        kind = event["event"]
        if kind in ("warning", "queued"):
            self.warn(event["text"])
        elif self.quiet:
            return
        elif kind == "stream":
            stream = sys.stdout if event["name"] == "stdout" else sys.stderr
            stream.write(event["text"])
        elif kind == "display":
            self.publish(event["data"], event["metadata"], event["transient"], event["update"])
        elif kind == "progress":
            self._draw(event)
        elif kind == "clear_output" and self.shell is not None:
            self.shell.display_pub.clear_output(event["wait"])

    def warn(self, text: str) -> None:
        """A line about the call, not of it."""
        print(f"[interp] {text}", file=sys.stderr)

    def publish(self, data: Head, metadata: Head, transient: Head, update: bool) -> None:
        """Show a MIME bundle, or its text where nothing richer can be shown."""
        if self.shell is not None:
            self.shell.display_pub.publish(data, metadata, transient=transient, update=update)
        elif "text/plain" in data:
            print(data["text/plain"])

    def _draw(self, event: Head) -> None:
        text = progress_text(event)
        if self.shell is not None:
            is_new = event["id"] not in self._drawn
            self._drawn.add(event["id"])
            bundle = {"text/plain": text, "text/html": progress_html(event)}
            if event["done"] and not event["leave"]:
                bundle = {"text/plain": "", "text/html": ""}
            self.publish(bundle, {}, {"display_id": f"{event['id']}-{self._place}"}, not is_new)
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if event["done"] and event["leave"] else ""))


def progress_text(event: Head) -> str:
    """One line: `layers 45% [#########           ] 45/100 it 00:12`."""
    n, total, elapsed = event["n"], event["total"], event.get("elapsed_s")
    parts = [event["text"] or "progress"]
    if total:
        filled = int(BAR_CHARS * min(1.0, n / total))
        parts += [f"{n / total:4.0%}", f"[{'#' * filled:{BAR_CHARS}}]"]
    if n is not None and event["unit"] != "%":
        parts.append(f"{n:g}/{total:g} {event['unit']}" if total else f"{n:g} {event['unit']}")
    if elapsed is not None:
        parts.append(time.strftime("%M:%S", time.gmtime(elapsed)))
        parts += [f"{n / elapsed:.1f} {event['unit']}/s"] if n and elapsed > 0 else []
    return " ".join(parts)


def progress_html(event: Head) -> str:
    """The same with the browser's own progress bar, which follows the notebook's theme."""
    n, total = event["n"], event["total"]
    if not total:
        return f"<code>{html.escape(progress_text(event))}</code>"
    label, _, rest = progress_text({**event, "text": "\0"}).partition("] ")
    share = label.split()[1]
    return (
        f"<div>{html.escape(event['text'] or 'progress')} "
        f'<progress value="{n:g}" max="{total:g}" style="width:16em;vertical-align:middle"></progress> '
        f"{share} <code>{html.escape(rest)}</code></div>"
    )
