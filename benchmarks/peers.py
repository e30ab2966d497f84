"""The peers that ship a function to another process: `call(fn, *args)` runs `fn(None, None, *args)` there.

Run as a module it is the far side of the bare peer: `python -m benchmarks.peers ADDRESS`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

Call = Callable[..., Any]

PACKAGES = {"Ray actor": "ray", "Dask actor": "distributed", "ipyparallel apply_sync": "ipyparallel"}
BARE = "bare connection"


class Actor:
    """What runs on the far side of Ray and Dask."""

    def call(self, fn: Call, *args: Any) -> Any:
        """Run a function that was shipped here."""
        return fn(None, None, *args)


def installed() -> list[str]:
    """Names of the peers that can be measured here; what is missing is said on stderr."""
    missing = [package for package in PACKAGES.values() if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"Not installed, so not measured: {', '.join(missing)}. Install with: {sys.executable} -m pip install "
            "-e '.[bench]'",
            file=sys.stderr,
        )
    return [name for name, package in PACKAGES.items() if package not in missing]


@contextmanager
def started(names: list[str]) -> Iterator[dict[str, Call]]:
    """Start some peers; they end with the block. One that does not start is said on stderr and left out."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for name in names:
            try:
                calls[name] = stack.enter_context(STARTERS[name]())
            except Exception as error:  # noqa: BLE001 - a peer may fail in any way, as Ray does on a busy machine
                print(f"{name} did not start, so it is not measured: {error}", file=sys.stderr)
        yield calls


@contextmanager
def bare() -> Iterator[Call]:
    """multiprocessing.connection over a Unix socket, cloudpickle on the way there and pickle on the way back."""
    import cloudpickle

    with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder, "socket")), "AF_UNIX") as listener:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.peers", str(listener.address)])
        with listener.accept() as connection:

            def call(fn: Call, *args: Any) -> Any:
                connection.send_bytes(cloudpickle.dumps((fn, args)))
                return pickle.loads(connection.recv_bytes())

            yield call
        process.wait()


def serve_bare(connection: Connection) -> None:
    """Unpickle, call and answer until the other side leaves."""
    try:
        while True:
            fn, args = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(fn(None, None, *args), protocol=5))
    except EOFError:
        pass


@contextmanager
def ray_actor() -> Iterator[Call]:
    """One actor on a local cluster of Ray."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0")
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        actor = ray.remote(Actor).remote()
        yield lambda fn, *args: ray.get(actor.call.remote(fn, *args))
    finally:
        ray.shutdown()


@contextmanager
def dask_actor() -> Iterator[Call]:
    """One actor on a local cluster of one Dask worker process."""
    from distributed import Client as DaskClient
    from distributed import LocalCluster

    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options, silence_logs=logging.ERROR) as cluster, DaskClient(cluster) as client:
        actor = client.submit(Actor, actor=True).result()
        yield lambda fn, *args: actor.call(fn, *args).result()


@contextmanager
def ipyparallel_view() -> Iterator[Call]:
    """A view of one ipyparallel engine, which takes functions by cloudpickle, their globals included."""
    import ipyparallel

    with ipyparallel.Cluster(n=1, log_level=logging.ERROR) as client:
        view = client[0]
        view.use_cloudpickle()
        yield lambda fn, *args: view.apply_sync(fn, None, None, *args)


STARTERS: dict[str, Callable[[], AbstractContextManager[Call]]] = {
    BARE: bare,
    "Ray actor": ray_actor,
    "Dask actor": dask_actor,
    "ipyparallel apply_sync": ipyparallel_view,
}


if __name__ == "__main__":
    with Client(sys.argv[1], "AF_UNIX") as from_parent:
        serve_bare(from_parent)
