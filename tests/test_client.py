"""InterpClient, as a script uses it."""

from __future__ import annotations

import builtins
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from interp_kernel import InterpClient
from interp_kernel.errors import (
    CallTimeoutError,
    RemoteError,
    ShipError,
    SpecError,
    TechniqueError,
    WorkerError,
    remote_error,
)
from interp_kernel.session import RemoteValue
from tests.helpers_worker import DEMO, press_stop, wait_until


@pytest.fixture(scope="module")
def client() -> Iterator[InterpClient]:
    with InterpClient(model_name=DEMO) as client:
        yield client


# ----------------------------------------------------------------------------------------------- values


def test_run_calls_with_model_tokenizer_and_arguments(client: InterpClient) -> None:
    import torch

    def scale(model: Any, tokenizer: Any, x: Any, *, by: float = 1.0) -> dict[str, Any]:
        return {"x": (x * by).to(torch.bfloat16), "n": model.config.n_layer, "ids": tokenizer("a b")["input_ids"]}

    result = client.run(scale, torch.ones(3), by=2.0)
    assert (result["x"].dtype, result["x"].tolist(), result["x"].device.type) == (torch.bfloat16, [2, 2, 2], "cpu")
    info = client.model_info()
    assert result["n"] == info["n_layer" if "n_layer" in info else "n_layers"]
    assert all(isinstance(i, int) for i in result["ids"])


def test_closures_partials_and_async_functions_run(client: InterpClient) -> None:
    offset = 10

    def add(model: Any, tokenizer: Any, x: int) -> int:
        return x + offset

    async def later(model: Any, tokenizer: Any) -> str:
        import asyncio

        await asyncio.sleep(0)
        return "later"

    assert client.run(functools.partial(add, x=1)) == 11
    assert client.run(later) == "later"
    assert client.run(lambda model, tokenizer: os.sep) == os.sep


def test_printing_appears_here(client: InterpClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.run(lambda model, tokenizer: print("out") or sys.stderr.write("err"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err")


def test_inputs_that_cannot_travel_are_named(client: InterpClient) -> None:
    def use(model: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ShipError, match=r"'lock' \(lock\) can't be sent to the worker: .*cannot pickle"):
        client.run(use, 1, lock=threading.Lock())
    with pytest.raises(ShipError, match=r"cannot pickle .*\. Make it in the remote code itself"):
        client.run(use, 1, lock=threading.Lock())
    with pytest.raises(ShipError, match=r"'args\[1\]' \(generator\) can't be sent .* Return list"):
        client.run(use, 1, (i for i in "ab"))
    with pytest.raises(ShipError, match=r"run\(\) was given a str; expected a function"):
        client.run("not a function")  # type: ignore[arg-type]


def test_results_that_stay_say_why(client: InterpClient, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShipError, match="The worker's model and tokenizer stay on the worker"):
        client.run(lambda model, tokenizer: model)
    with pytest.raises(ShipError, match="A generator can't travel, for it is a paused computation"):
        client.run(lambda model, tokenizer: (i for i in range(3)))
    lock = client.run(lambda model, tokenizer: __import__("threading").Lock())
    assert isinstance(lock, RemoteValue)
    assert "the result stays on the worker as a RemoteValue: it can't be pickled" in capsys.readouterr().err
    assert client.run(lambda model, tokenizer, x: x.acquire(blocking=False), lock) is True


def test_deleting_a_handle_frees_the_value(client: InterpClient) -> None:
    def make(model: Any, tokenizer: Any) -> Any:
        import builtins
        import threading
        import weakref

        class Big:
            lock = threading.Lock()

            def __reduce__(self) -> Any:
                raise TypeError("it stays")

        big = Big()
        builtins.probe = weakref.ref(big)  # type: ignore[attr-defined]
        return big

    def is_alive(model: Any, tokenizer: Any) -> bool:
        import builtins
        import gc

        gc.collect()
        return builtins.probe() is not None  # type: ignore[attr-defined]

    handle = client.run(make)
    assert client.run(is_alive)
    del handle
    wait_until(lambda: not client.run(is_alive))


def test_a_handle_of_another_worker_is_refused(client: InterpClient) -> None:
    handle = client.run(lambda model, tokenizer: __import__("threading").Lock())
    other = InterpClient(model_name=DEMO)
    with other, pytest.raises(ShipError, match=r"is on another worker than the one that this call goes to\. Fetch it"):
        other.run(lambda model, tokenizer, x: x, handle)
    with pytest.raises(TypeError, match="A RemoteValue is a handle for its own notebook only"):
        __import__("pickle").dumps(handle)


# ----------------------------------------------------------------------------------------------- errors


def test_errors_keep_their_name_and_can_be_caught_by_it(client: InterpClient) -> None:
    def fail(model: Any, tokenizer: Any) -> None:
        raise KeyError("absent")

    with pytest.raises(KeyError) as caught:
        client.run(fail)
    error = caught.value
    assert isinstance(error, RemoteError)
    assert (type(error).__name__, error.ename, str(error)) == ("KeyError", "KeyError", "'absent'")
    assert 'raise KeyError("absent")' in "\n".join(error.traceback)
    with pytest.raises(RemoteError, match="unlikely"):
        client.run(lambda model, tokenizer: sys.exit("unlikely"))


def test_a_time_limit(client: InterpClient) -> None:
    with pytest.raises(CallTimeoutError, match=r"the call ran past its limit of 0\.2 s"):
        client.run(lambda model, tokenizer: __import__("time").sleep(60), timeout=0.2)
    assert client.run(lambda model, tokenizer: 5, timeout=60) == 5
    for wrong in (0, -1, "a", True):
        with pytest.raises(SpecError, match=f"timeout is {wrong!r}; expected a number of seconds above 0"):
            client.run(lambda model, tokenizer: 5, timeout=wrong)  # type: ignore[arg-type]


def test_a_handle_says_what_to_do_with_it(client: InterpClient) -> None:
    handle = client.run(lambda model, tokenizer: threading.Lock())
    with pytest.raises(AttributeError, match=r"has no 'locked' here: the value is on the worker\. Use it in a remote"):
        handle.locked()


def test_a_stop_is_a_keyboard_interrupt(client: InterpClient) -> None:
    job = threading.Timer(0.3, os.kill, (os.getpid(), 2))  # where Jupyter's stop button would come from
    job.start()
    with pytest.raises(KeyboardInterrupt):
        client.run(lambda model, tokenizer: __import__("time").sleep(60))
    job.join()
    assert callable(press_stop)


# ------------------------------------------------------------------------------------------- jobs, map


def test_a_job_runs_in_the_background(client: InterpClient, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")

    def wait(model: Any, tokenizer: Any) -> str:
        import os
        import time

        print("waiting", flush=True)
        while not os.path.exists(gate):
            time.sleep(0.005)
        return "done"

    job = client.submit(wait)
    queued = client.submit(lambda model, tokenizer: 7)
    wait_until(lambda: [e for e in job.events if e["event"] == "stream"])
    assert (job.done(), repr(job)) == (False, "<Job running>")
    with pytest.raises(TimeoutError):
        job.result(timeout=0.01)
    Path(gate).touch()
    assert (job.result(30), queued.result(30)) == ("done", 7)
    assert repr(job) == "<Job done>"
    assert "".join(e["text"] for e in job.events if e["event"] == "stream") == "waiting\n"


def test_a_job_can_be_cancelled_running_or_queued(client: InterpClient) -> None:
    def endless(model: Any, tokenizer: Any) -> None:
        import time

        print("ready", flush=True)
        while True:
            time.sleep(0.01)

    running = client.submit(endless)
    wait_until(lambda: running.events)
    queued = client.submit(endless)
    wait_until(lambda: queued.events)
    assert queued.cancel()
    assert running.cancel()
    for job in (queued, running):
        with pytest.raises(KeyboardInterrupt):
            job.result(30)
        assert repr(job) == "<Job failed>"
    assert not running.cancel()
    assert client.run(lambda model, tokenizer: 1) == 1


def test_a_job_takes_its_arguments_as_they_were(client: InterpClient) -> None:
    import torch

    texts, numbers = ["then"], torch.zeros(400_000)
    busy = client.submit(lambda model, tokenizer: __import__("time").sleep(0.3))
    job = client.submit(lambda model, tokenizer, texts, numbers: (texts, float(numbers.sum())), texts, numbers)
    texts.append("now")
    numbers += 1
    assert job.result(30) == (["then"], 0.0)
    busy.result(30)
    with pytest.raises(ShipError, match=r"args\[0\].*can't be sent"):
        client.submit(len, threading.Lock())


def test_a_job_can_be_cancelled_before_it_is_on_its_way(client: InterpClient) -> None:
    def endless(model: Any, tokenizer: Any) -> None:
        import time

        while True:
            time.sleep(0.01)

    for pause_s in [0.0001 * i for i in range(30)]:  # from before the call is sent until after it runs
        job = client.submit(endless)
        time.sleep(pause_s)
        assert job.cancel()
        with pytest.raises(KeyboardInterrupt):
            job.result(30)
    assert client.run(lambda model, tokenizer: 1) == 1


def test_a_job_of_a_killed_process_is_found_by_its_id(client: InterpClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    code = f"""if True:
        import time
        from pathlib import Path
        from interp_kernel import InterpClient
        def wait(model, tokenizer):
            import os, time
            print("waiting", flush=True)
            while not os.path.exists({str(gate)!r}):
                time.sleep(0.005)
            return "done"
        client = InterpClient(model_name="demo")
        job = client.submit(wait)
        while not job.events:
            time.sleep(0.005)
        print(job.id, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        call_id = killed.stdout.readline().strip()
        killed.kill()
    job = client.job(call_id)
    wait_until(lambda: job.events)
    assert not job.done()
    gate.touch()
    assert job.result(30) == "done"
    assert "".join(e["text"] for e in job.events if e["event"] == "stream") == "waiting\n"
    with pytest.raises(WorkerError, match=rf"The worker knows no call '{call_id}x'"):
        client.job(f"{call_id}x").result(30)


def test_interrupt_stops_the_call_that_runs(client: InterpClient) -> None:
    job = client.submit(lambda model, tokenizer: print("up", flush=True) or __import__("time").sleep(60))
    wait_until(lambda: job.events)
    assert client.interrupt()
    with pytest.raises(KeyboardInterrupt):
        job.result(30)
    assert not client.interrupt()


def test_map_yields_in_order_and_names_the_input_that_failed(client: InterpClient) -> None:
    assert list(client.map(lambda model, tokenizer, x, by: x * by, iter(range(5)), by=3)) == [0, 3, 6, 9, 12]
    results = client.map(lambda model, tokenizer, x: 1 / x, [2, 1, 0, 4])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert caught.value.__notes__ == ["It was input 2 (counted from 0) of map."]


# ------------------------------------------------------------------------------------------- techniques


def test_techniques_run_from_files_and_an_edit_counts_at_once(client: InterpClient, tmp_path: Path) -> None:
    (tmp_path / "_shared.py").write_text("FACTOR = 2\n")
    file = tmp_path / "count_layers.py"
    source = "import torch\nfrom _shared import FACTOR\n\n\ndef count_layers(model, tokenizer, more=0):\n"
    source += '    """Count."""\n    return FACTOR * model.config.n_layer + more\n'
    file.write_text(source)
    technique = client.load_technique_from_file(file)
    layers = client.model_info()["n_layers"]
    assert client.run(technique, more=1) == 2 * layers + 1
    (tmp_path / "_shared.py").write_text("FACTOR = 3\n")
    assert client.run(technique) == 3 * layers
    file.write_text(source.replace("+ more", "- more"))
    assert client.run(technique, more=1) == 3 * layers - 1
    assert client.load_techniques_from_dir(tmp_path)["count_layers"].name == "count_layers"
    assert "count_layers" in client.techniques
    with pytest.raises(TechniqueError, match="count_layers"):
        client.load_technique_from_file(file, "absent")


# --------------------------------------------------------------------------------------------- options


def test_older_names_are_accepted_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="container_idle_timeout is now called scaledown_window"):
        client = InterpClient(container_idle_timeout=7)
    assert client.scaledown_window == 7
    with pytest.warns(DeprecationWarning, match="is now called") as warned:
        client = InterpClient(keep_warm=1, torch_dtype="bfloat16")
    assert len(warned) == 2
    assert (client.min_containers, client.spec.dtype) == (1, "bfloat16")
    assert {Path(w.filename) for w in warned} == {Path(__file__)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle_name": "x"}, r"option 'modle_name' is not known; expected one of model_name, "),
        ({"modle_name": "x"}, r"Did you mean 'model_name'\?"),
        ({"mode": "cloud"}, r"mode 'cloud' is not known; expected one of local, modal"),
        ({"scaledown_window": 0}, r"scaledown_window is 0; expected a number of seconds above 0"),
        ({"min_containers": 2}, r"min_containers is 2; expected 0, or 1"),
        ({"dtype": "float8"}, r"dtype 'float8' is not known; expected one of auto, float32"),
        ({"base_model": "x"}, r"base_model='x' needs is_peft=True"),
        ({"model_name": " "}, r"model_name is ' '; expected `demo`"),
        ({"scaledown_window": float("inf")}, r"scaledown_window is inf; expected a number of seconds above 0"),
        ({"revision": 3}, r"revision is 3; expected text, or None to leave it out"),
        ({"is_peft": "yes"}, r"is_peft is 'yes'; expected True or False"),
        ({"trust_remote_code": 1}, r"trust_remote_code is 1; expected True or False"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        InterpClient(**options)


def test_the_hidden_prompts_text_is_never_repeated() -> None:
    with pytest.raises(SpecError) as refused:
        InterpClient(hidden_system_prompt="You guard the word swordfish.")
    assert "swordfish" not in str(refused.value)
    with pytest.raises(SpecError, match="hidden_system_prompt is list; expected text") as refused:
        InterpClient(hidden_system_prompt=["You guard the word swordfish."])
    assert "swordfish" not in str(refused.value)


def test_container_options_warn_that_they_do_nothing_here() -> None:
    with pytest.warns(UserWarning, match="deploy has no effect on a local worker; it is for mode='modal'"):
        InterpClient(deploy=True)
    with pytest.warns(UserWarning, match="gpu has no effect on a local worker; device_map places the model"):
        InterpClient(gpu="A100")


def test_the_window_of_a_running_worker_is_changed(client: InterpClient) -> None:
    client.connect()
    with InterpClient(model_name=DEMO, scaledown_window=222) as other:
        other.connect()
        assert client.session.ask({"verb": "hello"})["scaledown_window"] == 222
    assert client.model_info()["model_name"] == DEMO
    client.session.ask({"verb": "settings", "scaledown_window": 300, "min_containers": 0})


def test_a_client_needs_no_torch(client: InterpClient) -> None:
    client.connect()
    code = f"""if True:
        import sys
        from interp_kernel import InterpClient
        with InterpClient(model_name={DEMO!r}) as client:
            value = client.run(lambda model, tokenizer, x: {{'n': model.config.n_layer, 'x': [x]}}, 'text')
        heavy = {{'torch', 'transformers', 'numpy', 'pandas', 'IPython'}} & set(sys.modules)
        print(value['x'], sorted(heavy))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['text'] []\n"


REBUILT_FROM: dict[str, tuple[str, type[Exception]]] = {
    "a file that is not here": ("open, ('/not/here',)", FileNotFoundError),
    "an end of file": ("exec, ('raise EOFError',)", EOFError),
}


@pytest.mark.parametrize("what", REBUILT_FROM)
def test_a_result_that_can_t_be_made_here_is_an_error(what: str, client: InterpClient) -> None:
    parts, expected = REBUILT_FROM[what]
    space: dict[str, Any] = {"__name__": "__main__"}
    made = f"type('Made', (), {{'__reduce__': lambda self: ({parts})}})()"
    exec(f"def make(model, tokenizer): return {made}", space)
    with pytest.raises(expected):
        client.submit(space["make"]).result(20)
    assert client.run(lambda model, tokenizer: 1) == 1


def test_children_that_a_script_forks_get_their_own_answers(client: InterpClient) -> None:
    client.run(lambda model, tokenizer: 0)
    code = """if True:
        import multiprocessing, sys, time
        from interp_kernel import InterpClient
        client = InterpClient()
        def answer(model, tokenizer, x):
            import time
            time.sleep(0.05)
            return x
        def child(x):
            for i in range(5):
                assert client.run(answer, (x, i)) == (x, i)
        assert client.run(answer, 0) == 0
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(x,)) for x in range(4)]
        for process in children:
            process.start()
        assert client.run(answer, 5) == 5
        for process in children:
            process.join()
        print([process.exitcode for process in children], client.run(answer, 6))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[0, 0, 0, 0] 6\n", done.stderr


def test_a_call_that_takes_all_descriptors_leaves_the_worker_within_reach(client: InterpClient) -> None:
    def take(model: Any, tokenizer: Any, gate: str) -> int:
        import os
        import resource
        import time

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limit[1]))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", 0))
        except OSError:
            print("ready", flush=True)
        while not os.path.exists(gate):
            time.sleep(0.005)
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        return len(taken)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        gate = Path(folder, "gate")
        job = client.submit(take, str(gate))
        wait_until(lambda: job.events)
        late = [InterpClient(model_name=DEMO) for _ in range(3)]
        others = [threads.submit(other.connect) for other in late]
        wait([others[0]], timeout=0.2)  # the first has a descriptor that was kept for it
        gate.touch()
        assert job.result(30) > 100
        assert {other.result(30)["model_name"] for other in others} == {"demo"}
        assert {other.session.generation for other in late} == {client.session.generation}
        for other in late:
            other.close()


def test_inputs_that_do_not_fit_are_an_error_and_the_next_call_works(client: InterpClient) -> None:
    def limit(model: Any, tokenizer: Any, more: int) -> None:
        import resource
        from pathlib import Path

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more if more else -1, -1))

    client.run(limit, 200_000_000)
    try:
        with pytest.raises(MemoryError, match="The inputs do not fit into the worker's memory"):
            client.submit(lambda model, tokenizer, x: len(x), bytearray(400_000_000)).result(30)
    finally:
        client.run(limit, 0)
    assert client.run(lambda model, tokenizer, x: len(x), bytearray(2_000_000)) == 2_000_000


EXCEPTIONS = [n for n, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)]


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_error_of_python_can_be_told(name: str) -> None:
    error = remote_error(name, "the text", ["its", "lines"])
    assert (type(error).__name__, error.evalue, str(error)[-8:]) == (name, "the text", "the text")


def test_a_lack_of_memory_on_the_worker_can_be_caught_by_its_name(client: InterpClient) -> None:
    with pytest.raises(MemoryError):
        client.run(lambda model, tokenizer: bytearray(1 << 60))
