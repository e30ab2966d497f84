"""What a batch shows while it runs: a bar for each run and one for all on a terminal, a line for each end elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

LABEL, BESIDE = 34, 46
"""Characters of a label, where the terminal has room for them beside the bar and the numbers."""
ENOUGH = 160


class Board:
    """The live table of a batch, on stderr."""

    def __init__(self, total: int, jobs: int) -> None:
        """Shows nothing yet."""
        self.total, self.ended, self.failed = total, 0, 0
        self.labels: dict[str, str] = {}
        self.bars: dict[str, Any] = {}
        self.is_live = sys.stderr.isatty()
        self.width = shutil.get_terminal_size().columns if self.is_live else ENOUGH
        self.label = max(8, min(LABEL, self.width - BESIDE))
        self.slots = list(range(1, jobs + 1))
        self.all: Any = None

    def __enter__(self) -> Board:
        tqdm.monitor_interval = 0  # its thread is of no use here
        if self.is_live:
            layout = (
                f"{{desc:<{self.label + 2}}} {{bar:12}} {{n_fmt}}/{{total_fmt}} runs, {{elapsed}}, left {{remaining}}"
            )
            self.all = tqdm(total=self.total, desc="All", bar_format=layout, position=0, leave=True)
        return self

    def __exit__(self, *_: object) -> None:
        for bar in [*self.bars.values(), *([self.all] if self.all else [])]:
            bar.close()

    def begin(self, key: str, label: str) -> None:
        """A run has begun."""
        self.labels[key] = label
        if self.is_live:
            layout = f"  {{desc:<{self.label}}} starts, {{elapsed}}"
            options = {"bar_format": layout, "position": self.slots.pop(0), "leave": False, "total": 1}
            self.bars[key] = tqdm(desc=cut(label, self.label), **options)

    def advance(self, key: str, cell: int, cells: int) -> None:
        """A run has come to a cell."""
        if (bar := self.bars.get(key)) is not None:
            bar.total, bar.n = cells, cell
            bar.bar_format = f"  {{desc:<{self.label}}} {{bar:12}} {{n_fmt}}/{{total_fmt}} cells, {{elapsed}}"

    def retry(self, key: str, record: Mapping[str, Any]) -> None:
        """A run is begun anew."""
        self.line(f"{'again':>12}  {self.close(key)}  {why(record)}")

    def end(self, key: str, record: Mapping[str, Any]) -> None:
        """A run has ended for good."""
        self.ended += 1
        self.failed += record["status"] != "completed"
        seconds = f"{record['seconds']:.1f} s" if record.get("seconds") is not None else ""
        label = self.close(key)
        count = f"[{self.ended:>{len(str(self.total))}}/{self.total}] "
        self.line(f"{count}{record['status']:>12}  {label}  {seconds}  {why(record)}".rstrip())
        if self.all is not None:
            self.all.set_description_str(f"All, {self.failed} failed" if self.failed else "All")
            self.all.update()

    def close(self, key: str) -> str:
        """Take a run off the table; returns its label."""
        if (bar := self.bars.pop(key, None)) is not None:
            self.slots.append(-bar.pos)
            self.slots.sort()
            bar.close()
        return self.labels.pop(key)

    def line(self, text: str) -> None:
        """A row of the table: one line, whose end may be cut off on a terminal; the report has it in full."""
        self.say(cut(text, self.width) if self.is_live else text)

    def say(self, text: str) -> None:
        """Text above the bars."""
        tqdm.write(text, file=sys.stderr)

    def refresh(self) -> None:
        """Draw the bars anew, for the time that has passed."""
        for bar in [*([self.all] if self.all else []), *self.bars.values()]:
            bar.refresh()


def why(record: Mapping[str, Any]) -> str:
    """Why a run failed, in one line."""
    if record["status"] == "completed":
        return ""
    where = f"cell {record['failed_cell']}: " if record.get("failed_cell") is not None else ""
    return where + cut(" ".join(f"{record.get('ename')}: {record.get('evalue')}".split()), ENOUGH)


def cut(text: str, width: int) -> str:
    """A text that fits into its column."""
    return text if len(text) <= width else text[: width - 1] + "…"
