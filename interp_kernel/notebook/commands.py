"""`interp-kernel demo | run | batch | reproduce | check | runs`: what each asks for, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_kernel.lines import seconds
from interp_kernel.notebook.schemas import import_nbformat

if TYPE_CHECKING:
    from interp_kernel.notebook.run import RunResult

INTERRUPTED = 130
AddVerb = Callable[[Any, str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs; nothing heavy is imported for it."""
    demo = add(verbs, "demo", run_demo, "run the quickstart notebook on the built-in demo model")
    demo.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="folder (default: out)")
    for declare in (_add_run, _add_batch, _add_reproduce, _add_check, _add_runs):
        declare(verbs, add)


def _add_run(verbs: Any, add: AddVerb) -> None:
    run = add(verbs, "run", run_one, "run a notebook end to end; the last line on stdout is its result as JSON")
    run.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    _add_parameter(run)
    run.add_argument("-o", "--output", type=Path, metavar="OUT", help="executed notebook or folder (default: out/)")
    run.add_argument("--model", metavar="M", help="model for its remote cells: a name, or a JSON object of options")
    run.add_argument("--timeout", type=seconds, metavar="S", help="seconds that each cell may take")


def _add_batch(verbs: Any, add: AddVerb) -> None:
    batch = add(verbs, "batch", run_batch, "run a study: notebooks x grid x models x seeds x repeats")
    batch.add_argument("study", type=Path, metavar="STUDY", help="its YAML, or Python that assigns it to `study`")
    batch.add_argument("-j", "--jobs", type=int, metavar="N", help="notebooks at once (default: the study's, else 2)")
    batch.add_argument("-o", "--output", metavar="DIR", help="folder (default: the study's, else out/NAME)")
    again = batch.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on, skipping what is complete and has not changed")
    again.add_argument("--only-failed", action="store_true", help="run those again that began and are not complete")
    batch.add_argument("--stop-on-failure", action="store_true", help="begin nothing more after a failure")
    batch.add_argument("--dry-run", action="store_true", help="print the plan, its time and cost, and run nothing")


def _add_reproduce(verbs: Any, add: AddVerb) -> None:
    again = add(verbs, "reproduce", run_reproduce, "run an executed notebook again and compare what its cells show")
    again.add_argument("notebook", type=Path, metavar="NOTEBOOK", help="a notebook with outputs; it is not changed")
    again.add_argument("-o", "--output", type=Path, metavar="OUT", help="the second run (default: out/reproduced/)")
    again.add_argument("--rtol", type=_tolerance, metavar="R", help="share of a number by which it may move (1e-5)")
    again.add_argument("--atol", type=_tolerance, metavar="A", help="amount by which every number may move (1e-8)")
    again.add_argument("--model", metavar="M", help="model for its remote cells instead of the one of the first run")
    again.add_argument("--timeout", type=seconds, metavar="S", help="seconds that each cell may take")


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


def _add_check(verbs: Any, add: AddVerb) -> None:
    check = add(verbs, "check", check_notebooks, "say whether notebooks would run, and what is wrong in which cell")
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    _add_parameter(check)
    check.add_argument("--fix", action="store_true", help="write back what can be made good without a doubt")


def _add_runs(verbs: Any, add: AddVerb) -> None:
    runs = verbs.add_parser("runs", help="what the records of past runs say").add_subparsers(required=True)
    texts = {
        "list": "list the runs of a folder",
        "show": "show one run: what went in, where it ran, how long each cell took, how it ended",
        "diff": "show in what two runs differ",
        "export": "write one flat row for each run, as pandas reads it",
    }
    for name, text in texts.items():
        verb = add(runs, name, run_runs, text)
        verb.set_defaults(action=name)
        if name in ("show", "diff"):
            what = "beginning of a run's key, or its executed notebook"
            verb.add_argument("runs", nargs=1 if name == "show" else 2, metavar="RUN", help=what)
            verb.add_argument("--in", dest="folder", type=Path, default=Path("out"), metavar="DIR", help="(out)")
        else:
            verb.add_argument("folder", type=Path, nargs="?", default=Path("out"), metavar="DIR", help="(out)")
    runs.choices["export"].add_argument("--format", choices=("json", "csv"), default="json", help="(json)")


def run_one(arguments: argparse.Namespace) -> int:
    """`interp-kernel run`: progress on stderr, the result as one line of JSON on stdout."""
    from interp_kernel.notebook.run import run_notebook

    _prepare()
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
    from interp_kernel.notebook.batch.batch import command

    import_nbformat()
    return command(arguments)


def run_reproduce(arguments: argparse.Namespace) -> int:
    """`interp-kernel reproduce`: what differs on stderr, the verdict as one line of JSON on stdout."""
    from interp_kernel.notebook.compare import Tolerance
    from interp_kernel.notebook.reproduce import reproduce

    _prepare()
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

    _prepare()
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


def check_notebooks(arguments: argparse.Namespace) -> int:
    """`interp-kernel check`."""
    from interp_kernel.notebook.checks import report

    import_nbformat()
    verdicts = [report(path, _values(arguments, path), fix=arguments.fix) for path in arguments.notebooks]
    return 0 if all(verdicts) else 1


def run_runs(arguments: argparse.Namespace) -> int:
    """`interp-kernel runs`."""
    from interp_kernel.notebook import runs

    action: Callable[[argparse.Namespace], int] = runs.VERBS[arguments.action]
    return action(arguments)


def _values(arguments: argparse.Namespace, notebook: Path) -> dict[str, Any]:
    from interp_kernel.notebook.checks import typed

    return typed(notebook, dict(arguments.parameter), parameter_value)


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


def _prepare() -> None:
    """What went wrong is told once, by us; papermill's log would tell it in other words."""
    import logging

    import_nbformat()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a tolerance; expected 0 or a number above")
    return value
