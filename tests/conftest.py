"""Keeps every test away from the user's own files, and fails the session if a process outlives it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from interp_kernel.backends.local import list_workers, stop_worker
from interp_kernel.spec import WorkerSpec

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXIT_WAIT_S = 10.0
FOLDER = pytest.StashKey[Path]()
ENVIRONMENT = pytest.StashKey[Mapping[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Point HOME and every Jupyter, IPython and worker folder into one temporary folder, before tests are imported.

    Under /tmp and short: a Unix socket's path may have 107 characters at most.
    """
    folder = Path(tempfile.mkdtemp(prefix="ik", dir="/tmp"))
    config.stash[FOLDER] = folder
    config.stash[ENVIRONMENT] = dict(os.environ)
    (folder / "home").mkdir()
    (folder / "run").mkdir(mode=0o700)
    os.environ.update(
        HOME=str(folder / "home"),
        INTERP_RUNTIME_DIR=str(folder / "run"),
        JUPYTER_CONFIG_DIR=str(folder / "jupyter-config"),
        JUPYTER_DATA_DIR=str(folder / "jupyter-data"),
        JUPYTER_RUNTIME_DIR=str(folder / "jupyter-run"),
        IPYTHONDIR=str(folder / "ipython"),
        MPLCONFIGDIR=str(folder / "matplotlib"),
        HF_HOME=str(folder / "hf"),
        XDG_CACHE_HOME=str(folder / "cache"),
        XDG_CONFIG_HOME=str(folder / "config"),
        XDG_RUNTIME_DIR=str(folder / "xdg"),
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",  # small models: on two busy cores a second thread costs five times what it saves
    )
    for name in ("JUPYTER_PATH", "INTERP_MODEL", "HF_TOKEN", "PYTHONSTARTUP"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give the environment back and remove the folder."""
    os.environ.clear()
    os.environ |= config.stash[ENVIRONMENT]
    shutil.rmtree(config.stash[FOLDER], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_session(pytestconfig: pytest.Config) -> Iterator[None]:
    """Stop the workers that tests left warm, then fail if anything that tests started still runs."""
    yield
    stop_workers()
    runtime = str(pytestconfig.stash[FOLDER] / "run")
    _, alive = psutil.wait_procs(processes_of(runtime), timeout=EXIT_WAIT_S)
    leaked = [f"{process.pid}: {' '.join(process.cmdline())[:200]}" for process in alive if process.is_running()]
    for process in alive:
        process.kill()
    assert not leaked, "These processes outlived the tests that started them:\n" + "\n".join(leaked)


@pytest.fixture(scope="module", autouse=True)
def no_traces_of_workers() -> None:
    """What a module sees of workers never depends on the modules before it, but for one with the demo model alone.

    That one stays warm, as a user's would: a start costs three seconds of a core.
    """
    stop_workers(but=WorkerSpec().key)


@pytest.fixture(scope="module")
def no_warm_worker(no_traces_of_workers: None) -> None:
    """For modules that count loads or clients, or look at the list of workers."""
    stop_workers()


def stop_workers(but: str = "") -> None:
    """End the warm workers of this session's runtime folder, and remove what dead ones have left."""
    for worker in list_workers():
        if worker.state != "dead" and worker.key != but:
            stop_worker(worker.key)
        if worker.state == "dead" or worker.key != but:
            shutil.rmtree(worker.folder, ignore_errors=True)  # its supervisor may still be writing why it ended


def processes_of(runtime: str) -> list[psutil.Process]:
    """Every process whose environment names this session's runtime folder, whatever session or parent it has.

    Python's own resource tracker is left out: it ends with the process that it serves, here pytest.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("INTERP_RUNTIME_DIR") == runtime
            tracker = any("resource_tracker" in part for part in process.cmdline())
        except psutil.Error:
            continue
        if ours and not tracker and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; without one the test is skipped, or fails where INTERP_REQUIRE_BROWSER=1 asks for it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"None of {', '.join(BROWSERS)} is installed; `apt-get install chromium` provides one."
        if os.environ.get("INTERP_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
