"""The backend of mode='modal': the worker of one spec in a container that Modal starts when it is needed."""

from __future__ import annotations

import asyncio
import atexit
import os
import select
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from interp_kernel.backends import HELLO_S, Message, OnEvent
from interp_kernel.backends.modal.failures import explain
from interp_kernel.backends.modal.link import ModalLink, start
from interp_kernel.backends.modal.options import ModalOptions
from interp_kernel.errors import SpecError, WorkerError, WorkerRefusedError, stopped
from interp_kernel.protocol import PROTOCOL, Head, Packed
from interp_kernel.spec import WorkerSpec

if TYPE_CHECKING:
    from interp_kernel.backends.modal.app import ModalApp

TICK_S = 0.2  # a shorter wait is not shown
SHOWN_S = 1.0
NETWORK_S = 5.0  # more than a worker on this machine takes
ANSWER_S = 15.0  # for questions to a container that runs
END_S = 5.0

STOPPED = (
    "stopped waiting for the container, which goes on starting and ends after {} s without a call; "
    "end it now with %remote stop"
)

T = TypeVar("T")


class ModalBackend:
    """Finds, starts and ends the worker of one spec at Modal; all of a process with equal options share it."""

    def __init__(self, spec: WorkerSpec, options: ModalOptions) -> None:
        """Nothing is sent yet.

        Raises:
            SpecError: The package modal is missing, or the spec names something that no container has.
        """
        self.spec, self.options = spec, options
        self.place = shared_place(spec, options)

    def open(
        self, client: str, on_event: OnEvent = lambda _: None, stop_fd: int | None = None
    ) -> tuple[ModalLink, bool]:
        """See `Backend.open`; the app's start and the wait for a container are shown with seconds."""
        self.ready(on_event, stop_fd)
        tick = Ticker(on_event, f"Modal: waiting for a container with {self.options.describe_gpu()}")
        link = self._connect(client, None, tick, stop_fd)
        assert link is not None
        return link, bool(link.hello["is_first"])

    def ready(self, on_event: OnEvent, stop_fd: int | None = None) -> None:
        """Make sure that the app runs; no container needs to."""
        tick = Ticker(on_event, f"Modal: starting the app {self.options.app_name!r}; a new image takes minutes")
        wait(start(self.place.app.start()), tick, stop_fd)

    def attach(self, client: str, within_s: float | None = None) -> ModalLink | None:
        """See `Backend.attach`; starts no container."""
        if self.place.app.gateway is None:
            if not self.options.deploy:
                return None
            wait(start(self.place.app.start()))
        if not ask(self.place.runners(), 0):
            return None
        return self._connect(client, (HELLO_S if within_s is None else within_s) + NETWORK_S)

    def why_ended(self, pid: int) -> str | None:
        """See `Backend.why_ended`."""
        place = self.place
        if pid in place.ends or any(link.hello.get("pid") == pid for link in list(place.links)):
            return place.ends.get(pid)  # an open link will be told
        why: str | None = ask(place.why_ended(pid), None)
        return why

    def kill(self, pid: int) -> None:
        """See `Backend.kill`."""
        start(self.place.control("kill", pid, self.place.boots.get(pid, "")))

    def log_tail(self, nbytes: int) -> str:
        """See `Backend.log_tail`; empty if no container runs."""
        return str(ask(self.place.log_tail(nbytes), ""))

    def release(self) -> None:
        """See `Backend.release`: an own app is closed; a deployed one's container ends now, not after its window."""
        place = self.place
        if place.app.gateway is None:
            return
        if not self.options.deploy:
            wait(start(place.close()))
        elif ask(place.runners(), 0):
            ask(place.control("end", None, ""), None)

    def _connect(
        self, client: str, limit_s: float | None, tick: Callable[[], None] = lambda: None, stop_fd: int | None = None
    ) -> ModalLink | None:
        place = self.place
        link = ModalLink(place.exchange, place.hold, place.ended, lambda: bool(ask(place.runners(), 1)))
        place.links.add(link)
        try:
            link.send(Packed({"verb": "hello", "client": client}))
            message = self._await_hello(link, limit_s, tick, stop_fd)
            if message is None:
                link.close()
                return None
            link.hello = self._accept(message[0]["value"])
        except EOFError as ended:
            link.close()
            if not place.links:
                start(place.close())  # it may have been stopped at Modal; the next call starts or finds it anew
            raise WorkerError(f"No worker could be started at Modal: {ended}.") from None
        except BaseException:
            link.close()
            raise
        pid = link.hello["pid"]
        place.ends.pop(pid, None)  # a connection was lost, and the worker lives
        place.boots[pid] = link.boot
        return link

    def _await_hello(
        self, link: ModalLink, limit_s: float | None, tick: Callable[[], None], stop_fd: int | None
    ) -> Message | None:
        deadline = time.monotonic() + (limit_s or float("inf"))
        try:
            while (message := link.receive(TICK_S, stop_fd)) is None and time.monotonic() < deadline:
                tick()
                if is_readable(stop_fd):
                    raise stopped(STOPPED.format(self.options.scaledown_window))
        finally:
            if isinstance(tick, Ticker):
                tick.end()
        return message

    def _accept(self, hello: Head) -> Head:
        if hello.get("protocol") != PROTOCOL:
            raise WorkerRefusedError(
                f"The container speaks protocol {hello.get('protocol')!r} and this notebook {PROTOCOL}: it was "
                "deployed by another version of interp-kernel. Deploy it again: interp-kernel modal deploy."
            )
        window = {"scaledown_window": self.options.scaledown_window, "min_containers": self.options.min_containers}
        return {**hello, **window}


class Place:
    """What this process knows of one app's container."""

    def __init__(self, app: ModalApp) -> None:
        """Nothing is sent yet."""
        self.app = app
        self.links: set[ModalLink] = set()
        self.ends: dict[int, str] = {}  # why workers ended
        self.boots: dict[int, str] = {}  # which container they ran in
        self._left: list[str] = []  # links that the gateway need not keep

    async def exchange(self, *arguments: Any) -> Any:
        """One exchange with the gateway, which also learns which links are no longer used."""
        left, self._left = self._left, []
        try:
            return await self.app.gateway.exchange.remote.aio(*arguments, left)
        except BaseException:
            self._left += left
            raise

    def hold(self, boot: str) -> None:
        """Keep the container while a background call runs, also if this process ends."""
        start(self.app.gateway.hold.spawn.aio(boot))

    def ended(self, link: ModalLink, why: str) -> None:
        """Note the end of a link, and with it of its worker."""
        self.links.discard(link)
        self._left.append(link.name)
        if link.hello and link.has_worker_ended:
            self.ends[link.hello["pid"]] = why

    async def control(self, verb: str, value: Any, boot: str) -> Any:
        """A word with the gateway itself."""
        return await self.app.gateway.control.remote.aio(boot, verb, value)

    async def runners(self) -> int:
        """How many containers run."""
        return int((await self.app.gateway.exchange.get_current_stats.aio()).num_total_runners)

    async def why_ended(self, pid: int) -> str | None:
        """Ask the container why a worker ended; if there is none, that is why."""
        if self.app.gateway is None:
            why = "the app was closed"
        elif not await self.runners():
            why = f"its container has ended: idle for {self.app.options.scaledown_window} s, or stopped at Modal"
        else:
            try:
                why = await self.control("why", pid, self.boots.get(pid, ""))
            except LookupError as error:
                why = explain(error)
        if why is not None:
            self.ends[pid] = why
        return why

    async def log_tail(self, nbytes: int) -> str:
        """The end of the worker's log, if a container runs."""
        if self.app.gateway is None or not await self.runners():
            return ""
        return str(await self.control("log", nbytes, ""))

    async def quit(self) -> None:
        """Close an app of this process, which ends."""
        self.app.gateway = None  # what ends now asks nothing more
        await asyncio.gather(*(link.abandon() for link in list(self.links)))
        await self.app.close()

    async def close(self) -> None:
        """Close an app of this process."""
        for link in list(self.links):
            link.end("its app was closed")
        await self.app.close()


_places: dict[tuple[ModalOptions, str], Place] = {}


def shared_place(spec: WorkerSpec, options: ModalOptions) -> Place:
    """The app of a spec in this process, closed when the process ends unless it is deployed."""
    try:
        from interp_kernel.backends.modal.app import ModalApp
    except ModuleNotFoundError as error:
        if error.name != "modal":
            raise
        raise SpecError("mode='modal' needs Modal's client. Install it: pip install 'interp-kernel[modal]'.") from None
    if not _places:
        atexit.register(close_all)
    key = options, spec.key
    if key not in _places:
        _places[key] = Place(ModalApp(spec, options))
    return _places[key]


def close_all() -> None:
    """End this process's own apps."""
    closing = [start(place.quit()) for place in _places.values()]
    deadline = time.monotonic() + END_S
    for each in closing:
        with suppress(Exception):  # Modal ends them by itself once this process is silent
            each.result(max(0.0, deadline - time.monotonic()))


# -------------------------------------------------------------------------------------------------- waits


class Ticker:
    """Shows how long a wait takes, second by second."""

    def __init__(self, on_event: OnEvent, text: str) -> None:
        """Nothing is shown yet."""
        self._on_event, self._text = on_event, text
        self._started, self._shown = time.monotonic(), 0.0

    def __call__(self) -> None:
        """Show the time so far, if that has not been done in the last second."""
        if time.monotonic() - self._shown > SHOWN_S:
            self._shown = time.monotonic()
            self._show(done=False)

    def end(self) -> None:
        """Take it away."""
        if self._shown:
            self._show(done=True)

    def _show(self, *, done: bool) -> None:
        event: Head = {"event": "progress", "id": self._text, "text": self._text, "n": None, "total": None}
        elapsed = time.monotonic() - self._started
        self._on_event({**event, "unit": "", "elapsed_s": elapsed, "done": done, "leave": False})


def wait(
    future: Future[T],
    tick: Callable[[], None] = lambda: None,
    stop_fd: int | None = None,
    if_stopped: str = "stopped; the app goes on starting",
) -> T:
    """The future's result; `tick` is called now and then meanwhile. A stop ends the wait, not the work."""
    ready, done = os.pipe()
    future.add_done_callback(lambda _: os.close(done))
    try:
        while not future.done():
            select.select([ready] if stop_fd is None else [ready, stop_fd], [], [], TICK_S)
            if is_readable(stop_fd):
                raise stopped(if_stopped)
            if not future.done():
                tick()
    finally:
        os.close(ready)
        if isinstance(tick, Ticker):
            tick.end()
    return future.result()


def ask(work: Coroutine[Any, Any, T], otherwise: Any) -> Any:
    """The answer to a question, or another value where Modal does not give it in time."""
    future = start(work)
    try:
        return future.result(ANSWER_S)
    except Exception:  # noqa: BLE001 - whatever Modal raises: the question is not worth an error
        future.cancel()
        return otherwise


def is_readable(fd: int | None) -> bool:
    """Whether a stop has come."""
    return fd is not None and bool(select.select([fd], [], [], 0)[0])
