"""What keepers tell, as answers: text that a reader takes in quickly, and facts of a stable form."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from interp_kernel.mcp import answers
from interp_kernel.mcp.schemas import CELL, SESSION

Facts = dict[str, Any]
Block = dict[str, Any]
TEXT_BYTES = 15_000
FACTS_BYTES = 3_500
"""Text in the content, which readers of it see, and in the facts, which some clients show instead: 20 kB together."""
OUTLINE_CHARS = 100
MAX_ROWS = {"outline": 50, "cells": 20}
"""Cells that one answer shows at most."""
HEAD_BYTES = 100


@dataclass
class Answer:
    """What a tool answers: content for a reader, and the same as facts of a stable form."""

    blocks: list[Block]
    facts: Facts


def text_block(text: str) -> Block:
    """A block of text."""
    return {"type": "text", "text": text}


def notes(facts: Facts) -> list[Block]:
    """What happened beside what was asked for."""
    return [text_block("\n".join(f"Note: {note}" for note in facts["notes"]))] if facts["notes"] else []


def within(lines: list[str]) -> str:
    """As many lines as an answer may hold, and how many there are beside them."""
    room, shown = TEXT_BYTES, 0
    for line in lines:
        room -= len(line.encode("utf-8", "replace")) + 1
        if room < 0:
            break
        shown += 1
    left_out = [f"... {len(lines) - shown} more lines"] if shown < len(lines) else []
    return "\n".join([*lines[:shown], *left_out])


def newest(rows: list[Facts]) -> list[Facts]:
    """As many of the last rows as facts may hold."""
    room, kept = FACTS_BYTES, 0
    for row in reversed(rows):
        room -= len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
        if room < 0:
            break
        kept += 1
    return rows[len(rows) - kept :]


def session_facts(facts: Facts) -> Facts:
    """A session in the stable form."""
    return {name: facts[name] for name in SESSION}


def session_line(facts: Facts) -> str:
    """A session in a line."""
    running = f", running cell {facts['running_cell_id']}" if facts["running_cell_id"] else ""
    words = (f"session {facts['session_id']}", f"kernel {facts['kernel']}{running}", f"{facts['cells']} cells")
    return f"[{' | '.join(words)}] {facts['notebook_path']}"


def session_answer(facts: Facts) -> Answer:
    """An answer about a session."""
    return Answer([text_block(session_line(facts)), *notes(facts)], session_facts(facts))


async def cell_answer(facts: Facts) -> Answer:
    """An answer about a cell and what it put out."""
    outputs = facts["outputs"]
    # A figure may take seconds to draw, in which other calls are answered.
    shown = await asyncio.to_thread(answers.render, outputs, cell_id=facts["cell_id"], limit=TEXT_BYTES)
    if facts["state"] in ("running", "queued"):
        facts["notes"].append(f"It goes on in the background. Follow it with wait(cell_id={facts['cell_id']!r}).")
    if facts["is_cut"]:
        chars = f"{facts['chars']:,} characters"
        facts["notes"].append(f"The notebook keeps the ends of this output; read_output reads all of its {chars}.")
    text = answers.text_of(outputs)
    told = {
        **{name: facts[name] for name in CELL if name in facts},
        "text": answers.cut(text, FACTS_BYTES, facts["cell_id"]),
        "text_chars": max(len(text), facts["chars"] if facts["is_cut"] else 0),
        "images": sum(block["type"] == "image" for block in shown),
    }
    return Answer([text_block(cell_line(facts)), *shown, *notes(facts)], told)


def cell_line(facts: Facts) -> str:
    """A cell's state in a line."""
    count = facts["execution_count"]
    is_code = facts.get("cell_type", "code") == "code"
    words = [f"session {facts['session_id']}", f"cell {facts['cell_id']}"]
    words.append(facts["state"] if is_code else facts["cell_type"])
    if facts["state"] not in ("not run here", "queued", "cancelled"):
        words.append(f"{facts['seconds']:.2f} s")
    return f"[{' | '.join([*words, *([f'In[{count}]'] if count else [])])}]"


def replay_answer(facts: Facts) -> Answer:
    """An answer about a whole notebook that is run again."""
    replay = facts["replay"]
    counts = f"{len(replay['ran'])} of {replay['total']} code cells ran | {replay['changed']} with other outputs"
    lines = [f"[{replay['state']} | {counts}]"]
    for row in replay["rows"]:
        if row["state"] == "skipped":
            lines.append(f"cell {row['cell_id']} (skipped): it ended with {row['before']} and might again")
        elif row["changed"]:
            lines.append(f"cell {row['cell_id']} ({row['state']}): was {row['before']!r}, is now {row['after']!r}")
        elif row["state"] != "done":
            lines.append(f"cell {row['cell_id']} ({row['state']}): as before")
    if replay["ran"]:
        lines.append(f"Cells that ran: {', '.join(replay['ran'])}")
    if replay["state"] == "running":
        lines.append("It goes on in the background. Follow it with wait, without a cell_id.")
    text = within([*lines, session_line(facts)])
    told = {**replay, "rows": newest(replay["rows"])}
    return Answer([text_block(text), *notes(facts)], {**session_facts(facts), "replay": told})


def outline(facts: Facts) -> str:
    """A line per cell."""
    lines = [session_line(facts)]
    for row in facts["rows"]:
        state = row["state"] if row["cell_type"] == "code" else ""
        lines.append(
            f"{row['index']:>3} {row['cell_id']} {row['cell_type']:<8} {state:<12} {first_line(row['source'])}"
        )
    return "\n".join([within(lines), *more_cells(facts)])


def first_line(source: str) -> str:
    """What a cell is about: its first line, and the next one after a magic of the whole cell."""
    lines = [line for line in source.splitlines() if line.strip()]
    shown = lines[: 2 if lines and lines[0].startswith("%%") else 1]
    return "  ".join(shown)[:OUTLINE_CHARS]


def more_cells(facts: Facts) -> list[str]:
    """That there are more cells than are shown, and how to read them."""
    after = facts["start"] + len(facts["rows"])
    return [f"... {facts['cells'] - after} more cells: read_notebook(start={after})"] if after < facts["cells"] else []


async def cells(facts: Facts) -> list[Block]:
    """Sources and outputs; where the answer can't hold all of them, the longest are cut."""
    rows = facts["rows"]
    texts = [part for row in rows for part in (row["source"], answers.text_of(row["outputs"]))]
    overhead = HEAD_BYTES + 3 * answers.NOTICE_BYTES
    level = answers.shared([len(text.encode()) for text in texts], TEXT_BYTES - overhead * len(rows))
    blocks = [text_block(session_line(facts))]
    for row in rows:
        state = f" | {row['state']}" if row["cell_type"] == "code" else ""
        rest = f"read_notebook(view='cells', start={row['index']}, limit=1) shows more"
        source = answers.cut(row["source"], level, row["cell_id"], rest=rest)
        limit = level + 2 * answers.NOTICE_BYTES
        shown = await asyncio.to_thread(answers.render, row["outputs"], cell_id=row["cell_id"], limit=limit)
        blocks += [
            text_block(f"[{row['index']} | cell {row['cell_id']} | {row['cell_type']}{state}]\n{source}"),
            *shown,
        ]
    return [*blocks, *map(text_block, more_cells(facts))]
