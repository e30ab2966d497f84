"""The tools as a client sees them: what each does, the form of its answers, progress, prompt and resource."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import jsonschema  # type: ignore[import-untyped]
import nbformat
import psutil
import pytest
from mcp import ClientSession
from mcp.client.stdio import stdio_client
from mcp.types import Implementation, Tool
from pydantic import AnyUrl

from interp_kernel.agents import instructions
from interp_kernel.catalogue import package_techniques
from interp_kernel.mcp.outputs import comparable
from tests.conftest import stop_workers
from tests.helpers_agent import Agent, Gate, agent, cells, ending_sessions, log_of, outputs_of
from tests.helpers_mcp import command, text_of
from tests.helpers_worker import wait_until

pytestmark = pytest.mark.usefixtures("no_warm_worker")

NAMES = {
    *("start_new_session", "start_session_resume_notebook", "start_session_continue_notebook", "init_session"),
    *("execute_code", "edit_cell", "add_markdown", "shutdown_session", "read_notebook", "read_output", "interrupt"),
    *("restart_kernel", "list_sessions", "insert_cell", "delete_cell", "move_cell", "list_variables"),
    *("list_techniques", "describe_technique", "run_all", "wait"),
}
WITHOUT_SESSION = {"start_new_session", "start_session_resume_notebook", "start_session_continue_notebook"}
WITHOUT_SESSION |= {"list_sessions", "list_techniques", "describe_technique"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ending_sessions():
        yield tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def opened(workspace: Path) -> Iterator[Agent]:
    with agent(workspace) as made:
        made.start("tools")
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def tools(opened: Agent) -> dict[str, Tool]:
    return {tool.name: tool for tool in opened.portal.call(opened.client.list_tools).tools}


@pytest.fixture
def made(opened: Agent) -> Iterator[Agent]:
    """The same agent, for a session of the test's own."""
    first = opened.session
    yield opened
    opened.session = first


@pytest.fixture
def notebook(opened: Agent) -> Path:
    return Path(opened.info()["notebook_path"])


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path, "gate")


def order(path: Path) -> list[str]:
    return [cell["id"] for cell in cells(path)]


# -------------------------------------------------------------------------------------------- the list


def test_tools_are_those_of_the_documentation(tools: dict[str, Tool]) -> None:
    assert set(tools) == NAMES
    for name, tool in tools.items():
        jsonschema.Draft202012Validator.check_schema(tool.inputSchema)
        has_session = "session_id" in tool.inputSchema["required"]
        assert has_session != (name in WITHOUT_SESSION), name
        assert all(words["description"] for words in tool.inputSchema["properties"].values())
        assert (tool.description or "").endswith(".")
        assert tool.annotations is not None
        assert tool.annotations.openWorldHint is False
    readers = {name for name, tool in tools.items() if tool.annotations and tool.annotations.readOnlyHint}
    assert readers == {
        *("list_sessions", "read_notebook", "read_output", "list_variables", "list_techniques"),
        *("describe_technique", "wait"),
    }


def test_schema_says_what_a_signature_says(tools: dict[str, Tool]) -> None:
    schema = tools["execute_code"].inputSchema
    assert schema["required"] == ["session_id", "code"]
    assert schema["properties"]["wait_s"] == {
        "type": "number",
        "default": 45.0,
        "description": schema["properties"]["wait_s"]["description"],
    }
    assert tools["read_notebook"].inputSchema["properties"]["view"]["enum"] == ["outline", "cells"]
    assert tools["edit_cell"].inputSchema["properties"]["run"]["type"] == "boolean"


def test_wrong_calls_are_refused_in_words(opened: Agent) -> None:
    assert "'code' is a required property" in opened.refused("execute_code", session_id=opened.session)
    assert "'nonsense' was unexpected" in opened.refused("list_sessions", nonsense=1)
    assert "'x' is not of type 'number'" in opened.refused("wait", session_id=opened.session, wait_s="x")
    assert "no tool 'run_cell'. Those that there are: start_new_session" in opened.refused("run_cell")
    assert "no technique 'lens'. Those that there are: " in opened.refused("describe_technique", name="lens")
    assert "Nothing runs in this session" in opened.refused("wait", session_id=opened.session)


# --------------------------------------------------------------------------------------- one after another


def test_cells_are_put_where_they_belong(opened: Agent, notebook: Path) -> None:
    ask = {"session_id": opened.session}
    start = len(order(notebook))
    first = opened.run("a = 1")["cell_id"]
    last = opened.call("add_markdown", **ask, content="# Findings")["cell_id"]
    middle = opened.call("insert_cell", **ask, source="b = 2", after_cell_id=first)["cell_id"]
    top = opened.call("insert_cell", **ask, source="raw text", cell_type="raw", after_cell_id="")["cell_id"]
    assert order(notebook) == [top, *order(notebook)[1 : start + 1], first, middle, last]
    assert [cell["cell_type"] for cell in cells(notebook)[-3:]] == ["code", "code", "markdown"]
    opened.call("move_cell", **ask, cell_id=top, after_cell_id=last)
    opened.call("move_cell", **ask, cell_id=last, after_cell_id="")
    assert order(notebook)[0] == last
    assert order(notebook)[-1] == top
    for cell in (top, last):
        opened.call("delete_cell", **ask, cell_id=cell)
    assert not {top, last} & set(order(notebook))
    assert opened.run("b")["error"]["ename"] == "NameError"  # it was inserted, not run
    assert opened.refused("edit_cell", **ask, cell_id=top, source="").startswith(f"Cell '{top}' is not in")
    assert "can't be moved after itself" in opened.refused("move_cell", **ask, cell_id=first, after_cell_id=first)


def test_edited_cell_is_run_in_place_or_left_alone(opened: Agent, notebook: Path) -> None:
    ask = {"session_id": opened.session}
    cell = opened.run("1/0")["cell_id"]
    assert opened.call("edit_cell", **ask, cell_id=cell, source="n = 5\nn")["text"] == "5"
    left = opened.call("edit_cell", **ask, cell_id=cell, source="n = 6", run=False)
    assert left["state"] == "not run here"
    [now] = [row for row in cells(notebook) if row["id"] == cell]
    assert (now["source"], now["outputs"][0]["data"]["text/plain"]) == ("n = 6", "5")
    assert opened.ok("n") == "5"
    edits = [entry for entry in log_of(notebook) if entry["event"] == "edit" and entry["cell_id"] == cell]
    assert [(entry["before"], entry["source"]) for entry in edits] == [("1/0", "n = 5\nn"), ("n = 5\nn", "n = 6")]
    runs = [entry for entry in log_of(notebook) if entry["event"] == "run" and entry["cell_id"] == cell]
    assert [(run["state"], run["output"].splitlines()[-1]) for run in runs][1] == ("done", "5")
    assert "ZeroDivisionError" in runs[0]["output"]
    markdown = opened.call("add_markdown", **ask, content="old")["cell_id"]
    opened.call("edit_cell", **ask, cell_id=markdown, source="new")
    assert cells(notebook)[-1]["source"] == "new"


def test_facts_have_a_stable_form(opened: Agent) -> None:
    facts = opened.run("print('out')\n{}['key']")
    assert {name: type(value) for name, value in facts.items()} == {
        "session_id": str,
        "cell_id": str,
        "state": str,
        "execution_count": int,
        "seconds": float,
        "error": dict,
        "notes": list,
        "text": str,
        "text_chars": int,
        "images": int,
    }
    assert (facts["state"], facts["error"]) == ("failed", {"ename": "KeyError", "evalue": "'key'"})
    text = opened.read("execute_code", session_id=opened.session, code="6 * 7")
    assert re.fullmatch(rf"\[session {opened.session} \| cell \w{{8}} \| done \| \d\.\d\d s \| In\[\d+\]\]\n42", text)


def test_image_stands_among_the_text(opened: Agent) -> None:
    draw = "import io\nfrom PIL import Image\nfile = io.BytesIO()\nImage.new('RGB', (9, 9)).save(file, 'PNG')"
    show = "import IPython.display as d\nd.display(d.Image(file.getvalue()))"
    code = f"{draw}\nprint('before')\n{show}\nprint('after')"
    answer = opened.ask("execute_code", session_id=opened.session, code=code)
    assert [block.type for block in answer.content] == ["text", "text", "image", "text"]
    assert (answer.structuredContent or {})["images"] == 1


def test_notebook_is_read_in_pages(opened: Agent, notebook: Path) -> None:
    ask = {"session_id": opened.session}
    opened.run("print('first')\n2")
    last = opened.call("add_markdown", **ask, content="\n## A heading\ntext")["cell_id"]
    total = len(order(notebook))
    outline = opened.read("read_notebook", **ask, start=total - 1).splitlines()
    assert outline[1].split() == [str(total - 1), last, "markdown", "##", "A", "heading"]
    page = opened.call("read_notebook", **ask, start=1, limit=2)
    assert [row["cell_id"] for row in page["rows"]] == order(notebook)[1:3]
    assert f"{total - 3} more cells: read_notebook(start=3)" in opened.read("read_notebook", **ask, start=1, limit=2)
    full = opened.read("read_notebook", **ask, view="cells", start=total - 2)
    assert "print('first')\n2\nfirst\n2\n" in full.replace("\n\n", "\n")
    assert len(opened.read("read_notebook", **ask, view="cells", start=0, limit=500).encode()) < 20_000


def test_notebook_is_read_as_a_person_has_left_it(opened: Agent, notebook: Path) -> None:
    found = nbformat.read(notebook, as_version=4)
    found.cells.append(nbformat.v4.new_markdown_cell("a person was here"))
    nbformat.write(found, notebook)
    text = opened.read("read_notebook", session_id=opened.session, start=len(found.cells) - 1)
    assert "a person was here" in text
    assert f"Note: Cell {found.cells[-1].id} was added to {notebook.name} by somebody else." in text


def test_variables_are_described(opened: Agent) -> None:
    opened.run("import numpy\nword = 'x' * 200\nrows = [1, 2]\ngrid = numpy.zeros((2, 3))\ndef helper(): pass")
    facts = opened.call("list_variables", session_id=opened.session)
    rows = {row["name"]: (row["type"], row["value"]) for row in facts["variables"]}
    assert rows["rows"] == ("list", "2 items")
    assert rows["grid"] == ("ndarray", "shape (2, 3), dtype float64, device cpu")
    assert rows["helper"] == ("function", "")
    assert len(rows["word"][1]) == 80
    assert not {"In", "Out", "numpy", "get_ipython"} & set(rows)


def test_listing_variables_imports_nothing(opened: Agent) -> None:
    opened.run(
        "%%remote --keep big\nimport torch\nfrom techniques.logit_lens import logit_lens\nbig = torch.zeros(2, 3)"
    )
    listed = opened.call("list_variables", session_id=opened.session)["variables"]
    rows = {row["name"]: (row["type"], row["value"]) for row in listed}
    assert rows["big"][1].startswith("<RemoteValue torch.Tensor 2x3 float32 cpu")
    assert rows["logit_lens"] == ("LazyImport", "<techniques.logit_lens.logit_lens, not imported here yet>")
    assert "torch" not in rows
    assert opened.ok("import sys\n'torch' in sys.modules") == "False"


def test_busy_kernel_is_not_asked_for_its_variables(opened: Agent, gate: Gate) -> None:
    cell = opened.begin_cell(gate.code)
    gate.wait()
    refusal = opened.refused("list_variables", session_id=opened.session)
    assert f"busy with cell {cell}" in refusal
    assert "is running" in opened.refused("edit_cell", session_id=opened.session, cell_id=cell, source="")
    assert "is running" in opened.refused("delete_cell", session_id=opened.session, cell_id=cell)
    gate.open()
    opened.wait(cell)


def test_kernel_that_does_not_answer_is_told(opened: Agent) -> None:
    kernel = psutil.Process(int(opened.info()["kernel_pid"]))
    kernel.suspend()
    try:
        assert "did not answer within 5 s" in opened.refused("list_variables", session_id=opened.session)
    finally:
        kernel.resume()
    assert opened.ok("1") == "1"


SWALLOWS = """
session = get_ipython().kernel.session
send = session.send

def swallow(stream, message, *rest, **options):
    if message == "execute_reply":
        session.send = send
        return None
    return send(stream, message, *rest, **options)

session.send = swallow
'kept'
"""


def test_end_of_a_cell_whose_reply_gets_lost_is_found(opened: Agent) -> None:
    """As on a broken line to a Jupyter server; a lost idle status is in test_mcp_faults."""
    facts = opened.run(SWALLOWS, wait_s=30)
    assert (facts["state"], facts["text"]) == ("done", "'kept'")
    assert any("did not arrive" in note for note in facts["notes"])
    assert opened.ok("1") == "1"


def test_queued_cell_can_be_taken_out(opened: Agent, gate: Gate, tmp_path: Path) -> None:
    running = opened.begin_cell(gate.code)
    gate.wait()
    queued = opened.begin_cell(f"open({str(tmp_path / 'ran')!r}, 'w')")
    ask = {"session_id": opened.session, "cell_id": queued}
    assert "is queued" in opened.refused("edit_cell", **ask, source="1")
    assert opened.call("interrupt", **ask)["state"] == "cancelled"
    gate.open()
    assert opened.wait(running)["state"] == "done"
    assert opened.ok("1") == "1"
    assert not (tmp_path / "ran").exists()
    assert "Nothing was running" in opened.read("interrupt", session_id=opened.session)
    markdown = opened.call("add_markdown", session_id=opened.session, content="m")["cell_id"]
    assert opened.call("wait", session_id=opened.session, cell_id=markdown)["state"] == "not run here"


def test_progress_is_told_while_a_cell_runs(opened: Agent, gate: Gate) -> None:
    told: list[tuple[float, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, message))

    async def ask() -> Any:
        code = f"print('step 3 of 9')\n{gate.code}"
        return await opened.client.call_tool(
            "execute_code", {"session_id": opened.session, "code": code}, progress_callback=note
        )

    running = opened.portal.start_task_soon(ask)
    wait_until(lambda: len(told) >= 3)
    gate.open()
    running.result()
    assert told[-1][1] == "running step 3 of 9"
    assert [seconds for seconds, _ in told] == sorted(seconds for seconds, _ in told)


def test_output_is_read_in_slices(opened: Agent) -> None:
    cell = opened.run("print('0123456789' * 10)")["cell_id"]
    ask = {"session_id": opened.session, "cell_id": cell}
    facts = opened.call("read_output", **ask, start=8, length=4)
    assert (facts["text"], facts["start"], facts["end"], facts["text_chars"]) == ("8901", 8, 12, 100)
    assert opened.call("read_output", **ask, start=-4)["text"] == "6789"
    assert opened.call("read_output", **ask, start=999)["text"] == ""


# ---------------------------------------------------------------------------------------- whole notebooks


def test_run_all_uses_a_fresh_kernel_and_says_what_changed(made: Agent) -> None:
    path = made.start("run all")
    ask = {"session_id": made.session}
    made.run("import random\nrandom.seed(0)\nvalues = [3]")
    object_cell = made.run("object()")["cell_id"]  # its address differs each time, which is no change
    changing = made.run("print('same')\nprint(len(values))")["cell_id"]
    made.run("values.append(4)")
    made.call("edit_cell", **ask, cell_id=changing, source="print('same')\nprint(len(values))")
    made.run("later = 1")
    facts = made.call("run_all", **ask)
    assert (facts["replay"]["state"], facts["replay"]["changed"]) == ("done", 1)
    [row] = [row for row in facts["replay"]["rows"] if row["changed"]]
    assert (row["cell_id"], row["before"], row["after"]) == (changing, "2", "1")
    assert object_cell in facts["replay"]["ran"]
    assert [cell["execution_count"] for cell in cells(path)] == [1, 2, 3, 4, 5]
    made.run("{}['gone']")
    stopped = made.run("import time\nwhile True:\n    time.sleep(0.01)", timeout_s=0.2)["cell_id"]
    last = made.run("last = 1")["cell_id"]
    text = made.read("run_all", **ask)
    assert "[done | 7 of 8 code cells ran | 0 with other outputs]" in text
    assert "(failed): as before" in text
    assert f"cell {stopped} (skipped): it ended with KeyboardInterrupt and might again" in text
    made.call("edit_cell", **ask, cell_id=last, source="gone", run=False)
    made.call("insert_cell", **ask, source="never = 1")
    facts = made.call("run_all", **ask)["replay"]
    failed = facts["rows"][-1]
    assert (facts["state"], failed["cell_id"], failed["state"]) == ("failed", last, "failed")
    assert made.ok("later") == "1"
    assert made.run("never")["error"]["ename"] == "NameError"
    made.shutdown()


def test_progress_and_load_times_are_no_change_of_a_cell() -> None:
    def shown(html: str, **more: str) -> dict[str, Any]:
        return {"output_type": "display_data", "metadata": {}, "data": {"text/html": html, **more}}

    def said(text: str) -> dict[str, Any]:
        return {"output_type": "stream", "name": "stderr", "text": text}

    widget = "application/vnd.jupyter.widget-view+json"
    before = [shown("<code>demo loaded in 2.9 s</code>"), said("5/5 [00:01<00:00, 3.1it/s]\n"), said("{'load_s': 2.9}")]
    after = [shown("<div>a <progress value='5'></progress></div>", **{widget: "x"})]
    after += [said("5/5 [00:09<00:00, 1.1it/s]\n"), said("{'load_s': 31.0}")]
    assert comparable(before) == comparable(after)
    assert comparable([shown("<b>2.9</b>")]) != comparable([shown("<b>3.0</b>")])


def test_long_run_all_goes_on_in_the_background_and_can_be_stopped(made: Agent, gate: Gate) -> None:
    made.start("long")
    ask = {"session_id": made.session}
    made.call("insert_cell", **ask, source="a = 1")
    made.call("insert_cell", **ask, source=gate.code)
    made.call("insert_cell", **ask, source="b = 1")
    facts = made.call("run_all", **ask, wait_s=0)
    assert facts["replay"]["state"] == "running"
    gate.wait()
    assert "run_all is running the notebook (1 of 3 cells so far)" in made.refused("execute_code", **ask, code="1")
    text = made.read("wait", **ask, wait_s=0)
    assert "[running | 1 of 3 code cells ran" in text
    assert made.call("interrupt", **ask)["state"] == "interrupted"
    assert made.call("wait", **ask)["replay"]["state"] == "failed"
    assert made.ok("a") == "1"
    assert made.call("wait", **ask)["text"] == "1"  # the last run, for run_all is over
    made.shutdown()


# ------------------------------------------------------------------------------------------- beginnings


def test_prepared_session_has_a_client_and_knows_how_to_work(made: Agent) -> None:
    path = made.start("prepared")
    answer = made.ask("init_session", session_id=made.session)
    facts, text = answer.structuredContent or {}, text_of(answer)
    assert facts["state"] == "done"
    assert instructions() in text
    names = {technique.name for technique in package_techniques()}
    assert set(facts["techniques"]) == names
    assert all(f"\n{name}: " in text for name in names)
    assert "'class': 'GPT2LMHeadModel'" in facts["text"]
    start = time.monotonic()
    described = made.read("describe_technique", name="logit_lens")
    load = described.rpartition("Load it: ")[2]
    code = f"{load}\nresult = client.run(logit_lens, 'The Eiffel Tower is in')\ntype(result).__name__"
    assert made.ok(code) == "'dict'"
    assert made.ok("%%remote\nmodel.config.n_layer") == "4"  # the same worker
    cost = log_of(path)[-1]["cost"]
    assert (cost["calls"], cost["cold_calls"], cost["backend"], cost["model_name"]) == (1, 0, "local", "demo")
    assert cost["run_s"] > 0
    assert cost["sent_bytes"] > 0
    made.ok("1")
    assert log_of(path)[-1]["cost"] is None
    assert time.monotonic() - start < 60
    assert cells(path)[0]["source"].splitlines()[0] == "from interp_kernel import InterpClient"
    made.shutdown()
    resumed = made.read("start_session_resume_notebook", notebook_path=path.name)
    assert "Note: Warm workers hold demo, so that cells need not load it." in resumed
    assert "[done | 4 of 4 code cells ran" in resumed
    made.call("shutdown_session", session_id=resumed.partition("[session ")[2][:8])


def test_model_of_the_operator_is_in_the_notebook_for_every_cell(workspace: Path) -> None:
    options = {"model_name": "demo", "scaledown_window": 120.0}
    with agent(workspace, "--model", json.dumps(options), INTERP_MODEL="elsewhere", HF_TOKEN="hf_token") as made:
        path = made.start("operator")
        assert nbformat.read(path, as_version=4).metadata["interp"] == options
        made.read("init_session", session_id=made.session)
        line = "client = InterpClient(model_name='demo', scaledown_window=120.0)"
        assert cells(path)[0]["source"].splitlines()[2] == line
        assert made.ok("import os\nos.environ.get('INTERP_MODEL')") == ""
        assert "stays warm 2 min" in made.ok("%remote start")
        cell = made.run("%%remote\nimport os\nprint('HF_TOKEN' in os.environ)")["cell_id"]
        stop_workers()
        assert made.call("run_all", session_id=made.session)["replay"]["state"] == "done"
        assert outputs_of(path, cell) == "True\n"  # the new worker, too, has the token that the kernel must not have
        made.shutdown()


def test_hidden_model_can_not_be_replaced(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Speak of ships.")
    options = {"model_name": "demo", "hidden_system_prompt": f"file:{tmp_path / 'prompt'}"}
    with agent(workspace, "--model", json.dumps(options)) as made:
        path = made.start("hidden")
        assert "has chosen the model" in made.refused("init_session", session_id=made.session, model="gpt2")
        assert "interp" not in nbformat.read(path, as_version=4).metadata
        made.shutdown()


def test_cell_of_a_dead_kernel_keeps_its_source(made: Agent) -> None:
    path = made.start("dead")
    ask = {"session_id": made.session}
    cell = made.run("import os\nos._exit(0)")["cell_id"]
    assert "nothing runs until you call restart_kernel" in made.refused("edit_cell", **ask, cell_id=cell, source="1")
    assert "so it has no variables" in made.refused("list_variables", **ask)
    assert made.call("edit_cell", **ask, cell_id=cell, source="2", run=False)["state"] == "not run here"
    assert [row["source"] for row in cells(path)] == ["2"]
    assert "'zz' is not in" in made.refused("interrupt", **ask, cell_id="zz")
    made.shutdown()


def test_prompt_and_resource_are_the_instructions(opened: Agent) -> None:
    client, portal = opened.client, opened.portal
    [prompt] = portal.call(client.list_prompts).prompts
    content: Any = portal.call(client.get_prompt, prompt.name).messages[0].content
    [resource] = portal.call(client.list_resources).resources
    assert resource.uri == AnyUrl("interp://instructions")
    read: Any = portal.call(client.read_resource, resource.uri).contents[0]
    assert content.text == read.text == instructions()


@pytest.mark.parametrize(("name", "has_facts"), [("claude-code", False), ("cursor", True)])
def test_clients_that_would_show_the_facts_alone_get_the_text_alone(
    workspace: Path, name: str, has_facts: bool
) -> None:

    async def ask() -> tuple[bool, bool]:
        async with (
            stdio_client(command(workspace)) as (reader, writer),
            ClientSession(reader, writer, client_info=Implementation(name=name, version="1")) as client,
        ):
            await client.initialize()
            listed = (await client.list_tools()).tools
            answer = await client.call_tool("list_sessions", {})
            return any(tool.outputSchema for tool in listed), answer.structuredContent is not None

    assert anyio.run(ask) == (has_facts, has_facts)
