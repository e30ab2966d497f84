"""The tools that agents call. Each is a method: its signature and docstring are what the agent is told of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from interp_kernel.errors import InterpError, SessionError
from interp_kernel.mcp import answers, confine, sessions
from interp_kernel.mcp.replies import (
    FACTS_BYTES,
    MAX_ROWS,
    TEXT_BYTES,
    Answer,
    Facts,
    cell_answer,
    cells,
    notes,
    outline,
    replay_answer,
    session_answer,
    session_facts,
    session_line,
    text_block,
    within,
)

WAIT_S = 45.0


@dataclass(frozen=True)
class Settings:
    """How the server was started.

    Attributes:
        workspace: Folder in which notebooks are; paths outside of it are refused.
        model: Options of InterpClient for `init_session`.
        idle_window_s: Seconds after which a session ends in which nothing runs and nothing is asked.
        jupyter_url: A running Jupyter server whose kernels are used, with its token.
    """

    workspace: Path
    model: Facts = field(default_factory=dict)
    idle_window_s: float = 3600.0
    jupyter_url: str | None = None


async def no_progress(_: Facts) -> None:
    """Where nobody asked to be told."""


class Tools:
    """The tools, for one call: `progress` is told how a cell gets on."""

    def __init__(self, settings: Settings, progress: Callable[[Facts], Awaitable[None]] = no_progress) -> None:
        """See `Settings`."""
        self._settings, self._tell = settings, progress
        self._runs: list[tuple[str, str | None]] = []

    # ---------------------------------------------------------------------------------- sessions

    async def start_new_session(self, experiment_name: str = "experiment") -> Answer:
        """Start a session: a new notebook file and a Python kernel for it. Call init_session next.

        Args:
            experiment_name: A few words; they become part of the notebook's file name.
        """
        with self._new_file(experiment_name) as path:
            return session_answer(await self._open(path, how="new", is_new=True))

    async def start_session_resume_notebook(self, notebook_path: str, rerun: bool = True) -> Answer:
        """Open an existing notebook in place. A kernel of it that lives is taken over with its variables, and nothing
        is run again. Otherwise a fresh kernel runs its code cells, and the answer says which came out differently.

        Args:
            notebook_path: The .ipynb file, in the workspace.
            rerun: False leaves a fresh kernel empty instead of running the notebook's code cells in it.
        """
        path = await asyncio.to_thread(confine.notebook_path, notebook_path, self._settings.workspace, exists=True)
        return await self._reopened(path, "resumed", rerun)

    async def start_session_continue_notebook(
        self, notebook_path: str, experiment_name: str | None = None, rerun: bool = True
    ) -> Answer:
        """Continue a notebook in a copy of it, with a fresh kernel; the original stays as it is.

        Args:
            notebook_path: The .ipynb file to copy, in the workspace.
            experiment_name: A few words for the copy's file name; the original's name if left out.
            rerun: False leaves the fresh kernel empty instead of running the copied code cells in it.
        """
        path = await asyncio.to_thread(confine.notebook_path, notebook_path, self._settings.workspace, exists=True)
        name = re.sub(r"^\d{4}(-\d\d){4}_", "", path.stem)  # the copy's name begins with its own date
        with self._new_file(experiment_name or f"{name} continued") as copy:
            copy.write_bytes(path.read_bytes())
            return await self._reopened(copy, f"continued from {path.name}", rerun)

    async def init_session(self, session_id: str, model: str | None = None) -> Answer:
        """Prepare a session: run a cell that makes `client`, which holds the language model, and learn how to work.

        Args:
            session_id: The session.
            model: `demo`, a name on the Hugging Face hub or a local folder; the server's own choice if left out.
        """
        model_options = {"model_name": model} if model else None
        ran = await self._ask(session_id, "init", self._progress, model=model_options, wait_s=WAIT_S)
        cell = await cell_answer(ran)
        texts = [_instructions(), f"# Techniques\n\n{_catalogue()}", "# The session's first cell"]
        blocks = [{"type": "text", "text": text} for text in texts]
        facts = {**cell.facts, "instructions": "in the text", "techniques": [row.name for row in _techniques()]}
        return Answer([*blocks, *cell.blocks], facts)

    async def list_sessions(self) -> Answer:
        """List the sessions that live, also those of other servers and of agents that have gone."""
        found = []
        for session in await asyncio.to_thread(sessions.known):
            try:
                found.append(await self._ask(session["id"], "info"))
            except SessionError:
                continue  # it has ended meanwhile
        lines = [session_line(facts) for facts in found] or ["No session lives."]
        return Answer([text_block("\n".join(lines))], {"sessions": [session_facts(facts) for facts in found]})

    async def shutdown_session(self, session_id: str) -> Answer:
        """End a session: its kernel and variables go, its notebook and log stay, and a worker stays warm for a while.

        Args:
            session_id: The session.
        """
        facts = await self._ask(session_id, "shutdown")
        text = f"Session {session_id} has ended. Notebook: {facts['notebook_path']}\nLog: {facts['log_path']}"
        if facts["unsaved_path"]:
            text += f"\nThe notebook could not be written; what it lacks is in {facts['unsaved_path']}."
        return Answer([text_block(text)], session_facts(facts))

    async def restart_kernel(self, session_id: str) -> Answer:
        """Replace the kernel by a fresh one. All variables are lost; the notebook and a warm worker stay.

        Args:
            session_id: The session.
        """
        return session_answer(await self._ask(session_id, "restart"))

    async def interrupt(self, session_id: str, cell_id: str | None = None) -> Answer:
        """Stop the running cell, as Jupyter's stop button does: it ends with KeyboardInterrupt and keeps its variables.

        Args:
            session_id: The session.
            cell_id: Only if it is this cell that runs, or waits to run.
        """
        facts = await self._ask(session_id, "interrupt", cell_id=cell_id)
        if not facts["interrupted"]:
            return Answer(
                [text_block("Nothing was running, so nothing was stopped."), *notes(facts)], session_facts(facts)
            )
        if facts["state"] == "running":
            note = "It has not ended yet. Interrupt again to kill its worker if it waits for one, or restart_kernel."
            facts["notes"].append(note)
        return await cell_answer(facts)

    # ------------------------------------------------------------------------------------- cells

    async def execute_code(
        self,
        session_id: str,
        code: str,
        after_cell_id: str | None = None,
        wait_s: float = WAIT_S,
        timeout_s: float | None = None,
    ) -> Answer:
        """Add a code cell to the notebook, run it, and see what it puts out. One that outlasts wait_s goes on running.

        Args:
            session_id: The session.
            code: IPython code; `%%remote` as its first line runs it next to the model.
            after_cell_id: The cell after which it is put; at the end if left out, at the top if empty.
            wait_s: Seconds to wait for its end. It then goes on in the background; `wait` follows it by its cell id.
            timeout_s: Seconds after which it is interrupted; never if left out.
        """
        return await self._run_cell(
            session_id, "execute", code=code, after=after_cell_id, wait_s=wait_s, timeout_s=timeout_s
        )

    async def edit_cell(
        self,
        session_id: str,
        cell_id: str,
        source: str,
        run: bool = True,
        wait_s: float = WAIT_S,
        timeout_s: float | None = None,
    ) -> Answer:
        """Replace the source of a cell and, if it is code, run it. The log keeps the earlier source and output.

        Args:
            session_id: The session.
            cell_id: The cell.
            source: Its whole new source.
            run: False changes it without running it.
            wait_s: As in execute_code.
            timeout_s: As in execute_code.
        """
        return await self._run_cell(
            session_id, "edit", cell_id=cell_id, source=source, run=run, wait_s=wait_s, timeout_s=timeout_s
        )

    async def wait(self, session_id: str, cell_id: str | None = None, wait_s: float = WAIT_S) -> Answer:
        """Wait for the end of a cell, or of run_all, and see what it has put out so far.

        Args:
            session_id: The session.
            cell_id: The cell; if left out run_all, else the cell that runs or has run last.
            wait_s: Seconds to wait at most; 0 only looks.
        """
        facts = await self._ask(session_id, "wait", self._tell, cell_id=cell_id, wait_s=wait_s)
        return replay_answer(facts) if "replay" in facts else await cell_answer(facts)

    async def add_markdown(self, session_id: str, content: str, after_cell_id: str | None = None) -> Answer:
        """Add a markdown cell: what you are about to test, what came out, what it means.

        Args:
            session_id: The session.
            content: Markdown.
            after_cell_id: As in execute_code.
        """
        facts = await self._ask(session_id, "insert", source=content, kind="markdown", after=after_cell_id)
        return await cell_answer(facts)

    async def insert_cell(
        self,
        session_id: str,
        source: str,
        cell_type: Literal["code", "markdown", "raw"] = "code",
        after_cell_id: str | None = None,
    ) -> Answer:
        """Add a cell to the notebook without running it.

        Args:
            session_id: The session.
            source: Its source.
            cell_type: What it is.
            after_cell_id: As in execute_code.
        """
        return await cell_answer(
            await self._ask(session_id, "insert", source=source, kind=cell_type, after=after_cell_id)
        )

    async def delete_cell(self, session_id: str, cell_id: str) -> Answer:
        """Take a cell out of the notebook. What it did to the kernel stays, and the log keeps its source.

        Args:
            session_id: The session.
            cell_id: The cell.
        """
        return session_answer(await self._ask(session_id, "delete", cell_id=cell_id))

    async def move_cell(self, session_id: str, cell_id: str, after_cell_id: str) -> Answer:
        """Put a cell after another one.

        Args:
            session_id: The session.
            cell_id: The cell to move.
            after_cell_id: The cell after which it shall stand; empty puts it at the top.
        """
        return session_answer(await self._ask(session_id, "move", cell_id=cell_id, after=after_cell_id))

    # ----------------------------------------------------------------------------------- reading

    async def read_notebook(
        self, session_id: str, view: Literal["outline", "cells"] = "outline", start: int = 0, limit: int = 20
    ) -> Answer:
        """Read the notebook as its file is now, a person's changes included.

        Args:
            session_id: The session.
            view: `outline` has a line per cell; `cells` has sources and outputs.
            start: Index of the first cell to show.
            limit: How many cells to show; 50 lines or 20 whole cells at most.
        """
        limit = min(limit, MAX_ROWS[view])
        facts = await self._ask(session_id, "read", start=start, limit=limit, outputs=view == "cells")
        blocks = [text_block(outline(facts))] if view == "outline" else await cells(facts)
        rows = [{name: row[name] for name in ("index", "cell_id", "cell_type", "state")} for row in facts["rows"]]
        return Answer([*blocks, *notes(facts)], {**session_facts(facts), "start": start, "rows": rows})

    async def read_output(self, session_id: str, cell_id: str, start: int = 0, length: int = 8_000) -> Answer:
        """Read a slice of a cell's whole output as text, of which answers show only the beginning and the end.

        Args:
            session_id: The session.
            cell_id: The cell.
            start: The first character; a negative number counts from the end.
            length: How many characters, 15000 at most.
        """
        text = (await self._ask(session_id, "output", cell_id=cell_id))["text"]
        first = max(0, len(text) + start) if start < 0 else min(start, len(text))
        piece = text[first : first + max(0, min(length, 15_000))]
        piece = piece.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")
        end = first + len(piece)
        head = f"[cell {cell_id} | characters {first} to {end} of {len(text)}]"
        facts: Facts = {
            "session_id": session_id,
            "cell_id": cell_id,
            "start": first,
            "end": end,
            "text_chars": len(text),
        }
        return Answer(
            [text_block(f"{head}\n{piece}")], {**facts, "text": answers.cut(piece, FACTS_BYTES, cell_id, first)}
        )

    async def list_variables(self, session_id: str) -> Answer:
        """List the kernel's variables with type and a short description. Only an idle kernel can be asked.

        Args:
            session_id: The session.
        """
        facts = await self._ask(session_id, "variables")
        rows = facts["variables"]
        lines = [f"{row['name']}: {row['type']}" + (f" = {row['value']}" if row["value"] else "") for row in rows]
        text = within(lines) or "The kernel has no variables."
        return Answer([text_block(text), *notes(facts)], {**session_facts(facts), "variables": rows[:50]})

    async def list_techniques(self) -> Answer:
        """List the interpretability techniques that come along, with what each is for."""
        names = [technique.name for technique in _techniques()]
        return Answer([text_block(_catalogue())], {"techniques": names})

    async def describe_technique(self, name: str) -> Answer:
        """Describe a technique: how to call it, what it computes, what it returns, what it costs.

        Args:
            name: Its name, as list_techniques tells it.
        """
        from interp_kernel.catalogue import call

        found = {technique.name: technique for technique in _techniques()}
        if name not in found:
            raise SessionError(f"There is no technique {name!r}. Those that there are: {', '.join(found)}.")
        technique = found[name]
        load = f"client.load_technique_from_file({str(technique.path)!r}, {name!r})"
        text = f"{call(technique)}\n\n{technique.docstring.strip()}\n\nLoad it: {name} = {load}"
        facts = {"name": name, "call": call(technique), "path": str(technique.path), "purpose": technique.purpose}
        return Answer([text_block(text[:TEXT_BYTES])], facts)

    async def run_all(self, session_id: str, wait_s: float = WAIT_S) -> Answer:
        """Restart the kernel and run every code cell in order, and see which outputs changed: does the notebook
        reproduce what it shows? A cell that failed before may fail again in the same way; another failure ends it.
        Cells that were stopped before are skipped. One that outlasts wait_s goes on; `wait` follows it.

        Args:
            session_id: The session.
            wait_s: Seconds to wait for its end.
        """
        return replay_answer(await self._ask(session_id, "run_all", self._progress, wait_s=wait_s))

    # ------------------------------------------------------------------------------------- parts

    async def _progress(self, facts: Facts) -> None:
        self._runs = [(facts["session_id"], facts["cell_id"])]
        await self._tell(facts)

    async def stop(self) -> None:
        """Interrupt what the call has started and waits for."""
        for session_id, cell_id in self._runs:
            await self._ask(session_id, "interrupt", cell_id=cell_id)

    async def _ask(
        self, session_id: str, verb: str, progress: Callable[[Facts], Awaitable[None]] | None = None, **arguments: Any
    ) -> Facts:
        return await sessions.ask(session_id, verb, progress, **arguments)

    async def _run_cell(self, session_id: str, verb: str, **arguments: Any) -> Answer:
        return await cell_answer(await self._ask(session_id, verb, self._progress, **arguments))

    async def _open(self, path: Path, *, how: str, is_new: bool) -> Facts:
        settings = self._settings
        started = await asyncio.to_thread(
            sessions.start,
            path,
            how=how,
            is_new=is_new,
            idle_window_s=settings.idle_window_s,
            jupyter_url=settings.jupyter_url,
            model=settings.model,
        )
        return {**await self._ask(started["id"], "info"), "is_live": started["is_live"]}

    async def _reopened(self, path: Path, how: str, rerun: bool) -> Answer:
        facts = await self._open(path, how=how, is_new=False)
        if facts["is_live"]:
            facts["notes"].insert(0, "A session of this notebook was alive and is taken over; nothing was run again.")
        elif facts["is_taken"]:
            facts["notes"].insert(0, f"{facts['jupyter_url']} has a kernel of this notebook; nothing was run again.")
        elif rerun:
            facts["notes"] += await asyncio.to_thread(_warm_workers)
            ran = await self._ask(facts["session_id"], "run_all", self._progress, wait_s=WAIT_S, fresh=False)
            return replay_answer({**ran, "notes": [*facts["notes"], *ran["notes"]]})
        else:
            facts |= await self._ask(facts["session_id"], "read", limit=0)
            facts["notes"].insert(0, "The kernel is fresh: none of the notebook's cells has been run in it.")
        return session_answer(facts)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[Path]:
        """A new empty file for a notebook, nobody else's; it goes again if the block fails."""
        words = "".join(letter if letter.isalnum() else "_" for letter in name.strip())[:40].strip("_") or "experiment"
        stem = f"{time.strftime('%Y-%m-%d-%H-%M')}_{words}"
        for number in itertools.count(1):
            path = self._settings.workspace / f"{stem}{f'_{number}' if number > 1 else ''}.ipynb"
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                break
        try:
            yield path
        except (InterpError, OSError):
            path.unlink(missing_ok=True)
            raise


# ------------------------------------------------------------------------------------------- beginnings


def _warm_workers() -> list[str]:
    from interp_kernel.backends.local import list_workers

    models = dict.fromkeys(worker.model_name for worker in list_workers() if worker.state in ("idle", "busy"))
    return [f"Warm workers hold {', '.join(models)}, so that cells need not load it."] if models else []


def _instructions() -> str:
    from interp_kernel.agents import instructions

    return instructions()


def _techniques() -> list[Any]:
    from interp_kernel.catalogue import package_techniques

    return package_techniques()


def _catalogue() -> str:
    lines = [f"{technique.name}: {technique.purpose}" for technique in _techniques()]
    return "\n".join([*lines, "", "describe_technique(name) tells how to call one and load it."])


def model_settings(given: str | None) -> Facts:
    """Options of the model that the server was started with: a name or a JSON object; INTERP_MODEL's if none.

    Raises:
        SpecError: An option is wrong.
    """
    text = given or os.environ.get("INTERP_MODEL")
    if not text:
        return {}
    from interp_kernel.client import InterpClient
    from interp_kernel.magics import json_or_text, settings_from

    options = settings_from(json_or_text(text), "--model" if given else "INTERP_MODEL")
    InterpClient(**options).close()
    return options


def listed() -> list[str]:
    """Names of the tools, in their order."""
    return [name for name in vars(Tools) if not name.startswith("_") and name != "stop"]
