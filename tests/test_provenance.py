"""The record of a run: what it says, that notebook and file say the same, and that its lines survive what may come."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from interp_kernel import demo_model
from interp_kernel.notebook.files import RUNS, append, read_attempts, read_record, read_runs, replace
from interp_kernel.notebook.provenance import git_state, is_infrastructure, notebook_hash, source_hashes, weights_hash
from interp_kernel.notebook.run import run_notebook

pytestmark = pytest.mark.usefixtures("no_warm_worker")

SHARED = ("load_s", "queue_s", "run_s", "return_s", "transfer_s", "sent_bytes", "received_bytes")


def write(path: Path, *cells: Any, kernel: str = "python3", **metadata: Any) -> Path:
    ready = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    spec = {"name": kernel, "display_name": "x", "language": "python"}
    nbformat.write(new_notebook(cells=ready, metadata={"kernelspec": spec, **metadata}), path)
    return path


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and record of a run with remote cells, in a checkout with a change."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (folder / "more.py").write_text("def thrice(x):\n    return 3 * x\n")
    (folder / "older.py").write_text("def older(self, prompt):\n    return self.tokenizer(prompt)['input_ids']\n")
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "add", "helper.py")
    git(folder, "commit", "-q", "-m", "one")
    (folder / "helper.py").write_text("def twice(x):\n    return x + x\n")
    write(
        folder / "n.ipynb",
        new_markdown_cell("# Title"),
        new_code_cell("n = 1\nseed = 3", metadata={"tags": ["parameters"]}),
        "import importlib\nthrice = importlib.import_module('mo' + 're').thrice\ndata = b'x' * n",
        "%%remote\nfrom helper import twice\nimport time; time.sleep(0.3)\nback = thrice(data)",
        "from interp_kernel import InterpClient\nclient = InterpClient(dtype='float64')\n"
        "client.run(client.load_technique_from_file('ol' + 'der.py'), 'rain')",
        "%%remote\ntotal = 1 / 0",
        "print('never')",
        kernel="interp",
        interp={"model": "demo", "dtype": "float64"},  # a worker that no other test has warmed
    )
    run_notebook(folder / "n.ipynb", folder / "out" / "n.ipynb", {"n": 3_000_000}, progress=False)
    (record,) = read_runs(folder / "out")
    return folder, record


def test_notebook_and_file_hold_the_same_record(remote: tuple[Path, dict[str, Any]]) -> None:
    folder, record = remote
    assert read_record(folder / "out" / "n.ipynb") == record
    lines = [json.loads(line) for line in (folder / "out" / RUNS).read_text().splitlines()]
    assert [line["status"] for line in lines] == ["running", "failed"]
    executed = json.loads((folder / "out" / "n.ipynb").read_text())
    assert executed["metadata"]["interp"] == {"model": "demo", "dtype": "float64", "run": record}
    assert executed["metadata"]["papermill"]["input_path"] == record["notebook"] == str(folder / "n.ipynb")


def test_record_says_how_it_ended(remote: tuple[Path, dict[str, Any]]) -> None:
    folder, record = remote
    source = json.loads((folder / "n.ipynb").read_text())
    assert (record["status"], record["ename"], record["failed_cell"]) == ("failed", "ZeroDivisionError", 5)
    assert record["failed_cell_id"] == source["cells"][5]["id"]
    assert any("total = 1 / 0" in line for line in record["traceback"])
    assert [(cell["source_index"], cell["status"]) for cell in record["cells"]] == [
        *[(1, "completed"), (None, "completed"), (2, "completed"), (3, "completed"), (4, "completed")],
        (5, "failed"),
    ]
    assert record["is_infrastructure"] is False


def test_record_says_what_ran(remote: tuple[Path, dict[str, Any]]) -> None:
    folder, record = remote
    assert record["git"] == {"commit": git(folder, "rev-parse", "HEAD"), "branch": "trunk", "is_dirty": True}
    assert record["parameters"] == {"n": 3_000_000}
    # The first is named by an import; that the others are used only the run itself can tell.
    sources = [folder / name for name in ("helper.py", "more.py", "older.py")]
    assert record["hashes"]["sources"] == {str(path): sha256(path.read_bytes()) for path in sources}
    assert record["environment"]["python"] == platform.python_version()
    packages = record["environment"]["packages"]
    assert packages["papermill"] == importlib.metadata.version("papermill")
    assert "torch" in packages
    assert "pytest" not in packages


def test_record_says_where_it_ran(remote: tuple[Path, dict[str, Any]]) -> None:
    _, record = remote
    (worker,) = record["workers"]
    weights = Path(demo_model.path(), "model.safetensors").read_bytes()
    assert worker["weights"] == sha256(json.dumps([["model.safetensors", sha256(weights)]]).encode())
    assert (worker["backend"], worker["model_name"], worker["devices"]) == ("local", "demo", ["cpu"])
    assert (worker["host"], worker["gpu"]) == (platform.node(), None)
    assert worker["versions"]["torch"] == importlib.metadata.version("torch")


def test_record_says_where_the_time_went(remote: tuple[Path, dict[str, Any]]) -> None:
    _, record = remote
    calls = [call for cell in record["cells"] for call in cell["calls"]]
    first, second, third = calls
    assert [cell["calls"] for cell in record["cells"][3:]] == [[first], [second], [third]]
    assert [call["is_cold"] for call in calls] == [True, False, False]
    assert [call["kind"] for call in calls] == ["cell", "function", "cell"]
    assert first["load_s"] > record["workers"][0]["load_s"] > 0
    assert 0.3 <= first["run_s"] < 3
    assert second["load_s"] < 0.5
    parts = sum(first[name] for name in SHARED if name.endswith("_s"))
    assert parts <= record["cells"][3]["seconds"] < parts + 1
    assert 3_000_000 <= first["sent_bytes"] < 3_010_000
    assert 9_000_000 <= first["received_bytes"] < 9_010_000
    assert [call["ename"] for call in calls] == [None, None, "ZeroDivisionError"]
    totals = record["totals"]
    assert (totals["calls"], totals["cold_calls"], totals["retries"]) == (3, 1, 0)
    assert all(totals[name] == pytest.approx(sum(call[name] for call in calls), abs=1e-5) for name in SHARED)
    assert sum(cell["seconds"] for cell in record["cells"]) < record["seconds"]


def test_executed_notebook_runs_again_with_its_model(remote: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, before = remote
    again = run_notebook(folder / "out" / "n.ipynb", tmp_path / "n.ipynb", progress=False, cwd=folder)
    record = read_record(tmp_path / "n.ipynb")
    assert record is not None
    assert (again.status, again.failed_cell) == ("failed", 6)
    assert record["workers"][0]["generation"] == before["workers"][0]["generation"]
    assert record["totals"]["cold_calls"] == 0


def test_papermill_itself_leaves_the_record_in_the_notebook(tmp_path: Path) -> None:
    parameters = new_code_cell("a = 1", metadata={"tags": ["parameters"]})
    source = write(tmp_path / "n.ipynb", parameters, "a", interp="demo")
    papermill.execute_notebook(source, tmp_path / "o.ipynb", {"a": 2}, engine_name="interp", progress_bar=False)
    record = read_record(tmp_path / "o.ipynb")
    assert record is not None
    assert (record["status"], record["parameters"], record["output"]) == ("completed", {"a": 2}, "o.ipynb")
    assert [cell["source_index"] for cell in record["cells"]] == [0, None, 1]
    assert not (tmp_path / RUNS).exists()
    assert json.loads((tmp_path / "o.ipynb").read_text())["metadata"]["interp"] == {"model": "demo", "run": record}


def test_second_run_of_a_notebook_is_a_second_attempt(tmp_path: Path) -> None:
    source = write(tmp_path / "n.ipynb", "1")
    for _ in range(2):
        run_notebook(source, tmp_path / "out" / "n.ipynb", progress=False)
    first, second = read_attempts(tmp_path / "out")
    assert (first["attempt"], second["attempt"], first["key"]) == (1, 2, second["key"])
    assert read_runs(tmp_path / "out") == [second]


def test_a_notebook_that_runs_holds_no_record_of_an_earlier_run(tmp_path: Path) -> None:
    look = """from pathlib import Path
from interp_kernel.notebook.files import read_record
[path.name for path in Path('.').glob('*.ipynb') if read_record(path)]"""
    source = write(tmp_path / "n.ipynb", new_code_cell(look, metadata={"tags": ["findings"]}))
    run_notebook(source, tmp_path / "a.ipynb", progress=False)
    assert run_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", progress=False).findings == ["a.ipynb"]


def test_output_that_cannot_be_written_is_recorded_as_a_failure(tmp_path: Path) -> None:
    source = write(tmp_path / "n.ipynb", "import os; os.remove('out/n.ipynb'); os.mkdir('out/n.ipynb')")
    with pytest.raises(IsADirectoryError):
        run_notebook(source, tmp_path / "out" / "n.ipynb", progress=False)
    (record,) = read_runs(tmp_path / "out")
    assert (record["status"], record["ename"], record["failed_cell"]) == ("failed", "IsADirectoryError", None)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("status", "ename", "cell", "expected"),
    [
        ("completed", None, None, False),
        ("failed", "ZeroDivisionError", 3, False),
        ("failed", "WorkerDiedError", 3, True),
        ("failed", "WorkerError", 3, True),
        ("failed", "LostValueError", 3, True),
        ("failed", "LoadError", 3, False),
        ("failed", "CallTimeoutError", 3, False),
        ("timeout", "CellTimeoutError", 3, False),
        ("timeout", "CellTimeoutError", None, True),
        ("dead-kernel", "DeadKernelError", 3, True),
        ("dead-kernel", "DeadKernelError", None, True),
        ("dead-runner", "DeadRunnerError", None, True),
        ("interrupted", "KeyboardInterrupt", 3, False),
    ],
)
def test_infrastructure_is_told_from_the_fault_of_a_cell(
    status: str, ename: str | None, cell: int | None, expected: bool
) -> None:
    assert is_infrastructure(status, ename, cell) is expected


def test_notebook_hash_is_of_what_runs() -> None:
    def hashed(**changes: Any) -> str:
        cell: dict[str, Any] = {
            "cell_type": "code",
            "source": "a = 1",
            "metadata": {},
            "outputs": [],
            "id": "x",
            **changes,
        }
        return notebook_hash({"cells": [cell], "metadata": {"kernelspec": {"name": "python3"}}})

    same = hashed()
    assert hashed(outputs=[1], id="y", source=["a", " = 1"], metadata={"collapsed": True}) == same
    assert len({same, hashed(source="a = 2"), hashed(cell_type="raw"), hashed(metadata={"tags": ["findings"]})}) == 4


def test_source_hashes_follow_imports_and_named_files(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import two\n")
    (tmp_path / "two.py").write_text("x = 'é'\n")
    (tmp_path / "technique.py").write_text("def technique(model, tokenizer): ...\n")
    (tmp_path / "unused.py").write_text("")
    text = "from json import loads\nclient.load_technique_from_file('technique.py')\nimport json, one as o"
    cells = [{"cell_type": "code", "source": text}, {"cell_type": "markdown", "source": "import unused"}]
    found = source_hashes({"cells": cells}, [tmp_path])
    assert {Path(path).name: value for path, value in found.items()} == {
        name: sha256((tmp_path / name).read_bytes()) for name in ("one.py", "two.py", "technique.py")
    }
    (tmp_path / "two.py").write_text("x = (")
    assert "technique.py" in {Path(path).name for path in source_hashes({"cells": cells}, [tmp_path])}


def test_weights_on_the_hub_are_named_by_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    content, commit = b"weights", "0" * 40
    blob = tmp_path / "models--org--m" / "blobs" / sha256(content)
    snapshot = tmp_path / "models--org--m" / "snapshots" / commit
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"is not read")
    (snapshot / "model.safetensors").symlink_to(blob)
    expected = sha256(json.dumps([["model.safetensors", sha256(content)]]).encode())
    assert weights_hash({"model_name": "org/m", "commit": commit}) == expected
    assert weights_hash({"model_name": "org/m", "commit": commit, "mode": "modal"}) is None
    assert weights_hash({"model_name": "org/m"}) is None
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(content)
    assert weights_hash({"model_name": str(copy)}) == expected


def test_no_checkout_is_no_fault(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "none") is None


APPEND = """
import sys
from pathlib import Path
from interp_kernel.notebook.files import append
for attempt in range(100):
    append(Path(sys.argv[1]), {"key": sys.argv[2], "attempt": attempt, "text": sys.argv[2] * 30000})
"""


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(tmp_path), key]) for key in "abc"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in (tmp_path / RUNS).read_text().splitlines()]
    assert len(lines) == 300
    assert {(line["key"], line["attempt"]) for line in lines} == {(key, i) for key in "abc" for i in range(100)}


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    append(tmp_path, {"key": "a", "attempt": 1})
    whole = (tmp_path / RUNS).read_bytes()
    with files_limited_to(len(whole) + 50), pytest.raises(OSError, match="File too large"):
        append(tmp_path, {"key": "b" * 100, "attempt": 1})
    assert (tmp_path / RUNS).read_bytes() == whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = replace(tmp_path / "x", "one \ud800 é")
    assert path.read_text(encoding="utf-8") == "one ? é"
    path.chmod(0o640)
    with files_limited_to(50), pytest.raises(OSError, match="File too large"):
        replace(path, "x" * 100)
    assert list(tmp_path.iterdir()) == [path]
    assert replace(path, path.read_text(encoding="utf-8") + "!").read_text(encoding="utf-8") == "one ? é!"
    assert path.stat().st_mode & 0o777 == 0o640


def test_torn_lines_are_passed_over_and_not_joined(tmp_path: Path) -> None:
    (tmp_path / RUNS).write_text('{"key": "a", "attempt": 1}\n{"key": "b", "att')
    append(tmp_path, {"key": "c", "attempt": 1})
    assert [record["key"] for record in read_runs(tmp_path)] == ["a", "c"]
    assert read_runs(tmp_path / "none") == []


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"metadata": {"interp": "demo"}}', '{"metadata": {"interp": {"run": 3}}}']
)
def test_notebooks_without_a_record_have_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "n.ipynb").write_text(text)
    assert read_record(tmp_path / "n.ipynb") is None
    assert read_record(tmp_path / "none.ipynb") is None
