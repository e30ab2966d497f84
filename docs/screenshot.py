"""Makes lab.png, the README's picture: cells of the quickstart, run in a real JupyterLab in Chromium.

    python -m docs.screenshot

The worker is held still for the moment of the picture, in the middle of the last cell, so that its bar is half full.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import psutil
from PIL import Image
from playwright.sync_api import Page, expect

from tests.conftest import stop_workers
from tests.helpers_lab import Tab, browser_page, lab_server, wait_until, write_notebook

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, SCALE = 1280, 960, 2
SHARE = 0.55  # of the progress bar
COLOURS = 256
# Pieces of the cells that run first, above the picture's edge, and of those in it.
PREPARING = ("model_name = ", "import generate_text", "import analyze_token_probs", "import corpus")
SHOWN = ("%remote start", "import logit_lens", "plot_logit_lens(", "import tqdm")


def main() -> None:
    """Run the cells and write the picture beside this file."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("No Chromium was found on the PATH; `apt-get install chromium` provides one.")
    with tempfile.TemporaryDirectory(prefix="ik") as folder:
        isolate(Path(folder))
        notebooks = Path(folder, "notebooks")
        notebooks.mkdir()
        path = notebooks / "quickstart.ipynb"
        write_notebook(path, quickstart_cells())
        with lab_server(notebooks) as address, browser_page(chromium, WIDTH, HEIGHT, SCALE) as page:
            page.goto(address)
            try:
                take(page, Tab(page, path), Path(folder, "lab.png"))
            finally:
                stop_workers()
        shrink(Path(folder, "lab.png"), Path(__file__).with_name("lab.png"))


def isolate(folder: Path) -> None:
    """Keep the run away from the user's own settings and workers."""
    for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        os.environ[name] = str(folder / name.lower())
    os.environ["INTERP_RUNTIME_DIR"] = str(folder / "run")
    (folder / "run").mkdir(mode=0o700)


def quickstart_cells() -> list[str]:
    """The chosen code cells of the quickstart, each found by a piece of its text."""
    sources = [cell.source for cell in nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4).cells]
    return [next(source for source in sources if mark in source) for mark in (*PREPARING, *SHOWN)]


def take(page: Page, tab: Tab, target: Path) -> None:
    """Run every cell but the last to its end, and photograph that one half-way."""
    page.locator(".lm-TabBar-tab", has_text="Launcher").locator(".lm-TabBar-tabCloseIcon").click()
    page.keyboard.press("Control+b")  # hides the file browser
    last = len(PREPARING) + len(SHOWN) - 1
    for index in range(last):
        tab.run(index)
    found = re.search(r"pid (\d+)", tab.text(len(PREPARING)))
    assert found, tab.text(len(PREPARING))
    worker = psutil.Process(int(found[1]))
    expect(tab.output(last - 1).locator(".js-plotly-plot .main-svg").first).to_be_visible()
    tab.start(last)
    bar = tab.output(last).locator("progress")
    wait_until(lambda: bar.count() and float(bar.get_attribute("value") or 0) > SHARE * 100, "half a bar")
    worker.suspend()
    try:
        tab.cells.nth(len(PREPARING)).evaluate("cell => cell.scrollIntoView({block: 'start'})")
        page.mouse.move(WIDTH / 2, HEIGHT - 60)  # away from the figure's own buttons
        page.screenshot(path=target)
    finally:
        worker.resume()
    tab.wait_for_end(last)


def shrink(source: Path, target: Path) -> None:
    """Store the picture with a palette, at a third of its size."""
    Image.open(source).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
