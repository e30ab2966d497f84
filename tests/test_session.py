"""Calls that are cut, repeated, stopped, queued or orphaned: each runs once, ends well, and leaves the worker warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from interp_kernel import session as session_module
from interp_kernel.backends.local import LocalLink, process_exists
from interp_kernel.errors import CallTimeoutError, WorkerError
from interp_kernel.protocol import Head, Packed
from interp_kernel.session import Session
from interp_kernel.spec import WorkerSpec
from tests.helpers_worker import (
    DEMO,
    Answer,
    Connect,
    RecordingBackend,
    backend_of,
    press_stop,
    run_cell,
    sessions,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("no_warm_worker")

OWN = WorkerSpec(model_name=DEMO, attn_implementation="sdpa")  # a worker that this module may kill
# A stop that arrives before the long operation has begun must not end it either.
UNINTERRUPTIBLE = """
import hashlib
while True:
    try:
        print('ready', flush=True)
        hashlib.pbkdf2_hmac('sha256', b'p', b's', (1 << 31) - 1)
    except KeyboardInterrupt:
        pass"""


@pytest.fixture
def connect() -> Iterator[Connect]:
    with sessions() as connect:
        yield connect


@pytest.fixture
def session(connect: Connect) -> Session:
    """A client of the worker that all tests share."""
    return connect()


def gated(gate: Path) -> str:
    """A cell that says that it runs, and runs until a file is there."""
    return f"import os, time\nprint('ready', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.005)\n"


# ---------------------------------------------------------------------------- one call right after another


WOKEN = """
import pathlib, threading
ids = [t.native_id for t in threading.enumerate() if t.name == 'interp-connection']
facts = [pathlib.Path(f'/proc/self/task/{i}/status').read_text() for i in ids]
n = sum(int(text.partition('\\nvoluntary_ctxt_switches:')[2].split()[0]) for text in facts)
"""


def test_calls_one_after_another_wake_no_second_thread(session: Session) -> None:
    def hardly_wakes_one() -> bool:
        before = run_cell(session, WOKEN)["n"]
        for i in range(100):
            assert run_cell(session, "v = i + 1", i=i)["v"] == i + 1
        return bool(run_cell(session, WOKEN)["n"] - before < 50)

    wait_until(hardly_wakes_one, 60)  # not the first time, perhaps, on a busy machine


def test_a_stop_reaches_a_call_that_came_right_after_another(session: Session) -> None:
    for _ in range(5):
        assert run_cell(session, "v = 1")["v"] == 1
        answer = run_cell(session, "print('ready', flush=True)\nwhile True: pass", at={"ready": press_stop})
        assert answer.error == "KeyboardInterrupt: "


AFTER_A_CALL = {
    "half a message": (Packed({"verb": "hello"}).encode()[:-3], None),
    "a question": (Packed({"verb": "complete", "text": "model.conf", "names": {}, "request": 1}).encode(), "reply"),
    "a call that is none": (Packed({"verb": "submit"}).encode(), "the end"),
    "no message": (b"\0\0\0\1" + (5).to_bytes(8, "big") + b"{not ", "the end"),
    "another worker's call": (Packed({"verb": "submit", "id": "x", "generation": "y"}).encode(), "missing"),
}


@pytest.mark.parametrize("what", AFTER_A_CALL)
def test_whatever_follows_a_call_harms_no_other_client(what: str, connect: Connect) -> None:
    session, other = connect(), connect()
    rest, expected = AFTER_A_CALL[what]
    head = {"verb": "submit", "kind": "function", "id": session.new_id(), "generation": session.generation}
    call = Packed({**head, "client": session.client}, session.ship((lambda *_: "done", (), {})).frames)
    for _ in range(3):
        call.head["id"] = session.new_id()
        link = session.backend.attach(session.client)
        assert isinstance(link, LocalLink)
        link._channel.sock.sendall(call.encode() + rest[:5])
        result = link.receive(10)
        assert result is not None
        link._channel.sock.sendall(rest[5:])  # now, as a rule, the main thread waits for it
        assert (result[0]["event"], result[0]["call"]) == ("result", call.head["id"])
        try:
            after = link.receive(10 if expected else 0.05)
            assert (after and after[0]["event"]) == expected
        except (EOFError, ConnectionError):
            assert expected == "the end"
        assert run_cell(other, "v = 1", timeout=10)["v"] == 1
        link.close()
    wait_until(lambda: other.ask({"verb": "hello"})["clients"] == 2)


@pytest.mark.soak
def test_clients_that_hurry_and_stop_get_their_own_answers(connect: Connect) -> None:
    end = time.monotonic() + 20

    def hurry(session: Session, factor: int) -> int:
        n = 0
        while time.monotonic() < end:
            n += 1
            assert run_cell(session, f"v = n * {factor}", n=n)["v"] == n * factor
            if n % 7 == 0:
                assert session.ask({"verb": "complete", "text": "model.conf", "names": {}}, 10)
            time.sleep(n % 50 * 1e-4)  # pauses shorter and longer than the worker waits for the next call
        return n

    def stop(session: Session) -> int:
        n = 0
        while time.monotonic() < end:
            n += 1
            head = {"id": session.new_id()}
            call = threads.submit(run_cell, session, "while True: pass", head=head, timeout=10)
            wait_until(partial(session.interrupt, head["id"]))
            assert str(call.result().error).startswith("KeyboardInterrupt")
        return n

    with ThreadPoolExecutor() as threads:
        counts = [threads.submit(hurry, connect(), 2), threads.submit(hurry, connect(), 3)]
        counts.append(threads.submit(stop, connect()))
        assert all(count.result() >= 10 for count in counts)


# ------------------------------------------------------------------------------------------ exactly once


def test_the_same_call_id_runs_once(session: Session, tmp_path: Path) -> None:
    link = session.backend.attach(session.client)
    assert link is not None
    count = tmp_path / "count"
    cell = {"source": f"open({str(count)!r}, 'a').write('x')", "raw": "", "filename": "<c>", "line_offset": 0}
    head = {
        "verb": "submit",
        "kind": "cell",
        "id": session.new_id(),
        "client": session.client,
        "generation": session.generation,
        "cell": {**cell, "writes": [], "show": "none"},
    }

    def submit_until_last(**more: object) -> list[Head]:
        link.send(Packed({**head, **more}, session.ship({}).frames))
        events: list[Head] = []
        while not events or not events[-1].get("last", True):
            message = link.receive(10)
            assert message is not None
            events.append(message[0])
        return events

    first = submit_until_last()
    again = submit_until_last()
    assert first[-1]["event"] == "result"
    assert [e["seq"] for e in again] == [e["seq"] for e in first]
    forgotten = submit_until_last(acknowledge=[head["id"]])  # but not that it has run
    assert [e["event"] for e in forgotten] == ["forgotten"]
    link.close()
    assert count.read_text() == "x"


def test_a_result_that_was_dropped_is_an_error_and_no_second_run(session: Session, tmp_path: Path) -> None:
    head, count = {"id": session.new_id()}, tmp_path / "count"
    body = f"open({str(count)!r}, 'a').write('x')"
    run_cell(session, body, head=head)
    run_cell(session, "pass")  # which acknowledges the first
    with pytest.raises(WorkerError, match="The call has run, but its result was dropped"):
        run_cell(session, body, head=head)
    assert count.read_text() == "x"
    assert run_cell(session, "v = 1")["v"] == 1


def test_a_connection_that_is_cut_loses_and_repeats_nothing(session: Session, tmp_path: Path) -> None:
    cut = backend_of(session).cut
    count = tmp_path / "count"
    body = f"open({str(count)!r}, 'a').write('x')\nimport time\nfor i in range(300):\n    print(i, flush=True)\n"
    body += "    time.sleep(0.001)\nv = i"
    links = len(backend_of(session).links)
    answer = run_cell(session, body, at={f"\n{i}\n": cut for i in (3, 50, 51, 120, 250)})
    assert answer["v"] == 299
    assert answer.stdout == "".join(f"{i}\n" for i in range(300))
    assert count.read_text() == "x"
    assert len(backend_of(session).links) <= links
    cut()
    assert run_cell(session, "v = 2")["v"] == 2


def test_large_results_survive_a_cut(session: Session) -> None:
    cut = backend_of(session).cut
    body = "print('ready', flush=True)\nimport time, torch\ntime.sleep(0.05)\nv = torch.arange(1_000_000)"
    answer = run_cell(session, body, at={"ready": cut})
    assert int(answer["v"].sum()) == 999_999 * 500_000


# ------------------------------------------------------------------------------------------------ blobs


def test_an_unchanged_large_input_travels_once(session: Session) -> None:
    import torch

    x = torch.arange(2_000_000, dtype=torch.float32)
    total, sent = float(x.sum()), backend_of(session).sent

    def submitted() -> list[tuple[bool, int]]:
        """For each submission whether bytes went along, and how many the message itself had."""
        return [(p.file is not None, len(p.encode())) for p in sent if p.head["verb"] == "submit"]

    for _ in range(2):
        assert run_cell(session, "v = float(x.sum())\nx.zero_()", x=x)["v"] == pytest.approx(total)
    (first, n_first), (second, n_second) = submitted()
    assert (first, second) == (True, False)
    assert n_first < 5000
    assert n_second < 5000
    x[0] = 7.0
    assert run_cell(session, "v = float(x[0])", x=x)["v"] == 7.0
    assert submitted()[-1][0]

    evict = "import gc\nfor s in [o for o in gc.get_objects() if type(o).__name__ == 'BlobStore']: s._blobs.clear()"
    run_cell(session, evict)
    assert run_cell(session, "v = float(x[1])", x=x)["v"] == 1.0
    assert [went for went, _ in submitted()[-2:]] == [False, True]  # asked for, and sent again


# ------------------------------------------------------------------------------------------ two clients


DRAW = (
    "import random, numpy, torch\n"
    "v = (random.random(), float(numpy.random.rand()), torch.rand(1).item(), torch.nn.functional.dropout("
    "torch.ones(8), 0.5).tolist())"
)


def test_each_client_draws_what_it_would_draw_alone(connect: Connect) -> None:
    a, b, alone = connect(), connect(), connect()
    want = [run_cell(alone, DRAW)["v"] for _ in range(4)]
    mixed = [(run_cell(a, DRAW)["v"], run_cell(b, DRAW)["v"]) for _ in range(4)]
    assert [first for first, _ in mixed] == want
    assert [second for _, second in mixed] == want
    assert len(set(map(str, want))) == 4
    run_cell(a, "import torch\ntorch.manual_seed(1)")
    assert run_cell(b, DRAW)["v"] == run_cell(alone, DRAW)["v"]


def test_two_clients_at_once_get_their_own_output(connect: Connect) -> None:
    def work(tag: str) -> None:
        session = connect()
        for i in range(25):
            body = f"import os, sys\nprint('{tag}', {i})\nos.write(2, b'{tag}')\nv = '{tag}{i}'"
            answer = run_cell(session, body)
            assert (answer.stdout, answer.text("stderr"), answer["v"]) == (f"{tag} {i}\n", tag, f"{tag}{i}")

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, "ab"))


def test_a_long_queue_of_one_client_does_not_delay_anothers_call(connect: Connect, tmp_path: Path) -> None:
    busy, other = connect(), connect()
    gate = tmp_path / "gate"
    run_cell(busy, "import builtins\nbuiltins.order = []")
    running = threading.Event()
    with ThreadPoolExecutor(30) as pool:
        first = pool.submit(run_cell, busy, gated(gate) + "order.append('a')", at={"ready": running.set})
        assert running.wait(20)
        queued = threading.Semaphore(0)
        rest = [pool.submit(run_cell, busy, "order.append('a')", at={"waiting for": queued.release}) for _ in range(20)]
        assert all(queued.acquire(timeout=20) for _ in rest)
        answer = run_cell(other, "v = list(order)", at={"waiting for": gate.touch})
        assert answer["v"] == ["a"]
        assert [f.result().error for f in [first, *rest]] == [None] * 21
    assert run_cell(other, "v = len(order)")["v"] == 21


# ---------------------------------------------------------------------------------------------- stops

GENERATE = """
import torch
model.register_forward_pre_hook(lambda *_: print('ready', flush=True))
while True:
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
"""
# Python swallows what a finalizer raises, a stop too.
FINALIZER = """
class Slow:
    def __del__(self):
        print('ready', flush=True)
        while True: pass

Slow()
while True: pass
"""
LOOPS = {
    "loop": "print('ready', flush=True)\nwhile True: pass",
    "comprehension": "print('ready', flush=True)\n[i for i in iter(int, 1)]",
    "sleep": "import time\nprint('ready', flush=True)\ntime.sleep(600)",
    "subprocess": "import subprocess\nsubprocess.run(['sh', '-c', 'echo ready; exec sleep 600'])",
    "generate": GENERATE,
    "await": "import asyncio\nprint('ready', flush=True)\nawait asyncio.sleep(600)",
    "lock": "import threading\nprint('ready', flush=True)\nthreading.Event().wait()",
    "finalizer": FINALIZER,
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_stop_ends_the_call_and_keeps_the_worker(kind: str, session: Session) -> None:
    pid, held = session.hello["pid"], run_cell(session, "kept = [5]", head={"keep": ["kept"]})["kept"]
    start = time.monotonic()
    answer = run_cell(session, "before = 1\n" + LOOPS[kind], at={"ready": press_stop})
    assert time.monotonic() - start < 5
    assert answer.error is not None
    assert answer.error.startswith(("KeyboardInterrupt", "CancelledError"))
    assert answer.result is not None
    assert answer.result.values["before"] == 1
    assert run_cell(session, "v = kept[0]", kept=held)["v"] == 5
    assert session.hello["pid"] == pid
    assert session.loads <= 1


STARTS = """
import subprocess, time
{name} = subprocess.Popen(["sleep", "600"], start_new_session={apart}).pid
time.sleep(0.02)  # Linux tells a process's start in steps of 10 ms
"""


def test_a_stop_reaches_what_the_call_has_started_and_nothing_older(session: Session) -> None:
    older = run_cell(session, STARTS.format(name="older", apart=False))["older"]
    body = STARTS.format(name="own", apart=False) + STARTS.format(name="apart", apart=True)
    answer = run_cell(session, body + "print('ready', flush=True)\nwhile True: pass", at={"ready": press_stop})
    assert answer.error == "KeyboardInterrupt: "
    assert answer.result is not None
    own, *others = (psutil.Process(pid) for pid in (*map(answer.result.values.get, ("own", "apart")), older))
    try:
        wait_until(lambda: not own.is_running() or own.status() == psutil.STATUS_ZOMBIE)
        assert {process.status() for process in others} == {psutil.STATUS_SLEEPING}
    finally:
        for process in others:
            process.kill()


def test_a_stop_hammered_while_printing_hurts_no_later_call(session: Session) -> None:
    for i in range(30):
        answer = run_cell(session, "while True: print('x' * 50)", at={"x": press_stop})
        assert answer.error == "KeyboardInterrupt: "
        assert set(answer.stdout) <= {"x", "\n"}
        assert run_cell(session, f"print({i})").stdout == f"{i}\n"


def test_a_stop_and_a_limit_are_heeded_while_events_keep_coming(session: Session) -> None:
    flood = "n = 0\nwhile True:\n    n += 1\n    display({'text/plain': 'x' * 2000}, raw=True)"
    answer = Answer()
    first: list[Head] = []

    def stop_at_first(event: Head) -> None:
        if event["event"] == "display" and not first:
            first.append(event)
            press_stop()

    answer.on_event = stop_at_first
    start = time.monotonic()
    assert run_cell(session, flood, answer=answer).error == "KeyboardInterrupt: "
    assert "CallTimeoutError" in str(run_cell(session, flood, timeout=0.2).error)
    assert time.monotonic() - start < 10


def test_a_call_may_catch_the_stop(session: Session) -> None:
    body = "try:\n    print('ready', flush=True)\n    while True: pass\nexcept KeyboardInterrupt:\n    v = 'caught'"
    assert run_cell(session, body, at={"ready": press_stop})["v"] == "caught"
    assert run_cell(session, "v = 1")["v"] == 1


def test_a_stop_ends_a_queued_call_and_not_the_one_that_runs(connect: Connect, tmp_path: Path) -> None:
    busy, waiting = connect(), connect()
    gate, running = tmp_path / "gate", threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_cell, busy, gated(gate) + "v = 'ran'", at={"ready": running.set})
        assert running.wait(20)
        answer = run_cell(waiting, "v = 1", at={"waiting for 1 other call": press_stop})
        assert answer.error == "KeyboardInterrupt: stopped before it began"
        gate.touch()
        assert first.result()["v"] == "ran"


def test_a_client_cannot_stop_what_it_does_not_run(connect: Connect, tmp_path: Path) -> None:
    a, b = connect(), connect()
    gate, running = tmp_path / "gate", threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_cell, a, gated(gate) + "v = 'ran'", at={"ready": running.set})
        assert running.wait(20)
        assert b.interrupt(b.new_id()) is False
        gate.touch()
        assert first.result()["v"] == "ran"


def test_a_stop_during_the_load_ends_the_worker() -> None:
    session = Session(RecordingBackend(WorkerSpec(model_name=DEMO, dtype="float16")))

    def stop_once(_: Head) -> None:
        if not stopped:
            stopped.append(session.hello["pid"])
            press_stop()

    stopped: list[int] = []
    with pytest.raises(KeyboardInterrupt, match="the load was stopped"):
        session.connect(stop_once)
    session.close()
    psutil.wait_procs([psutil.Process(pid) for pid in stopped if psutil.pid_exists(pid)], timeout=20)
    assert not process_exists(stopped[0])
    assert session.backend.why_ended(stopped[0]) == "the model was not loaded: its load was stopped"


# ------------------------------------------------------------------------------------------ time limits


def test_a_time_limit_stops_the_call_and_keeps_the_worker(session: Session) -> None:
    pid = session.hello["pid"]
    answer = run_cell(session, "while True: pass", timeout=0.2)
    assert answer.error == "CallTimeoutError: the call ran past its limit of 0.2 s"
    assert run_cell(session, "v = 1", timeout=30)["v"] == 1
    assert session.hello["pid"] == pid


def test_what_does_not_react_is_killed_by_the_limit_or_the_second_stop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GRACE_S", 0.3)
    session = connect(OWN)
    pid = session.hello["pid"]
    run = run_cell(session, "activations = [1]", head={"keep": ["activations"]})
    assert repr(run["activations"]) == "<RemoteValue list of 1>"
    with pytest.raises(CallTimeoutError, match=r"limit of 0\.2 s; the worker did not react .* was killed.*activations"):
        run_cell(session, UNINTERRUPTIBLE, timeout=0.2)
    assert not process_exists(pid)

    answer = Answer()
    with pytest.raises(KeyboardInterrupt, match="killed by the second stop; the next call starts a new one"):
        run_cell(session, UNINTERRUPTIBLE, answer=answer, at={"ready": press_stop, "stop again to kill": press_stop})
    assert "still inside one long operation after 0.3 s" in answer.warnings
    assert session.loads == 2


# --------------------------------------------------------------------------------------------- orphans


def test_the_call_of_a_killed_client_ends_after_5_s_and_its_background_call_runs(
    session: Session, tmp_path: Path
) -> None:
    ended, ran = tmp_path / "ended", tmp_path / "ran"
    endless = (
        "import time\nprint('ready', flush=True)\ntry:\n    while True: time.sleep(0.01)\nexcept BaseException as e:\n"
    )
    endless += f"    open({str(ended)!r}, 'w').write(type(e).__name__)\n    raise"
    code = f"""if True:
        import json, sys, threading
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from tests.helpers_worker import *
        session = Session(LocalBackend(WorkerSpec(model_name=DEMO)))
        def queue_another():
            body = "open({str(ran)!r}, 'w').write('ran')"
            act = {{'waiting for': lambda: print('queued', flush=True)}}
            start = lambda: run_cell(session, body, head={{'background': True}}, at=act)
            threading.Thread(target=start, daemon=True).start()
        run_cell(session, {endless!r}, at={{'ready': queue_another}})
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "queued\n"
        client.kill()
    start = time.monotonic()
    answer = run_cell(session, f"v = open({str(ended)!r}).read()")
    assert answer["v"] == "KeyboardInterrupt"
    assert 4 < time.monotonic() - start < 20
    run_cell(session, "pass")  # the other client's turn was before this one
    assert ran.read_text() == "ran"
    assert session.loads <= 1


def test_hello_tells_who_is_there(connect: Connect) -> None:
    a, b = connect(), connect()
    wait_until(lambda: a.ask({"verb": "hello"})["clients"] == 2)  # those of earlier tests are leaving
    hello = a.ask({"verb": "hello"})
    assert (hello["state"], hello["damage"]) == ("idle", [])
    assert hello["generation"] == a.generation == b.generation
    assert psutil.pid_exists(hello["pid"])
    busy: list[Head] = []
    run_cell(a, "print('ready', flush=True)", at={"ready": lambda: busy.append(b.ask({"verb": "hello"}))})
    assert json.dumps(busy[0]["info"]) == json.dumps(hello["info"])
    assert os.getpid() != hello["pid"]


def test_a_client_that_asks_after_it_has_left_leaves_again(connect: Connect) -> None:
    left, other = connect(), connect()
    left.close()
    wait_until(lambda: other.ask({"verb": "hello"})["clients"] == 1)
    assert left.ask({"verb": "hello"})["clients"] == 2
    wait_until(lambda: other.ask({"verb": "hello"})["clients"] == 1)


def test_a_worker_ends_although_it_can_t_say_why(connect: Connect) -> None:
    session = connect(WorkerSpec(model_name=DEMO, dtype="bfloat16"))
    pid = session.hello["pid"]
    (backend_of(session).folder / "reason").mkdir()  # as where the disk is full, it can't be written
    session.stop()
    assert not psutil.pid_exists(pid)
    (backend_of(session).folder / "reason").rmdir()


def test_a_worker_that_hangs_can_be_ended(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp_kernel.backends.local.HELLO_S", 0.5)
    session = connect(WorkerSpec(model_name=DEMO, dtype="bfloat16"))
    worker = psutil.Process(session.hello["pid"])
    worker.suspend()
    session.stop()
    assert not worker.is_running()


def test_what_is_dropped_while_the_client_is_away_is_freed(connect: Connect) -> None:
    session = connect()
    mark = "class Mark: pass\nimport gc\n"
    held = [run_cell(session, f"{mark}a = Mark()", head={"keep": ["a"]})["a"] for _ in range(2)]
    count = "import gc\nn = sum(type(o).__name__ == 'Mark' for o in gc.get_objects())"
    assert run_cell(session, count)["n"] == 2
    session.close()
    held.pop()
    wait_until(lambda: session._unreleased)
    assert run_cell(session, count)["n"] > 0
    held.pop()
    wait_until(lambda: run_cell(session, count)["n"] == 0)
