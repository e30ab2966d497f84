"""What one client, one call or one failure must not do to the next; each was once found broken."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from interp_kernel import InterpClient
from interp_kernel.backends.local import LocalBackend, list_workers, process_exists, runtime_root, stop_worker
from interp_kernel.errors import CallTimeoutError
from interp_kernel.protocol import BLOB_MIN, MOST_FILES, BlobStore, Packed
from interp_kernel.session import Session, Stops
from interp_kernel.spec import WorkerSpec
from tests.helpers_worker import Answer, Connect, run_cell, sessions, wait_until


@pytest.fixture
def connect() -> Iterator[Connect]:
    with sessions() as open_session:
        yield open_session


def kept(session: Session, text: str) -> Any:
    return run_cell(session, f"value = [{text!r}]", head={"keep": ["value"]})["value"]


def at_the_end(link: Any, act: Callable[[], object]) -> None:
    """Do something when the result of a call has just been read from the link."""
    receive = link.receive

    def received(*args: Any) -> Any:
        message = receive(*args)
        if message is not None and message[0].get("last"):
            act()
        return message

    link.receive = received


def packed_blob(byte: int, known: set[str]) -> Packed:
    return Packed({}, [bytes([byte]) * BLOB_MIN], known)


def test_a_handle_of_an_ended_worker_never_means_a_value_of_the_next_one(connect: Connect) -> None:
    a, b = connect(), connect()
    old, dropped = kept(a, "a's"), kept(a, "a's too")
    b.stop()
    b.connect()
    new = [kept(b, f"b's {i}") for i in range(3)]
    del dropped
    with pytest.raises(LookupError, match="was lost"):
        old.fetch()
    wait_until(lambda: not a._unreleased)
    assert [value.fetch() for value in new] == [["b's 0"], ["b's 1"], ["b's 2"]]


def test_a_new_blob_does_not_push_out_one_of_the_same_message() -> None:
    store, first = BlobStore(limit_bytes=BLOB_MIN), packed_blob(1, {"none"})
    store.frames(first.head, first.inline, first.file)
    both = Packed({}, [bytes([2]) * BLOB_MIN, bytes([1]) * BLOB_MIN], first.digests)
    assert [bytes(frame)[:1] for frame in store.frames(both.head, both.inline, both.file)] == [b"\2", b"\1"]
    assert store.nbytes == BLOB_MIN


def test_the_store_keeps_few_descriptors() -> None:
    store, before = BlobStore(), len(os.listdir("/proc/self/fd"))
    for byte in range(MOST_FILES + 50):
        blob = packed_blob(byte, {"none"})
        store.frames(blob.head, blob.inline, blob.file)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * MOST_FILES + 2


def test_a_client_that_has_left_leaves_no_thread(connect: Connect) -> None:
    worker = psutil.Process(connect().hello["pid"])
    before = worker.num_threads()
    for _ in range(5):
        session = connect()
        run_cell(session, "value = b'x' * 900_000")
        session.close()
    wait_until(lambda: worker.num_threads() <= before)


def test_a_client_interrupts_calls_of_its_own_only() -> None:
    with InterpClient() as a, InterpClient() as b:
        job = a.submit(lambda model, tokenizer: __import__("time").sleep(60))
        wait_until(lambda: (b.session.ask({"verb": "hello"}) or {}).get("running"))
        assert not b.interrupt()
        assert a.interrupt()
        with pytest.raises(KeyboardInterrupt):
            job.result(20)


def test_an_error_of_a_callback_is_raised(connect: Connect) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError("the reader has left")

    with pytest.raises(BrokenPipeError, match="the reader has left"):
        run_cell(connect(), "print(1)", answer=Answer(on_event=fail))


def test_a_time_limit_holds_for_a_call_that_swallows_the_stop_and_goes_on_printing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interp_kernel.session.GRACE_S", 0.5)
    body = "import time\nwhile True:\n    try:\n        while True: print('.'); time.sleep(0.05)\n"
    with pytest.raises(CallTimeoutError, match="was killed"):
        run_cell(connect(), f"{body}    except KeyboardInterrupt: pass", timeout=0.5)


def test_a_stop_that_comes_with_the_result_is_not_swallowed(connect: Connect) -> None:
    session = connect()
    at_the_end(session._links[-1], lambda: signal.raise_signal(signal.SIGINT))
    answer = run_cell(session, "value = 1")
    assert (answer.error or "").startswith("KeyboardInterrupt: stopped when the call had just ended")
    assert answer.result is not None
    assert answer.result.values["value"] == 1


def test_a_stop_that_the_call_handles_is_no_error(connect: Connect) -> None:
    body = "import time\ntry:\n    print('in'); time.sleep(60)\nexcept KeyboardInterrupt:\n    value = 'handled'"
    assert run_cell(connect(), body, at={"in": lambda: signal.raise_signal(signal.SIGINT)})["value"] == "handled"


def test_a_stop_ends_a_send_that_the_worker_does_not_take(connect: Connect) -> None:
    session = connect()
    worker = psutil.Process(session.hello["pid"])
    worker.suspend()  # as a call of another client does that lets no other thread run
    parts = [np.ones(75_000) for _ in range(9)]  # none is large enough for a memory file
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt, match="it goes on without this call"):
            run_cell(session, "value = len(parts)", parts=parts)
    finally:
        worker.resume()
    assert run_cell(session, "value = len(parts)", parts=parts)["value"] == 9


def test_a_large_result_that_is_here_needs_no_connection_any_more(connect: Connect) -> None:
    session = connect()
    link: Any = session._links[-1]
    at_the_end(link, lambda: link._channel.sock.shutdown(socket.SHUT_RDWR))
    assert len(run_cell(session, "import numpy\nvalue = numpy.zeros(400_000)")["value"])


def test_two_stops_end_a_load_that_hangs_and_start_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(WorkerSpec(dtype="float64"))
    start, drain = backend._start, Stops.drain
    starts: list[int] = []
    drained: list[int] = []

    def begin() -> None:
        starts.append(1)
        start()

    def look(stops: Stops) -> bool:
        drained.append(1)
        return drain(stops)

    monkeypatch.setattr(backend, "_start", begin)
    session = Session(backend)

    def freeze(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and len(starts) == 1:
            os.kill(session.hello["pid"], signal.SIGSTOP)
            starts.append(0)
            threading.Thread(target=press_twice).start()

    monkeypatch.setattr(Stops, "drain", look)

    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: drained)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="second stop"):
        session.connect(freeze)
    assert sum(starts) == 1


def test_a_folder_whose_spec_is_damaged_stands_for_no_other_worker(connect: Connect) -> None:
    pid = connect().hello["pid"]
    folder = runtime_root() / "0123456789abcdef"
    folder.mkdir()
    for text in ("", '{"spec": {"of_a_newer_version": 1}}'):
        (folder / "spec.json").write_text(text)
        [damaged] = [worker for worker in list_workers() if worker.key == folder.name]
        assert (damaged.state, damaged.pid) == ("unknown", None)
        stop_worker(folder.name)
    assert process_exists(pid)


def test_a_setting_that_can_not_be_compared_is_put_back(connect: Connect) -> None:
    session = connect()
    answer = run_cell(session, "import torch\nmodel.generation_config.eos_token_id = torch.tensor([1, 2])")
    assert "eos_token_id was set back" in answer.notes
    assert run_cell(session, "value = model.generation_config.eos_token_id")["value"] == 0


def test_a_value_that_leaves_its_pickling_by_system_exit_does_not_end_the_worker(connect: Connect) -> None:
    session = connect()
    body = "class Bad:\n    def __reduce__(self): raise SystemExit(3)\nvalue = Bad()"
    assert "could not be returned" in (run_cell(session, body).error or "")
    assert process_exists(session.hello["pid"])


def test_finalizers_that_print_do_not_lock_the_log(connect: Connect) -> None:
    body = """
import sys
class Loud:
    def __del__(self): sys.stdout.write("a\\n"); sys.stderr.write("b\\n")
for i in range(10_000):
    loud = Loud(); loud.me = loud; del loud
    print(i); print(i, file=sys.stderr)
"""
    assert run_cell(connect(), body, timeout=60).stdout.count("a\n") > 5_000
