"""What a call shows: rich values, figures, display updates and progress bars, as events instead of text."""

from __future__ import annotations

import base64
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Emit = Callable[[dict[str, Any]], None]

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
PROGRESS_INTERVAL_S = 0.2
ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PLOTLY_RENDERER": "plotly_mimetype",  # else the first figure carries 4.8 MB of plotly.js
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns when a cell forks
}


class Display:
    """Formats values as a notebook would and publishes what `display()` is given."""

    def __init__(self, emit: Emit) -> None:
        """Start an IPython shell for its formatters; `emit` takes each event."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.shell = _make_shell(emit)
        _install_progress_bars(emit)

    def format(self, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """MIME bundle and metadata of a value; empty if the value has displayed itself."""
        data, metadata = self.shell.display_formatter.format(value)
        return _plain_bundle(data), metadata

    def flush_figures(self) -> None:
        """Show the matplotlib figures that the call left open, as a notebook does at the end of a cell."""
        if "matplotlib_inline.backend_inline" in sys.modules:
            self.shell.events.trigger("post_execute")


def _plain_bundle(data: dict[str, Any]) -> dict[str, Any]:
    """Bytes as base64; no widget views, whose models live on the worker where no front end finds them."""
    return {
        mime: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for mime, value in data.items()
        if mime != WIDGET_MIME
    }


def _make_shell(emit: Emit) -> Any:
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Publisher(DisplayPublisher):
        def publish(  # type: ignore[override]
            self, data: dict[str, Any], metadata: Any = None, *, transient: Any = None, update: bool = False, **_: Any
        ) -> None:
            bundle = _plain_bundle(data)
            head = {"event": "display", "data": bundle, "metadata": metadata or {}, "transient": transient or {}}
            if bundle:
                emit({**head, "update": update})

        def clear_output(self, wait: bool = False) -> None:
            emit({"event": "clear_output", "wait": wait})

    class Shell(InteractiveShell):
        def enable_gui(self, gui: Any = None) -> None:
            """No event loop of a window system runs on a worker."""

        def init_io(self) -> None:
            """The worker's streams are its own."""

        def init_sys_modules(self) -> None:
            """`__main__` stays the worker's, so that what a cell defines is pickled by value."""

    config = Config()
    config.HistoryManager.enabled = False
    shell = Shell.instance(display_pub_class=Publisher, config=config)
    formatter: Any = shell.display_formatter
    formatter.active_types = list(formatter.format_types)
    return shell


def _install_progress_bars(emit: Emit) -> None:
    """Make every tqdm of this process send its state, which each front end then draws as it can."""
    import tqdm
    import tqdm.asyncio
    import tqdm.auto
    import tqdm.std

    class Bar(tqdm.std.tqdm):  # type: ignore[misc]
        """A progress bar that is data: position, total, rate and whether it has ended."""

        count = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            Bar.count += 1
            self.bar_id = f"bar-{os.getpid()}-{Bar.count}"
            kwargs["mininterval"] = max(PROGRESS_INTERVAL_S, kwargs.get("mininterval", 0.0))
            kwargs["gui"] = False
            self.sent_s = 0.0
            super().__init__(*args, **kwargs)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            now = time.monotonic()
            if now - self.sent_s >= PROGRESS_INTERVAL_S:
                self.sent_s = now
                self.send(done=False)
            return True

        def clear(self, nolock: bool = False) -> None:
            """Nothing was drawn here."""

        def close(self) -> None:
            if getattr(self, "disable", True):
                return
            self.disable = True
            self._decr_instances(self)
            self.send(done=True)

        def send(self, *, done: bool) -> None:
            state = self.format_dict
            emit(
                {
                    "event": "progress",
                    "id": self.bar_id,
                    "text": (self.desc or "").removesuffix(": "),
                    "n": state["n"],
                    "total": state["total"],
                    "unit": state["unit"],
                    "elapsed_s": round(state["elapsed"], 3),
                    "done": done,
                    "leave": bool(self.leave) or not done,
                }
            )

    def trange(*args: Any, **kwargs: Any) -> Any:
        return Bar(range(*args), **kwargs)

    for name, own in (("tqdm", Bar), ("trange", trange)):
        own.__module__, own.__name__, own.__qualname__ = "tqdm.std", name, name  # so that they pickle by name
        for module in (tqdm, tqdm.std, tqdm.auto, tqdm.asyncio):
            setattr(module, name, own)
    sys.modules.setdefault("tqdm.autonotebook", tqdm.auto)
    sys.modules["tqdm.notebook"] = tqdm.auto
