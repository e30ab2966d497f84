"""The image of a worker's container: what it has installed, and this package's own source."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import modal

from interp_kernel.backends.local import runtime_root
from interp_kernel.errors import SpecError
from interp_kernel.spec import WorkerSpec

HF_HOME = "/hf-cache"
PACKAGE = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "peft", "bitsandbytes"),
    *("cloudpickle", "xxhash", "jaxtyping", "numpy", "tqdm", "ipython", "jinja2", "matplotlib", "plotly"),
)
HIDDEN_PROMPT = ".interp/hidden_prompt"  # in the container's home
IGNORED = ["**/__pycache__", "**/*.pyc"]


@cache
def hf_image() -> modal.Image:
    """An image with the Python and the packages of this environment; more goes on by `.uv_pip_install`."""
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return modal.Image.debian_slim(python_version=minor).uv_pip_install(*requirements()).env({"HF_HOME": HF_HOME})


def requirements() -> list[str]:
    """What a worker needs, in the versions that are installed here, or else in those that fit this package."""
    found = []
    for line in importlib.metadata.requires("interp-kernel") or []:
        requirement = line.partition(";")[0].strip()
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if name.lower() not in PACKAGES:
            continue
        try:
            found.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            found.append(requirement)
    return list(dict.fromkeys(found))


def image_for(image: Any, spec: WorkerSpec) -> modal.Image:
    """The chosen image with this package's own source, its demo model and, if one is given, the hidden prompt's file.

    Raises:
        SpecError: `image` is no image of Modal's.
    """
    chosen: modal.Image
    if image is None:
        chosen = hf_image()
    elif isinstance(image, modal.Image):
        chosen = image
    elif isinstance(image, str):
        chosen = modal.Image.from_registry(image, add_python=f"{sys.version_info[0]}.{sys.version_info[1]}")
    else:
        raise SpecError(
            f"image is a {type(image).__name__}; expected a modal.Image, as hf_image.uv_pip_install('einops') makes "
            "one, or the name of an image in a registry."
        )
    if (path := local_prompt(spec)) is not None:
        chosen = chosen.add_local_file(path, f"/root/{HIDDEN_PROMPT}")
    for folder in (PACKAGE, PACKAGE.parent / "techniques"):
        chosen = chosen.add_local_dir(folder, f"/root/{folder.name}", ignore=IGNORED)
    return chosen.add_local_dir(metadata_folder(), "/root")


def metadata_folder() -> Path:
    """A folder that tells the container which version the package has, as an installation would."""
    version = importlib.metadata.version("interp-kernel")
    folder = runtime_root() / "modal-metadata"
    info = folder / f"interp_kernel-{version}.dist-info"
    for old in folder.glob("*.dist-info/METADATA"):
        if old.parent != info:
            shutil.rmtree(old.parent)
    info.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: interp-kernel\nVersion: {version}\n"
    if not (info / "METADATA").exists():  # else another notebook may be sending it just now
        (info / "METADATA").write_text(text)
    return folder


def local_prompt(spec: WorkerSpec) -> Path | None:
    """The hidden prompt's file, if it is on this machine."""
    kind, _, rest = (spec.hidden_system_prompt or "").partition(":")
    path = Path(rest).expanduser()
    return path.resolve() if kind == "file" and path.is_file() else None
