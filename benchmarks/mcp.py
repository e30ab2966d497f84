"""What an agent waits for and reads, beside jupyter-mcp-server from its own package.

That peer needs other versions of `mcp` than this environment has, so it is looked for in a virtual environment that
the variable BENCH_JUPYTER_MCP names:

    python -m venv DIR && DIR/bin/pip install jupyter-mcp-server jupyterlab && export BENCH_JUPYTER_MCP=DIR
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult

from benchmarks.measure import Figure, Samples, Section, interleaved, median, scaled

CELLS = int(os.environ.get("BENCH_MCP_CELLS", "40"))
PEER = "jupyter-mcp-server"
OURS = "interp-kernel"
PRINTS = "import time\nfor n in range(300):\n    print(n, flush=True)"
BIG_BYTES = 5_000_000
FAILING = 400
HANG_S = 20.0
MS = 1e3


class Client:
    """The SDK's client of one server, with calls that wait."""

    def __init__(self, portal: BlockingPortal, session: ClientSession) -> None:
        self.portal, self.session = portal, session

    def call(self, tool: str, **arguments: Any) -> CallToolResult:
        answer: CallToolResult = self.portal.call(self.session.call_tool, tool, arguments)
        return answer

    def begin(self, tool: str, **arguments: Any) -> Any:
        return self.portal.start_task_soon(self.session.call_tool, tool, arguments)


@contextmanager
def client_of(command: list[str], folder: Path) -> Iterator[Client]:
    """Start a server and say hello to it; it ends with the block."""
    parameters = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ), cwd=folder)
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        log = stack.enter_context((folder / "server.log").open("a"))
        reader, writer = stack.enter_context(portal.wrap_async_context_manager(stdio_client(parameters, errlog=log)))
        session = portal.call(lambda: _session(reader, writer))
        stack.enter_context(portal.wrap_async_context_manager(session))
        portal.call(session.initialize)
        yield Client(portal, session)


async def _session(reader: Any, writer: Any) -> ClientSession:
    return ClientSession(reader, writer)


class Ours:
    """A session of this project's server."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.session = self._facts(client.call("start_new_session", experiment_name="bench"))["session_id"]

    @staticmethod
    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "interp_kernel.cli", "mcp", "--workspace", str(folder)]

    @staticmethod
    def _facts(answer: CallToolResult) -> dict[str, Any]:
        assert not answer.isError, answer
        return dict(answer.structuredContent or {})

    def run(self, code: str, **arguments: Any) -> CallToolResult:
        return self.client.call("execute_code", session_id=self.session, code=code, **arguments)

    def begin(self, code: str) -> Any:
        return self.client.begin("execute_code", session_id=self.session, code=code)

    def ask(self) -> CallToolResult:
        """A second call, which needs the notebook."""
        return self.client.call("read_notebook", session_id=self.session)

    def fail(self) -> CallToolResult:
        return self.client.call("edit_cell", session_id=self.session, cell_id="nobody", source="1")

    def open_big(self) -> None:
        """Go on in a notebook of 5 MB."""
        path = self.folder / "big.ipynb"
        path.write_text(json.dumps(big_notebook()))
        facts = self._facts(self.client.call("start_session_resume_notebook", notebook_path=path.name, rerun=False))
        self.session = facts["session_id"]

    def close(self) -> None:
        for facts in self._facts(self.client.call("list_sessions"))["sessions"]:
            self.client.call("shutdown_session", session_id=facts["session_id"])


class Theirs:
    """A notebook of jupyter-mcp-server, which a running JupyterLab holds."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        client.call("use_notebook", notebook_name="bench", notebook_path="bench.ipynb", mode="create")

    def run(self, code: str, **arguments: Any) -> CallToolResult:
        return self.client.call("insert_execute_code_cell", cell_index=-1, cell_source=code, **arguments)

    def begin(self, code: str) -> Any:
        return self.client.begin("insert_execute_code_cell", cell_index=-1, cell_source=code)

    def ask(self) -> CallToolResult:
        return self.client.call("read_notebook", notebook_name="bench")

    def fail(self) -> CallToolResult:
        return self.client.call("read_cell", cell_index=99_999)


@contextmanager
def peer(folder: Path) -> Iterator[Theirs | None]:
    """The peer with its JupyterLab, or None where it is not installed."""
    home = os.environ.get("BENCH_JUPYTER_MCP", "")
    if not Path(home, "bin", PEER).exists():
        print(f"{PEER} is not measured: BENCH_JUPYTER_MCP names no environment that has it.", file=sys.stderr)
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}", "benchmark"
    lab = [f"{home}/bin/jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    lab += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("w") as log, subprocess.Popen(lab, cwd=folder, stdout=log, stderr=log) as process:
        try:
            wait_for(f"{url}/api/status?token={token}")
            command = [f"{home}/bin/{PEER}", "start", "--transport", "stdio", "--jupyter-url", url]
            with client_of([*command, "--jupyter-token", token], folder) as client:
                yield Theirs(client, folder)
        finally:
            process.terminate()


def wait_for(url: str) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer within a minute.")


def measure() -> Section:
    """All figures that agents feel."""
    with tempfile.TemporaryDirectory(prefix="ikm", dir="/tmp") as name, ExitStack() as stack:
        ours_folder, peer_folder = Path(name, "ours"), Path(name, "peer")
        ours_folder.mkdir()
        peer_folder.mkdir()
        client = stack.enter_context(client_of(Ours.command(ours_folder), ours_folder))
        ours = Ours(client, ours_folder)
        stack.callback(ours.close)
        theirs = stack.enter_context(peer(peer_folder))
        samples = waits(ours, theirs)
        printed = nbytes(ours.run("print('x' * 3_000_000)"))
        hangs = failing(ours)
        samples |= scaled(prints(ours), MS)
        samples |= {f"{OURS}: kernel's death": [death(ours) * MS]}
        samples |= scaled(starts(ours_folder), MS)
        notes = [peer_note(theirs)] if theirs else []
    return Section("Agents", HOW, "ms", samples, figures(samples, printed, hangs), notes)


def waits(ours: Ours, theirs: Theirs | None) -> Samples:
    """A trivial cell, and a second call while a cell runs, in turn."""
    servers: dict[str, Ours | Theirs] = {OURS: ours, **({PEER: theirs} if theirs else {})}
    for server in servers.values():
        server.run("1 + 1")
    samples = interleaved({f"{OURS}: trivial cell": lambda: ours.run("1 + 1")}, rounds=CELLS)
    if theirs:
        samples |= interleaved({f"{PEER}: trivial cell": lambda: theirs.run("1 + 1")}, rounds=max(3, CELLS // 8))
    for name, server in servers.items():
        running = server.begin("import time\ntime.sleep(3)")
        time.sleep(1.0)  # both have begun to run the cell by then
        second = interleaved({f"{name}: second call while a cell runs": server.ask}, rounds=10)
        assert not running.done(), f"the cell of {name} ended before the calls did"
        running.result(HANG_S)
        samples |= second
    return scaled(samples, MS)


def prints(ours: Ours) -> Samples:
    """300 flushed prints, in an empty notebook and in one of 5 MB, in turn."""
    empty = Ours(ours.client, ours.folder).session
    ours.open_big()
    full = ours.session

    def run_in(session: str) -> Callable[[], None]:
        def run() -> None:
            ours.session = session
            answer = ours.run(PRINTS)
            assert "299" in str(answer.content), answer

        return run

    places = {f"{OURS}: 300 prints, empty": run_in(empty), f"{OURS}: 300 prints, 5 MB": run_in(full)}
    for run in places.values():
        run()
    return interleaved(places, rounds=max(3, CELLS // 8))


def death(ours: Ours) -> float:
    """Seconds until the end of a kernel is told."""
    ours.run("import os")
    started = time.perf_counter()
    answer = ours.run("os._exit(3)")
    seconds = time.perf_counter() - started
    assert "exited with status 3" in str(answer.content), answer
    return seconds


def failing(server: Ours | Theirs) -> int:
    """How many of 400 calls that fail are not answered in time."""
    hangs = 0
    for _ in range(FAILING):
        started = time.perf_counter()
        server.fail()
        hangs += time.perf_counter() - started > HANG_S
    return hangs


def starts(folder: Path) -> Samples:
    """From the start of the server's process to its first answer of a tool."""
    started = []
    for _ in range(max(3, CELLS // 8)):
        begin = time.perf_counter()
        with client_of(Ours.command(folder), folder) as client:
            client.call("list_sessions")
            started.append(time.perf_counter() - begin)
    return {f"{OURS}: server's start to first answer": started}


def peer_note(theirs: Theirs) -> str:
    """What the peer does with a long print, a kernel that ends, and calls that fail."""
    printed = nbytes(theirs.run("print('x' * 600_000)"))
    hangs = failing(theirs)
    begun = time.perf_counter()
    answer = theirs.run("import os; os._exit(3)", timeout=10)
    told = " ".join(" ".join(block.text for block in answer.content if block.type == "text").split())[:120]
    return (
        f"{PEER}: 600 kB printed reach the agent as {printed / 1e3:,.0f} kB (3 MB run into its server's rate limit); "
        f"{hangs} of {FAILING} failing calls hung; a kernel that exits was answered after "
        f"{time.perf_counter() - begun:.1f} s of its timeout of 10 s with `{told}`."
    )


def figures(samples: Samples, printed: int, hangs: int) -> list[Figure]:
    """The promises."""
    typical = {name: median(values) for name, values in samples.items()}
    ratio = typical[f"{OURS}: 300 prints, 5 MB"] / typical[f"{OURS}: 300 prints, empty"]
    return [
        Figure("trivial cell", typical[f"{OURS}: trivial cell"], 15, "ms"),
        Figure("second call while a cell runs", typical[f"{OURS}: second call while a cell runs"], 50, "ms"),
        Figure("300 flushed prints in a notebook of 5 MB, against an empty one", ratio, 1.5, "x"),
        Figure("a print of 3 MB, as the agent gets it", printed / 1e3, 20, "kB"),
        Figure("a kernel's death is told", typical[f"{OURS}: kernel's death"] / MS, 1, "s"),
        Figure(f"{FAILING} failing calls that hang", hangs, 0, ""),
        Figure("server's start to the first answer", typical[f"{OURS}: server's start to first answer"] / MS, 1, "s"),
    ]


def nbytes(answer: CallToolResult) -> int:
    """Bytes of all text of an answer, in its facts too."""
    texts = [block.text for block in answer.content if block.type == "text"]
    return sum(len(text.encode()) for text in texts) + len(json.dumps(answer.structuredContent or {}).encode())


def big_notebook() -> dict[str, Any]:
    """A notebook of 5 MB, in a hundred cells with output."""
    output = {"output_type": "stream", "name": "stdout", "text": "0123456789\n" * (BIG_BYTES // 1100)}
    empty: dict[str, Any] = {"cell_type": "code", "metadata": {}, "source": "1", "execution_count": None}
    cells = [{**empty, "id": f"cell{n}", "outputs": [output]} for n in range(100)]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


HOW = """\
Calls of the MCP SDK's client over stdio, from the call to its whole answer; each cell is saved in its notebook. The
peer runs its cells on a JupyterLab of its own package."""
