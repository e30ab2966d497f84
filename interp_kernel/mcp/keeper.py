"""`python -m interp_kernel.mcp.keeper SETTINGS READY_FD`: the process that keeps one session.

It owns the kernel, writes the notebook and its log, and answers servers on a Unix socket in a private folder: one
request per connection, lines of JSON, progress before the answer. It ends with its session: when it is shut down, or
when nothing has been asked and nothing has run for its idle window.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from interp_kernel.errors import InterpError
from interp_kernel.mcp.session import Session
from interp_kernel.mcp.sessions import ENDING, LINE_LIMIT
from interp_kernel.protocol import peer

TICK_S = 0.5
VERBS = {"info", "execute", "init", "edit", "insert", "delete", "move", "wait", "interrupt", "restart", "run_all"}
VERBS |= {"variables", "read", "output", "shutdown"}
Facts = dict[str, Any]


class Keeper:
    """Answers for a session, and ends it when it is idle."""

    def __init__(self, settings: Facts) -> None:
        """Open the session; see `Session` for the settings, of which the keeper's own is idle_window_s."""
        self.settings, self.folder = settings, Path(settings["folder"])
        self.session = Session(settings)
        self._asked_at, self._asking = time.monotonic(), 0

    async def keep(self) -> None:
        """Keep the session until it ends."""
        ticks = asyncio.create_task(self._tick())
        await self.session.is_ending.wait()
        (self.folder / ENDING).touch()
        ticks.cancel()
        if not self.session.has_ended:
            await self.session.end("its keeper was told to end, or it was idle for its window")
        while self._asking:
            await asyncio.sleep(0.01)  # the last answers go out

    def write_facts(self) -> None:
        """Leave what others need to find this session."""
        scratch = self.folder / "session.partial"
        scratch.write_text(json.dumps({**self.settings, "pid": os.getpid()}))
        scratch.replace(self.folder / "session.json")

    async def _tick(self) -> None:
        """End the session when it has been idle for its window, or its folder is gone."""
        while True:
            await asyncio.sleep(TICK_S)
            if self._asking or self.session.runner.state == "busy":
                self._asked_at = time.monotonic()
            is_idle = time.monotonic() - self._asked_at > self.settings["idle_window_s"]
            if is_idle or not self.folder.is_dir():
                self.session.is_ending.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the one request of a connection."""
        self._asking += 1
        try:
            if peer(writer.get_extra_info("socket"))[1] != os.getuid():
                return
            request = json.loads(await reader.readline())
            answer = await self.answer(request, writer)
            with suppress(ConnectionError):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        finally:
            self._asking -= 1
            writer.close()

    async def answer(self, request: Facts, writer: asyncio.StreamWriter) -> Facts:
        """The value of a verb, or why there is none."""

        async def progress(facts: Facts) -> None:
            with suppress(ConnectionError):
                writer.write(json.dumps({"progress": facts}).encode() + b"\n")
                await writer.drain()

        if request["verb"] not in VERBS:
            return {"error": f"A keeper has no verb {request['verb']!r}; expected one of {', '.join(sorted(VERBS))}."}
        if self.session.is_ending.is_set() and self.session.has_ended:
            return {"error": f"The session has just ended. Resume its notebook: {self.settings['notebook']}."}
        verb = getattr(self.session, request["verb"])
        reports = {"progress": progress} if "progress" in verb.__annotations__ else {}
        try:
            return {"value": await verb(**reports, **request["arguments"])}
        except (InterpError, OSError) as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - whoever asked is told of a fault of this program, too
            traceback.print_exception(error)
            return {"error": f"The session failed at {request['verb']}: {type(error).__name__}: {error}. It goes on."}


async def keep(settings: Facts, ready: Callable[[str], None]) -> None:
    """Keep a session until it ends."""
    from interp_kernel.backends.local import socket_path

    path = socket_path(Path(settings["folder"]))
    try:
        keeper = Keeper(settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, keeper.session.is_ending.set)
        await keeper.session.start()
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(keeper.serve, str(path), limit=LINE_LIMIT)
    except (InterpError, OSError) as error:
        ready(str(error))
        return
    keeper.write_facts()
    ready("")
    async with server:
        await keeper.keep()
    path.unlink(missing_ok=True)


def main() -> None:
    """Leave whoever started this, then keep the session."""
    if os.fork():
        os._exit(0)
    settings = json.loads(Path(sys.argv[1]).read_text())
    ready_fd = int(sys.argv[2])

    def ready(problem: str) -> None:
        os.write(ready_fd, (problem or "ready").encode())
        os.close(ready_fd)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asyncio.run(keep(settings, ready))
    finally:
        shutil.rmtree(settings["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
