"""What starts with every notebook must not import what takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers_kernel import Notebook, notebook, remote

HEAVY = {"torch", "transformers", "modal", "mcp", "papermill", "numpy", "pandas"}
REMOTE = "sorted(set(__import__('sys').modules) & " + repr(HEAVY) + ")"


def loaded(kernel: Notebook) -> set[str]:
    """Heavy packages in the kernel's process."""
    return set(kernel.value(REMOTE))


def test_kernel_stays_light_through_help_and_remote_cells(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        assert loaded(kernel) == set()
        kernel.ok("%remote help")
        assert loaded(kernel) == set()
        there = kernel.ok(remote("x = {'n': [1, 2.5]}\n" + REMOTE))
        assert {"torch", "transformers", "numpy"} <= set(there.value)
        assert kernel.value("x") == {"n": [1, 2.5]}
        assert loaded(kernel) == set()


@pytest.mark.parametrize("module", ["interp_kernel", "interp_kernel.client", "interp_kernel.cli"])
def test_package_imports_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys\nprint(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == []
