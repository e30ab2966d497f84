"""Outputs of a cell as an agent reads them: bounded, in order, without noise, and nothing lost without a word."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernel.mcp import drawing
from interp_kernel.mcp.answers import PICTURE_BYTES, PICTURES, SIDE, TEXT_BYTES, render, text_of
from tests.helpers_kernel import Notebook, notebook
from tests.helpers_worker import wait_until

Output = dict[str, Any]
CELL = "1a2b3c4d"
NOTICE = re.compile(
    rf'\[([\d,]+) of ([\d,]+) characters left out; read_output\(cell_id="{CELL}", start=(\d+)\) reads on\]'
)
MORE = re.compile(rf'\[([\d,]+) more outputs; read_output\(cell_id="{CELL}", start=(\d+)\) reads them\]')


def stream(text: str, name: str = "stdout") -> Output:
    return {"output_type": "stream", "name": name, "text": text}


def display(**data: Any) -> Output:
    bundle = {kind.replace("_", "/", 1): value for kind, value in data.items()}
    return {"output_type": "display_data", "data": bundle, "metadata": {}}


def figure(figure: Any) -> Output:
    return {"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": figure}, "metadata": {}}


def picture(width: int, height: int, *, noise: bool = False, kind: str = "PNG") -> Output:
    from PIL import Image

    image = Image.effect_noise((width, height), 90.0) if noise else Image.new("RGB", (width, height), "teal")
    file = io.BytesIO()
    image.convert("RGB").save(file, kind)
    return display(**{f"image_{kind.lower()}": base64.b64encode(file.getvalue()).decode(), "text_plain": "<Figure>"})


def shown(*outputs: Output, limit: int = TEXT_BYTES) -> str:
    blocks = render(outputs, cell_id=CELL, limit=limit)
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")


def opened(block: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(block["data"])))


# ------------------------------------------------------------------------------------------------ bounds


def test_three_megabytes_become_head_tail_and_a_handle_that_reads_on() -> None:
    text = "".join(f"line {n}\n" for n in range(300_000))
    answer = shown(stream(text))
    assert len(answer.encode()) <= TEXT_BYTES
    assert answer.startswith("line 0\nline 1\n")
    assert answer.endswith("line 299998\nline 299999")
    left_out, total, start = (int(number.replace(",", "")) for number in NOTICE.search(answer).groups())  # type: ignore[union-attr]
    whole = text_of([stream(text)])
    head, _, tail = NOTICE.split(answer)[0], None, NOTICE.split(answer)[-1]
    assert total == len(whole)
    assert head.removesuffix("\n") + whole[start : start + left_out] + tail.removeprefix("\n") == whole


def test_a_short_error_after_a_long_print_is_whole() -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "the reason " * 20, "traceback": []}
    assert "the reason " * 20 in shown(stream("x" * 1_000_000), error)


def test_handles_point_at_their_own_output() -> None:
    outputs = [stream("first"), stream("a" * 50_000, "stderr"), display(text_plain="b" * 50_000)]
    answer, whole = shown(*outputs), text_of(outputs)
    starts = [int(start) for _, _, start in NOTICE.findall(answer)]
    assert [whole[start] for start in starts] == ["a", "b"]


@pytest.mark.parametrize("limit", [1_000, 4_000, TEXT_BYTES])
@pytest.mark.parametrize("count", [1, 3, 70, 5_000])
def test_every_mix_stays_within_the_limit(count: int, limit: int) -> None:
    answer = shown(*[display(text_plain=f"<{n}>" + "ж" * 1_000) for n in range(count)], limit=limit)
    assert len(answer.encode()) <= limit
    assert "<0>" in answer or NOTICE.search(answer)


def test_of_very_many_outputs_the_first_and_last_are_shown() -> None:
    outputs = [display(text_plain=f"<{n}>") for n in range(5_000)]
    answer = shown(*outputs)
    found = MORE.search(answer)
    assert found
    assert answer.startswith("<0>\n<1>\n")
    assert answer.endswith("<4998>\n<4999>")
    seen = len(re.findall(r"<\d+>", answer))
    assert seen + int(found[1].replace(",", "")) == 5_000
    assert text_of(outputs)[int(found[2]) :].startswith(f"<{seen // 2}>")


def test_what_fits_is_untouched() -> None:
    assert shown(stream("a\n"), stream("b\n", "stderr"), display(text_plain="3")) == "a\n[stderr] b\n3"
    assert render([], cell_id=CELL) == []


# ----------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("\x1b[31mred\x1b[0m \x1b[38;5;28;01mbold\x1b[39;00m", "red bold"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
        (" 10%|#\r 50%|#####\r100%|##########\n", "100%|##########"),
        ("windows\r\nlines\r\n", "windows\nlines"),
        ("tab\there\x00\x08", "tab\there��"),
        ("\x1b[2K\x1b[1Aup", "up"),
        ("\x1b", "�"),
        ("half \ud800 pair", "half � pair"),
    ],
)
def test_colours_controls_and_overwritten_lines_go(raw: str, read: str) -> None:
    assert shown(stream(raw)) == read


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("kernel")) as opened:
        yield opened


def test_a_data_frame_is_a_compact_table(nb: Notebook) -> None:
    cell = nb.ok("import pandas as pd\npd.DataFrame({'word': ['Paris', 'a b'], 'logit': [1.5, -2.0]})")
    answer = shown({"output_type": "execute_result", "data": cell.shown})
    assert answer == "| word | logit\n0 | Paris | 1.5\n1 | a b | -2.0"
    assert len(answer) < len(cell.shown["text/html"]) / 5


@pytest.mark.parametrize(
    ("data", "read"),
    [
        ({"text_html": "<p>one</p><script>evil()</script><p>two &lt; three</p>"}, "one\ntwo < three"),
        ({"text_html": "<b>bold</b>", "text_plain": "<IPython.core.display.HTML object>"}, "bold"),
        ({"text_html": "<progress value=1>", "text_plain": "layers 45%"}, "layers 45%"),
        ({"text_html": "<style>p {</style"}, ""),
        ({"text_markdown": "# T", "text_plain": "<Markdown>"}, "# T"),
        ({"image_svg+xml": "<svg><style>a</style><text>axis</text></svg>", "text_plain": "<SVG>"}, "axis"),
        ({"application_json": {"a": [1]}}, '{"a": [1]}'),
        ({"application_x-widget": {}}, "[output of type application/x-widget, not shown]"),
        ({}, "[output of type none, not shown]"),
        ({"text_plain": ["two\n", "lines"]}, "two\nlines"),
    ],
)
def test_the_most_telling_text_of_a_bundle(data: dict[str, Any], read: str) -> None:
    assert shown(display(**data)) == read


def test_an_error_keeps_the_users_frames_and_the_last_of_the_library(nb: Notebook) -> None:
    nb.ok("import json\ndef parse(text):\n    return json.loads(text)")
    error = nb.run("parse('{')").error
    broken = nb.run("1 +").error
    chained = nb.run("try:\n    1 / 0\nexcept Exception as error:\n    raise KeyError('k') from error").error
    answer = shown({"output_type": "error", **error})
    assert "----> 1 parse('{')" in answer
    assert "----> 3     return json.loads(text)" in answer
    assert re.search(r"decoder.py:\d+, in JSONDecoder.raw_decode \(3 frames of libraries, the last is shown\)", answer)
    assert answer.endswith(
        "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    )
    assert "object_hook" not in answer
    assert len(answer) < len("".join(error["traceback"])) / 4
    assert shown({"output_type": "error", **broken}).endswith("1 +\n       ^\nSyntaxError: invalid syntax")
    both = shown({"output_type": "error", **chained})
    assert both.index("ZeroDivisionError: division by zero") < both.index("direct cause") < both.index("KeyError: 'k'")


def test_an_error_without_frames_is_its_message() -> None:
    assert (
        shown({"output_type": "error", "ename": "DeadKernel", "evalue": "gone", "traceback": []}) == "DeadKernel: gone"
    )


# --------------------------------------------------------------------------------------------- figures


@pytest.mark.usefixtures("chromium")
def test_a_figure_is_told_in_numbers_and_drawn(nb: Notebook) -> None:
    cell = nb.ok(
        "import numpy as np, plotly.graph_objects as go\n"
        "go.Figure([go.Scatter(x=np.arange(100) * 1.0, y=np.arange(100) ** 2.0, name='loss'),\n"
        "           go.Heatmap(z=np.arange(600).reshape(20, 30), x=['The', 'Eiffel'])],\n"
        "          layout=dict(title='Patching', xaxis_title='position'))"
    )
    [text, drawn] = render([{"output_type": "display_data", **cell.contents("display_data")[0]}], cell_id=CELL)
    assert text["text"].splitlines() == [
        "[figure 'Patching'; xaxis: position]",
        "- scatter 'loss': x (100) from 0 to 99; y (100) from 0 to 9801",
        "- heatmap: x (2) The, Eiffel; z (20 x 30) from 0 to 599",
        "[image 700 x 500]",
    ]
    assert opened(drawn).size == (700, 500)


def test_a_figure_with_its_own_picture_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_drawn", lambda figures: pytest.fail("it was drawn"))
    own = picture(20, 10)
    own["data"]["application/vnd.plotly.v1+json"] = {"data": [], "layout": {}}
    assert [block["type"] for block in render([own], cell_id=CELL)] == ["text", "image"]


def test_without_a_browser_a_figure_is_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nonexistent/chrome")
    [block] = render([figure({"data": [{"type": "bar", "y": [1, 2, 3]}], "layout": {}})], cell_id=CELL)
    assert block["text"] == "[figure]\n- bar: y (3) 1, 2, 3"


@pytest.mark.parametrize("limit_s", [0.3, 1.0, 1.6])
def test_a_drawing_that_takes_too_long_is_left_out_and_its_browser_ends(
    monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    monkeypatch.setattr(drawing, "LIMIT_S", limit_s)
    monkeypatch.setenv("A_MARK", mark := uuid.uuid4().hex)
    slow = {"data": [{"type": "scatter3d", "y": list(range(60_000))}], "layout": {"title": {"text": mark}}}
    assert drawing.draw([slow]) == [None]
    wait_until(lambda: not with_mark(mark))


def with_mark(mark: str) -> list[psutil.Process]:
    """Processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if process.pid != os.getpid() and mark in process.environ().values() else []
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "title", "bdata", "dtype", "text", "name"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(
    st.fixed_dictionaries({}, optional={"data": json_values | st.lists(json_values, max_size=3), "layout": json_values})
    | json_values
)
def test_no_figure_is_too_odd(odd: Any) -> None:
    assert text_of([figure(odd)]).startswith("[")


# -------------------------------------------------------------------------------------------- pictures


def test_pictures_stand_among_the_text_scaled() -> None:
    blocks = render([stream("before"), picture(1600, 1200), stream("after"), picture(100, 50)], cell_id=CELL)
    assert [block["type"] for block in blocks] == ["text", "image", "text", "image"]
    assert blocks[0]["text"] == f"before\n[image 1600 x 1200, shown at {SIDE} x 576]"
    assert opened(blocks[1]).size == (SIDE, 576)
    assert opened(blocks[3]).size == (100, 50)
    assert blocks[3]["mimeType"] == "image/png"


def test_a_noisy_picture_is_made_small_enough() -> None:
    blocks = render([picture(1600, 1600, noise=True)], cell_id=CELL)
    assert blocks[1]["mimeType"] == "image/jpeg"
    assert len(base64.b64decode(blocks[1]["data"])) <= PICTURE_BYTES
    assert opened(blocks[1]).size == (SIDE, SIDE)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP"])
def test_other_kinds_of_picture_are_shown(kind: str) -> None:
    assert opened(render([picture(30, 20, kind=kind)], cell_id=CELL)[1]).size == (30, 20)


def test_of_many_pictures_the_rest_is_named() -> None:
    blocks = render([picture(20 + n, 10) for n in range(PICTURES + 3)], cell_id=CELL)
    assert sum(block["type"] == "image" for block in blocks) == PICTURES
    assert blocks[-1]["text"].count("not shown") == 3


@pytest.mark.parametrize("side", [8_000, 30_000])
def test_a_picture_that_would_unpack_to_gigabytes_is_not_opened(side: int) -> None:
    """One of which the file says so much is enough: what it holds is never read."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    bomb = display(image_png=base64.b64encode(data).decode())
    assert shown(bomb) == "[image too large to show]"


@pytest.mark.parametrize("data", ["", "%%%", base64.b64encode(b"\x89PNG broken").decode()])
def test_a_broken_picture_is_said(data: str) -> None:
    assert shown(display(image_png=data)) == "[image that can't be read: UnidentifiedImageError]"


def test_numbers_that_are_none_are_told() -> None:
    trace = {"type": "scatter", "y": [None, math.nan, 1.0, *[2.0] * 20], "x": {"dtype": "i2", "bdata": "AQACAA=="}}
    assert json.loads(json.dumps(text_of([figure({"data": [trace]})]))) == (
        "[figure]\n- scatter: x (2) 1, 2; y (23) from 1 to 2"
    )
