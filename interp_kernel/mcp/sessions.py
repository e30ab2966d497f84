"""Finding, starting and asking sessions: each is a keeper process with a private folder. Nothing is held here."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from interp_kernel.errors import SessionError

Facts = dict[str, Any]
LINE_LIMIT = 256_000_000
ENDING = "ending"
"""A file in the folder of a session that saves for the last time and takes no calls any more."""
END_S = 30.0
YOUNG_S = 300.0
"""A folder without facts that is younger belongs to a keeper that is starting."""


def root() -> Path:
    """Folder of all sessions of this user."""
    from interp_kernel.backends.local import private_folder, runtime_root

    return private_folder(runtime_root() / "sessions")


@contextmanager
def lock() -> Iterator[None]:
    """Only one process at a time starts a session or clears up, so that a notebook gets one keeper."""
    with (root() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def known() -> list[Facts]:
    """What the keepers that live have left in their folders; what dead ones left is cleared away, kernels too."""
    from interp_kernel.backends.local import private_folder, read_json

    found = []
    for folder in sorted(path for path in root().iterdir() if path.is_dir()):
        facts = read_json(folder / "session.json")
        if facts and is_kept(folder, facts["pid"]):
            if not (folder / ENDING).exists():
                found.append(facts)
            continue
        with suppress(FileNotFoundError):  # its keeper has taken it away meanwhile
            if facts or time.time() - folder.stat().st_mtime > YOUNG_S:
                clear(private_folder(folder))
    return found


def is_kept(folder: Path, pid: int) -> bool:
    """Whether a session's keeper lives; since it ended, after a reboot above all, its id may be another process's."""
    try:
        return os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def clear(folder: Path) -> None:
    """Remove what a keeper left that was killed; a kernel of it that still runs is stopped."""
    from interp_kernel.backends.local import socket_path
    from interp_kernel.mcp.kernels import kill_orphans

    kill_orphans(folder)
    socket_path(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def find(session_id: str) -> Facts:
    """The session of that id.

    Raises:
        SessionError: There is none; the message names those that there are.
    """
    sessions = known()
    for facts in sessions:
        if facts["id"] == session_id:
            return facts
    rows = [f"{facts['id']} ({Path(facts['notebook']).name})" for facts in sessions]
    raise SessionError(
        f"Session {session_id!r} is not known. Sessions that live: {', '.join(rows) or 'none'}. "
        "start_new_session makes one; start_session_resume_notebook opens a notebook again."
    )


def start(notebook: Path, *, how: str, is_new: bool, idle_window_s: float, **more: Any) -> Facts:
    """Start the keeper of a notebook, unless one lives; returns its facts, `is_live` telling which.

    Raises:
        SessionError: The notebook can't be opened.
    """
    with lock():
        wait_for_ends()
        for facts in known():
            if facts["notebook"] == str(notebook):
                return {**facts, "is_live": True}
        session_id = uuid.uuid4().hex[:8]
        folder = root() / session_id
        folder.mkdir(mode=0o700)
        settings: Facts = {
            "id": session_id,
            "folder": str(folder),
            "notebook": str(notebook),
            "how": how,
            "is_new": is_new,
            "idle_window_s": idle_window_s,
            **more,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        spawn(folder)
    return {**settings, "is_live": False}


def wait_for_ends() -> None:
    """Wait for sessions that are ending, of which one may be about to write the same notebook."""
    from interp_kernel.backends.local import read_json

    deadline = time.monotonic() + END_S
    for ending in root().glob(f"*/{ENDING}"):
        facts = read_json(ending.with_name("session.json"))
        while facts and is_kept(ending.parent, facts["pid"]) and time.monotonic() < deadline:
            time.sleep(0.01)


def spawn(folder: Path) -> None:
    """Start a keeper, detached from this process."""
    from interp_kernel.backends.local import tail

    ready, ready_end = os.pipe()
    with (folder / "keeper.log").open("wb") as log:
        command = [
            sys.executable,
            "-P",
            "-m",
            "interp_kernel.mcp.keeper",
            str(folder / "settings.json"),
            str(ready_end),
        ]
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            pass_fds=[ready_end],
            start_new_session=True,  # whoever ends the agent's process group doesn't end its sessions
        )
    os.close(ready_end)
    launcher.wait()
    with os.fdopen(ready, "rb") as pipe:
        told = pipe.read().decode()
    if told != "ready":
        raise SessionError(told or f"The session's keeper ended at once. Its log:\n{tail(folder / 'keeper.log', 2000)}")


async def ask(
    session_id: str, verb: str, on_progress: Callable[[Facts], Awaitable[None]] | None = None, **arguments: Any
) -> Facts:
    """Ask a keeper; see `Keeper` for the verbs.

    Raises:
        SessionError: There is no such session, it refuses, or it ends before it answers.
    """
    from interp_kernel.backends.local import socket_path
    from interp_kernel.protocol import peer

    facts = await asyncio.to_thread(find, session_id)
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket_path(Path(facts["folder"]))), limit=LINE_LIMIT)
    except OSError:
        raise SessionError(f"Session {session_id} has just ended. Resume its notebook: {facts['notebook']}.") from None
    try:
        if peer(writer.get_extra_info("socket"))[1] != os.getuid():
            raise SessionError(f"The process that answers for session {session_id} belongs to another user.")
        writer.write(json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n")
        while line := await reader.readline():
            message: Facts = json.loads(line)
            if "value" in message:
                value: Facts = message["value"]
                return value
            if "error" in message:
                raise SessionError(message["error"])
            if on_progress is not None:
                await on_progress(message["progress"])
    except ConnectionError:
        pass
    finally:
        writer.close()
    raise SessionError(
        f"Session {session_id} has just ended, before it answered. Its notebook and log are up to date but for the "
        f"last second: {facts['notebook']}. Open it again with start_session_resume_notebook."
    )
