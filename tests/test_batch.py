"""Batches of tiny notebooks in real processes: what runs, what is tried again, what a later call goes on from."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from interp_kernel.cli import main
from interp_kernel.errors import NotebookError, SpecError
from interp_kernel.notebook.batch import resume
from interp_kernel.notebook.batch.batch import Outcome, places_for, run_batch
from interp_kernel.notebook.batch.estimate import describe_plan
from interp_kernel.notebook.batch.study import Study, plan, read_study
from interp_kernel.notebook.files import RUNS, append, read_attempts, read_record, read_runs

pytestmark = pytest.mark.usefixtures("no_warm_worker")

WAIT_S = 60.0
EFFECT = "open('effects', 'a').write(f'{i}\\n')"
# What each value of `i` does after the effect of the first cell; `kill` is what a system out of memory does.
FAULTS = """
import os, sys, time
def once(name):
    first = not os.path.exists(name)
    open(name, 'w').close()
    return first
if i == 'error': 1 / 0
if i == 'killed' and once('killed-once'): os.kill(os.getpid(), 9)
if i == 'always killed': os.kill(os.getpid(), 9)
if i == 'runner killed' and once('runner-once'): os.kill(os.getppid(), 9)
"""


def write(path: Path, *sources: str, kernel: str = "python3") -> Path:
    """A notebook whose first cell takes the parameters."""
    cells = [new_code_cell(sources[0], metadata={"tags": ["parameters"]}), *map(new_code_cell, sources[1:])]
    spec = {"name": kernel, "display_name": "x", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


def effects(folder: Path) -> Counter[str]:
    """How often each run had its effect."""
    path = folder / "effects"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def by_value(folder: Path) -> dict[Any, dict[str, Any]]:
    """Newest record of each run, by its value of `i`."""
    return {record["parameters"]["i"]: record for record in read_runs(folder)}


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {WAIT_S:g} s"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, str]:
    """The folder, the outcome and what was shown of a batch in which runs go wrong in every way."""
    folder = tmp_path_factory.mktemp("faulty")
    write(folder / "n.ipynb", "i = ''", EFFECT, FAULTS, "print('end')")
    values = ["fine", "error", "killed", "always killed", "runner killed"]
    study = {"notebooks": "n.ipynb", "grid": {"i": values}, "retries": 1, "output": "out"}
    (folder / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "-m", "interp_kernel.cli", "batch", str(folder / "study.yaml"), "-j", "3"]
    returncode, stdout, shown = in_terminal(command)
    assert returncode == 1, shown
    return folder, Outcome(**json.loads(stdout.splitlines()[-1])), shown


def in_terminal(command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout, and what stood on the terminal that stderr was."""
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 80))
    process = subprocess.Popen(command, stderr=far, stdout=subprocess.PIPE, text=True)
    os.close(far)
    shown = b""
    while True:
        try:
            shown += os.read(near, 4096)
        except OSError:  # the other end is closed
            break
    os.close(near)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, shown.decode()


def test_every_run_ends_and_the_outcome_counts_them(faulty: tuple[Path, Outcome, str]) -> None:
    folder, outcome, shown = faulty
    assert {value: record["status"] for value, record in by_value(folder / "out").items()} == {
        "fine": "completed",
        "error": "failed",
        "killed": "completed",
        "always killed": "dead-kernel",
        "runner killed": "completed",
    }
    assert (outcome.status, outcome.planned, outcome.completed, outcome.failed) == ("failed", 5, 3, 2)
    assert (outcome.skipped, outcome.not_begun) == (0, 0)
    assert "3 of 5 runs are complete, 2 failed or were stopped, 0 never began. Go on with: interp-kernel" in shown
    assert "failed  i=error" in shown
    assert "again  i=killed" in shown
    assert re.search(r"5/5 runs, \d\d:\d\d, left \d\d:\d\d", shown)
    table = [line for line in re.split(r"[\r\n]|\x1b\[A", shown) if re.search(r"\d/\d|again|  starts,", line)]
    assert max(map(len, table)) <= 80
    assert any(f"{cell}/5 cells" in shown for cell in range(1, 5))
    assert "cell 2: ZeroDivisionError" in shown
    assert Path(outcome.report or "").is_file()


def test_only_infrastructure_is_tried_again_and_the_record_says_so(faulty: tuple[Path, Outcome, str]) -> None:
    folder, _, _ = faulty
    assert effects(folder) == {"fine": 1, "error": 1, "killed": 2, "always killed": 2, "runner killed": 2}
    records = by_value(folder / "out")
    assert {value: record["attempt"] for value, record in records.items()} == dict(effects(folder))
    assert [a["status"] for a in records["killed"]["attempts"]] == ["dead-kernel"]
    assert [a["status"] for a in records["runner killed"]["attempts"]] == ["dead-runner"]
    assert records["killed"]["attempts"][0]["failed_cell"] == 2
    assert "killed by SIGKILL" in records["always killed"]["evalue"]
    assert (records["error"]["failed_cell"], records["error"]["is_infrastructure"]) == (2, False)
    stored = read_record(folder / "out" / records["killed"]["output"])
    assert stored is not None
    assert stored["attempts"] == records["killed"]["attempts"]


def test_resume_runs_what_is_not_complete_and_nothing_else(faulty: tuple[Path, Outcome, str]) -> None:
    folder, _, _ = faulty
    before = effects(folder)
    study = read_study(folder / "out" / "study.yaml")  # as the report says
    with pytest.raises(NotebookError, match=r"has 5 runs of an earlier batch, 3 of them complete. Go on with --resume"):
        run_batch(study)
    outcome = run_batch(study, resume=True)
    assert (outcome.status, outcome.skipped, outcome.completed, outcome.failed) == ("failed", 3, 3, 2)
    assert effects(folder) - before == {"error": 1, "always killed": 2}
    assert [a["status"] for a in by_value(folder / "out")["always killed"]["attempts"]] == ["dead-kernel"] * 3


def test_what_has_changed_is_run_again(faulty: tuple[Path, Outcome, str]) -> None:
    folder, _, _ = faulty
    study, out = read_back(folder), folder / "out"
    runs = plan(study)

    def left(**options: bool) -> list[str]:
        return [
            run.label for run in resume.choose(study, runs, **{"resume": False, "only_failed": False, **options})[0]
        ]

    failed = ["i=error", "i=always killed"]
    assert left(resume=True) == left(only_failed=True) == failed
    (out / by_value(out)["fine"]["output"]).unlink()
    assert left(resume=True) == ["i=fine", *failed]
    write(folder / "n.ipynb", "i = ''", EFFECT, FAULTS, "print('another end')")
    assert len(left(resume=True)) == 5
    assert left(only_failed=True) == failed


def read_back(folder: Path) -> Study:
    return Study(
        notebooks=(str(folder / "n.ipynb"),),
        grid={"i": ("fine", "error", "killed", "always killed", "runner killed")},
        retries=1,
        output=str(folder / "out"),
    )


def test_sources_and_weights_count(tmp_path: Path) -> None:
    source, weights = tmp_path / "helper.py", tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    source.write_text("a = 1")
    weights.write_bytes(b"one")
    (tmp_path / "x.ipynb").write_text("{}")
    model = {"model_name": str(weights.parent)}
    hashes = {
        "notebook": "n",
        "sources": {str(source): resume.source_now(str(source))},
        "weights": resume.weights_now(json.dumps(model)),
    }
    record = {"status": "completed", "output": "x.ipynb", "model": model, "hashes": hashes}

    def is_current(**changes: Any) -> bool:
        resume.source_now.cache_clear()
        resume.weights_now.cache_clear()
        return resume.is_current(tmp_path, {**record, **changes}, "n")

    assert is_current()
    assert not is_current(status="failed")
    assert not is_current(hashes={**hashes, "notebook": "m"})
    weights.write_bytes(b"two")
    assert not is_current()
    weights.write_bytes(b"one")
    assert is_current()
    source.write_text("a = 2")
    assert not is_current()
    source.unlink()
    assert not is_current()


def waiting(folder: Path) -> int:
    """How many runs have come to the cell that waits."""
    return (folder / "waiting").stat().st_size if (folder / "waiting").exists() else 0


@pytest.fixture
def slow(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder, and the command of a batch of it whose runs wait for a file named `go`."""
    wait = "import os, time\nopen('waiting', 'a').write('.')\nwhile not os.path.exists('go'): time.sleep(0.05)"
    write(tmp_path / "n.ipynb", "i = 0", EFFECT, wait)
    study = {"notebooks": "n.ipynb", "grid": {"i": [0, 1, 2]}, "output": "out"}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    return tmp_path, [sys.executable, "-m", "interp_kernel.cli", "batch", str(tmp_path / "study.yaml")]


def test_a_signal_saves_what_is_there_and_resume_goes_on(slow: tuple[Path, list[str]]) -> None:
    folder, command = slow
    batch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: waiting(folder) == 2, "that two runs wait")
    with pytest.raises(SpecError, match=rf"out is in use by another batch \(process {batch.pid} since"):
        run_batch(read_study(folder / "study.yaml"), resume=True)
    batch.send_signal(signal.SIGTERM)
    stdout, shown = batch.communicate(timeout=60)
    assert batch.returncode == 130
    outcome = json.loads(stdout.splitlines()[-1])
    assert (outcome["status"], outcome["failed"], outcome["not_begun"]) == ("interrupted", 2, 1)
    assert "0 of 3 runs are complete, 2 failed or were stopped, 1 never began. Go on with:" in shown
    for record in read_runs(folder / "out"):
        assert (record["status"], record["failed_cell"]) == ("interrupted", 2)
        assert record["evalue"] == "SIGTERM stopped the run in this cell."
        assert read_record(folder / "out" / record["output"]) == record
    (folder / "go").touch()
    ran = subprocess.run([*command, "--resume", "-j", "3"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, json.loads(ran.stdout)["completed"]) == (0, 3), ran.stderr
    assert effects(folder) == {"0": 2, "1": 2, "2": 1}


def test_a_run_that_ended_well_before_all_was_killed_is_not_run_again(tmp_path: Path) -> None:
    write(tmp_path / "n.ipynb", "i = 0", EFFECT)
    study = Study(notebooks=(str(tmp_path / "n.ipynb"),), output=str(tmp_path / "out"))
    run_batch(study)
    lines = (tmp_path / "out" / RUNS).read_text().splitlines()
    assert len(lines) == 2
    (tmp_path / "out" / RUNS).write_text(lines[0] + "\n" + lines[1][:100])
    outcome = run_batch(study, resume=True)
    assert (outcome.status, outcome.skipped) == ("completed", 1)
    assert effects(tmp_path) == {"0": 1}
    assert [record["status"] for record in read_attempts(tmp_path / "out")] == ["completed"]


def test_nothing_more_is_begun_after_a_failure_if_so_asked(tmp_path: Path) -> None:
    write(tmp_path / "n.ipynb", "i = 0", EFFECT, "1 / i")
    study = Study(
        notebooks=(str(tmp_path / "n.ipynb"),),
        grid={"i": (1, 0, 2, 3)},
        jobs=1,
        stop_on_failure=True,
        output=str(tmp_path / "out"),
    )
    outcome = run_batch(study)
    assert (outcome.status, outcome.completed, outcome.failed, outcome.not_begun) == ("failed", 1, 1, 2)
    assert effects(tmp_path) == {"1": 1, "0": 1}


def test_workers_are_shared_bounded_and_their_death_is_no_fault_of_a_run(tmp_path: Path) -> None:
    span = "import time\nopen('spans', 'a').write(f'{time.time()} {word}\\n')"
    body = """%%remote
import os, time, pathlib
mark = pathlib.Path(flag)
if i == 1 and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), 9)
y = model(**tokenizer('rain', return_tensors='pt')).logits.sum().item()"""
    write(
        tmp_path / "n.ipynb",
        f"i = 0\nflag = {str(tmp_path / 'flag')!r}\nword = 'begin'",
        span,
        body,
        "word = 'end'\n" + span + "\nimport interp_kernel\ninterp_kernel.record('y', y)",
        kernel="interp",
    )
    study = Study(
        notebooks=(str(tmp_path / "n.ipynb"),),
        grid={"i": (0, 1, 2)},
        models=("demo",),
        jobs=3,
        per_worker=1,
        output=str(tmp_path / "out"),
    )
    assert run_batch(study).status == "completed"
    records = by_value(tmp_path / "out")
    assert [a["ename"] for a in records[1]["attempts"]] == ["WorkerDiedError"]
    assert len({record["metrics"]["y"] for record in records.values()}) == 1
    assert sum(record["totals"]["cold_calls"] for record in records.values()) <= 2
    words = [line.split()[1] for line in sorted((tmp_path / "spans").read_text().splitlines())]
    # One at a time; the run whose worker died began and did not end, and went to the back of the queue.
    assert words == ["begin", "end", "begin", "begin", "end", "begin", "end"]


def test_lock_of_a_batch_that_is_gone_is_waited_for(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    lock = tmp_path / ".lock"
    lock.write_text(f"process {gone.pid} since then")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(lock)!r}); fcntl.flock(f, 2); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    waited: list[float] = []

    def look(_: float) -> None:
        waited.append(1)
        holder.communicate(b"\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp_kernel.notebook.batch.resume.time.sleep", look)
        with resume.locked(tmp_path):
            assert lock.read_text().startswith(f"process {os.getpid()} since")
            with (
                pytest.raises(SpecError, match=f"in use by another batch .process {os.getpid()} since"),
                resume.locked(tmp_path),
            ):
                pass
    assert waited == [1]


def test_dry_run_shows_plan_time_and_cost_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "n.ipynb", "i = 0", EFFECT)
    (tmp_path / "s.yaml").write_text("notebooks: n.ipynb\ngrid: {i: [0, 1, 2]}\noutput: out")
    assert main(["batch", str(tmp_path / "s.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Study s: 3 runs, 3 to be run now, into {tmp_path / 'out'}"
    assert [line.split()[-1] for line in lines[2:5]] == ["i=0", "i=1", "i=2"]
    assert lines[5].startswith("Time: not known")
    assert lines[6] == "Cost: none; all workers are on this machine."
    assert not (tmp_path / "out").exists()
    assert effects(tmp_path) == {}


def test_cost_follows_from_earlier_runs_and_the_price(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", "i = 0", EFFECT)
    (tmp_path / "out").mkdir()
    append(tmp_path / "out", {"key": "k", "attempt": 1, "status": "completed", "notebook": str(path), "seconds": 360})
    study = Study(
        notebooks=(str(path),),
        grid={"i": tuple(range(10))},
        models=({"model": "demo", "gpu": "l40s"},),
        backend="modal",
        price_per_hour=2.0,
        jobs=5,
        output=str(tmp_path / "out"),
    )
    runs = plan(study)
    lines = list(describe_plan(study, runs, runs))
    assert lines[-2:] == [
        "Time: about 12 min 0 s, by what earlier runs took.",
        "Cost: about 1 h 0 min of a container with L40S (middle), 2.00 at 2 an hour.",
    ]


def test_places_bound_what_one_worker_or_container_serves() -> None:
    def places(model: dict[str, Any] | None, **options: Any) -> list[tuple[Any, int]]:
        study = Study(notebooks=("n.ipynb",), jobs=4, **options)
        return [((place.options or {}).get("app_name"), place.capacity) for place in places_for(study, model)]

    assert places(None) == places({"model_name": "demo"}) == [(None, 4)]
    assert places({}, per_worker=2, containers=3) == [(None, 2)]
    assert places({"mode": "modal"}) == [(None, 4)]
    assert places({"mode": "modal"}, containers=3, per_worker=1) == [(None, 3)]
    shared = {"mode": "modal", "deploy": True}
    assert places(shared, per_worker=2) == [("interp-kernel", 2)]
    assert places(shared, containers=2) == [("interp-kernel-1", 4), ("interp-kernel-2", 4)]


def test_launcher_that_does_not_come_up_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "n.ipynb", "i = 0", EFFECT)
    (tmp_path / "nbconvert.py").write_text("raise RuntimeError('broken install')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    study = Study(notebooks=(str(tmp_path / "n.ipynb"),), output=str(tmp_path / "out"))
    with pytest.raises(NotebookError, match=r"did not come up; the end of .*batch.log:\n[\s\S]*broken install"):
        run_batch(study)


@pytest.mark.parametrize(
    "code",
    ["import interp_kernel.notebook.batch.launcher", "from interp_kernel.cli import main; main(['check', 'n.ipynb'])"],
)
def test_no_command_compiles_a_grammar_for_a_second(code: str, tmp_path: Path) -> None:
    write(tmp_path / "n.ipynb", "i = 0")
    code += "; import sys; print(sorted({'nbformat', 'jsonschema', 'lark'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout.splitlines()[-1] == "['jsonschema', 'nbformat']"
