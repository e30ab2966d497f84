"""Makes report.png, the picture of a batch: the study of `notebooks/study.yaml`, run, and its page in Chromium.

python -m docs.report_screenshot
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from interp_kernel.notebook.batch.batch import run_batch
from interp_kernel.notebook.batch.study import read_study

ROOT = Path(__file__).resolve().parent.parent
WIDTH, SCALE = 1160, 2
COLOURS = 128
ROWS = 8  # of the table, so that the picture fits beside text


def main() -> None:
    """Run the study and write the picture beside this file."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("No Chromium was found on the PATH; `apt-get install chromium` provides one.")
    study = read_study(ROOT / "notebooks" / "study.yaml")
    with tempfile.TemporaryDirectory() as folder:
        run_batch(dataclasses.replace(study, output=folder))
        shoot(chromium, Path(folder, "index.html"))


def shoot(chromium: str, page: Path) -> None:
    """Take the page down to the table's first rows, and the figures of those."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 600}, device_scale_factor=SCALE)
        tab.goto(page.as_uri())
        tab.add_style_tag(content=f"#runs tbody tr:nth-child(n+{ROWS + 1}), footer {{ display: none }}")
        shot = tab.screenshot(full_page=True)
        browser.close()
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS)
    picture.save(ROOT / "docs" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
