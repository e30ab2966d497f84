"""Cells sent to a real worker, and what came back of each."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from interp_kernel.backends.local import LocalBackend, LocalLink
from interp_kernel.cell import parse_cell
from interp_kernel.errors import InterpError
from interp_kernel.protocol import Head, Packed
from interp_kernel.session import Result, Session
from interp_kernel.spec import WorkerSpec

Connect = Callable[..., Session]
DEMO = "demo"


@dataclass
class Answer:
    """One call: the events before its result, and the result."""

    events: list[Head] = field(default_factory=list)
    result: Result | None = None
    on_event: Callable[[Head], None] = lambda _: None

    @property
    def head(self) -> Head:
        assert self.result is not None
        return self.result.head

    @property
    def error(self) -> str | None:
        error = self.head.get("error")
        return error and f"{error['ename']}: {error['evalue']}"

    @property
    def traceback(self) -> str:
        return "\n".join(self.head["error"]["traceback"])

    @property
    def notes(self) -> str:
        return "\n".join(self.head.get("notes", []))

    @property
    def warnings(self) -> str:
        return "\n".join(e["text"] for e in self.events if e["event"] in ("warning", "queued"))

    @property
    def stdout(self) -> str:
        return self.text("stdout")

    def text(self, name: str) -> str:
        return "".join(e["text"] for e in self.events if e["event"] == "stream" and e["name"] == name)

    def __getitem__(self, name: str) -> Any:
        """What the cell assigned to a name; of a cell that failed, its error."""
        assert self.result is not None
        assert self.error is None, self.error + self.traceback
        return self.result.values[name]


def run_cell(
    session: Session,
    body: str,
    *,
    at: Mapping[str, Callable[[], object]] | None = None,
    timeout: float | None = None,
    answer: Answer | None = None,
    head: Head | None = None,
    **inputs: Any,
) -> Answer:
    """Run a cell's text.

    Args:
        session: Where.
        body: The cell.
        at: What to do here once the cell has printed a text, which is how to act in mid-call at a known point.
        timeout: See `Session.run`.
        answer: Takes the events, for a call that raises.
        head: More of the call's settings.
        **inputs: The cell's variables.
    """
    answer = Answer() if answer is None else answer
    waiting = dict(at or {})

    def on_event(event: Head) -> None:
        answer.events.append(event)
        answer.on_event(event)
        seen = answer.stdout + answer.warnings if waiting else ""
        for text in [text for text in waiting if text in seen]:
            waiting.pop(text)()

    if not session.hello:
        session.connect()
    cell = parse_cell(body, raw=body, filename="<a cell>", execution_count=1, transform=str)
    call = {
        "kind": "cell",
        "cell": {
            "source": cell.source,
            "raw": cell.raw,
            "filename": cell.filename,
            "line_offset": cell.line_offset,
            "writes": cell.writes,
            "show": "last_expr",
        },
        "fetch_limit": 10_000_000,
        **(head or {}),
    }
    answer.result = session.run(call, session.ship(inputs), on_event, timeout)
    return answer


def wait_until(is_so: Callable[[], object], within_s: float = 60.0) -> None:
    """Look until something is so that happens in another process."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"it did not happen within {within_s:g} s"
        time.sleep(0.01)


def press_stop() -> None:
    """What Jupyter's stop button does to the kernel's process."""
    signal.raise_signal(signal.SIGINT)


class RecordingBackend(LocalBackend):
    """Keeps what was sent, and can cut every connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.links: list[LocalLink] = []
        self.sent: list[Packed] = []

    def attach(self, client: str, within_s: float | None = None) -> LocalLink | None:
        link = super().attach(client, within_s)
        if link is not None:
            send = link.send

            def record(packed: Packed, wake_fd: int | None = None) -> None:
                self.sent.append(packed)
                send(packed, wake_fd)

            link.send = record  # type: ignore[method-assign]
            self.links.append(link)
        return link

    def cut(self) -> None:
        """Lose every connection, as a network would."""
        while self.links:
            with suppress(OSError):  # it was closed before
                self.links.pop()._channel.sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def sessions() -> Iterator[Connect]:
    """Opens clients of the shared demo worker, or of another one, and closes them at the end."""
    opened: list[Session] = []

    def connect(spec: WorkerSpec | None = None, **options: Any) -> Session:
        session = Session(RecordingBackend(spec or WorkerSpec(model_name=DEMO), **options))
        opened.append(session)
        session.connect()
        return session

    yield connect
    for session in opened:
        session.close()


def backend_of(session: Session) -> RecordingBackend:
    assert isinstance(session.backend, RecordingBackend)
    return session.backend


def outcome(call: Callable[[], Answer]) -> str:
    """The error that a call raised here, or returned, or its output."""
    try:
        answer = call()
    except (InterpError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return answer.error or answer.stdout
