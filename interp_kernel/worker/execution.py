"""Runs one call: a cell's text or a shipped function, with the model in reach, and gathers what it returns."""

from __future__ import annotations

import ast
import asyncio
import builtins
import dis
import importlib
import linecache
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import CO_COROUTINE, iscoroutine
from typing import Any

import cloudpickle  # noqa: F401 - results need it, and a call may take all descriptors, so that it can't be read

from interp_kernel.errors import ShipError
from interp_kernel.protocol import PYTHON, Buffer, Head, Reference, Shipment, TooLargeError, dumps, importable, loads
from interp_kernel.worker import modules
from interp_kernel.worker.display import Display
from interp_kernel.worker.events import Call
from interp_kernel.worker.hygiene import Guard
from interp_kernel.worker.interrupts import Interrupter
from interp_kernel.worker.rendering import Numbers, evalue, render
from interp_kernel.worker.values import Values

AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


@dataclass
class Outcome:
    """What running a call left: values by name, what to show, and the error that ended it."""

    values: dict[str, Any] = field(default_factory=dict)
    shown: Any = None
    error: BaseException | None = None
    codes: list[types.CodeType] = field(default_factory=list)
    has_model: bool = True  # whether its code names the model or the tokenizer, or holds values of this worker
    bundle: tuple[dict[str, Any], dict[str, Any]] | None = None


class Runner:
    """Holds the loaded model and runs calls on it, one at a time, in the main thread."""

    def __init__(self, model: Any, tokenizer: Any, values: Values, display: Display, interrupter: Interrupter) -> None:
        """Everything that a call can touch."""
        self.model, self.tokenizer, self.values = model, tokenizer, values
        self.display, self.interrupter = display, interrupter
        # nnsight's model is no nn.Module; the one that it traces is.
        self.guard = Guard(getattr(model, "_module", model), tokenizer)
        self.random = RandomStreams()
        self._resolved = False  # whether the call that runs was given something that lives here
        self._late_notes: list[str] = []
        self.unchecked: set[types.CodeType] = set()  # code that ran since the model was last checked
        self._unchecked_s = 0.0  # the longest of its runs
        self._stays = {id(model): ("model", None), id(tokenizer): ("tokenizer", None)}
        builtins.display = _display  # type: ignore[attr-defined]
        builtins.input = _no_stdin
        sys.breakpointhook = _no_debugger

    def run(self, call: Call, end_output: Callable[[], None]) -> None:
        """Run a call and put its result, or its error, into its log as the last event, after all of its output."""
        started = time.monotonic()
        self._resolved = False
        self.random.switch(call.client)
        outcome = Outcome()
        _, error = self.interrupter.run(call.id, partial(self._execute, call, outcome))
        outcome.error = error
        ran = time.monotonic()
        notes, self._late_notes = self._late_notes, []
        if not (outcome.has_model or self._resolved):
            self.unchecked.update(outcome.codes)
            self._unchecked_s = max(self._unchecked_s, ran - started)
        else:
            notes += self.guard.check(ran - started, outcome.codes)
        head, frames = self._result(call, outcome)
        head["notes"] += notes
        head["stopped"] = self.interrupter.was_reached
        head["times"] = {
            "queue_s": started - call.queued,
            "run_s": ran - started,
            "return_s": time.monotonic() - ran,
        }
        end_output()
        call.log.emit({name: value for name, value in head.items() if value}, frames, last=True)

    def check(self) -> None:
        """Check the model after calls whose code never mentions it; what is found is told with the next call."""
        self._late_notes += self.guard.check(self._unchecked_s, self.unchecked)
        self.unchecked, self._unchecked_s = set(), 0.0

    # ------------------------------------------------------------------------------------------ run

    def _execute(self, call: Call, outcome: Outcome) -> None:
        kind = call.head["kind"]
        if kind != "fetch":  # a value's class may be of the modules that the call before had
            modules.install({m["name"]: modules.ShippedModule.from_wire(m) for m in call.head.get("modules", ())})
        enter_folder(call.head.get("folder"))
        for filename, (text, _) in call.head.get("files", {}).items():
            linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
        inputs: Any = loads(call.frames, self._resolve) if call.frames else None
        if kind == "function" and isinstance(function := inputs[0], types.FunctionType):
            outcome.codes, outcome.has_model = [function.__code__], names_its_model(function.__code__)
        if self.unchecked and (outcome.has_model or self._resolved):
            with self.interrupter.shield():
                self.check()  # so that what an earlier call did is not put down to this one
        if kind == "cell":
            self._run_cell(call.head["cell"], inputs, outcome)
        elif kind == "fetch":
            key = call.head["value"]
            outcome.values["value"] = self._resolve(("value", key) if isinstance(key, int) else (key, None))
        else:
            function, args, kwargs = inputs
            value = function(self.model, self.tokenizer, *args, **kwargs)
            outcome.values["value"] = _run_coroutine(value) if iscoroutine(value) else value
        self.display.flush_figures()
        if outcome.shown is not None:
            outcome.bundle = self.display.format(outcome.shown)

    def _run_cell(self, cell: dict[str, Any], inputs: dict[str, Any], outcome: Outcome) -> None:
        module = types.ModuleType("__main__")
        space = vars(module)
        space.update(model=self.model, tokenizer=self.tokenizer, get_ipython=lambda: self.display.shell)
        space.update(inputs)
        shell = self.display.shell
        before = sys.modules["__main__"], shell.user_module, shell.user_ns
        sys.modules["__main__"] = shell.user_module = module
        shell.user_ns = space  # for `name?` and its like
        try:
            for code, shown in compile_cell(cell):
                outcome.codes.append(code)
                value = eval(code, space)
                if code.co_flags & CO_COROUTINE:
                    value = _run_coroutine(value)
                if shown == "last":
                    outcome.shown = value
                elif shown and value is not None:
                    _display(value)
        finally:
            sys.modules["__main__"], shell.user_module, shell.user_ns = before
            outcome.values = {n: space[n] for n in self._written(cell, space, inputs) if n in space}

    def _written(self, cell: dict[str, Any], space: dict[str, Any], inputs: dict[str, Any]) -> set[str]:
        """Names that the cell assigned and that come back; `*` among its writes is a star import."""
        names = set(cell["writes"])
        if "*" in names:
            own = {"model", "tokenizer", "get_ipython", *inputs}
            names |= {n for n in space if not n.startswith("_") and n not in own}
        return {n for n in names if self._stays.get(id(space.get(n))) != (n, None)}  # `model` is still the worker's

    def _resolve(self, reference: Reference) -> Any:
        kind, key = reference
        self._resolved = True
        if kind == "value":
            return self.values.get(key)
        if kind == "module":
            return importlib.import_module(key)
        if kind == "attribute":
            module, name = key
            return getattr(importlib.import_module(module), name)
        return self.model if kind == "model" else self.tokenizer

    # --------------------------------------------------------------------------------------- return

    def _result(self, call: Call, outcome: Outcome) -> tuple[Head, list[Buffer]]:
        head: Head = {"event": "result", "held": {}, "imports": {}, "notes": []}
        try:
            return head, self._fill(head, call, outcome)
        except BaseException:  # the client will never hear of what is held for it
            self.values.release([info["id"] for info in head["held"].values()])
            raise

    def _fill(self, head: Head, call: Call, outcome: Outcome) -> list[Buffer]:
        error = outcome.error
        if error is None and call.head["kind"] != "cell":
            try:
                return self._return_value(call, outcome.values["value"], head)
            except ShipError as refused:
                error = refused
        frames = self._return_names(call, outcome, head) if call.head["kind"] == "cell" else []
        if error is not None:
            numbers: Numbers = {f: n for f, (_, n) in call.head.get("files", {}).items() if n is not None}
            ename, text = type(error).__name__, evalue(error)
            head["error"] = {"ename": ename, "evalue": text, "traceback": render(error, numbers)}
        return frames

    def _return_value(self, call: Call, value: Any, head: Head) -> list[Buffer]:
        """The value of a function, of any size; held here only if it can't be pickled."""
        if value is self.model or value is self.tokenizer:
            raise ShipError("The worker's model and tokenizer stay on the worker. Return what you need from them.")
        try:
            return self._ship(call, {"value": value}).frames
        except ShipError:
            raise
        except Exception as error:  # noqa: BLE001 - pickling runs the value's own code
            if call.head["kind"] == "fetch":
                text = f"The value can't be pickled ({evalue(error)}), so it can't be fetched. Use it in remote code."
                raise ShipError(text) from None
            self._hold(call, head, "value", value, f"it can't be pickled ({evalue(error)})")
            return []

    def _return_names(self, call: Call, outcome: Outcome, head: Head) -> list[Buffer]:
        """The names that a cell assigned: by value, or held here if kept, too large or not picklable."""
        values = dict(outcome.values)
        if outcome.error is None and outcome.bundle is not None:
            values["_"] = outcome.shown
            data, metadata = outcome.bundle
            head["display"] = {"data": data, "metadata": metadata}
        for name, value in list(values.items()):
            if (place := importable(value)) is not None:
                head["imports"][name] = place
                del values[name]
        for name in call.head.get("keep", ()):
            if name in values:
                self._hold(call, head, name, values.pop(name), None)
        wanted = {name: values.pop(name) for name in call.head.get("want", ()) if name in values}
        shipment = self._ship_together(call, head, values, wanted)
        return shipment.frames if values or wanted else []

    def _ship_together(self, call: Call, head: Head, values: dict[str, Any], wanted: dict[str, Any]) -> Shipment:
        limit = call.head.get("fetch_limit")
        try:
            if not wanted:
                return self._ship(call, values, limit)
        except Exception:  # noqa: BLE001 - one of them is too large or does not pickle; find out which
            pass
        for name, value in list(values.items()):
            try:
                self._ship(call, value, limit)
            except TooLargeError:
                self._hold(call, head, name, values.pop(name), None)
            except Exception as error:  # noqa: BLE001 - pickling runs the value's own code
                self._hold(call, head, name, values.pop(name), f"it can't be pickled ({evalue(error)})")
        for name, value in list(wanted.items()):
            try:
                self._ship(call, value)
            except Exception as error:  # noqa: BLE001 - as above
                self._hold(call, head, name, wanted.pop(name), f"it can't be pickled ({evalue(error)})")
        values.update(wanted)
        return self._ship(call, values)

    def _ship(self, call: Call, value: Any, limit: int | None = None) -> Shipment:
        shipment = dumps(value, self._reduce, limit, lazy=True)
        there = call.head.get("python", PYTHON)
        if shipment.by_value and there != PYTHON:
            ours, theirs = (".".join(map(str, version)) for version in (PYTHON, there))
            raise TypeError(f"it holds bytecode of Python {ours}, and the notebook has {theirs}")
        return shipment

    def _hold(self, call: Call, head: Head, name: str, value: Any, why: str | None) -> None:
        head["held"][name] = self.values.keep(value, call.client)
        if why is not None and name != "_":
            what = "the result" if name == "value" else f"{name!r}"
            head["notes"].append(f"{what} stays on the worker as a RemoteValue: {why}")

    def _reduce(self, value: Any) -> Reference | None:
        return self._stays.get(id(value))


class RandomStreams:
    """Each client draws from its own random streams, which begin in the state right after the load."""

    def __init__(self) -> None:
        """Take the present state as the start of every stream."""
        self._start = self._state()
        self._saved: dict[str, list[tuple[Callable[[Any], Any], Any]]] = {}
        self._client: str | None = None

    def switch(self, client: str) -> None:
        """Make the client's streams the ones that libraries draw from."""
        if client == self._client:
            return
        if self._client is not None:
            self._saved[self._client] = self._state()
        for set_state, state in self._saved.pop(client, self._start):
            set_state(state)
        self._client = client

    def forget(self, client: str) -> None:
        """Drop the streams of a client that is gone."""
        self._saved.pop(client, None)
        if client == self._client:
            self._client = None  # else the next switch would keep them for good

    @staticmethod
    def _state() -> list[tuple[Callable[[Any], Any], Any]]:
        import random

        import numpy as np
        import torch

        states: list[tuple[Callable[[Any], Any], Any]] = [
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
        if torch.cuda.is_available():
            states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        return states


def compile_cell(cell: dict[str, Any]) -> Iterator[tuple[types.CodeType, str]]:
    """Code objects of a cell in order, each with whether its value is shown: `last`, `inline` or not (`""`)."""
    filename, raw = cell["filename"], cell["raw"]
    linecache.cache[filename] = (len(raw), None, raw.splitlines(True), filename)
    tree = ast.parse(cell["source"], filename)
    ast.increment_lineno(tree, cell["line_offset"])
    show = cell["show"]
    if show == "last_expr_or_assign" and tree.body and isinstance(assign := tree.body[-1], ast.Assign):
        target = assign.targets[0]
        if isinstance(target, ast.Name):
            shown_name = ast.copy_location(ast.Name(target.id, ast.Load()), target)
            tree.body.append(ast.copy_location(ast.Expr(shown_name), assign))
    shown = [isinstance(s, ast.Expr) and (show == "all" or (show != "none" and s is tree.body[-1])) for s in tree.body]
    start = 0
    for index, is_shown in enumerate(shown):
        if is_shown:
            if start < index:
                yield _compile(ast.Module(tree.body[start:index], []), filename, "exec"), ""
            expression = tree.body[index]
            assert isinstance(expression, ast.Expr)
            last = index == len(shown) - 1
            yield _compile(ast.Expression(expression.value), filename, "eval"), "last" if last else "inline"
            start = index + 1
    if start < len(tree.body):
        yield _compile(ast.Module(tree.body[start:], []), filename, "exec"), ""


def _compile(tree: ast.Module | ast.Expression, filename: str, mode: str) -> types.CodeType:
    code: types.CodeType = compile(tree, filename, mode, flags=AWAIT, dont_inherit=True)
    return code


@lru_cache(maxsize=1024)
def names_its_model(code: types.CodeType) -> bool:
    """Whether a function's code mentions its first two arguments at all; one that doesn't has no way to the model."""
    given = code.co_varnames[:2]
    return code.co_argcount < 2 or any(step.argval in given for step in dis.get_instructions(code))


def enter_folder(folder: str | None) -> None:
    """Work where the notebook does, if that folder is on this machine, so that relative paths mean the same."""
    try:
        here = os.getcwd()
    except OSError:
        here = ""  # it has been deleted
    if folder is not None and folder != here and os.path.isdir(folder):
        os.chdir(folder)


def _run_coroutine(coroutine: types.CoroutineType[Any, Any, Any]) -> Any:
    """Run it to its end. What it raises has its own frames only, not the event loop's."""
    code = coroutine.cr_code
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(task)
        except BaseException as error:
            tb = error.__traceback__
            if not task.done():  # stopped while it waited: let it clean up, and tell where it was
                task.cancel()
                try:
                    loop.run_until_complete(task)
                except asyncio.CancelledError as cancelled:
                    tb = cancelled.__traceback__
            error.__traceback__ = _from_code(tb, code)
            raise


def _from_code(tb: types.TracebackType | None, code: types.CodeType) -> types.TracebackType | None:
    """The part of a traceback that begins in `code`; all of it if the code is not in it."""
    part = tb
    while part is not None and part.tb_frame.f_code is not code:
        part = part.tb_next
    return part or tb


def _display(*values: Any, **options: Any) -> Any:
    from IPython.display import display

    return display(*values, **options)


def _no_debugger(*_: object, **__: object) -> None:
    raise RuntimeError(
        "breakpoint() was called in a remote cell, which has no stdin. Print or return what you want to see, or run "
        "the function in a local cell."
    )


def _no_stdin(prompt: object = "") -> str:
    raise EOFError(
        f"input({str(prompt)!r}) was called in a remote cell, which has no stdin. Ask in a local cell and read the "
        "variable in the remote one."
    )
