"""The wheel alone, away from the checkout, is the whole product; the lock holds what pyproject.toml asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

from interp_kernel.kernelspec import kernelspec_folder, notebook_folder

ROOT = Path(__file__).resolve().parent.parent
# bitsandbytes: of no use without a GPU, and large; the others: loaders whose packages pin what ours must not.
NOT_LOCKED = {"bitsandbytes", "nnsight", "transformer-lens"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and this one's packages but not its checkout."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return home / "bin"


def test_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.partition(".data/data/")[2] for name in names}
    for file in kernelspec_folder().iterdir():
        assert f"share/jupyter/kernels/interp/{file.name}" in data
    for notebook in notebook_folder().glob("*.ipynb"):
        assert f"interp_kernel/notebooks/{notebook.name}" in names
    assert {"interp_kernel/notebooks/quickstart.ipynb", "techniques/logit_lens.py", "interp_kernel/cli.py"} <= set(
        names
    )
    assert any(name.startswith("interp_kernel/demo_model/") and name.endswith(".safetensors") for name in names)
    tops = {name.partition("/")[0] for name in names if not name.startswith("interp_kernel-")}
    assert tops == {"interp_kernel", "techniques"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_notebook_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    cells = [
        "import interp_kernel, techniques\nplaces = [interp_kernel.__file__, techniques.__file__]",
        "%%remote\nfrom techniques.generate_text import generate_text\nn_layers = model.config.n_layer",
        "{'places': places, 'n_layers': n_layers}",
    ]
    spec = {"name": "interp", "display_name": "Python 3 (interp)", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata={"kernelspec": spec})
    notebook.cells[-1].metadata["tags"] = ["findings"]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [str(installed / "interp-kernel"), "run", "in.ipynb", "-o", "out.ipynb"]
    # nbconvert's templates lie where it was installed, which is this environment.
    env = {**os.environ, "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["findings"]
    assert all(Path(place).is_relative_to(installed.parent) for place in found["places"])
    assert found["n_layers"] > 0


def test_installed_kernelspec_is_found_and_techniques_listed(installed: Path, tmp_path: Path) -> None:
    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    code = "from jupyter_client.kernelspec import get_kernel_spec; print(get_kernel_spec('interp').resource_dir)"
    assert Path(run(str(installed / "python"), "-c", code).strip()).is_relative_to(installed.parent)
    assert "logit_lens" in run(str(installed / "interp-kernel"), "techniques", "list")
    folder = run(
        str(installed / "python"), "-c", "import interp_kernel.kernelspec as k; print(k.notebook_folder())"
    ).strip()
    assert Path(folder).is_relative_to(installed.parent)
    assert (Path(folder) / "quickstart.ipynb").is_file()


def test_lock_pins_everything_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {name: group for name, group in project["optional-dependencies"].items() if name != "bench"}
    extras = [text for group in groups.values() for text in group]
    wanted = [Requirement(text) for text in project["dependencies"] + extras]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins: dict[str, list[str]] = {}
    for pin in map(Requirement, lines):
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        pins.setdefault(pin.name, []).append(exact.version)
    for requirement in wanted:
        if requirement.name not in NOT_LOCKED:
            assert all(requirement.specifier.contains(version) for version in pins[requirement.name]), requirement
    assert pins["torch"] == ["2.13.0"]
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))]


def test_ci_runs_the_readmes_own_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")
    assert "\nmake test" in (ROOT / "README.md").read_text()
