"""Kernels of sessions: one of our own, or one of a running Jupyter server. Both are spoken to in Jupyter's messages."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from interp_kernel.errors import SessionError
from interp_kernel.notebook.called import CALLS_MODULE, CALLS_VARIABLE, CallsFile

START_S = 60.0
STOP_S = 5.0
QUEUED_MESSAGES = 50_000
"""How many of a kernel's messages may wait here to be read; what comes beyond them is lost, as the cell then says."""
Message = dict[str, Any]


class Kernel(Protocol):
    """What a keeper needs of a kernel."""

    @property
    def pid(self) -> int | None:
        """Its process, where that is on this machine."""

    @property
    def url(self) -> str | None:
        """The Jupyter server that keeps it, if one does."""

    @property
    def calls(self) -> CallsFile | None:
        """What its clients write down of each call to a worker, where that can be read."""

    @property
    def is_taken(self) -> bool:
        """Whether it was there before, with somebody's variables."""

    async def start(self, *, fresh: bool = False) -> None:
        """Start it and wait until it answers.

        Args:
            fresh: One that is there already is restarted.

        Raises:
            SessionError: It did not come up.
        """

    def send(self, kind: str, content: dict[str, Any]) -> str:
        """Send a request on the shell channel; returns its id."""

    def messages(self) -> AsyncIterator[Message]:
        """What the kernel sends, replies among it, until it is stopped or restarted."""

    async def interrupt(self) -> None:
        """Jupyter's stop button."""

    async def stop(self) -> None:
        """End it; nothing happens if it has ended."""

    def why_ended(self) -> str | None:
        """Why it ended by itself, in words; None while it lives."""


class LocalKernel:
    """A kernel that this process starts, in a process session of its own."""

    url = None
    is_taken = False

    def __init__(self, folder: Path, cwd: Path, environment: dict[str, str]) -> None:
        """Nothing starts yet.

        Args:
            folder: Private folder for its connection file and its own log.
            cwd: Where it works.
            environment: Its environment.
        """
        self.folder, self.cwd = folder, cwd
        self.calls = CallsFile(folder / "calls.jsonl")
        self.environment = {**environment, CALLS_VARIABLE: str(self.calls.path)}
        self.pid: int | None = None
        self._manager: Any = None
        self._client: Any = None
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self, *, fresh: bool = False) -> None:
        """See `Kernel.start`; a start that fails, as it may where another takes its ports, is tried once more."""
        try:
            await self._start()
        except RuntimeError:
            await self.stop()
            try:
                await self._start()
            except RuntimeError as error:
                await self.stop()
                raise SessionError(f"The kernel did not start: {error}. Its log:\n{self.log_tail()}") from None

    async def _start(self) -> None:
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        from interp_kernel.kernelspec import kernelspec

        spec = kernelspec()
        manager: Any = AsyncKernelManager(
            kernel_name=spec["language"],
            connection_file=str(self.folder / f"kernel-{uuid.uuid4().hex[:8]}.json"),
            transport_encryption="auto",
        )
        manager._kernel_spec = KernelSpec(**{**spec, "name": "interp"})
        self._manager = manager
        with (self.folder / "kernel.log").open("ab") as log:
            await manager.start_kernel(
                cwd=str(self.cwd),
                env=self.environment,
                stdout=log,
                stderr=log,
                extra_arguments=["--HistoryManager.hist_file=:memory:", "--ext", CALLS_MODULE],
            )
        self.pid = manager.provisioner.pid
        self._client = manager.client()
        self._client.context.rcvhwm = QUEUED_MESSAGES
        self._client.start_channels(hb=False)
        await self._client.wait_for_ready(timeout=START_S)
        self._queue = asyncio.Queue()
        channels = (self._client.iopub_channel, self._client.shell_channel)
        self._pumps = [asyncio.create_task(self._pump(channel)) for channel in channels]

    async def _pump(self, channel: Any) -> None:
        while True:
            self._queue.put_nowait(await channel.get_msg(timeout=None))

    def send(self, kind: str, content: dict[str, Any]) -> str:
        """See `Kernel.send`."""
        import zmq

        message = self._client.session.msg(kind, content)
        self._client.shell_channel.send(message)
        # It sends past asyncio and may eat the signal that a reply is there, which would then never be read.
        self._client.shell_channel.socket.get(zmq.EVENTS)
        return str(message["header"]["msg_id"])

    async def messages(self) -> AsyncIterator[Message]:
        """See `Kernel.messages`."""
        queue = self._queue
        while True:
            yield await queue.get()

    async def interrupt(self) -> None:
        """See `Kernel.interrupt`."""
        if self.why_ended() is None:
            await self._manager.interrupt_kernel()

    async def stop(self) -> None:
        """See `Kernel.stop`."""
        for pump in self._pumps:
            pump.cancel()
        self._pumps = []
        if self._client is not None:
            self._client.stop_channels()
        if self._manager is not None and self._manager.has_kernel:
            self._manager.shutdown_wait_time = STOP_S
            await self._manager.shutdown_kernel(now=self.why_ended() is not None)
        self._manager = self._client = None

    def why_ended(self) -> str | None:
        """See `Kernel.why_ended`."""
        process = self._manager.provisioner.process if self._manager is not None and self._manager.has_kernel else None
        if process is None:
            return "it was stopped"
        code = process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"it exited with status {code}"
        return f"it was killed by {signal.Signals(-code).name}"

    def log_tail(self) -> str:
        """The end of what the kernel itself wrote."""
        from interp_kernel.backends.local import tail

        return tail(self.folder / "kernel.log", 2000)


def kill_orphans(folder: Path) -> None:
    """Kill the kernels of a keeper that is gone, which name its folder in their command line.

    A Python kernel ends by itself soon after its parent, unless native code holds it up.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.fsencode(folder / "kernel-") in (process / "cmdline").read_bytes():
                os.killpg(int(process.name), signal.SIGKILL)
