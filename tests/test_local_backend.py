"""How a worker is found, started and told from impostors; why it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers_worker import DEMO, Connect, run_cell, sessions, tiny_model

from interp_kernel.backends import local
from interp_kernel.backends.local import (
    LocalBackend,
    list_workers,
    private_folder,
    process_exists,
    runtime_root,
    socket_path,
    stop_worker,
)
from interp_kernel.errors import LoadError, ShipError, WorkerDiedError, WorkerError, WorkerRefusedError
from interp_kernel.protocol import PROTOCOL, Channel, Head, Packed
from interp_kernel.session import Session
from interp_kernel.spec import WorkerSpec

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="Only root can act as another user.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """A worker of this module's own, which its tests end."""
    return tiny_model(tmp_path_factory.mktemp("model"))


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
    with pytest.raises(WorkerRefusedError, match="is a link or belongs to user .* Remove it, or set INTERP_RUNTIME_DIR"):
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

    with pytest.raises(WorkerRefusedError, match=f"speaks protocol {PROTOCOL + 1} and this notebook {PROTOCOL}: .*Stop"):
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
def test_garbage_is_refused(
    garbage: bytes, fake: Callable[..., LocalBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HELLO_S", 0.3)
    with pytest.raises(WorkerRefusedError, match="interp-kernel worker stop"):
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
            with pytest.raises(WorkerRefusedError, match=rf"belongs to user {NOBODY}, not to you \(0\).*Nothing was sent"):
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
    with pytest.raises(ShipError, match=r"as bytecode, which Python 3\.9 on the worker does not share with 3\.1"):
        run_cell(session, "x()", x=lambda: 1)
    session.close()


RUN = Path(os.environ["INTERP_RUNTIME_DIR"])


# ------------------------------------------------------------------------------------------ start and end


def script(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A process of its own that is a client."""
    lines = "import os, signal, sys\nfrom interp_kernel.session import Session\n"
    lines += "from interp_kernel.spec import WorkerSpec\nfrom interp_kernel.backends.local import LocalBackend\n"
    lines += "session = Session(LocalBackend(WorkerSpec(model_name=sys.argv[1])))\n"
    return subprocess.Popen(
        [sys.executable, "-c", lines + code, *arguments], stdout=subprocess.PIPE, text=True, **options
    )


def test_two_starts_that_race_find_one_worker_in_a_session_of_its_own(tiny: WorkerSpec, connect: Connect) -> None:
    folder = LocalBackend(tiny).folder
    with socket.socket(socket.AF_UNIX) as crashed:  # what a crash leaves behind: nobody listens there
        crashed.bind(str(socket_path(folder)))
    (folder / "lock").touch()
    (folder / "reason").write_text("of an earlier worker")
    code = "hello = session.connect(print if 0 else lambda e: None)\nprint(hello['pid'], session.loads)\n"
    code += "sys.stdout.flush(); sys.stdin.read()"
    pair = [script(code, tiny.model_name, stdin=subprocess.PIPE, start_new_session=True) for _ in range(2)]
    lines = [p.stdout.readline().split() for p in pair if p.stdout]
    assert lines[0][0] == lines[1][0]
    assert sorted(line[1] for line in lines) == ["0", "1"]
    pid = int(lines[0][0])
    for process in pair:
        os.killpg(process.pid, signal.SIGKILL)
        with process:
            pass
    session = connect(tiny)
    assert session.hello["pid"] == pid
    assert os.getsid(pid) not in (os.getsid(0), pair[0].pid, pair[1].pid)
    assert run_cell(session, "v = 1")["v"] == 1
    assert stat_mode(socket_path(folder)) == 0o600


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


ENDINGS = {
    "os.kill(os.getpid(), 9)": r"killed by SIGKILL \(",
    "ctypes.string_at(0)": r"killed by SIGSEGV \(a crash in native code; see the log\)",
    "os._exit(3)": r"it exited with status 3 by its own code",
    "os.abort()": r"killed by SIGABRT \(a crash in native code",
}


@pytest.mark.parametrize("end", ENDINGS)
def test_a_death_says_why_names_what_is_lost_and_the_next_call_recovers(end: str, tiny: WorkerSpec, connect: Connect) -> None:
    session = connect(tiny)
    kept = run_cell(session, "activations = model.transformer.wte.weight", head={"keep": ["activations"]})["activations"]
    with pytest.raises(WorkerDiedError, match=f"(?s)died during this call: {ENDINGS[end]}.*Lost with it: activations"):
        run_cell(session, f"import ctypes, os\n{end}")
    with pytest.raises(local_lost(), match="'activations', a RemoteValue torch.Parameter .* was lost: .* Run the cell"):
        kept.fetch()
    assert "LOST" in repr(kept)
    assert run_cell(session, "v = 1")["v"] == 1
    session.close()


def local_lost() -> type[Exception]:
    from interp_kernel.errors import LostValueError

    return LostValueError


def test_stop_says_what_was_lost_and_the_exit_file_why(tiny: WorkerSpec, connect: Connect) -> None:
    session = connect(tiny)
    pid = session.hello["pid"]
    held = run_cell(session, "big = [1]", head={"keep": ["big"]})["big"]
    assert session.stop("because of the test") == " Lost with it: big."
    assert held.is_lost
    assert not process_exists(pid)
    assert LocalBackend(tiny).why_ended(pid) == "because of the test"
    assert session.stop() == ""
    worker = next(w for w in list_workers() if w.key == tiny.key)
    assert (worker.state, worker.exit_reason, worker.pid) == ("dead", "because of the test", None)


def test_an_exit_file_of_an_earlier_process_with_the_same_id_is_not_believed(tiny: WorkerSpec, connect: Connect) -> None:
    folder = LocalBackend(tiny).folder
    now = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    stale = [folder / f"exit-{pid}.json" for pid in range(int(now.stdout), int(now.stdout) + 3000)]
    for path in stale:
        path.write_text('{"reason": "an end of long ago", "time": 0}')
    session = connect(tiny)
    assert folder / f"exit-{session.hello['pid']}.json" in stale, "the process id is out of the range that was prepared"
    assert session.backend.why_ended(session.hello["pid"]) is None
    session.stop()
    assert session.backend.why_ended(session.hello["pid"] if session.hello else 0) is not None
    for path in stale:
        path.unlink(missing_ok=True)


def test_an_idle_worker_ends_and_the_next_call_says_so(tiny: WorkerSpec, connect: Connect) -> None:
    session = connect(tiny, scaledown_window=1)
    pid = session.hello["pid"]
    lost = run_cell(session, "big = [1]", head={"keep": ["big"]})["big"]
    wait_for_end(pid)
    assert LocalBackend(tiny).why_ended(pid) == "idle for 1 s"
    answer = run_cell(session, "v = 1")
    assert answer["v"] == 1
    assert answer.warnings == "the worker had ended (idle for 1 s); a new one runs. Lost with it: big."
    assert lost.is_lost
    assert session.hello["pid"] != pid
    session.stop()


def wait_for_end(pid: int) -> None:
    """Until a process has ended, whoever its parent is."""
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not process_exists(pid)


def test_a_worker_stays_while_it_is_wanted(tiny: WorkerSpec, connect: Connect) -> None:
    """min_containers=1 or a connection that holds keep it beyond its window; without them it ends."""
    session = connect(tiny, scaledown_window=0.2)
    pid = session.hello["pid"]
    session.ask({"verb": "hold"})
    assert session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 0}) is None
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(pid).wait(1.5)
    session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 1})
    session.close()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(pid).wait(1.5)
    session.ask({"verb": "settings", "scaledown_window": 0.2, "min_containers": 0})
    session.close()
    wait_for_end(pid)


@pytest.mark.parametrize("kind", ["no such folder", "no model in it", "adapter without a base"])
def test_a_load_that_fails_is_a_clear_error_and_leaves_no_process(kind: str, tmp_path: Path) -> None:
    if kind == "adapter without a base":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    path = tmp_path / "absent" if kind == "no such folder" else tmp_path
    spec = WorkerSpec(model_name=str(path), is_peft=kind == "adapter without a base")
    session = Session(LocalBackend(spec))
    with pytest.raises(LoadError, match=str(tmp_path)):
        session.connect()
    (note,) = LocalBackend(spec).folder.glob("exit-*.json")
    assert not process_exists(int(note.stem.removeprefix("exit-")))
    assert str(tmp_path) in json.loads(note.read_text())["reason"]
    assert LocalBackend(spec).attach("me") is None
    shutil.rmtree(LocalBackend(spec).folder)


def test_workers_are_found_by_the_start_of_their_key(tiny: WorkerSpec, connect: Connect) -> None:
    session = connect(tiny)
    pid = session.hello["pid"]
    worker = next(w for w in list_workers() if w.key == tiny.key)
    assert (worker.state, worker.pid, worker.clients) == ("idle", pid, 1)
    assert worker.memory_bytes == pytest.approx(psutil.Process(pid).memory_info().rss, rel=0.2)
    stop_worker(tiny.key[:10])
    assert not process_exists(pid)
    stop_worker(tiny.key)  # a second time changes nothing
    with pytest.raises(WorkerError, match=r"0 workers have a key that begins with 'zzz'; those that exist: .*" + tiny.key):
        stop_worker("zzz")
    assert runtime_root() == RUN
    session.close()
