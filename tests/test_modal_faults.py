"""Bad things between a notebook and its container, each through the control plane: they end well and are told.

All tests but the last ones use one deployed app, in turn: what one test leaves running, the next one finds warm.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from grpclib import Status
from modal_proto import api_pb2

from interp_kernel import InterpClient
from interp_kernel import session as session_module
from interp_kernel.errors import CallTimeoutError, LostValueError, ShipError, WorkerDiedError, WorkerError
from interp_kernel.protocol import Head
from interp_kernel.session import Session
from tests.helpers_worker import Answer, press_stop, run_cell, wait_until
from tests.modal_loopback import Loopback, Settings, Task

SPAWNED = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, Any] = {"mode": "modal", "app_name": "faults", "deploy": True}
ENDLESS = "print('ready', flush=True)\nwhile True: pass"
GENERATE = """
import torch
model.register_forward_pre_hook(lambda *_: print('ready', flush=True))
while True:
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
"""
CERTAIN_S = 0.2
HOLD_THE_LOCK = "import ctypes\nprint('ready', flush=True)\nctypes.PyDLL(None).usleep({us})"


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    # A client that no longer asks is given up soon, as the real server does; its container must acknowledge in time.
    with Loopback(Settings(abandon_s=3.0, cancel_grace_s=6.0)) as loopback:
        yield loopback


@pytest.fixture
def client(loopback: Loopback) -> Iterator[InterpClient]:
    with InterpClient(**OPTIONS) as client:
        yield client


@pytest.fixture
def session(client: InterpClient) -> Session:
    """A connected session."""
    client.connect(lambda _: None)
    return client.session


def once(count: Path, then: str) -> str:
    """A cell that leaves a mark each time it runs."""
    return f"with open({str(count)!r}, 'a') as file: file.write('x')\nprint('ready', flush=True)\n{then}"


def container(loopback: Loopback) -> Task:
    """The one container that runs."""
    (task,) = loopback.live()
    return task


def keep_one(session: Session) -> Any:
    """A value that stays in the container."""
    return run_cell(session, "activations = [1]", head={"keep": ["activations"]})["activations"]


# ---------------------------------------------------------------------------------------------- interrupts


@contextmanager
def stop_when(is_so: Callable[[], object]) -> Iterator[None]:
    """Press stop in the block once something is so; Modal's own client would end its app at that."""

    def press() -> None:
        wait_until(is_so)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    yield
    pressing.join()


def test_a_stop_before_the_container_is_up_ends_the_wait_and_not_the_app(loopback: Loopback) -> None:
    """The app is this process's own, which Modal's client would end at a Ctrl-C."""
    client = InterpClient(mode="modal", app_name="own")
    loopback.hold_starts()
    stopped = pytest.raises(KeyboardInterrupt, match="stopped waiting for the container")
    with stop_when(lambda: loopback.calls("FunctionMap")), stopped:
        client.connect(lambda _: None)
    assert loopback.calls("AppClientDisconnect") == 0
    client.stop()
    assert loopback.calls("AppClientDisconnect") == 1
    loopback.release_starts()
    assert not loopback.live()


def test_a_stop_during_the_load_leaves_the_container(client: InterpClient, loopback: Loopback) -> None:
    seen: list[str] = []

    def stop_at_weights(event: Head) -> None:
        # Not at the imports before: Python drops an exception that comes in a finalizer, and regex has thousands there.
        if event.get("text") == "reading weights" and "reading weights" not in seen:
            press_stop()
        seen.append(str(event.get("text")))

    with pytest.raises(KeyboardInterrupt, match="the load was stopped"):
        client.connect(stop_at_weights)
    task = container(loopback)
    client.connect(lambda _: None)
    assert client.run(lambda model, tokenizer: model.config.n_layer) > 0
    assert loopback.live() == [task]


@pytest.mark.parametrize("body", [ENDLESS, GENERATE])
def test_a_stop_ends_the_cell_and_keeps_what_is_there(body: str, session: Session, loopback: Loopback) -> None:
    kept, start = keep_one(session), time.monotonic()
    answer = run_cell(session, body, at={"ready": press_stop})
    assert time.monotonic() - start < 5
    assert answer.error is not None
    assert answer.error.startswith("KeyboardInterrupt")
    assert run_cell(session, "v = activations[0]", activations=kept)["v"] == 1
    assert session.loads <= 1
    assert len(loopback.live()) == 1


def test_a_cell_that_holds_pythons_lock_loses_no_container(session: Session, loopback: Loopback) -> None:
    task, pid = container(loopback), session.hello["pid"]
    answer = run_cell(session, HOLD_THE_LOCK.format(us=1_500_000) + "\nv = 1")
    assert answer["v"] == 1
    assert loopback.live() == [task]
    assert session.hello["pid"] == pid


def test_what_does_not_react_is_killed_and_its_container_is_not(
    session: Session, loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "GRACE_S", 0.3)
    task, kept = container(loopback), keep_one(session)
    start = time.monotonic()
    with pytest.raises(CallTimeoutError, match=r"did not react to the stop and was killed.* Lost with it: activations"):
        run_cell(session, HOLD_THE_LOCK.format(us=600_000_000), timeout=0.3)
    assert time.monotonic() - start < 10
    session.connect()
    with pytest.raises(LostValueError, match="'activations'"):
        run_cell(session, "activations", activations=kept)
    assert loopback.live() == [task]


# ------------------------------------------------------------------------------------- answers that are lost


@pytest.mark.parametrize("rpc", ["FunctionGetOutputs", "FunctionMap"])
@pytest.mark.parametrize("is_after", [True, False])
def test_lost_answers_neither_lose_nor_repeat_anything(
    rpc: str, is_after: bool, session: Session, loopback: Loopback, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    body = once(count, "import time\nfor i in range(200):\n    print(i, flush=True)\n    time.sleep(0.002)\nv = i")
    lose: dict[str, Callable[[], object]] = {
        f"\n{i}\n": lambda: loopback.lose(rpc, 2, is_after=is_after) for i in (1, 40, 120)
    }
    loopback.lose(rpc, 2, is_after=is_after)
    answer = run_cell(session, body, at=lose)
    assert answer["v"] == 199
    assert answer.stdout == "ready\n" + "".join(f"{i}\n" for i in range(200))
    assert count.read_text() == "x"


def test_a_large_result_comes_in_pieces_and_whole_though_answers_are_lost(
    client: InterpClient, loopback: Loopback
) -> None:
    def give(model: Any, tokenizer: Any) -> dict[str, Any]:
        import numpy as np

        return {"long": np.arange(9_000_000), "tiny": np.arange(100), "odd": np.full(5_000_001, 7, dtype=np.uint8)}

    def lose_often() -> None:
        seen = loopback.calls("FunctionGetOutputs")
        while not done.wait(0.001):
            if loopback.calls("FunctionGetOutputs") > seen + 1:
                loopback.lose("FunctionGetOutputs")
                seen = loopback.calls("FunctionGetOutputs")

    client.connect(lambda _: None)
    done = threading.Event()
    losing = threading.Thread(target=lose_often)
    losing.start()
    try:
        result = client.run(give)
    finally:
        done.set()
        losing.join()
    expected = give(None, None)
    assert all((result[name] == values).all() for name, values in expected.items())
    result["long"][:] = 0  # it is the notebook's own


def test_a_result_that_is_too_large_for_modal_is_refused_and_the_container_goes_on(
    client: InterpClient, loopback: Loopback
) -> None:
    def give(model: Any, tokenizer: Any, nbytes: int) -> Any:
        import numpy as np

        return np.zeros(nbytes, dtype=np.uint8)

    client.connect(lambda _: None)
    task = container(loopback)
    with pytest.raises(ShipError, match=r"The result is 1\.08 GB; .* at most 1\.07 GB at once\. Keep it there"):
        client.run(give, nbytes=1_080_000_000)
    assert client.run(give, nbytes=10).sum() == 0
    assert container(loopback) is task


def test_a_failure_of_the_server_that_passes_is_waited_out(
    session: Session, loopback: Loopback, tmp_path: Path
) -> None:
    for _ in range(2):
        loopback.refuse("FunctionMap", Status.INTERNAL, "a bad moment")
    count = tmp_path / "count"
    assert run_cell(session, once(count, "v = 2"))["v"] == 2
    assert count.read_text() == "x"


def test_a_small_warm_cell_costs_three_round_trips_at_most(session: Session, loopback: Loopback) -> None:
    run_cell(session, "v = 1")
    costs: list[int] = []
    for i in range(21):
        before = loopback.total()
        assert run_cell(session, f"print('line')\nv = {i}")["v"] == i
        costs.append(loopback.total() - before)
    assert statistics.median(costs) <= 3  # the client's own heartbeats fall into some


def test_every_rpc_may_be_slow(session: Session, loopback: Loopback) -> None:
    run_cell(session, "v = 1")
    loopback.plane.settings.rpc_latency_s = 0.1
    try:
        start = time.monotonic()
        assert run_cell(session, "v = 2")["v"] == 2
        took = time.monotonic() - start
        assert run_cell(session, ENDLESS, at={"ready": press_stop}).error == "KeyboardInterrupt: "
    finally:
        loopback.plane.settings.rpc_latency_s = 0.0
    assert took >= 0.2


# --------------------------------------------------------------------------------- clients that go away


def test_another_client_gets_the_result_of_one_that_was_killed(
    session: Session, loopback: Loopback, tmp_path: Path
) -> None:
    count, gate = tmp_path / "count", tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nv = 'done'"
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.helpers_worker import *
        from interp_kernel import InterpClient
        session = InterpClient(**{OPTIONS!r}).session
        session.connect()
        head = {{"id": session.new_id(), "background": True}}
        body = {once(count, wait)!r}
        run_cell(session, body, head=head, at={{"ready": lambda: print(head["id"], flush=True)}})
    """
    before = set(loopback.plane.calls)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        call_id = killed.stdout.readline().strip()
        killed.kill()
    new = [call for call in loopback.plane.calls.values() if call.id not in before]
    polls = [call for call in new if call.invocation != SPAWNED]
    wait_until(lambda: all(call.is_cancelled or not call.unfinished for call in polls))  # the server has noticed
    gate.touch()
    with InterpClient(**OPTIONS) as client:
        job = client.job(call_id)
        assert job.result(60)["v"] == "done"
    assert [head["event"] for head in job.events if head["event"] != "progress"] == ["stream"]
    assert count.read_text() == "x"
    assert len(loopback.live()) == 1


def test_a_background_call_keeps_its_container_when_nobody_asks(
    session: Session, loopback: Loopback, tmp_path: Path
) -> None:
    gate, task = tmp_path / "gate", container(loopback)
    wait = f"import os, time\nprint('ready', flush=True)\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    with InterpClient(**OPTIONS) as other:
        running = threading.Event()
        pool = ThreadPoolExecutor(1)
        job = pool.submit(
            run_cell, other.session, wait + "\nv = 1", head={"background": True}, at={"ready": running.set}
        )
        assert running.wait(20)
        held = [i for call in loopback.plane.calls.values() for i in call.inputs.values() if i.status == "running"]
        assert any(item.payload.method_name == "hold" for item in held)
        gate.touch()
        assert job.result()["v"] == 1
        pool.shutdown()
    assert loopback.live() == [task]


# ----------------------------------------------------------------------------------- containers that end


def test_a_container_that_is_killed_before_it_has_answered(
    session: Session, loopback: Loopback, tmp_path: Path
) -> None:
    """Modal gives the unanswered input to the next container; that the call has run can't be known there."""
    count, kept, task = tmp_path / "count", keep_one(session), container(loopback)
    body = f"with open({str(count)!r}, 'a') as file: file.write('x')\nwhile True: pass"

    def kill_once_begun() -> None:
        wait_until(count.exists)
        loopback.kill(task)

    killing = threading.Thread(target=kill_once_begun)
    killing.start()
    with pytest.raises(WorkerDiedError, match=r"container.*may have begun the call, which was not run again") as died:
        run_cell(session, body)
    killing.join()
    assert "Lost with it: activations. The next call starts a new worker" in str(died.value)
    session.connect()
    with pytest.raises(LostValueError, match="'activations'"):
        run_cell(session, "activations", activations=kept)
    assert count.read_text() == "x"


def test_a_container_that_is_preempted_in_mid_call(session: Session, loopback: Loopback, tmp_path: Path) -> None:
    """Modal runs the input again elsewhere; the cell must not."""
    count, task = tmp_path / "count", container(loopback)
    with ThreadPoolExecutor() as pool:
        preempting: list[Any] = []
        preempt = {"ready": lambda: preempting.append(pool.submit(loopback.preempt, task, 5.0))}
        with pytest.raises(WorkerDiedError, match="preempted"):
            run_cell(session, once(count, ENDLESS), at=preempt)
        preempting[0].result()
    assert run_cell(session, "v = 1")["v"] == 1
    assert count.read_text() == "x"
    assert container(loopback) is not task


@pytest.mark.parametrize("end", ["kill", "scale_down"])
def test_a_container_that_ends_between_calls(end: str, session: Session, loopback: Loopback) -> None:
    """After the kill another client is the first to come back, so a new container is there already."""
    kept, answer = keep_one(session), Answer()
    getattr(loopback, end)(container(loopback))
    if end == "kill":
        with InterpClient(**OPTIONS) as other:
            other.connect(lambda _: None)
    answered = time.monotonic()
    wait_until(lambda: time.monotonic() > answered + CERTAIN_S)  # a link in use a moment ago is trusted
    assert run_cell(session, "v = 1", answer=answer)["v"] == 1
    assert "the worker had ended (" in answer.warnings
    assert "container" in answer.warnings
    assert "Lost with it: activations." in answer.warnings
    with pytest.raises(LostValueError, match="'activations', a RemoteValue list of 1, was lost"):
        run_cell(session, "activations", activations=kept)


# ------------------------------------------------------------------------------- containers that never come


@pytest.fixture
def spoilt(loopback: Loopback) -> Iterator[Callable[..., InterpClient]]:
    """Makes a client of an app of its own whose containers are as the settings say."""
    before = dict(vars(loopback.plane.settings))

    def make(app_name: str, **settings: Any) -> InterpClient:
        vars(loopback.plane.settings).update(settings)
        return InterpClient(mode="modal", app_name=app_name, deploy=True)

    yield make
    vars(loopback.plane.settings).update(before)


def test_a_container_whose_enter_fails(spoilt: Callable[..., InterpClient], tmp_path: Path, loopback: Loopback) -> None:
    fail = "import sys\nif 'interp_kernel.worker' in sys.orig_argv: sys.exit('this image is broken')\n"
    (tmp_path / "sitecustomize.py").write_text(fail)
    client = spoilt("enter", python_path=[str(tmp_path)])
    with client, pytest.raises(WorkerError, match=r"this image is broken"):
        client.connect(lambda _: None)


def test_a_container_that_crashes_at_every_start(spoilt: Callable[..., InterpClient], loopback: Loopback) -> None:
    before = len(loopback.tasks())
    client = spoilt("crash", environment={"PYTHONHOME": "/nonexistent"})
    start = time.monotonic()
    with client, pytest.raises(WorkerError, match="exited with code 1 during start-up"):
        client.connect(lambda _: None)
    assert time.monotonic() - start < 20
    assert len(loopback.tasks()) - before <= 4


def test_a_container_that_never_comes_up(spoilt: Callable[..., InterpClient], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    client = spoilt("late", python_path=[str(tmp_path)], time_scale=0.001)
    with client, pytest.raises(WorkerError, match=r"startup_timeout"):
        client.connect(lambda _: None)


def other_python() -> str:
    """An interpreter of another minor version, beside this one or on the path."""
    mine = sys.version_info[1]
    beside = [Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python3") for minor in range(11, 15) if minor != mine]
    on_path = [shutil.which(f"python3.{minor}") for minor in range(11, 15) if minor != mine]
    found = [str(path) for paths in beside for path in paths] + [path for path in on_path if path]
    if not found:
        pytest.skip("No Python of another minor version is installed here.")
    return found[0]


def test_a_container_with_another_python(spoilt: Callable[..., InterpClient], loopback: Loopback) -> None:
    """Bytecode of another version would crash it, so a function is refused in words, once, and nothing runs."""
    client = spoilt("python", python=other_python())
    before = len(loopback.tasks())
    with (
        client,
        pytest.raises(ShipError, match=r"bytecode of Python 3\.\d+, and the container has 3\.\d+"),
    ):
        list(client.map(lambda model, tokenizer, x: x, [1], max_containers=1))
    (task,) = loopback.tasks()[before:]
    assert task.is_alive
