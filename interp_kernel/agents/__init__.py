"""Agents that carry out studies through the MCP server: what they are told, how they are started, a loop of our own."""

from __future__ import annotations

from pathlib import Path

SERVER_NAME = "interp"


def instructions() -> str:
    """What an agent is told before it begins: workflow, techniques, controls, reporting, errors; Markdown."""
    return Path(__file__).with_name("instructions.md").read_text(encoding="utf-8")
