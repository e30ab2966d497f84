"""`interp-kernel modal deploy|status|logs|stop`: the deployed app, by its name."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from interp_kernel.backends.modal.options import ModalOptions
from interp_kernel.errors import WorkerError
from interp_kernel.spec import WorkerSpec


def deploy(arguments: argparse.Namespace) -> int:
    """Deploy the app, or deploy it anew with other options or another version of this package."""
    from interp_kernel.backends.modal.app import ModalApp
    from interp_kernel.backends.modal.backend import wait
    from interp_kernel.backends.modal.link import start

    given = {name: getattr(arguments, name) for name in ModalOptions.names() if hasattr(arguments, name)}
    options = ModalOptions(**{**given, "deploy": True})
    wait(start(ModalApp(WorkerSpec(), options).deploy()))
    print(f"Deployed {options.app_name!r}: {options.place()}.")
    print(f"Notebooks use it with: %remote start MODEL --backend modal --deploy --app-name {options.app_name}")
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Say whether the app is deployed or runs, and how many containers it has."""
    for app in (found := find(arguments.app_name)):
        print(f"{app['description']}: {app['state']}, {app['tasks']} containers, {app['app_id']}")
    if not found:
        print(f"{arguments.app_name!r} neither runs nor is deployed. Deploy it: interp-kernel modal deploy.")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Print what the app's containers wrote."""
    return max(_modal("app", "logs", handle(app)).returncode for app in expect(arguments.app_name))


def stop(arguments: argparse.Namespace) -> int:
    """End the app and its containers; their models and remote values are lost."""
    for app in expect(arguments.app_name):
        if code := _modal("app", "stop", handle(app), "--yes").returncode:
            return code
        print(f"Stopped {app['description']!r} ({app['state']}).")
    return 0


def expect(name: str) -> list[dict[str, str]]:
    """The apps of a name, of which there must be one at least.

    Raises:
        WorkerError: There is none.
    """
    if found := find(name):
        return found
    raise WorkerError(f"No app {name!r} runs or is deployed at Modal. Those that exist: modal app list.")


def handle(app: dict[str, str]) -> str:
    """What Modal's command takes for an app: the name is that of the deployed one only."""
    return app["description"] if app["state"] == "deployed" else app["app_id"]


def find(name: str) -> list[dict[str, str]]:
    """The apps of a name that were not stopped."""
    done = _modal("app", "list", "--json", is_captured=True)
    try:
        rows = json.loads(done.stdout)
    except ValueError:
        text = " ".join((done.stderr or done.stdout).split())
        raise WorkerError(f"`modal app list` failed: {text}. Look at the token with `modal token info`.") from None
    apps = [{key.lower().replace(" ", "_"): str(value) for key, value in row.items()} for row in rows]
    return [app for app in apps if app["description"] == name and app["state"] != "stopped"]


def _modal(*words: str, is_captured: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Modal's own command, once it is known that it can reach Modal."""
    from interp_kernel.backends.modal.app import check_reachable
    from interp_kernel.backends.modal.backend import wait
    from interp_kernel.backends.modal.link import start

    wait(start(check_reachable()))
    return subprocess.run([sys.executable, "-m", "modal", *words], capture_output=is_captured, text=True, check=False)
