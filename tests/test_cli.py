"""The command line, as processes where it matters and through `main` elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbformat.v4 import new_code_cell, new_notebook

from interp_kernel.backends.local import LocalBackend
from interp_kernel.cli import main
from interp_kernel.notebook.commands import parameter_value
from interp_kernel.notebook.run import findings
from interp_kernel.spec import WorkerSpec

HEAVY = {"torch", "transformers", "numpy", "pandas", "papermill", "nbformat", "IPython", "ipykernel", "zmq"}


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom interp_kernel.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in (
        *("demo", "run", "batch", "reproduce", "check", "runs", "worker", "modal", "mcp", "agent", "doctor"),
        *("kernelspec", "techniques"),
    ):
        assert f"    {verb}" in done.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("1e-3", 0.001),
        ("True", True),
        ("None", None),
        ("demo", "demo"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("[1, 2]", [1, 2]),
        ('{"a": 1}', {"a": 1}),
        ("[not json", "[not json"),
        ("", ""),
    ],
)
def test_parameter_values(text: str, value: object) -> None:
    found = parameter_value(text)
    assert (found, type(found)) == (value, type(value))


def notebook(folder: Path, *sources: str) -> Path:
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), folder / "in.ipynb")
    return folder / "in.ipynb"


def test_run_ends_with_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = notebook(tmp_path, "n, name = 0, ''", "print(n / len(name))")
    assert main(["run", str(source), "-p", "n", "6", "-p", "name", "abc"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["status"], result["output"]) == ("completed", "out/in.ipynb")
    assert "3/3 cells" in err
    assert "2.0\n" in Path("out/in.ipynb").read_text().encode().decode("unicode_escape")


def test_run_tells_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = notebook(tmp_path, "x = 1", "raise ValueError('of my own')")
    assert main(["run", str(source), "-o", str(tmp_path / "sub" / "done.ipynb")]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["failed_cell"], result["ename"], result["evalue"]) == (1, "ValueError", "of my own")
    assert "The run ended in cell 1 (failed)." in err
    assert (tmp_path / "sub" / "done.html").is_file()


def test_run_refuses_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = notebook(tmp_path, "x = 1")
    assert main(["run", str(source), "-p", "y", "1", "-o", str(tmp_path / "done.ipynb")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "has no parameter 'y'; it takes x." in err
    assert not (tmp_path / "done.ipynb").exists()


@pytest.mark.parametrize("arguments", [[], ["run"], ["worker", "stop"], ["run", "x.ipynb", "--timeout", "0"]])
def test_wrong_command_lines_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2


@pytest.mark.parametrize("where", ["--user", "--prefix"])
def test_kernelspec_names_this_python(where: str, tmp_path: Path) -> None:
    assert main(["kernelspec", "install", where, *([str(tmp_path)] if where == "--prefix" else [])]) == 0
    data = Path(os.environ["JUPYTER_DATA_DIR"]) if where == "--user" else tmp_path / "share" / "jupyter"
    spec = KernelSpecManager(kernel_dirs=[str(data / "kernels")]).get_kernel_spec("interp")
    assert spec.argv[0] == sys.executable
    assert {"logo-32x32.png", "logo-64x64.png", "logo-svg.svg"} <= set(os.listdir(spec.resource_dir))


def test_worker_verbs_on_a_real_worker(capsys: pytest.CaptureFixture[str]) -> None:
    spec = WorkerSpec(model_name="demo", attn_implementation="eager")  # a key that no other test uses
    link, started = LocalBackend(spec).open("test")
    link.close()
    assert started
    assert main(["worker", "list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(spec.key))
    assert line.split()[1] == "demo"
    assert line.split()[3] in ("loading", "idle")
    assert main(["worker", "logs", spec.key[:8]]) == 0
    assert main(["worker", "stop", spec.key[:8]]) == 0
    assert f"Stopped: {spec.key} (demo)." in capsys.readouterr().out
    assert main(["worker", "list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(spec.key))
    assert line.split()[3].startswith("dead")


def test_worker_is_found_by_its_models_name(capsys: pytest.CaptureFixture[str]) -> None:
    spec = WorkerSpec(model_name="lonely")
    (LocalBackend(spec).folder / "spec.json").write_text(json.dumps({"spec": spec.to_json()}))
    assert main(["worker", "stop", "lonely"]) == 0
    assert capsys.readouterr().out == f"Had already ended: {spec.key} (lonely).\n"


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"interp-kernel {importlib.metadata.version('interp-kernel')}\n"


def test_unknown_worker_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "stop", "nothex"]) == 1
    assert "Worker 'nothex' is not known; there are:" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    for words in ("techniques list", "techniques --help"):
        command = [sys.executable, "-m", "interp_kernel.cli", *words.split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        assert done.stderr == "", words
    os.close(writer)


def test_techniques_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["techniques", "list"]) == 0
    entries = [line for line in capsys.readouterr().out.splitlines() if line]
    listed = {line.partition("(")[0]: entries[i + 1] for i, line in enumerate(entries) if not line.startswith(" ")}
    assert {"generate_text", "analyze_token_probs", "prefill_attack", "logit_lens"} <= listed.keys()
    assert all(purpose.strip() for purpose in listed.values())


def test_demo_runs_the_quickstart_and_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    executed = tmp_path / "out" / "quickstart.ipynb"
    found = findings(json.loads(executed.read_text()))
    assert found
    for name in found:
        assert name.replace("_", " ") in shown
    for file in (executed, executed.with_suffix(".html")):
        assert str(file) in shown
        assert file.stat().st_size > 10_000
