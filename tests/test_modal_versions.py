"""The oldest and the newest modal of the range that pyproject.toml allows; `pytest -m modal_versions` runs it.

Each version is put into a folder that comes first on the import path, of the client and of its containers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `-k` leaves out what other versions can't change: the notebook's own side, and the local worker.
SELECTION = "not local and not quickstart"


def pinned() -> tuple[str, str]:
    """The lowest version of the range, and what the newest is found by."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = (line for line in extras["modal"] if line.startswith("modal"))
    low, high = re.findall(r"[\d.]+", line)
    return f"modal=={low}", f"modal>={low},<{high}"


@pytest.mark.modal_versions
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", pinned(), ids=["lowest", "newest"])
def test_the_contract_holds_with_the_ends_of_the_range(wanted: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"{wanted} can't be installed here: {installed.stderr.strip().splitlines()[-1]}")
    files = [f"tests/{name}.py" for name in ("test_modal_loopback", "test_backends", "test_modal_faults")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", SELECTION],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\b\d\d+ passed", done.stdout)
