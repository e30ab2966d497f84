"""The papermill engine against real kernels: plain python3, for what happens here has nothing to do with the worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest
from jupyter_client.kernelspec import NoSuchKernel
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from interp_kernel.errors import SpecError
from interp_kernel.notebook import record, runner
from interp_kernel.notebook.engine import InterpEngine
from interp_kernel.notebook.run import RunResult, run_notebook

STOPPABLE = "import os\nopen({fifo!r}, 'w').write(str(os.getpid()))\nprint('started')\nimport time; time.sleep(600)"


def write(folder: Path, *cells: Any, name: str = "in.ipynb", **metadata: Any) -> Path:
    """A notebook of code cells, given as source text or as ready cells."""
    ready = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=ready, metadata={"kernelspec": spec, **metadata}), folder / name)
    return folder / name


def run(folder: Path, *cells: Any, parameters: dict[str, Any] | None = None, **options: Any) -> RunResult:
    metadata = options.pop("metadata", {})
    source = write(folder, *cells, **metadata)
    return run_notebook(source, folder / "out.ipynb", parameters, progress=False, **options)


def read(path: Path) -> Any:
    """The executed notebook as stored, checked against the format."""
    notebook = json.loads(path.read_text())
    nbformat.validate(notebook)
    return notebook


def statuses(path: Path) -> list[str]:
    return [cell["metadata"]["papermill"]["status"] for cell in read(path)["cells"]]


def printed(cell: Any) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def tagged(source: str, *tags: str) -> Any:
    return new_code_cell(source, metadata={"tags": list(tags)})


def test_completed_run_has_results_findings_and_page(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        new_markdown_cell("# Title"),
        tagged("a, b = 1, 2", "parameters"),
        "print(a + b)",
        tagged("{'sum': a + b, 'name': 'x'}", "findings"),
        parameters={"a": 40},
    )
    assert (result.status, result.failed_cell, result.ename) == ("completed", None, None)
    assert result.findings == {"sum": 42, "name": "x"}
    assert statuses(result.output) == ["completed"] * 5
    assert printed(read(result.output)["cells"][3]) == "42\n"
    page = result.html.read_text()
    assert "<html" in page
    assert "Title" in page
    assert json.loads(result.to_json())["findings"] == {"sum": 42, "name": "x"}


def test_failed_cell_is_counted_in_the_input_and_the_rest_is_pending(tmp_path: Path) -> None:
    result = run(tmp_path, tagged("a = 1", "parameters"), "1 / a", "print('never')", parameters={"a": 0})
    assert (result.status, result.failed_cell, result.ename) == ("failed", 1, "ZeroDivisionError")
    assert result.evalue == "division by zero"
    assert any("1 / a" in line for line in result.traceback)
    executed = read(result.output)
    assert statuses(result.output) == ["completed", "completed", "failed", "pending"]
    assert ["".join(cell["source"]) for cell in executed["cells"][2:]] == ["1 / a", "print('never')"]
    assert executed["metadata"]["papermill"]["exception"] is True


def test_kernel_death_is_noticed_soon_and_named(tmp_path: Path) -> None:
    result = run(tmp_path, "import os; print('x', flush=True); os.kill(os.getpid(), 9)", "print('never')")
    assert (result.status, result.failed_cell, result.ename) == ("dead-kernel", 0, "DeadKernelError")
    assert "killed by SIGKILL" in (result.evalue or "")
    assert statuses(result.output) == ["failed", "pending"]
    assert read(result.output)["cells"][0]["metadata"]["papermill"]["duration"] < 4
    assert result.traceback


def test_kernel_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels" / "stillborn"
    folder.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    spec = {"argv": [sys.executable, "-c", "raise SystemExit(3)", "{connection_file}"], "language": "python"}
    (folder / "kernel.json").write_text(json.dumps({**spec, "display_name": "x"}))
    result = run(tmp_path, "print(1)", kernel_name="stillborn")
    assert (result.status, result.failed_cell) == ("dead-kernel", None)
    assert "'stillborn' did not start" in (result.evalue or "")
    assert statuses(result.output) == ["pending"]


def test_timeout_interrupts_first(tmp_path: Path) -> None:
    result = run(tmp_path, "import time\nprint('before')\ntime.sleep(600)", "print('never')", timeout_s=1)
    assert (result.status, result.failed_cell, result.ename) == ("timeout", 0, "CellTimeoutError")
    assert "longer than its 1 s" in (result.evalue or "")
    assert statuses(result.output) == ["failed", "pending"]
    cell = read(result.output)["cells"][0]
    assert printed(cell) == "before\n"
    assert [output["ename"] for output in cell["outputs"][1:]] == ["KeyboardInterrupt", "CellTimeoutError"]


def test_timeout_of_a_cell_that_ignores_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.3)
    deaf = "import os, signal, time\nprint(os.getpid())\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)"
    result = run(tmp_path, deaf, timeout_s=1)
    assert (result.status, statuses(result.output)) == ("timeout", ["failed"])
    assert not psutil.pid_exists(int(printed(read(result.output)["cells"][0])))


def test_timeout_counts_although_the_cell_swallows_the_interrupt(tmp_path: Path) -> None:
    swallowing = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('went on')"
    result = run(tmp_path, swallowing, "print('never')", timeout_s=1)
    assert (result.status, statuses(result.output)) == ("timeout", ["failed", "pending"])
    assert printed(read(result.output)["cells"][0]) == "went on\n"


def test_expected_exceptions_end_no_run_but_those_of_other_engines(tmp_path: Path) -> None:
    source = write(tmp_path, tagged("1 / 0", "raises-exception"), "print('after')")
    papermill.execute_notebook(source, tmp_path / "ours.ipynb", engine_name="interp", progress_bar=False)
    assert statuses(tmp_path / "ours.ipynb") == ["completed", "completed"]
    assert read(tmp_path / "ours.ipynb")["metadata"]["papermill"]["exception"] is None
    with pytest.raises(PapermillExecutionError, match="division by zero"):
        papermill.execute_notebook(source, tmp_path / "theirs.ipynb", progress_bar=False)


def test_error_that_publishes_no_output_is_still_shown(tmp_path: Path) -> None:
    result = run(tmp_path, "%no_such_magic", "print('never')")
    assert (result.status, result.failed_cell) == ("failed", 0)
    errors = [output for output in read(result.output)["cells"][0]["outputs"] if output["output_type"] == "error"]
    assert len(errors) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_the_notebook_and_says_so(tmp_path: Path, signum: signal.Signals) -> None:
    process, kernel = start_stoppable(tmp_path)
    process.send_signal(signum)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    result = json.loads(stdout.splitlines()[-1])
    assert (result["status"], result["failed_cell"]) == ("interrupted", 1)
    assert result["evalue"] == f"{signum.name} stopped the run in this cell."
    assert statuses(tmp_path / "out.ipynb") == ["completed", "failed", "pending"]
    assert printed(read(tmp_path / "out.ipynb")["cells"][1]) == "started\n"
    assert not psutil.pid_exists(kernel)


def test_killed_runner_leaves_what_it_had(tmp_path: Path) -> None:
    process, kernel = start_stoppable(tmp_path)
    try:
        until_stored(process, tmp_path / "out.ipynb")
    finally:
        process.kill()
        process.communicate()
    executed = read(tmp_path / "out.ipynb")
    assert printed(executed["cells"][0]) == "first\n"
    assert statuses(tmp_path / "out.ipynb") == ["completed", "running", "pending"]
    psutil.wait_procs([psutil.Process(kernel)] if psutil.pid_exists(kernel) else [], timeout=10)
    assert not psutil.pid_exists(kernel)


def start_stoppable(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """`interp-kernel run` of a notebook whose second cell sleeps, when that cell runs; and its kernel's pid."""
    fifo = str(folder / "fifo")
    os.mkfifo(fifo)
    source = write(folder, "print('first')", STOPPABLE.format(fifo=fifo), "print('never')")
    command = [sys.executable, "-m", "interp_kernel.cli", "run", str(source), "-o", str(folder / "out.ipynb")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, int(Path(fifo).read_text())


def until_stored(process: subprocess.Popen[str], path: Path) -> None:
    """Return when the running cell's output is on disk."""
    while "started" not in [printed(cell).strip() for cell in read(path)["cells"]]:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)


def test_saving_costs_little_and_the_end_is_always_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = []
    write_really = record.write_atomically

    def write_and_count(text: str, path: str) -> None:
        saves.append(path)
        write_really(text, path)

    monkeypatch.setattr(record, "write_atomically", write_and_count)
    result = run(tmp_path, *[f"print({i})" for i in range(60)])
    assert len(saves) <= 2 + result.seconds / record.SAVE_EVERY_S
    assert [printed(cell) for cell in read(result.output)["cells"]] == [f"{i}\n" for i in range(60)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.timeout(60)  # nbclient's own joining of streams takes minutes for the last line
def test_streams_are_one_output_and_bars_one_line(tmp_path: Path) -> None:
    flushed = "for i in range(300): print(i, flush=True)"
    bar = "import sys\nfor i in range(50): print(f'\\r{i}/50', end='', flush=True)"
    line = "print('x' * 5_000_000)\nprint('abc\\rAB', end='')\nprint('\\bC\\r')"
    cells = read(run(tmp_path, flushed, bar, line).output)["cells"]
    assert [len(cell["outputs"]) for cell in cells] == [1, 1, 1]
    assert printed(cells[0]).split() == [str(i) for i in range(300)]
    assert printed(cells[1]) == "49/50"
    assert printed(cells[2]) == "x" * 5_000_000 + "\nAC\n"


def test_lone_surrogates_do_not_lose_the_notebook(tmp_path: Path) -> None:
    broken = nbformat.read(write(tmp_path, "print('a')"), as_version=4)
    broken.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="a\ud800b")]
    record.write_atomically(nbformat.writes(broken), str(tmp_path / "out.ipynb"))
    assert printed(read(tmp_path / "out.ipynb")["cells"][0]) == "a?b"


def test_model_reaches_the_kernel(tmp_path: Path) -> None:
    shown = tagged("import os, json; json.loads(os.environ['INTERP_MODEL'])", "findings")
    own = {"model": "demo", "dtype": "float32", "scaledown_window": 60}
    result = run(tmp_path, shown, metadata={"interp": own})
    assert result.findings == {"model_name": "demo", "dtype": "float32", "scaledown_window": 60}
    environment = runner.kernel_environment(NotebookNode(metadata={"interp": own}), "other/name")
    assert json.loads(environment["INTERP_MODEL"]) == {"model_name": "other/name"}


def test_wrong_model_option_is_refused_before_the_kernel_starts(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="dtype 'int3' is not known"):
        run(tmp_path, "print(1)", metadata={"interp": {"model": "demo", "dtype": "int3"}})
    assert not (tmp_path / "out.ipynb").exists()


def test_kernel_runs_beside_its_notebook_without_history(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("answer = 42")
    shown = tagged("import helper; [helper.answer, get_ipython().history_manager.hist_file]", "findings")
    before = os.getcwd()
    assert run(tmp_path, shown).findings == [42, ":memory:"]
    assert os.getcwd() == before


def test_kernel_interp_is_found_without_being_installed() -> None:
    manager = runner.SpecManager(kernel_dirs=[], ensure_native_kernel=False)
    assert "interp_kernel.kernel" in manager.get_kernel_spec("interp").argv
    with pytest.raises(NoSuchKernel):
        manager.get_kernel_spec("no-such-kernel")


def test_entry_point_is_installed_and_imports_nothing() -> None:
    (entry,) = entry_points(group="papermill.engine", name="interp")
    assert entry.load() is InterpEngine
    code = f"import sys; before = set(sys.modules); import {InterpEngine.__module__}; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert foreign == {"interp_kernel"}


def test_papermills_own_command_agrees_with_the_record(tmp_path: Path) -> None:
    source = write(tmp_path, "1 / 0", "print('never')")
    command = [sys.executable, "-m", "papermill", "--engine", "interp", str(source), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "division by zero" in done.stderr
    assert statuses(tmp_path / "out.ipynb") == ["failed", "pending"]
