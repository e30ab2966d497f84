"""`interp-kernel doctor` on machines that lack one thing at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interp_kernel import InterpClient, doctor
from interp_kernel.cli import main
from tests.modal_loopback import Loopback

SPEC = {"argv": [sys.executable, "-m", "interp_kernel.kernel", "-f", "{connection_file}"], "display_name": "x"}


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which Jupyter looks for kernels; it has none yet."""
    monkeypatch.setattr("jupyter_core.paths.ENV_JUPYTER_PATH", [])
    monkeypatch.setattr("jupyter_core.paths.SYSTEM_JUPYTER_PATH", [])
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    folder = tmp_path / "kernels" / "interp"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def no_modal_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("modal.config._user_config", {})


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def kernelspec_lines() -> list[str]:
    return [str(finding) for finding in doctor.check_kernelspec()]


def modal_lines() -> list[str]:
    return [str(finding) for finding in doctor.check_modal()]


def test_a_sound_machine(no_modal_token: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[6:21].strip(): line.split()[0] for line in lines}
    assert found == {
        "kernelspec": "ok",
        "worker": "ok",
        "demo model": "ok",
        "versions": "ok",
        "HF token": "note",
        "Modal token": "note",
    }
    assert any("The Eiffel Tower is located in the city of Paris" in line for line in lines)
    assert f"python {sys.version.split()[0]}" in next(line for line in lines if "versions" in line)
    assert "modal token new" in lines[-1]


def test_a_kernel_that_jupyter_does_not_know(kernels: Path) -> None:
    (line,) = kernelspec_lines()
    assert line.startswith("fail")
    assert line.endswith("Install it: interp-kernel kernelspec install --user.")


@pytest.mark.parametrize(
    ("python", "state", "text"),
    [
        (sys.executable, "ok", "interp"),
        ("/nowhere/bin/python", "fail", "runs /nowhere/bin/python, which is not there"),
        ("/bin/sh", "note", f"runs /bin/sh, not this {sys.executable}"),
    ],
)
def test_a_kernel_of_another_python(kernels: Path, python: str, state: str, text: str) -> None:
    (kernels / "kernel.json").write_text(json.dumps({**SPEC, "argv": [python, *SPEC["argv"][1:]]}))
    (line,) = kernelspec_lines()
    assert line.startswith(state)
    assert text in line


def test_a_worker_that_can_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_modal_token: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("INTERP_RUNTIME_DIR", str(tmp_path / "link"))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("fail")] == [line for line in lines if "is a link" in line]
    assert "Modal token" in lines[-1]  # the checks after it were made all the same


def test_another_answer_of_the_demo_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER", " Oslo")
    line = next(str(finding) for finding in doctor.check_worker() if finding.subject == "demo model")
    assert line.startswith("fail")
    assert "by ' Paris'" in line


def test_differing_versions_are_named() -> None:
    hello = {"python": [3, 9, 1], "version": "0.0.1"}
    finding = doctor.compare_versions("container's", hello, {"versions": {"torch": "1.0"}})
    assert finding.state == "note"
    assert "python" in finding.text
    assert "3.9.1 there" in finding.text
    assert "interp-kernel" in finding.text
    assert "1.0 there" in finding.text


def test_a_token_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    (finding,) = doctor.check_hub_token()
    assert finding.state == "ok"
    assert "hf_abcdef" not in finding.text


def test_a_refused_token_of_modal(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.modal_loopback.host import forget_client

    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-revoked")
    forget_client()
    (line,) = modal_lines()
    monkeypatch.undo()
    forget_client()
    assert line.startswith("fail  Modal token")
    assert "modal token new" in line


def test_no_way_to_modal_is_told_within_5_s(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    (line,) = modal_lines()
    assert time.monotonic() - started < 5
    assert line.startswith("fail  Modal token")
    assert "Modal can't be reached at 127.0.0.1:9" in line


def test_the_secret_and_the_app_at_modal(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    import modal

    monkeypatch.setattr(doctor, "APP_NAME", "doctored")
    lines = modal_lines()
    assert [line.split()[0] for line in lines] == ["ok", "note", "note"]
    assert "modal secret create huggingface-secret HF_TOKEN=" in lines[1]
    assert "'doctored' is not deployed" in lines[2]
    modal.Secret.objects.create("huggingface-secret", {"HF_TOKEN": "hf_abcdef"})
    client = InterpClient("doctored", mode="modal", deploy=True)
    client.connect(lambda _: None)
    lines = modal_lines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "ok", "ok"]
    assert f"container {loopback.live()[0].id} runs" in lines[2]
    assert f"python {sys.version.split()[0]}" in lines[3]
    assert "hf_abcdef" not in "".join(lines)
    client.stop()
    assert "MODAL_TOKEN_ID" in os.environ
