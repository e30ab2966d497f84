"""`%%remote`, which runs a cell's body on a warm worker, and `%remote`, which looks after the workers."""

from __future__ import annotations

import argparse
import json
import linecache
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand, output_can_be_silenced

from interp_kernel import completion, handles
from interp_kernel.cell import Cell, parse_cell
from interp_kernel.client import InterpClient, Job
from interp_kernel.errors import RemoteError, SpecError, remote_error
from interp_kernel.lines import (
    USAGE,
    MagicError,
    cell_parser,
    check_words,
    help_text,
    split_line,
    start_help,
    start_parser,
)
from interp_kernel.lines import json_or_text as json_or_text
from interp_kernel.output import Screen
from interp_kernel.protocol import Head, Shipment
from interp_kernel.session import RemoteValue, Result
from interp_kernel.sources import collect_modules, read_techniques

FETCH_LIMIT = 10_000_000  # bytes; what is larger stays on the worker
NEVER_READ = {"model", "tokenizer"}
SETTINGS_VARIABLE = "INTERP_MODEL"
BATCH_VARIABLE = "INTERP_BATCH"  # set by our papermill engine, which drops what a cell shows after its end


@magics_class
class RemoteMagics(Magics):
    """The two magics of one notebook and the workers that it uses."""

    shell: Any  # IPython's; kernels' shells have methods that its own class lacks

    def __init__(self, shell: Any) -> None:
        """Nothing starts before the first remote cell."""
        super().__init__(shell)
        self.workers: dict[str, InterpClient] = {}
        self.current: str | None = None
        self.jobs: list[Job] = []
        completion.install(shell, self)
        handles.install(shell)

    # ---------------------------------------------------------------------------------------- cells

    @no_var_expand
    @output_can_be_silenced
    @cell_magic("remote")  # type: ignore[arg-type]
    def remote_cell(self, line: str, body: str) -> Job | None:
        """Run the cell's body on the worker with `model` and `tokenizer`; `%remote help` tells the options."""
        words = split_line(line)
        if "--help" in words:
            self._do_help([])
            return None
        options = cell_parser().read(words)
        cell = self._parse(line, body)
        client = self.client(options.worker)
        if not options.background or os.environ.get(BATCH_VARIABLE):
            screen = Screen(self.shell, quiet=options.quiet)
            with self._side_channel():
                self._run(client, cell, options, self._ship(client, cell, options), screen)
            return None
        return self._start_job(client, cell, options)

    def _parse(self, line: str, body: str) -> Cell:
        shell = self.shell
        parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
        raw = (parent or {}).get("content", {}).get("code") or f"%%remote {line}\n{body}"
        count = (
            getattr(getattr(shell.displayhook, "exec_result", None), "execution_count", None) or shell.execution_count
        )
        filename = f"<remote-cell-{os.getpid()}-{count}-{hash(raw) & 0xFFFFFF:06x}>"
        linecache.cache[filename] = (len(raw), None, raw.splitlines(True), filename)
        shell.compile._filename_map[filename] = count
        try:
            cell = parse_cell(
                body,
                raw=raw,
                filename=filename,
                execution_count=count,
                transform=shell.transform_cell,
                defined=shell.user_ns,
            )
        except SyntaxError as error:
            lines = shell.SyntaxTB.structured_traceback(type(error), error, [])
            raise remote_error("SyntaxError", f"{error.msg} (line {error.lineno})", lines) from None
        linecache.cache[filename] = (len(cell.raw), None, cell.raw.splitlines(True), filename)
        return cell

    def _run(
        self,
        client: InterpClient,
        cell: Cell,
        options: argparse.Namespace,
        shipment: Shipment,
        screen: Screen,
        job_id: str | None = None,
    ) -> Result:
        """Send a cell, wait for it, and take over what it assigned, also if it failed half-way."""
        client.ensure(screen.show)
        local = collect_modules([*cell.imports, *shipment.modules], search=self._module_folders())
        self._warn_of_mutations(cell, screen)
        head: Head = {
            "kind": "cell",
            "id": job_id or client.session.new_id(),
            "background": job_id is not None,
            "cell": {
                "source": cell.source,
                "raw": cell.raw,
                "filename": cell.filename,
                "line_offset": cell.line_offset,
                "writes": cell.writes,
                "show": "none" if cell.silenced or options.quiet else self.shell.ast_node_interactivity,
            },
            "files": {cell.filename: (cell.raw, cell.execution_count)},
            "want": options.outputs,
            "keep": options.keep,
            "fetch_limit": FETCH_LIMIT,
        }
        try:
            result = client.run_call(head, shipment, local, screen.show, options.timeout)
        except RemoteError as error:
            if error.result is not None:
                self._assign(error.result)
                error.result = None
            raise
        self._assign(result)
        named, last = self.shell.user_ns.get(cell.shown_name), result.values.get("_")
        if type(named) is type(last) is RemoteValue:
            result.values["_"] = named  # one handle, not a second one that keeps the value when the name has gone
        for name in (*options.outputs, *options.keep):
            if name not in result.values:
                screen.warn(f"{name!r} was asked for, but the cell did not assign it")
        self._display(result, screen)
        return result

    def _ship(self, client: InterpClient, cell: Cell, options: argparse.Namespace) -> Shipment:
        inputs = self._inputs(cell, options.inputs)
        return client.ship_named(inputs, lambda: inputs)

    def _inputs(self, cell: Cell, more: Iterable[str]) -> dict[str, Any]:
        space, hidden = self.shell.user_ns, self.shell.user_ns_hidden
        for name in more:
            if name not in space:
                raise MagicError(f"%%remote -i {name}: the notebook has no variable {name!r}. Assign it locally first.")
        named = [n for n in cell.reads if n in space and n not in NEVER_READ]
        reads = [n for n in named if handles.KEPT_BY_IPYTHON.fullmatch(n) or not same(space, hidden, n)]
        return {name: space[name] for name in (*reads, *more)}

    def _assign(self, result: Result) -> None:
        self.shell.user_ns.update({name: value for name, value in result.values.items() if name != "_"})

    def _display(self, result: Result, screen: Screen) -> None:
        """Show the last expression as IPython would, with the worker's own rendering and the value as `Out[n]`.

        A background cell shows it only: `_` and `Out` belong to the cell that runs in front.
        """
        bundle = result.head.get("display")
        if bundle is None or not bundle["data"]:
            return
        if isinstance(screen, JobScreen):
            screen.publish(bundle["data"], bundle["metadata"], {}, False)
            return
        hook = self.shell.displayhook
        hook.start_displayhook()
        hook.write_output_prompt()
        hook.write_format_data(bundle["data"], bundle["metadata"])
        hook.update_user_ns(result.values.get("_"))
        hook.fill_exec_result(result.values.get("_"))
        hook.finish_displayhook()

    def _warn_of_mutations(self, cell: Cell, screen: Screen) -> None:
        space = self.shell.user_ns
        for name, line in cell.mutations:
            if name in space and name not in NEVER_READ and not isinstance(space[name], RemoteValue | ModuleType):
                screen.warn(
                    f"line {line} changes {name!r} in place on the worker's copy, which does not come back; "
                    f"assign it ({name} = ...) to bring it back"
                )
                break

    def _module_folders(self) -> list[Path]:
        folders = [Path.cwd()]
        if (path := notebook_path(self.shell)) is not None and path.parent not in folders:
            folders.append(path.parent)
        return folders

    def _start_job(self, client: InterpClient, cell: Cell, options: argparse.Namespace) -> Job:
        """Run a cell in a thread whose output goes to the cell that it belongs to, on its inputs as they are now."""
        shell = self.shell
        shipment = self._ship(client, cell, options)
        shipment.copy()
        parent = shell.get_parent() if hasattr(shell, "get_parent") else {}

        def work(job: Job) -> Any:
            tokens = shell.set_thread_parent(parent) if hasattr(shell, "set_thread_parent") else None
            screen = JobScreen(job, Screen(shell, quiet=options.quiet))
            try:
                return self._run(client, cell, options, shipment, screen, job.id).values.get("_")
            except BaseException as error:
                shell.showtraceback((type(error), error, None))
                raise
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if tokens is not None:
                    shell.reset_thread_parent(tokens)

        job = Job(client.session, work)
        self.jobs = [j for j in self.jobs if not j.done()] + [job]
        return job

    def _side_channel(self) -> AbstractContextManager[None]:
        """Context in which our kernel answers completions although its main thread waits."""
        kernel: Any = getattr(self.shell, "kernel", None)
        if not hasattr(kernel, "answering_meanwhile"):
            return nullcontext()
        context: AbstractContextManager[None] = kernel.answering_meanwhile()
        return context

    # -------------------------------------------------------------------------------------- workers

    def client(self, name: str | None = None) -> InterpClient:
        """The worker of a name, or the one in use; the first is the notebook's default, made here."""
        name = name or self.current
        if name is None:
            options = default_settings(self.shell)
            name = str(options.get("model_name", "demo"))
            self.workers[name] = self._make_client(options)
            self.current = name
        if name not in self.workers:
            known = ", ".join(self.workers) or "none yet"
            raise MagicError(f"No worker is called {name!r}; this notebook has: {known}. Start it with %remote start.")
        return self.workers[name]

    def _make_client(self, options: dict[str, Any]) -> InterpClient:
        """A client, whose warnings are lines of the cell: Python's own would quote this file."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client = InterpClient(**options)
        for warning in caught:
            Screen(self.shell).warn(str(warning.message))
        return client

    @line_magic("remote")  # type: ignore[arg-type]
    def remote_line(self, line: str) -> None:
        """`%remote start|use|status|interrupt|restart|stop|logs|techniques|help`."""
        words = split_line(line) or ["help"]
        verb, rest = words[0], words[1:]
        if verb == "--help" or ("--help" in rest and verb != "start"):
            verb, rest = "help", []
        check_words(verb, rest)
        getattr(self, f"_do_{verb}")(rest)

    def _do_start(self, words: list[str]) -> None:
        """Start a worker, or attach to it, and use it from now on."""
        if "--help" in words:
            print(start_help())
            return
        options = vars(start_parser().read(words))
        hold = options.pop("hold", False)
        fallback = default_settings(self.shell) if "model_name" not in options else {}
        options = {**fallback, **options}
        name = options.pop("name", None) or str(options.get("model_name", "demo"))
        if options.get("image") in self.shell.user_ns:
            options["image"] = self.shell.user_ns[options["image"]]
        client = self._make_client(options)
        known = self.workers.get(name)
        if known is not None and known.is_same_worker(client):
            client.session = known.session  # its handles stay good
        self.workers[name], self.current = client, name  # also if it fails: no cell may run on another model instead
        info = client.connect(Screen(self.shell).show)
        if hold:
            client.session.ask({"verb": "hold"})
        print(describe_worker(name, client, info))

    def _do_use(self, words: list[str]) -> None:
        """Make another worker of this notebook the one that cells run on."""
        self.client(words[0])
        self.current = words[0]

    def _do_status(self, words: list[str]) -> None:
        """Say what each worker of this notebook does."""
        if not self.workers:
            print("No worker yet; the first %%remote cell starts one.")
        for name, client in self.workers.items():
            print(("* " if name == self.current else "  ") + describe_status(name, client))

    def _do_interrupt(self, words: list[str]) -> None:
        """Stop what runs in the background."""
        stopped = sum(job.cancel() for job in self.jobs if not job.done())
        print(f"{stopped} background call{'s' * (stopped != 1)} stopped.")

    def _do_restart(self, words: list[str]) -> None:
        """Load the model anew; remote values are lost."""
        client = self.client(words[0] if words else None)
        lost = client.session.stop("restarted by %remote restart")
        info = client.connect(Screen(self.shell).show)
        print(describe_worker(words[0] if words else self.current or "", client, info) + lost)

    def _do_stop(self, words: list[str]) -> None:
        """End the worker, for all who use it."""
        client = self.client(words[0] if words else None)
        lost = client.session.stop()
        client.backend.release()
        print(f"The worker has ended; the next remote cell starts a new one.{lost}")

    def _do_logs(self, words: list[str]) -> None:
        """Show the end of the worker's own log."""
        print(self.client(words[0] if words else None).backend.log_tail(10_000) or "The log is empty.")

    def _do_techniques(self, words: list[str]) -> None:
        """List the techniques: those of the package, or of a folder."""
        from interp_kernel.catalogue import listing, package_techniques

        found = read_techniques(Path(words[0])) if words else package_techniques()
        print(listing(found) or f"{words[0]} holds no technique, a function of (model, tokenizer, ...).")

    def _do_help(self, words: list[str]) -> None:
        """Say what the magics can do."""
        print(help_text((verb, getattr(self, f"_do_{verb}").__doc__) for verb in sorted(USAGE)))


class JobScreen(Screen):
    """Shows a background call's events and keeps them with its job."""

    def __init__(self, job: Job, screen: Screen) -> None:
        super().__init__(screen.shell, quiet=screen.quiet)
        self._job = job

    def show(self, event: Head) -> None:
        """Show one event."""
        self._job.show(event)
        super().show(event)


# ------------------------------------------------------------------------------------------------ texts


def same(space: dict[str, Any], hidden: dict[str, Any], name: str) -> bool:
    """Whether a name still has the value that IPython gave it."""
    return name in hidden and hidden[name] is space[name]


def describe_worker(name: str, client: InterpClient, info: Head) -> str:
    """One line on a worker that is ready."""
    size = f"{info['n_params'] / 1e6:,.1f} M parameters, " if "n_params" in info else ""
    place = f"{', '.join(info.get('dtypes', ()))} on {', '.join(info.get('devices', ()))}"
    return f"Worker {name!r} is ready: {size}{place}, {whereabouts(client.session.hello)}; {client.stays()}."


def whereabouts(hello: Head) -> str:
    """Where a worker runs: its container, or its process on this machine."""
    return f"Modal container {hello['place']}" if "place" in hello else f"pid {hello['pid']}"


def describe_status(name: str, client: InterpClient) -> str:
    """One line on what a worker does."""
    hello = client.session.ask({"verb": "hello"})
    if hello is None:
        before = client.session.hello
        why = client.backend.why_ended(before["pid"]) if before else None
        if before and why is None:
            return f"{name}: does not answer now, as inside one long operation"
        return f"{name}: not running" + (f" ({why})" if why else "")
    counts = f"{hello['clients']} connected, {hello['queued']} queued"
    text = f"{name}: {hello['state']}, {whereabouts(hello)}, {counts}"
    return "; ".join([text, *hello["damage"]])


# ------------------------------------------------------------------------------------------- defaults


def default_settings(shell: Any) -> dict[str, Any]:
    """Which model a notebook's first remote cell uses.

    The environment variable INTERP_MODEL decides, a name or a JSON object of options; else the notebook's own
    metadata (`interp`: the same); else the demo model.
    """
    if text := os.environ.get(SETTINGS_VARIABLE):
        return settings_from(json_or_text(text), SETTINGS_VARIABLE)
    path = notebook_path(shell)
    if path is not None and path.is_file():
        try:
            given = json.loads(path.read_text(encoding="utf-8")).get("metadata", {}).get("interp")
        except (OSError, ValueError):
            given = None  # it is being written, or is no notebook
        if given:
            options = settings_from(given, f"metadata of {path.name}")
            options.pop("run", None)  # the record that a run of the notebook left
            return options
    return {}


def settings_from(given: Any, where: str) -> dict[str, Any]:
    """Options of InterpClient from a model's name or an object; `model` is a short form of `model_name`."""
    if isinstance(given, str):
        return {"model_name": given}
    if not isinstance(given, dict):
        raise SpecError(f"{where} names the model by {given!r}; expected a name or an object of options.")
    options = dict(given)
    if "model" in options:
        options["model_name"] = options.pop("model")
    return options


def notebook_path(shell: Any) -> Path | None:
    """The notebook's file, where the server (Jupyter) or the editor (VS Code) tells it."""
    given = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    return Path(given) if given and str(given).endswith(".ipynb") else None
