"""A real JupyterLab server and a real Chromium, used as a person would: click, type, look."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import playwright.sync_api
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

ENDED = re.compile(r"\[\d+\]:")
RUNNING = "[*]:"
WAIT_S = 60.0
POLL_S = 0.02
COMPLETION_MS = 3000
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
QUIET_LAB = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
CELL_METADATA = {"kernelspec": {"name": "interp", "display_name": "Python 3 (interp)", "language": "python"}}


def wait_until(is_reached: Callable[[], Any], what: str) -> Any:
    """The first true answer of a question that is asked again and again."""
    deadline = time.monotonic() + WAIT_S
    while not (answer := is_reached()):
        assert time.monotonic() < deadline, f"Waited {WAIT_S:g} s in vain for {what}."
        time.sleep(POLL_S)
    return answer


def write_notebook(path: Path, sources: list[str]) -> None:
    """A notebook of code cells for the interp kernel."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata=CELL_METADATA)
    nbformat.write(nb, path)


@contextmanager
def lab_server(folder: Path, **environment: str) -> Iterator[str]:
    """A JupyterLab of this environment that serves a folder; the address to open, token included."""
    config = Path(os.environ["JUPYTER_CONFIG_DIR"], "labconfig")
    config.mkdir(parents=True, exist_ok=True)
    (config / "default_setting_overrides.json").write_text(json.dumps(QUIET_LAB))
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    with (folder.parent / "jupyterlab.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield wait_until(lambda: address_of(server), "JupyterLab to listen")
    finally:
        server.terminate()  # which ends its kernels, too
        server.wait(WAIT_S)


def address_of(server: subprocess.Popen[bytes]) -> str | None:
    """The address that a server has written down once it listens."""
    assert server.poll() is None, f"JupyterLab ended with exit code {server.returncode}."
    note = Path(os.environ["JUPYTER_RUNTIME_DIR"], f"jpserver-{server.pid}.json")
    try:
        info = json.loads(note.read_text())
    except (OSError, ValueError):
        return None  # not yet there, or being written
    return f"{info['url']}lab?token={info['token']}"


@contextmanager
def browser_page(chromium: str, width: int = 1400, height: int = 1000, scale: float = 1) -> Iterator[Page]:
    """A page of a new browser."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(WAIT_S * 1000)
        expect.set_options(WAIT_S * 1000)
        try:
            yield page
        finally:
            browser.close()


class Tab:
    """The open notebook of a JupyterLab page."""

    def __init__(self, page: Page, path: Path) -> None:
        """Open it with a double click in the file browser, as its only tab."""
        self.page, self.path = page, path
        page.locator('[data-command="filebrowser:refresh"]').click()
        page.locator(".jp-DirListing-itemText", has_text=path.name).dblclick()
        self.panel = page.locator(".jp-NotebookPanel:visible")
        self.cells = self.panel.locator(".jp-CodeCell")
        self.wait_for_kernel("Idle")

    def close(self) -> None:
        """File > Close and Shut Down Notebook, and yes: also when a cell still runs."""
        self.page.keyboard.press("Control+Shift+q")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        expect(self.panel).to_have_count(0)

    def wait_for_kernel(self, status: str) -> None:
        """Wait for the state in the status bar. Before the first `Idle` there is no kernel, and Lab drops cells."""
        expect(self.page.locator("#jp-bottom-panel")).to_contain_text(f"Python 3 (interp) | {status}")

    # ------------------------------------------------------------------------------------------- cells

    def start(self, index: int) -> None:
        """Click into a cell and run it."""
        self.editor(index).click()
        self.page.keyboard.press("Control+Enter")

    def run(self, index: int) -> str:
        """Run a cell, wait for its end, and return what it shows."""
        self.start(index)
        self.wait_for_end(index)
        return self.text(index)

    def wait_for_end(self, index: int) -> None:
        """Wait until a cell has an execution number."""
        expect(self.prompt(index)).to_have_text(ENDED)

    def prompt(self, index: int) -> Locator:
        """The `[n]:` beside a cell, `[*]:` while it runs."""
        return self.cells.nth(index).locator(".jp-InputArea-prompt")

    def editor(self, index: int) -> Locator:
        """A cell's text."""
        return self.cells.nth(index).locator(".jp-InputArea-editor .cm-content")

    def output(self, index: int) -> Locator:
        """What a cell shows."""
        return self.cells.nth(index).locator(".jp-Cell-outputArea")

    def text(self, index: int) -> str:
        """What a cell shows, as text."""
        return self.output(index).inner_text()

    # ---------------------------------------------------------------------------------------- controls

    def press_stop(self) -> None:
        """Click the stop button, and wait until the server has sent the signal."""
        with self.page.expect_response(lambda answer: answer.url.split("?")[0].endswith("/interrupt")):
            self.panel.locator('[data-command="notebook:interrupt-kernel"]').click()

    def restart_kernel(self) -> None:
        """Kernel > Restart Kernel, and yes."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Kernel").click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Restart Kernel…$")).click()
        with self.page.expect_response(lambda answer: answer.url.split("?")[0].endswith("/restart")):
            self.page.locator(".jp-Dialog button", has_text="Restart").click()
        self.wait_for_kernel("Idle")

    def save(self) -> Any:
        """Save with Ctrl-S; the notebook as it is on the disk then."""
        self.editor(0).click()
        self.page.keyboard.press("Control+s")
        expect(self.page.locator(".lm-TabBar-tab.jp-mod-current.jp-mod-dirty")).to_have_count(0)
        return nbformat.read(self.path, as_version=4)

    def complete(self, index: int) -> Locator:
        """Press Tab at the end of a cell's text, again if nothing shows: Lab drops answers that take over a second.

        Returns:
            The box with the suggestions, which Lab fills by and by.
        """
        box = self.page.locator(".jp-Completer:visible")

        def shows() -> bool:
            self.editor(index).click()
            self.page.keyboard.press("Control+End")
            self.page.keyboard.press("Tab")
            with suppress(playwright.sync_api.TimeoutError):
                box.wait_for(timeout=COMPLETION_MS)
            return box.count() > 0

        wait_until(shows, "suggestions")
        return box


def colours(shown: Locator) -> Counter[tuple[int, int, int]]:
    """How many pixels of each colour an element has on the screen."""
    shown.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(shown.screenshot())).convert("RGB")
    return Counter(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())
