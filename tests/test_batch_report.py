"""The page of a batch and its summary for agents: of a real batch, of a thousand records, of a half-finished folder."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from interp_kernel.notebook.batch.batch import run_batch
from interp_kernel.notebook.batch.charts import draw_metric
from interp_kernel.notebook.batch.report import write_report
from interp_kernel.notebook.batch.study import Study
from interp_kernel.notebook.batch.thumbnails import HEIGHT, WIDTH, thumbnails
from interp_kernel.notebook.files import append
from interp_kernel.notebook.report import PLOTLY

FIGURE = """
from IPython.display import display
display({'application/vnd.plotly.v1+json': {'data': [{'type': 'bar', 'y': [layer, 1]}], 'layout': {}}}, raw=True)
"""
CELLS = [
    ("parameters", "layer, word = 0, 'a'"),
    ("figure", FIGURE),
    ("check", "assert not (layer == 1 and word == 'b<c'), f'no {word} | here\\nat all'"),
    ("record", "from interp_kernel import record\nrecord('effect', layer * 1.5 + (word == 'a'))\nrecord('top', word)"),
    ("say", "record('said', word * 60)"),
]


def soup(text: str) -> Any:
    return BeautifulSoup(text, "html.parser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a batch of four runs, one of which fails."""
    source = tmp_path_factory.mktemp("study") / "grid.ipynb"
    cells = [new_code_cell(text, id=name) for name, text in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), source)
    output = source.parent / "out"
    grid: dict[str, tuple[Any, ...]] = {"layer": (0, 1), "word": ("a", "b<c")}
    outcome = run_batch(Study(notebooks=(str(source),), name="small & quick", grid=grid, output=str(output), jobs=2))
    assert (outcome.completed, outcome.failed, outcome.report) == (3, 1, str(output / "index.html"))
    return output


@pytest.fixture(scope="module")
def page(folder: Path) -> Any:
    return soup((folder / "index.html").read_text())


def rows(page: Any) -> list[list[str]]:
    return [[cell.get_text(strip=True) for cell in row("td")] for row in page.select("#runs tbody tr")]


def test_failures_come_first_with_reason_cell_and_link(folder: Path, page: Any) -> None:
    assert [heading.get_text() for heading in page("h2")] == ["What did not complete", "Metrics", "Runs", "Figures"]
    (failure,) = page.select(".failure")
    text = failure.get_text(" ", strip=True)
    assert "1 x AssertionError a cell raised in cell 2 check" in text
    assert failure.select_one(".reason").get_text() == "no b<c | here\nat all"
    assert "assert not (layer == 1" in failure.select_one("pre").get_text()
    (link,) = failure.select("li a")
    assert link.get_text() == "layer 1, word b<c"
    target, _, anchor = link["href"].partition("#")
    executed = soup((folder / unquote(target)).read_text())
    assert "AssertionError" in executed.find(id=anchor).get_text()


def test_table_has_what_varied_and_what_was_recorded(page: Any) -> None:
    heads = [head.find("button").get_text() for head in page.select("#runs th") if head.find("button")]
    assert heads == ["status", "layer", "word", "effect", "top", "said", "seconds"]
    found = [row[:5] for row in rows(page)]
    assert found[0] == ["completed", "0", "a", "1", "a"]
    assert found[1] == ["completed", "0", "b<c", "0", "b<c"]
    assert found[3] == ["failed", "1", "b<c", "-", "-"]
    assert page.select_one(".tally").get_text(" ", strip=True) == "3 completed 1 failed"


def test_every_link_leads_to_a_file(folder: Path, page: Any) -> None:
    targets = {unquote(link["href"].partition("#")[0]) for link in page("a")}
    assert len(targets) == 4 * 2 + 2
    assert all((folder / target).exists() for target in targets)


def test_charts_show_the_metric_across_the_grid(page: Any) -> None:
    (chart,) = page.select(".charts figure")  # `top` is a text, which no axis holds
    assert chart.select_one("b").get_text() == "effect"
    texts = {text.get_text() for text in chart.select("svg text")}
    assert {"layer", "word", "a", "b<c"} <= texts


def test_agents_get_the_same_in_a_few_kilobytes(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert text.startswith("# small & quick\n\nOf 4 runs: 3 completed, 1 failed. ")
    assert "## 1 x AssertionError: a cell raised in cell 2 (check)\n\nno b<c | here\nat all\n" in text
    assert "| completed | 1 | a | 2.5 | a |" in text
    assert "| failed | 1 | b<c | - | - |" in text
    assert f"To go on: interp-kernel batch {folder}/study.yaml --resume" in text


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.browser
def test_page_loads_nothing_sorts_and_fits_a_phone_and_paper(browser: Any, folder: Path) -> None:
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    asked: list[str] = []
    problems: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto((folder / "index.html").as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [(folder / "index.html").as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == 400
    assert tab.evaluate("document.querySelector('.charts svg').getBoundingClientRect().width") > 300

    def column(index: int) -> list[str]:
        return [text.strip() for text in tab.locator(f"#runs tbody td:nth-child({index})").all_inner_texts()]

    effect = tab.locator("#runs th button", has_text="effect")
    effect.click()
    assert column(4) == ["0", "1", "2.5", "-"]
    effect.click()
    assert column(4) == ["-", "2.5", "1", "0"]
    tab.locator("#runs th button", has_text="word").click()
    assert column(3) == ["a"] * 2 + ["b<c"] * 2
    assert problems == []
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 690, "height": 1000})  # A4 between its margins
    assert tab.evaluate("document.documentElement.scrollWidth") <= 690, "a long text makes the table wider than paper"
    assert len(tab.pdf(format="A4")) > 10_000
    tab.close()


# --------------------------------------------------------------------------------------------- other folders


def record(index: int, **more: Any) -> dict[str, Any]:
    """A record as the runner writes it, of a run of no notebook."""
    parameters = {"layer": index % 20, "prompt": f"The landmark number {index // 40} is in", "seed": index // 20 % 2}
    base = {"schema": 1, "key": f"{index:012x}", "attempt": 1, "batch": "many", "notebook": "grid.ipynb", "repeat": 0}
    files = {"output": f"run-{index}.ipynb", "html": f"run-{index}.html"}
    times = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:30:00+00:00", "seconds": 2.0}
    results = {"status": "completed", "metrics": {"effect": index / 1000, "loss": "NaN"}, "workers": []}
    return base | files | times | results | {"parameters": parameters} | more


def figures(*values: go.Figure) -> Any:
    outputs = [new_output("display_data", data={PLOTLY: json.loads(figure.to_json())}) for figure in values]
    return new_notebook(cells=[new_code_cell("x", id="plot", outputs=outputs)])


def test_a_thousand_runs_take_seconds_and_few_megabytes(tmp_path: Path) -> None:
    curve, heat = go.Figure(go.Scatter(y=np.random.rand(30))), go.Figure(go.Heatmap(z=np.random.rand(12, 12)))
    text = nbformat.writes(figures(curve, heat))
    failed = {"status": "failed", "ename": "E", "evalue": "x" * 5000, "failed_cell": 1, "metrics": {}}
    for index in range(1000):
        (tmp_path / f"run-{index}.ipynb").write_text(text)
        once = {**failed, "ename": "Rare"} if index == 0 else {}
        more = {**failed, "evalue": f"sample {index}: {'x' * 5000}"} if index % 10 == 3 else once
        append(tmp_path, record(index, **more))
    start = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - start < 10
    assert path.stat().st_size < 10_000_000
    page = soup(path.read_text())
    assert len(rows(page)) == 1000
    assert len(page.select(".gallery img")) == 2000
    assert [group.select_one("h3").get_text(" ", strip=True) for group in page.select(".failure")] == [
        "100 x E a cell raised in cell 1",
        "1 x Rare a cell raised in cell 1",
    ]
    assert "sample 3: x" in page.select_one(".reason").get_text()
    assert page.select_one(".reason").get_text().endswith("(and so on, with other numbers)")
    assert "1 h 30 min from first to last, 33 min 20 s in runs" in page.select_one(".facts").get_text()
    summary = (tmp_path / "report.md").read_text()
    assert len(summary) < 40_000
    assert "800 more rows in runs.jsonl." in summary


def test_unfinished_and_broken_runs_are_told_not_hidden(tmp_path: Path) -> None:
    append(tmp_path, record(1, status="running", ended=None, seconds=None, metrics=None))
    append(tmp_path, record(2))
    append(tmp_path, record(3, status="dead-runner", ename="DeadRunnerError", evalue="killed", attempts=[{}, {}]))
    (tmp_path / "run-2.ipynb").write_text('{"cells": [')  # as a full disk leaves it
    known = ("key", "notebook", "parameters", "repeat", "output")
    plan = [{name: record(index)[name] for name in known} for index in (4, 1, 2, 3)]
    (tmp_path / "plan.jsonl").write_text("\n".join(map(json.dumps, plan)))
    page = soup(write_report(tmp_path).read_text())
    assert [row[0] for row in rows(page)] == ["not begun", "running", "completed", "dead-runner"]
    assert page.select_one(".tally").get_text(" ", strip=True) == "1 completed 1 dead-runner 1 running 1 not begun"
    words = " ".join(failure.get_text(" ", strip=True) for failure in page.select(".failure"))
    assert "its end was never reported" in words
    assert "the run's own process was killed" in words
    assert "2 attempts begun anew" in page.select_one(".facts").get_text()
    assert not page.select(".gallery")


def test_folder_without_runs_has_a_page_too(tmp_path: Path) -> None:
    page = soup(write_report(tmp_path).read_text())
    assert page.find("h1").get_text() == tmp_path.name
    assert rows(page) == []


def test_what_sets_runs_apart_beside_parameters_is_a_column(tmp_path: Path) -> None:
    append(tmp_path, record(1, notebook="a/one.ipynb", model={"model_name": "demo"}, parameters={}))
    append(tmp_path, record(2, notebook="a/two.ipynb", model={"model_name": "gpt2"}, parameters={}, repeat=1))
    page = soup(write_report(tmp_path).read_text())
    assert [row[:4] for row in rows(page)] == [["completed", "one", "demo", "0"], ["completed", "two", "gpt2", "1"]]


# ------------------------------------------------------------------------------------- charts and thumbnails


def runs(**columns: Any) -> list[dict[str, Any]]:
    """Records whose values and metric `y` are these columns."""
    names = [name for name in columns if name != "y"]
    return [
        {"values": dict(zip(names, values, strict=True)), "metrics": {"y": y}}
        for *values, y in zip(*(columns[name] for name in [*names, "y"]), strict=True)
    ]


def texts(svg: str) -> list[str]:
    return [text.get_text() for text in soup(svg).select("text")]


def test_chart_takes_the_mean_over_what_has_no_axis() -> None:
    chart = draw_metric(
        "y", runs(layer=[0, 0, 1, 1], seed=[1, 2, 1, 2], word=list("aaaa"), y=[1, 2, 3, 5]), ["layer", "seed"]
    )
    assert chart is not None
    assert chart.caption == "4 runs"
    several = runs(layer=[0, 1, 2] * 4, seed=[0] * 6 + [1] * 6, repeat=([0] * 3 + [1] * 3) * 2, y=range(12))
    chart = draw_metric("y", several, ["seed", "layer", "repeat"])
    assert chart is not None
    assert chart.caption == "12 runs; the mean over repeat"
    assert {"layer", "seed"} <= set(texts(chart.svg))


def test_many_lines_become_a_heat_map() -> None:
    grid = runs(layer=[i for i in range(12) for _ in range(10)], head=list(range(10)) * 12, y=range(120))
    chart = draw_metric("y", grid, ["layer", "head"])
    assert chart is not None
    assert "QuadMesh" in chart.svg
    twice = [{**run, "metrics": {"y": run["metrics"]["y"] + shift}} for run in grid for shift in (-7, 7)]
    averaged = draw_metric("y", twice, ["layer", "head"])
    assert averaged is not None
    fills = [re.findall(r"fill: (#[0-9a-f]{6})", svg) for svg in (chart.svg, averaged.svg)]
    assert len(set(fills[0])) > 100
    assert fills[0] == fills[1]
    lines = draw_metric("y", [run for run in grid if run["values"]["head"] < 3], ["layer", "head"])
    assert lines is not None
    assert "QuadMesh" not in lines.svg


def test_no_chart_where_nothing_varies_or_nothing_is_a_number() -> None:
    assert draw_metric("y", runs(layer=[0, 0], y=[1, 2]), ["layer"]) is None
    assert draw_metric("y", runs(layer=[0, 1], y=["a", "NaN"]), ["layer"]) is None
    assert draw_metric("y", runs(layer=[0, 1], y=[1, None]), ["layer"]) is None


def test_labels_differ_and_are_no_formulas() -> None:
    prompts = [f"The landmark in the old town with the number {i} costs $5 or $6" for i in range(3)]
    chart = draw_metric("y", runs(prompt=prompts, y=[1, 2, 3]), ["prompt"])
    assert chart is not None
    labels = [text for text in texts(chart.svg) if "costs" in text]
    assert labels[0].startswith("…0 costs $5")
    assert len(set(labels)) == 3


def pixels(uri: str) -> Any:
    encoded = uri.partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def sketch(figure: go.Figure) -> Any:
    ((_, uri),) = thumbnails(figures(figure), 3)
    return pixels(uri)


def test_heatmap_is_sketched_the_right_way_round() -> None:
    z = [[0, 0, 0], [0, 0, 1]]
    for reverse, row in ((None, HEIGHT // 4), ("reversed", 3 * HEIGHT // 4)):
        picture = sketch(go.Figure(go.Heatmap(z=z), {"yaxis": {"autorange": reverse}}))
        assert picture.shape == (HEIGHT, WIDTH, 3)
        warmth = picture[..., 0] - picture[..., 2]  # Viridis ends in yellow
        hot = np.argwhere(warmth > 150)
        assert abs(hot[:, 0].mean() - row) < 12
        assert hot[:, 1].min() > WIDTH * 0.6


def test_bars_and_lines_are_drawn_to_the_scale_of_their_axes() -> None:
    bars = sketch(go.Figure(go.Bar(y=[1, 3], marker_color="#ff0000")))
    is_red = (bars[..., 0] > 200) & (bars[..., 1] < 60)
    left, right = is_red[:, : WIDTH // 2], is_red[:, WIDTH // 2 :]
    assert right.any(axis=1).sum() == pytest.approx(3 * left.any(axis=1).sum(), rel=0.05)
    heights = []
    for top in (1, 2):
        picture = sketch(go.Figure(go.Bar(y=[1, 1], marker_color="#ff0000"), {"yaxis": {"range": [0, top]}}))
        heights.append(((picture[..., 0] > 200) & (picture[..., 1] < 60)).any(axis=1).sum())
    assert heights[0] == pytest.approx(2 * heights[1], abs=3)
    rising = sketch(go.Figure(go.Scatter(y=[0, 1, 2], line_color="#0000ff")))
    places = np.argwhere((rising[..., 2] > 200) & (rising[..., 0] < 60))
    assert np.corrcoef(places[:, 0], places[:, 1])[0, 1] < -0.95


def test_pictures_become_small_and_what_is_none_is_left_out() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (1000, 500), (0, 0, 0, 0)).save(file, "PNG")
    bundles = [
        {"image/png": base64.b64encode(file.getvalue()).decode()},
        {"image/png": "bm8gcGljdHVyZQ=="},
        {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'/>"},
        {"text/plain": "x"},
    ]
    outputs = [new_output("display_data", data=data) for data in bundles]
    found = [uri for _, uri in thumbnails(new_notebook(cells=[new_code_cell("x", outputs=outputs)]), 5)]
    assert [uri[:15] for uri in found] == ["data:image/webp", "data:image/svg+"]
    assert pixels(found[0]).shape == (WIDTH // 2, WIDTH, 3)
    assert pixels(found[0]).min() > 250  # transparent shows as paper
    assert len(list(thumbnails(figures(*[go.Figure(go.Bar(y=[1]))] * 5), 2))) == 2


@pytest.mark.parametrize(
    ("trace", "is_drawn"),
    [
        (go.Histogram(x=[1, 2, 2, 3]), True),
        (go.Bar(x=[3, 1], y=["a", "b"], orientation="h"), True),
        (go.Scatter(x=["a", "b"], y=[1, None]), True),
        (go.Scatter(x=[], y=[]), False),
        (go.Heatmap(z=[[None, None]]), False),
        (go.Heatmap(z=[[1, 2], [3]]), False),
        (go.Table(cells={"values": [[1, 2]]}), False),
        (go.Pie(values=[1, 2]), False),
    ],
)
def test_traces_that_no_sketch_can_show_have_none(trace: Any, is_drawn: bool) -> None:
    found = list(thumbnails(figures(go.Figure(trace)), 3))
    assert bool(found) == is_drawn


@pytest.mark.parametrize(
    "figure",
    [
        {"data": None},
        {"data": [1]},
        {"data": [{"type": "heatmap", "z": "abc"}]},
        {"data": [{"type": "heatmap", "z": [[1, 2]], "zmin": "low"}]},
        {"data": [{"y": [3], "marker": 1}]},
        {"data": [{"y": [1, 2]}], "layout": {"xaxis": {"domain": "x"}}},
        {"data": [{"y": {"bdata": "!", "dtype": "f8"}}]},
        [],
    ],
)
def test_what_is_no_figure_costs_its_picture_and_not_the_page(figure: Any) -> None:
    (good,) = figures(go.Figure(go.Bar(y=[1]))).cells[0].outputs
    cell = new_code_cell("x", outputs=[new_output("display_data", data={PLOTLY: figure}), good])
    assert len(list(thumbnails(new_notebook(cells=[cell]), 3))) == 1
