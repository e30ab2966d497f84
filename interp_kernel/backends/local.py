"""A worker that is a process on this machine, in a session of its own, found through a rendezvous folder.

ROOT/KEY/            mode 0700, KEY is the spec's key
    lock             held while someone starts the worker, so that exactly one starts
    spec.json        what to load, how long to stay, where the socket is
    socket           the worker listens here before it loads the model
    worker.log       its own output, native crashes included
    exit-PID.json    why a worker ended, written by its supervisor
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from interp_kernel.backends import HELLO_S, Message, OnEvent
from interp_kernel.errors import SpecError, WorkerError, WorkerRefusedError, stopped
from interp_kernel.protocol import PROTOCOL, Buffer, Channel, Head, Packed, peer
from interp_kernel.spec import WorkerSpec

SOCKET_PATH_LIMIT = 100  # bytes; the system's own limit is 108 on Linux and 104 on macOS
EXIT_NOTE_S = 1.0
NOT_FOR_WORKERS = ("JPY_PARENT_PID", "JPY_SESSION_NAME", "PYTHONSTARTUP")


class LocalBackend:
    """Finds, starts and ends the worker of one spec on this machine."""

    def __init__(self, spec: WorkerSpec, scaledown_window: float = 300.0, min_containers: int = 0) -> None:
        """Nothing is started yet; the last two are as in `Service`."""
        self.spec = spec
        self.scaledown_window, self.min_containers = scaledown_window, min_containers
        self.folder = private_folder(runtime_root() / spec.key)

    def open(
        self, client: str, on_event: OnEvent = lambda _: None, stop_fd: int | None = None
    ) -> tuple[LocalLink, bool]:
        """See `Backend.open`; the start takes a moment, and the load is an event of the worker's."""
        if (link := self.attach(client)) is not None:
            return link, False
        with self._lock():
            if (link := self.attach(client)) is not None:
                return link, False  # somebody else was first
            self._start()
            link = self.attach(client)
        if link is None:
            raise WorkerError(f"The worker ended right after its start. Its log:\n{self.log_tail(2000)}")
        return link, True

    def start(self) -> int:
        """Start the worker, which must not run, without a connection to it; returns its process id."""
        with self._lock():
            self._start()
        pid = listener(self.folder)
        if pid is None:
            raise WorkerError(f"The worker ended right after its start. Its log:\n{self.log_tail(2000)}")
        return pid

    def attach(self, client: str, within_s: float | None = None) -> LocalLink | None:
        """See `Backend.attach`."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(socket_path(self.folder)))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        pid, _ = peer(sock)
        try:
            return LocalLink(sock, client, self.spec.key, HELLO_S if within_s is None else within_s)
        except (EOFError, ConnectionError):
            deadline = time.monotonic() + EXIT_NOTE_S
            while process_exists(pid):  # else it ended between the two calls, or is about to
                if time.monotonic() > deadline:  # never start a second one beside it
                    raise WorkerRefusedError("The worker is out of descriptors or memory; try again later.") from None
                time.sleep(0.01)
            return None

    def why_ended(self, pid: int) -> str | None:
        """See `Backend.why_ended`; waits up to a second for the supervisor's note."""
        deadline = time.monotonic() + EXIT_NOTE_S
        while True:
            if ended := read_json(self.folder / f"exit-{pid}.json"):
                return str(ended["reason"])
            if process_exists(pid):
                return None
            if time.monotonic() > deadline:
                return "it is gone and its supervisor left no note (both were killed)"
            time.sleep(0.01)

    def kill(self, pid: int) -> None:
        """See `Backend.kill`."""
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)

    def log_tail(self, nbytes: int) -> str:
        """See `Backend.log_tail`."""
        return tail(self.folder / "worker.log", nbytes)

    def release(self) -> None:
        """See `Backend.release`: this machine stays."""

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start(self) -> None:
        day_ago = time.time() - 86_400
        old = [
            p
            for p in (*self.folder.glob("exit-*.json"), *self.folder.glob("output-*.log"))
            if p.stat().st_mtime < day_ago
        ]
        for stale in (*old, self.folder / "reason"):
            stale.unlink(missing_ok=True)
        socket_path(self.folder).unlink(missing_ok=True)
        settings = {
            "spec": self.spec.to_json(),
            "scaledown_window": self.scaledown_window,
            "min_containers": self.min_containers,
            "socket": str(socket_path(self.folder)),
        }
        (self.folder / "spec.json").write_text(json.dumps(settings))
        ready, ready_end = os.pipe()
        with (self.folder / "worker.log").open("wb") as log:
            command = [sys.executable, "-P", "-m", "interp_kernel.worker", str(self.folder), str(ready_end)]
            launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Threads that spin while they wait take the cores from each other: many times slower on a busy machine.
                env={
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **{k: v for k, v in os.environ.items() if k not in NOT_FOR_WORKERS},
                },
                cwd=self.folder,
                pass_fds=[ready_end],
                start_new_session=True,  # Jupyter signals and kills the kernel's whole process group
            )
        os.close(ready_end)
        launcher.wait()
        with os.fdopen(ready, "rb") as signalled:
            if not signalled.read():  # blocks until the worker listens, or has ended
                raise WorkerError(f"The worker could not be started. Its log:\n{self.log_tail(4000)}")


class LocalLink:
    """A connection over the worker's Unix socket."""

    def __init__(self, sock: socket.socket, client: str, key: str, within_s: float) -> None:
        """Make sure that the process there is this user's, then say hello.

        Args:
            sock: Connected to it.
            client: Who we are.
            key: The worker's, for what its user is told to do.
            within_s: How long it may take to answer.

        Raises:
            WorkerRefusedError: Another user's process listens there, or one that speaks another protocol.
        """
        self._channel = Channel(sock)
        self.is_untaken = False
        self._advice = f"Stop it (`interp-kernel worker stop {key}`) and run the cell again."
        try:
            self._check_peer()
            self.hello: Head = self._say_hello(client, within_s)
        except BaseException:
            self.close()
            raise

    def pack(self, head: Head, frames: Sequence[Buffer], known: Collection[str]) -> Packed:
        """See `Link.pack`."""
        return Packed(head, frames, known)

    def send(self, packed: Packed, wake_fd: int | None = None) -> None:
        """See `Link.send`."""
        try:
            if self._channel.send(packed, wake_fd):
                return
        except OSError:
            self.is_untaken = packed.head["verb"] == "submit"  # it is not whole, so nobody can have read it
            raise
        self.close()  # what was sent of it means nothing without the rest
        raise stopped("stopped while the worker, inside one long operation, took nothing; it goes on without this call")

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> Message | None:
        """See `Link.receive`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._channel.received()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._channel.arrives(left, wake_fd):
                return None
            self._channel.fill()
        return message

    def close(self) -> None:
        """See `Link.close`."""
        self._channel.close()

    def _check_peer(self) -> None:
        pid, uid = peer(self._channel.sock)
        if uid != os.getuid():
            raise WorkerRefusedError(
                f"The process on {self._channel.sock.getpeername()} belongs to user {uid}, not to you ({os.getuid()}). "
                "Nothing was sent to it. Remove the socket, or set INTERP_RUNTIME_DIR to a folder of your own."
            )
        if not process_exists(pid):
            raise EOFError("the worker is gone, and a child of it keeps its socket")

    def _say_hello(self, client: str, within_s: float) -> Head:
        self.send(Packed({"verb": "hello", "client": client}))
        try:
            message = self.receive(within_s)
            hello: Head = {} if message is None else message[0]["value"]
            theirs = hello.get("protocol")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise WorkerRefusedError(
                f"The process on {self._channel.sock.getpeername()} does not answer as a worker does. {self._advice}"
            ) from None
        if message is None:
            raise WorkerRefusedError(f"The worker did not answer within {within_s:g} s. {self._advice}")
        if theirs != PROTOCOL:
            raise WorkerRefusedError(
                f"The worker speaks protocol {theirs!r} and this notebook {PROTOCOL}: it was started by "
                f"another version of interp-kernel. {self._advice}"
            )
        return hello


# ----------------------------------------------------------------------------------------------- folders


def runtime_root() -> Path:
    """Folder of all rendezvous folders: $INTERP_RUNTIME_DIR, or under Jupyter's runtime folder."""
    if given := os.environ.get("INTERP_RUNTIME_DIR"):
        return private_folder(Path(given))
    from jupyter_core.paths import jupyter_runtime_dir

    return private_folder(Path(jupyter_runtime_dir()) / "interp-kernel")


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter; refuse one that belongs to somebody else."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid():
        raise WorkerRefusedError(
            f"{path} is a link or belongs to user {status.st_uid}, so others could pose as a worker there. "
            "Remove it, or set INTERP_RUNTIME_DIR to a folder of your own."
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def socket_path(folder: Path) -> Path:
    """Where the worker listens: in its folder, or in a short one if the path would be too long for a socket."""
    path = folder / "socket"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    short = private_folder(Path(tempfile.gettempdir()) / f"interp-{os.getuid()}")
    return short / hashlib.sha256(os.fsencode(path)).hexdigest()[:24]


def tail(path: Path, nbytes: int) -> str:
    """The end of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - nbytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def read_json(path: Path) -> Head:
    """A JSON file, or nothing if it is not there."""
    try:
        content: Head = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content


def process_exists(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


# ----------------------------------------------------------------------------------- all workers (CLI)


@dataclass(frozen=True)
class WorkerStatus:
    """One line of `interp-kernel worker list`."""

    key: str
    model_name: str
    state: str  # loading, idle, busy, dead, or unknown: something is there that does not speak this protocol
    folder: Path
    pid: int | None = None
    started: float | None = None  # seconds since the epoch
    clients: int = 0
    memory_bytes: int | None = None  # resident
    exit_reason: str | None = None


def list_workers() -> list[WorkerStatus]:
    """Every worker of this user that runs, and why the others ended."""
    return [worker_status(path.parent) for path in sorted(runtime_root().glob("*/spec.json"))]


def worker_status(folder: Path) -> WorkerStatus:
    """Ask the worker of one folder how it is."""
    settings = read_json(folder / "spec.json").get("spec", {})
    name = str(settings.get("model_name", "demo"))
    try:
        spec = WorkerSpec.from_json(settings)
        if spec.key != folder.name:
            raise SpecError(f"{folder / 'spec.json'} is damaged, or another version's.")
    except SpecError as error:
        return WorkerStatus(folder.name, name, "unknown", folder, listener(folder), exit_reason=str(error))
    try:
        link = LocalBackend(spec).attach("interp-cli")
    except WorkerRefusedError as refusal:
        return WorkerStatus(folder.name, spec.model_name, "unknown", folder, listener(folder), exit_reason=str(refusal))
    if link is None:
        notes = sorted(folder.glob("exit-*.json"), key=lambda path: path.stat().st_mtime)
        reason = read_json(notes[-1]).get("reason") if notes else None
        return WorkerStatus(folder.name, spec.model_name, "dead", folder, exit_reason=reason)
    link.close()
    hello = link.hello
    started = (folder / "spec.json").stat().st_mtime
    clients = hello["clients"] - 1  # without this question itself
    memory = resident_bytes(hello["pid"])
    return WorkerStatus(folder.name, spec.model_name, hello["state"], folder, hello["pid"], started, clients, memory)


def listener(folder: Path) -> int | None:
    """Id of the process that listens in a folder, if there is one of this user's, whatever protocol it speaks."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(socket_path(folder)))
            pid, uid = peer(sock)
    except OSError:
        return None
    return pid if uid == os.getuid() else None


def stop_worker(key: str, timeout_s: float = 10.0) -> None:
    """End a worker; its handles are lost.

    Args:
        key: Its key, or the start of it.
        timeout_s: Time for it to end by itself before it is killed.

    Raises:
        WorkerError: There is no such worker, or it does not end.
    """
    status = worker_status(find_folder(key))
    if status.pid is None:
        return
    os.kill(status.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while process_exists(status.pid):
        if time.monotonic() > deadline:
            os.kill(status.pid, signal.SIGKILL)
            deadline += timeout_s
        time.sleep(0.01)


def log_path(key: str) -> Path:
    """The log file of a worker, by the start of its key."""
    return find_folder(key) / "worker.log"


def find_folder(key: str) -> Path:
    """The rendezvous folder whose name begins with `key`."""
    found = [p.parent for p in runtime_root().glob("*/spec.json") if p.parent.name.startswith(key)]
    if len(found) != 1:
        known = ", ".join(p.parent.name for p in runtime_root().glob("*/spec.json")) or "none"
        raise WorkerError(f"{len(found)} workers have a key that begins with {key!r}; those that exist: {known}.")
    return found[0]


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process, where the system tells it."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return None
