"""Batches to which everything happens that can: each run ends complete or honestly failed, and `--resume` completes.

All through the command, with real kernels: most of them plain python3, for the worker has no part in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from interp_kernel.backends.local import list_workers
from interp_kernel.cli import main
from interp_kernel.notebook.files import read_record, read_runs
from tests.helpers_worker import wait_until

pytestmark = pytest.mark.usefixtures("no_warm_worker")

END_S = 150.0
COMMAND = (sys.executable, "-m", "interp_kernel.cli", "batch")


class Ended:
    """A batch that has ended: exit code, its line of JSON, what it said, and the largest of its processes in MB."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        stdout, self.stderr = process.communicate(timeout=END_S)
        self.code = process.returncode
        self.outcome: dict[str, Any] = json.loads(stdout) if stdout else {}


def notebook(path: Path, *cells: Any, kernel: str = "python3") -> Path:
    """A notebook of code cells, given as text or, with tags, as ready cells."""
    ready = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(new_notebook(cells=ready, metadata={"kernelspec": spec}), path)
    return path


def tagged(source: str, tag: str) -> Any:
    return new_code_cell(source, metadata={"tags": [tag]})


def study(folder: Path, *notebooks: Path, **fields: Any) -> Path:
    """A study of notebooks in `folder`, whose results go into `folder/out`."""
    whole = {"notebooks": [path.name for path in notebooks], "output": "out", **fields}
    (folder / "study.yaml").write_text(json.dumps(whole, indent=1))
    return folder / "study.yaml"


def start(path: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, str(path), *options], **{**pipes, **more})


def batch(path: Path, *options: str, **more: Any) -> Ended:
    return Ended(start(path, *options, **more))


def statuses(out: Path) -> dict[str, str]:
    """The status of each run, by its notebook's name; record, executed notebook and cells must agree about it."""
    found = {}
    for record in read_runs(out):
        stored = json.loads((out / record["output"]).read_text(encoding="utf-8"), parse_constant=no_constant)
        nbformat.validate(stored)
        facts, cells = stored["metadata"]["papermill"], [c["metadata"]["papermill"]["status"] for c in stored["cells"]]
        assert facts["interp"]["status"] == record["status"] == stored["metadata"]["interp"]["run"]["status"]
        assert (facts["exception"] is None) == (record["status"] == "completed")
        ended = cells.index("failed") if "failed" in cells else len(cells)
        assert cells[:ended] == ["completed"] * ended
        assert set(cells[ended + 1 :]) <= {"pending"}
        assert ("failed" in cells) == (record["failed_cell"] is not None)
        assert (out / record["html"]).stat().st_size > 1000
        found[Path(record["notebook"]).stem] = record["status"]
    return found


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def printed(out: Path, name: str, cell: int) -> str:
    (record,) = (record for record in read_runs(out) if Path(record["notebook"]).stem == name)
    outputs = json.loads((out / record["output"]).read_text())["cells"][cell]["outputs"]
    return "".join("".join(output.get("text", "")) for output in outputs)


# ------------------------------------------------------------------------------------- what a cell may do


def test_whatever_ends_a_cell_status_exit_code_and_record_agree(tmp_path: Path) -> None:
    last = "print('never')"
    path = study(
        tmp_path,
        notebook(tmp_path / "error.ipynb", "1", "1 / 0", last),
        notebook(tmp_path / "exit.ipynb", "1", "import sys; sys.exit(0)", last),
        notebook(tmp_path / "expected.ipynb", tagged("1 / 0", "raises-exception"), "print('after')"),
        notebook(tmp_path / "usage.ipynb", "1", "%load_ext", last),
        notebook(tmp_path / "slow.ipynb", "print('before')\nimport time; time.sleep(600)", last),
        notebook(tmp_path / "kernel.ipynb", "import os; os._exit(3)", last),
        timeout=4,
        jobs=2,
        retries=1,
    )
    ended = batch(path)
    out = tmp_path / "out"
    assert statuses(out) == {
        "error": "failed",
        "exit": "failed",
        "expected": "completed",
        "usage": "failed",
        "slow": "timeout",
        "kernel": "dead-kernel",
    }
    assert ended.code == 1
    assert (ended.outcome["status"], ended.outcome["completed"], ended.outcome["failed"]) == ("failed", 1, 5)
    assert "1 of 6 runs are complete, 5 failed or were stopped, 0 never began. Go on with: " in ended.stderr
    records = {Path(record["notebook"]).stem: record for record in read_runs(out)}
    reasons = {name: (r["failed_cell"], r["ename"]) for name, r in records.items() if r["failed_cell"] is not None}
    assert reasons == {
        "error": (1, "ZeroDivisionError"),
        "exit": (1, "SystemExit"),
        "usage": (1, "UsageError"),
        "slow": (0, "CellTimeoutError"),
        "kernel": (0, "DeadKernelError"),
    }
    assert {name: r["attempt"] for name, r in records.items() if r["attempt"] > 1} == {"kernel": 2}
    assert printed(out, "slow", 0) == "before\n"


def test_whatever_a_cell_puts_out_is_stored_and_bounded(tmp_path: Path) -> None:
    nan = "display({'application/json': {'a': float('nan')}, 'text/plain': 'x'}, raw=True)\nfloat('inf')"
    figure = (
        "display({'application/vnd.plotly.v1+json': {'data': [{'y': ['x' * 20_000_000]}], 'layout': {}}}, raw=True)"
    )
    (tmp_path / "helper.py").write_text("answer = 42")
    path = study(
        tmp_path,
        notebook(tmp_path / "odd.ipynb", "print('a\\ud800b')", "print('c\\udc80d')", "print('after')", nan, "1"),
        notebook(tmp_path / "last_words.ipynb", "raise ValueError('\\ud800 own')", "print('never')"),
        notebook(tmp_path / "large.ipynb", figure, "1"),
        notebook(tmp_path / "moves.ipynb", "import os; os.chdir('/')", "print(os.getcwd())"),
        notebook(tmp_path / "stays.ipynb", "import os, helper; print(os.getcwd(), helper.answer)"),
    )
    ended = batch(path)
    out = tmp_path / "out"
    names = ("odd", "large", "moves", "stays")
    assert statuses(out) == {**dict.fromkeys(names, "completed"), "last_words": "failed"}
    assert (ended.code, ended.outcome["completed"]) == (1, 4)
    assert [printed(out, "odd", cell) for cell in range(3)] == ["a?b\n", "c?d\n", "after\n"]
    assert printed(out, "moves", 1) == "/\n"
    assert printed(out, "stays", 0) == f"{tmp_path} 42\n"
    (large,) = out.glob("large.*.ipynb")
    assert 20e6 < large.stat().st_size < 21e6


def test_a_gigabyte_of_print_fills_neither_memory_nor_disk(tmp_path: Path) -> None:
    body = "for i in range(10_000): print('x' * 99_999)\nprint('the end')"
    path = study(
        tmp_path, notebook(tmp_path / "much.ipynb", body, "import sys; print('e' * 9_000_000, file=sys.stderr)")
    )
    measured = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:])\n"
    measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    command = [sys.executable, "-c", measured, *COMMAND, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=True)
    assert statuses(tmp_path / "out") == {"much": "completed"}
    text = printed(tmp_path / "out", "much", 0)
    assert text.endswith("x\nthe end\n")
    assert "[990,000,008 characters were left out here, of what this cell printed.]" in text
    assert len(text) < 10_001_000
    assert len(printed(tmp_path / "out", "much", 1)) == 9_000_001
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 60e6
    assert int(ran.stdout.splitlines()[-1]) < 400_000  # KiB, of the largest process: batch, runner or kernel


# ------------------------------------------------------------------------------------- where results go


@pytest.mark.parametrize(
    ("size", "completed", "not_begun"),
    [("600k", 0, 1), ("1100k", 1, 0)],
    ids=["in the first run's page", "in the second run's notebook"],
)
def test_disk_full(
    tmp_path: Path, mounted: Callable[[Path, str], None], size: str, completed: int, not_begun: int
) -> None:
    mounted(tmp_path / "out", f"size={size}")
    sources = [notebook(tmp_path / f"{name}.ipynb", "print('x' * 250_000)", "1") for name in "ab"]
    path = study(tmp_path, *sources, jobs=1)
    ended = batch(path)
    counts = [ended.outcome[name] for name in ("completed", "failed", "not_begun")]
    assert (ended.code, ended.outcome["status"], counts) == (1, "failed", [completed, 1, not_begun])
    assert "OSError: [Errno 28] No space left on device" in ended.stderr
    assert ended.stderr.count("Nothing more is begun: results can't be written ([Errno 28] No space") == not_begun
    for record in read_runs(tmp_path / "out"):
        if record["status"] == "completed":
            assert read_record(tmp_path / "out" / record["output"]) == record
    assert all(page.read_text().rstrip().endswith("</html>") for page in (tmp_path / "out").glob("*.html"))
    assert not list((tmp_path / "out").glob(".*tmp"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "out")], check=True)
    resumed = batch(path, "--resume")
    assert (resumed.code, resumed.outcome["skipped"], resumed.outcome["completed"]) == (0, completed, 2)
    assert statuses(tmp_path / "out") == dict.fromkeys("ab", "completed")


@pytest.mark.skipif(os.getuid() == 0, reason="As root a disk that is really full is used instead.")
def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """To a process that writes, a limit of its files' size is a full disk."""
    path = study(tmp_path, notebook(tmp_path / "n.ipynb", "print('x' * 1_500_000)", "1"))
    ended = batch(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
    assert (ended.code, ended.outcome["failed"]) == (1, 1)
    (record,) = read_runs(tmp_path / "out")
    assert (record["status"], record["ename"], record["failed_cell"]) == ("failed", "OSError", None)
    assert "File too large" in record["evalue"]
    assert [file.name for file in (tmp_path / "out").glob("*.ipynb.*tmp")] == []


def test_folder_that_can_not_be_written(
    tmp_path: Path, mounted: Callable[[Path, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, notebook(tmp_path / "n.ipynb", f"open({str(tmp_path / 'ran')!r}, 'w')"))
    mounted(tmp_path / "out", "ro")
    assert main(["batch", str(path)]) == 1
    assert "interp-kernel: [Errno 30] Read-only file system: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_folder_whose_place_is_taken_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study(tmp_path, notebook(tmp_path / "n.ipynb", "1"))
    (tmp_path / "out").write_text("mine")
    assert main(["batch", str(path)]) == 1
    assert "interp-kernel: [Errno 17] File exists: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def mounted() -> Iterator[Callable[[Path, str], None]]:
    """Mounts a small disk on a folder until the end of the test; read-only is then so for root too."""
    if os.getuid() != 0:
        pytest.skip("Only root can mount a disk.")
    folders = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"No disk can be mounted here: {made.stderr.strip()}")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_typo_in_the_spec_is_told_with_line_and_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(tmp_path / "n.ipynb", tagged("layer = 1", "parameters"))
    for typo, message in [
        ("gird:\n  layer: [1, 2]", "line 3: 'gird' is no key of a study. Did you mean 'grid'?"),
        ("grid:\n  laye: [1, 2]", "has no parameter 'laye'; it takes layer. Did you mean 'layer'?"),
    ]:
        (tmp_path / "study.yaml").write_text(f"notebooks: n.ipynb\noutput: out\n{typo}\n")
        assert main(["batch", str(tmp_path / "study.yaml")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ death

CELLS = 4


def marking(folder: Path, count: int, kernel: str = "python3", pause_s: float = 0.05, **fields: Any) -> Path:
    """A study of one notebook with `count` layers, each cell of which notes that it ran, in `folder/log`."""
    note = f"with open({str(folder / 'log')!r}, 'a') as log:\n    print(layer, pid, {{cell}}, file=log)"
    cells = [tagged("layer = 0", "parameters"), "import os, time\npid = os.getpid()"]
    for cell in range(CELLS):
        is_remote = kernel == "interp" and cell % 2
        pause = "" if is_remote else f"\ntime.sleep({pause_s})"
        cells.append(("%%remote\n" if is_remote else "") + note.format(cell=cell) + pause)
    (folder / "log").touch()
    return study(
        folder, notebook(folder / "n.ipynb", *cells, kernel=kernel), grid={"layer": list(range(count))}, **fields
    )


def noted(folder: Path) -> list[tuple[int, int, int]]:
    """Layer, kernel and cell of every side effect, in their order; none may be there twice."""
    lines = [tuple(map(int, line.split())) for line in (folder / "log").read_text().splitlines()]
    assert max(Counter(lines).values(), default=1) == 1
    return [(layer, pid, cell) for layer, pid, cell in lines]


def family(pid: int) -> dict[str, list[psutil.Process]]:
    """Processes of a batch, by what they are."""
    found: dict[str, list[psutil.Process]] = {"batch": [psutil.Process(pid)], "launcher": [], "run": [], "kernel": []}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "batch.launcher" in command:
                found["run" if process.ppid() != pid else "launcher"].append(process)
            elif "ipykernel_launcher" in command or "interp_kernel.kernel" in command:
                found["kernel"].append(process)
    return found


def workers() -> list[psutil.Process]:
    return [psutil.Process(w.pid) for w in list_workers() if w.pid and w.state != "dead" and psutil.pid_exists(w.pid)]


def complete(folder: Path, path: Path, count: int) -> None:
    """Go on with `--resume`, and find every run complete, in one kernel, with a record of every earlier attempt."""
    before = {record["key"]: record for record in read_runs(folder / "out") if record["status"] == "completed"}
    resumed = batch(path, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert (resumed.outcome["skipped"], resumed.outcome["completed"]) == (len(before), count)
    records = read_runs(folder / "out")
    assert [record["status"] for record in records] == ["completed"] * count
    for record in records:
        stored = read_record(folder / "out" / record["output"]) or {}
        statuses_of_cells = [cell["status"] for cell in stored["cells"]]
        assert statuses_of_cells == ["completed"] * (CELLS + 3)
        assert record == before.get(record["key"], record)
        layer, tries = record["parameters"]["layer"], len(record["attempts"]) + 1
        ran = [(pid, cell) for found, pid, cell in noted(folder) if found == layer]
        assert [cell for pid, cell in ran if pid == ran[-1][0]] == list(range(CELLS))
        assert len({pid for pid, _ in ran}) <= tries


def has_come_to(point: int, folder: Path, running: subprocess.Popen[str]) -> bool:
    return len(noted(folder)) >= point or running.poll() is not None


def torment(folder: Path, count: int, victims: list[str], seed: int) -> None:
    """Kill processes of a batch at random points, one after the other; every run ends complete or honestly failed."""
    rng = random.Random(seed)
    path = marking(folder, count, kernel="interp", retries=1, models=["demo"])
    running, killed = start(path), 0
    points = sorted(rng.sample(range(1, count * CELLS), len(victims)))
    for point, kind in zip(points, victims, strict=True):
        wait_until(partial(has_come_to, point, folder, running), END_S)
        alive = workers() if kind == "worker" else family(running.pid)[kind] if running.poll() is None else []
        if alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(alive).kill()
                killed += 1
    ended = Ended(running)
    assert killed > len(victims) / 2
    found = Counter((record["status"], record["ename"]) for record in read_runs(folder / "out"))
    honest = {("failed", "WorkerDiedError"), ("dead-kernel", "DeadKernelError"), ("dead-runner", "DeadRunnerError")}
    assert set(found) <= {("completed", None), *honest, ("interrupted", "KeyboardInterrupt")}
    assert ended.code == (0 if found[("completed", None)] == count else 1)
    assert sum(found.values()) + ended.outcome["not_begun"] == count
    complete(folder, path, count)


def test_kernel_worker_run_and_launcher_killed_at_random_points(tmp_path: Path) -> None:
    torment(tmp_path, 4, ["kernel", "worker", "run", "launcher"], seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_fifty_notebooks_under_fire(tmp_path: Path, seed: int) -> None:
    victims = ["kernel", "worker", "run", "kernel", "launcher"] * 5
    random.Random(seed).shuffle(victims)
    torment(tmp_path, 50, victims, seed)


@pytest.mark.parametrize("who", ["the batch", "all at once, as by a loss of power"])
def test_batch_killed_and_resumed(tmp_path: Path, who: str) -> None:
    path = marking(tmp_path, 2, pause_s=0.3)
    running = start(path)
    wait_until(lambda: len(noted(tmp_path)) >= 3, END_S)
    everyone = [process for kind in family(running.pid).values() for process in kind]
    for process in everyone if who.startswith("all") else everyone[:1]:
        process.kill()
    running.communicate()
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert alive == []
    left = {record["status"] for record in read_runs(tmp_path / "out")}
    assert left <= ({"running"} if who.startswith("all") else {"interrupted", "completed"})
    complete(tmp_path, path, 2)
    ends = [attempt["status"] for record in read_runs(tmp_path / "out") for attempt in record["attempts"]]
    assert set(ends) == ({"dead-runner"} if who.startswith("all") else {"interrupted"})


# ----------------------------------------------------------------------------------------------- clock

CLOCK = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_JUMP"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int code = syscall(SYS_clock_gettime, clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def test_clock_that_jumps(tmp_path: Path) -> None:
    """The wall clock of every process of the batch jumps by a year, and back by more, in mid-cell."""
    if shutil.which("cc") is None:
        pytest.skip("No C compiler is installed, to put another clock under the processes.")
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "clock.so", "clock.c"], cwd=tmp_path, check=True)
    jump = f"import time, pathlib; before = time.time(); pathlib.Path({str(tmp_path / 'jump')!r}).write_text({{}})\n"
    cells = [
        jump.format(repr(str(by))) + "print(round((time.time() - before) / 86_400))" for by in (31_536_000, -86_400)
    ]
    path = study(tmp_path, notebook(tmp_path / "n.ipynb", *cells, "time.sleep(0.2)"), timeout=30)
    (tmp_path / "jump").write_text("0")
    clock = {"LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_JUMP": str(tmp_path / "jump")}
    ended = batch(path, env={**os.environ, **clock})
    assert ended.code == 0, ended.stderr
    assert statuses(tmp_path / "out") == {"n": "completed"}
    assert [printed(tmp_path / "out", "n", cell) for cell in (0, 1)] == ["365\n", "-366\n"]
    (record,) = read_runs(tmp_path / "out")
    assert record["started"] > record["ended"]
    assert 0 < record["seconds"] < 60
    assert all(0 <= cell["seconds"] < 30 for cell in record["cells"])
    assert record["cells"][2]["seconds"] >= 0.2
    assert 0 < ended.outcome["seconds"] < 60
    (stored,) = (tmp_path / "out").glob("*.ipynb")
    metadata = [nbformat.read(stored, 4).metadata, *(cell.metadata for cell in nbformat.read(stored, 4).cells)]
    assert all(0 < part.papermill.duration < 60 for part in metadata)
    assert batch(path, "--resume").outcome["skipped"] == 1
