"""Drives a real kernel over Jupyter's own protocol and gathers what each cell puts out."""

from __future__ import annotations

import ast
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

OURS = "interp_kernel.kernel"
PLAIN = "ipykernel_launcher"
WAIT_S = 90.0
ANSI = re.compile(r"\x1b\[[0-9;]*m")
NOT_OUTPUT = ("status", "execute_input")


@dataclass
class Ran:
    """A cell that was sent, and what has come back for it so far."""

    id: str
    outputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reply: dict[str, Any] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return self.statuses[-1:] == ["idle"]

    def contents(self, kind: str) -> list[dict[str, Any]]:
        return [content for name, content in self.outputs if name == kind]

    def stream(self, name: str) -> str:
        return "".join(c["text"] for c in self.contents("stream") if c["name"] == name)

    @property
    def stdout(self) -> str:
        return self.stream("stdout")

    @property
    def stderr(self) -> str:
        return self.stream("stderr")

    @property
    def error(self) -> dict[str, Any]:
        """The error message; empty if the cell went well."""
        return next(iter(self.contents("error")), {})

    @property
    def ename(self) -> str:
        return str(self.error.get("ename", ""))

    @property
    def evalue(self) -> str:
        return str(self.error.get("evalue", ""))

    @property
    def traceback(self) -> str:
        return ANSI.sub("", "\n".join(self.error.get("traceback", [])))

    @property
    def shown(self) -> dict[str, Any]:
        """MIME bundle of the last expression."""
        return dict(next((c["data"] for c in self.contents("execute_result")), {}))

    @property
    def text(self) -> str:
        return str(self.shown.get("text/plain", ""))

    @property
    def value(self) -> Any:
        """The last expression, if its text is a literal."""
        assert not self.error, self.traceback
        return ast.literal_eval(self.text)


class Notebook:
    """One kernel and a client of it; messages that arrive are filed under the cell that they belong to."""

    def __init__(self, folder: Path, module: str = OURS, **environment: str) -> None:
        self.manager = KernelManager(kernel_name="python3")
        command = [sys.executable, "-m", module, "-f", "{connection_file}"]
        self.manager._kernel_spec = KernelSpec(argv=command, display_name="test", language="python")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, **environment})
        self.cells: dict[str, Ran] = {}
        self.status = ""  # the last that came, whatever it was about: what JupyterLab shows
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=WAIT_S)

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel()
        self._connect()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    @property
    def pid(self) -> int:
        provisioner: Any = self.manager.provisioner
        return int(provisioner.pid)

    # ------------------------------------------------------------------------------------------ cells

    def start(self, code: str) -> Ran:
        """Send a cell and return at once."""
        cell = Ran(self.client.execute(code))
        self.cells[cell.id] = cell
        return cell

    def run(self, code: str, timeout_s: float = WAIT_S) -> Ran:
        """Send a cell and wait for its end."""
        return self.finish(self.start(code), timeout_s)

    def ok(self, code: str) -> Ran:
        """Run a cell that must not fail."""
        cell = self.run(code)
        assert not cell.error, cell.traceback
        return cell

    def value(self, expression: str) -> Any:
        """Value of a local expression whose text is a literal."""
        return self.ok(expression).value

    def finish(self, cell: Ran, timeout_s: float = WAIT_S) -> Ran:
        self.wait(lambda: cell.is_idle, timeout_s)
        while not cell.reply:
            message = self.client.get_shell_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") == cell.id:
                cell.reply = message["content"]
        return cell

    def wait(self, is_reached: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Take in messages until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not is_reached():
            message = self.client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
            cell = self.cells.get(message["parent_header"].get("msg_id", ""))
            if message["msg_type"] == "status":
                self.status = message["content"]["execution_state"]
            if cell is None:
                continue
            if message["msg_type"] == "status":
                cell.statuses.append(self.status)
            elif message["msg_type"] not in NOT_OUTPUT:
                cell.outputs.append((message["msg_type"], message["content"]))

    def interrupt(self) -> None:
        """Jupyter's stop button."""
        self.manager.interrupt_kernel()

    # -------------------------------------------------------------------------------------- questions

    def complete(self, code: str, cursor: int | None = None, timeout_s: float = WAIT_S) -> list[str]:
        """Texts that the code up to the cursor would have after each completion."""
        cursor = len(code) if cursor is None else cursor
        content = self._ask(self.client.complete(code, cursor), timeout_s)
        return [code[: content["cursor_start"]] + match for match in content["matches"]]

    def inspect(self, code: str, timeout_s: float = WAIT_S) -> str:
        """Documentation of the name at the end of the code; empty if there is none."""
        content = self._ask(self.client.inspect(code, len(code)), timeout_s)
        assert content["found"] is bool(content["data"])  # front ends show nothing that was not `found`
        return ANSI.sub("", content["data"].get("text/plain", ""))

    def is_complete(self, code: str, timeout_s: float = WAIT_S) -> str:
        """What the kernel says about whether the code could run as it stands."""
        return str(self._ask(self.client.is_complete(code), timeout_s)["status"])

    def _ask(self, message_id: str, timeout_s: float) -> dict[str, Any]:
        while True:
            message = self.client.get_shell_msg(timeout=timeout_s)
            parent = message["parent_header"].get("msg_id")
            if parent == message_id:
                return dict(message["content"])
            if parent in self.cells:
                self.cells[parent].reply = message["content"]


@contextmanager
def notebook(folder: Path, module: str = OURS, **environment: str) -> Iterator[Notebook]:
    """A kernel that works in `folder`, ended with the block."""
    opened = Notebook(folder, module, **environment)
    try:
        yield opened
    finally:
        opened.close()


def remote(body: str, options: str = "") -> str:
    """Text of a remote cell."""
    return f"%%remote {options}".rstrip() + f"\n{body}"
