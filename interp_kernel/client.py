"""InterpClient: run functions of (model, tokenizer, ...) on a warm worker from Python, in a notebook or a script."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from interp_kernel.backends import Backend, OnEvent
from interp_kernel.backends.local import LocalBackend
from interp_kernel.backends.modal.options import ModalOptions
from interp_kernel.errors import LoadError, ShipError, SpecError, WorkerRefusedError, remote_error
from interp_kernel.options import check_mode, check_window, rename_older
from interp_kernel.output import Screen
from interp_kernel.protocol import Head, Reference, Shipment
from interp_kernel.session import Failure, Result, Session
from interp_kernel.sources import (
    Module,
    Technique,
    collect_modules,
    convert_technique_to_standalone,
    read_technique,
    read_techniques,
    technique_modules,
)
from interp_kernel.spec import WorkerSpec

__all__ = ["InterpClient", "Job", "convert_technique_to_standalone"]


class InterpClient:
    """A warm worker that holds a model, started on first use and shared by all who ask for the same model."""

    session_type: ClassVar[type[Session]] = Session  # a run of a notebook sets one that writes its calls down

    def __init__(
        self,
        app_name: str = "interp-kernel",
        model_name: str = "demo",
        *,
        mode: str = "local",
        scaledown_window: float = 300.0,
        min_containers: int = 0,
        **options: Any,
    ) -> None:
        """Check the options; nothing starts yet.

        Args:
            app_name: Name of the app where workers run in containers; a local worker has none.
            model_name: `demo`, a name on the Hugging Face hub, or a local folder.
            mode: `local`, a process on this machine, or `modal`, a container there.
            scaledown_window: Seconds without a call after which the worker ends.
            min_containers: 1 keeps the worker for good, until `stop()`.
            **options: How the model is loaded, see WorkerSpec; where, as `gpu`, `image` or `deploy`, see ModalOptions.
                The older names `container_idle_timeout`, `keep_warm` and `torch_dtype` are accepted.

        Raises:
            SpecError: An option is unknown or wrong.
        """
        options = {"scaledown_window": scaledown_window, "min_containers": min_containers, **rename_older(options)}
        options |= {"app_name": app_name}
        self.app_name, self.mode = app_name, check_mode(mode, options)
        self.scaledown_window, self.min_containers = check_window(options)
        for_modal = {name: options.pop(name) for name in ModalOptions.names() if name in options}
        self.spec = WorkerSpec.from_json({"model_name": model_name, **options})
        self.backend = self._make_backend(for_modal)
        self._limit: float | None = for_modal.get("timeout")  # seconds of a call for which no other limit is given
        self.session = self.session_type(self.backend)
        self._techniques: dict[str, Technique] = {}

    def _make_backend(self, for_modal: dict[str, Any]) -> Backend:
        if self.mode == "local":
            return LocalBackend(self.spec, self.scaledown_window, self.min_containers)
        from interp_kernel.backends.modal.backend import ModalBackend

        return ModalBackend(self.spec, ModalOptions(**for_modal))

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in {"model_name": self.spec.model_name, **self.spec.to_json()}.items())
        return f"InterpClient({fields}, mode={self.mode!r})"

    def __enter__(self) -> InterpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_same_worker(self, other: InterpClient) -> bool:
        """Whether calls of both go to one worker."""
        options = [getattr(client.backend, "options", None) for client in (self, other)]
        return self.mode == other.mode and self.spec == other.spec and options[0] == options[1]

    def stays(self) -> str:
        """How long the worker stays, and at Modal on what, in words."""
        if isinstance(options := getattr(self.backend, "options", None), ModalOptions):
            return options.place()
        minutes = f"{self.scaledown_window / 60:.3g} min after the last call"
        return f"stays warm {'until it is stopped' if self.min_containers else minutes}"

    def connect(self, on_event: OnEvent | None = None) -> Head:
        """Start the worker or attach to it, and wait until the model is loaded; returns what `model_info` does."""
        hello = self.session.connect(on_event or Screen(current_shell()).show)
        window = {"scaledown_window": self.scaledown_window, "min_containers": self.min_containers}
        if any(hello[name] != value for name, value in window.items()):
            self.session.ask({"verb": "settings", **window})
            hello.update(window)
        return dict(hello["info"])

    def ensure(self, on_event: OnEvent) -> None:
        """Connect before the first call, which also tells the worker how long it stays."""
        if not self.session.hello:
            self.connect(on_event)

    def run(self, fn: Callable[..., Any] | Technique, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Call `fn(model, tokenizer, *args, **kwargs)` on the worker.

        Args:
            fn: A function, also one defined in the notebook, or a technique read from a file.
            *args: Any values that pickle; tensors, RemoteValues.
            timeout: Seconds, after which the call is stopped.
            **kwargs: As `args`.

        Returns:
            What `fn` returned, of any size; tensors on the CPU in their own dtype. A RemoteValue if it does not pickle.

        Raises:
            RemoteError: `fn` raised; the exception has the real name and can be caught under it if it is a built-in.
            CallTimeoutError, WorkerDiedError, LoadError, ShipError: See `interp_kernel.errors`.
        """
        screen = Screen(current_shell())
        return self._call(*self._pickled(fn, args, kwargs), screen, timeout).value

    def submit(self, fn: Callable[..., Any] | Technique, *args: Any, **kwargs: Any) -> Job:
        """Start a call and return at once; it queues behind calls that were made before it.

        The arguments are taken as they are now.

        Raises:
            ShipError: One of them does not travel.
        """
        shipment, local = self._pickled(fn, args, kwargs)
        shipment.copy()
        return Job(self.session, lambda job: self._call(shipment, local, job, call_id=job.id).value)

    def job(self, call_id: str) -> Job:
        """The job of that id, started by a client that is gone: a killed kernel's, say, whose worker goes on.

        Its `result()` is the function's value, or a cell's variables by name, and raises WorkerError if the worker
        does not know the call.
        """
        return Job(self.session, self._follow, call_id)

    def map(
        self,
        fn: Callable[..., Any] | Technique,
        inputs: Iterable[Any],
        *,
        max_containers: int | None = None,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Yield `fn(model, tokenizer, x, **kwargs)` for each input, in order, each as soon as it is there.

        Nothing runs before the first result is asked for; what came before an error or a stop is not lost.

        Args:
            fn: As in `run`.
            inputs: One value for each call; all of them are read at first if there are several containers.
            max_containers: At Modal, run on up to so many containers beside the warm worker, which keep nothing. An
                input whose container Modal loses is run again, so it may run twice.
            return_exceptions: Yield the exception of an input instead of raising it.
            **kwargs: As in `run`, the same for each input.
        """
        if max_containers is not None and self.mode == "local":
            warnings.warn(
                "max_containers has no effect on a local worker, which runs one call at a time.", stacklevel=2
            )
            max_containers = None
        if max_containers is not None:
            from interp_kernel.mapping import fan_out

            results = fan_out(self, fn, list(inputs), kwargs, max_containers)
        else:
            results = (self._outcome(fn, value, kwargs) for value in inputs)
        for index, result in enumerate(results):
            if isinstance(result, Failure):
                if not return_exceptions:
                    result.error.add_note(f"It was input {index} (counted from 0) of map.")
                    raise result.error
                yield result.error
            else:
                yield result

    def for_each(self, fn: Callable[..., Any] | Technique, inputs: Iterable[Any], **options: Any) -> None:
        """Call `fn` on each input as `map` does, with its options, and drop what it returns."""
        for _ in self.map(fn, inputs, **options):
            pass

    def model_info(self) -> dict[str, Any]:
        """Facts about the loaded model: class, sizes, dtype, device, memory, versions."""
        return self.connect()

    def load_technique_from_file(self, path: str | Path, name: str | None = None) -> Technique:
        """A technique of a file, to be given to `run`. An edited file runs at the next call.

        Raises:
            TechniqueError: The file can't be read or has no such technique; the message lists those that it has.
        """
        technique = read_technique(Path(path), name)
        self._techniques[technique.name] = technique
        return technique

    def load_techniques_from_dir(self, folder: str | Path) -> dict[str, Technique]:
        """All techniques in a folder's files, by name; no file is imported here."""
        found = {technique.name: technique for technique in read_techniques(Path(folder))}
        self._techniques.update(found)
        return found

    convert_technique_to_standalone = staticmethod(convert_technique_to_standalone)

    @property
    def techniques(self) -> Mapping[str, Technique]:
        """The techniques that were loaded so far."""
        return self._techniques

    def interrupt(self) -> bool:
        """Stop the call that the worker runs now, if it is one of this client."""
        running = (self.session.ask({"verb": "hello"}) or {}).get("running") or ""
        return running.startswith(f"{self.session.client}-") and self.session.interrupt(running)

    def stop(self) -> None:
        """End the worker, for all who use it; the model and all remote values are gone."""
        self.session.stop("stopped by its user")
        self.backend.release()

    def close(self) -> None:
        """Leave the worker, which stays warm until its window has passed."""
        self.session.close()

    # ------------------------------------------------------------------------------------ internal

    def _pickled(
        self, fn: Callable[..., Any] | Technique, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Shipment, Mapping[str, Module]]:
        check_function(fn)
        shipped = shippable(fn)
        shipment = self.ship_named((shipped, args, kwargs), lambda: {"fn": shipped, **numbered(args), **kwargs})
        return shipment, modules_of(fn, shipment)

    def _call(
        self,
        shipment: Shipment,
        local: Mapping[str, Module],
        screen: Screen | Job,
        timeout: float | None = None,
        call_id: str | None = None,
    ) -> Result:
        self.ensure(screen.show)
        head: Head = {"kind": "function", "id": call_id or self.session.new_id(), "background": call_id is not None}
        return self.run_call(head, shipment, local, screen.show, timeout)

    def _outcome(self, fn: Callable[..., Any] | Technique, value: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return self.run(fn, value, **kwargs)
        except (KeyboardInterrupt, LoadError, WorkerRefusedError):
            raise  # it is not about this input
        except Exception as error:  # noqa: BLE001 - `map` raises it or yields it
            return Failure(error)

    def _follow(self, job: Job) -> Any:
        self.ensure(job.show)
        result = self.session.follow(job.id, job.show)
        if error := result.head.get("error"):
            raise remote_error(error["ename"], error["evalue"], error["traceback"])
        return result.values.get("value", result.values)

    def ship_named(self, value: Any, names: Callable[[], dict[str, Any]]) -> Shipment:
        """Pickle a value; if that fails, say which of its parts, which `names` gives by name, is to blame."""
        try:
            return self.session.ship(value)
        except Exception as error:  # noqa: BLE001 - pickling runs the value's own code; it is raised again with a name
            for name, part in names().items():
                try:
                    self.session.ship(part)
                except LookupError:
                    raise
                except Exception as reason:  # noqa: BLE001 - as above
                    what = f"{name!r} ({type(part).__name__})"
                    todo = "" if isinstance(reason, ShipError) else ". Make it in the remote code itself"
                    raise ShipError(f"{what} can't be sent to the worker: {reason}{todo}") from None
            raise ShipError(f"The inputs can't be sent to the worker: {error}") from None

    def run_call(
        self,
        head: Head,
        shipment: Shipment,
        local: Mapping[str, Module],
        on_event: OnEvent,
        timeout: float | None = None,
    ) -> Result:
        """Run a prepared call, show its notes, and raise its error with what it returned attached.

        Used by `run` and by the `%%remote` magic; see `Session.run`.
        """
        if timeout is not None and not (type(timeout) in (int, float) and timeout > 0):
            raise SpecError(f"timeout is {timeout!r}; expected a number of seconds above 0.")
        files = head.get("files", {})
        head = {**head, **call_head(shipment, local)}
        head["files"] |= files
        result = self.session.run(head, shipment, on_event, self._limit if timeout is None else timeout)
        for note in result.head.get("notes", ()):
            on_event({"event": "warning", "text": note})
        if error := result.head.get("error"):
            raised = remote_error(error["ename"], error["evalue"], error["traceback"])
            raised.result = result
            raise raised
        return result


class TechniqueReference:
    """Stands for a technique in a pickle: the worker imports it by name."""

    def __init__(self, technique: Technique) -> None:
        self.technique = technique

    def __reduce__(self) -> tuple[Any, ...]:
        from interp_kernel.protocol import load_reference

        reference: Reference = ("attribute", [self.technique.module, self.technique.name])
        return load_reference, reference


def shippable(fn: Any) -> Any:
    """What is pickled for a function: a technique goes by name, beside its source."""
    return TechniqueReference(fn) if isinstance(fn, Technique) else fn


class Job:
    """A call that runs in the background.

    Attributes:
        id: By which another client of the worker finds it, `InterpClient.job`.
        events: What it has shown so far, oldest first.
    """

    def __init__(self, session: Session, work: Callable[[Job], Any], call_id: str | None = None) -> None:
        """Starts `work` in a thread, which reports each event to `show` and calls under the job's id."""
        self.id = call_id or session.new_id()
        self.events: list[Head] = []
        self._session = session
        self._future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(work,), name="interp-job", daemon=True).start()

    def show(self, event: Head) -> None:
        """Take one event."""
        self.events.append(event)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call and return its value, or raise its error; TimeoutError if it is not there in time."""
        return self._future.result(timeout)

    def cancel(self) -> bool:
        """Stop the call, wherever it is; False if it has ended. `result()` then raises KeyboardInterrupt."""
        if self.done():
            return False
        self._session.cancel(self.id)
        return True

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def __repr__(self) -> str:
        if not self.done():
            return "<Job running>"
        return "<Job failed>" if self._future.exception() else "<Job done>"

    def _run(self, work: Callable[[Job], Any]) -> None:
        try:
            self._future.set_result(work(self))
        except BaseException as error:  # noqa: BLE001 - it is raised again by result()
            self._future.set_exception(error)


def check_function(fn: Any) -> None:
    """Refuse what can't be called."""
    if not callable(fn):
        raise ShipError(f"run() was given a {type(fn).__name__}; expected a function of (model, tokenizer, ...).")


def modules_of(fn: Any, shipment: Shipment) -> dict[str, Module]:
    """Local modules that a function needs on the worker."""
    local = technique_modules(fn) if isinstance(fn, Technique) else {}
    if not shipment.modules:
        return local
    return local | collect_modules(shipment.modules, search=[working_folder(os.getcwd())])


def call_head(shipment: Shipment, local: Mapping[str, Module]) -> Head:
    """What a call says beside its inputs: sources that it needs, text of cells for tracebacks, the folder."""
    return {
        "modules": [module.to_wire(with_source=True) for module in local.values()],
        "files": source_files(shipment),
        "folder": os.getcwd(),
    }


def numbered(args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments under the names that an error gives them."""
    return {f"args[{i}]": arg for i, arg in enumerate(args)}


@cache
def working_folder(path: str) -> Path:
    """A folder as a Path; made once, since making one costs more than the rest of a small call's bookkeeping."""
    return Path(path)


def source_files(shipment: Shipment) -> dict[str, tuple[str, int | None]]:
    """Text of the cells whose functions travel along, and their numbers, for the worker's tracebacks."""
    import linecache

    numbers = getattr(getattr(current_shell(), "compile", None), "_filename_map", {})
    return {name: ("".join(linecache.getlines(name)), numbers.get(name)) for name in shipment.files}


def current_shell() -> Any:
    """IPython's shell, if this process is one; it is not imported for the question."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None
