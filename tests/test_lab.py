"""JupyterLab in Chromium, driven as a person would: what shows, when it shows, stops, deaths, restarts, figures."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.helpers_lab import RUNNING, Tab, browser_page, colours, lab_server, wait_until, write_notebook

pytestmark = pytest.mark.browser

PID = "%%remote\nimport os\nprint('worker', os.getpid())"
STOP_S = 2.0
GREEN = (10, 200, 60)
BLUE = (20, 40, 220)

Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, chromium: str) -> Iterator[Page]:
    with lab_server(folder) as address, browser_page(chromium) as page:
        page.goto(address)
        yield page


@pytest.fixture
def notebook(page: Page, folder: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a notebook of the given cells in JupyterLab; its tab is closed after the test."""
    tabs = []

    def opened(*sources: str) -> Tab:
        path = folder / f"{request.node.name}.ipynb"
        write_notebook(path, list(sources))
        tabs.append(Tab(page, path))
        return tabs[0]

    yield opened
    for tab in tabs:
        tab.close()


def until(path: Path) -> str:
    """Code that waits for a file, so that a test decides when a cell goes on."""
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)"


def worker_pid(text: str) -> int:
    """The number that the PID cell has printed."""
    found = re.search(r"worker (\d+)", text)
    assert found, text
    return int(found[1])


# --------------------------------------------------------------------------------------------- what shows


def test_prints_appear_while_the_cell_runs(notebook: Open, tmp_path: Path) -> None:
    steps = [tmp_path / f"step{n}" for n in range(3)]
    body = "\n".join(f"print('step {n} of 3')\n{until(step)}" for n, step in enumerate(steps))
    tab = notebook(f"%%remote\n{body}\nprint('end')")
    tab.start(0)
    for n, step in enumerate(steps):
        expect(tab.output(0)).to_contain_text(f"step {n} of 3")
        assert f"step {n + 1} of 3" not in tab.text(0)
        expect(tab.prompt(0)).to_have_text(RUNNING)
        step.touch()
    tab.wait_for_end(0)
    lines = [line for line in tab.text(0).splitlines() if line.startswith(("step", "end"))]
    assert lines == ["step 0 of 3", "step 1 of 3", "step 2 of 3", "end"]


def test_a_progress_bar_is_one_output_that_fills(notebook: Open, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    tab = notebook(
        "%%remote\nimport os, time\nfrom tqdm.auto import tqdm\n"
        "for n in tqdm(range(300), desc='layers'):\n"
        f"    while n == 250 and not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "    time.sleep(0.002)"
    )
    tab.start(0)
    bar = tab.output(0).locator("progress")
    wait_until(lambda: bar.count() and 0 < float(bar.get_attribute("value") or 0) < 300, "a bar that is on its way")
    expect(tab.prompt(0)).to_have_text(RUNNING)
    gate.touch()
    tab.wait_for_end(0)
    expect(bar).to_have_attribute("value", "300")
    expect(tab.output(0)).to_contain_text(re.compile(r"layers.*100%.*300/300 it"))
    assert bar.count() == 1
    stored = [output.get("data", {}).get("text/html", "") for output in tab.save().cells[0].outputs]
    assert ['value="300"' in html for html in stored if "<progress" in html] == [True]


def test_an_error_has_its_own_name_and_line(notebook: Open) -> None:
    tab = notebook(
        "def invert(x):\n    y = x - 1\n    return 1 / y",
        "%%remote\n\nkept = 5\nvalues = [invert(3)]\nvalues.append(invert(1))",
        "kept",
    )
    tab.run(0)
    shown = tab.run(1)
    assert "ZeroDivisionError: division by zero" in shown
    assert re.search(r"Cell In\[2\], line 5\b", shown), shown
    assert re.search(r"Cell In\[1\], line 3\b", shown), shown
    assert re.search(r"-+> 5 values\.append\(invert\(1\)\)", shown), shown
    assert "interp_kernel/" not in shown
    assert tab.run(2).split() == ["[3]:", "5"]


def test_figures_show_are_saved_and_show_in_the_report(notebook: Open, page: Page) -> None:
    from interp_kernel.notebook.report import write_html

    tab = notebook(
        "%%remote\nimport matplotlib.pyplot as plt\n"
        f"plt.figure(facecolor='#{bytes(GREEN).hex()}', figsize=(3, 2)).gca().plot([1, 2]);",
        "import plotly.graph_objects as go\n"
        f"go.Figure(go.Bar(x=['a', 'b'], y=[2, 3], marker_color='#{bytes(BLUE).hex()}'), "
        "layout={'title': 'two bars', 'width': 500, 'height': 300, 'template': 'plotly_white'})",
        "%%remote\nimport plotly.graph_objects as go\n"
        f"go.Figure(go.Bar(x=['a', 'b'], y=[2, 3], marker_color='#{bytes(GREEN).hex()}'), "
        "layout={'title': 'from the worker', 'width': 500, 'height': 300, 'template': 'plotly_white'})",
    )
    for index in range(3):
        tab.run(index)
    expect(tab.output(0).locator("img")).to_have_count(1)
    assert colours(tab.output(0).locator("img"))[GREEN] > 10_000
    for index, title, colour in ((1, "two bars", BLUE), (2, "from the worker", GREEN)):
        figure = tab.output(index).locator(".js-plotly-plot")
        expect(figure.locator(".gtitle")).to_have_text(title)
        assert colours(figure)[colour] > 10_000

    saved = tab.save()
    nbformat.validate(saved)
    assert [cell.execution_count for cell in saved.cells] == [1, 2, 3]
    kinds = [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in saved.cells]
    assert "image/png" in kinds[0]
    assert all("application/vnd.plotly.v1+json" in kind for kind in kinds[1:])
    assert tab.path.stat().st_size < 200_000

    assert page.context.browser is not None
    report = page.context.browser.new_page()
    report.goto(write_html(tab.path).as_uri())
    for index, (title, colour) in enumerate((("two bars", BLUE), ("from the worker", GREEN))):
        figure = report.locator(".js-plotly-plot").nth(index)
        expect(figure.locator(".gtitle")).to_have_text(title)
        assert colours(figure)[colour] > 10_000
    assert colours(report.locator("img").first)[GREEN] > 10_000
    expect(report.locator(".jp-CodeCell").first.locator(".highlight .kn", has_text="import")).to_have_count(1)
    assert report.locator("script[src]").count() == 0
    report.close()


def test_the_body_is_highlighted_as_python(notebook: Open) -> None:
    body = 'def double(x: int) -> str:\n    return f"{2 * x}"  # twice\n\nfor n in range(3): print(double(n))'
    tab = notebook(body, f"%%remote --quiet\n{body}")
    parts = "lines => lines.map(l => [...l.querySelectorAll('span')].map(s => [s.textContent, s.className]))"
    plain, remote = (tab.editor(i).locator(".cm-line").evaluate_all(parts) for i in (0, 1))
    assert remote[1:] == plain
    looks = dict(map(tuple, plain[0] + plain[1]))
    assert looks["def"] == looks["return"] != looks["double"]
    assert any("# twice" in text for text in looks)


# ------------------------------------------------------------------------------------------------- stops


def test_stop_ends_the_cell_and_keeps_the_model(notebook: Open) -> None:
    loop = "%%remote\nimport time\nn = 0\nprint('on')\nwhile True:\n    n += 1\n    time.sleep(0.01)"
    tab = notebook(PID, loop, PID, "n > 0")
    before = worker_pid(tab.run(0))
    tab.start(1)
    expect(tab.output(1)).to_contain_text("on")
    pressed = time.monotonic()
    tab.press_stop()
    tab.wait_for_end(1)
    assert time.monotonic() - pressed < STOP_S
    expect(tab.output(1)).to_contain_text("KeyboardInterrupt")
    assert worker_pid(tab.run(2)) == before
    assert "True" in tab.run(3)


def test_a_second_stop_kills_a_worker_that_does_not_react(notebook: Open) -> None:
    imports = "from collections import deque\nfrom itertools import repeat"
    hang = f"%%remote\n{imports}\nprint('on', flush=True)\ndeque(repeat(0), maxlen=0)"
    tab = notebook(PID, hang, PID)
    before = worker_pid(tab.run(0))
    tab.start(1)
    expect(tab.output(1)).to_contain_text("on")
    tab.press_stop()
    expect(tab.prompt(1)).to_have_text(RUNNING)
    tab.press_stop()
    tab.wait_for_end(1)
    expect(tab.output(1)).to_contain_text("the worker was killed by the second stop; the next call starts a new one")
    assert not psutil.pid_exists(before)
    shown = tab.run(2)
    assert worker_pid(shown) != before
    assert "loaded in" in shown


def test_a_worker_killed_in_mid_cell_is_an_error_and_the_next_cell_recovers(notebook: Open) -> None:
    tab = notebook(PID, "%%remote --keep big\nimport time\nbig = 1\nprint('on')\ntime.sleep(600)", PID)
    before = worker_pid(tab.run(0))
    tab.start(1)
    expect(tab.output(1)).to_contain_text("on")
    os.kill(before, signal.SIGKILL)
    tab.wait_for_end(1)
    expect(tab.output(1)).to_contain_text("WorkerDiedError: The worker died during this call")
    expect(tab.output(1)).to_contain_text("SIGKILL")
    assert worker_pid(tab.run(2)) != before


# ------------------------------------------------------------------------------------------ while it runs


def test_tab_completes_the_model_also_while_a_cell_runs(notebook: Open, page: Page, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    tab = notebook(f"%%remote\nprint('on')\n{until(gate)}", "%%remote\nx = 1\nmodel.", PID)
    tab.run(2)
    for state in ("idle", "busy"):
        if state == "busy":
            tab.start(0)
            expect(tab.output(0)).to_contain_text("on")
        box = tab.complete(1)
        for name in ("generate", "get_input_embeddings", "transformer"):
            expect(box.locator(f'[data-value="model.{name}"]')).to_have_count(1)
        page.keyboard.press("Escape")
    expect(tab.prompt(0)).to_have_text(RUNNING)
    gate.touch()
    tab.wait_for_end(0)


def test_shift_tab_documents_the_model_and_the_kernel_stays_busy_while_a_cell_runs(
    notebook: Open, page: Page, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    tab = notebook(f"%%remote\nprint('on')\n{until(gate)}", "%%remote\nmodel.generate(", PID)
    tab.run(2)
    for state in ("Idle", "Busy"):
        if state == "Busy":
            tab.start(0)
            expect(tab.output(0)).to_contain_text("on")
        tab.editor(1).click()
        page.keyboard.press("Control+End")
        page.keyboard.press("Shift+Tab")
        expect(page.locator(".jp-Tooltip")).to_contain_text("Signature: model.generate(")
        page.keyboard.press("Escape")
        expect(page.locator(".jp-Tooltip")).to_have_count(0)
        tab.wait_for_kernel(state)
    expect(tab.prompt(0)).to_have_text(RUNNING)
    gate.touch()
    tab.wait_for_end(0)
    tab.wait_for_kernel("Idle")


def test_tab_completes_the_verbs_with_nothing_of_ipythons(notebook: Open) -> None:
    tab = notebook("%remote st")
    box = tab.complete(0)
    expect(box.locator(".jp-Completer-item")).to_have_count(3)
    for verb in ("start", "status", "stop"):
        expect(box.locator(f'[data-value="{verb}"]')).to_have_count(1)
    tab.page.keyboard.press("Enter")
    expect(tab.editor(0)).to_have_text("%remote start")


def test_background_output_stays_in_its_own_cell(notebook: Open, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    tab = notebook(
        f"%%remote --background\nprint('early')\n{until(gate)}\nprint('late')",
        "print('front')\n_ is not None",
        "print('front again')",
    )
    tab.run(0)
    expect(tab.output(0)).to_contain_text("early")
    tab.run(1)
    assert "late" not in tab.text(0)
    gate.touch()
    expect(tab.output(0)).to_contain_text("late")
    assert tab.run(2).strip() == "front again"
    assert not re.search("early|late", tab.text(1))


def test_a_restarted_kernel_finds_its_worker_again(notebook: Open) -> None:
    kernel = "import os\nprint('kernel', os.getpid())"
    tab = notebook(kernel, PID, kernel, PID)
    first, before = tab.run(0), worker_pid(tab.run(1))
    tab.restart_kernel()
    assert tab.run(2) != first
    shown = tab.run(3)
    assert worker_pid(shown) == before
    assert "loaded in" not in shown
