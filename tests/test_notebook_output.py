"""What remote cells show: rich values, updates, progress bars, text; live, and in a notebook that nbclient stores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.helpers_kernel import OURS, Notebook, Ran, notebook, remote

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
PNG_HEAD = "iVBORw0KGgo"  # the PNG signature in base64


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("output")) as kernel:
        kernel.ok(remote("import matplotlib.pyplot"))  # which tells on stderr when it builds its font cache
        yield kernel


def shown(cell: Ran) -> list[str]:
    """Texts of everything but streams, in order."""
    return [c["data"].get("text/plain", "") for kind, c in cell.outputs if kind in ("display_data", "execute_result")]


def folded(cell: Ran) -> list[Any]:
    """The outputs as a front end has them in the end: updates applied, cleared ones gone."""
    outputs: list[dict[str, Any]] = []
    to_clear = False
    for kind, content in cell.outputs:
        if kind == "clear_output":
            to_clear = True
            if not content["wait"]:
                outputs, to_clear = [], False
            continue
        display_id = content.get("transient", {}).get("display_id")
        if kind == "update_display_data":
            for output in outputs:
                if output["display_id"] == display_id:
                    output["data"] = content["data"]
            continue
        outputs = [] if to_clear else outputs
        to_clear = False
        outputs.append({"display_id": display_id, "data": content.get("data", content.get("text"))})
    return [output["data"] for output in outputs]


# ---------------------------------------------------------------------------------------------------- rich values


def test_an_open_figure_is_shown_once_at_the_end_of_the_cell(nb: Notebook) -> None:
    cell = nb.ok(remote("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('t');"))
    assert [kind for kind, _ in cell.outputs] == ["display_data"]
    assert cell.outputs[0][1]["data"]["image/png"].startswith(PNG_HEAD)
    assert nb.ok(remote("1;")).outputs == []
    two = nb.ok(remote("import matplotlib.pyplot as plt\nfor n in range(2):\n    plt.figure()\n    plt.plot([n])"))
    assert [kind for kind, _ in two.outputs] == ["display_data"] * 2


def test_a_figure_that_the_cell_left_open_when_it_failed_is_not_shown_in_the_next(nb: Notebook) -> None:
    assert nb.run(remote("import matplotlib.pyplot as plt\nplt.plot([1, 2])\n1 / 0")).ename == "ZeroDivisionError"
    assert nb.ok(remote("print('next')")).stdout == "next\n"
    assert nb.ok(remote("1;")).contents("display_data") == []


@pytest.mark.parametrize("end", ["fig", "fig.show()"])
def test_a_plotly_figure_is_data_and_never_carries_the_library(nb: Notebook, end: str) -> None:
    cell = nb.ok(remote(f"import plotly.graph_objects as go\nfig = go.Figure(go.Bar(y=[1, 5, 2]))\n{end}"))
    (output,) = cell.outputs
    assert PLOTLY in output[1]["data"]
    assert "plotly.js" not in json.dumps(output[1])
    assert len(json.dumps(output[1])) < 50_000


def test_a_data_frame_is_a_table_and_comes_back_as_itself(nb: Notebook) -> None:
    cell = nb.ok(remote("import pandas as pd\ntable = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})\ntable"))
    assert "<table" in cell.shown["text/html"]
    assert nb.value("_.to_dict('list')") == {"a": [1, 2], "b": ["x", "y"]}
    assert nb.value("type(table).__module__.split('.')[0]") == "pandas"


def test_html_markdown_json_and_several_displays_keep_their_order_among_prints(nb: Notebook) -> None:
    body = (
        "from IPython.display import HTML, JSON, Markdown, display\nprint('one')\ndisplay(HTML('<b>two</b>'), 3)\n"
        "print('four')\ndisplay(Markdown('*five*'))\ndisplay(JSON({'six': 6}))\nHTML('<i>seven</i>')"
    )
    found = []
    for kind, content in nb.ok(remote(body)).outputs:
        data = content.get("data", {})
        rich = [data[mime] for mime in ("text/html", "text/markdown", "application/json") if mime in data]
        found.append((kind, content.get("text") or (rich or [data["text/plain"]])[0]))
    assert found == [
        ("stream", "one\n"),
        ("display_data", "<b>two</b>"),
        ("display_data", "3"),
        ("stream", "four\n"),
        ("display_data", "*five*"),
        ("display_data", {"six": 6}),
        ("execute_result", "<i>seven</i>"),
    ]


def test_display_handles_update_what_they_showed(nb: Notebook) -> None:
    body = (
        "from IPython.display import display, update_display\nh = display('first', display_id=True)\n"
        "display('named', display_id='mine')\nh.update('second')\nupdate_display('renamed', display_id='mine')"
    )
    cell = nb.ok(remote(body))
    assert [data["text/plain"] for data in folded(cell)] == ["'second'", "'renamed'"]
    later = nb.ok(remote("from IPython.display import update_display\nupdate_display('third', display_id='mine')"))
    (update,) = later.contents("update_display_data")
    assert update["transient"]["display_id"] == "mine"


def test_clear_output_clears_at_once_or_at_the_next_output(nb: Notebook) -> None:
    body = (
        "from IPython.display import clear_output, display\nprint('a')\nclear_output()\nprint('b')\n"
        "clear_output(wait=True)\ndisplay('c')\nclear_output(wait=True)\nprint('d')"
    )
    cell = nb.ok(remote(body))
    assert [kind for kind, _ in cell.outputs] == [
        *("stream", "clear_output", "stream", "clear_output", "display_data", "clear_output", "stream"),
    ]
    assert [c["wait"] for c in cell.contents("clear_output")] == [False, True, True]
    assert folded(cell) == ["d\n"]


def test_widgets_show_as_text_because_their_models_are_on_the_worker(nb: Notebook) -> None:
    cell = nb.ok(remote("import ipywidgets\ndisplay(ipywidgets.IntSlider(3))\nipywidgets.IntSlider(5)"))
    assert [WIDGET in content.get("data", {}) for _, content in cell.outputs] == [False, False]
    assert [text.startswith("IntSlider(value=") for text in shown(cell)] == [True, True]


def test_a_repr_that_fails_is_told_and_does_not_end_the_worker(nb: Notebook) -> None:
    cell = nb.run(remote("class Bad:\n    def __repr__(self): raise ValueError('no text')\nBad()"))
    assert "no text" in cell.stderr + cell.stdout + cell.traceback
    assert nb.ok(remote("6 * 7")).value == 42


# ----------------------------------------------------------------------------------------------------------- text


def test_text_of_python_c_and_subprocesses_is_caught_and_kept_apart(nb: Notebook) -> None:
    body = (
        "import ctypes, os, subprocess, sys\nprint('python')\nprint('python err', file=sys.stderr)\n"
        "ctypes.CDLL(None).puts(b'from C')\nctypes.CDLL(None).fflush(None)\n"
        "subprocess.run('echo sub; echo sub err >&2', shell=True)\nos.write(1, b'by hand\\n')\n!echo shell"
    )
    cell = nb.ok(remote(body + "\nNone"))
    assert sorted(cell.stdout.splitlines()) == ["by hand", "from C", "python", "shell", "sub"]
    assert sorted(cell.stderr.splitlines()) == ["python err", "sub err"]


def test_bytes_and_lone_surrogates_become_valid_text(nb: Notebook) -> None:
    body = "import sys\nprint('a\\ud800b')\nsys.stdout.buffer.write(b'\\xff\\xfe!\\n')\nprint('\\0 é 漢 😀')"
    cell = nb.ok(remote(body))
    assert cell.stdout == "a\\ud800b\n\\xff\\xfe!\n\0 é 漢 😀\n"


def test_output_arrives_while_the_cell_runs(nb: Notebook, tmp_path: Path) -> None:
    go = tmp_path / "go"
    cell = nb.start(remote(f"import os\nprint('early')\nwhile not os.path.exists({str(go)!r}): pass\nprint('late')"))
    nb.wait(lambda: "early" in cell.stdout, 20)
    assert "late" not in cell.stdout
    go.touch()
    assert nb.finish(cell).stdout == "early\nlate\n"


# ------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("module", ["tqdm", "tqdm.auto", "tqdm.notebook"])
def test_a_progress_bar_is_one_output_that_ends_complete(nb: Notebook, module: str) -> None:
    body = "for i in tqdm(range(30), desc='steps', unit='row'): time.sleep(0.02)"
    cell = nb.ok(remote(f"import time\nfrom {module} import tqdm\n{body}"))
    assert {kind for kind, _ in cell.outputs} == {"display_data", "update_display_data"}
    assert len(cell.contents("display_data")) == 1
    assert len(cell.contents("update_display_data")) >= 2
    (final,) = folded(cell)
    assert "steps 100%" in final["text/plain"]
    assert "30/30 row" in final["text/plain"]
    assert 'value="30" max="30"' in final["text/html"]


def test_a_bar_stopped_half_way_keeps_its_position(nb: Notebook) -> None:
    body = "from tqdm import trange\nfor i in trange(10):\n    if i == 4: raise ValueError(i)"
    cell = nb.run(remote(body))
    assert cell.ename == "ValueError"
    (final, _) = folded(cell)
    assert "4/10" in final["text/plain"]


def test_nested_bars_and_bars_that_leave_nothing(nb: Notebook) -> None:
    body = (
        "from tqdm.auto import tqdm\nfor i in tqdm(range(2), desc='outer'):\n"
        "    for j in tqdm(range(3), desc='inner', leave=False): pass\n"
        "bar = tqdm(desc='open end')\nbar.update(7)\nbar.close()\ndel bar"
    )
    texts = [data["text/plain"] for data in folded(nb.ok(remote(body)))]
    assert texts[0].startswith("outer 100%")
    assert [text for text in texts if "inner" in text] == []
    assert texts[-1].startswith("open end 7 it")


def test_the_same_bar_in_two_runs_of_a_cell_is_two_bars(nb: Notebook) -> None:
    body = remote("from tqdm import tqdm\nfor i in tqdm(range(3)): pass")
    ids = [nb.ok(body).contents("display_data")[0]["transient"]["display_id"] for _ in range(2)]
    assert ids[0] != ids[1]


# ---------------------------------------------------------------------------------- beside local cells and magics


def test_local_cells_behave_as_in_ipythons_own_kernel(nb: Notebook) -> None:
    figure = nb.ok("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert figure.contents("display_data")[0]["data"]["image/png"].startswith(PNG_HEAD)
    assert "Wall time" in nb.ok("%%time\nx = 1").stdout
    assert nb.ok("%%capture got\nprint('inside')").outputs == []
    assert nb.value("got.stdout") == "inside\n"
    failed = nb.run("x = 1\n1 / 0")
    assert f"Cell In[{failed.reply['execution_count']}], line 2" in failed.traceback
    assert nb.ok("await __import__('asyncio').sleep(0, 5)").value == 5


def test_time_and_capture_above_remote_do_their_work(nb: Notebook) -> None:
    timed = nb.ok("%%time\n%%remote\nx = 3\nx + 1")
    assert "Wall time" in timed.stdout
    assert timed.value == 4
    captured = nb.ok("%%capture got\n%%remote\nprint('inside')\ndisplay(3)\ny = 5")
    assert captured.outputs == []
    assert nb.value("got.stdout, len(got.outputs), y") == ("inside\n", 1, 5)


def test_a_batch_run_waits_for_background_cells_whose_output_would_be_lost(nb: Notebook) -> None:
    nb.ok("%env INTERP_BATCH=1")
    try:
        cell = nb.ok(remote("print('waited for')\nbatched = 1", "--background"))
    finally:
        nb.ok("%env --unset INTERP_BATCH\nimport os; os.environ.pop('INTERP_BATCH', None)")
    assert cell.stdout == "waited for\n"
    assert nb.value("batched") == 1


# ---------------------------------------------------------------------------------------------- stored notebooks


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A notebook that nbclient ran with our kernel, as it is on disk."""
    folder = tmp_path_factory.mktemp("stored")
    sources = [
        "a = 20",
        remote("from tqdm.auto import tqdm\nimport time\nfor i in tqdm(range(20), desc='steps'): time.sleep(0.02)"),
        remote("print('text')\nb = a + 1\n{'b': b}"),
        remote("import plotly.graph_objects as go\ngo.Figure(go.Bar(y=[1, 2]))"),
        remote("from IPython.display import display\nh = display(0, display_id=True)\nfor i in range(50): h.update(i)"),
        remote("import ipywidgets, sys\nprint('a\\ud800', file=sys.stderr)\nipywidgets.IntSlider(5)"),
        remote("print('before')\nc = 5\n{}['missing']"),
        remote("1 +"),
        "c",
    ]
    cells = [new_code_cell(source, metadata={"tags": ["raises-exception"]}) for source in sources]
    manager = AsyncKernelManager(kernel_name="python3")
    command = [sys.executable, "-m", OURS, "-f", "{connection_file}"]
    manager._kernel_spec = KernelSpec(argv=command, display_name="test", language="python")
    client = NotebookClient(new_notebook(cells=cells), km=manager, timeout=90, resources={"metadata": {"path": folder}})
    nbformat.write(client.execute(env=dict(os.environ), cleanup_kc=True), folder / "out.ipynb")
    return json.loads((folder / "out.ipynb").read_text())


def outputs(stored: Any, index: int) -> list[Any]:
    return list(stored["cells"][index]["outputs"])


def test_the_stored_notebook_is_valid_and_small(stored: Any) -> None:
    nbformat.validate(stored)
    assert len(json.dumps(stored)) < 100_000
    assert WIDGET not in json.dumps(stored)


def test_stored_progress_is_one_output_in_its_final_state(stored: Any) -> None:
    (bar,) = outputs(stored, 1)[-1:]
    assert bar["output_type"] == "display_data"
    assert "steps 100%" in "".join(bar["data"]["text/plain"])
    assert "20/20" in "".join(bar["data"]["text/html"])
    loads = outputs(stored, 1)[:-1]  # only where no other test has started the worker before
    assert all("loaded" in "".join(output["data"]["text/plain"]) for output in loads)


def test_stored_results_streams_and_updates(stored: Any) -> None:
    stream, result = outputs(stored, 2)
    assert (stream["output_type"], stream["text"]) == ("stream", ["text\n"])
    assert result["output_type"] == "execute_result"
    assert result["execution_count"] == stored["cells"][2]["execution_count"] == 3
    assert result["data"]["text/plain"] == ["{'b': 21}"]
    (figure,) = outputs(stored, 3)
    assert PLOTLY in figure["data"]
    (updated,) = outputs(stored, 4)
    assert updated["data"]["text/plain"] == ["49"]


def test_stored_errors_have_name_value_and_lines_of_the_cell(stored: Any) -> None:
    before, error = outputs(stored, 6)
    assert before["text"] == ["before\n"]
    assert (error["output_type"], error["ename"], error["evalue"]) == ("error", "KeyError", "'missing'")
    assert "{}['missing']" in "\n".join(error["traceback"])
    (syntax,) = outputs(stored, 7)
    assert syntax["ename"] == "SyntaxError"
    assert "invalid syntax" in syntax["evalue"]
    assert outputs(stored, 8)[0]["data"]["text/plain"] == ["5"]
