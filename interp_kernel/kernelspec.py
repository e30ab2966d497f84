"""Where the kernelspec and the notebooks lie, in a checkout or an installed wheel; installing a kernelspec."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NAME = "interp"


def kernelspec_folder() -> Path:
    """Folder with kernel.json and the logos."""
    return _shipped("kernelspec_files", "kernelspec")


def notebook_folder() -> Path:
    """Folder with the notebooks that come with the package, as `quickstart.ipynb`."""
    return _shipped("notebooks", "notebooks")


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    """A wheel carries these folders inside the package; a checkout, also an editable install, beside it."""
    inside, beside = PACKAGE / in_wheel, PACKAGE.parent / in_checkout
    return inside if inside.is_dir() else beside


def kernelspec() -> dict[str, Any]:
    """The kernelspec with this Python's absolute path.

    Jupyter replaces a bare `python` by the *server's* interpreter, which may not have this package.
    """
    spec: dict[str, Any] = json.loads((kernelspec_folder() / "kernel.json").read_text(encoding="utf-8"))
    spec["argv"][0] = sys.executable
    return spec


def install(*, user: bool = False, prefix: str | None = None) -> Path:
    """Install the kernelspec for Jupyter servers, also such as live in another environment.

    Args:
        user: Into the user's own Jupyter folder, which every server of the user reads.
        prefix: Into PREFIX/share/jupyter/kernels instead.

    Returns:
        The folder that was written; an earlier one is replaced.

    Raises:
        OSError: The folder can't be written.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / NAME
        shutil.copytree(kernelspec_folder(), folder)
        (folder / "kernel.json").write_text(json.dumps(kernelspec(), indent=1) + "\n", encoding="utf-8")
        return Path(KernelSpecManager().install_kernel_spec(str(folder), NAME, user=user, prefix=prefix))
