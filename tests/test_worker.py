"""What a call shows, returns and raises, however badly it behaves. All tests share a worker, and it survives them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interp_kernel.errors import ShipError
from interp_kernel.protocol import Packed
from interp_kernel.session import RemoteValue, Session
from interp_kernel.worker.events import SHOWN_CHARS, CallLog, Flusher
from tests.helpers_worker import Answer, press_stop, run_cell, sessions


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with sessions() as connect:
        session = connect()
        pid = session.hello["pid"]
        yield session
        assert session.ask({"verb": "hello"})["pid"] == pid, "one of the tests has ended the worker"


# ---------------------------------------------------------------------------------------------- output

FORK = """
import os, sys, warnings
warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 and newer warn of a fork beside threads
if (child := os.fork()) == 0:
    print('child')
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)"""


@pytest.mark.parametrize(
    ("body", "stdout", "stderr"),
    [
        ("print('a', 'b', sep='\\n')", "a\nb\n", ""),
        ("import sys\nprint('e', file=sys.stderr)\nprint('o')", "o\n", "e\n"),
        ("import sys\n_ = sys.stdout.buffer.write(b'\\xff\\x00 \\xc3\\xa9\\n')", "\\xff\0 é\n", ""),
        ("import os\n_ = os.write(1, b'\\x80raw\\n')", "\\x80raw\n", ""),
        ("print('\\ud800', '\\U0001f600')", "\\ud800 \U0001f600\n", ""),
        ("import ctypes\nc = ctypes.CDLL(None)\n_ = c.puts(b'from C'); _ = c.fflush(None)", "from C\n", ""),
        ("import os\n_ = os.system('echo out; echo err >&2')", "out\n", "err\n"),
        ("import subprocess\n_ = subprocess.run(['printf', 'x\\\\377y'])", "x\\xffy", ""),
        ("import sys\nsys.stdout.writelines(['a', 'b'])", "ab", ""),
        (
            "import threading\nt = threading.Thread(target=print, args=['in a thread'])\nt.start(); t.join(); del t",
            "in a thread\n",
            "",
        ),
        (FORK, "child\n", ""),
        ("import logging\nlogging.getLogger('x').warning('careful')", "", "careful\n"),
        (
            "import warnings\nwarnings.warn_explicit('beware', UserWarning, 'f.py', 3)",
            "",
            "f.py:3: UserWarning: beware\n",
        ),
    ],
)
def test_all_output_shows_in_its_own_stream(body: str, stdout: str, stderr: str, session: Session) -> None:
    answer = run_cell(session, body)
    assert answer.error is None
    assert (answer.stdout, answer.text("stderr")) == (stdout, stderr)


def test_python_and_subprocess_output_keep_their_order(session: Session) -> None:
    body = "import os\nfor i in range(5):\n    print('python', i, flush=True)\n    _ = os.system(f'echo shell {i}')"
    lines = run_cell(session, body).stdout.splitlines()
    assert sorted(lines) == sorted([f"{who} {i}" for i in range(5) for who in ("python", "shell")])
    for who in ("python", "shell"):
        assert [line for line in lines if line.startswith(who)] == [f"{who} {i}" for i in range(5)]


@pytest.mark.parametrize("kind", ["thread", "subprocess"])
def test_what_outlives_its_call_does_not_print_into_the_next(kind: str, session: Session, tmp_path: Path) -> None:
    gate, done = tmp_path / "gate", tmp_path / "done"
    if kind == "thread":
        body = f"""
import os, threading, time
def late():
    while not os.path.exists({str(gate)!r}): time.sleep(0.005)
    print('late')
    open({str(done)!r}, 'w').close()
threading.Thread(target=late).start()
print('first')"""
    else:
        script = f"while ! [ -e {gate} ]; do sleep 0.01; done; echo late; echo late >&2; : > {done}"
        body = f"import subprocess\nsubprocess.Popen(['sh', '-c', {script!r}])\nprint('first')"
    assert run_cell(session, body).stdout == "first\n"
    wait = (
        f"import os, time\nopen({str(gate)!r}, 'w').close()\nwhile not os.path.exists({str(done)!r}): time.sleep(0.005)"
    )
    answer = run_cell(session, f"{wait}\nprint('second')")
    assert (answer.stdout, answer.text("stderr")) == ("second\n", "")


def test_new_threads_print_although_old_ones_have_just_ended(session: Session) -> None:
    """The system gives the identity of an ended thread to the next one."""
    run_cell(session, "import builtins, threading\nbuiltins.gate = threading.Event()\nbuiltins.old = []")
    run_cell(
        session,
        "import threading\nfor _ in range(10):\n    old.append(threading.Thread(target=gate.wait)); old[-1].start()",
    )
    body = "import threading\ngate.set()\n[t.join() for t in old]\nfor i in range(10):\n"
    body += "    t = threading.Thread(target=print, args=[i]); t.start(); t.join()\ndel t"
    assert run_cell(session, body).stdout == "".join(f"{i}\n" for i in range(10))


def test_a_subprocess_that_never_stops_printing_does_not_hold_its_call(session: Session) -> None:
    body = "import subprocess\np = subprocess.Popen(['yes'])\np.stdout\nkept = p\nprint('started')"
    answer = run_cell(session, body, head={"keep": ["kept", "p"]}, timeout=20)
    assert answer.error is None
    assert "started\n" in answer.stdout
    assert run_cell(session, "kept.kill(); kept.wait()\nprint('over')", kept=answer["kept"]).stdout == "over\n"


def test_closed_descriptors_are_opened_again(session: Session) -> None:
    run_cell(session, "import os\nos.close(1)\nos.close(2)")
    for _ in range(2):
        answer = run_cell(session, "import os\nprint('python')\n_ = os.write(1, b'descriptor\\n')")
        assert answer.error is None
        assert sorted(answer.stdout.split()) == ["descriptor", "python"]


def test_200_000_lines_arrive(session: Session) -> None:
    answer = run_cell(session, "for i in range(200_000): print('line', i)")
    assert answer.stdout == "".join(f"line {i}\n" for i in range(200_000))
    assert len(answer.events) < 2000  # joined, or a notebook could not keep up


def overflow_file(answer: Answer) -> Path:
    assert "MB is not shown; all of it is in " in answer.warnings
    return Path(answer.warnings.split("all of it is in ")[1].split("\n")[0])


def test_output_over_the_cap_is_cut_and_kept_whole_in_the_named_file(session: Session) -> None:
    answer = run_cell(session, "for i in range(70_000): print(f'{i:099}')")
    whole = "".join(f"{i:099}\n" for i in range(70_000))
    assert overflow_file(answer).read_text() == whole
    assert SHOWN_CHARS <= len(answer.stdout) < SHOWN_CHARS * 1.1
    assert whole.startswith(answer.stdout)
    assert run_cell(session, "print('next')").stdout == "next\n"


def test_endless_output_is_capped_and_can_be_stopped(session: Session) -> None:
    answer = run_cell(session, "while True: print('x' * 999)", at={"all of it is in": press_stop})
    assert answer.error == "KeyboardInterrupt: "
    assert len(answer.stdout) < SHOWN_CHARS * 1.1
    assert overflow_file(answer).stat().st_size >= SHOWN_CHARS


def test_a_full_disk_loses_the_overflow_and_says_so(tmp_path: Path) -> None:
    events: list[Packed] = []
    (tmp_path / "output-id.log").symlink_to("/dev/full")
    log = CallLog("id", "client", tmp_path, Flusher())
    log.listen(lambda packed: not events.append(packed), 0)  # type: ignore[func-returns-value]
    for _ in range(70):
        log.write("stdout", "x" * 99_999 + "\n")
    log.emit({"event": "result"}, last=True)
    heads = [packed.head for packed in events]
    warnings = [head["text"] for head in heads if head["event"] == "warning"]
    assert any("output-id.log can't be written: [Errno 28]" in text for text in warnings)
    assert heads[-1]["event"] == "result"
    assert [head["seq"] for head in heads] == list(range(1, len(heads) + 1))


def test_the_end_of_a_log_reaches_a_listener_that_comes_late() -> None:
    log = CallLog("id", "client", Path("/nowhere"), Flusher())
    log.write("stdout", "a")
    log.emit({"event": "result"}, last=True)
    seen: list[Packed] = []
    log.listen(lambda packed: not seen.append(packed), 1)  # type: ignore[func-returns-value]
    assert [packed.head["event"] for packed in seen] == ["result"]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        (
            "input('name? ')",
            "EOFError: input('name? ') was called in a remote cell, which has no stdin. Ask in a local",
        ),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise GeneratorExit('odd')", "GeneratorExit: odd"),
        ("class Own(Exception): pass\nraise Own('x', 2)", "Own: ('x', 2)"),
        (
            "class Bad(Exception):\n    def __str__(self): raise ValueError\nraise Bad",
            "Bad: <its message could not be made",
        ),
        ("raise ExceptionGroup('two', [ValueError('a'), KeyError('b')])", "ExceptionGroup: two (2 sub-exceptions)"),
        ("raise ValueError('x' * 10_000_000)", "ValueError: xxx"),
        ("import torch\nmodel(torch.tensor([[10**9]]))", "IndexError: index out of range"),
        ("async def f(): raise OSError('later')\nawait f()", "OSError: later"),
    ],
)
def test_errors_keep_their_name_and_show_the_cells_own_line(body: str, error: str, session: Session) -> None:
    answer = run_cell(session, "first = 1\n" + body)
    assert answer.error is not None
    assert answer.error.startswith(error)
    last = len(body.splitlines()) + 1
    assert f"----> {last}\x1b[0m {body.splitlines()[-1][:40]}" in answer.traceback
    assert "interp_kernel" not in answer.traceback
    assert len(answer.traceback) < 20_000
    assert answer.result is not None
    assert answer.result.values["first"] == 1
    assert run_cell(session, "v = 1")["v"] == 1


def test_endless_recursion_is_a_short_error_soon(session: Session) -> None:
    start = time.monotonic()
    answer = run_cell(session, "def f(n): return f(n + 1)\nf(0)")
    assert str(answer.error).startswith("RecursionError: maximum recursion depth exceeded")
    assert len(answer.traceback.splitlines()) < 80
    assert "more frames ..." in answer.traceback
    assert time.monotonic() - start < 5
    assert run_cell(session, "def f(n): return n and f(n - 1)\nv = f(500)")["v"] == 0


def test_an_exception_keeps_no_values_alive(session: Session) -> None:
    body = "import builtins, weakref\nclass Big: pass\ndef f():\n    b = Big()\n"
    body += "    builtins.probe = weakref.ref(b)\n    1 / 0\nf()"
    assert "ZeroDivisionError" in str(run_cell(session, body).error)
    assert run_cell(session, "import gc\ngc.collect()\nv = probe() is None")["v"] is True


def test_a_process_forked_in_a_call_does_not_become_a_second_worker(session: Session) -> None:
    """The child returns from the cell as its parent does."""
    body = "import os\npid = os.fork()\nif pid: status = os.waitpid(pid, 0)[1]"
    answer = run_cell(session, body, timeout=20)
    assert answer["status"] == 0
    assert run_cell(session, "v = 1")["v"] == 1


def test_multiprocessing_works_in_a_call(session: Session) -> None:
    body = (
        "import multiprocessing\nwith multiprocessing.get_context('fork').Pool(2) as pool: v = pool.map(abs, [-1, 2])"
    )
    assert run_cell(session, body, timeout=30)["v"] == [1, 2]


# ---------------------------------------------------------------------------------------------- results


def test_tensors_come_back_in_their_dtype(session: Session) -> None:
    import torch

    answer = run_cell(
        session, "import torch\nv = {k: torch.tensor([1.5, -2]).to(k) for k in (torch.bfloat16, torch.float8_e5m2)}"
    )
    for kind, tensor in answer["v"].items():
        assert (tensor.dtype, tensor.device.type, tensor.float().tolist()) == (kind, "cpu", [1.5, -2.0])
    assert torch.bfloat16 in answer["v"]


def test_what_does_not_pickle_or_is_large_stays_as_a_handle(session: Session) -> None:
    body = "import threading, torch\nlock = threading.Lock()\nbig = torch.ones(3_000_000)\nsmall = 1\nboth = [lock, 2]"
    answer = run_cell(session, body)
    lock, big, both = answer["lock"], answer["big"], answer["both"]
    assert answer["small"] == 1
    assert repr(big) == "<RemoteValue torch.Tensor 3000000 float32 cpu 12.0 MB>"
    assert all(isinstance(value, RemoteValue) for value in (lock, big, both))
    assert "'lock' stays on the worker as a RemoteValue: it can't be pickled (" in answer.notes
    assert "'big'" not in answer.notes
    assert run_cell(session, "v = (both[0] is lock, float(big.sum()))", lock=lock, big=big, both=both)["v"] == (
        True,
        3e6,
    )
    assert float(big.fetch().sum()) == 3e6
    with pytest.raises(Exception, match=r"cannot pickle '_thread\.lock' object"):
        lock.fetch()


def test_bytecode_does_not_go_to_a_notebook_of_another_python(session: Session) -> None:
    """There it would crash the kernel when it is called. It stays, and remote code can use it."""
    body = "def double(n): return 2 * n\nclass Own: n = 4\nown, number = Own(), 5"
    answer = run_cell(session, body, head={"python": [3, 2]})
    held = {name: answer[name] for name in ("double", "Own", "own")}
    assert all(isinstance(value, RemoteValue) for value in held.values())
    assert answer["number"] == 5
    ours = ".".join(map(str, sys.version_info[:2]))
    assert (
        f"'double' stays on the worker as a RemoteValue: it can't be pickled (it holds bytecode of Python {ours}, "
        in (answer.notes)
    )
    assert run_cell(session, "v = double(own.n)", **held)["v"] == 8
    ours_too = run_cell(session, body)
    assert ours_too["double"](ours_too["own"].n) == 8


def test_a_value_that_can_not_be_imported_here_costs_no_other(session: Session) -> None:
    body = """
import sys, types
sys.modules['only_there'] = only = types.ModuleType('only_there')
exec("class Odd(list):\\n    def __init__(self, n=0): self.n = n\\ndef make(n): return n", vars(only))
odd, pair, kind, fine = only.Odd(3), [only.Odd(4), 5], only.Odd, 6
odd.append(1)
"""
    answer = run_cell(session, body)
    assert (answer["fine"], answer["pair"][1]) == (6, 5)
    assert repr(answer["odd"]) == "<only_there.Odd, which can't be imported here>"
    assert "only_there.Odd can't be imported here (No module named 'only_there'), so what came back" in answer.notes
    with pytest.raises(ShipError, match=r"holds nothing\. Leave the value on the worker"):
        session.ship(answer["odd"])


def test_a_result_of_1_gb_comes_whole(session: Session) -> None:
    answer = run_cell(session, "import torch\nv = torch.zeros(250_000_000)\nv[-1] = 7", head={"want": ["v"]})
    value = answer["v"]
    assert (value.nbytes, float(value[-1]), float(value[123])) == (10**9, 7.0, 0.0)


def test_the_model_goes_nowhere_and_costs_nothing(session: Session) -> None:
    answer = run_cell(session, "m = model\npair = [model, 3]\nd = model.device")
    assert answer.result is not None
    assert repr(answer.result.values["m"]) == "<RemoteValue the worker's model>"
    assert answer["pair"][1] == 3
    assert repr(answer["pair"][0]) == "<RemoteValue the worker's model>"
    assert run_cell(session, "v = pair[0] is model", pair=answer["pair"])["v"] is True


def test_display_and_progress_are_events_of_their_call(session: Session) -> None:
    body = "from tqdm.auto import tqdm\nfor i in tqdm(range(3), desc='steps'): pass\n"
    body += "display({'text/plain': 'shown'}, raw=True)\n1 + 1"
    answer = run_cell(session, body)
    kinds = [(e["event"], e.get("text") or e.get("data")) for e in answer.events]
    assert kinds[-1] == ("display", {"text/plain": "shown"})
    done = [e for e in answer.events if e["event"] == "progress" and e["done"]]
    assert [(e["text"], e["n"], e["total"]) for e in done] == [("steps", 3, 3)]
    assert answer.head["display"]["data"] == {"text/plain": "2"}


def test_names_on_the_worker_are_completed_while_a_call_runs(session: Session) -> None:
    found: list[list[str]] = []
    ask = {"verb": "complete", "text": "x = model.transform", "names": {}}
    body = "import time\nprint('ready', flush=True)\ntime.sleep(0.2)"
    run_cell(session, body, at={"ready": lambda: found.append(session.ask(ask))})
    assert found == [["model.transformer"]]


def test_a_call_sees_only_its_own_names(session: Session) -> None:
    run_cell(session, "secret = 5\ndef helper(): return secret")
    assert "NameError" in str(run_cell(session, "secret").error)
    assert run_cell(session, "v = sorted(n for n in globals() if not n.startswith('__'))")["v"] == [
        "get_ipython",
        "model",
        "tokenizer",
    ]


def test_times_say_where_a_call_spent_them(session: Session) -> None:
    times = run_cell(session, "import time\ntime.sleep(0.1)").head["times"]
    assert 0.1 <= times["run_s"] < 5
    assert times["queue_s"] < 5
