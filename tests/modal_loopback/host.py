"""Runs the control plane in a thread with an event loop of its own, so that a test may use modal's blocking calls."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from grpclib import Status
from grpclib.server import Server

from tests.helpers_worker import wait_until
from tests.modal_loopback import containers
from tests.modal_loopback.apps import APPS, blob_store
from tests.modal_loopback.calls import CALLS, container_table
from tests.modal_loopback.functions import FUNCTIONS
from tests.modal_loopback.rpc import make_server
from tests.modal_loopback.state import Fault, Plane, Settings, Task

T = TypeVar("T")
END_S = 20.0


class Loopback:
    """`with Loopback() as loopback:` makes this process, and all that it starts, use a control plane of its own."""

    plane: Plane

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def __enter__(self) -> Loopback:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-loopback", daemon=True)
        self._thread.start()
        self._folder = Path(tempfile.mkdtemp(prefix="ml", dir="/tmp"))
        self._run(self._start())
        self._environment = dict(os.environ)
        for name in [name for name in os.environ if name.startswith("MODAL_")]:
            del os.environ[name]
        os.environ.update(self.environment())
        forget_client()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        self._loop.close()
        os.environ.clear()
        os.environ.update(self._environment)
        forget_client()
        shutil.rmtree(self._folder)
        assert not self.plane.unimplemented, f"RPCs that are not written: {dict(self.plane.unimplemented)}"
        assert not self.plane.failures, self.plane.failures

    def environment(self) -> dict[str, str]:
        """The variables by which a process finds this plane."""
        token_id, token_secret = self.settings.token
        return {
            "MODAL_SERVER_URL": self.plane.url,
            "MODAL_TOKEN_ID": token_id,
            "MODAL_TOKEN_SECRET": token_secret,
            "MODAL_CONFIG_PATH": str(self._folder / "no-config.toml"),
        }

    # --------------------------------------------------------------------------------------- what is there

    def tasks(self) -> list[Task]:
        """Every container that there was, in the order of their starts."""
        return self._call(lambda: list(self.plane.tasks.values()))

    def live(self) -> list[Task]:
        """The containers whose process runs."""
        return [task for task in self.tasks() if task.is_alive]

    def calls(self, rpc: str) -> int:
        """How many requests of one RPC the client has sent."""
        return self.plane.rpc_count[f"client:{rpc}"]

    def total(self) -> int:
        """How many requests the client has sent in all."""
        return sum(count for name, count in self.plane.rpc_count.items() if name.startswith("client:"))

    def recipe(self) -> str:
        """The build steps of every image that was asked for."""
        return "\n".join(step for image in self.plane.images.values() for step in image.dockerfile_commands)

    # ------------------------------------------------------------------------------------- what is done to it

    def make_secret(self, name: str, variables: dict[str, str]) -> None:
        """A secret of the workspace."""
        secret_id = self.plane.named.setdefault(("st", "main", name), self.plane.new_id("st"))
        self.plane.secrets[secret_id] = variables

    def lose(self, rpc: str, times: int = 1, *, is_after: bool = True) -> None:
        """Answer the next requests of an RPC with UNAVAILABLE, after they were carried out or instead of it."""
        fault = Fault(Status.UNAVAILABLE, "lost by the test", is_after)
        self._call(lambda: self.plane.faults[rpc].extend([fault] * times))

    def refuse(self, rpc: str, status: Status, message: str) -> None:
        """Answer the next request of an RPC with an error."""
        self._call(lambda: self.plane.faults[rpc].append(Fault(status, message, is_after=False)))

    def kill(self, task: Task) -> None:
        """End a container as a lost machine would, and wait until it is gone."""
        self._call(partial(containers.kill, task, "killed by the test"))
        self.await_end(task)

    def preempt(self, task: Task, grace_s: float = 30.0) -> None:
        """SIGINT, a time of grace, SIGKILL; waits until the container is gone."""
        self._run(containers.preempt(task, grace_s), grace_s + END_S)
        self.await_end(task)

    def scale_down(self, task: Task) -> None:
        """Let an idle container go, as after its scaledown window, and wait until it is gone."""
        self._call(partial(containers.drain, task, "idle"))
        self.await_end(task)

    def await_end(self, task: Task) -> None:
        """Wait until a container is gone."""
        wait_until(lambda: task.exit_code is not None)

    def hold_starts(self) -> None:
        """From now on containers are asked for, but none comes up."""
        self._call(self.plane.may_start.clear)

    def release_starts(self) -> None:
        """Containers come up again."""
        self._call(self.plane.may_start.set)

    # ---------------------------------------------------------------------------------------------- internal

    async def _start(self) -> None:
        plane = self.plane = Plane(self.settings, self._folder, {**APPS, **FUNCTIONS, **CALLS}, container_table)
        self._server = make_server(plane, plane.table, "client")
        plane.url = await start_server(self._server)
        self._store = web.AppRunner(blob_store(plane), access_log=None)
        await self._store.setup()
        site = web.TCPSite(self._store, "127.0.0.1", 0)
        await site.start()
        plane.blob_url = f"http://127.0.0.1:{self._store.addresses[0][1]}"
        plane.start_job(containers.watch_idle(plane))

    async def _stop(self) -> None:
        self.plane.is_closing = True
        self.plane.may_start.set()
        while left := [task for task in self.plane.tasks.values() if task.exit_code is None]:
            for task in left:
                containers.kill(task, "the control plane ends")
            await asyncio.sleep(0.02)
        for job in list(self.plane.jobs):
            job.cancel()
        await asyncio.gather(*self.plane.jobs, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()
        await self._store.cleanup()

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._run(call())


async def start_server(server: Server) -> str:
    """Listen on a free port of loopback; its URL."""
    # With the protocol named, asyncio sets TCP_NODELAY; without that each small answer waits for 40 ms.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    await server.start(sock=sock)
    return f"http://127.0.0.1:{sock.getsockname()[1]}"


def forget_client() -> None:
    """modal keeps one client and the environments it has seen for the whole process; a new plane needs new ones."""
    from modal import _environments
    from modal.client import Client

    Client.set_env_client(None) if hasattr(Client, "set_env_client") else Client._set_env_client(None)
    _environments.ENVIRONMENT_CACHE.clear()
