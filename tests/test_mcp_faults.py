"""Bad things that must end well, seen by an agent: cells, kernels, workers, servers. Files are in test_mcp_files.py.

Among them is every fault of the servers that agents had before, see the names of the tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mcp.types import CancelledNotification, CancelledNotificationParams, ClientNotification

from interp_kernel.backends.local import list_workers, process_exists
from interp_kernel.mcp import sessions
from tests.helpers_agent import (
    Agent,
    Gate,
    agent,
    cells,
    ending_sessions,
    images,
    keeper_of,
    log_of,
    nbytes,
    outputs_of,
    own_session,
)
from tests.helpers_mcp import text_of
from tests.helpers_worker import wait_until

pytestmark = pytest.mark.usefixtures("no_warm_worker")

SECRET = "sesame-open-the-vault-42"
ANSWER_BYTES = 20_000
SOON_S = 3.0
"""Generous for a busy machine; what took minutes elsewhere, or for ever, is told by then."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ending_sessions():
        yield tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def shared(workspace: Path) -> Iterator[Agent]:
    """An agent for tests that leave its kernel as it was."""
    with agent(workspace, VAULT_API_KEY=SECRET) as opened:
        opened.start("shared")
        yield opened


@pytest.fixture(scope="module")
def other(workspace: Path) -> Iterator[Agent]:
    """An agent of a second server."""
    with agent(workspace) as opened:
        yield opened


@pytest.fixture
def notebook(shared: Agent) -> Path:
    return Path(shared.info()["notebook_path"])


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path, "gate")


# --------------------------------------------------------------------------------------- output and cell


def test_output_of_a_silent_cell_is_not_given_to_the_next(shared: Agent, notebook: Path, gate: Gate) -> None:
    first = shared.begin_cell(f"{gate.code}\n40 + 2")
    gate.wait()
    second = shared.begin_cell("print('next')")
    third = shared.begin_cell("print('third')")
    assert [shared.wait(cell, wait_s=0)["state"] for cell in (first, second, third)] == ["running", "queued", "queued"]
    gate.open()
    assert [shared.wait(cell)["text"] for cell in (third, second, first)] == ["third", "next", "42"]
    assert [outputs_of(notebook, cell).strip() for cell in (first, second, third)] == ["42", "next", "third"]


def test_a_silent_cell_goes_on_although_the_kernel_answers_questions_meanwhile(shared: Agent, other: Agent) -> None:
    waits = (shared, "%%remote\nimport time\ntime.sleep(4)"), (other, "import asyncio\nawait asyncio.sleep(4)")
    with own_session(other):
        begun = [(asker, asker.begin_cell(f"{wait}\n'over'")) for asker, wait in waits]
        for asker, cell in begun:
            facts = asker.wait(cell)
            assert (facts["state"], facts["text"][-6:], facts["notes"]) == ("done", "'over'", [])
            assert facts["seconds"] >= 4


def test_a_silent_side_effect_happens_once(shared: Agent, tmp_path: Path) -> None:
    shared.run(f"with open({str(tmp_path / 'count')!r}, 'a') as file:\n    _ = file.write('x')\nn = 0")
    shared.run("n += 1")
    assert (tmp_path / "count").read_text() == "x"
    assert shared.ok("n") == "1"


def test_what_a_thread_prints_after_its_cells_end_goes_to_that_cell(shared: Agent, notebook: Path, gate: Gate) -> None:
    late = f"def late():\n    exec({gate.code!r})\n    print('late')"
    first = shared.run(f"import threading\n{late}\nthread = threading.Thread(target=late)\nthread.start()")
    gate.wait()
    gate.open()
    wait_until(lambda: outputs_of(notebook, first["cell_id"]) == "late\n")
    second = shared.run("thread.join()\nprint('second')")
    assert second["text"] == "second"
    assert outputs_of(notebook, second["cell_id"]) == "second\n"


def test_flushed_prints_are_one_output(shared: Agent, notebook: Path) -> None:
    facts = shared.run("for n in range(300):\n    print(n, flush=True)")
    [cell] = [cell for cell in cells(notebook) if cell["id"] == facts["cell_id"]]
    assert [output["text"] for output in cell["outputs"]] == ["".join(f"{n}\n" for n in range(300))]


def test_bars_updates_and_clearing_are_shown_as_they_ended(shared: Agent, notebook: Path) -> None:
    bar = shared.run("from tqdm import tqdm\nfor _ in tqdm(range(50), ncols=60):\n    pass")
    assert "100%" in bar["text"]
    assert bar["text"].count("%") == 1
    cleared = shared.run(
        "from IPython.display import clear_output, display\nprint('old')\nclear_output()\nprint('new')"
    )
    assert cleared["text"] == "new"
    shown = shared.run("handle = display('early', display_id=True)\nhandle.update('late')")
    assert shown["text"] == "'late'"
    shared.run("handle.update('later')")
    wait_until(lambda: outputs_of(notebook, shown["cell_id"]) == "'later'")


def test_what_was_printed_before_an_error_stays(shared: Agent) -> None:
    answer = shared.read("execute_code", session_id=shared.session, code="print('before')\n{}['key']")
    assert answer.index("before") < answer.index("----> 2 {}['key']") < answer.index("KeyError: 'key'")


# ------------------------------------------------------------------------------------------------ bounds


def test_three_megabytes_reach_the_agent_as_twenty_kilobytes_and_can_be_read(shared: Agent, notebook: Path) -> None:
    code = "for n in range(100_000):\n    print(f'{n:029}')"
    answer = shared.ask("execute_code", session_id=shared.session, code=code)
    cell = (answer.structuredContent or {})["cell_id"]
    assert nbytes(answer) <= ANSWER_BYTES
    text = text_of(answer)
    assert f"{0:029}" in text
    assert f"{99_999:029}" in text
    head, start = re.search(
        rf'(0\n[\s\S]*)\n\[.* left out; read_output\(cell_id="{cell}", start=(\d+)\)', text
    ).groups()  # type: ignore[union-attr]
    ask = {"session_id": shared.session, "cell_id": cell}
    assert shared.read("read_output", **ask, start=0, length=int(start)).split("]\n", 1)[1].endswith(head)
    assert f"{50_000:029}" in shared.read("read_output", **ask, start=50_000 * 30, length=30)
    assert shared.read("read_output", **ask, start=-29).endswith(f"]\n{99_999:029}")
    assert notebook.stat().st_size < 1_000_000
    [entry] = [entry for entry in log_of(notebook) if entry["event"] == "run" and entry["cell_id"] == cell]
    assert (notebook.with_suffix(".attempts") / entry["output"]).stat().st_size == 3_000_000


def test_an_endless_printer_is_stopped_and_stays_small(shared: Agent, notebook: Path) -> None:
    answer = shared.ask(
        "execute_code", session_id=shared.session, code="while True:\n    print('x' * 200)", timeout_s=1
    )
    assert nbytes(answer) <= ANSWER_BYTES
    assert (answer.structuredContent or {})["state"] == "interrupted"
    assert "timeout_s" in text_of(answer)
    assert notebook.stat().st_size < 2_000_000
    assert shared.ok("'and on'") == "'and on'"


def test_output_that_comes_too_fast_to_be_taken_in_is_told_to_be_lost(
    shared: Agent, notebook: Path, gate: Gate, tmp_path: Path
) -> None:
    """While nobody reads, the kernel's queue overflows, and with it goes the word that the cell has ended."""
    keeper, count, over = keeper_of(shared.session), 3_000, tmp_path / "over"
    flood = f"""
import sys
for n in range({count}):
    sys.stdout.write(str(n) + ' x' * 10_000 + chr(10))
    sys.stdout.flush()
pathlib.Path({str(over)!r}).touch()
"""
    cell = shared.begin_cell(gate.code + flood)
    gate.wait()
    keeper.suspend()
    gate.open()
    wait_until(over.exists)
    keeper.resume()
    facts = shared.wait(cell)
    assert facts["state"] == "done"
    [entry] = [entry for entry in log_of(notebook) if entry["event"] == "run" and entry["cell_id"] == cell]
    whole = (notebook.with_suffix(".attempts") / entry["output"]).read_text()
    told = re.findall(r"\[\d+ messages of the kernel got lost, for they came too fast: .*\]\n", whole)
    lost = sum(int(re.findall(r"\d+", note)[0]) for note in told)
    lines = [line for line in whole.splitlines() if not line.startswith("[")]
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert lost + len(lines) >= count, (told, len(lines))  # no line is missing without being counted
    assert lost < count * 1.5  # the rest are what the wait has asked meanwhile, and the cell's own end
    assert all(note in outputs_of(notebook, cell) for note in told)
    assert any("did not arrive" in note for note in facts["notes"]) == bool(told), facts
    assert shared.ok("'and on'") == "'and on'"


def test_many_images_are_few_and_small(shared: Agent) -> None:
    code = "from PIL import Image\nfor n in range(9):\n    display(Image.new('RGB', (3000, 2000), (n, 0, 0)))"
    answer = shared.ask("execute_code", session_id=shared.session, code=code)
    assert 1 <= len(images(answer)) < 9
    assert text_of(answer).count("3000 x 2000") + text_of(answer).count("not shown") == 9


# ------------------------------------------------------------------------------------- time and stopping


def test_other_calls_are_answered_while_a_cell_runs(shared: Agent, gate: Gate) -> None:
    cell = shared.begin_cell(gate.code)
    gate.wait()
    start = time.monotonic()
    shared.portal.call(shared.client.send_ping)
    shared.call("add_markdown", session_id=shared.session, content="a thought")
    shared.read("read_notebook", session_id=shared.session)
    assert time.monotonic() - start < SOON_S
    assert "busy" in shared.refused("list_variables", session_id=shared.session)
    gate.open()
    assert shared.wait(cell)["state"] == "done"


def test_a_question_for_input_is_an_error_at_once(shared: Agent) -> None:
    start = time.monotonic()
    facts = shared.run("print('asking')\ninput('name? ')")
    assert time.monotonic() - start < SOON_S
    assert facts["state"] == "failed"
    assert facts["error"]["ename"] == "StdinNotImplementedError"
    assert "asking" in facts["text"]
    assert shared.run("import getpass\ngetpass.getpass()")["state"] == "failed"
    assert shared.ok("'next'") == "'next'"


def test_a_stopped_cell_keeps_its_output_and_the_kernel(shared: Agent, gate: Gate) -> None:
    cell = shared.begin_cell(f"kept = 1\nprint('so far')\n{gate.code}")
    gate.wait()
    waiting = shared.begin_cell("print('after')")
    assert shared.call("interrupt", session_id=shared.session)["cell_id"] == cell
    stopped = shared.wait(cell)
    assert stopped["state"] == "interrupted"
    assert "so far" in stopped["text"]
    assert shared.wait(waiting)["text"] == "after"
    assert shared.ok("kept") == "1"
    assert "Nothing was running" in shared.read("interrupt", session_id=shared.session)


def test_a_cell_past_its_time_is_stopped(shared: Agent) -> None:
    facts = shared.run("import time\ntime.sleep(60)", timeout_s=0.5)
    assert facts["state"] == "interrupted"
    assert facts["seconds"] < 10


def test_a_call_that_the_client_cancels_stops_its_cell(shared: Agent, gate: Gate) -> None:
    request = shared.client._request_id
    call = shared.begin("execute_code", session_id=shared.session, code=gate.code)
    gate.wait()
    cancelled = CancelledNotification(params=CancelledNotificationParams(requestId=request))
    shared.portal.call(shared.client.send_notification, ClientNotification(cancelled))
    wait_until(lambda: shared.info()["running_cell_id"] is None)
    call.cancel()
    assert shared.ok("'free'") == "'free'"


# -------------------------------------------------------------------------------------------- refusals


def test_four_hundred_failing_calls_hang_nothing(shared: Agent) -> None:
    start = time.monotonic()
    for number in range(100):
        assert f"nobody{number}" in shared.refused("execute_code", session_id=f"nobody{number}", code="1")
        assert "Its cells are" in shared.refused(
            "edit_cell", session_id=shared.session, cell_id=f"c{number}", source="1"
        )
        assert "no notebook" in shared.refused("start_session_resume_notebook", notebook_path=f"{number}.ipynb")
        assert shared.run("raise ValueError('again')")["state"] == "failed"
    assert time.monotonic() - start < 120
    assert shared.ok("'fine'") == "'fine'"


def test_refusals_say_what_there_is(shared: Agent, workspace: Path) -> None:
    (workspace / "other.ipynb").write_text("{}")
    session = {"session_id": shared.session}
    assert shared.session in shared.refused("execute_code", session_id="nope", code="1")
    known = shared.ok("1") and shared.run("2")["cell_id"]
    assert known in shared.refused("edit_cell", **session, cell_id="nope", source="1")
    assert known in shared.refused("read_output", **session, cell_id="nope")
    assert known in shared.refused("execute_code", **session, code="1", after_cell_id="nope")
    assert "other.ipynb" in shared.refused("start_session_resume_notebook", notebook_path="missing.ipynb")
    assert "logit_lens" in shared.refused("describe_technique", name="nope")
    assert "'code' is a required property" in shared.refused("execute_code", **session)
    assert "is not of type" in shared.refused("execute_code", **session, code=5)
    assert "execute_code" in shared.refused("no_such_tool")


@pytest.mark.parametrize("path", ["../x.ipynb", "/etc/passwd", "/etc/x.ipynb", "link.ipynb", "up/x.ipynb", "a.txt"])
@pytest.mark.parametrize("tool", ["start_session_resume_notebook", "start_session_continue_notebook"])
def test_no_path_leads_out_of_the_workspace(shared: Agent, workspace: Path, tool: str, path: str) -> None:
    outside = workspace.parent / "outside.ipynb"
    outside.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    if not (workspace / "link.ipynb").is_symlink():
        (workspace / "link.ipynb").symlink_to(outside)
        (workspace / "up").symlink_to(workspace.parent)
    before = sorted(workspace.iterdir())
    assert re.search("out of the workspace|expected a notebook", shared.refused(tool, notebook_path=path))
    assert sorted(workspace.iterdir()) == before


@pytest.mark.parametrize("name", ["a/b", "../up", "/abs", "", "x" * 500, "a\0b", "ü ñ", ".hidden", "-"])
def test_any_experiment_name_makes_a_file_in_the_workspace(shared: Agent, workspace: Path, name: str) -> None:
    facts = shared.call("start_new_session", experiment_name=name)
    path = Path(facts["notebook_path"])
    assert path.is_file()
    assert path.parent == workspace
    assert not path.name.startswith(".")
    shared.call("shutdown_session", session_id=facts["session_id"])


# --------------------------------------------------------------------------------------------- secrets


def test_secrets_of_the_environment_are_neither_given_nor_shown(shared: Agent, notebook: Path, tmp_path: Path) -> None:
    assert shared.ok("import os\nos.environ.get('VAULT_API_KEY')") == ""
    assert SECRET not in shared.ok("'\\n'.join(f'{k}={v}' for k, v in os.environ.items())")
    (tmp_path / "leak").write_text(SECRET)
    read = f"open({str(tmp_path / 'leak')!r}).read()"
    raising = f"raise ValueError({read})"
    showing = f"from IPython.display import HTML, display\nHTML({read})"
    for code in (f"print({read})", read, raising, showing, f"import sys\nprint({read}, file=sys.stderr)"):
        answer = shared.ask("execute_code", session_id=shared.session, code=code)
        assert SECRET not in answer.model_dump_json()
        assert "[secret VAULT_API_KEY]" in text_of(answer)
    shared.run(f"for letter in {read}:\n    print(letter, end='', flush=True)")
    shared.run(f"value = {read}")
    assert SECRET not in shared.read("list_variables", session_id=shared.session)
    kept = [notebook, *notebook.with_suffix(".attempts").iterdir()]
    assert not [path for path in kept if SECRET in path.read_text()]


def test_no_answer_holds_the_kernels_key(shared: Agent) -> None:
    folders = Path(os.environ["INTERP_RUNTIME_DIR"]).rglob("kernel-*.json")
    keys = [json.loads(path.read_text())["key"] for path in folders]
    assert keys
    said = shared.ask("list_sessions").model_dump_json() + shared.read("read_notebook", session_id=shared.session)
    assert not [key for key in keys if key in said]


# ---------------------------------------------------------------------------------------- kernel, worker


def test_a_kernel_that_exits_is_told_at_once(shared: Agent) -> None:
    with own_session(shared) as path:
        shared.ok("x = 1")
        start = time.monotonic()
        facts = shared.run("import os\nos._exit(3)")
        assert time.monotonic() - start < SOON_S
        assert facts["state"] == "died"
        assert re.search("exited with status 3.*variables.*gone.*restart_kernel", facts["error"]["evalue"])
        assert "restart_kernel" in shared.refused("execute_code", session_id=shared.session, code="x")
        assert "KernelDiedError" in json.dumps(
            [cell["outputs"] for cell in cells(path) if cell["id"] == facts["cell_id"]]
        )
        shared.call("restart_kernel", session_id=shared.session)
        assert shared.run("x")["error"]["ename"] == "NameError"


def test_a_killed_kernel_is_told_with_what_it_had_printed(shared: Agent, gate: Gate) -> None:
    with own_session(shared):
        cell = shared.begin_cell(f"print('so far', flush=True)\n{gate.code}")
        gate.wait()
        queued = shared.begin_cell("print('never')")
        os.kill(shared.info()["kernel_pid"], signal.SIGKILL)
        facts = shared.wait(cell)
        assert (facts["state"], "so far" in facts["text"]) == ("died", True)
        assert "killed by SIGKILL" in facts["error"]["evalue"]
        assert shared.wait(queued)["state"] == "cancelled"


def test_a_killed_worker_is_told_and_replaced(shared: Agent, gate: Gate) -> None:
    shared.ok("%%remote\ntype(model).__name__")
    cell = shared.begin_cell(f"%%remote\nprint('far', flush=True)\n{gate.code}")
    gate.wait()
    [worker] = list_workers()
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    facts = shared.wait(cell)
    assert facts["state"] == "failed"
    assert facts["error"]["ename"] == "WorkerDiedError"
    assert "SIGKILL" in facts["error"]["evalue"]
    assert shared.ok("%%remote\ntype(model).__name__").endswith("'GPT2LMHeadModel'")


def test_a_remote_cell_is_stopped_and_the_model_stays(shared: Agent, gate: Gate) -> None:
    shared.ok("%%remote\n1")
    [before] = list_workers()
    cell = shared.begin_cell(f"%%remote\ndone = 7\n{gate.code}")
    gate.wait()
    shared.call("interrupt", session_id=shared.session)
    assert shared.wait(cell)["state"] == "interrupted"
    assert shared.ok("done") == "7"
    assert [worker.pid for worker in list_workers()] == [before.pid]


# ---------------------------------------------------------------------------------------------- servers


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_server_loses_nothing(workspace: Path, shared: Agent, gate: Gate, how: signal.Signals) -> None:
    with agent(workspace) as first:
        path = first.start("survivor")
        first.ok("x = 41")
        cell = first.begin_cell(f"print('before', flush=True)\n{gate.code}\nprint('after')\nx + 1")
        gate.wait()
        first.server.send_signal(how)
        first.server.wait(10)
        gate.open()
        wait_until(lambda: "after" in outputs_of(path, cell))
    before, shared.session = shared.session, first.session
    assert shared.info()["kernel"] == "idle"
    assert shared.wait(cell)["text"].split() == ["before", "after", "42"]
    assert shared.ok("x") == "41"
    shared.shutdown()
    shared.session = before


def test_an_orphaned_kernel_is_found_and_stopped(shared: Agent) -> None:
    with own_session(shared) as path:
        shared.ok("x = 1")
        kernel, keeper = psutil.Process(shared.info()["kernel_pid"]), keeper_of(shared.session)
        kernel.suspend()  # or it would end by itself
        keeper.kill()
        wait_until(lambda: not process_exists(keeper.pid))
        assert "not known" in shared.refused("execute_code", session_id=shared.session, code="1")
        wait_until(lambda: not process_exists(kernel.pid))
        assert not (sessions.root() / shared.session).exists()
        assert shared.resume(path)["replay"]["state"] == "done"
        assert shared.ok("x") == "1"


def test_a_cell_whose_keeper_is_killed_shows_that_it_never_ended(shared: Agent, gate: Gate) -> None:
    with own_session(shared) as path:
        shared.ok("'ended'")
        cell = shared.begin_cell(f"print('so far', flush=True)\n{gate.code}")
        gate.wait()
        wait_until(lambda: outputs_of(path, cell) == "so far\n")
        keeper_of(shared.session).kill()
        wait_until(lambda: shared.session not in str(shared.sessions()))
        assert [row["execution_count"] for row in cells(path)] == [1, None]
        assert [entry["event"] for entry in log_of(path) if entry.get("cell_id") == cell] == ["begin"]
        said = f"Cell {cell} was running when its session was killed; it shows what came until then."
        assert said in shared.resume(path, rerun=False)["notes"]
        shared.shutdown()
        assert said not in shared.resume(path, rerun=False)["notes"]


# ------------------------------------------------------------------------------------------- two agents


def test_two_agents_share_a_notebook(shared: Agent, other: Agent, notebook: Path, gate: Gate) -> None:
    assert "alive" in other.read("start_session_resume_notebook", notebook_path=notebook.name)
    other.session = shared.session
    cell = shared.begin_cell(f"{gate.code}\nfrom_first = 1\nprint('first')")
    gate.wait()
    queued = other.begin_cell("print('second', from_first)")
    gate.open()
    assert other.wait(queued)["text"] == "second 1"
    assert other.wait(cell)["text"] == "first"
    assert outputs_of(notebook, cell) == "first\n"
    assert outputs_of(notebook, queued) == "second 1\n"


def test_two_agents_on_two_notebooks_do_not_meet(shared: Agent, other: Agent) -> None:
    with own_session(other) as path:
        calls = [
            asker.begin(
                "execute_code",
                session_id=asker.session,
                code=f"import time\nfor n in range(20):\n    print('{name}', n)",
            )
            for _ in range(5)
            for asker, name in ((shared, "left"), (other, "right"))
        ]
        texts = [text_of(call.result(60)) for call in calls]
        assert all("left" in text and "right" not in text for text in texts[::2])
        assert all("right" in text and "left" not in text for text in texts[1::2])
        assert "left" not in path.read_text()
