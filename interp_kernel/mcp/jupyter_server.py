"""A kernel of a running Jupyter server: REST starts, stops and interrupts it, a websocket carries its messages.

The kernel belongs to the notebook's own session there, so that whoever opens the notebook in JupyterLab is on the same
kernel. Where the notebook is open already, its kernel is taken as it is, and left alive at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from interp_kernel.errors import SessionError
from interp_kernel.mcp.document import MARK
from interp_kernel.mcp.kernels import START_S, Message

ANSWER_S = 30.0
KERNELS = ("interp", "python3")
"""Kernels that are asked for, in this order."""


class ServerKernel:
    """A kernel that a Jupyter server keeps; see `Kernel` for the methods."""

    pid = None

    def __init__(self, url: str, notebook: Path, mark: dict[str, str]) -> None:
        """Nothing is asked yet.

        Args:
            url: The server's, with `?token=` if it needs one; else $JUPYTER_TOKEN is used.
            notebook: A file that the server serves.
            mark: What the notebook's metadata hold among others, so that no other file is taken for it.
        """
        parts = urlsplit(url)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/lab').rstrip('/')}"
        self._token = parse_qs(parts.query).get("token", [os.environ.get("JUPYTER_TOKEN", "")])[0]
        self._notebook, self._mark = notebook, mark
        self._session = uuid.uuid4().hex
        self._kernel_id = self._own_session = ""
        self._socket: Any = None
        self._pump: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._ended: str | None = "it was not started"
        self.is_taken, self.calls = False, None

    async def start(self, *, fresh: bool = False) -> None:
        """See `Kernel.start`; a kernel of somebody else is restarted where a fresh one is asked for."""
        path = await self._served_path()
        sessions = [session for session in await self._get("sessions") if session["path"] == path]
        self.is_taken = bool(sessions) and not fresh
        if sessions:
            self._kernel_id = sessions[0]["kernel"]["id"]
            if fresh:
                await self._post(f"kernels/{self._kernel_id}/restart", {})
        else:
            names = (await self._get("kernelspecs"))["kernelspecs"]
            name = next((name for name in KERNELS if name in names), KERNELS[-1])
            asked = {"path": path, "name": self._notebook.name, "type": "notebook", "kernel": {"name": name}}
            session = await self._post("sessions", asked)
            self._own_session, self._kernel_id = session["id"], session["kernel"]["id"]
        await self._connect()
        self._ended = None
        self._queue = asyncio.Queue()
        self._pump = asyncio.create_task(self._read())
        await self._wait_until_ready()

    async def _served_path(self) -> str:
        """The notebook's path as the server knows it, which counts from its own root."""
        parts = self._notebook.parts[1:]
        for first in range(len(parts)):
            path = "/".join(parts[first:])
            with suppress(FileNotFoundError):
                found = await self._get(f"contents/{quote(path)}?type=notebook")
                if self._mark.items() <= found["content"]["metadata"].get(MARK, {}).items():
                    return path
        raise SessionError(
            f"{self.url} does not serve {self._notebook}: its root folder is elsewhere. Start it in the workspace."
        )

    async def _connect(self) -> None:
        from tornado.httpclient import HTTPRequest
        from tornado.websocket import websocket_connect

        address = f"{self.url.replace('http', 'ws', 1)}/api/kernels/{self._kernel_id}/channels"
        request = HTTPRequest(f"{address}?session_id={self._session}", headers=self._headers())
        self._socket = await websocket_connect(request, max_message_size=2**30)

    async def _wait_until_ready(self) -> None:
        asked = self.send("kernel_info_request", {})
        with suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                while (message := await self._queue.get())["parent_header"].get("msg_id") != asked:
                    pass
                if message["header"]["msg_type"] != "kernel_info_reply":
                    await self._queue.get()
                return
        raise SessionError(f"The kernel at {self.url} did not answer within {START_S:g} s.")

    async def _read(self) -> None:
        """Take in what comes; a connection that breaks is made again while the kernel is there."""
        while True:
            text = await self._socket.read_message()
            if text is None:
                if not await self._is_reconnected():
                    return
                continue
            message = json.loads(text)
            state = message["content"].get("execution_state")
            if message["header"]["msg_type"] == "status" and state in ("restarting", "dead"):
                self._ended = "its process ended, as its Jupyter server told"
            self._queue.put_nowait(message)

    async def _is_reconnected(self) -> bool:
        try:
            await self._get(f"kernels/{self._kernel_id}")
            await self._connect()
        except FileNotFoundError:
            self._ended = f"{self.url} has shut it down"
        except (SessionError, OSError):
            self._ended = f"{self.url} can't be reached any more"
        else:
            return True
        return False

    def send(self, kind: str, content: dict[str, Any]) -> str:
        """See `Kernel.send`."""
        from tornado.websocket import WebSocketClosedError

        message_id = uuid.uuid4().hex
        header = {"msg_id": message_id, "msg_type": kind, "session": self._session, "username": "agent"}
        header |= {"version": "5.3", "date": datetime.now(UTC).isoformat()}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        with suppress(WebSocketClosedError):  # whoever reads the socket finds out why
            self._socket.write_message(json.dumps({**message, "buffers": []}))
        return message_id

    async def messages(self) -> AsyncIterator[Message]:
        """See `Kernel.messages`."""
        queue = self._queue
        while True:
            yield await queue.get()

    async def interrupt(self) -> None:
        """See `Kernel.interrupt`."""
        if self._ended is None:
            await self._post(f"kernels/{self._kernel_id}/interrupt", {})

    async def stop(self) -> None:
        """See `Kernel.stop`; a kernel that was there before stays."""
        if self._pump is not None:
            self._pump.cancel()
        if self._socket is not None:
            self._socket.close()
        if self._own_session:
            with suppress(SessionError, FileNotFoundError):
                await self._fetch("DELETE", f"sessions/{self._own_session}")
        self._own_session, self._pump, self._socket = "", None, None
        self._ended = "it was stopped"

    def why_ended(self) -> str | None:
        """See `Kernel.why_ended`."""
        return self._ended

    # ------------------------------------------------------------------------------------------- REST

    async def _get(self, path: str) -> Any:
        return await self._fetch("GET", path)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._fetch("POST", path, json.dumps(body))

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self._token}"} if self._token else {}

    async def _fetch(self, method: str, path: str, body: str | None = None) -> Any:
        """Ask the server.

        Raises:
            FileNotFoundError: It has no such thing.
            SessionError: It can't be reached, or refuses.
        """
        from tornado.httpclient import AsyncHTTPClient, HTTPClientError

        try:
            answer = await AsyncHTTPClient().fetch(
                f"{self.url}/api/{path}", method=method, headers=self._headers(), body=body, request_timeout=ANSWER_S
            )
        except HTTPClientError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from None
            hint = " Put its token into JUPYTER_TOKEN." if error.code in (401, 403) else ""
            raise SessionError(f"The Jupyter server {self.url} refused {path}: {error}.{hint}") from None
        except OSError as error:
            raise SessionError(f"The Jupyter server {self.url} can't be reached: {error}.") from None
        return json.loads(answer.body) if answer.body else None
