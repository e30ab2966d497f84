"""The control plane itself, by a class of plain modal: what the other tests rely on is so."""

# No `from __future__ import annotations`: modal reads the types of a class's parameters as objects.
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from grpclib import Status

from tests.helpers_worker import wait_until
from tests.modal_loopback import Loopback, Settings

SMALL = Settings(cancel_grace_s=5.0, redeliveries=1)


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    with Loopback(SMALL) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def counter(loopback: Loopback) -> Iterator[Any]:
    """An object of a class whose container counts its calls."""

    class Counter:
        name: str = modal.parameter(default="")

        @modal.enter()
        def start(self) -> None:
            self.calls = 0

        @modal.method()
        async def count(self, value: Any = None) -> tuple[int, int, Any]:
            import os

            self.calls += 1
            return self.calls, os.getpid(), value

        @modal.method()
        async def wait_for(self, gate: str) -> int:
            import asyncio
            import os

            self.calls += 1
            with open(f"{gate}.began", "w"):
                pass
            while not os.path.exists(gate):
                await asyncio.sleep(0.01)
            return self.calls

        @modal.method()
        def fail(self) -> None:
            raise KeyError("of the container")

        @modal.method()
        def die(self) -> None:
            import os

            os._exit(3)

    Counter.__module__ = "__main__"  # modal pickles a class of an imported module by reference
    app = modal.App("counter")
    made: Any = app.cls(serialized=True, max_containers=1)(modal.concurrent(max_inputs=4)(Counter))
    with app.run():
        yield made


def fresh(counter: Any, request: pytest.FixtureRequest) -> Any:
    """An object with a container of its own."""
    return counter(name=request.node.name)


def test_calls_share_a_container_whose_errors_come_back(counter: Any, loopback: Loopback) -> None:
    one = counter()
    assert [one.count.remote()[0] for _ in range(3)] == [1, 2, 3]
    blob = os.urandom(3 << 20)
    assert one.count.remote(blob)[2] == blob
    assert [value for _, _, value in one.count.map(range(5))] == list(range(5))
    with pytest.raises(KeyError, match="of the container"):
        one.fail.remote()
    assert len(loopback.live()) == 1


def test_a_lost_answer_makes_the_client_call_again(
    counter: Any, loopback: Loopback, request: pytest.FixtureRequest
) -> None:
    one = fresh(counter, request)
    assert one.count.remote()[0] == 1
    loopback.lose("FunctionGetOutputs")
    assert one.count.remote()[0] == 2
    loopback.lose("FunctionMap", is_after=False)
    assert one.count.remote()[0] == 3
    loopback.lose("FunctionMap")
    one.count.remote()
    assert one.count.remote()[0] == 6  # the lost one has run twice


def test_an_input_runs_again_in_another_container(
    counter: Any, loopback: Loopback, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    one = fresh(counter, request)
    first = one.count.remote()[1]
    call = one.wait_for.spawn(str(tmp_path / "gate"))
    task = loopback.live()[-1]
    wait_until(lambda: task.running)
    loopback.kill(task)
    (tmp_path / "gate").touch()
    assert call.get(timeout=20) == 1
    assert one.count.remote()[1] != first
    with pytest.raises(modal.exception.InternalFailure, match="exited with code 3 while running this input"):
        one.die.remote()


def test_preemption_and_scale_down_end_a_container_in_its_own_way(
    counter: Any, loopback: Loopback, request: pytest.FixtureRequest
) -> None:
    one = fresh(counter, request)
    one.count.remote()
    for end, reason in ((loopback.preempt, "preempted"), (loopback.scale_down, "idle")):
        task = loopback.live()[-1]
        end(task)
        assert task.end_reason == reason
        assert one.count.remote()[0] == 1
    loopback.plane.settings.time_scale = 1e-6
    last = loopback.live()[-1]
    loopback.await_end(last)
    loopback.plane.settings.time_scale = 1.0
    assert (last.end_reason, last.exit_code) == ("idle for the scaledown window", 0)


def test_a_cancelled_call_ends_and_its_container_stays(
    counter: Any, loopback: Loopback, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    one = fresh(counter, request)
    pid = one.count.remote()[1]
    call = one.wait_for.spawn(str(tmp_path / "never"))
    wait_until((tmp_path / "never.began").exists)
    call.cancel()
    with pytest.raises(modal.exception.Error):
        call.get(timeout=20)
    assert one.count.remote()[1] == pid


def test_refusals_reach_the_client(loopback: Loopback, counter: Any) -> None:
    loopback.refuse("FunctionMap", Status.RESOURCE_EXHAUSTED, "too much of it")
    with pytest.raises(modal.exception.ResourceExhaustedError, match="too much of it"):
        counter(name="refused").count.remote()
    with pytest.raises(modal.exception.NotFoundError, match="App 'absent' not found"):
        modal.Cls.from_name("absent", "Counter")().count.remote()


def test_what_is_not_written_fails_the_test_by_name() -> None:
    unwritten = pytest.raises(modal.exception.Error, match="QueueGetOrCreate is not written in tests/modal_loopback")
    with pytest.raises(AssertionError, match=r"not written: {'client:QueueGetOrCreate': 1}"), Loopback(), unwritten:
        modal.Queue.from_name("q", create_if_missing=True).len()


def test_another_token_is_refused() -> None:
    with Loopback(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODAL_TOKEN_SECRET", "as-another")
        with pytest.raises(modal.exception.AuthError, match="Token validation failed"), modal.App("x").run():
            pass
