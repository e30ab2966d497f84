"""Agents without a language model: scripted studies, and the built-in loop against a stub endpoint; a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import nbformat
import psutil
import pytest

from interp_kernel import errors
from interp_kernel.agents import instructions, loop
from interp_kernel.agents.loop import Limits, run_loop
from interp_kernel.agents.record import Run
from interp_kernel.catalogue import package_techniques
from interp_kernel.cli import main
from tests.agents.endpoint import Endpoint, Fault
from tests.agents.scripted import Answer, play
from tests.agents.studies import HEADS_STUDY, HEADS_TASK, HOSTILE_STUDY, Call, Turn, say, step
from tests.helpers_mcp import read, server
from tests.helpers_worker import wait_until

KEY = "sk-for-the-endpoint-alone"
BEGIN = say("", "start_new_session", experiment_name="loop")
END = say("", "shutdown_session", session_id="$session")
LOOK = say("", "list_sessions")
DESCRIBE = say("", "describe_technique", name="activation_patching")
LIMITS = Limits(turns=50, tokens=100_000)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def loop_on(endpoint: Endpoint, workspace: Path, limits: Limits = LIMITS) -> Run:
    return run_loop(workspace, "Do it.", endpoint.base_url, "stub", limits)


def told(endpoint: Endpoint, request: int = -1) -> list[dict[str, Any]]:
    """Messages of a request that are no answers of the model, after the task."""
    return [m for m in endpoint.requests[request]["messages"][2:] if m["role"] != "assistant"]


# ------------------------------------------------------------------------------------------------ instructions


def test_the_instructions_are_short_and_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--print-instructions"]) == 0
    assert capsys.readouterr().out == instructions()
    assert len(instructions().encode()) < 8_000


def test_the_instructions_name_only_what_there_is(tmp_path: Path) -> None:
    """Tools, techniques, errors and functions: a wrong name in them would cost every agent a call."""

    async def ask() -> list[str]:
        async with server(tmp_path) as client:
            return [tool.name for tool in (await client.list_tools()).tools]

    tools = set(anyio.run(ask))
    text = instructions()
    called = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)[`(]", text))
    assert called - tools == {"session_id"}
    missing = tools - set(re.findall(r"\b[a-z_]+\b", text))
    assert missing <= {"insert_cell", "move_cell", "delete_cell"}, "every other tool has its place in the workflow"
    named = set(re.findall(r"`(\w+Error)`", text))
    assert named >= {"ShipError", "WorkerDiedError", "LostValueError", "LoadError"}
    assert all(hasattr(errors, name) for name in named)
    techniques = {technique.name for technique in package_techniques()}
    assert set(re.findall(r"from techniques\.(\w+) import \1", text)) <= techniques


def test_the_examples_of_the_instructions_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", instructions(), re.DOTALL)
    assert len(blocks) >= 3

    async def follow() -> list[Answer]:
        async with server(tmp_path) as client:
            ids: dict[str, str] = {}
            await play(client, [BEGIN, say("", "init_session", session_id="$session")], ids)
            path = re.search(
                r"(/\S+/patching\.py)", await read(client, "describe_technique", name="activation_patching")
            )
            assert path
            given = f"""
prompt = clean = "The Eiffel Tower is located in the city of"
corrupted = "The Big Ben is located in the city of"
prompts = [clean, "The Eiffel Tower can be found in"]
path = {path[1]!r}
"""
            answers = await play(client, [step("", given), *(step("", block) for block in blocks)], ids)
            await play(client, [END], ids)
            return answers

    answers = anyio.run(follow)
    assert [answer.facts["state"] for answer in answers] == ["done"] * (len(blocks) + 1)
    differences = json.loads(answers[-1].facts["text"])
    assert len(differences) == 2
    assert min(differences) > 0


# ------------------------------------------------------------------------------------------------ whole studies


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Endpoint]]:
    """The study of the docs, by the command that a person types; its folder and what the endpoint was asked."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "TASK.md").write_text(HEADS_TASK)
    command = [sys.executable, "-m", "interp_kernel.cli", "agent", "openai", "TASK.md"]
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.25}
    with Endpoint(HEADS_STUDY, usage) as endpoint:
        command += ["--base-url", endpoint.base_url, "--model", "stub"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        (folder / "answer.json").write_text(done.stdout)
        yield folder, endpoint


def test_a_study_leaves_a_notebook_that_a_person_can_read(study: tuple[Path, Endpoint]) -> None:
    folder, _ = study
    (name,) = json.loads((folder / "answer.json").read_text())["notebooks"]
    notebook = nbformat.read(folder / name, as_version=4)
    nbformat.validate(notebook)
    cells = {cell.source.splitlines()[0]: cell for cell in notebook.cells}
    assert "# Which heads carry the indirect object?" in cells
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    findings = notebook.cells[-1].outputs[0].data["text/markdown"]
    # The truth about the demo model, measured elsewhere: its induction head in layer 1 moves the name.
    assert "a1.h1" in findings
    beaten, of = map(int, re.search(r"more than (\d+) of (\d+) random", " ".join(findings.split())).groups())  # type: ignore[union-attr]
    assert of == 20
    assert beaten >= 19
    assert "nan" not in findings


def test_a_study_is_recorded_with_its_cost(study: tuple[Path, Endpoint]) -> None:
    folder, endpoint = study
    (run,) = (folder / "agent-runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    turns = len(HEADS_STUDY)
    assert (record["status"], record["turns"], record["model"]) == ("completed", turns, "stub")
    assert record["tool_calls"] == sum(len(turn.calls) for turn in HEADS_STUDY)
    assert record["tokens"]["total_tokens"] == 15 * turns
    assert record["cost_usd"] == pytest.approx(0.25 * turns)
    assert record["answer"] == HEADS_STUDY[-1].words
    events = [json.loads(line) for line in (run / "transcript.jsonl").read_text().splitlines()]
    assert [event["role"] for event in events[:2]] == ["system", "user"]
    assert events[1]["content"] == (run / record["user_prompt"]).read_text() == HEADS_TASK
    answers = [event["content"] for event in events if event["role"] == "tool"]
    assert answers == [m["content"] for m in endpoint.requests[-1]["messages"] if m["role"] == "tool"]
    assert not any(KEY in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
    assert endpoint.keys == [f"Bearer {KEY}"] * turns


def test_the_notebook_of_the_docs_is_of_this_script(study: tuple[Path, Endpoint]) -> None:
    """If this fails, the script has changed: `python -m docs.agent_example` makes notebook and transcript anew."""
    folder, _ = study
    (name,) = json.loads((folder / "answer.json").read_text())["notebooks"]
    shown = Path(__file__).parent.parent / "docs" / "agents" / "study.ipynb"
    ours, theirs = (nbformat.read(path, as_version=4) for path in (folder / name, shown))
    assert [cell.source for cell in ours.cells] == [cell.source for cell in theirs.cells]


@pytest.mark.usefixtures("chromium")
def test_the_model_sees_pictures(study: tuple[Path, Endpoint]) -> None:
    _, endpoint = study
    pictures = [m["content"] for m in told(endpoint) if isinstance(m["content"], list)]
    assert [part["type"] for part in pictures[0]] == ["text", "image_url"]
    assert pictures[0][1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_a_hostile_agent_is_answered_in_words_and_the_session_lives_on(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "outside.ipynb").write_text("{}")

    async def attack() -> list[str]:
        async with server(tmp_path / "work", OPENAI_API_KEY=KEY) as client:
            ids: dict[str, str] = {}
            await play(client, [BEGIN], ids)
            session, texts = ids["session"], []
            for call, _ in HOSTILE_STUDY:
                (answer,) = await play(client, [Turn("", (call,))], ids)
                texts.append(answer.text)
                if call.tool == "start_new_session" and not answer.result.isError:
                    assert (tmp_path / "work") in Path(answer.facts["notebook_path"]).parents
                    await play(client, [END], ids)
                ids["session"] = session
            await play(client, [END], ids)
            return texts

    texts = anyio.run(attack)
    unexpected = [
        (call, text[-300:]) for (call, says), text in zip(HOSTILE_STUDY, texts, strict=True) if says not in text
    ]
    assert not unexpected
    assert not any(KEY in text for text in texts)
    assert max(len(text.encode()) for text in texts) <= 20_000
    assert (tmp_path / "outside.ipynb").read_text() == "{}"


# ------------------------------------------------------------------------------------------------ the loop


def test_malformed_calls_are_explained_and_run_nothing(tmp_path: Path) -> None:
    calls = (
        Call("list_sessions", raw='{"a": '),
        Call("list_sessions", raw="[1]"),
        Call("list_session"),
        Call("execute_code", {"code": "1"}),
        Call("list_sessions"),
    )
    with Endpoint([Turn("", calls)]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    texts = [message["content"] for message in told(endpoint)]
    assert "The arguments of list_sessions are not JSON" in texts[0]
    assert texts[1] == "The arguments of list_sessions are a list; expected an object. Send the call again."
    assert texts[2].startswith("There is no tool 'list_session'; the tools are start_new_session, ")
    assert "'session_id' is a required property" in texts[3]
    assert (run.record.status, run.record.tool_calls) == ("completed", 2)
    sent = [call["function"]["arguments"] for call in endpoint.requests[-1]["messages"][2]["tool_calls"]]
    assert all(isinstance(json.loads(arguments), dict) for arguments in sent)  # templates of some models need that


def test_rate_limits_and_failures_are_waited_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soon = {"retry-after-ms": "20"}
    faults = [Fault(429, headers=soon), Fault(429, headers=soon), Fault(503, headers=soon), Fault(500, headers=soon)]
    with Endpoint([*faults, LOOK, *faults, Turn("Done.")]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert (run.record.status, run.record.turns, len(endpoint.requests)) == ("completed", 2, 10)
    assert capfd.readouterr().err.count("Retrying request in 0.02") == 8


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(401, "no such key"), "refused: AuthenticationError: .*no such key"),
        (Fault(200, "upstream is gone"), "refused: OpenAIError: the answer is no chat completion: .*upstream is gone"),
        (Fault(400, "nothing to leave out"), "refused: BadRequestError: .*nothing to leave out"),
        (Fault(429, "come back tomorrow", {"retry-after": "86400"}), "refused: RateLimitError: .*tomorrow"),
    ],
)
def test_what_waiting_does_not_mend_ends_the_study_in_words(tmp_path: Path, fault: Fault, expected: str) -> None:
    with Endpoint([LOOK, fault]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert (run.record.status, len(endpoint.requests)) == ("failed", 2)
    assert re.search(expected, run.record.reason or "")


def test_an_endpoint_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "RETRIES", 1)
    with Endpoint([]) as endpoint:
        pass
    run = loop_on(endpoint, tmp_path)
    assert run.record.reason == f"The endpoint {endpoint.base_url}/ refused: APIConnectionError: Connection error."


@pytest.mark.parametrize(
    ("limits", "turns"), [(Limits(turns=10, tokens=100_000), 10), (Limits(turns=50, tokens=1_150), 10)]
)
def test_a_spent_budget_warns_and_then_stops(tmp_path: Path, limits: Limits, turns: int) -> None:
    with Endpoint([LOOK] * 50) as endpoint:
        run = loop_on(endpoint, tmp_path, limits)
    assert (run.record.status, run.record.turns, len(endpoint.requests)) == ("budget", turns, turns)
    assert f"{turns} of {limits.turns} turns and {120 * turns} of {limits.tokens} tokens" in (run.record.reason or "")
    warnings = [m["content"] for m in told(endpoint) if m["role"] == "user"]
    assert warnings == ["The budget of this study is nearly used up. Write the findings now, as far as they carry."]


def test_a_model_that_never_calls_a_tool_right_is_given_up(tmp_path: Path) -> None:
    with Endpoint([Turn(), Turn("", (Call("nothing"),)), Turn(), LOOK, *[Turn()] * 9]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert (run.record.status, len(endpoint.requests)) == ("failed", 9)
    assert run.record.reason == "5 answers in a row of the model 'stub' held no usable tool call."


def test_pictures_and_then_old_answers_are_left_out_if_the_endpoint_refuses_them(tmp_path: Path) -> None:
    draw = step("", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    too_much = Fault(400, "context_length_exceeded")
    with Endpoint([BEGIN, draw, too_much, DESCRIBE, *[LOOK] * 8, too_much, END]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert run.record.status == "completed"
    assert told(endpoint, 2)[-1]["content"][1]["type"] == "image_url"
    assert told(endpoint, 3)[-1]["content"] == "(Pictures were left out: the endpoint refused them.)"
    before, after = (next(m for m in told(endpoint, i) if "activation_patching(" in m["content"]) for i in (12, 13))
    assert len(after["content"]) < 1_000 < len(before["content"])
    assert "(cut; read_output has the rest)" in after["content"]


def test_a_server_that_ends_is_told_and_has_never_seen_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print(*sorted(os.environ), *os.environ.values(), 'no kernel today', file=sys.stderr)"
    monkeypatch.setattr(loop, "server_command", lambda workspace: [sys.executable, "-c", code])
    with Endpoint([]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert run.record.status == "failed"
    assert re.match("The MCP server ended: .* its log is ", run.record.reason or "")
    log = run.path("server.log").read_text()
    assert log.endswith("no kernel today\n")
    assert "INTERP_RUNTIME_DIR" in log
    assert KEY not in log


def test_a_server_that_is_killed_is_told(tmp_path: Path) -> None:
    class Killer(Endpoint):
        def answer(self, body: dict[str, Any]) -> Fault | dict[str, Any]:
            if self.requests:
                (process,) = [p for p in psutil.Process().children() if str(tmp_path) in p.cmdline()]
                process.kill()
                process.wait(10)
            return super().answer(body)

    with Killer([LOOK, LOOK]) as endpoint:
        run = loop_on(endpoint, tmp_path)
    assert run.record.status == "failed"
    assert "The MCP server ended: " in (run.record.reason or "")


def test_a_stop_interrupts_the_cell_and_finishes_the_record(tmp_path: Path) -> None:
    (tmp_path / "TASK.md").write_text("Do it.")
    code = """
from pathlib import Path
import time
Path("begun").touch()
try:
    time.sleep(60)
finally:
    Path("stopped").touch()
"""
    with Endpoint([BEGIN, step("", code)]) as endpoint:
        command = [sys.executable, "-m", "interp_kernel.cli", "agent", "openai", "TASK.md", "--model", "stub"]
        command += ["--base-url", endpoint.base_url]
        run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        wait_until((tmp_path / "begun").exists)
        run.send_signal(signal.SIGTERM)
        assert json.loads(run.communicate(timeout=20)[0])["status"] == "interrupted"
        assert run.returncode == 130
    wait_until((tmp_path / "stopped").exists)
    (folder,) = (tmp_path / "agent-runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("interrupted", "It was stopped by a signal.")

    async def close() -> None:
        async with server(tmp_path) as client:
            await play(
                client, [END], {"session": re.findall(r"session ([0-9a-f]{8})", await read(client, "list_sessions"))[0]}
            )

    anyio.run(close)


@pytest.mark.parametrize("option", ["--max-turns", "--max-tokens"])
def test_a_limit_of_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["agent", "openai", option, "0"])
    assert "0 is no limit; expected 1 or more" in capsys.readouterr().err
