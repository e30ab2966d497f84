"""What counts as equal, close and changed, on outputs written out by hand and made by the libraries themselves."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from interp_kernel.notebook.compare import (
    MAX_CHANGES,
    CellComparison,
    Tolerance,
    compare_notebooks,
    worst_status,
)
from interp_kernel.notebook.metrics import METRIC
from interp_kernel.notebook.report import PLOTLY

SLIGHT = 1 + 1e-7


def executed(*outputs: Any, source: str = "x", tags: tuple[str, ...] = (), count: int | None = 1) -> dict[str, Any]:
    """A notebook of one cell that showed these outputs, as its file holds it."""
    cell = new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)}, id="a")
    return dict(json.loads(json.dumps(new_notebook(cells=[cell]))))


def printed(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


def shown(**data: Any) -> Any:
    return new_output("display_data", data={mime.replace("__", "/").replace("_", "-"): v for mime, v in data.items()})


def bundle(mime: str, value: Any) -> Any:
    return new_output("display_data", data={mime: value, "text/plain": "<object at 0x7f>"})


def plotly(figure: Any) -> Any:
    return bundle(PLOTLY, json.loads(figure.to_json()))


def compare(before: Any, after: Any, tolerance: Tolerance | None = None) -> CellComparison:
    """The one cell of two notebooks with one output each."""
    (cell,) = compare_notebooks(executed(before), executed(after), tolerance)
    return cell


def check_triple(make: Any) -> CellComparison:
    """An output of 1.0 is equal to itself, close to a slight move and changed by a large one; returns the last."""
    assert compare(make(1.0), make(1.0)).status == "equal"
    close = compare(make(1.0), make(SLIGHT))
    assert (close.status, close.n_changes) == ("close", 1)
    changed = compare(make(1.0), make(1.5))
    assert (changed.status, changed.n_changes) == ("changed", 1)
    (change,) = changed.changes
    assert (change.before, change.after, change.is_close) == (1.0, 1.5, False)
    return changed


def test_numbers_in_printed_text() -> None:
    changed = check_triple(lambda x: printed(f"layer 3\nloss {x!r} after 10 steps\n"))
    assert str(changed.changes[0]) == "stdout, line 2: 1 -> 1.5"


def test_metric() -> None:
    changed = check_triple(lambda x: bundle(METRIC, {"name": "accuracy", "value": x}))
    assert changed.changes[0].where == "metric 'accuracy'"


def test_metric_that_is_recorded_in_a_loop() -> None:
    def losses(*values: float) -> Any:
        return executed(*(bundle(METRIC, {"name": "loss", "value": value}) for value in values))

    (cell,) = compare_notebooks(losses(3.0, 2.0, 1.0), losses(3.0, 2.5, 1.0))
    assert [str(change) for change in cell.changes] == ["metric 'loss' (2): 2 -> 2.5"]


def test_json_and_dictionaries() -> None:
    changed = check_triple(lambda x: bundle("application/json", {"a": {"b": [1, "n", x]}}))
    assert changed.changes[0].where == "output 1, a.b.2"
    check_triple(lambda x: new_output("execute_result", data={"text/plain": f"{{'loss': {x}, 'n': 8}}"}))


def test_table_of_pandas_by_row_and_column() -> None:
    def table(x: float) -> Any:
        pd.set_option("display.precision", 10)
        frame = pd.DataFrame({"layer": [0, 1], "effect": [0.5, x]})
        return shown(text__html=frame.to_html(), text__plain=str(frame))

    changed = check_triple(table)
    assert changed.changes[0].where == "output 1, table 1, row 2, column effect"


@pytest.mark.parametrize("make", [lambda x: go.Scatter(y=[0.0, x]), lambda x: go.Scatter(y=np.array([0.0, x]))])
def test_plotly_data_as_lists_and_as_packed_arrays(make: Any) -> None:
    changed = check_triple(lambda x: plotly(go.Figure(make(x))))
    assert changed.changes[0].where == "output 1, data.0.y[1] (1 of 2 numbers moved)"


def test_plotly_packed_and_plain_are_the_same_numbers() -> None:
    z = np.arange(6.0).reshape(2, 3)
    packed, plain = plotly(go.Figure(go.Heatmap(z=z))), plotly(go.Figure(go.Heatmap(z=z.tolist())))
    assert "bdata" in json.dumps(packed)
    assert "bdata" not in json.dumps(plain)
    assert compare(packed, plain).status == "equal"


def test_plotly_reports_the_number_that_moved_most_and_gaps_are_equal() -> None:
    before = go.Figure(go.Heatmap(z=[[0, None, 2], [3, 4, 5]]))
    after = go.Figure(go.Heatmap(z=[[0.1, None, 2], [3, 9, 5.2]]))
    (change,) = compare(plotly(before), plotly(after)).changes
    assert (change.where, change.before, change.after) == ("output 1, data.0.z[1, 1] (3 of 6 numbers moved)", 4, 9)
    assert compare(plotly(before), plotly(before)).status == "equal"
    gap = compare(plotly(before), plotly(go.Figure(go.Heatmap(z=[[0, 1, 2], [3, 4, 5]]))))
    assert gap.status == "changed"


def test_plotly_title_and_shape() -> None:
    one, two = go.Figure(go.Bar(y=[1, 2]), {"title": "a"}), go.Figure(go.Bar(y=[1, 2]), {"title": "b"})
    (change,) = compare(plotly(one), plotly(two)).changes
    assert (change.where, change.before, change.after) == ("output 1, layout.title.text", "a", "b")
    assert compare(plotly(one), plotly(go.Figure(go.Bar(y=[1, 2, 3]), {"title": "a"}))).status == "changed"


def png(pixels: Any, **options: Any) -> Any:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return bundle("image/png", base64.b64encode(file.getvalue()).decode())


def test_pictures_are_compared_by_their_pixels() -> None:
    pixels = np.full((20, 30, 3), 120, dtype=np.uint8)
    slight, much = pixels.copy(), pixels.copy()
    slight[0, 0], much[0, 0] = 123, 220
    assert compare(png(pixels), png(pixels, compress_level=1)).status == "equal"
    assert compare(png(pixels), png(slight)).status == "close"
    changed = compare(png(pixels), png(much))
    assert changed.status == "changed"
    assert changed.changes[0].after == "0.17% of the pixels differ, by up to 100 of 255"
    assert compare(png(pixels), png(pixels[:10])).changes[0].after == "a picture of 30 x 10 pixels"


def test_svg_of_matplotlib_is_equal_although_its_ids_and_date_are_not() -> None:
    def drawn(y: float) -> Any:
        figure = Figure()
        figure.subplots().plot([0, y], marker="o")
        file = io.StringIO()
        figure.savefig(file, format="svg")
        return bundle("image/svg+xml", file.getvalue())

    one, same, other = drawn(1), drawn(1), drawn(-3)
    assert one["data"] != same["data"]
    assert compare(one, same).status == "equal"
    assert compare(one, other).status == "changed"


def test_text_that_differs_shows_the_first_line_that_does() -> None:
    (change,) = compare(printed("a\nfirst 1\nc"), printed("a\nsecond 2\nd")).changes
    assert (change.where, change.before, change.after) == ("stdout, line 2", "first 1", "second 2")
    (change,) = compare(printed("a\n"), printed("a\nb\n")).changes
    assert (change.where, change.before, change.after) == ("stdout, line 2", None, "b")
    long = compare(printed("x" * 5000), printed("y" * 5000)).changes[0]
    assert len(long.before) < 300


def test_other_widths_of_a_number_are_no_change_of_the_text() -> None:
    assert compare(printed("p =  9.5 %"), printed("p = 10.0 %")).changes[0].before == 9.5
    assert compare(printed("d = +0.5"), printed("d = -0.5")).changes[0].after == -0.5
    assert compare(printed("gpt2 v1.2.3"), printed("gpt3 v1.2.3")).changes[0].before == "gpt2 v1.2.3"


def test_errors_are_compared_by_name_and_message() -> None:
    def failed(text: str) -> Any:
        return new_output("error", ename="ValueError", evalue=text, traceback=[f"at 0x{id(text):x}"])

    assert compare(failed("bad 1"), failed("bad 1")).status == "equal"
    assert compare(failed("bad 1"), failed("worse")).changes[0].before == "ValueError: bad 1"


def test_what_no_two_runs_share_is_left_out() -> None:
    noisy = [
        printed("1.3 s\n", "stderr"),
        printed("<Thing at 0x7f33>\nWorker 'demo' is ready: pid 12.\n[interp] waited 3 s\n\x1b[31mred\x1b[0m\n"),
        shown(text__html="<div>a <progress value=1></progress></div>", text__plain="a 45%"),
        shown(text__html="<code>demo loaded in 5.2 s</code>", text__plain="demo loaded in 5.2 s"),
        shown(text__html="", text__plain=""),
        bundle("application/vnd.jupyter.widget-view+json", {"model_id": "1"}),
    ]
    quiet = [printed("<Thing at 0x1234>\nred\n")]
    (cell,) = compare_notebooks(executed(*noisy), executed(*quiet))
    assert (cell.status, cell.changes) == ("equal", ())
    assert compare_notebooks(executed(printed("1"), tags=("volatile",)), executed(tags=("volatile",))) == []


def test_outputs_that_are_only_in_one_run() -> None:
    (cell,) = compare_notebooks(executed(printed("1")), executed())
    assert (cell.status, cell.changes[0].after) == ("changed", None)
    (cell,) = compare_notebooks(executed(), executed(bundle("application/json", {"a": 1})))
    assert (cell.status, cell.changes[0].before, cell.changes[0].after) == ("changed", None, 1)
    (cell,) = compare_notebooks(executed(), executed(count=None))
    assert (cell.status, str(cell.changes[0])) == ("missing", "cell: 'ran' -> 'did not run'")


def test_streams_may_be_cut_anywhere_and_interleaved() -> None:
    whole, figure = printed("ab\n"), bundle("application/json", {"a": 1})
    (cell,) = compare_notebooks(executed(whole, figure), executed(printed("a"), figure, printed("b\n")))
    assert cell.status == "equal"


def test_edited_source_is_a_change() -> None:
    (cell,) = compare_notebooks(executed(source="x = 1"), executed(source="x = 2"))
    assert (cell.status, cell.changes[0].where) == ("changed", "source")


def test_tolerance_is_of_the_earlier_number() -> None:
    assert compare(printed("100.0"), printed("100.9"), Tolerance(rtol=0.01)).status == "close"
    assert compare(printed("100.0"), printed("101.1"), Tolerance(rtol=0.01)).status == "changed"
    assert compare(printed("100.0"), printed("101.005"), Tolerance(rtol=0.01)).status == "changed"
    assert compare(printed("0.0"), printed("0.05"), Tolerance(rtol=0.01, atol=0.1)).status == "close"
    assert compare(printed("1.0"), printed("1.0"), Tolerance(0, 0)).status == "equal"
    before, after = (plotly(go.Figure(go.Bar(y=[100.0, y]))) for y in (100.0, 100.9))
    assert compare(before, after, Tolerance(rtol=0.01)).status == "close"


def test_the_largest_of_many_changes_come_first() -> None:
    many = range(100)
    cell = compare(printed(" ".join(f"{n}.0" for n in many)), printed(" ".join(f"{n + n / 10}" for n in many)))
    assert (cell.n_changes, len(cell.changes)) == (99, MAX_CHANGES)
    assert cell.changes[0].before == 99


def test_cells_are_paired_by_id_and_without_ids_in_order() -> None:
    cells = [new_code_cell(text, id=text, execution_count=1) for text in ("a", "b", "c")]
    before = new_notebook(cells=[new_markdown_cell("# title"), *cells[:2]])
    after = new_notebook(cells=[cells[1], new_markdown_cell("x"), cells[2]])
    found = {cell.id: (cell.index, cell.status) for cell in compare_notebooks(before, after)}
    assert found == {"b": (0, "equal"), "c": (2, "missing"), "a": (1, "missing")}
    for cell in before.cells + after.cells:
        cell.pop("id", None)
    assert [cell.status for cell in compare_notebooks(before, after)] == ["changed", "changed"]


def test_the_whole_is_as_its_worst_cell() -> None:
    cells = [CellComparison(i, "", status) for i, status in enumerate(("equal", "close", "equal"))]
    assert worst_status(cells) == "close"
    assert worst_status([*cells, CellComparison(3, "", "changed")]) == "changed"
    assert worst_status([]) == "equal"
