"""An agent for tests that are written as a person would tell them: one call after another, some in the background.

It is the SDK's own client over stdio, in an event loop of its own thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import ClientSession
from mcp.types import CallToolResult, ImageContent

from interp_kernel.mcp import sessions
from tests.helpers_mcp import server, text_of
from tests.helpers_worker import wait_until

Facts = dict[str, Any]


class Agent:
    """One client with its server; `session` is the one that it opened last."""

    def __init__(self, portal: BlockingPortal, client: ClientSession, workspace: Path) -> None:
        self.portal, self.client, self.workspace = portal, client, workspace
        self.session = ""
        self.server = newest_server()

    # ------------------------------------------------------------------------------------------ calls

    def ask(self, tool: str, **arguments: Any) -> CallToolResult:
        """The whole answer to a call."""
        answer: CallToolResult = self.portal.call(self.client.call_tool, tool, arguments)
        return answer

    def begin(self, tool: str, **arguments: Any) -> Future[CallToolResult]:
        """A call whose answer is not waited for."""
        return self.portal.start_task_soon(self.client.call_tool, tool, arguments)

    def call(self, tool: str, **arguments: Any) -> Facts:
        """Facts of a call that must not be refused."""
        answer = self.ask(tool, **arguments)
        assert not answer.isError, text_of(answer)
        return dict(answer.structuredContent or {})

    def read(self, tool: str, **arguments: Any) -> str:
        """What an agent reads of a call that must not be refused."""
        answer = self.ask(tool, **arguments)
        assert not answer.isError, text_of(answer)
        return text_of(answer)

    def refused(self, tool: str, **arguments: Any) -> str:
        """Why a call was refused."""
        answer = self.ask(tool, **arguments)
        assert answer.isError, text_of(answer)
        return text_of(answer)

    # --------------------------------------------------------------------------------------- notebooks

    def start(self, name: str = "study") -> Path:
        """Open a new session and go on with it; its notebook."""
        facts = self.call("start_new_session", experiment_name=name)
        self.session = facts["session_id"]
        return Path(facts["notebook_path"])

    def resume(self, path: str | Path, **arguments: Any) -> Facts:
        """Open a notebook that exists and go on with it."""
        facts = self.call("start_session_resume_notebook", notebook_path=str(path), **arguments)
        self.session = facts["session_id"]
        return facts

    def run(self, code: str, **arguments: Any) -> Facts:
        """Run a cell."""
        return self.call("execute_code", session_id=self.session, code=code, **arguments)

    def ok(self, code: str, **arguments: Any) -> str:
        """Text of a cell that must not fail."""
        facts = self.run(code, **arguments)
        assert facts["state"] == "done", facts
        return str(facts["text"])

    def begin_cell(self, code: str, **arguments: Any) -> str:
        """Start a cell that goes on in the background; its id."""
        facts = self.run(code, wait_s=0, **arguments)
        return str(facts["cell_id"])

    def wait(self, cell_id: str, **arguments: Any) -> Facts:
        """See the end of a cell."""
        return self.call("wait", session_id=self.session, cell_id=cell_id, **arguments)

    def info(self) -> Facts:
        """The session in facts."""
        return next(facts for facts in self.sessions() if facts["session_id"] == self.session)

    def sessions(self) -> list[Facts]:
        """All sessions in facts."""
        return list(self.call("list_sessions")["sessions"])

    def switch_to(self, path: Path) -> None:
        """Go on with the session of a notebook."""
        self.session = next(facts["session_id"] for facts in self.sessions() if facts["notebook_path"] == str(path))

    def shutdown(self) -> None:
        """End the session."""
        self.call("shutdown_session", session_id=self.session)


@contextmanager
def agent(workspace: Path, *options: str, **environment: str) -> Iterator[Agent]:
    """An agent with a server of its own; both end with the block, and their sessions live on."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(server(workspace, *options, **environment)) as client,
    ):
        yield Agent(portal, client, workspace)


@contextmanager
def ending_sessions() -> Iterator[None]:
    """Shut down what sessions are left after the block, whoever has begun them."""
    yield
    for facts in sessions.known():
        anyio.run(sessions.ask, facts["id"], "shutdown")


@contextmanager
def own_session(shared: Agent, name: str = "own") -> Iterator[Path]:
    """A session of its own for an agent that others use too; its notebook."""
    before = shared.session
    try:
        yield shared.start(name)
    finally:
        if shared.session in [facts["id"] for facts in sessions.known()]:
            shared.shutdown()
        shared.session = before


def newest_server() -> psutil.Process:
    """The server that this process started last."""
    servers = [child for child in psutil.Process().children() if "interp_kernel.cli" in child.cmdline()]
    return max(servers, key=psutil.Process.create_time)


def keeper_of(session: str) -> psutil.Process:
    """The process that keeps a session."""
    return psutil.Process(next(facts["pid"] for facts in sessions.known() if facts["id"] == session))


def images(answer: CallToolResult) -> list[ImageContent]:
    """Pictures of an answer."""
    return [block for block in answer.content if isinstance(block, ImageContent)]


def nbytes(answer: CallToolResult) -> int:
    """Bytes of everything that an answer says, as text and as facts."""
    return len(text_of(answer).encode()) + len(json.dumps(answer.structuredContent, ensure_ascii=False).encode())


# ---------------------------------------------------------------------------------------------- files


def cells(path: Path) -> list[Facts]:
    """Cells of a notebook file, texts joined; the file must be valid."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [dict(cell) for cell in notebook.cells]


def outputs_of(path: Path, cell_id: str) -> str:
    """Printed and shown text of a cell in a notebook file."""
    [cell] = [cell for cell in cells(path) if cell["id"] == cell_id]
    texts = [output.get("text") or output.get("data", {}).get("text/plain") or "" for output in cell["outputs"]]
    return "".join(texts)


def edit_by_hand(path: Path, change: Any) -> None:
    """Read, change and write a notebook as an editor does."""
    notebook = json.loads(path.read_text())
    change(notebook["cells"])
    path.write_text(json.dumps(notebook))


def log_of(path: Path) -> list[Facts]:
    """Entries of a notebook's log of attempts."""
    log = path.with_suffix(".attempts") / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


class Gate:
    """Holds a cell up at a known point until it is opened."""

    def __init__(self, folder: Path, name: str) -> None:
        self.reached, self.opened = folder / f"{name}.reached", folder / f"{name}.opened"

    @property
    def code(self) -> str:
        """What the cell does at that point: silent, and interruptible."""
        return (
            f"import pathlib, time\npathlib.Path({str(self.reached)!r}).touch()\n"
            f"while not pathlib.Path({str(self.opened)!r}).exists():\n    time.sleep(0.005)\n"
        )

    def wait(self) -> None:
        """Until the cell is there."""
        wait_until(self.reached.exists)

    def open(self) -> None:
        """Let the cell go on."""
        self.opened.touch()
