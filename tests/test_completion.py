"""Tab and Shift-Tab in `%%remote` cells: options, what lives on the worker, and answers while a cell runs."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers_kernel import ANSI, OURS, PLAIN, Notebook, notebook, remote

PROVIDER_S = 1.0  # after this JupyterLab drops completions


@pytest.fixture(scope="module", params=[OURS, PLAIN], ids=["ours", "plain"])
def nb(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("completion"), request.param) as kernel:
        if request.param == PLAIN:
            kernel.ok("%load_ext interp_kernel")
        kernel.ok("base_name, settings = 1, {'alpha_key': 2}")
        kernel.ok(remote("import torch\nheld = torch.zeros(3, 4)", "--keep held"))
        kernel.ok("import os\nos.mkdir('folder of mine')\nopen('folder.txt', 'w').close()")
        kernel.complete("base_")  # the first completion of a kernel loads IPython's own machinery
        yield kernel


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("%%remote --ti", "%%remote --timeout"),
        ("%%remote --quiet --ke", "%%remote --quiet --keep"),
        ("%%remote\nmodel.conf", "%%remote\nmodel.config"),
        ("%%remote\nmodel.config.n_la", "%%remote\nmodel.config.n_layer"),
        ("%%remote\nx = [tokenizer.deco", "%%remote\nx = [tokenizer.decode"),
        ("%%remote\nmod", "%%remote\nmodel"),
        ("%%remote\nheld.sha", "%%remote\nheld.shape"),
        ("%%remote\nprint(held.T.uns", "%%remote\nprint(held.T.unsqueeze"),
        ("%%remote\nbase_na", "%%remote\nbase_name"),
        ("%%remote\nsettings['alp", "%%remote\nsettings['alpha_key"),
        ("%%time\n%%remote\nmodel.conf", "%%time\n%%remote\nmodel.config"),
        ("%%time\n%%remote --ti", "%%time\n%%remote --timeout"),
    ],
)
def test_completes_once(nb: Notebook, code: str, expected: str) -> None:
    found = nb.complete(code)
    assert [text.rstrip("']") for text in found].count(expected) == 1
    assert len(found) == len(set(found))


VERBS = ["start", "use", "status", "interrupt", "restart", "stop", "logs", "techniques", "help"]
CELL_OPTIONS = ["--worker", "-i", "-o", "--keep", "--timeout", "--background", "--quiet", "--help"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%remote ", VERBS),
        ("%remote st", ["start", "status", "stop"]),
        ("x = 1\n  %remote  res", ["restart"]),
        ("%remote start --bac", ["--backend"]),
        ("%remote start --h", ["--help", "--hidden-system-prompt", "--hold"]),
        ("%remote start gpt2 --peft --ba", ["--backend", "--base-model"]),
        ("%remote start d", ["demo"]),
        ("%remote start fold", ["folder of mine/"]),
        ("%remote techniques fo", ["folder of mine/"]),
        ("%remote use ", ["demo"]),
        ("%remote restart de", ["demo"]),
        ("%remote logs d", ["demo"]),
        ("%%remote ", CELL_OPTIONS),
        ("%%remote --quiet -", CELL_OPTIONS),
        ("%%remote --worker ", ["demo"]),
        ("%%remote --keep held -i base_", ["base_name"]),
        ("%%remote -i settings,base_", ["settings,base_name"]),
    ],
)
def test_completes_the_magics_own_lines_with_nothing_of_ipythons(nb: Notebook, line: str, expected: list[str]) -> None:
    begun = line[: line.rindex(" ") + 1]
    for below in ("", "\nbase_name"):
        assert nb.complete(line + below, len(line)) == [begun + word for word in expected]


@pytest.mark.parametrize(
    "line",
    [
        "%remote stx",
        "%remote %st",
        "%remote status ",
        "%remote use demo d",
        "%remote start --backend ",
        "%remote start --device-map=a",
        "%%remote --timeout ",
    ],
)
def test_where_nothing_fits_nothing_is_offered(nb: Notebook, line: str) -> None:
    assert nb.complete(line) == []


def test_completes_in_the_middle_of_a_cell(nb: Notebook) -> None:
    code = "%%remote\nx = model.conf\nprint(x)"
    assert "%%remote\nx = model.config" in nb.complete(code, code.index("\nprint"))


@pytest.mark.parametrize("code", ["model.conf", "# %%remote\nmodel.conf", "held.unsq"])
def test_a_local_cell_is_offered_nothing_from_the_worker(nb: Notebook, code: str) -> None:
    assert nb.complete(code) == []


@pytest.mark.parametrize("code", ["%%remote\nmodel.no_such_thing_", "%%remote\nnowhere_at_all.x"])
def test_what_does_not_exist_completes_to_nothing(nb: Notebook, code: str) -> None:
    assert nb.complete(code) == []


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("model.forward", ["Signature: model.forward(", "input_ids", "on the worker"]),
        ("tokenizer.decode", ["Signature: tokenizer.decode(", "token_ids"]),
        ("held", ["Tensor (on the worker)"]),
        ("held.unsqueeze", ["unsqueeze", "dim"]),
        ("base_name", ["int"]),
        ("len", ["Return the number of items"]),
    ],
)
def test_documents(nb: Notebook, name: str, fragments: list[str]) -> None:
    text = nb.inspect(f"%%remote\n{name}")
    assert [part for part in fragments if part not in text] == []


def test_a_local_variable_called_model_is_documented_from_here(nb: Notebook) -> None:
    nb.ok("model = {'own': 1}")
    try:
        assert "dict" in nb.inspect("model")
        assert "on the worker" not in nb.inspect("model")
    finally:
        nb.ok("del model")


def test_goes_away_with_the_extension_and_comes_back_with_it(nb: Notebook) -> None:
    own = nb.inspect("%%remote\nlen")
    for _ in range(2):  # a second round shows whether anything was left behind or put in twice
        nb.ok("%unload_ext interp_kernel")
        try:
            assert nb.complete("%%remote --back") == []
            assert nb.inspect("%%remote\nlen") == own
        finally:
            nb.ok("%load_ext interp_kernel")
        assert nb.complete("%%remote --back") == ["%%remote --background"]
    nb.ok(remote("import torch\nheld = torch.zeros(3, 4)", "--keep held"))


def test_nothing_starts_a_worker(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        kernel.ok("%remote help")
        assert [text for text in kernel.complete("%%remote\nmodel.conf") if text.endswith("config")] == []
        kernel.inspect("%%remote\nmodel.forward")
        assert kernel.complete("%%remote --wor") == ["%%remote --worker"]
        assert kernel.ok("%remote status").stdout.startswith("No worker yet")


def test_options_complete_before_the_first_magic_has_run(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        assert kernel.complete("%%remo") == ["%%remote"]
        assert kernel.complete("%remote stat") == ["%remote status"]
        assert kernel.complete("%%remote --ti") == ["%%remote --timeout"]
        assert kernel.complete("%remote use ") == []
        assert kernel.value("'interp_kernel.magics' in __import__('sys').modules") is False


def test_help_alone_in_a_cell_is_shown_before_and_after_the_first_magic_and_in_a_plain_kernel(tmp_path: Path) -> None:
    for module in (OURS, PLAIN):
        with notebook(tmp_path, module) as kernel:
            if module == PLAIN:
                kernel.ok("%load_ext interp_kernel")
            for line in ("%%remote --help", "%%remote --help", "%%remote --quiet --help "):
                assert "--background" in kernel.ok(line).stdout
            assert "cell body is empty" in kernel.run("%%remote --quiet").stderr
            assert kernel.ok("%remote status").stdout.startswith("No worker yet")


def test_both_forms_of_the_documentation_where_the_shell_has_html(nb: Notebook) -> None:
    nb.ok("get_ipython().enable_html_pager = True")
    try:
        data = nb.client.inspect("%%remote\nmodel.forward", reply=True, timeout=60)["content"]["data"]
    finally:
        nb.ok("get_ipython().enable_html_pager = False")
    assert data["text/html"] == f"<pre>{html.escape(ANSI.sub('', data['text/plain']))}</pre>"
    assert "Signature: model.forward(" in data["text/html"]
    assert data["text/html"].count("<") == 2


def soonest(ask: Callable[[], object], expected: str) -> float:
    """Seconds until the right answer, the best of three: other work may slow the machine, but not thrice."""
    waits = []
    for _ in range(3):
        asked = time.monotonic()
        if expected in str(ask()):
            waits.append(time.monotonic() - asked)
    return min(waits, default=float("inf"))


def test_answers_within_a_second_while_a_remote_cell_runs(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        kernel.ok(remote("import torch\nheld = torch.zeros(2)", "--keep held"))
        kernel.complete("held")
        cell = kernel.start(remote("print('on', flush=True)\nwhile True: pass"))
        kernel.wait(lambda: "on" in cell.stdout)
        waits = {
            "remote name": soonest(lambda: kernel.complete("%%remote\nmodel.conf"), "model.config'"),
            "handle": soonest(lambda: kernel.complete("%%remote\nheld.unsq"), "held.unsqueeze'"),
            "option": soonest(lambda: kernel.complete("%%remote --ti"), "--timeout'"),
            "documentation": soonest(lambda: kernel.inspect("%%remote\nmodel.forward"), "Signature: model.forward("),
        }
        client = kernel.client
        assert client.kernel_info(reply=True, timeout=30)["content"]["status"] == "ok"
        assert kernel.is_complete("x = (") == "incomplete"
        assert client.history(reply=True, timeout=30, hist_access_type="tail", n=1)["content"]["status"] == "ok"
        assert not cell.is_idle
        assert not cell.reply
        kernel.interrupt()
        assert kernel.finish(cell).ename == "KeyboardInterrupt"
        assert kernel.ok(remote("6 * 7")).value == 42
        assert max(waits.values()) < PROVIDER_S, waits


def test_an_answer_in_mid_call_leaves_the_kernel_busy_and_the_cell_idle_once_and_last(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        kernel.ok(remote("1"))
        cell = kernel.start(remote("print('on', flush=True)\nwhile True: pass"))
        kernel.wait(lambda: "on" in cell.stdout)
        kernel.complete("%%remote\nmodel.conf")
        kernel.inspect("%%remote\nmodel.forward")
        kernel.wait(lambda: cell.statuses == ["busy"] * 3, timeout_s=20)
        assert kernel.status == "busy"
        kernel.interrupt()
        kernel.finish(cell)


LATE_BUSY = """\
import time
kernel = get_ipython().kernel
publish = kernel._publish_status
def late(status, *args, **kwargs):
    time.sleep(0.3 * (status == "busy"))
    publish(status, *args, **kwargs)
kernel._publish_status = late
"""


def test_a_cell_that_ends_right_after_an_answer_is_idle_once_and_last(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        kernel.ok(LATE_BUSY)  # the lateness of a loaded machine
        for turn in range(2):
            go = tmp_path / str(turn)
            body = f"import os, time\nprint('on', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(0.005)"
            cell = kernel.start(remote(body))
            kernel.wait(lambda cell=cell: "on" in cell.stdout)  # type: ignore[misc]
            kernel.client.complete("%remote st")
            kernel.wait(lambda: kernel.status == "idle")
            go.touch()
            kernel.finish(cell, timeout_s=20)
            kernel.ok("1")
            assert kernel.status == "idle"
            assert cell.statuses == ["busy", "busy", "idle"]
