"""`python -m benchmarks [GROUP ...]`: measure some groups, or all, and write what was found into RESULTS.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Section

GROUPS = ("calls", "cells", "tensors", "starts", "outputs", "memory", "modal", "mcp", "batch")
RESULTS = Path(__file__).with_name("RESULTS.md")
VERSIONS = (
    "interp-kernel",
    "torch",
    "transformers",
    "ipykernel",
    "ray",
    "distributed",
    "ipyparallel",
    "cloudpickle",
    "modal",
    "mcp",
    "papermill",
)
INTRODUCTION = """\
# Results

Made by `make bench` (`python -m benchmarks [GROUP ...]` replaces the sections of those groups alone). Contenders are
measured in turn in one run, so that what disturbs the machine disturbs all of them; medians and quartiles. Ratios
mean more than times: a busy machine moves all times together. Every process has one torch thread.
"""


def main() -> int:
    """Measure the groups that the command line names; 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all if none is named")
    names: list[str] = parser.parse_args().groups or list(GROUPS)
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"{unknown[0]!r} is not a group; expected some of {', '.join(GROUPS)}")
    # Short, since a Unix socket's path may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="ikb", dir="/tmp") as folder:
        isolate(Path(folder))
        try:
            held = [measure(name) for name in names]
        finally:
            stop_workers()
    return 0 if all(held) else 1


def measure(name: str) -> bool:
    """Measure one group and write its section at once; whether all of its figures hold."""
    module = importlib.import_module(f"benchmarks.{name}")
    load = os.getloadavg()[0]
    started = time.monotonic()
    found: Section = module.measure()
    seconds = time.monotonic() - started
    write_section(name, f"{found.text()}\n\n{circumstances(name, load, seconds)}")
    print(found.text(), end="\n\n", flush=True)
    return all(figure.holds for figure in found.figures)


def write_section(name: str, text: str) -> None:
    """Put a group's section in its place in RESULTS.md."""
    sections = read_sections()
    sections[name] = f"<!-- {name} -->\n{text}\n"
    RESULTS.write_text("\n".join([INTRODUCTION, *(sections[n] for n in GROUPS if n in sections)]))


def read_sections() -> dict[str, str]:
    """The sections that RESULTS.md holds, by group."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    parts = re.split(r"^(?=<!-- \w+ -->$)", text, flags=re.MULTILINE)[1:]
    return {part.split()[1]: part.rstrip("\n") + "\n" for part in parts}


def circumstances(name: str, load: float, seconds: float) -> str:
    """When, where, with what and under which load a group was measured."""
    versions = ", ".join(f"{package} {v}" for package in VERSIONS if (v := version_of(package)))
    return (
        f"{datetime.date.today()}, `python -m benchmarks {name}`, {seconds:.0f} s. {processor()}, {os.cpu_count()} "
        f"cores, {platform.system()} {platform.release()}, load {load:.1f} before. Python {platform.python_version()}, "
        f"{versions}."
    )


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor, where the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def isolate(folder: Path) -> None:
    """Keep away from the user's own files and workers, and give every process one torch thread."""
    (folder / "run").mkdir(mode=0o700)
    os.environ.update(
        INTERP_RUNTIME_DIR=str(folder / "run"),
        JUPYTER_CONFIG_DIR=str(folder / "jupyter-config"),
        JUPYTER_DATA_DIR=str(folder / "jupyter-data"),
        JUPYTER_RUNTIME_DIR=str(folder / "jupyter-run"),
        IPYTHONDIR=str(folder / "ipython"),
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])),
    )


def stop_workers() -> None:
    """End the workers that the measurements left warm."""
    from interp_kernel.backends.local import list_workers, stop_worker

    for worker in list_workers():
        stop_worker(worker.key)


if __name__ == "__main__":
    sys.exit(main())
