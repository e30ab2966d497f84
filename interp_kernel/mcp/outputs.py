"""What a run of a cell puts out, as Jupyter's messages tell it, made into outputs of a notebook of bounded size."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from typing import Any

from interp_kernel.mcp.compact import WIDGET
from interp_kernel.mcp.mask import Mask
from interp_kernel.notebook.terminal import shown

Output = dict[str, Any]
HEAD_CHARS = TAIL_CHARS = 100_000
"""How much text of a cell a notebook keeps; the largest of 2,035 cells of agents had 499 kB, the 99th percentile 49."""
MAX_OUTPUTS = 500
MAX_HTML_CHARS = 1_000_000
LONG_LINE_CHARS = 8_000
BARE = ("text/plain", "text/markdown", "text/latex")


class Text:
    """Text that grows, line by line; of a long one the beginning and the end are kept.

    `keep` is told of each piece of text once it can't change any more, and returns it as it may be stored; `ready`
    says how much of a text may be given to it.
    """

    def __init__(self, name: str, keep: Callable[[str], str], ready: Callable[[str], int], room: int) -> None:
        self.name, self.keep, self.ready, self.room = name, keep, ready, room
        self.head: list[str] = []
        self.tail: deque[str] = deque()
        self.tail_chars = self.dropped_chars = 0
        self.line = ""

    def add(self, text: str) -> None:
        """Take in what a cell printed."""
        text = shown(self.line + text)
        final = text.rfind("\n") + 1
        if len(text) - final > LONG_LINE_CHARS:
            final = len(text)
        final = min(final, self.ready(text)) if final else 0  # what may be the beginning of a secret waits for its rest
        self.line = text[final:]
        if final:
            self._store(self.keep(text[:final]))

    def close(self) -> None:
        """The cell has ended: the unfinished line is final."""
        if self.line:
            self._store(self.keep(self.line.rstrip("\r")))
            self.line = ""

    def render(self) -> str:
        """The text as it stands."""
        line = self.line.rstrip("\r")
        gap = f"\n[... {self.dropped_chars} characters left out here ...]\n" if self.dropped_chars else ""
        return "".join([*self.head, gap, *self.tail]) + line

    def _store(self, text: str) -> None:
        start, text = text[: self.room], text[self.room :]
        if start:
            self.head.append(start)
            self.room -= len(start)
        if not text:
            return
        self.tail.append(text)
        self.tail_chars += len(text)
        while self.tail_chars > TAIL_CHARS:
            excess = self.tail_chars - TAIL_CHARS
            cut = self.tail.popleft()
            if len(cut) > excess:
                self.tail.appendleft(cut[excess:])
            gone = min(excess, len(cut))
            self.tail_chars -= gone
            self.dropped_chars += gone


class Outputs:
    """The outputs of one run, in order.

    Args:
        keep: Told of every text, whole and in order; returns it as it may be stored, secrets masked.
        mask: Masks secrets.
    """

    def __init__(self, keep: Callable[[str], str], mask: Mask) -> None:
        self._keep, self._mask = keep, mask
        self._parts: list[Text | Output] = []
        self._displays: dict[str, list[Output]] = {}
        self._clear_next = False
        self.room = HEAD_CHARS
        self.chars = 0
        self.left_out = 0

    @property
    def is_cut(self) -> bool:
        """Whether the notebook holds less than was put out."""
        return self.left_out > 0 or any(isinstance(part, Text) and part.dropped_chars for part in self._parts)

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """Take in one message of the IOPub channel."""
        if kind == "clear_output":
            self._clear_next = True
            if not content.get("wait"):
                self._clear()
            return
        if self._clear_next:
            self._clear()
        if kind == "stream":
            self._add_text(content["name"], content["text"])
        elif kind in ("display_data", "execute_result", "error"):
            self._add_output(kind, content)

    def update(self, display_id: str, content: dict[str, Any]) -> bool:
        """Replace what was displayed under an id; returns whether this run displayed it."""
        shown = self._displays.get(display_id, [])
        for output in shown:
            output.update(self._bundle(content))
        return bool(shown)

    def close(self) -> None:
        """The cell has ended."""
        for part in self._parts:
            if isinstance(part, Text):
                part.close()

    def render(self) -> list[Output]:
        """The outputs as a notebook holds them."""
        rendered = [
            {"output_type": "stream", "name": part.name, "text": self._mask.text(part.render())}
            if isinstance(part, Text)
            else dict(part)
            for part in self._parts
        ]
        if self.left_out:
            notice = f"[{self.left_out} more outputs left out: a cell keeps {MAX_OUTPUTS}.]\n"
            rendered.append({"output_type": "stream", "name": "stderr", "text": notice})
        return rendered

    def last_line(self) -> str:
        """The last text that was printed: a progress bar, most often."""
        texts = [part for part in self._parts[-2:] if isinstance(part, Text)]
        shown = texts[-1].render()[-1000:].rstrip().splitlines() if texts else []
        return shown[-1][-200:] if shown else ""

    def _clear(self) -> None:
        self._parts, self._displays, self._clear_next = [], {}, False

    def _keep_text(self, text: str) -> str:
        self.chars += len(text)
        return self._keep(text)

    def _add_text(self, name: str, text: str) -> None:
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, Text) or last.name != name:
            last = self._text_to_go_on(name)
        before = last.room
        last.add(text)
        self.room -= before - last.room

    def _text_to_go_on(self, name: str) -> Text:
        """A new output, unless the cell has put out so much that its text is gathered in the last of its kind."""
        same = [part for part in self._parts if isinstance(part, Text) and part.name == name]
        if same and (self.room <= 0 or len(self._parts) >= MAX_OUTPUTS):
            return same[-1]
        for part in self._parts[-1:]:
            if isinstance(part, Text):
                part.close()
        text = Text(name, self._keep_text, self._mask.ready, self.room)
        self._parts.append(text)
        return text

    def _add_output(self, kind: str, content: dict[str, Any]) -> None:
        output = self._error(content) if kind == "error" else {"output_type": kind, **self._bundle(content)}
        if len(self._parts) >= MAX_OUTPUTS and kind != "error":
            self.left_out += 1
            return
        if kind == "execute_result":
            output["execution_count"] = content.get("execution_count")
        if display_id := content.get("transient", {}).get("display_id"):
            self._displays.setdefault(display_id, []).append(output)
        self._parts.append(output)

    def _error(self, content: dict[str, Any]) -> Output:
        fields = {name: content.get(name, "") for name in ("ename", "evalue")}
        error = self._mask.output({**fields, "traceback": list(content.get("traceback", []))})
        self._keep_text("\n".join(error["traceback"]) + "\n")
        return {"output_type": "error", **error}

    def _bundle(self, content: dict[str, Any]) -> Output:
        masked = self._mask.output(
            {"data": dict(content.get("data", {})), "metadata": dict(content.get("metadata", {}))}
        )
        data: dict[str, Any] = masked["data"]
        for mime in [m for m in data if m == "text/html" and len(data[m]) > MAX_HTML_CHARS and len(data) > 1]:
            del data[mime]
        plain = data.get("text/plain")
        if isinstance(plain, str):
            self._keep_text(plain + "\n")
        for mime in BARE:
            if isinstance(data.get(mime), str):
                data[mime] = shortened(data[mime])
        return {"data": data, "metadata": masked["metadata"]}


def shortened(text: str) -> str:
    """The beginning and the end of a long text."""
    left_out = len(text) - HEAD_CHARS - TAIL_CHARS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARS]}\n[... {left_out} characters left out here ...]\n{text[-TAIL_CHARS:]}"


def comparable(outputs: list[Output]) -> list[Output]:
    """Outputs without what differs between two equal runs: counts, metadata, progress, addresses and load times."""
    kept = []
    for output in outputs:
        if is_progress(output):
            continue
        fields = {name: value for name, value in output.items() if name not in ("metadata", "execution_count")}
        text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x", json.dumps(fields))
        text = re.sub(r"'load_s': [\d.]+", "'load_s'", text)  # of client.model_info()
        kept.append(json.loads(re.sub(r"\[\d+:\d+<[^\]\"]*\]", "[]", text)))  # of tqdm
    return kept


def is_progress(output: Output) -> bool:
    """Whether an output says how a run got on, and nothing of what came out: a bar, a load, a widget."""
    data = output.get("data", {})
    html = str(data.get("text/html", ""))
    return WIDGET in data or "<progress " in html or bool(re.fullmatch(r"<code>\S+ loaded in [\d.]+ s</code>", html))
