"""Runs a notebook's cells for papermill and records truthfully how each of them ended.

papermill's own engine marks cells completed that never ran when the kernel dies or a cell times out, inserts marker
cells that shift every index, and writes the whole file twice per cell. Here the record is:

    status of the run   completed | failed | timeout | dead-kernel | interrupted   in metadata.papermill.interp
    status of a cell    completed | failed (at most one, the last that ran) | pending
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import papermill.execute
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_notebook, new_output
from papermill.clientwrap import PapermillNotebookClient
from papermill.exceptions import PapermillExecutionError

from interp_kernel.client import InterpClient
from interp_kernel.kernelspec import NAME, kernelspec_folder
from interp_kernel.magics import json_or_text, settings_from
from interp_kernel.notebook.called import CALLS_MODULE, CALLS_VARIABLE
from interp_kernel.notebook.provenance import REMOTE, Ledger, OnCell, facts_of
from interp_kernel.notebook.record import Failure, Record, join_streams, model_options

OUTPUTS_MODULE = "interp_kernel.notebook.outputs"
POLL_S = 0.1
GRACE_S = 10.0
"""How long a cell may take to end after it was interrupted, before its kernel is killed."""
COMPLETED: weakref.WeakValueDictionary[int, NotebookNode] = weakref.WeakValueDictionary()


class RunInterruptedError(KeyboardInterrupt):
    """A signal stopped the run; the notebook has been saved.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"The run was stopped by {signal.Signals(signum).name}.")
        self.signum = signum


class CellStoppedError(Exception):
    """The runner itself ended a cell: it ran too long, or a signal came."""

    def __init__(self, status: str, ename: str, evalue: str) -> None:
        super().__init__(evalue)
        self.status, self.ename, self.evalue = status, ename, evalue


def execute(
    nb: NotebookNode,
    kernel_name: str,
    *,
    output_path: str | None = None,
    progress_bar: bool | dict[str, Any] = True,
    log_output: bool = False,
    autosave_cell_every: float = 30,
    execution_timeout: float | None = None,
    start_timeout: int = 60,
    stdout_file: Any = None,
    stderr_file: Any = None,
    model: str | None = None,
    kernel_cwd: str | None = None,
    paths: tuple[str, str] | None = None,
    ledger: Ledger | None = None,
    on_cell: OnCell | None = None,
    **client_options: Any,
) -> NotebookNode:
    """Run every cell of `nb`, in place.

    Args:
        nb: Notebook as papermill has prepared it: parameters injected, metadata.papermill present.
        kernel_name: Name of the kernelspec; `interp` is found even where it is not installed.
        output_path: Where the notebook is saved while it runs; None saves it at the end alone.
        progress_bar: True, False or options of tqdm.
        log_output: Whether outputs also go to papermill's log.
        autosave_cell_every: 0 turns saving in mid-run off. Other values mean nothing: saving is bounded by its cost.
        execution_timeout: Seconds that each cell may take.
        start_timeout: Seconds that the kernel may take to start.
        stdout_file: File that also gets what cells print.
        stderr_file: The same for stderr.
        model: Model for the notebook's remote cells, over the notebook's own `metadata.interp`: a name, or a JSON
            object of InterpClient's options.
        kernel_cwd: Working directory of the kernel; by default this process's.
        paths: Those of the notebook and of its output, where papermill wasn't told; then an empty notebook is returned.
        ledger: What is known of the run so far; its record grows there.
        on_cell: Called as each cell begins, with its index and the number of cells.
        client_options: Traits of nbclient's NotebookClient.

    Raises:
        PapermillExecutionError: A cell raised, ran too long, or lost its kernel.
        RunInterruptedError: SIGINT or SIGTERM stopped the run.
    """
    given_path = client_options.pop("input_path", None)
    source_path, output_path = paths or (given_path, output_path)
    final_path = output_path or nb.metadata.papermill.get("output_path")
    nb.metadata.papermill.update(input_path=source_path, output_path=final_path)
    if isinstance(nb.metadata.get("interp"), dict):
        nb.metadata["interp"] = model_options(nb)  # else it would hold the record of an earlier run until this one ends
    ledger = ledger or ledger_of(nb, model)
    record = Record(nb, output_path, log_output, progress_bar, autosave_cell_every, ledger=ledger, on_cell=on_cell)
    client = Client(
        record,
        km=AsyncKernelManager(kernel_name=kernel_name, kernel_spec_manager=SpecManager(), transport_encryption="auto"),
        kernel_name=kernel_name,
        startup_timeout=start_timeout,
        log_output=log_output,
        stdout_file=stdout_file,
        stderr_file=stderr_file,
        cell_timeout_s=execution_timeout,
        **{"iopub_timeout": 60, **client_options},
    )
    environment = kernel_environment(nb, model) | {CALLS_VARIABLE: str(ledger.calls.path)}
    record.notebook_start()
    with client.signals_caught():
        failure = run_sync(client.run_cells)(env=environment, cwd=kernel_cwd or os.getcwd())
    record.finish(failure, final_path)
    if failure is not None:
        raise_failure(nb, failure, client.signals)
    if paths is not None:
        # papermill, which was told no file, would encode all of it once more for none.
        empty: NotebookNode = new_notebook()
        return empty
    leave_judging_to_this_engine(nb)
    return nb


def ledger_of(nb: NotebookNode, model: str | None) -> Ledger:
    """A ledger for a run that papermill itself was asked for."""
    facts = nb.metadata.papermill
    path, output = Path(facts.get("input_path") or "notebook"), facts.get("output_path")
    options = settings_from(json_or_text(model), "--model") if model else None
    parameters = dict(facts.get("parameters") or {})
    folders = [Path.cwd(), path.resolve().parent]
    source = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else nb
    place = Path(output) if output else None
    return Ledger(facts_of(path, source, parameters, place, model=options, folders=folders), source)


def raise_failure(nb: NotebookNode, failure: Failure, signals: list[int]) -> None:
    """End papermill's run with the exception that fits; its exit code is then 1, as the record says."""
    if failure.status == "interrupted":
        raise RunInterruptedError(signals[0])
    cell = nb.cells[failure.index] if failure.index is not None else {}
    raise PapermillExecutionError(
        cell_index=failure.index,
        exec_count=cell.get("execution_count"),
        source=cell.get("source", ""),
        ename=failure.ename,
        evalue=failure.evalue,
        traceback=list(failure.traceback) or [f"{failure.ename}: {failure.evalue}"],
    )


def leave_judging_to_this_engine(nb: NotebookNode) -> None:
    """Keep papermill from failing a completed run because a cell tagged `raises-exception` raised, as it should.

    papermill looks at the outputs once more after every engine and has no way to be told; other runs keep its verdict.
    """
    COMPLETED[id(nb)] = nb
    judge = papermill.execute.raise_for_execution_errors
    if hasattr(judge, "knows_completed"):
        return

    def judge_others(found: NotebookNode, output_path: str | None) -> None:
        if COMPLETED.pop(id(found), None) is not found:
            judge(found, output_path)

    judge_others.knows_completed = True  # type: ignore[attr-defined]
    papermill.execute.raise_for_execution_errors = judge_others


def kernel_environment(nb: NotebookNode, model: str | None) -> dict[str, str]:
    """Environment of the kernel: this process's, with the model that its remote cells use by default.

    Raises:
        SpecError: An option of the model is wrong.
    """
    env = dict(os.environ)
    # plotly's own choice stores 4.8 MB of JavaScript with the first figure of a notebook.
    env.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    # It drops what a cell shows after its end, so jobs in the background must end with their cell.
    env["INTERP_BATCH"] = "1"
    choice = model_options(nb) if model is None else json_or_text(model)
    if choice:
        options = settings_from(choice, "metadata.interp" if model is None else "--model")
        InterpClient(**options).close()
        env["INTERP_MODEL"] = json.dumps(options)
    return env


class SpecManager(KernelSpecManager):
    """Finds the kernel `interp` also where its kernelspec was never installed, as in a plain checkout."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The installed kernelspec; for `interp` else the one of this package."""
        try:
            return super().get_kernel_spec(kernel_name)
        except NoSuchKernel:
            if kernel_name != NAME:
                raise
            return KernelSpec.from_resource_dir(str(kernelspec_folder()))


class Client(PapermillNotebookClient):  # type: ignore[misc]
    """nbclient's client, whose cells can be stopped by time or signal and always end in a known state."""

    def __init__(self, record: Record, *, cell_timeout_s: float | None, **options: Any) -> None:
        super().__init__(record, **options)
        self.cell_timeout_s = cell_timeout_s
        self.signals: list[int] = []

    @contextmanager
    def signals_caught(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of dying of them; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(signum, self.note_signal) for signum in caught]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)  # a batch blocks them up to here
        try:
            yield
        finally:
            for signum, handler in zip(caught, before, strict=True):
                signal.signal(signum, handler)

    def note_signal(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal; the loop looks every POLL_S."""
        self.signals.append(signum)

    async def run_cells(self, **start: Any) -> Failure | None:
        """Start the kernel, run the cells, end the kernel; returns what went wrong, if anything did."""
        self.reset_execution_trackers()
        index = None
        try:
            await self.guarded(self.start(**start), None, "before its first cell")
            for index, cell in enumerate(self.nb.cells):
                self.raise_if_signalled("before this cell")
                await self.run_cell(cell, index)
            self.set_widgets_metadata()
        except (CellExecutionError, CellStoppedError, DeadKernelError, CellTimeoutError) as error:
            return await self.failure(error, index)
        finally:
            if self.km is not None and self.km.has_kernel:
                await self._async_cleanup_kernel()
        return None

    async def start(self, **start: Any) -> None:
        """Start the kernel and learn its language.

        Raises:
            DeadKernelError: It did not come up.
        """
        spec = self.km.kernel_spec
        if spec is not None and any(name in " ".join(spec.argv) for name in ("ipykernel", "interp_kernel")):
            # Runs in parallel would contend for the one history file, and a run is nobody's history.
            self.extra_arguments = ["--HistoryManager.hist_file=:memory:"]
            if self.km.format_kernel_cmd()[0] == sys.executable:  # another Python may lack this package
                self.extra_arguments += ["--ext", OUTPUTS_MODULE]
                if any(REMOTE.search(cell.source) for cell in self.nb.cells if cell.cell_type == "code"):
                    self.extra_arguments += ["--ext", CALLS_MODULE]
        try:
            await self.async_start_new_kernel(**start)
            await self.async_start_new_kernel_client()
        except RuntimeError as error:
            raise DeadKernelError(f"The kernel {self.kernel_name!r} did not start: {error}.") from error
        reply = await self.async_wait_for_reply(self.kc.kernel_info())
        if reply is not None:
            self.nb.metadata["language_info"] = reply["content"]["language_info"]

    async def run_cell(self, cell: NotebookNode, index: int) -> None:
        """Run one cell, whose status is right afterwards, whatever happens."""
        self.nb_man.cell_start(cell, index)
        try:
            await self.guarded(self.async_execute_cell(cell, index), self.cell_timeout_s)
        except BaseException:
            self.nb_man.cell_exception(cell, cell_index=index)
            raise
        finally:
            if cell.cell_type == "code":
                cell.outputs = join_streams(cell.outputs)
            self.nb_man.cell_complete(cell, cell_index=index)

    async def guarded(
        self, work: Coroutine[Any, Any, Any], timeout_s: float | None, where: str = "in this cell"
    ) -> None:
        """Await `work`, saving the notebook meanwhile; stop it on a signal or after `timeout_s`.

        Raises:
            CellStoppedError: It was stopped, whether or not its code then ended by itself.
        """
        others = asyncio.all_tasks()
        task = asyncio.ensure_future(work)
        start = time.monotonic()
        try:
            while not (await asyncio.wait({task}, timeout=POLL_S))[0]:
                self.nb_man.save()
                if self.signals or (timeout_s and time.monotonic() - start > timeout_s):
                    await self.stop(task)
                    self.raise_if_signalled(where)
                    raise CellStoppedError(
                        "timeout",
                        "CellTimeoutError",
                        f"The cell ran longer than its {timeout_s:g} s and was stopped. Give it more time with "
                        "--timeout, or less to do.",
                    )
            await task
        finally:
            leftovers = asyncio.all_tasks() - others
            for leftover in leftovers:
                leftover.cancel()
            await asyncio.gather(*leftovers, return_exceptions=True)

    async def stop(self, task: asyncio.Future[Any]) -> None:
        """Interrupt the kernel once; kill it if that changes nothing, or at a second signal.

        A second interrupt, which Jupyter's own shutdown would send too, tells a remote cell to kill its worker. A
        worker whose kernel has died stops the call and keeps its model.
        """
        if not self.km.has_kernel:
            return
        signals, deadline = len(self.signals), time.monotonic() + GRACE_S
        await self.km.interrupt_kernel()
        while time.monotonic() < deadline and len(self.signals) == signals:
            if (await asyncio.wait({task}, timeout=POLL_S))[0]:
                task.exception()  # its own KeyboardInterrupt stands in the outputs; the caller says why
                return
        await self.km.provisioner.kill()

    def raise_if_signalled(self, where: str) -> None:
        """Raise CellStoppedError if a signal came; `where` it found the run, in words."""
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            raise CellStoppedError("interrupted", "KeyboardInterrupt", f"{name} stopped the run {where}.")

    async def failure(self, error: Exception, index: int | None) -> Failure:
        """Describe the error and make sure that the cell it hit shows it."""
        found = await self.describe(error, index)
        cell = self.nb.cells[index] if index is not None else None
        if cell is not None and cell.metadata.papermill["status"] == "failed":
            seen = [(output.get("ename"), output.get("evalue")) for output in cell.outputs]
            if (found.ename, found.evalue) not in seen:
                text = f"{found.ename}: {found.evalue}"
                cell.outputs.append(new_output("error", ename=found.ename, evalue=found.evalue, traceback=[text]))
            return found
        return Failure(found.status, None, found.ename, found.evalue, found.traceback)

    async def describe(self, error: Exception, index: int | None) -> Failure:
        """The error as status, name, message and traceback."""
        if isinstance(error, CellStoppedError):
            return Failure(error.status, index, error.ename, error.evalue)
        if isinstance(error, CellExecutionError):
            outputs = self.nb.cells[index].outputs
            shown = [line for output in outputs if output.output_type == "error" for line in output.traceback]
            return Failure("failed", index, error.ename, error.evalue, tuple(shown))
        if isinstance(error, DeadKernelError) and index is not None:
            how = await self.kernel_exit()
            message = f"The kernel {how} in this cell; every later cell is pending. Run the notebook again."
            return Failure("dead-kernel", index, "DeadKernelError", message)
        status = "dead-kernel" if isinstance(error, DeadKernelError) else "timeout"
        return Failure(status, index, type(error).__name__, str(error))

    async def kernel_exit(self) -> str:
        """How the kernel's process ended, in words."""
        code = await self.km.provisioner.poll() if self.km is not None and self.km.provisioner is not None else None
        if code is None:
            return "died"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
