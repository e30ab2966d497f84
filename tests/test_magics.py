"""`%%remote` and `%remote` in a real kernel: what travels, what comes back, options, verbs and errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_kernel import Notebook, notebook, remote

MB = 1_000_000


@pytest.fixture(scope="module")
def nb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("magics")
    with notebook(folder) as kernel:
        yield kernel


def worker_pid(nb: Notebook) -> int:
    return int(nb.ok(remote("__import__('os').getpid()")).value)


# ------------------------------------------------------------------------------------------ names and values


def test_reads_are_shipped_and_assigned_names_come_back(nb: Notebook) -> None:
    nb.ok("base, items = 20, [1, 2]\ndef double(x): return 2 * x * unit\nunit = 1")
    nb.ok(remote("total = double(base) + sum(items)\n(first, *rest), unit = items, 5\nfor last in items: pass"))
    assert nb.value("total, first, rest, unit, last, base") == (43, 1, [2], 5, 2, 20)


def test_every_cell_begins_with_an_empty_namespace(nb: Notebook) -> None:
    nb.ok(remote("ghost = 1\nglobals()['unseen'] = 2"))
    assert nb.value("ghost, 'unseen' in globals()") == (1, False)
    nb.ok("del ghost")
    assert nb.run(remote("ghost")).ename == "NameError"
    assert nb.run(remote("unseen")).ename == "NameError"


def test_a_failed_cell_returns_what_it_assigned_before(nb: Notebook) -> None:
    nb.ok("after = 'untouched'")
    failed = nb.run(remote("before = 41\nbefore += 1\n1 / 0\nafter = 'changed'"))
    assert failed.ename == "ZeroDivisionError"
    assert nb.value("before, after") == (42, "untouched")


def test_a_stopped_cell_returns_what_it_assigned_before(nb: Notebook) -> None:
    cell = nb.start(remote("n = 0\nprint('going', flush=True)\nwhile True: n += 1"))
    nb.wait(lambda: "going" in cell.stdout)
    nb.interrupt()
    assert nb.finish(cell).ename == "KeyboardInterrupt"
    assert nb.value("n") > 0


def test_the_workers_model_is_neither_returned_nor_hidden_by_a_local_one(nb: Notebook) -> None:
    nb.ok("model = 'mine'")
    kind, vocabulary = nb.ok(remote("model = model.eval()\ntype(model).__name__, len(tokenizer)")).value
    assert kind.endswith("LMHeadModel")
    assert vocabulary > 100
    assert nb.value("model") == "mine"


def test_another_name_for_the_model_is_a_handle_for_later_cells(nb: Notebook) -> None:
    nb.ok(remote("same, both = model, [tokenizer]"))
    assert nb.ok("same").text == "<RemoteValue the worker's model>"
    assert nb.ok(remote("same is model, both[0] is tokenizer")).value == (True, True)
    assert "stay on the worker. Return what you need" in nb.run("same.fetch()").evalue


def test_functions_of_the_notebook_find_model_and_tokenizer_as_the_cell_does(nb: Notebook) -> None:
    nb.ok("globals().pop('model', None)\ndef n_layer(): return [model for _ in '.'][0].config.n_layer")
    nb.ok("def first(text): return tokenizer(text).input_ids[0]")
    assert nb.ok(remote("n_layer() == model.config.n_layer, first('hi') == tokenizer('hi').input_ids[0]")).value == (
        True,
        True,
    )
    nb.ok("def own(tokenizer=len): return tokenizer('abc')\ndef attribute(x): return x.model")
    assert nb.ok(remote("import types\nown(), attribute(types.SimpleNamespace(model=5))")).value == (3, 5)


def test_a_value_over_ten_megabytes_stays_and_is_used_again_and_fetched(nb: Notebook) -> None:
    nb.ok(remote(f"small, large = bytes({9 * MB}), bytes({11 * MB})"))
    assert nb.value("len(small)") == 9 * MB
    assert nb.ok("large").text == f"<RemoteValue bytes of {11 * MB}>"
    assert nb.ok(remote("len(large)")).value == 11 * MB
    assert nb.value("large.fetch() == bytes(len(large.fetch()))") is True


def test_a_tensors_handle_tells_shape_dtype_device_and_bytes(nb: Notebook) -> None:
    nb.ok(remote("import torch\nt = torch.zeros(3, 4, dtype=torch.bfloat16)", "--keep t"))
    assert nb.ok("t").text == "<RemoteValue torch.Tensor 3x4 bfloat16 cpu 24 bytes>"


def test_outputs_asked_for_come_whatever_their_size(nb: Notebook) -> None:
    nb.ok(remote(f"wanted, other = bytes({11 * MB}), 1", "-o wanted"))
    assert nb.value("len(wanted), other") == (11 * MB, 1)


@pytest.mark.parametrize("option", ["-o", "--keep"])
def test_a_name_that_the_cell_never_assigned_is_told(nb: Notebook, option: str) -> None:
    cell = nb.ok(remote("right = 1", f"{option} right {option} wrong"))
    assert cell.stderr == "[interp] 'wrong' was asked for, but the cell did not assign it\n"


def test_what_does_not_pickle_becomes_a_handle_and_says_so(nb: Notebook) -> None:
    cell = nb.ok(remote("import threading\nlock, plain = threading.Lock(), 3"))
    assert "[interp] 'lock' stays on the worker as a RemoteValue: it can't be pickled" in cell.stderr
    assert nb.value("plain") == 3
    assert nb.ok(remote("lock.acquire(blocking=False)")).value is True
    assert nb.run("lock.fetch()").ename == "ShipError"


def test_dropping_a_handle_frees_the_value(nb: Notebook) -> None:
    nb.ok(remote("import sys, weakref\nclass Kept: pass\nkept = Kept()\nsys.seen = weakref.ref(kept)", "--keep kept"))
    nb.ok("del Kept")
    alive = remote("import gc, sys\ngc.collect()\nsys.seen() is not None")
    assert nb.ok(alive).value is True
    nb.ok("del kept")
    assert any(nb.ok(alive).value is False for _ in range(100)), "the value was still there 100 cells later"


@pytest.mark.parametrize(("last", "shows"), [("", ["kept"]), ("kept", []), ("kept", ["kept", "kept"])])
@pytest.mark.parametrize("drop", ["del kept", "kept = kept.fetch()"])
def test_a_handle_that_was_shown_is_freed_when_its_name_goes(
    nb: Notebook, last: str, shows: list[str], drop: str
) -> None:
    making = f"import sys, weakref\nclass Kept(bytearray): pass\nkept = Kept({11 * MB})\nsys.seen = weakref.ref(kept)\n"
    nb.ok(remote(making + last))
    for line in shows:
        nb.ok(line)
    # Printed, for a value that is shown would itself displace the handle from `_`.
    alive = remote("import gc, sys\ngc.collect()\nprint(sys.seen() is not None)")
    assert nb.ok(alive).stdout == "True\n"
    nb.ok(drop)
    assert any(nb.ok(alive).stdout == "False\n" for _ in range(100)), "the value outlived its name by 100 cells"


def test_the_last_result_is_read_like_any_variable(nb: Notebook) -> None:
    nb.ok("[20, 22]")
    assert nb.ok(remote("sum(_)")).value == 42
    assert nb.ok(remote("_ + sum(__)")).value == 84


def test_a_large_result_without_a_name_is_the_last_one_until_others_displace_it(nb: Notebook) -> None:
    making = "import sys, weakref\nclass Big(bytearray): pass\n"
    making += f"def make():\n    big = Big({11 * MB})\n    sys.big = weakref.ref(big)\n    return big\nmake()"
    nb.ok(remote(making))
    assert nb.ok("_").text == "<RemoteValue Big>"
    alive = remote("import gc, sys\ngc.collect()\nprint(sys.big() is not None)")
    nb.ok("1")
    assert nb.ok(alive).stdout == "True\n"
    assert nb.ok(remote("len(__)")).value == 11 * MB
    nb.ok("2")
    nb.ok("3")
    assert any(nb.ok(alive).stdout == "False\n" for _ in range(100)), "three later results did not displace it"


def test_inputs_that_only_strings_name_are_sent_with_i(nb: Notebook) -> None:
    nb.ok("by_name = 7")
    assert nb.run(remote("globals()['by_name']")).ename == "KeyError"
    assert nb.ok(remote("globals()['by_name']", "-i by_name")).value == 7
    nb.ok("second = 8")
    assert nb.ok(remote("globals()['by_name'] + globals()['second']", "-i by_name,second  # both")).value == 15
    missing = nb.run(remote("1", "-i nowhere"))
    assert (missing.ename, "'nowhere'" in missing.evalue) == ("MagicError", True)


def test_lines_of_ipython_see_the_notebooks_names(nb: Notebook) -> None:
    nb.ok("place, facts, twice = '/etc', {'n': 3}, lambda n: 2 * n")
    assert nb.ok(remote("!echo $place {facts['n'] + 1}")).stdout.strip() == "/etc 4"
    timed = nb.ok(remote("%time timed = twice(21)"))
    assert "Wall time" in timed.stdout
    assert nb.value("timed") == 42
    assert "Docstring" in nb.ok(remote("facts?")).stdout
    assert "here(n)" in nb.ok(remote("def here(n): return n\nhere??")).stdout
    assert "not found" in nb.ok(remote("here_no_more?")).stdout


def test_a_debugger_is_refused_in_words(nb: Notebook) -> None:
    cell = nb.run(remote("x = 1\nbreakpoint()"))
    assert (cell.ename, "which has no stdin" in cell.evalue) == ("RuntimeError", True)


def test_an_input_that_does_not_travel_is_named(nb: Notebook) -> None:
    nb.ok("import threading\nguard, fine = threading.Lock(), 1")
    cell = nb.run(remote("fine, guard"))
    assert cell.ename == "ShipError"
    assert cell.evalue.startswith("'guard' (lock) can't be sent to the worker")


def test_a_large_input_that_has_not_changed_is_sent_once(nb: Notebook) -> None:
    nb.ok("import numpy as np\nlarge_input, salt = np.arange(2_500_000.0), 0")
    nb.ok("import os\ndef written():\n    return int(open('/proc/self/io').read().split('wchar: ')[1].split()[0])")
    sent = []
    for change in ("", "salt += 1", "large_input[5] += 1"):
        nb.ok(change or "pass")
        nb.ok("start = written()")
        total = nb.ok(remote("float(large_input.sum()) + salt")).value
        sent.append(nb.value("written() - start"))
        assert total == nb.value("float(large_input.sum()) + salt")
    assert sent[0] > 20 * MB
    assert sent[1] < MB
    assert sent[2] > 20 * MB


def test_functions_and_classes_of_remote_cells_work_here_and_there(nb: Notebook) -> None:
    define = "scale = 3\ndef times(x): return scale * x\nclass Point:\n    def __init__(self, x): self.x = times(x)"
    nb.ok(remote(define))
    assert nb.value("times(2), Point(4).x") == (6, 12)
    assert nb.ok(remote("point = Point(5)\ntimes(point.x)")).value == 45
    assert nb.value("point.x, type(point).__name__") == (15, "Point")


def test_modules_and_imported_names_come_back_unimported(nb: Notebook) -> None:
    nb.ok("import sys\nassert not {'colorsys', 'fractions', 'torch'} & sys.modules.keys()")
    nb.ok(remote("import colorsys, torch\nfrom fractions import Fraction\nfrom torch import Tensor"))
    assert nb.ok("colorsys, Fraction, Tensor").text.count("not imported here yet") == 3
    assert nb.ok(remote("isinstance(torch.ones(1), Tensor), Fraction(1, 2) == 0.5")).value == (True, True)
    assert nb.value("{'colorsys', 'fractions', 'torch'} & sys.modules.keys()") == set()
    assert nb.value("colorsys.rgb_to_hsv(1, 1, 1), float(Fraction(1, 4))") == ((0.0, 0.0, 1), 0.25)
    assert nb.value("'torch' in sys.modules") is False


def test_a_function_imported_by_an_earlier_cell_comes_with_its_module(nb: Notebook) -> None:
    folder = Path(nb.value("__import__('os').getcwd()"))
    for name in ("earlier_module", "later_module"):
        (folder / f"{name}.py").write_text(f"def of_{name}():\n    return {name!r}\n")
    nb.ok(remote("from earlier_module import of_earlier_module"))
    cell = nb.ok(remote("from later_module import of_later_module\nof_earlier_module(), of_later_module()"))
    assert cell.value == ("earlier_module", "later_module")


def test_a_function_of_a_remote_cell_imports_what_its_code_names_when_it_runs_here(nb: Notebook) -> None:
    nb.ok("import sys\nassert not {'nturl2path', 'torch'} & sys.modules.keys()")
    nb.ok(
        remote(
            "from nturl2path import url2pathname\nfrom torch import Tensor\n"
            "def path(url): return url2pathname(url)\ndef tensor(): return Tensor"
        )
    )
    assert nb.value("{'nturl2path', 'torch'} & sys.modules.keys()") == set()
    assert nb.ok(remote("path('/a/b')")).value == nb.value("path('/a/b')") == "\\a\\b"
    assert nb.value("'torch' in sys.modules") is False


@pytest.mark.parametrize(
    ("body", "name", "line"),
    [("items.append(3)", "items", 2), ("\nx = 1\nitems[0] = 2", "items", 4), ("table['a'] = 1", "table", 2)],
)
def test_a_change_in_place_is_warned_about(nb: Notebook, body: str, name: str, line: int) -> None:
    nb.ok("items, table = [1], {}")
    cell = nb.ok(remote(body))
    assert f"[interp] line {line} changes {name!r} in place" in cell.stderr
    assert nb.value("items, table") == ([1], {})


def test_a_change_in_place_that_comes_back_is_not_warned_about(nb: Notebook) -> None:
    nb.ok("items = [1]")
    assert nb.ok(remote("items = [*items, 2]\nitems.append(3)\nown = []\nown.append(1)")).stderr == ""
    assert nb.value("items, own") == ([1, 2, 3], [1])


# ----------------------------------------------------------------------------------------- the last expression


def test_help_is_shown_instead_of_running_the_cell(nb: Notebook) -> None:
    shown = nb.ok(remote("was_run = True", "--help")).stdout
    assert "--timeout S" in shown
    assert "%remote restart" in shown
    assert nb.value("'was_run' in globals()") is False


def test_the_last_expression_is_shown_and_kept_as_a_real_value(nb: Notebook) -> None:
    cell = nb.ok(remote("part = 1\n{'n': [part, 2]}"))
    number = cell.reply["execution_count"]
    assert cell.value == {"n": [1, 2]}
    assert cell.contents("execute_result")[0]["execution_count"] == number
    assert nb.value("_['n'].append(3) or _") == {"n": [1, 2, 3]}
    assert nb.value(f"Out[{number}]") == {"n": [1, 2, 3]}


@pytest.mark.parametrize("body", ["5;", "None", "x = 5", "5; # said", "def f(): return 5", "# nothing"])
def test_nothing_is_shown_for(nb: Notebook, body: str) -> None:
    assert nb.ok(remote(body)).outputs == []


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("all", ["1", "2", "3"]), ("last_expr", ["3"]), ("none", []), ("last_expr_or_assign", ["3"])],
)
def test_ast_node_interactivity_is_honoured(nb: Notebook, mode: str, expected: list[str]) -> None:
    nb.ok(f"get_ipython().ast_node_interactivity = {mode!r}")
    try:
        cell = nb.ok(remote("1\n2\n3"))
        assigned = nb.ok(remote("y = 4"))
    finally:
        nb.ok("get_ipython().ast_node_interactivity = 'last_expr'")
    assert [c["data"]["text/plain"] for _, c in cell.outputs] == expected
    assert assigned.text == ("4" if mode == "last_expr_or_assign" else "")


def test_a_value_that_the_notebook_cannot_show_is_rendered_by_the_worker(nb: Notebook) -> None:
    cell = nb.ok(remote("class Shy:\n    def __repr__(self): return f'<shy in {__import__(\"os\").getpid()}>'\nShy()"))
    assert cell.text == f"<shy in {worker_pid(nb)}>"


def test_top_level_await_for_and_with(nb: Notebook) -> None:
    body = (
        "import asyncio\nasync def later(x):\n    await asyncio.sleep(0)\n    return x\n"
        "async def count():\n    for i in range(3): yield i\n"
        "got = [i async for i in count()] + [await later(9)]\nawait later(4)"
    )
    assert nb.ok(remote(body)).value == 4
    assert nb.value("got") == [0, 1, 2, 9]


def test_an_error_after_an_await_shows_the_cells_frames_only(nb: Notebook) -> None:
    body = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    {}['k']\nawait f()"
    failed = nb.run(remote(body))
    assert failed.ename == "KeyError"
    assert failed.traceback.count("----> ") == 2
    assert "----> 5     {}['k']" in failed.traceback
    assert "----> 6 await f()" in failed.traceback


# ------------------------------------------------------------------------------------------------------ options


def test_a_time_limit_ends_the_cell_and_keeps_the_worker(nb: Notebook) -> None:
    before = worker_pid(nb)
    cell = nb.run(remote("n = 1\nwhile True: pass", "--timeout 0.3"))
    assert cell.ename == "CallTimeoutError"
    assert "0.3 s" in cell.evalue
    assert cell.traceback.rstrip().endswith(f"CallTimeoutError: {cell.evalue}")
    assert "KeyboardInterrupt" not in cell.traceback
    assert nb.value("n") == 1
    assert worker_pid(nb) == before


def test_quiet_shows_only_warnings_and_errors(nb: Notebook) -> None:
    nb.ok("items = []")
    body = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nitems.append(1)\ndisplay(3)\n5"
    cell = nb.run(remote(body, "--quiet"))
    assert [kind for kind, _ in cell.outputs] == ["stream"]
    assert cell.stderr.startswith("[interp] line 5 changes 'items' in place")
    assert nb.run(remote("1/0", "--quiet")).ename == "ZeroDivisionError"


def test_a_background_cell_returns_a_job_at_once(nb: Notebook) -> None:
    nb.ok("go = 'job.go'")
    wait = "import os, time\nwhile not os.path.exists(go): time.sleep(0.01)\nmade = 8\nmade + 1"
    cell = nb.ok(remote(wait, "--background"))
    assert cell.text == "<Job running>"
    nb.ok("job = _\nopen(go, 'w').close()")
    assert nb.value("job.result(60), made, job.done()") == (9, 8, True)
    assert nb.ok("job").text == "<Job done>"


def test_a_background_cell_that_fails_shows_its_error_and_raises_it(nb: Notebook) -> None:
    cell = nb.run(remote("kept = 3\n{}['key']", "--background"))
    nb.ok("job = _")
    failed = nb.run("job.result(60)")
    assert (failed.ename, nb.value("kept")) == ("KeyError", 3)
    nb.wait(lambda: cell.ename == "KeyError")


@pytest.mark.parametrize(("options", "ename"), [("--background", "ShipError"), ("--background -i nil", "MagicError")])
def test_a_background_cell_that_can_not_be_sent_says_so_where_it_stands(nb: Notebook, options: str, ename: str) -> None:
    nb.ok("import threading\nguard = threading.Lock()")
    cell = nb.run(remote("guard", options))
    nb.wait(lambda: cell.ename == ename, 20)


def test_a_job_can_be_cancelled(nb: Notebook) -> None:
    cell = nb.ok(remote("print('on', flush=True)\nwhile True: pass", "--background"))
    nb.ok("job = _")
    nb.wait(lambda: "on" in cell.stdout)
    assert nb.value("job.cancel()") is True
    assert nb.run("job.result(60)").ename == "KeyboardInterrupt"
    assert nb.value("job.cancel()") is False


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--nope", "there is no option '--nope'"),
        ("--timout 3", "Did you mean '--timeout'? `%%remote --help` shows"),
        ("gpt2", "'gpt2' is one word too many"),
        ("--timeout soon", "'soon' is no number of seconds above 0"),
        ("--timeout -1", "'-1' is no number of seconds above 0"),
        ("--timeout nan", "'nan' is no number of seconds above 0"),
        ("-o", "expected one argument"),
        ("--keep 'x", "The magic's line \"--keep 'x\" can't be read: No closing quotation. Quote as in a shell."),
        ("--worker elsewhere", "No worker is called 'elsewhere'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(nb: Notebook, line: str, fragment: str) -> None:
    cell = nb.run(remote("ran = True", line))
    assert cell.ename == "MagicError"
    assert fragment in cell.evalue
    assert nb.value("'ran' in globals()") is False


# -------------------------------------------------------------------------------------------------------- verbs


def test_help_names_every_option_and_verb(nb: Notebook) -> None:
    text = nb.ok("%remote help").stdout
    for word in ("--worker", "-i", "-o", "--keep", "--timeout", "--background", "--quiet"):
        assert word in text
    for verb in ("start", "use", "status", "interrupt", "restart", "stop", "logs", "techniques", "help"):
        assert f"%remote {verb}" in text
    assert nb.ok("%remote").stdout == text


def test_help_of_start_lists_its_options_and_starts_nothing(nb: Notebook) -> None:
    text = nb.ok("%remote start demo --help").stdout
    assert text.startswith("%remote start [MODEL] [options]")
    assert "--hidden-system-prompt WHERE" in text
    assert nb.ok("%remote stop --help").stdout == nb.ok("%remote help").stdout


def test_options_without_effect_are_told_in_a_line(nb: Notebook) -> None:
    cell = nb.ok("%remote start --gpu A10G --deploy")
    assert cell.stderr == (
        "[interp] gpu has no effect on a local worker; device_map places the model.\n"
        "[interp] deploy has no effect on a local worker; it is for mode='modal'.\n"
    )


def test_a_second_name_for_workers_start_use_and_status(nb: Notebook) -> None:
    pid = worker_pid(nb)
    first = nb.ok("%remote status").stdout.split(":")[0].removeprefix("* ")
    ready = nb.ok("%remote start --name second --scaledown-window 120")
    assert f"pid {pid}; stays warm 2 min" in ready.stdout
    status = nb.ok("%remote status").stdout.splitlines()
    assert status[0].startswith(f"  {first}: idle, pid {pid}")
    assert status[1].startswith(f"* second: idle, pid {pid}")
    nb.ok(f"%remote use {first}")
    assert nb.ok("%remote status").stdout.startswith(f"* {first}")
    assert nb.ok(remote("__import__('os').getpid()", "--worker second")).value == pid


def test_after_a_start_that_fails_no_cell_runs_on_another_model(nb: Notebook) -> None:
    before = nb.ok("%remote status").stdout.partition("* ")[2].partition(":")[0]
    assert nb.run("%remote start /nowhere/at/all").ename == "LoadError"
    assert nb.run(remote("model.config.n_layer")).ename == "LoadError"
    nb.ok(f"%remote use {before}")
    assert nb.ok(remote("1 + 1")).value == 2


def test_a_handle_is_no_value_here(nb: Notebook) -> None:
    nb.ok(remote("held = [1, 2]", "--keep held"))
    for use in ("held[0]", "held + 1", "1 * held", "list(held)", "float(held)", "held()", "held.append(3)"):
        assert "or fetch() it" in nb.run(use).evalue.replace("fetch() it first", "fetch() it"), use


def test_a_handle_of_another_worker_is_refused(nb: Notebook) -> None:
    nb.ok("%remote start --name third")
    nb.ok(remote("theirs = [1]", "--keep theirs"))
    first = nb.ok("%remote status").stdout.split(":")[0].strip()
    nb.ok(f"%remote use {first}")
    cell = nb.run(remote("theirs"))
    assert cell.ename == "ShipError"
    assert "'theirs'" in cell.evalue


def test_interrupt_stops_background_cells(nb: Notebook) -> None:
    nb.ok(remote("while True: pass", "--background"))
    nb.ok("job = _")
    assert nb.ok("%remote interrupt").stdout == "1 background call stopped.\n"
    assert nb.run("job.result(60)").ename == "KeyboardInterrupt"
    assert nb.ok("%remote interrupt").stdout == "0 background calls stopped.\n"


def test_techniques_lists_the_packages_own_and_a_folders(nb: Notebook, tmp_path: Path) -> None:
    assert "logit_lens(model" in nb.ok("%remote techniques").stdout
    (tmp_path / "mine.py").write_text('def mine(model, tokenizer, n: int = 3):\n    """Count to n."""\n    return n\n')
    (tmp_path / "empty").mkdir()
    nothing = f"{tmp_path / 'empty'} holds no technique, a function of (model, tokenizer, ...).\n"
    assert nb.ok(f"%remote techniques {tmp_path / 'empty'}").stdout == nothing
    assert nb.ok(f"%remote techniques {tmp_path}").stdout == "mine(model, tokenizer, n=3)\n    Count to n.\n"


def test_logs_shows_what_reached_the_workers_own_output(nb: Notebook) -> None:
    late = "t = threading.Thread(target=lambda: (done.wait(60), print('written late')))\nt.start()"
    nb.ok(remote("import threading\ndone = threading.Event()\n" + late, "--keep done --keep t"))
    nb.ok(remote("done.set()\nt.join()"))
    assert "written late" in nb.ok("%remote logs").stdout


@pytest.mark.parametrize(
    ("line", "ename", "fragment"),
    [
        ("dance", "MagicError", "expected one of help, interrupt, logs"),
        ("strat demo", "MagicError", "Did you mean 'start'?"),
        ("use", "MagicError", "%remote use got nothing; usage: %remote use NAME."),
        ("use nobody", "MagicError", "No worker is called 'nobody'"),
        ("status now", "MagicError", "%remote status got 'now'; usage: %remote status."),
        ("stop this that", "MagicError", "got 'this' 'that'; usage: %remote stop [NAME]."),
        ("restart 1 2", "MagicError", "usage: %remote restart [NAME]."),
        ("start demo --dtype float1", "SpecError", "'float1'"),
        ("start demo --backend moon", "SpecError", "'moon'"),
        ("start demo --loader keras", "SpecError", "loader 'keras' is not known; expected one of transformers"),
        ("start demo --quantization {", "MagicError", "--quantization: '{' is no whole JSON object"),
        ("start demo --scaledown-window inf", "SpecError", "scaledown_window is inf"),
        ("start demo demo", "MagicError", "'demo' is one word too many"),
        ("start demo --bad", "MagicError", "there is no option '--bad'"),
        ("start demo --min-containers 3", "SpecError", "3"),
    ],
)
def test_a_wrong_line_is_refused_with_what_was_expected(nb: Notebook, line: str, ename: str, fragment: str) -> None:
    cell = nb.run(f"%remote {line}")
    assert cell.ename == ename
    assert fragment in cell.evalue
    assert nb.ok(remote("1 + 1")).value == 2
