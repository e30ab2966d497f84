"""What all figures share: colours and backgrounds that work on light and dark pages alike, and labels of tokens."""

from __future__ import annotations

import html
from typing import Any

INK = "#808898"  # mid grey: readable on white and on near-black
GRID = "rgba(128, 136, 152, 0.25)"
LINES = ("#e4572e", "#2a9d8f", "#4c78d8", "#c28f00", "#9d5fd0")
SCALE = "Viridis"
LAYOUT: dict[str, Any] = {
    "template": "none",
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "font": {"color": INK, "size": 13},
    "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": GRID, "activecolor": INK},
}
AXIS: dict[str, Any] = {
    "gridcolor": GRID,
    "zeroline": False,
    "showline": False,
    "ticks": "",
    "title": {"font": {"size": 13}, "standoff": 8},
}


def label(token: str) -> str:
    """A token for an axis or a cell; white space alone gets a sign, and nothing is read as markup."""
    signs = {
        " ": "\N{OPEN BOX}",
        "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\t": "\N{RIGHTWARDS ARROW TO BAR}",
    }
    return html.escape(token if token.strip() else "".join(signs.get(c, c) for c in token), quote=False)


def quoted(token: str) -> str:
    """A token for a hover label, where leading spaces have to be seen."""
    return html.escape(repr(token), quote=False)
