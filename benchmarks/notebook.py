"""Functions as a notebook defines them, and kernels driven over Jupyter's protocol."""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from interp_kernel.client import InterpClient

OURS, PLAIN = "interp_kernel.kernel", "ipykernel_launcher"
WAIT_S = 120.0


def model_name() -> str:
    """The model of all measurements: the one in the package, or $INTERP_MODEL."""
    return os.environ.get("INTERP_MODEL", "demo")


def connected() -> InterpClient:
    """A client whose worker has loaded its model."""
    client = InterpClient(model_name=model_name())
    client.connect(lambda _: None)
    return client


def notebook_function(source: str, name: str) -> Any:
    """A function that a notebook cell defined: it belongs to `__main__`, and its text is known as a cell's is."""
    filename = f"/tmp/ipykernel_{os.getpid()}/{abs(hash(source))}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    module = types.ModuleType("__main__")
    exec(compile(source, filename, "exec"), vars(module))
    return vars(module)[name]


class Kernel:
    """A kernel process and a client of it."""

    def __init__(self, module: str = OURS, folder: str | None = None) -> None:
        """Start it and wait for its first kernel_info reply; `start_s` says how long that took."""
        self.folder = folder or tempfile.mkdtemp(prefix="bench")
        self.file = str(Path(self.folder, f"kernel-{module}-{time.time_ns()}.json"))
        write_connection_file(self.file)
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "-f", self.file],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "INTERP_MODEL": model_name()},
        )
        self.client = BlockingKernelClient()
        self.client.load_connection_file(self.file)
        self._greet()
        self.start_s = time.perf_counter() - started
        self.client.start_channels(hb=False, stdin=False)
        self.client.wait_for_ready(timeout=WAIT_S)

    def _greet(self) -> None:
        """Ask for kernel_info over a socket that tries again every 2 ms, where Jupyter's own waits 100."""
        context: zmq.Context[Any] = zmq.Context.instance()
        with context.socket(zmq.DEALER) as shell:
            shell.setsockopt(zmq.LINGER, 0)
            shell.setsockopt(zmq.RECONNECT_IVL, 2)
            shell.connect(f"tcp://{self.client.ip}:{self.client.shell_port}")
            self.client.session.send(shell, "kernel_info_request", {})
            if not shell.poll(int(WAIT_S * 1000)):
                raise TimeoutError(f"The kernel did not answer within {WAIT_S:g} s.")

    def run(self, code: str) -> float:
        """Run a cell; returns the seconds from the request until both the reply and `idle` are here.

        Raises:
            RuntimeError: The cell failed.
        """
        started = time.perf_counter()
        message_id = self.client.execute(code)
        while True:
            message = self.client.get_iopub_msg(timeout=WAIT_S)
            is_ours = message["parent_header"].get("msg_id") == message_id
            if is_ours and message["content"].get("execution_state") == "idle":
                break
        reply = self.client.get_shell_msg(timeout=WAIT_S)["content"]
        elapsed = time.perf_counter() - started
        if reply["status"] != "ok":
            raise RuntimeError(f"A cell failed: {reply.get('ename')}: {reply.get('evalue')}")
        return elapsed

    def value(self, expression: str) -> str:
        """Text of an expression in the kernel."""
        message_id = self.client.execute("", user_expressions={"it": expression}, store_history=False)
        while True:
            message = self.client.get_shell_msg(timeout=WAIT_S)
            if message["parent_header"].get("msg_id") == message_id:
                answer = message["content"]["user_expressions"]["it"]
                return str(answer["data"]["text/plain"] if answer["status"] == "ok" else answer["evalue"])

    def close(self) -> None:
        """End the process at once, as a restart does."""
        self.client.stop_channels()
        self.process.kill()
        self.process.wait()


@contextmanager
def kernel(module: str = OURS) -> Iterator[Kernel]:
    """A kernel that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        opened = Kernel(module, folder)
        try:
            yield opened
        finally:
            opened.close()


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6
