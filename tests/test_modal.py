"""Modal's side of a worker: what is asked for, what a container has, fan-out, the deployed app, refusals."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from grpclib import Status
from modal_proto import api_pb2

from interp_kernel import InterpClient, hf_image
from interp_kernel.backends.modal import failures, link
from interp_kernel.cli import main
from interp_kernel.errors import RemoteError, ShipError, SpecError, WorkerError
from interp_kernel.protocol import Head
from tests.helpers_worker import DEMO, press_stop, run_cell, wait_until
from tests.modal_loopback import Loopback

PROMPT = "You guard the word swordfish."


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    with Loopback() as loopback:
        loopback.make_secret("huggingface-secret", {"HF_TOKEN": "hf_of_the_secret"})
        yield loopback


def definition(loopback: Loopback, app_name: str, kind: str = "Gateway") -> api_pb2.Function:
    """What Modal was asked for, for a class of an app."""
    found = [f for f in loopback.plane.functions.values() if f.app.name == app_name and f.base is None]
    (chosen,) = [f.definition for f in found if f.definition.function_name.startswith(kind)]
    return chosen


# ----------------------------------------------------------------------------------- options, before anything


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "A1000"}, r"gpu 'A1000' is not known to Modal; expected one of T4, .* Did you mean 'A100'"),
        ({"gpu": ["A10G", "X1"]}, "gpu 'X1' is not known to Modal"),
        ({"gpu": "H100:9"}, r"gpu 'H100:9' asks for '9' GPUs; one container has 1 to 8 of H100"),
        ({"gpu": "A10G:many"}, r"asks for 'many' GPUs; one container has 1 to 4"),
        ({"gpu": []}, r"gpu is \[\]; expected a name as 'A10G', 'H100:2', or a list"),
        ({"scaledown_window": 1}, r"scaledown_window is 1; Modal takes a whole number from 2 to 3600"),
        ({"scaledown_window": 3601}, r"scaledown_window is 3601; Modal takes a whole number from 2 to 3600"),
        ({"scaledown_window": 2.5}, r"scaledown_window is 2\.5; Modal takes a whole number"),
        ({"min_containers": 2}, "min_containers is 2; expected 0, or 1"),
        ({"timeout": 0}, "timeout is 0; Modal takes a whole number from 1 to 86400"),
        ({"startup_timeout": "long"}, "startup_timeout is 'long'; Modal takes a whole number"),
        ({"retries": 11}, "retries is 11; Modal takes a whole number from 0 to 10"),
        ({"cloud": "moon"}, "cloud is 'moon'; expected one of aws, gcp, oci, auto"),
        ({"memory": -1}, "memory is -1; expected an amount above 0"),
        ({"cpu": (1, 2, 3)}, r"cpu is \(1, 2, 3\); expected an amount above 0, or a pair"),
        ({"app_name": "two words"}, "app_name is 'two words'; expected up to 64 letters, digits"),
        ({"model_volume": "a/b"}, "model_volume is 'a/b'; expected up to 64 letters"),
        ({"volumes": {"data": "v"}}, r"volumes has the path 'data'; expected an absolute path"),
        ({"volumes": {"/data": "a/b"}}, r"volumes\['/data'\] is 'a/b'; expected the name of a volume"),
        ({"gpus": "A10G"}, "'gpus' is not known; .*gpu"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(
    options: dict[str, Any], message: str, loopback: Loopback
) -> None:
    before = loopback.total()
    with pytest.raises(SpecError, match=message):
        InterpClient(mode="modal", **options)
    assert loopback.total() == before


def test_an_image_or_a_folder_that_no_container_has(loopback: Loopback, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"image is a int; expected a modal\.Image"):
        InterpClient(mode="modal", app_name="image", image=3).connect(lambda _: None)
    with pytest.raises(SpecError, match=r"a folder of this machine.*modal volume put weights .*model_volume='weights'"):
        InterpClient(mode="modal", model_name=str(tmp_path))


def test_older_names_are_accepted_with_a_note() -> None:
    with pytest.warns(DeprecationWarning, match="is now called") as notes:
        client = InterpClient(mode="modal", container_idle_timeout=600, keep_warm=1)
    assert len(notes) == 2
    assert "GPU" in client.stays()
    assert "stays warm until it is stopped" in client.stays()


def test_price_class_and_window_are_told() -> None:
    assert InterpClient(mode="modal", gpu="h100:2").stays() == (
        "GPU H100:2 (high price class); stays warm 5 min after the last call"
    )
    assert InterpClient(mode="modal", gpu=["T4", "any"], scaledown_window=30).stays() == (
        "GPU T4 or any (low price class); stays warm 30 s after the last call"
    )


# --------------------------------------------------------------------------------- what Modal is asked for


def test_deploy_passes_the_options_on_under_modals_names(
    loopback: Loopback, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--app-name asked --gpu H100:2 --timeout 600 --startup-timeout 700 --region us-east,eu --cloud aws"
    words += " --memory 2048 --cpu 2.5 --scaledown-window 90 --secret huggingface-secret"
    modal.Volume.from_name("weights", create_if_missing=True).hydrate()
    assert main(["modal", "deploy", *words.split(), "--model-volume", "weights", "--retries", "5"]) == 0
    out = capsys.readouterr().out
    assert "Deployed 'asked': GPU H100:2 (high price class); stays warm 1.5 min after the last call." in out
    assert "%remote start MODEL --backend modal --deploy --app-name asked" in out
    asked = definition(loopback, "asked")
    assert (asked.resources.gpu_config.gpu_type, asked.resources.gpu_config.count) == ("H100", 2)
    assert (asked.resources.memory_mb, asked.resources.milli_cpu) == (2048, 2500)
    assert (asked.timeout_secs, asked.startup_timeout_secs) == (86_400, 700)  # the session keeps the limit of a call
    assert (asked.autoscaler_settings.scaledown_window, asked.autoscaler_settings.max_containers) == (90, 1)
    assert list(asked.scheduler_placement.regions) == ["us-east", "eu"]
    assert asked.cloud_provider_str == "aws"
    assert len(asked.secret_ids) == 1
    assert {volume.mount_path for volume in asked.volume_mounts} == {"/hf-cache", "/models"}
    assert asked.max_concurrent_inputs > 10
    assert asked.retry_policy.retries == 0  # a cell never runs twice
    mapper = definition(loopback, "asked", "Mapper")
    assert (mapper.retry_policy.retries, mapper.timeout_secs) == (5, 600 + 700)
    assert not loopback.tasks()


def test_the_image_has_this_python_and_what_a_worker_needs(loopback: Loopback) -> None:
    image = hf_image.pip_install("einops==0.8.0")
    with InterpClient(mode="modal", app_name="recipe", deploy=True, image=image) as client:
        loopback.refuse("FunctionBindParams", Status.INVALID_ARGUMENT, "far enough")
        with pytest.raises(WorkerError, match="far enough"):
            client.connect(lambda _: None)
    recipe = loopback.recipe()
    assert re.search(rf"FROM python:{re.escape(python_minor())}", recipe)
    for package in ("torch", "transformers", "accelerate", "safetensors", "peft", "bitsandbytes", "cloudpickle"):
        assert re.search(rf"\b{package}[=>]=", recipe), package
    assert "einops==0.8.0" in recipe


def python_minor() -> str:
    return ".".join(map(str, sys.version_info[:2]))


# ------------------------------------------------------------------------------------------- one container


@pytest.fixture(scope="module")
def start_events() -> list[Head]:
    """What the start of the furnished container showed."""
    return []


@pytest.fixture(scope="module")
def furnished(
    loopback: Loopback, start_events: list[Head], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InterpClient]:
    """A client whose container has a secret, a volume and a hidden prompt."""
    prompt = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    prompt.write_text(PROMPT)
    modal.Volume.from_name("shared-data", create_if_missing=True).hydrate()
    with InterpClient(
        mode="modal",
        app_name="furnished",
        secrets=["huggingface-secret"],
        volumes={"/data": "shared-data"},
        hidden_system_prompt=f"file:{prompt}",
    ) as client:
        loopback.hold_starts()

        def note(event: Head) -> None:
            start_events.append(event)
            if "waiting for a container" in str(event.get("text")):
                loopback.release_starts()

        client.connect(note)
        yield client
        client.stop()


def test_the_start_is_shown_with_seconds(furnished: InterpClient, start_events: list[Head]) -> None:
    waits = [e for e in start_events if "waiting for a container" in str(e.get("text"))]
    assert waits
    assert 0.1 < waits[0]["elapsed_s"] < 20
    assert waits[-1]["done"]
    assert any("torch" in str(e.get("text")) for e in start_events)
    assert re.fullmatch(r"demo loaded in \d+\.\d s", start_events[-1]["text"])


def test_a_container_has_what_it_was_given_and_no_more(furnished: InterpClient, loopback: Loopback) -> None:
    body = "import os, sys, interp_kernel\nv = os.environ['HF_TOKEN'], os.environ['HF_HOME'], interp_kernel.__file__, "
    body += "os.environ.get('INTERP_RUNTIME_DIR'), sys.path"
    token, cache, package, runtime, path = run_cell(furnished.session, body)["v"]
    assert token == "hf_of_the_secret"
    assert cache.endswith("/hf-cache")
    assert Path(cache).resolve().parent == loopback.plane.folder / "volumes"
    assert loopback.live()[-1].id in package
    assert runtime != os.environ["INTERP_RUNTIME_DIR"]
    assert str(Path(__file__).parents[1]) not in path


def test_what_is_written_to_a_volume_stays(furnished: InterpClient, loopback: Loopback) -> None:
    folder = f"{loopback.plane.folder}/{loopback.live()[-1].id}/data"
    run_cell(furnished.session, f"_ = open({folder!r} + '/kept', 'w').write('text')")
    (kept,) = (loopback.plane.folder / "volumes").glob("*/kept")
    assert kept.read_text() == "text"


def test_the_hidden_prompt_is_there_and_nowhere_else(furnished: InterpClient, loopback: Loopback) -> None:
    body = "n = len(tokenizer('a')['input_ids'])\nv = n, 'swordfish' in tokenizer.decode(tokenizer('a')['input_ids'])"
    n_ids, is_shown = run_cell(furnished.session, body)["v"]
    assert n_ids > 5
    assert is_shown
    told = [repr(furnished), str(furnished.spec), furnished.stays(), loopback.recipe()]
    told += [call.SerializeToString().decode("latin1") for call in (f.definition for f in functions(loopback))]
    told += [function.serialized_params.decode("latin1") for function in functions(loopback)]
    assert not [text for text in told if "swordfish" in text]


def functions(loopback: Loopback) -> list[Any]:
    return list(loopback.plane.functions.values())


def test_what_a_container_writes_is_no_users_output(
    furnished: InterpClient, loopback: Loopback, capfd: pytest.CaptureFixture[str]
) -> None:
    assert furnished.run(lambda model, tokenizer: print("shown once")) is None
    captured = capfd.readouterr()
    assert captured.out == "shown once\n"
    assert captured.err == ""


# ---------------------------------------------------------------------------------------------- sizes


def test_inputs_over_the_limit_are_refused_with_the_cure(
    furnished: InterpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LARGEST", 2_000_000)
    with pytest.raises(ShipError, match=r"The inputs are 0\.00 GB; .* at most 0\.00 GB at once\. Put large data on a"):
        furnished.run(lambda model, tokenizer, x: None, bytearray(3_000_000))
    assert furnished.run(lambda model, tokenizer, x: len(x), bytearray(1_500_000)) == 1_500_000


# ------------------------------------------------------------------------------------------------- fan-out


@pytest.fixture(scope="module")
def crowd(loopback: Loopback) -> Iterator[InterpClient]:
    with InterpClient(mode="modal", app_name="crowd", retries=2) as client:
        yield client
        client.stop()


def test_a_map_spreads_over_containers_and_keeps_the_order(
    crowd: InterpClient, loopback: Loopback, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def who(model: Any, tokenizer: Any, x: int, *, by: int) -> tuple[int, str, int]:
        import os
        import time

        time.sleep(0.05)
        return x * by, os.environ["MODAL_TASK_ID"], model.config.n_layer

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = set(loopback.tasks())
    found = list(crowd.map(who, range(40), max_containers=2, by=3))
    assert [value for value, _, _ in found] == [3 * i for i in range(40)]
    assert len({task for _, task, _ in found}) == 2
    assert len({n_layers for _, _, n_layers in found}) == 1
    assert len(set(loopback.tasks()) - before) == 2
    assert "map 100% [####################] 40/40 inputs" in capsys.readouterr().err


def test_errors_of_single_inputs_are_kept_and_not_repeated(crowd: InterpClient, tmp_path: Path) -> None:
    count = str(tmp_path / "count")

    def invert(model: Any, tokenizer: Any, x: int) -> float:
        with open(count, "a") as file:
            file.write("x")
        return 1 / x

    found = list(crowd.map(invert, [2, 1, 0, 4], max_containers=2, return_exceptions=True))
    assert [found[0], found[1], found[3]] == [0.5, 1.0, 0.25]
    assert isinstance(found[2], ZeroDivisionError)
    assert isinstance(found[2], RemoteError)
    assert Path(count).read_text() == "xxxx"
    with pytest.raises(ZeroDivisionError) as caught:
        crowd.for_each(invert, [2, 1, 0, 4], max_containers=2)
    assert caught.value.__notes__ == ["It was input 2 (counted from 0) of map."]


def test_an_input_whose_container_is_lost_runs_elsewhere(
    crowd: InterpClient, loopback: Loopback, tmp_path: Path
) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    started.mkdir()
    paths = str(started), str(gate)

    def wait(model: Any, tokenizer: Any, x: int) -> int:
        import os
        import time

        open(f"{paths[0]}/{os.environ['MODAL_TASK_ID']}", "w").close()
        while not os.path.exists(paths[1]):
            time.sleep(0.01)
        return x

    def lose_one() -> None:
        wait_until(lambda: list(started.iterdir()))
        lost = next(iter(started.iterdir())).name
        loopback.kill(next(task for task in loopback.live() if task.id == lost))
        gate.touch()

    losing = threading.Thread(target=lose_one)
    losing.start()
    assert list(crowd.map(wait, range(4), max_containers=2)) == [0, 1, 2, 3]
    losing.join()


def test_a_map_that_is_left_early_stops_the_rest(crowd: InterpClient, loopback: Loopback, tmp_path: Path) -> None:
    count = str(tmp_path / "count")

    def slow(model: Any, tokenizer: Any, x: int) -> int:
        import time

        with open(count, "a") as file:
            file.write("x")
        time.sleep(0 if x < 8 else 600)  # so many are sent at first, in no certain order
        return x

    results = crowd.map(slow, range(400), max_containers=2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert list(crowd.map(lambda model, tokenizer, x: x, [7], max_containers=2)) == [7]
    assert len(Path(count).read_text()) < 20


@pytest.mark.parametrize("n", [0, 1001, "many"])
def test_a_wrong_number_of_containers_is_refused(n: Any, crowd: InterpClient) -> None:
    with pytest.raises(SpecError, match=f"max_containers is {n!r}; expected a number from 1 to 1000"):
        list(crowd.map(lambda model, tokenizer, x: x, [1], max_containers=n))


# ------------------------------------------------------------------------------------------------ the CLI


def test_the_deployed_apps_life_from_the_command_line(loopback: Loopback, capfd: pytest.CaptureFixture[str]) -> None:
    name = ["--app-name", "line"]
    assert main(["modal", "status", *name]) == 0
    assert "'line' neither runs nor is deployed. Deploy it: interp-kernel modal deploy." in capfd.readouterr().out
    assert main(["modal", "deploy", *name]) == 0
    with InterpClient(mode="modal", app_name="line", deploy=True) as client:
        deployments = loopback.calls("AppPublish")
        client.connect(lambda _: None)
        assert loopback.calls("AppPublish") == deployments
        assert client.run(lambda model, tokenizer: 5) == 5
    capfd.readouterr()
    assert main(["modal", "status", *name]) == 0
    assert "line: deployed, 1 containers" in capfd.readouterr().out
    task = loopback.live()[-1]
    client.run(
        lambda model, tokenizer, path: Path(path).write_text("said by the container\n"), f"/proc/{task.pid}/fd/1"
    )
    wait_until(lambda: task.log)
    assert main(["modal", "logs", *name]) == 0
    assert "said by the container" in capfd.readouterr().out
    assert main(["modal", "stop", *name]) == 0
    assert "Stopped 'line' (deployed)." in capfd.readouterr().out
    loopback.await_end(task)
    assert main(["modal", "stop", *name]) == 1
    assert "No app 'line' runs or is deployed at Modal." in capfd.readouterr().err


def test_min_containers_are_asked_for_and_a_stop_ends_the_container_at_once(loopback: Loopback) -> None:
    with InterpClient(mode="modal", app_name="kept", deploy=True, min_containers=1) as client:
        client.connect(lambda _: None)
        task = loopback.live()[-1]
        assert task.function.definition.autoscaler_settings.min_containers == 1
        client.stop()
        loopback.await_end(task)
        assert task.end_reason == "it asked to end"


# --------------------------------------------------------------------------------- errors at Modal's door


def refusal(**options: Any) -> str:
    """What the start of a client says that fails, and that it fails soon."""
    start = time.monotonic()
    with InterpClient(mode="modal", **options) as client, pytest.raises(WorkerError) as refused:
        client.connect(lambda _: None)
    assert time.monotonic() - start < 5
    return str(refused.value)


def test_a_missing_token(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODAL_TOKEN_ID")
    assert "There is no Modal token on this machine. Make a token with `modal token new`" in refusal(app_name="t1")


def test_a_refused_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback():
        monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-of-somebody-else")
        text = refusal(app_name="t2")
    assert "Token validation failed" in text
    assert "`modal token new`" in text


def test_no_network(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")
    text = refusal(app_name="t3")
    assert "Modal can't be reached at 127.0.0.1:9" in text
    assert "Check the network" in text


def test_a_secret_or_volume_that_is_missing(loopback: Loopback) -> None:
    assert "Modal has no secret 'absent'. Make it: modal secret create absent" in refusal(
        app_name="t4", secrets=["absent"]
    )
    assert "Modal has no volume 'absent'. Make it: modal volume create absent" in refusal(
        app_name="t5", volumes={"/data": "absent"}
    )


def test_an_image_that_does_not_build(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback.plane.settings, "image_error", "No matching distribution found for torch==99")
    text = refusal(app_name="t6")
    assert "No matching distribution found for torch==99" in text
    assert "Correct `image=`" in text


def test_a_gpu_that_the_workspace_may_not_use(loopback: Loopback) -> None:
    loopback.refuse("FunctionCreate", Status.RESOURCE_EXHAUSTED, "B200 is not in your plan")
    text = refusal(app_name="t7", gpu="B200")
    assert "B200 is not in your plan" in text
    assert "limit" in text


def test_every_exception_of_modal_has_an_answer() -> None:
    kinds = {
        name
        for name, kind in vars(modal.exception).items()
        if isinstance(kind, type) and issubclass(kind, BaseException) and not name.startswith("_")
    }
    assert kinds - set(failures.ANSWERS) == set()


def test_a_stop_of_the_start_of_an_app(loopback: Loopback) -> None:
    loopback.hold_starts()
    seen: list[Head] = []

    def stop_first(event: Head) -> None:
        seen.append(event)
        if len(seen) == 1:
            press_stop()

    with InterpClient(mode="modal", app_name="t8", model_name=DEMO) as client:
        with pytest.raises(KeyboardInterrupt):
            client.connect(stop_first)
        client.stop()
    loopback.release_starts()
