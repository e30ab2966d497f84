"""Run one notebook from end to end through papermill, and say in one record how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError
from interp_kernel.notebook.executed import findings, input_index
from interp_kernel.notebook.files import append, lines
from interp_kernel.notebook.provenance import Ledger, OnCell, facts_of

__all__ = ["RunResult", "findings", "input_index", "run_notebook"]


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    Attributes:
        status: `completed`, `failed`, `timeout`, `dead-kernel` or `interrupted`.
        output: The executed notebook.
        html: The same as a page.
        seconds: Wall time, kernel start included.
        failed_cell: Index, from 0, in the *input* notebook of the cell that ended the run; None if it completed or
            ended in no cell of the input, as in the one that papermill adds for parameters.
        ename: Name of the exception.
        evalue: Its message.
        traceback: Its last lines, without colours.
        findings: What the cell tagged `findings` displayed, as JSON values where it can be read so, else as text.
    """

    status: str
    output: Path
    html: Path
    seconds: float
    failed_cell: int | None = None
    ename: str | None = None
    evalue: str | None = None
    traceback: tuple[str, ...] = ()
    findings: Any = None

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=str)


def run_notebook(
    path: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None = None,
    model: str | None = None,
    progress: bool = True,
    kernel_name: str | None = None,
    cwd: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    on_cell: OnCell | None = None,
) -> RunResult:
    """Run a notebook; whatever a cell does, the executed notebook and its HTML are written and the result says so.

    Args:
        path: The notebook; it is not changed.
        output: Where the executed notebook goes; its HTML goes beside it.
        parameters: Values for names that the cell tagged `parameters` assigns.
        timeout_s: Seconds that each cell may take.
        model: Model for its remote cells, instead of the one that the notebook names: a name, or a JSON object of
            InterpClient's options.
        progress: Whether a progress bar is shown on stderr.
        kernel_name: Kernel to use instead of the one that the notebook names.
        cwd: Working directory of the kernel; by default the notebook's own folder, as in JupyterLab.
        facts: What a batch knows of the run, for its record.
        on_cell: Called as each cell begins, with its index and the number of cells.

    Raises:
        NotebookError: The notebook or its parameters are refused; nothing has run.
        SpecError: An option of the model is wrong; nothing has run.
        OSError: The output can't be written.
    """
    path, output, parameters = Path(path), Path(output), dict(parameters or {})
    notebook, options = prepare(path, output, parameters, kernel_name)
    folder = Path(cwd or path.parent).resolve()
    ledger = begin(path, notebook, parameters, output, model=model, folder=folder, given=facts)
    from papermill.exceptions import PapermillExecutionError

    from interp_kernel.notebook.report import write_html
    from interp_kernel.notebook.runner import RunInterruptedError

    try:
        # The executed notebook tells how it ended; the exception would only repeat it.
        with contextlib.suppress(PapermillExecutionError, RunInterruptedError):
            papermill_run(
                notebook,
                parameters=parameters,
                paths=(str(path), str(output)),
                ledger=ledger,
                on_cell=on_cell,
                execution_timeout=timeout_s,
                model=model,
                progress_bar=bar_options() if progress else False,
                kernel_cwd=str(folder),
                **options,
            )
    except BaseException as error:
        ledger.give_up(error)
        raise
    finally:
        append(output.parent, ledger.facts)
    write_html(output)
    return result(output, ledger.facts)


def prepare(
    path: Path, output: Path, parameters: Mapping[str, Any], kernel_name: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Check everything that can be checked before a kernel starts; the notebook, and its kernel's name and language."""
    from interp_kernel.notebook.checks import kernel_of, read_notebook
    from interp_kernel.notebook.parameters import check_parameters

    notebook = read_notebook(path)
    name, language = kernel_of(path, notebook, kernel_name)
    check_parameters(path, notebook, parameters)
    if output.resolve() == path.resolve():
        raise NotebookError(f"{output} is the notebook itself; expected another file for the executed one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return notebook, {"kernel_name": name, "language": language}


def begin(
    path: Path,
    notebook: dict[str, Any],
    parameters: Mapping[str, Any],
    output: Path,
    *,
    model: str | None,
    folder: Path,
    given: Mapping[str, Any] | None,
) -> Ledger:
    """A ledger of the run, whose beginning is written beside the output."""
    from interp_kernel.magics import json_or_text, settings_from

    options = settings_from(json_or_text(model), "--model") if model else None
    facts = facts_of(path, notebook, parameters, output, model=options, folders=[folder, Path.cwd()], given=given)
    if given is None:
        before = [line["attempt"] for line in lines(output.parent) if line["key"] == facts["key"]]
        facts["attempt"] = 1 + max(before, default=0)
    ledger = Ledger(facts, notebook)
    append(output.parent, ledger.facts)
    return ledger


def papermill_run(notebook: dict[str, Any], **options: Any) -> None:
    """papermill.execute_notebook with our engine, also where its entry point isn't installed."""
    import nbformat
    import papermill
    from nbformat.warnings import MissingIDFieldWarning
    from papermill.engines import papermill_engines

    from interp_kernel.notebook.engine import InterpEngine

    papermill_engines.register("interp", InterpEngine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingIDFieldWarning)  # it gets its ids as it is read
        # The engine writes the output, atomically; papermill would write it once more in place.
        papermill.execute_notebook(nbformat.from_dict(notebook), None, engine_name="interp", **options)


def bar_options() -> dict[str, Any]:
    """tqdm's options: a moving bar on a terminal, now and then a line in a log."""
    return {
        "desc": "Starting",
        "bar_format": "{desc:<40} {bar:20} {n_fmt}/{total_fmt} cells, {elapsed}",
        "mininterval": 0.1 if sys.stderr.isatty() else 10,
    }


def result(output: Path, record: Mapping[str, Any]) -> RunResult:
    """How a run went, by its record."""
    shared = {name: record[name] for name in ("status", "seconds", "failed_cell", "ename", "evalue", "findings")}
    return RunResult(
        output=output, html=output.with_name(record["html"]), traceback=tuple(record["traceback"]), **shared
    )
