"""The command `interp-kernel`. Nothing heavy is imported before a verb needs it, so that --help is immediate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_kernel.backends.local import WorkerStatus
    from interp_kernel.notebook.run import RunResult

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it did what was asked, 1 if not, 2 if the command line is wrong, 130 if a signal stopped it.
    """
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    from interp_kernel.errors import InterpError

    try:
        return run(arguments)
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
    verbs = top.add_subparsers(metavar="COMMAND", required=True)
    demo = _verb(verbs, "demo", run_demo, "run the quickstart notebook on the built-in demo model")
    demo.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="folder (default: out)")
    _add_run(verbs)
    _add_batch(verbs)
    _add_reproduce(verbs)
    _add_check(verbs)
    _add_runs(verbs)
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


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(run=run)
    return verb


def _add_run(verbs: Any) -> None:
    run = _verb(verbs, "run", run_one, "run a notebook end to end; the last line on stdout is its result as JSON")
    run.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    _add_parameter(run)
    run.add_argument("-o", "--output", type=Path, metavar="OUT", help="executed notebook or folder (default: out/)")
    run.add_argument("--model", metavar="M", help="model for its remote cells: a name, or a JSON object of options")
    run.add_argument("--timeout", type=_seconds, metavar="S", help="seconds that each cell may take")


def _add_batch(verbs: Any) -> None:
    batch = _verb(verbs, "batch", run_batch, "run a study: notebooks x grid x models x seeds x repeats")
    batch.add_argument("study", type=Path, metavar="STUDY", help="its YAML, or Python that assigns it to `study`")
    batch.add_argument("-j", "--jobs", type=int, metavar="N", help="notebooks at once (default: the study's, else 2)")
    batch.add_argument("-o", "--output", metavar="DIR", help="folder (default: the study's, else out/NAME)")
    again = batch.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on, skipping what is complete and has not changed")
    again.add_argument("--only-failed", action="store_true", help="run those again that began and are not complete")
    batch.add_argument("--stop-on-failure", action="store_true", help="begin nothing more after a failure")
    batch.add_argument("--dry-run", action="store_true", help="print the plan, its time and cost, and run nothing")


def _add_parameter(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a name that the cell tagged `parameters` assigns; VALUE as a number, True, False, None, JSON or text",
    )


def _add_check(verbs: Any) -> None:
    check = _verb(verbs, "check", check_notebooks, "say whether notebooks would run, and what is wrong in which cell")
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    _add_parameter(check)
    check.add_argument("--fix", action="store_true", help="write back what can be made good without a doubt")


def _add_runs(verbs: Any) -> None:
    runs = verbs.add_parser("runs", help="what the records of past runs say").add_subparsers(required=True)
    texts = {
        "list": "list the runs of a folder",
        "show": "show one run: what went in, where it ran, how long each cell took, how it ended",
        "diff": "show in what two runs differ",
        "export": "write one flat row for each run, as pandas reads it",
    }
    for name, text in texts.items():
        verb = _verb(runs, name, run_runs, text)
        verb.set_defaults(action=name)
        if name in ("show", "diff"):
            what = "beginning of a run's key, or its executed notebook"
            verb.add_argument("runs", nargs=1 if name == "show" else 2, metavar="RUN", help=what)
            verb.add_argument("--in", dest="folder", type=Path, default=Path("out"), metavar="DIR", help="(out)")
        else:
            verb.add_argument("folder", type=Path, nargs="?", default=Path("out"), metavar="DIR", help="(out)")
    runs.choices["export"].add_argument("--format", choices=("json", "csv"), default="json", help="(json)")


def _values(arguments: argparse.Namespace, notebook: Path) -> dict[str, Any]:
    from interp_kernel.notebook.checks import typed

    return typed(notebook, dict(arguments.parameter), parameter_value)


def check_notebooks(arguments: argparse.Namespace) -> int:
    """`interp-kernel check`."""
    from interp_kernel.notebook.checks import report

    verdicts = [report(path, _values(arguments, path), fix=arguments.fix) for path in arguments.notebooks]
    return 0 if all(verdicts) else 1


def run_runs(arguments: argparse.Namespace) -> int:
    """`interp-kernel runs`."""
    from interp_kernel.notebook import runs

    action: Callable[[argparse.Namespace], int] = runs.VERBS[arguments.action]
    return action(arguments)


def _add_reproduce(verbs: Any) -> None:
    again = _verb(verbs, "reproduce", run_reproduce, "run an executed notebook again and compare what its cells show")
    again.add_argument("notebook", type=Path, metavar="NOTEBOOK", help="a notebook with outputs; it is not changed")
    again.add_argument("-o", "--output", type=Path, metavar="OUT", help="the second run (default: out/reproduced/)")
    again.add_argument("--rtol", type=_tolerance, metavar="R", help="share of a number by which it may move (1e-5)")
    again.add_argument("--atol", type=_tolerance, metavar="A", help="amount by which every number may move (1e-8)")
    again.add_argument("--model", metavar="M", help="model for its remote cells instead of the one of the first run")
    again.add_argument("--timeout", type=_seconds, metavar="S", help="seconds that each cell may take")


def _add_worker(verbs: Any) -> None:
    worker = verbs.add_parser("worker", help="the warm workers on this machine").add_subparsers(required=True)
    _verb(worker, "list", list_workers, "list the workers of this user")
    stop = _verb(worker, "stop", stop_workers, "end a worker; its model and remote values are lost")
    which = stop.add_mutually_exclusive_group(required=True)
    which.add_argument("key", nargs="?", metavar="KEY", help="the worker's key, or a beginning of it that is unique")
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
        type=_seconds,
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


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time; expected seconds above 0")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a tolerance; expected 0 or a number above")
    return value


def parameter_value(text: str) -> Any:
    """A value of -p, typed as papermill types its own (True, False, None, a number, else text), or JSON in brackets."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def run_one(arguments: argparse.Namespace) -> int:
    """`interp-kernel run`: progress on stderr, the result as one line of JSON on stdout."""
    from interp_kernel.notebook.run import run_notebook

    _quiet_papermill()
    output = arguments.output or Path("out")
    if output.suffix != ".ipynb":
        output /= arguments.notebook.name
    parameters = _values(arguments, arguments.notebook)
    result = run_notebook(arguments.notebook, output, parameters, timeout_s=arguments.timeout, model=arguments.model)
    _explain(result)
    print(result.to_json(), flush=True)
    return _exit_code(result)


def run_batch(arguments: argparse.Namespace) -> int:
    """`interp-kernel batch`: progress on stderr, the outcome as one line of JSON on stdout."""
    from interp_kernel.notebook.batch import command

    return command(arguments)


def run_reproduce(arguments: argparse.Namespace) -> int:
    """`interp-kernel reproduce`: what differs on stderr, the verdict as one line of JSON on stdout."""
    from interp_kernel.notebook.compare import Tolerance
    from interp_kernel.notebook.reproduce import reproduce

    _quiet_papermill()
    output = arguments.output or Path("out", "reproduced")
    if output.suffix != ".ipynb":
        output /= arguments.notebook.name
    given = {"rtol": arguments.rtol, "atol": arguments.atol}
    tolerance = Tolerance(**{name: value for name, value in given.items() if value is not None})
    found = reproduce(
        arguments.notebook,
        output,
        tolerance=tolerance,
        timeout_s=arguments.timeout,
        model=arguments.model,
    )
    print(*found.describe(), sep="\n", file=sys.stderr)
    print(found.to_json(), flush=True)
    return INTERRUPTED if found.run.status == "interrupted" else 0 if found.is_reproduced else 1


def run_demo(arguments: argparse.Namespace) -> int:
    """`interp-kernel demo`."""
    from interp_kernel.kernelspec import notebook_folder
    from interp_kernel.notebook.run import run_notebook

    _quiet_papermill()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print("Running the quickstart notebook on the demo model; the first remote cell starts the worker.", flush=True)
    source = notebook_folder() / "quickstart.ipynb"
    result = run_notebook(source, folder / source.name, model="demo", cwd=folder)
    _explain(result)
    if result.status == "completed":
        print(f"\nWhat it found, in {result.seconds:.0f} s:")
        for line in _describe(result.findings):
            print(f"  {line}")
    print(f"\nExecuted notebook  {result.output}\nThe same as HTML   {result.html}")
    return _exit_code(result)


def _explain(result: RunResult) -> None:
    if result.status == "completed":
        return
    where = f" in cell {result.failed_cell}" if result.failed_cell is not None else ""
    for line in result.traceback or [f"{result.ename}: {result.evalue}"]:
        print(line, file=sys.stderr)
    print(f"The run ended{where} ({result.status}). Everything up to there is in {result.output}.", file=sys.stderr)


def _exit_code(result: RunResult) -> int:
    return {"completed": 0, "interrupted": INTERRUPTED}.get(result.status, 1)


def _describe(findings: Any) -> list[str]:
    if not isinstance(findings, dict):
        return [] if findings is None else str(findings).splitlines()
    width = max(map(len, findings), default=0)
    return [f"{name.replace('_', ' '):<{width}}  {_in_words(value)}" for name, value in findings.items()]


def _in_words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = {name.replace("_", " "): f'"{part}"' if isinstance(part, str) else part for name, part in value.items()}
    return ", ".join(f"{name} {part}" for name, part in parts.items())


def _quiet_papermill() -> None:
    """What went wrong is told once, by us; papermill's log would tell it in other words."""
    import logging

    logging.getLogger("papermill").setLevel(logging.CRITICAL)


def list_workers(arguments: argparse.Namespace) -> int:
    """`interp-kernel worker list`."""
    from interp_kernel.backends.local import list_workers as workers

    rows = [("KEY", "MODEL", "PID", "STATE", "UP", "CLIENTS", "MEMORY")]
    rows += [
        (
            worker.key,
            worker.model_name,
            str(worker.pid or "-"),
            f"{worker.state}: {worker.exit_reason}" if worker.exit_reason else worker.state,
            _duration(time.time() - worker.started) if worker.started else "-",
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


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def find_worker(key: str | None) -> WorkerStatus:
    """The one worker whose key begins with `key`.

    Raises:
        WorkerError: None does, or several do.
    """
    from interp_kernel.backends.local import list_workers as workers
    from interp_kernel.errors import WorkerError

    known = workers()
    found = [worker for worker in known if worker.key.startswith(key or "")]
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
