"""The command `interp-kernel`. Nothing heavy is imported before a verb needs it, so that --help is immediate."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_kernel.lines import seconds
from interp_kernel.notebook.commands import INTERRUPTED, add_verbs
from interp_kernel.notebook.words import duration

if TYPE_CHECKING:
    from interp_kernel.backends.local import WorkerStatus

STATE_CHARS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it did what was asked, 1 if not, 2 if the command line is wrong, 130 if a signal stopped it.
    """
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    from interp_kernel.errors import InterpError

    try:
        code = run(arguments)
        if not sys.stdout.closed:  # as a server on it leaves it
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # as after `| head`; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InterpError, OSError) as error:
        print(f"interp-kernel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="interp-kernel", description="Notebooks whose %%remote cells run on a warm worker that holds a model."
    )
    top.add_argument("--version", action=Version, nargs=0, help="show which version this is")
    verbs = top.add_subparsers(metavar="COMMAND", required=True)
    add_verbs(verbs, _verb)
    _add_worker(verbs)
    _add_modal(verbs)
    _add_mcp(verbs)
    _add_agent(verbs)
    _verb(verbs, "doctor", run_doctor, "check what is needed, in order, and say what to do about what is missing")
    specs = verbs.add_parser("kernelspec", help="make the kernel known to Jupyter").add_subparsers(required=True)
    install = _verb(specs, "install", install_kernelspec, "install the kernelspec with this Python's path")
    place = install.add_mutually_exclusive_group(required=True)
    place.add_argument("--user", action="store_true", help="for every Jupyter server of this user")
    place.add_argument("--sys-prefix", action="store_true", help="for servers of this Python's own environment")
    place.add_argument("--prefix", metavar="P", help="for servers of the environment at P")
    techniques = verbs.add_parser("techniques", help="the techniques that come with it").add_subparsers(required=True)
    _verb(techniques, "list", list_techniques, "name every technique and what it is for")
    return top


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it and end."""
        from importlib.metadata import version

        print(f"interp-kernel {version('interp-kernel')}")
        parser.exit()


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(run=run)
    return verb


def _add_worker(verbs: Any) -> None:
    worker = verbs.add_parser("worker", help="the warm workers on this machine").add_subparsers(required=True)
    _verb(worker, "list", list_workers, "list the workers of this user")
    stop = _verb(worker, "stop", stop_workers, "end a worker; its model and remote values are lost")
    which = stop.add_mutually_exclusive_group(required=True)
    text = "the worker's key, a beginning of it that is unique, or the name of its model"
    which.add_argument("key", nargs="?", metavar="KEY", help=text)
    which.add_argument("--all", action="store_true", help="every worker of this user")
    logs = _verb(worker, "logs", print_log, "print what a worker wrote to its log")
    logs.add_argument("key", nargs="?", metavar="KEY", help="needed where there are several workers")


def _add_modal(verbs: Any) -> None:
    from interp_kernel.backends.modal.arguments import add_options

    modal = verbs.add_parser("modal", help="the app at Modal that outlives notebooks").add_subparsers(required=True)
    deploy = _verb(modal, "deploy", run_modal, "deploy the app, in place of an earlier one, whose containers end")
    deploy.argument_default = argparse.SUPPRESS
    add_options(deploy)
    deploy.add_argument("--scaledown-window", type=int, metavar="S", help="end after so many idle seconds (300)")
    texts = {
        "status": "say whether the app is deployed and how many containers run",
        "logs": "print what its containers wrote",
        "stop": "end the app and its containers; models and remote values are lost",
    }
    for name, text in texts.items():
        verb = _verb(modal, name, run_modal, text)
        verb.add_argument("--app-name", default="interp-kernel", metavar="NAME", help="its name (interp-kernel)")
    for name, verb in modal.choices.items():
        verb.set_defaults(action=name)


def _add_mcp(verbs: Any) -> None:
    mcp = _verb(verbs, "mcp", run_mcp, "serve agents that work in notebooks, over the Model Context Protocol on stdio")
    mcp.add_argument("--workspace", type=Path, default=Path(), metavar="DIR", help="folder of their notebooks (.)")
    mcp.add_argument("--model", metavar="M", help="model of init_session: a name, or a JSON object of options")
    mcp.add_argument("--jupyter-url", metavar="URL", help="use kernels of this Jupyter server; token in $JUPYTER_TOKEN")
    mcp.add_argument(
        "--idle-window",
        type=seconds,
        default=3600.0,
        metavar="S",
        help="end a session in which nothing ran and nothing was asked for so many seconds (3600)",
    )
    mcp.add_argument(
        "--http", nargs="?", type=int, const=0, metavar="PORT", help="serve on this machine's loopback, with a token"
    )


def run_mcp(arguments: argparse.Namespace) -> int:
    """`interp-kernel mcp`."""
    from importlib.util import find_spec

    from interp_kernel.errors import InterpError

    if find_spec("mcp") is None:
        raise InterpError('The package `mcp` is not installed; `pip install "interp-kernel[agents]"` brings it.')
    from interp_kernel.mcp.server import serve

    return serve(arguments)


def run_modal(arguments: argparse.Namespace) -> int:
    """`interp-kernel modal`."""
    from interp_kernel.backends.modal import commands

    action: Callable[[argparse.Namespace], int] = getattr(commands, arguments.action)
    return action(arguments)


def _add_agent(verbs: Any) -> None:
    from interp_kernel.agents.commands import add_options

    add_options(_verb(verbs, "agent", run_agent, "let an agent carry out a study in notebooks of its own"))


def run_agent(arguments: argparse.Namespace) -> int:
    """`interp-kernel agent`."""
    from interp_kernel.agents.commands import run_agent as run

    return run(arguments)


def run_doctor(arguments: argparse.Namespace) -> int:
    """`interp-kernel doctor`."""
    from interp_kernel.doctor import examine

    return 0 if examine(print) else 1


def list_workers(arguments: argparse.Namespace) -> int:
    """`interp-kernel worker list`."""
    from interp_kernel.backends.local import list_workers as workers

    rows = [("KEY", "MODEL", "PID", "STATE", "UP", "CLIENTS", "MEMORY")]
    rows += [
        (
            worker.key,
            worker.model_name,
            str(worker.pid or "-"),
            state_of(worker),
            duration(int(time.time() - worker.started)) if worker.started else "-",
            str(worker.clients),
            f"{worker.memory_bytes / 1e6:.0f} MB" if worker.memory_bytes else "-",
        )
        for worker in workers()
    ]
    if len(rows) == 1:
        print("No worker runs. The first remote cell starts one.")
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def state_of(worker: WorkerStatus) -> str:
    """What a worker does, or why it ended, in a column's width; its log has the rest."""
    text = f"{worker.state}: {worker.exit_reason}" if worker.exit_reason else worker.state
    return textwrap.shorten(text, STATE_CHARS, placeholder=" ...")


def find_worker(key: str | None) -> WorkerStatus:
    """The one worker whose key begins with `key`, or whose model has that name.

    Raises:
        WorkerError: None does, or several do.
    """
    from interp_kernel.backends.local import list_workers as workers
    from interp_kernel.errors import WorkerError

    known = workers()
    found = [worker for worker in known if worker.key.startswith(key or "") or worker.model_name == key]
    if len(found) == 1:
        return found[0]
    wanted = f"Worker {key!r}" if key else "The worker"
    keys = ", ".join(worker.key for worker in known) or "none"
    raise WorkerError(f"{wanted} is {'not unique' if found else 'not known'}; there are: {keys}. Name one by its key.")


def stop_workers(arguments: argparse.Namespace) -> int:
    """`interp-kernel worker stop`."""
    from interp_kernel.backends.local import list_workers as workers
    from interp_kernel.backends.local import stop_worker

    alive = [worker for worker in workers() if worker.state != "dead"]
    chosen = alive if arguments.all else [find_worker(arguments.key)]
    for worker in chosen:
        stop_worker(worker.key)
        word = "Had already ended" if worker.state == "dead" else "Stopped"
        print(f"{word}: {worker.key} ({worker.model_name}).")
    if not chosen:
        print("No worker runs.")
    return 0


def print_log(arguments: argparse.Namespace) -> int:
    """`interp-kernel worker logs`."""
    from interp_kernel.backends.local import log_path

    path = log_path(find_worker(arguments.key).key)
    print(path.read_text(encoding="utf-8", errors="replace"), end="")
    return 0


def install_kernelspec(arguments: argparse.Namespace) -> int:
    """`interp-kernel kernelspec install`."""
    from interp_kernel.kernelspec import install

    folder = install(user=arguments.user, prefix=sys.prefix if arguments.sys_prefix else arguments.prefix)
    print(f"Installed the kernel `interp` in {folder}; it runs {sys.executable}.")
    return 0


def list_techniques(arguments: argparse.Namespace) -> int:
    """`interp-kernel techniques list`."""
    from interp_kernel.catalogue import listing, package_techniques

    print(listing(package_techniques()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
