"""What the control plane knows. All of it belongs to one event loop, so there are no locks."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_pb2

Result = api_pb2.GenericResult
Token = tuple[str, str]
Table = Mapping[str, Callable[..., Any]]


class Signal:
    """Wakes all who wait for it."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def fire(self) -> None:
        """Wake everybody."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until it fires; False at the timeout."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait_for(future, max(0.0, timeout_s))
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(future)
        return True


@dataclass(repr=False)
class App:
    """An app of a client, ephemeral or deployed."""

    id: str
    name: str
    environment: str
    state: api_pb2.AppState.ValueType
    layout: api_pb2.AppLayout = field(default_factory=api_pb2.AppLayout)
    logs: list[api_pb2.TaskLogsBatch] = field(default_factory=list)
    signal: Signal = field(default_factory=Signal)
    is_done: bool = False
    last_heartbeat: float = field(default_factory=time.monotonic)
    created: float = field(default_factory=time.time)


@dataclass(eq=False, repr=False)
class Function:
    """A function or class, or a variant of one with parameters or options of its own: a pool of containers."""

    id: str
    app: App
    definition: api_pb2.Function = field(default_factory=api_pb2.Function)
    metadata: api_pb2.FunctionHandleMetadata = field(default_factory=api_pb2.FunctionHandleMetadata)
    base: Function | None = None
    serialized_params: bytes = b""
    queue: deque[Input] = field(default_factory=deque)
    tasks: dict[str, Task] = field(default_factory=dict)
    signal: Signal = field(default_factory=Signal)
    start_failures: int = 0


@dataclass(eq=False, repr=False)
class Input:
    """One input of a call."""

    id: str
    index: int
    call: Call
    payload: api_pb2.FunctionInput
    attempt: int = 0  # raised by a retry that the client or the policy asked for
    deliveries: int = 0  # raised each time a container takes it
    status: str = "queued"  # queued, running, done
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False, repr=False)
class Call:
    """A `.remote()`, `.spawn()` or `.map()`."""

    id: str
    function: Function
    invocation: api_pb2.FunctionCallInvocationType.ValueType
    inputs: dict[str, Input] = field(default_factory=dict)
    outputs: list[api_pb2.FunctionGetOutputsItem] = field(default_factory=list)
    signal: Signal = field(default_factory=Signal)
    is_cancelled: bool = False
    last_poll: float = field(default_factory=time.monotonic)

    @property
    def unfinished(self) -> int:
        """How many of its inputs have no output yet."""
        return sum(item.status != "done" for item in self.inputs.values())


@dataclass(eq=False, repr=False)
class Task:
    """A container: one process of modal's own entrypoint, with a socket of its own by which it is known."""

    id: str
    function: Function
    process: asyncio.subprocess.Process | None = None
    server: Server | None = None
    running: dict[str, Input] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)  # inputs whose cancellation it has not been told yet
    signal: Signal = field(default_factory=Signal)
    idle_since: float = field(default_factory=time.monotonic)
    asking: int = 0  # requests for an input that are open
    is_ready: bool = False  # it has asked for an input, so its imports and @enter are done
    is_draining: bool = False
    result: api_pb2.GenericResult | None = None
    log: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    exit_code: int | None = None
    end_reason: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.exit_code is None

    @property
    def pid(self) -> int:
        """Process id of its entrypoint."""
        assert self.process is not None
        return self.process.pid


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the next request of one RPC."""

    status: Status
    message: str
    is_after: bool  # the request was carried out, and only its answer is lost

    def error(self) -> GRPCError:
        """As the client sees it."""
        return GRPCError(self.status, self.message)


@dataclass(kw_only=True)
class Settings:
    """How the plane behaves; all of it may be changed while it runs.

    Attributes:
        python: Interpreter of the containers.
        token: The token that is accepted.
        python_path: Folders that every container imports from, before what is installed.
        environment: More variables of every container.
        max_containers: For functions that name no limit.
        time_scale: Shortens the limits that functions ask for: scaledown window, timeout, start-up timeout.
        rpc_latency_s: Added to every RPC of the client.
        redeliveries: How often an input is given to another container after one that died with it.
        abandon_s: Calls that nobody has polled for so long are cancelled, as the real server does; None: never.
        cancel_grace_s: A container that has not ended a cancelled input by then is killed.
        silence_s: An ephemeral app without a heartbeat of its client for so long is stopped.
        image_error: Every image build fails with this.
    """

    python: str = sys.executable
    token: Token = ("ak-loopback", "as-loopback")
    python_path: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    max_containers: int = 4
    time_scale: float = 1.0
    rpc_latency_s: float = 0.0
    redeliveries: int = 3
    abandon_s: float | None = None
    cancel_grace_s: float = 10.0
    silence_s: float = 60.0
    image_error: str = ""


class Plane:
    """The state of the control plane."""

    def __init__(
        self, settings: Settings, folder: Path, table: Table, container_table: Callable[[Task], Table]
    ) -> None:
        """Must be made in the event loop that it belongs to.

        Args:
            settings: How it behaves.
            folder: Where containers and volumes have their files.
            table: The RPCs that clients and containers may send.
            container_table: Gives those that only one container may send.
        """
        self.settings, self.folder = settings, folder
        self.table, self.container_table = table, container_table
        self.url = self.blob_url = ""
        self.is_closing = False
        self.may_start = asyncio.Event()  # cleared, containers are asked for but none comes up
        self.may_start.set()
        self.apps: dict[str, App] = {}
        self.deployed: dict[tuple[str, str], App] = {}
        self.functions: dict[str, Function] = {}
        self.variants: dict[tuple[str, bytes, bytes, bytes], Function] = {}
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, Input] = {}
        self.tasks: dict[str, Task] = {}
        self.images: dict[str, api_pb2.Image] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.named: dict[tuple[str, str, str], str] = {}  # (kind, environment, name) -> id
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.rpc_count: Counter[str] = Counter()
        self.unimplemented: Counter[str] = Counter()
        self.bytes_in = 0  # what clients have sent, blobs included
        self.failures: list[BaseException] = []
        self.jobs: set[asyncio.Task[None]] = set()
        self._tag, self._count = uuid.uuid4().hex[:8], itertools.count(1)

    def new_id(self, kind: str) -> str:
        """An id in Modal's form, which no other plane of this machine gives: containers are killed by it."""
        return f"{kind}-{self._tag}{next(self._count):06d}"

    def start_job(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the RPCs; what it raises fails the test."""
        job = asyncio.get_running_loop().create_task(work)
        self.jobs.add(job)
        job.add_done_callback(self._end_job)

    def _end_job(self, job: asyncio.Task[None]) -> None:
        self.jobs.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            self.failures.append(error)


def not_found(what: str) -> GRPCError:
    """The answer for something that is not there."""
    return GRPCError(Status.NOT_FOUND, f"{what} not found")
