"""Sessions: found by every server, taken over alive, ended when idle, on our kernels and on a Jupyter server's."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from interp_kernel.backends.local import process_exists
from interp_kernel.cli import main
from interp_kernel.errors import SessionError
from interp_kernel.mcp import sessions
from interp_kernel.mcp.kernels import LocalKernel, Message
from tests.conftest import processes_of
from tests.helpers_agent import Agent, Gate, agent, cells, ending_sessions, log_of
from tests.helpers_lab import lab_server, write_notebook
from tests.helpers_mcp import call, read
from tests.helpers_worker import wait_until


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ending_sessions():
        yield tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def opened(workspace: Path) -> Iterator[Agent]:
    with agent(workspace) as made:
        yield made


@pytest.fixture(scope="module")
def other(workspace: Path) -> Iterator[Agent]:
    """An agent of a second server."""
    with agent(workspace) as made:
        yield made


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path, "gate")


def keepers() -> list[psutil.Process]:
    found = processes_of(os.environ["INTERP_RUNTIME_DIR"])
    return [process for process in found if "interp_kernel.mcp.keeper" in process.cmdline()]


# -------------------------------------------------------------------------------------------- finding


def test_start_of_the_server_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport interp_kernel.mcp.keeper\n"
        "from interp_kernel.mcp.server import Server, Settings\nServer(Settings(Path()))\n"
        "print(*{'torch', 'transformers', 'papermill', 'modal', 'numpy', 'PIL', 'rfc3987_syntax'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == ""


def test_session_is_known_to_every_server_and_shared(opened: Agent, other: Agent, gate: Gate) -> None:
    path = opened.start("shared")
    cell = opened.begin_cell(f"x = 1\n{gate.code}print('here')")
    gate.wait()
    [facts] = [row for row in other.call("list_sessions")["sessions"] if row["session_id"] == opened.session]
    assert (facts["notebook_path"], facts["running_cell_id"], facts["kernel"]) == (str(path), cell, "busy")
    gate.open()
    assert other.call("wait", session_id=opened.session, cell_id=cell)["text"] == "here"
    assert opened.ok("x") == "1"
    opened.shutdown()
    assert opened.call("list_sessions")["sessions"] == []
    assert f"'{opened.session}' is not known" in opened.refused("wait", session_id=opened.session)


def test_live_kernel_is_taken_over_and_runs_nothing_again(opened: Agent, other: Agent) -> None:
    path = opened.start("alive")
    opened.run("import itertools\ncount = itertools.count()")
    opened.run("next(count)")
    text = other.read("start_session_resume_notebook", notebook_path=path.name)
    assert "was alive and is taken over; nothing was run again" in text
    assert opened.session in text
    assert opened.ok("next(count)") == "1"
    opened.shutdown()


def test_servers_that_open_a_notebook_at_once_get_one_session(opened: Agent, other: Agent) -> None:
    path = opened.start("race")
    opened.shutdown()
    asked = {"notebook_path": path.name, "rerun": False}
    starts = [one.begin("start_session_resume_notebook", **asked) for one in (opened, other)]
    facts = [start.result().structuredContent or {} for start in starts]
    assert facts[0]["session_id"] == facts[1]["session_id"]
    other.call("shutdown_session", session_id=facts[0]["session_id"])


def test_agents_that_start_at_once_get_notebooks_of_their_own(opened: Agent, other: Agent) -> None:
    starts = [one.begin("start_new_session", experiment_name="same") for one in (opened, other)]
    facts = [start.result().structuredContent or {} for start in starts]
    assert len({row["notebook_path"] for row in facts}) == len({row["session_id"] for row in facts}) == 2
    for row in facts:
        other.call("shutdown_session", session_id=row["session_id"])


def test_continued_notebook_has_a_kernel_of_its_own(opened: Agent) -> None:
    path = opened.start("original")
    opened.run("x = 1")
    first = opened.session
    facts = opened.call("start_session_continue_notebook", notebook_path=path.name, experiment_name="branch")
    assert facts["session_id"] != first
    assert "branch" in facts["notebook_path"]
    opened.call("execute_code", session_id=facts["session_id"], code="x += 1")
    assert opened.ok("x") == "1"
    assert [cell["source"] for cell in cells(path)] == ["x = 1", "x"]
    assert [cell["source"] for cell in cells(Path(facts["notebook_path"]))] == ["x = 1", "x += 1"]
    opened.call("shutdown_session", session_id=facts["session_id"])
    opened.shutdown()


# --------------------------------------------------------------------------------------------- ending


def test_idle_session_ends_with_its_kernel_and_a_busy_one_does_not(workspace: Path, gate: Gate) -> None:
    with agent(workspace, "--idle-window", "0.6") as short:
        path = short.start("idle")
        [keeper] = keepers()
        kernel = psutil.Process(int(short.info()["kernel_pid"]))
        start = time.monotonic()
        short.begin_cell(f"{gate.code}print('late')")
        gate.wait()
        wait_until(lambda: time.monotonic() - start > 1.8)
        assert keeper.is_running()
        gate.open()
        wait_until(lambda: not process_exists(keeper.pid) and not process_exists(kernel.pid))
        assert "is not known" in short.refused("execute_code", session_id=short.session, code="1")
    assert cells(path)[-1]["outputs"][0]["text"] == "late\n"
    assert log_of(path)[-1]["event"] == "kernel stopped"


def test_keeper_that_is_told_to_end_saves_and_takes_its_kernel_along(opened: Agent) -> None:
    path = opened.start("told")
    [keeper] = keepers()
    kernel = psutil.Process(int(opened.info()["kernel_pid"]))
    cell = opened.begin_cell("print('before', flush=True)\nimport time\ntime.sleep(60)")
    wait_until(lambda: opened.wait(cell, wait_s=0)["text"] == "before")
    keeper.terminate()
    wait_until(lambda: not process_exists(keeper.pid) and not process_exists(kernel.pid))
    assert cells(path)[0]["outputs"][0]["text"] == "before\n"
    assert [entry["state"] for entry in log_of(path) if entry["event"] == "run"] == ["interrupted"]


def test_notebook_of_a_session_that_is_ending_is_opened_when_it_has_ended(opened: Agent, other: Agent) -> None:
    path = opened.start("slow")
    opened.run("1")
    [keeper] = keepers()
    first, kernel = opened.session, psutil.Process(int(opened.info()["kernel_pid"]))
    kernel.suspend()
    ended = opened.begin("shutdown_session", session_id=first)
    wait_until((sessions.root() / first / sessions.ENDING).exists)
    assert other.call("list_sessions")["sessions"] == []
    resumed = other.begin("start_session_resume_notebook", notebook_path=path.name, rerun=False)
    wait_until(is_locked)  # so it is about to start a keeper, and waits for the other's end
    kernel.resume()
    other.session = (resumed.result().structuredContent or {})["session_id"]
    assert other.session != first
    assert not process_exists(keeper.pid)
    assert not ended.result().isError
    other.shutdown()


def is_locked() -> bool:
    with (sessions.root() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_process_with_the_id_of_a_keeper_that_is_gone_is_not_taken_for_it(opened: Agent) -> None:
    path = opened.start("reused")
    opened.shutdown()
    folder = sessions.root() / "0123abcd"
    folder.mkdir(mode=0o700)
    facts = {"id": folder.name, "folder": str(folder), "notebook": str(path), "pid": os.getpid()}
    (folder / "session.json").write_text(json.dumps(facts))
    assert "0123abcd" not in opened.refused("restart_kernel", session_id="nobody's")
    assert not folder.exists()


def test_kernel_that_can_not_start_is_told(workspace: Path) -> None:
    (workspace / "ipykernel.py").write_text("raise SystemExit('no kernel today')")  # found first by the kernel's Python
    try:
        with agent(workspace, PYTHONPATH=str(workspace)) as made:
            assert "no kernel today" in made.refused("start_new_session")
            assert made.call("list_sessions")["sessions"] == []
    finally:
        (workspace / "ipykernel.py").unlink()


# ------------------------------------------------------------------------------------------- our kernels


def test_reply_that_arrives_while_the_next_request_is_sent_is_read(tmp_path: Path) -> None:
    """ZeroMQ tells of the first message alone, and whatever uses the socket next may take that word."""

    async def study() -> None:
        kernel = LocalKernel(tmp_path, tmp_path, dict(os.environ))
        await kernel.start()
        try:
            messages = kernel.messages()
            before = kernel.send("kernel_info_request", {})
            await reply_to(before, messages)  # from here on it waits for the next
            kernel.send("kernel_info_request", {})
            select.select([kernel._client.shell_channel.socket.FD], [], [], 5)  # and the loop does not see it
            with anyio.fail_after(20):
                await reply_to(kernel.send("kernel_info_request", {}), messages)
        finally:
            await kernel.stop()

    async def reply_to(asked: str, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            if message["header"]["msg_type"] == "kernel_info_reply" and message["parent_header"]["msg_id"] == asked:
                return

    anyio.run(study)


def test_output_that_comes_while_its_reader_is_busy_is_kept(tmp_path: Path) -> None:
    count = 6_000
    code = f"""
import pathlib, sys, time
for n in range({count}):
    time.sleep(0.02 * (n % 200 == 0))  # for the kernel's own queue of 1,000 messages, on a busy machine
    sys.stdout.write(str(n) + ' x' * 2_500 + chr(10))
    sys.stdout.flush()
pathlib.Path('over').touch()
"""

    async def study() -> str:
        kernel = LocalKernel(tmp_path, tmp_path, dict(os.environ))
        await kernel.start()
        try:
            kernel.send("execute_request", {"code": code, "silent": False})
            wait_until((tmp_path / "over").exists)  # nothing else is done meanwhile, as in a long save
            text = ""
            with anyio.fail_after(20):
                async for message in kernel.messages():
                    content = message["content"]
                    text += content["text"] if message["header"]["msg_type"] == "stream" else ""
                    if text and content.get("execution_state") == "idle":
                        return text
        finally:
            await kernel.stop()
        raise AssertionError

    assert [int(line.split()[0]) for line in anyio.run(study).splitlines()] == list(range(count))


# ------------------------------------------------------------------------------------------- restarting


def test_restart_gives_a_fresh_kernel_and_ends_what_ran(opened: Agent, gate: Gate) -> None:
    opened.start("restart")
    opened.run("x = 1")
    before = opened.info()["kernel_pid"]
    cell, queued = opened.begin_cell(gate.code), opened.begin_cell("1")
    gate.wait()
    assert opened.call("restart_kernel", session_id=opened.session)["kernel"] == "idle"
    assert opened.info()["kernel_pid"] != before
    assert [opened.wait(one)["state"] for one in (cell, queued)] == ["interrupted", "cancelled"]
    assert opened.run("x")["error"]["ename"] == "NameError"
    opened.shutdown()


# ------------------------------------------------------------------------------------------------ HTTP


@contextmanager
def http_server(workspace: Path, **environment: str) -> Iterator[tuple[str, str]]:
    """Address of a server and what it says about its token."""
    command = [sys.executable, "-m", "interp_kernel.cli", "mcp", "--workspace", str(workspace), "--http"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert server.stderr is not None
    try:
        told = server.stderr.readline()
        found = re.fullmatch(r"interp-kernel mcp: (http://127\.0\.0\.1:\d+/mcp) with the token (.+)\n", told)
        assert found, told
        yield found[1], found[2]
    finally:
        server.terminate()
        server.communicate()


def test_http_serves_who_has_the_token_alone(workspace: Path) -> None:
    with http_server(workspace) as (url, token):
        hello = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        assert httpx.post(url, json=hello).status_code == 401
        assert httpx.post(url, json=hello, headers={"Authorization": "Bearer nonsense"}).status_code == 401
        right = {"Authorization": f"Bearer {token}"}
        assert httpx.post(url, json=hello, headers={**right, "Host": "example.org"}).status_code == 421
        assert httpx.post(url, json=hello, headers={**right, "Origin": "http://example.org"}).status_code == 403

        async def study() -> str:
            async with (
                httpx.AsyncClient(headers=right, timeout=60) as http,
                streamable_http_client(url, http_client=http) as (reader, writer, _),
                ClientSession(reader, writer) as client,
            ):
                await client.initialize()
                session = (await call(client, "start_new_session"))["session_id"]
                text = await read(client, "execute_code", session_id=session, code="6 * 7")
                await call(client, "shutdown_session", session_id=session)
                return text

        assert "\n42" in anyio.run(study)


def test_token_may_be_given(workspace: Path) -> None:
    with http_server(workspace, INTERP_MCP_TOKEN="mine") as (url, told):
        assert told == "of $INTERP_MCP_TOKEN"
        answer = httpx.post(url, json={}, headers={"Authorization": "Bearer mine"})
        assert answer.status_code != 401


# ----------------------------------------------------------------------------------- a Jupyter server


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("lab") / "root"
    (folder / "deep").mkdir(parents=True)
    with lab_server(folder) as url:
        yield url, folder


def rest(url: str, path: str, **options: Any) -> Any:
    base, _, token = url.partition("/lab?token=")
    method = options.pop("method", "GET")
    return httpx.request(method, f"{base}/api/{path}", headers={"Authorization": f"token {token}"}, **options).json()


def test_kernels_of_a_jupyter_server_are_used(jupyter: tuple[str, Path]) -> None:
    url, folder = jupyter
    with agent(folder / "deep", "--jupyter-url", url) as made:
        path = made.start("lab")
        [session] = rest(url, "sessions")
        assert session["path"] == f"deep/{path.name}"  # who opens the notebook in JupyterLab is on this kernel
        assert made.info()["jupyter_url"] == url.partition("/lab")[0]
        assert made.ok("x = 6\nprint(7 * x)\nx") == "42\n6"
        assert "x: int = 6" in made.read("list_variables", session_id=made.session)
        cell = made.begin_cell("import time\nprint('on', flush=True)\nwhile True:\n    time.sleep(0.01)")
        wait_until(lambda: made.wait(cell, wait_s=0)["text"] == "on")
        assert made.call("interrupt", session_id=made.session)["state"] == "interrupted"
        died = made.run("import os; os._exit(1)")
        assert (died["state"], died["error"]["ename"]) == ("died", "KernelDiedError")
        made.call("restart_kernel", session_id=made.session)
        assert made.run("x")["error"]["ename"] == "NameError"
        assert [len(cell["outputs"]) for cell in cells(path)] == [2, 2, 1, 1]
        made.shutdown()
        assert rest(url, "sessions") == []


def test_kernel_of_an_open_notebook_is_taken_and_left_alive(jupyter: tuple[str, Path]) -> None:
    url, folder = jupyter
    with agent(folder) as made:
        path = made.start("theirs")
        made.call("insert_cell", session_id=made.session, source="theirs = 'run again'")
        made.shutdown()
    asked = {"path": path.name, "name": path.name, "type": "notebook", "kernel": {"name": "python3"}}
    kernel = rest(url, "sessions", method="POST", json=asked)["kernel"]["id"]
    person = BlockingKernelClient()
    person.load_connection_file(str(Path(os.environ["JUPYTER_RUNTIME_DIR"], f"kernel-{kernel}.json")))
    person.start_channels()
    try:
        person.wait_for_ready(timeout=60)
        person.execute_interactive("theirs = 'a person made this'", timeout=60, output_hook=lambda _: None)
        with agent(folder, "--jupyter-url", url) as made:
            assert "has a kernel of this notebook; nothing was run again" in " ".join(made.resume(path.name)["notes"])
            assert made.ok("theirs") == "'a person made this'"
            person.execute_interactive("print('not for the agent')", timeout=60, output_hook=lambda _: None)
            assert made.ok("1") == "1"
            made.shutdown()
        assert [cell["source"] for cell in cells(path)] == ["theirs = 'run again'", "theirs", "1"]
        [session] = rest(url, "sessions")
        assert session["kernel"]["id"] == kernel
        base, _, token = url.partition("/lab?token=")
        httpx.delete(f"{base}/api/sessions/{session['id']}", headers={"Authorization": f"token {token}"})
    finally:
        person.stop_channels()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url + "x", "refused .* Put its token into JUPYTER_TOKEN"),
        (lambda url: "http://127.0.0.1:9", "can't be reached"),
    ],
    ids=["token", "address"],
)
def test_jupyter_server_that_refuses_is_told(jupyter: tuple[str, Path], change: Any, message: str) -> None:
    url, folder = jupyter
    with agent(folder, "--jupyter-url", change(url)) as made:
        assert re.search(message, made.refused("start_new_session"))


def test_notebook_that_the_jupyter_server_does_not_serve_is_told(jupyter: tuple[str, Path], workspace: Path) -> None:
    url, folder = jupyter
    for place in (workspace, folder):  # a namesake is not taken for it
        write_notebook(place / "same.ipynb", ["1"])
    with agent(workspace, "--jupyter-url", url) as made:
        assert "does not serve" in made.refused("start_session_resume_notebook", notebook_path="same.ipynb")
        assert "does not serve" in made.refused("start_new_session")
    assert rest(url, "sessions") == []


# ----------------------------------------------------------------------------------------------- refusals


def test_workspace_must_exist(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "interp_kernel.cli", "mcp", "--workspace", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.search("workspace .*nowhere is no folder", ended.stderr)


def test_missing_library_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    assert main(["mcp"]) == 1
    assert 'pip install "interp-kernel[agents]"' in capsys.readouterr().err


def test_model_of_the_server_is_checked_at_its_start(workspace: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "interp_kernel.cli",
        "mcp",
        "--workspace",
        str(workspace),
        "--model",
        '{"modle": 1}',
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "modle" in ended.stderr


def test_keeper_answers_what_it_knows_alone(opened: Agent) -> None:
    opened.start("verbs")
    with pytest.raises(SessionError, match="no verb 'start'; expected one of delete, edit"):
        anyio.run(sessions.ask, opened.session, "start")
    with pytest.raises(SessionError, match=r"failed at restart: TypeError: .* It goes on"):
        anyio.run(functools.partial(sessions.ask, nonsense=1), opened.session, "restart")
    assert opened.ok("1") == "1"
    opened.shutdown()
