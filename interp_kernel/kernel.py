"""The kernel: IPython's, with the magics registered and questions answered while a remote cell runs.

Everything that users see is in the extension; a subclass is needed only because in a plain kernel the magics are gone
after a restart, and completion waits for the running cell.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.jsonutil import json_clean, json_default

from interp_kernel import completion

ANSWERED = {
    "complete_request",
    "inspect_request",
    "is_complete_request",
    "history_request",
    "comm_info_request",
    "kernel_info_request",
}


class InterpKernel(IPythonKernel):
    """IPython's kernel with `%%remote`; its language is still IPython's, so that front ends highlight it."""

    session: Any
    shell: Any

    implementation = "interp"
    banner = "Python with %%remote cells on a warm worker (%remote help)"

    def __init__(self, **kwargs: Any) -> None:
        """Register the magics by name only, and what completes their lines: they are imported when first used."""
        super().__init__(**kwargs)
        self._waiting: list[dict[str, Any]] = []  # the requests whose cells wait for a worker
        self._waiting_lock = threading.Lock()
        self.session.pack = pack
        os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")  # else each notebook carries 4.8 MB of plotly.js
        self.shell.magics_manager.register_lazy("remote", "interp_kernel")
        completion.install(self.shell)

    @contextmanager
    def answering_meanwhile(self) -> Iterator[None]:
        """While the block runs, the main thread only waits for a worker, so another may answer questions."""
        parent = self.get_parent()
        self._waiting.append(parent)
        try:
            yield
        finally:
            with self._waiting_lock:
                self._waiting.remove(parent)

    async def shell_channel_thread_main(self, msg: Any) -> None:
        """Answer questions at once while the main thread waits; hand on everything else.

        ipykernel calls this in the thread that receives the shell channel.
        """
        if self._waiting and (request := self._peek(msg)) is not None:
            self._answer(*request)
            return
        await super().shell_channel_thread_main(msg)

    def _peek(self, msg: Any) -> tuple[list[bytes], dict[str, Any]] | None:
        """The request in a message, if it can be answered; its signature is not used up, as reading it would."""
        try:
            idents, parts = self.session.feed_identities(msg, copy=False)
            request = self.session.deserialize(parts, content=False, copy=False)
        except (ValueError, IndexError):
            return None  # ipykernel reports what it can't read
        if request["header"]["msg_type"] not in ANSWERED or request["header"].get("subshell_id"):
            return None
        request["content"] = self.session.unpack(request["content"])
        return idents, request

    def _answer(self, idents: list[bytes], request: dict[str, Any]) -> None:
        kind, content = request["header"]["msg_type"], request["content"]
        self._publish_status("busy", "shell", parent=request)
        try:
            answers = {
                "complete_request": lambda: self.do_complete(content["code"], content["cursor_pos"]),
                "inspect_request": lambda: self.do_inspect(
                    content["code"], content["cursor_pos"], content.get("detail_level", 0)
                ),
                "is_complete_request": lambda: self.do_is_complete(content["code"]),
                "history_request": lambda: self.do_history(**content),
                "comm_info_request": lambda: {"status": "ok", "comms": {}},
                "kernel_info_request": lambda: {"status": "ok", **self.kernel_info},
            }
            reply = answers[kind]()
            self.session.send(self.shell_stream, kind.replace("request", "reply"), reply, parent=request, ident=idents)
        finally:
            self._publish_status("idle", "shell", parent=request)
            self._publish_still_busy()

    def _publish_still_busy(self) -> None:
        """Say that a cell runs, after the `idle` of an answer: front ends and servers show the last status of all.

        The lock puts it before the cell's own `idle`, which has to be its last.
        """
        with self._waiting_lock:
            if self._waiting:
                self._publish_status("busy", "shell", parent=self._waiting[-1])


def pack(message: Any) -> bytes:
    """A message's JSON, in which half a character, as `'\\ud800'` is one, becomes `?`.

    jupyter_client raises there, in the thread that sends all output: this one is lost, and at times all that follows.
    """
    try:
        text = json.dumps(message, default=json_default, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(json_clean(message), default=json_default, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace")


def main() -> None:
    """Run the kernel, as Jupyter does."""
    IPKernelApp.launch_instance(kernel_class=InterpKernel)


if __name__ == "__main__":
    main()
