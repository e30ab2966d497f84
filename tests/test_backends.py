"""One contract for every place where a worker may run: what a user sees is the same.

`local` is a process on this machine. `modal` is the real modal client and the real container, through a control plane
on loopback. `real_modal` is modal.com, for `pytest -m real_modal` with a token. Nothing here needs a file that both
sides see, so the same tests hold there.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from interp_kernel import InterpClient
from interp_kernel.errors import CallTimeoutError, LostValueError, WorkerDiedError
from interp_kernel.kernelspec import notebook_folder
from interp_kernel.notebook.run import run_notebook
from interp_kernel.protocol import Channel, Head, Packed
from interp_kernel.session import RemoteValue, Session
from tests.helpers_worker import DEMO, Answer, outcome, press_stop, run_cell, wait_until
from tests.modal_loopback import Loopback

ENDLESS = "print('ready', flush=True)\nwhile True: pass"


@dataclass
class Place:
    """Where the workers of a test are."""

    options: dict[str, Any]
    sent_bytes: Callable[[], int]
    clients: list[InterpClient] = field(default_factory=list)

    def client(self, **options: Any) -> InterpClient:
        """One more client of the worker that the tests of this module share."""
        self.clients.append(InterpClient(model_name=DEMO, **self.options, **options))
        return self.clients[-1]


@contextmanager
def local_place() -> Iterator[Place]:
    sent, send = [0], Channel.send

    def counting(self: Channel, packed: Packed, wake_fd: int | None = None) -> bool:
        in_file = sum(nbytes for _, nbytes, offset, _ in packed.head.get("blobs", ()) if offset is not None)
        sent[0] += len(packed.encode()) + in_file
        return send(self, packed, wake_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "send", counting)
        yield Place({"mode": "local", "attn_implementation": "sdpa"}, lambda: sent[0])


@contextmanager
def modal_place() -> Iterator[Place]:
    with Loopback() as loopback:
        yield Place({"mode": "modal", "deploy": True, "app_name": "contract"}, lambda: loopback.plane.bytes_in)


@contextmanager
def real_place() -> Iterator[Place]:
    from interp_kernel.cli import main

    if not os.environ.get("MODAL_TOKEN_ID"):
        pytest.skip("There is no token for modal.com: set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET.")
    name = f"interp-contract-{uuid.uuid4().hex[:8]}"
    try:
        yield Place({"mode": "modal", "deploy": True, "app_name": name, "scaledown_window": 60}, lambda: 0)
    finally:
        main(["modal", "stop", "--app-name", name])


PLACES = {"local": local_place, "modal": modal_place, "real_modal": real_place}
KINDS = [*("local", "modal"), pytest.param("real_modal", marks=pytest.mark.real_modal)]


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with PLACES[request.param]() as place:
        yield place
        for client in place.clients:
            client.close()


@pytest.fixture(scope="module")
def client(place: Place) -> InterpClient:
    return place.client()


@pytest.fixture
def session(client: InterpClient) -> Session:
    return client.session


# ------------------------------------------------------------------------------------ streams and results


def test_streams_are_apart_and_events_keep_their_order(session: Session) -> None:
    body = "import os, sys\nfor i in range(3):\n    print('out', i, flush=True)\n    print('err', i, file=sys.stderr)\n"
    body += "    display({'text/plain': str(i)}, raw=True)\n_ = os.system('echo from a shell')\n6 * 7"
    answer = run_cell(session, body)
    assert answer.stdout == "out 0\nout 1\nout 2\nfrom a shell\n"
    assert answer.text("stderr") == "err 0\nerr 1\nerr 2\n"
    order = [e["name"] if e["event"] == "stream" else e["data"]["text/plain"] for e in answer.events]
    assert order[:9] == [part for i in range(3) for part in ("stdout", "stderr", str(i))]
    assert answer.head["display"]["data"] == {"text/plain": "42"}


def test_output_is_there_while_the_cell_runs(session: Session) -> None:
    body = "print('first', flush=True)\nimport time\nwhile True: time.sleep(0.01)"
    assert run_cell(session, body, at={"first": press_stop}).error == "KeyboardInterrupt: "


def test_20_000_lines_arrive_whole_and_in_order(session: Session) -> None:
    answer = run_cell(session, "for i in range(20_000): print('line', i)")
    assert answer.stdout == "".join(f"line {i}\n" for i in range(20_000))


def test_a_function_gets_model_tokenizer_and_inputs(client: InterpClient) -> None:
    import torch

    def scale(model: Any, tokenizer: Any, x: Any, *, by: float) -> tuple[Any, int, str]:
        return (x * by).to(torch.bfloat16), model.config.n_layer, type(tokenizer).__name__

    value, n_layers, kind = client.run(scale, torch.ones(3), by=2.0)
    assert (value.dtype, value.tolist(), value.device.type) == (torch.bfloat16, [2, 2, 2], "cpu")
    assert n_layers == client.model_info()["n_layers"]
    assert "Tokenizer" in kind


# ------------------------------------------------------------------------------------------------ errors


def test_errors_have_their_own_name_and_line(session: Session) -> None:
    answer = run_cell(session, "first = 1\n\nclass Own(Exception): pass\n\nraise Own('x', 2)")
    assert answer.error == "Own: ('x', 2)"
    assert "----> 5\x1b[0m raise Own('x', 2)" in answer.traceback
    assert "interp_kernel" not in answer.traceback
    assert answer.result is not None
    assert answer.result.values["first"] == 1


def test_a_functions_error_can_be_caught_by_its_name(client: InterpClient) -> None:
    def fail(model: Any, tokenizer: Any) -> None:
        raise KeyError("absent")

    with pytest.raises(KeyError, match="absent") as caught:
        client.run(fail)
    assert 'raise KeyError("absent")' in "\n".join(caught.value.traceback)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- handles


def test_values_that_stay_are_reused_fetched_and_freed(session: Session) -> None:
    body = "import torch, builtins, weakref\nkept = torch.arange(3_000_000)\nbuiltins.probe = weakref.ref(kept)"
    kept = run_cell(session, body)["kept"]
    assert repr(kept) == "<RemoteValue torch.Tensor 3000000 int64 cpu 24.0 MB>"
    assert run_cell(session, "v = int(kept[-1])", kept=kept)["v"] == 2_999_999
    assert int(kept.fetch()[1234]) == 1234
    del kept
    gone = "import gc, builtins\ngc.collect()\nv = builtins.probe() is None"
    wait_until(lambda: run_cell(session, gone)["v"])


# ------------------------------------------------------------------------------------- stops and limits


@pytest.mark.parametrize("body", [ENDLESS, "import time\nprint('ready', flush=True)\ntime.sleep(600)"])
def test_a_stop_ends_the_cell_and_keeps_the_worker(body: str, session: Session) -> None:
    first = run_cell(session, "import os\nkept, pid = [5], os.getpid()", head={"keep": ["kept"]})
    start = time.monotonic()
    answer = run_cell(session, f"before = 1\n{body}", at={"ready": press_stop})
    assert time.monotonic() - start < 5
    assert answer.error == "KeyboardInterrupt: "
    assert answer.result is not None
    assert answer.result.values["before"] == 1
    second = run_cell(session, "import os\nv = kept[0], os.getpid()", kept=first["kept"])
    assert second["v"] == (5, first["pid"])


def test_a_time_limit_stops_the_call_and_keeps_the_worker(client: InterpClient) -> None:
    pid = client.run(lambda model, tokenizer: __import__("os").getpid())
    with pytest.raises(CallTimeoutError, match=r"the call ran past its limit of 0\.2 s"):
        client.run(lambda model, tokenizer: __import__("time").sleep(60), timeout=0.2)
    assert client.run(lambda model, tokenizer: __import__("os").getpid()) == pid


def test_questions_are_answered_while_a_cell_runs(session: Session) -> None:
    found: list[Any] = []

    def ask() -> None:
        found.append(session.ask({"verb": "complete", "text": "model.transform", "names": {}}))
        found.append(session.ask({"verb": "inspect", "name": "tokenizer.encode", "names": {}}))
        found.append(session.ask({"verb": "hello"})["state"])
        press_stop()

    assert run_cell(session, ENDLESS, at={"ready": ask}).error == "KeyboardInterrupt: "
    assert found[0] == ["model.transformer"]
    assert "encode" in str(found[1])
    assert found[2] == "busy"


def test_a_job_runs_in_the_background_and_can_be_cancelled(client: InterpClient) -> None:
    def endless(model: Any, tokenizer: Any) -> None:
        print("ready", flush=True)
        while True:
            pass

    job = client.submit(endless)
    wait_until(lambda: [event for event in job.events if event["event"] == "stream"])
    assert job.cancel()
    with pytest.raises(KeyboardInterrupt):
        job.result(20)


# --------------------------------------------------------------------------------------- several clients


def test_a_new_client_meets_the_same_worker_and_what_it_holds(place: Place, session: Session) -> None:
    run_cell(session, "import builtins\nbuiltins.left = 'by another client'")
    other = place.client().session
    assert run_cell(other, "v = left")["v"] == "by another client"
    assert (other.generation, other.loads) == (session.generation, 0)


def test_two_clients_at_once_get_their_own_output_in_turn(place: Place, session: Session) -> None:
    other, head = place.client().session, {"id": session.new_id()}
    other.connect()
    running = threading.Event()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_cell, session, ENDLESS, head=head, at={"ready": running.set})
        assert running.wait(20)
        stop = {"waiting for 1 other call": lambda: session.interrupt(head["id"])}
        second = run_cell(other, "print('of the other')", at=stop)
    assert (first.result().stdout, first.result().error) == ("ready\n", "KeyboardInterrupt: ")
    assert (second.stdout, second.error) == ("of the other\n", None)


# ------------------------------------------------------------------------------------------------- sizes


def test_20_mb_go_in_once_and_50_mb_come_out(place: Place, session: Session) -> None:
    import torch

    x = torch.arange(5_000_000, dtype=torch.float32)
    body = "import torch\nv = float(x[-1])\nbig = torch.arange(12_500_000, dtype=torch.float32)"
    session.connect()
    before = place.sent_bytes()
    answer = run_cell(session, body, x=x, head={"want": ["big"]})
    middle = place.sent_bytes()
    assert answer["v"] == 4_999_999
    assert (answer["big"].nbytes, float(answer["big"][-1])) == (50_000_000, 12_499_999)
    assert run_cell(session, "v = float(x[7])", x=x)["v"] == 7
    after = place.sent_bytes()
    if after:
        assert 20_000_000 <= middle - before < 20_400_000
        assert after - middle < 100_000
    x[0] = 3
    assert run_cell(session, "v = float(x[0])", x=x)["v"] == 3


# ----------------------------------------------------------------------------------------------- hygiene


def test_what_a_cell_leaves_on_the_model_is_removed_or_told(session: Session) -> None:
    leak = "model.lm_head.register_forward_hook(lambda *a: None)\nmodel.train()"
    notes = run_cell(session, leak).notes
    assert "1 hook" in notes
    assert "train/eval" in notes
    assert run_cell(session, "v = len(model.lm_head._forward_hooks), model.training")["v"] == (0, False)
    damage = run_cell(session, "model.transformer.wpe.weight.data.mul_(0)").notes
    assert "the call changed" in damage
    assert "`%remote restart` loads the model anew" in damage
    assert session.ask({"verb": "hello"})["damage"]


# ------------------------------------------------------------------------------------------------- death


def test_a_worker_that_is_killed_is_told_with_what_is_lost(place: Place, session: Session) -> None:
    activations = run_cell(session, "activations = [1]", head={"keep": ["activations"]})["activations"]
    assert isinstance(activations, RemoteValue)
    generation, answer = session.generation, Answer()
    with pytest.raises(WorkerDiedError, match=r"died during this call: killed by SIGKILL .*Lost with it: activations"):
        run_cell(session, "import os\nprint('ready', flush=True)\nos.kill(os.getpid(), 9)", answer=answer)
    assert answer.stdout == "ready\n"
    events: list[Head] = []
    session.connect(events.append)
    with pytest.raises(LostValueError, match="'activations', a RemoteValue list of 1, was lost"):
        run_cell(session, "activations", activations=activations)
    assert run_cell(session, "v = float(model.transformer.wpe.weight.abs().sum()) > 0")["v"] is True
    assert session.generation != generation
    assert any("loaded in" in str(event.get("text")) for event in events)
    assert session.ask({"verb": "hello"})["damage"] == []
    others = [other.session for other in place.clients if other.session is not session]
    warned = Answer()
    assert outcome(lambda: run_cell(others[0], "print('on')", answer=warned)) == "on\n"
    assert "the worker had ended (killed by SIGKILL" in warned.warnings


# ---------------------------------------------------------------------------------------------- notebook


@pytest.mark.parametrize("place", KINDS[1:], indirect=True)
def test_the_quickstart_finds_the_same_as_on_a_local_worker(place: Place, tmp_path: Path) -> None:
    found = {}
    for mode in ("local", "modal"):
        target = tmp_path / f"{mode}.ipynb"
        run = run_notebook(notebook_folder() / "quickstart.ipynb", target, parameters={"mode": mode}, progress=False)
        assert run.status == "completed", (run.ename, run.evalue)
        found[mode] = run.findings
    assert found["modal"] == found["local"]
    assert found["local"]["fact"]["prob"] > 0.9
