"""Real kernels and real workers: stops, deaths, restarts, several kernels, background cells, the plain extension."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers_kernel import PLAIN, Notebook, Ran, notebook, remote

PID = remote("__import__('os').getpid()")
DEAF = """\
import time
print('on', flush=True)
while True:
    try: time.sleep(600)
    except KeyboardInterrupt: print('no', flush=True)
"""
GO = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.005)\n"


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("kernel")) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """IPython's own kernel with the extension."""
    with notebook(tmp_path_factory.mktemp("plain"), PLAIN) as kernel:
        kernel.ok("%load_ext interp_kernel")
        yield kernel


def stop_when_on(nb: Notebook, cell: Ran) -> Ran:
    """Press stop once the cell has printed `on`, and wait for its end."""
    nb.wait(lambda: "on" in cell.stdout)
    nb.interrupt()
    return nb.finish(cell)


# -------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    "body",
    [
        "while True: n += 1",
        "import time\ntime.sleep(600)",
        "ids = tokenizer('The', return_tensors='pt')\nwhile True: model.generate(**ids, max_new_tokens=60)",
        "import subprocess\nsubprocess.run(['sleep', '600'])",
        "import threading\nthreading.Event().wait()",
        "import asyncio\nawait asyncio.sleep(600)",
    ],
    ids=["loop", "sleep", "generate", "subprocess", "lock", "await"],
)
def test_stop_ends_the_cell_and_keeps_the_worker(nb: Notebook, body: str) -> None:
    before = nb.ok(PID).value
    cell = stop_when_on(nb, nb.start(remote(f"n = 0\nprint('on', flush=True)\n{body}")))
    assert cell.ename == "KeyboardInterrupt"
    assert cell.reply["status"] == "error"
    assert "Cell In[" in cell.traceback
    assert "interp_kernel/" not in cell.traceback
    assert nb.ok(PID).value == before


def test_a_stopped_await_cleans_up_and_tells_where_it_was(nb: Notebook) -> None:
    body = "import asyncio\nprint('on', flush=True)\ntry:\n    await asyncio.sleep(600)\nfinally:\n    print('cleaned')"
    cell = stop_when_on(nb, nb.start(remote(body)))
    assert (cell.ename, cell.stdout) == ("KeyboardInterrupt", "on\ncleaned\n")
    assert "----> 5     await asyncio.sleep(600)" in cell.traceback


def test_stop_hammered_into_a_printing_cell_leaves_every_next_cell_right(nb: Notebook) -> None:
    before = nb.ok(PID).value
    for turn in range(10):
        cell = nb.start(remote(f"print('on {turn}')\nn = 0\nwhile True:\n    n += 1\n    print({turn}, n)"))
        nb.wait(lambda cell=cell, turn=turn: len(cell.outputs) > turn)  # type: ignore[misc]
        nb.interrupt()
        nb.finish(cell)
        assert cell.ename == "KeyboardInterrupt"
        after = nb.ok(remote(f"print('after')\n{turn} + 1"))
        assert (after.value, after.stdout, after.stderr) == (turn + 1, "after\n", "")
        # print() writes a line in pieces, and a stop may fall between them.
        whole = [line for line in cell.stdout.splitlines(keepends=True)[1:] if line.endswith("\n")]
        counts = [int(line.split()[1]) for line in whole]
        assert counts == list(range(1, len(counts) + 1))
        assert nb.value("n") >= len(counts)
    assert nb.ok(PID).value == before


def test_stop_of_a_waiting_cell_does_not_hurt_the_background_cell_before_it(nb: Notebook, tmp_path: Path) -> None:
    go = tmp_path / "go"
    nb.ok(remote(GO.format(str(go)) + "done = 'in peace'", "--background"))
    nb.ok("job = _")
    waiting = nb.start(remote("ran = True"))
    nb.wait(lambda: "waiting for 1 other call" in waiting.stderr)
    nb.interrupt()
    assert nb.finish(waiting).ename == "KeyboardInterrupt"
    local = stop_when_on(nb, nb.start("print('on', flush=True)\nimport time\ntime.sleep(600)"))
    assert local.ename == "KeyboardInterrupt"
    assert nb.value("job.done()") is False
    go.touch()
    nb.ok("job.result(60)")
    assert nb.value("done, 'ran' in globals()") == ("in peace", False)


def test_stop_works_in_a_plain_kernel(plain: Notebook) -> None:
    cell = stop_when_on(plain, plain.start(remote("print('on', flush=True)\nwhile True: pass")))
    assert cell.ename == "KeyboardInterrupt"
    assert plain.ok(remote("6 * 7")).value == 42


# --------------------------------------------------------------------------------------------------- background


def test_half_a_character_costs_neither_its_output_nor_the_next(nb: Notebook) -> None:
    halves = "for half in ('\\ud800', '\\udcff'):\n    print(f'half {half} pair', flush=True)\nfloat('nan')"
    cell = nb.ok(halves)
    assert (cell.stdout, cell.text) == ("half ? pair\n" * 2, "nan")
    assert nb.ok("from IPython.display import JSON\nJSON({'\\ud800': float('nan')})").shown
    assert nb.ok("6 * 7").value == 42


def test_background_output_lands_in_its_own_cell_while_another_runs(nb: Notebook, tmp_path: Path) -> None:
    go, said, end = (str(tmp_path / name) for name in ("go", "said", "end"))
    body = (
        GO.format(go)
        + "from IPython.display import display\nfrom tqdm.auto import tqdm\nimport sys\n"
        + "print('from behind', flush=True)\nprint('its error', file=sys.stderr, flush=True)\ndisplay({'shown': 1})\n"
        + f"for _ in tqdm(range(2), desc='bar'): pass\nopen({said!r}, 'w').close()\n"
        + GO.format(end)
        + "print('the end')\n1 / 0"
    )
    behind = nb.start(remote(body, "--background"))
    nb.finish(behind)
    front = nb.ok(f"print('in front')\nopen({go!r}, 'w').close()\n" + GO.format(said) + "print('still in front')")
    assert (front.stdout, front.stderr) == ("in front\nstill in front\n", "")
    nb.wait(lambda: "100%" in str(behind.contents("update_display_data")))
    assert behind.stdout == "from behind\n"
    assert "its error" in behind.stderr
    assert behind.contents("display_data")[0]["data"]["text/plain"] == "{'shown': 1}"
    last = nb.ok(f"open({end!r}, 'w').close()\nwhile not list(get_ipython().user_ns['Out'].values())[-1].done(): pass")
    nb.wait(lambda: behind.ename == "ZeroDivisionError")
    assert behind.stdout == "from behind\nthe end\n"
    assert last.outputs == []
    assert {kind for kind, _ in front.outputs} == {"stream"}


# ------------------------------------------------------------------------------------- kernels come, go and share


def test_a_restarted_kernel_attaches_to_the_same_worker_without_a_load(tmp_path: Path) -> None:
    with notebook(tmp_path) as kernel:
        before = kernel.ok(PID).value
        mark = "__import__('sys').kept_over_restart"
        kernel.ok(remote(f"{mark} = {tmp_path.name!r}"))
        running = kernel.start(remote("print('on', flush=True)\nwhile True: pass"))
        kernel.wait(lambda: "on" in running.stdout)
        kernel.restart()
        again = kernel.ok(remote(f"import os\nos.getpid(), {mark}"))
        assert again.value == (before, tmp_path.name)
        assert [kind for kind, _ in again.outputs] == ["execute_result"]  # nothing told of a load


def test_the_worker_outlives_a_kernel_killed_in_mid_call(nb: Notebook, tmp_path: Path) -> None:
    before = nb.ok(PID).value
    with notebook(tmp_path) as victim:
        cell = victim.start(remote("print('on', flush=True)\nwhile True: pass"))
        victim.wait(lambda: "on" in cell.stdout)
        os.kill(victim.pid, signal.SIGKILL)
        after = nb.ok(PID)
    assert after.value == before
    assert "waiting for 1 other call" in after.stderr


def test_two_kernels_share_one_worker_and_no_output_crosses(nb: Notebook, tmp_path: Path) -> None:
    with notebook(tmp_path) as other:
        pids = set()
        for turn in range(3):
            body = "import os\nfor i in range(400): print({!r}, {}, i)\nmine = ({!r}, {})\nos.getpid(), mine"
            kernels = ((nb, "a"), (other, "b"))
            cells = [kernel.start(remote(body.format(name, turn, name, turn))) for kernel, name in kernels]
            for (kernel, name), cell in zip(kernels, cells, strict=True):
                kernel.finish(cell)
                pid, mine = cell.value
                pids.add(pid)
                assert mine == (name, turn)
                assert cell.stdout.splitlines() == [f"{name} {turn} {i}" for i in range(400)]
        assert len(pids) == 1
        assert nb.value("mine") == ("a", 2)
        assert other.value("mine") == ("b", 2)


# ------------------------------------------------------------------------------------------------- worker's ends


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Notebook]:
    """A kernel whose worker is its own: no other test asks for such a model."""
    options = {"model": "demo", "dtype": "float64", "attn_implementation": "eager"}
    with notebook(tmp_path, INTERP_MODEL=json.dumps(options)) as kernel:
        yield kernel
        kernel.run("%remote stop")


@pytest.mark.timeout(300)  # it starts four workers
def test_a_worker_stopped_in_its_load_killed_wedged_restarted_and_ended(own: Notebook) -> None:
    loading = own.start(remote("1"))
    own.wait(lambda: bool(loading.contents("display_data")))
    own.interrupt()
    assert own.finish(loading).ename == "KeyboardInterrupt"

    first = own.ok(remote("import os, torch\nassert model.dtype == torch.float64\nos.getpid()")).value
    own.ok(remote("held = [1]", "--keep held"))
    own.ok("%remote start demo --name light")
    own.ok("%remote use demo")
    kinds = [own.ok(remote("str(model.dtype)", options)).value for options in ("", "--worker light")]
    assert kinds == ["torch.float64", "torch.float32"]
    assert "'held'" in own.run(remote("held", "--worker light")).evalue
    body = "import os, signal\nprint('said before', flush=True)\npart = 1\nos.kill(os.getpid(), signal.SIGKILL)"
    died = own.run(remote(body))
    assert died.ename == "WorkerDiedError"
    assert "killed by SIGKILL" in died.evalue
    assert "Lost with it: held." in died.evalue
    assert died.stdout == "said before\n"
    assert own.ok("held").text == "<RemoteValue list of 1 LOST>"
    for use in (remote("held"), "held.fetch()"):
        lost = own.run(use)
        assert lost.ename == "LostValueError"
        assert "'held'" in lost.evalue

    second = own.ok(PID).value
    assert second != first
    own.ok(remote("other = [2]", "--keep other"))
    wedged = own.start(remote(DEAF))
    stop_twice(own, wedged)
    assert wedged.ename == "KeyboardInterrupt"
    assert "the worker was killed by the second stop" in wedged.evalue
    assert "Lost with it: other." in wedged.evalue
    psutil.wait_procs([psutil.Process(second)] if psutil.pid_exists(second) else [], timeout=10)
    assert not psutil.pid_exists(second)

    restarted = own.ok("%remote restart").stdout
    third = int(re.search(r"pid (\d+)", restarted)[1])  # type: ignore[index]
    assert third != second
    own.ok(remote("late = [3]", "--keep late"))
    assert own.ok("%remote stop").stdout == (
        "The worker has ended; the next remote cell starts a new one. Lost with it: late.\n"
    )
    assert not psutil.pid_exists(third)
    assert "not running" in own.ok("%remote status").stdout


def stop_twice(kernel: Notebook, cell: Ran) -> None:
    """Press stop, see it ignored, and press it again."""
    kernel.wait(lambda: "on" in cell.stdout)
    kernel.interrupt()
    kernel.wait(lambda: "no" in cell.stdout)
    kernel.interrupt()
    kernel.finish(cell)


def test_a_load_that_fails_is_a_short_clear_error_every_time(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with notebook(tmp_path, INTERP_MODEL=str(tmp_path / "empty")) as kernel:
        failed = kernel.run(remote("made = 1"))
        assert failed.ename == "LoadError"
        assert str(tmp_path / "empty") in failed.evalue
        assert len(failed.traceback) < 1_500
        assert "Traceback" not in failed.traceback
        assert kernel.value("'made' in globals()") is False
        assert "not running" in kernel.ok("%remote status").stdout


# ----------------------------------------------------------------------------------- the plain kernel, settings


def test_the_extension_does_the_same_in_a_plain_kernel(plain: Notebook) -> None:
    plain.ok("x = 20")
    cell = plain.ok(remote("print('there')\ny = x + 1\n{'y': y}"))
    assert (cell.stdout, cell.value, plain.value("y, _")) == ("there\n", {"y": 21}, (21, {"y": 21}))
    failed = plain.run(remote("\n1/0"))
    assert f"Cell In[{failed.reply['execution_count']}], line 3" in failed.traceback
    behind = plain.ok(remote("print('behind')\n5", "--background"))
    plain.ok("job = _")
    assert plain.value("job.result(60)") == 5
    plain.wait(lambda: behind.stdout == "behind\n")


def test_unload_takes_the_magics_away_and_reload_brings_them_back(plain: Notebook) -> None:
    pid = plain.ok(PID).value
    plain.ok("%unload_ext interp_kernel")
    try:
        gone = plain.run(PID)
        assert "`%%remote` not found" in gone.stderr + gone.evalue
    finally:
        plain.ok("%load_ext interp_kernel")
    assert plain.ok(PID).value == pid
    plain.ok("%reload_ext interp_kernel")
    assert plain.ok(PID).value == pid


METADATA = {"model": "demo", "scaledown_window": 150}


@pytest.mark.parametrize(
    ("variable", "metadata", "expected"),
    [
        ("", METADATA, "stays warm 2.5 min"),
        ('{"model_name": "demo", "scaledown_window": 90}', METADATA, "stays warm 1.5 min"),
        ("", {**METADATA, "run": {"status": "completed"}}, "stays warm 2.5 min"),
        ("", "demo", "stays warm 5 min"),
        ("", None, "stays warm 5 min"),
        ("", {"model": "demo", "dtype": "float1"}, "SpecError: dtype 'float1' is not known"),
        ('{"model_nam": "demo"}', None, "SpecError: Worker option 'model_nam' is not known"),
        ('{"model": "demo"', None, "demo\"' begins like a JSON object and is none (Expecting"),
        ('{"keep_warm": 0}', None, "[interp] keep_warm is now called min_containers."),
        ("", [1], "SpecError: metadata of named.ipynb names the model by [1]"),
    ],
)
def test_the_model_is_named_by_environment_then_metadata_then_default(
    plain: Notebook, tmp_path: Path, variable: str, metadata: object, expected: str
) -> None:
    file = tmp_path / "named.ipynb"
    file.write_text(json.dumps({"cells": [], "metadata": {} if metadata is None else {"interp": metadata}}))
    plain.ok("import os\nsaved = dict(os.environ)")
    plain.ok(f"os.environ.update(INTERP_MODEL={variable!r}, JPY_SESSION_NAME={str(file)!r})\n%reload_ext interp_kernel")
    try:
        cell = plain.run("%remote start")
    finally:
        plain.ok("os.environ.clear()\nos.environ.update(saved)\n%reload_ext interp_kernel")
    assert expected in cell.stdout + cell.stderr + cell.traceback


def test_the_kernel_names_itself_and_keeps_ipythons_language(nb: Notebook) -> None:
    info = nb.client.kernel_info(reply=True, timeout=30)["content"]
    assert info["implementation"] == "interp"
    assert info["language_info"]["name"] == "python"
    assert info["language_info"]["codemirror_mode"]["name"] == "ipython"
