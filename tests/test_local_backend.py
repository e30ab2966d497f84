"""How a worker is found, started and told from impostors; why it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from interp_kernel.backends import local
from interp_kernel.backends.local import (
    LocalBackend,
    list_workers,
    private_folder,
    process_exists,
    socket_path,
    stop_worker,
)
from interp_kernel.errors import LoadError, LostValueError, ShipError, WorkerError, WorkerRefusedError
from interp_kernel.protocol import PROTOCOL, Channel, Head, Packed
from interp_kernel.session import Session
from interp_kernel.spec import WorkerSpec
from tests.helpers_worker import DEMO, Connect, RecordingBackend, run_cell, sessions

pytestmark = pytest.mark.usefixtures("no_warm_worker")

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="Only root can act as another user.")


OWN = WorkerSpec(
    model_name=DEMO, dtype="float64", attn_implementation="sdpa"
)  # a worker of this module alone, which its tests end


@pytest.fixture
def connect() -> Iterator[Connect]:
    with sessions() as connect:
        yield connect


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runtime folder."""
    folder = tmp_path_factory.mktemp("r", numbered=True)
    monkeypatch.setenv("INTERP_RUNTIME_DIR", str(folder))
    return folder


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_that_others_could_enter_is_repaired(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path / "a" / "new").stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(WorkerRefusedError, match=r"is a link or belongs to user .* Remove it, or set"):
        private_folder(tmp_path / "link")


@as_root
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", NOBODY, NOBODY)
    with pytest.raises(WorkerRefusedError, match=f"belongs to user {NOBODY}"):
        private_folder(tmp_path / "run")


def test_a_socket_path_that_is_too_long_moves_to_a_short_private_folder(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    short = socket_path(long)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short))
    short.unlink()
    assert short.parent.stat().st_mode & 0o777 == 0o700
    assert socket_path(tmp_path / ("y" * 120)) != short


# --------------------------------------------------------------------------------------------- impostors


@pytest.fixture
def fake(runtime: Path) -> Iterator[Callable[[Callable[[Channel], object]], LocalBackend]]:
    """Start a worker that does what the test says with each connection, in the place of the real one."""
    listeners = []

    def start(answer: Callable[[Channel], object]) -> LocalBackend:
        backend = LocalBackend(WorkerSpec(model_name=DEMO))
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(socket_path(backend.folder)))
        sock.listen()
        listeners.append(sock)

        def serve() -> None:
            while True:
                try:
                    channel = Channel(sock.accept()[0])
                except OSError:
                    return
                threading.Thread(target=talk, args=(channel,), daemon=True).start()

        def talk(channel: Channel) -> None:
            try:
                answer(channel)
                while True:
                    channel.receive()
            except (EOFError, OSError):
                channel.close()

        threading.Thread(target=serve, daemon=True).start()
        return backend

    yield start
    for sock in listeners:
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def test_a_worker_of_another_protocol_is_refused(fake: Callable[..., LocalBackend]) -> None:
    def answer(channel: Channel) -> None:
        channel.receive()
        channel.send(Packed({"event": "reply", "value": {"protocol": PROTOCOL + 1}}))

    with pytest.raises(WorkerRefusedError, match=f"protocol {PROTOCOL + 1} and this notebook {PROTOCOL}: .*Stop it"):
        fake(answer).open("me")


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\0\0\0",
        b"\0\0\0\1" + (5).to_bytes(8, "big") + b"{not ",
        b"\0\0\0\1" + (2).to_bytes(8, "big") + b"[]",
        b"\0\0\0\1" + (4).to_bytes(8, "big") + b"\xff\xfe\0\1",
        Packed({"event": "reply", "value": [1]}).encode(),
        Packed({"blobs": [[0, 5, 0, None]]}).encode(),
    ],
    ids=["http", "no frames", "no json", "a list", "no text", "no hello", "blob without a file"],
)
def test_garbage_is_refused(garbage: bytes, fake: Callable[..., LocalBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "HELLO_S", 0.3)
    with pytest.raises(WorkerRefusedError, match=r"interp-kernel worker stop [0-9a-f]{16}`"):
        fake(lambda channel: channel.sock.sendall(garbage)).open("me")


def test_a_worker_that_says_nothing_is_refused_in_time(
    fake: Callable[..., LocalBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HELLO_S", 0.3)
    with pytest.raises(WorkerRefusedError, match=r"did not answer within 0\.3 s"):
        fake(lambda _: None).open("me")


@as_root
def test_another_users_process_on_the_socket_is_refused_and_told_nothing(runtime: Path) -> None:
    backend = LocalBackend(WorkerSpec(model_name=DEMO))
    heard, heard_end = os.pipe()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(socket_path(backend.folder)))
        os.chmod(socket_path(backend.folder), 0o777)
        # Linux takes the credentials of the process that calls listen().
        code = (
            f"import os, socket; os.setuid({NOBODY}); s = socket.socket(fileno={sock.fileno()}); s.listen()\n"
            f"os.write({heard_end}, b'up'); os.write({heard_end}, b':' + s.accept()[0].recv(99))"
        )
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[sock.fileno(), heard_end]) as impostor:
            os.close(heard_end)
            assert os.read(heard, 2) == b"up"
            with pytest.raises(WorkerRefusedError, match=rf"user {NOBODY}, not to you \(0\).*Nothing was sent"):
                backend.open("me")
            assert impostor.wait(10) == 0
    assert os.read(heard, 99) == b":"
    os.close(heard)


def test_another_python_takes_cells_and_refuses_bytecode(
    fake: Callable[..., LocalBackend], monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    with monkeypatch.context() as outside:
        outside.setenv("INTERP_RUNTIME_DIR", str(RUN))
        connect()
        address = str(socket_path(LocalBackend(WorkerSpec(model_name=DEMO)).folder))

    def pump(source: Channel, target: Channel, change: Callable[[Head], Head]) -> None:
        try:
            while True:
                head, inline, _ = source.receive()
                target.send(Packed(change(head), inline))
        except (EOFError, OSError):
            target.close()

    def older(head: Head) -> Head:
        if isinstance(head.get("value"), dict) and "python" in head["value"]:
            head["value"]["python"] = [3, 9, 1]
        return head

    def answer(channel: Channel) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        there = Channel(sock)
        threading.Thread(target=pump, args=(there, channel, older), daemon=True).start()
        pump(channel, there, lambda head: head)

    session = Session(fake(answer))
    assert run_cell(session, "y = [v * 2 for v in x]\ndef f(): return y", x=[1, 2])["y"] == [2, 4]
    with pytest.raises(ShipError, match=r"as bytecode.*Python 3\.9 on the worker.*Define it inside the remote cell"):
        run_cell(session, "x()", x=lambda: 1)
    session.close()


RUN = Path(os.environ["INTERP_RUNTIME_DIR"])


# ------------------------------------------------------------------------------------------ start and end


def script(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A process of its own that is a client."""
    lines = "import json, os, signal, sys\nfrom interp_kernel.session import Session\n"
    lines += "from interp_kernel.spec import WorkerSpec\nfrom interp_kernel.backends.local import LocalBackend\n"
    lines += "session = Session(LocalBackend(WorkerSpec.from_json(json.loads(sys.argv[1]))))\n"
    return subprocess.Popen(
        [sys.executable, "-c", lines + code, *arguments], stdout=subprocess.PIPE, text=True, **options
    )


SIGNALS = {
    signal.SIGKILL: r"killed by SIGKILL \((out of memory, or kill -9|the machine ran out of memory)\)",
    signal.SIGSEGV: r"killed by SIGSEGV \(a crash in native code; see the log\)",
    signal.SIGABRT: r"killed by SIGABRT \(a crash in native code; see the log\)",
    signal.SIGTERM: "it was stopped",
}


@pytest.mark.parametrize("number", SIGNALS)
def test_the_exit_file_says_what_ended_a_worker(number: signal.Signals, runtime: Path) -> None:
    backend = LocalBackend(WorkerSpec(model_name=DEMO))
    link, started = backend.open("me")
    link.close()
    assert (started, link.hello["state"], backend.why_ended(link.hello["pid"])) == (True, "loading", None)
    os.kill(link.hello["pid"], number)
    wait_for_end(link.hello["pid"])
    assert re.fullmatch(SIGNALS[number], str(backend.why_ended(link.hello["pid"])))
    assert ("Fatal Python error" in backend.log_tail(9000)) == (number in (signal.SIGSEGV, signal.SIGABRT))


def test_two_starts_that_race_find_one_worker_in_a_session_of_its_own(connect: Connect) -> None:
    folder = LocalBackend(OWN).folder
    with socket.socket(socket.AF_UNIX) as crashed:  # what a crash leaves behind: nobody listens there
        crashed.bind(str(socket_path(folder)))
    (folder / "lock").touch()
    (folder / "reason").write_text("of an earlier worker")
    code = "hello = session.connect(print if 0 else lambda e: None)\nprint(hello['pid'], session.loads)\n"
    code += "sys.stdout.flush(); sys.stdin.read()"
    pair = [script(code, json.dumps(OWN.to_json()), stdin=subprocess.PIPE, start_new_session=True) for _ in range(2)]
    lines = [p.stdout.readline().split() for p in pair if p.stdout]
    assert lines[0][0] == lines[1][0]
    assert sorted(line[1] for line in lines) == ["0", "1"]
    pid = int(lines[0][0])
    for process in pair:
        os.killpg(process.pid, signal.SIGKILL)
        with process:
            pass
    session = connect(OWN)
    assert session.hello["pid"] == pid
    assert os.getsid(pid) not in (os.getsid(0), pair[0].pid, pair[1].pid)
    assert run_cell(session, "v = 1")["v"] == 1
    assert stat_mode(socket_path(folder)) == 0o600


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_stop_names_what_is_lost(connect: Connect) -> None:
    session = connect(OWN)
    pid = session.hello["pid"]
    held = run_cell(session, "big = [1]", head={"keep": ["big"]})["big"]
    worker = next(w for w in list_workers() if w.key == OWN.key)
    assert (worker.state, worker.pid, worker.clients) == ("idle", pid, 1)
    assert worker.memory_bytes == pytest.approx(psutil.Process(pid).memory_info().rss, rel=0.2)
    assert session.stop("because of the test") == " Lost with it: big."
    with pytest.raises(LostValueError, match=r"'big', a RemoteValue list of 1, was lost: .* Run the cell that made it"):
        held.fetch()
    with pytest.raises(LostValueError, match="'big'"):
        session.ship({"again": [held]})
    assert repr(held) == "<RemoteValue list of 1 LOST>"
    assert not process_exists(pid)
    assert session.stop() == ""
    worker = next(w for w in list_workers() if w.key == OWN.key)
    assert (worker.state, worker.exit_reason, worker.pid) == ("dead", "because of the test", None)
    stop_worker(OWN.key)  # nothing is left to stop


def test_an_idle_worker_ends_and_the_next_call_says_so(connect: Connect) -> None:
    folder = LocalBackend(OWN).folder
    now = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    stale = [folder / f"exit-{pid}.json" for pid in range(int(now.stdout), int(now.stdout) + 3000)]
    for path in stale:  # whatever process id the worker gets, an earlier one had it
        path.write_text('{"reason": "an end of long ago", "time": 0}')
    session = connect(OWN, scaledown_window=1)
    pid = session.hello["pid"]
    assert any(path.stem == f"exit-{pid}" for path in stale)
    assert session.backend.why_ended(pid) is None
    for path in stale:
        path.unlink(missing_ok=True)
    lost = run_cell(session, "big = [1]", head={"keep": ["big"]})["big"]
    wait_for_end(pid)
    assert session.backend.why_ended(pid) == "idle for 1 s"
    answer = run_cell(session, "v = 1")
    assert answer["v"] == 1
    assert answer.warnings == "the worker had ended (idle for 1 s); a new one runs. Lost with it: big."
    assert lost.is_lost
    assert session.hello["pid"] != pid


def wait_for_end(pid: int) -> None:
    """Until a process has ended, whoever its parent is."""
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not process_exists(pid)


def test_a_worker_stays_while_it_is_wanted(connect: Connect) -> None:
    """A connection that holds it, or min_containers=1, keeps it beyond its window; without them it ends."""
    session = connect(OWN)
    pid = session.hello["pid"]
    session.ask({"verb": "hold"})
    session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 0})
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(pid).wait(1.5)
    session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 1})
    session.close()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(pid).wait(1.5)
    session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 0})
    session.close()
    wait_for_end(pid)


def test_a_load_that_fails_is_a_clear_error_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    wrong = [WorkerSpec(model_name=str(tmp_path / "absent"))]
    wrong += [WorkerSpec(model_name=str(tmp_path / "adapter"), is_peft=True)]

    def fail(spec: WorkerSpec) -> None:
        backend = RecordingBackend(spec)
        with pytest.raises(LoadError, match=spec.model_name):
            Session(backend).connect()
        pid = backend.links[-1].hello["pid"]
        wait_for_end(pid)
        assert spec.model_name in str(backend.why_ended(pid))

    with ThreadPoolExecutor() as both:
        list(both.map(fail, wrong))


def test_a_worker_of_another_version_can_be_listed_and_stopped(runtime: Path) -> None:
    backend = LocalBackend(WorkerSpec(model_name=DEMO))
    (backend.folder / "spec.json").write_text(json.dumps({"spec": backend.spec.to_json()}))
    code = (
        "import socket, sys\nfrom interp_kernel.protocol import Channel, Packed\ns = socket.socket(socket.AF_UNIX)\n"
        "s.bind(sys.argv[1]); s.listen(); print(flush=True)\n"
        "while True:\n    c = Channel(s.accept()[0])\n    try: c.receive()\n    except EOFError: continue\n"
        "    c.send(Packed({'value': {'protocol': 0}}))\n"
    )
    arguments = [sys.executable, "-c", code, str(socket_path(backend.folder))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as older:
        assert older.stdout is not None
        older.stdout.readline()
        with pytest.raises(WorkerRefusedError, match="Stop it"):
            backend.open("me")
        (worker,) = list_workers()
        assert (worker.state, worker.pid) == ("unknown", older.pid)
        stop_worker(worker.key[:6])
        assert older.wait(10) == -signal.SIGTERM
    with pytest.raises(WorkerError, match=f"0 workers have a key that begins with 'zzz'; .* {worker.key}"):
        stop_worker("zzz")
