"""Inside a kernel that our engine runs: writes down each call to a worker, one JSON line in the file $INTERP_CALLS.

{"worker": {...}}   before the first call to each worker: who it is and what it holds
{"sources": {...}}  local modules that a call took along, path to SHA-256, when they are new
{"call": {...}}     how long a call waited, ran and travelled, and how large it was
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from interp_kernel.backends import Link, Message, OnEvent
from interp_kernel.client import InterpClient
from interp_kernel.notebook.called import CALLS_VARIABLE
from interp_kernel.notebook.provenance import file_hash
from interp_kernel.protocol import Head, Packed, Shipment, frames_size
from interp_kernel.session import Result, Session

TIMES = ("load_s", "queue_s", "run_s", "return_s", "transfer_s")
INFO = ("model_name", "revision", "commit", "class", "n_params", "dtypes", "devices", "load_s", "versions")


def load_ipython_extension(shell: Any) -> None:
    """Have InterpClient make sessions that write their calls down; without the variable nothing changes."""
    if os.environ.get(CALLS_VARIABLE):
        InterpClient.session_type = RecordedSession


class CountedLink:
    """A link that counts the bytes of the values that pass it, and is else the link that it was made of."""

    def __init__(self, link: Link, passed: dict[str, int]) -> None:
        """Adds what passes to `passed`."""
        self._link, self._passed = link, passed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def send(self, packed: Packed, wake_fd: int | None = None) -> None:
        """See `Link.send`; a value that the worker is known to have is not counted."""
        self._passed["sent_bytes"] += frames_size(packed.head, packed.inline)
        self._link.send(packed, wake_fd)

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> Message | None:
        """See `Link.receive`."""
        message = self._link.receive(timeout_s, wake_fd)
        if message is not None:
            self._passed["received_bytes"] += frames_size(message[0], message[1])
        return message


class RecordedSession(Session):
    """A session that writes down each call."""

    def __init__(self, *arguments: Any) -> None:
        """As a session."""
        super().__init__(*arguments)
        self._load_s, self._was_cold, self._told = 0.0, False, ""
        self._sent: dict[str, str] = {}
        self._passed = {"sent_bytes": 0, "received_bytes": 0}

    def connect(self, on_event: OnEvent = lambda _: None) -> Head:
        """See `Session.connect`; the time that it takes is part of the next call's load."""
        start, loads = time.monotonic(), self.loads
        try:
            return super().connect(on_event)
        finally:
            self._load_s += time.monotonic() - start
            self._was_cold |= self.loads > loads

    def _link(self, on_event: OnEvent, stops: Any) -> Any:
        link = super()._link(on_event, stops)
        return link if isinstance(link, CountedLink) else CountedLink(link, self._passed)

    def run(
        self,
        head: Head,
        shipment: Shipment,
        on_event: OnEvent = lambda _: None,
        timeout: float | None = None,
    ) -> Result:
        """See `Session.run`."""
        self._write_sources(head)
        start, loads, before = time.monotonic(), self.loads, dict(self._passed)
        result, ename = None, None
        try:
            result = super().run(head, shipment, on_event, timeout)
            ename = (result.head.get("error") or {}).get("ename")
            return result
        except BaseException as error:
            ename = type(error).__name__
            raise
        finally:
            is_cold = self.loads > loads  # it was started anew for this call
            load_s = self.hello.get("info", {}).get("load_s", 0.0) if is_cold else 0.0
            times = dict(result.head.get("times", {})) if result is not None else {}
            if times:
                times["transfer_s"] = max(0.0, time.monotonic() - start - sum(times.values()) - load_s)
            times["load_s"] = load_s + self._load_s
            moved = {name: count - before[name] for name, count in self._passed.items()}
            self._write_call({"kind": head["kind"], "is_cold": is_cold or self._was_cold, "ename": ename}, times, moved)
            self._load_s, self._was_cold = 0.0, False

    def _write_sources(self, head: Head) -> None:
        given = {m["path"]: m["digest"] for m in head.get("modules", ())}
        new = [path for path, digest in given.items() if self._sent.get(path) != digest and Path(path).is_file()]
        self._sent |= given
        if new:  # a technique of the older style travels converted; what counts is what its file holds
            write({"sources": {path: file_hash(Path(path)) for path in new}})

    def _write_call(self, facts: Head, times: Head, moved: Head) -> None:
        if self.hello and self._told != self.generation:
            self._told = self.generation or ""
            write({"worker": self._worker()})
        rounded = {name: round(times.get(name, 0.0), 6) for name in TIMES}
        write({"call": {**facts, "worker": self.generation, **rounded, **moved}})

    def _worker(self) -> Head:
        hello, info = self.hello, self.hello.get("info", {})
        options = getattr(self.backend, "options", None)
        where = {"backend": "local" if options is None else "modal", "gpu": getattr(options, "gpu", None)}
        return {**{name: hello.get(name) for name in ("generation", "pid", "host", "python")}, **where} | {
            name: info.get(name) for name in INFO
        }


def write(line: Head) -> None:
    """Append a line; a full disk must not fail the cell."""
    try:
        with open(os.environ[CALLS_VARIABLE], "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
    except OSError:
        pass
