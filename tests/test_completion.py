"""Tab and Shift-Tab in `%%remote` cells: options, what lives on the worker, and answers while a cell runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers_kernel import OURS, PLAIN, Notebook, notebook, remote

PROVIDER_S = 1.0  # after this JupyterLab drops completions


@pytest.fixture(scope="module", params=[OURS, PLAIN], ids=["ours", "plain"])
def nb(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("completion"), request.param) as kernel:
        if request.param == PLAIN:
            kernel.ok("%load_ext interp_kernel")
        kernel.ok("base_name, settings = 1, {'alpha_key': 2}")
        kernel.ok(remote("import torch\nheld = torch.zeros(3, 4)", "--keep held"))
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
    ],
)
def test_completes_once(nb: Notebook, code: str, expected: str) -> None:
    found = nb.complete(code)
    assert [text.rstrip("']") for text in found].count(expected) == 1
    assert len(found) == len(set(found))


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
