"""`track`: what lies in its folder however the run ends, and what reaches W&B's own files."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from interp_kernel import track
from interp_kernel.tracking import Tracker

FAILING = """
import sys
from interp_kernel import track

try:
    with track("run", {"layer": 3}, folder=sys.argv[1], wandb=sys.argv[2], project="p") as run:
        run.log({"loss": 0.5}, step=4)
        run.log_table("rows", [{"a": 1, "b": "x"}, {"a": float("nan"), "b": 3}])
        raise RuntimeError("the model diverged")
except RuntimeError:
    print(run.folder)
"""


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(run: Tracker) -> Any:
    return yaml.safe_load((run.folder / "summary.yaml").read_text())


def test_everything_lies_in_the_folder_as_plain_files(tmp_path: Path) -> None:
    config = {"layer": 3, "lr": np.float32(0.5), "names": ("a", "b")}
    (tmp_path / "weights.bin").write_bytes(b"123")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_text("x")
    with track("steering sweep", config, folder=tmp_path / "runs") as run:
        assert summary(run)["status"] == "running"
        run.log({"loss": 0.5, "bad": float("nan")})
        run.log({"loss": np.float32(0.25)}, step=10)
        run.log({"done": True})
        frame = pd.DataFrame({"layer": [0, 1], "effect": [0.5, float("nan")]})
        table = run.log_table("effects", frame)
        run.log_table("mixed", [{"a": [1, 2]}, {"b": None}])
        figure = go.Figure(go.Scatter(y=[1, 2]))
        drawn = run.log_figure("curve", figure)
        axes = Figure()
        axes.subplots().plot([1, 2])
        pictures = [run.log_figure("axes", axes), run.log_figure("photo", Image.new("RGB", (3, 4)))]
        copied = [run.log_artifact(tmp_path / "weights.bin", "w.bin"), run.log_artifact(tmp_path / "data")]
    assert run.folder.parent == tmp_path / "runs"
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == {"layer": 3, "lr": 0.5, "names": ["a", "b"]}
    logged = [{k: v for k, v in line.items() if k != "time"} for line in lines(run.folder / "log.jsonl")]
    assert logged == [{"step": 0, "loss": 0.5, "bad": "NaN"}, {"step": 10, "loss": 0.25}, {"step": 11, "done": True}]
    assert lines(table) == [{"layer": 0, "effect": 0.5}, {"layer": 1, "effect": "NaN"}]
    assert lines(run.folder / "tables" / "mixed.jsonl") == [{"a": [1, 2]}, {"b": None}]
    assert json.loads(drawn.read_text())["data"][0]["y"] == [1, 2]
    page = drawn.with_suffix(".html").read_text()
    assert "cdn" not in page
    assert drawn.with_name("plotly.min.js").exists()
    for path, wide in zip(pictures, (True, False), strict=True):
        with Image.open(path) as picture:
            assert (picture.format, picture.width > 3) == ("PNG", wide)
    assert copied[0].read_bytes() == b"123"
    assert (copied[1] / "x.txt").read_text() == "x"
    ended = summary(run)
    assert (ended["status"], ended["last"]["loss"], ended["wandb"]) == ("completed", 0.25, {"mode": "off"})


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(3), "failed")],
)
def test_how_the_block_ends_is_recorded_and_the_error_goes_on(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), track("run", folder=tmp_path) as run:
        raise error
    assert (summary(run)["status"], summary(run)["ename"]) == (status, type(error).__name__)


def test_clean_exit_is_a_completion_and_finish_counts_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), track("run", folder=tmp_path) as run:
        sys.exit(0)
    assert summary(run)["status"] == "completed"
    with track("run", folder=tmp_path) as other:
        other.finish("failed")
    assert summary(other)["status"] == "failed"
    assert other.folder != run.folder


def test_killed_process_leaves_its_log_and_no_claim_to_have_ended(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom interp_kernel import track\nrun = track('run', folder=sys.argv[1])\n"
        "run.log({'loss': 1.0})\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (folder,) = tmp_path.iterdir()
    assert yaml.safe_load((folder / "summary.yaml").read_text())["status"] == "running"
    assert lines(folder / "log.jsonl")[0]["loss"] == 1.0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of the run is 'a/b'; expected letters"):
        track("a/b", folder=tmp_path)
    with pytest.raises(ValueError, match="wandb is 'on'; expected one of off, offline, online"):
        track("a", folder=tmp_path, wandb="on")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    with track("a", folder=tmp_path) as run:
        with pytest.raises(TypeError, match="metric 'x' is a list"):
            run.log({"y": 1, "x": [1]})
        with pytest.raises(TypeError, match="row of the table 't' is a int; expected a mapping"):
            run.log_table("t", [1])
        with pytest.raises(TypeError, match="figure 'f' is a str; expected one of plotly or matplotlib"):
            run.log_figure("f", "text")
        with pytest.raises(ValueError, match=r"The name is '\.\./f'"):
            run.log_figure("../f", go.Figure())
        with pytest.raises(FileNotFoundError, match=r"artifact '.*none' doesn't exist"):
            run.log_artifact(tmp_path / "none")
        with pytest.raises(ValueError, match="status is 'good'; expected one of completed, failed, interrupted"):
            run.finish("good")
    assert not (run.folder / "log.jsonl").exists()
    with pytest.raises(ValueError, match="log was called after the run 'a' had ended"):
        run.log({"x": 1})


# --------------------------------------------------------------------------------------------------- W&B


def run_script(folder: Path, mode: str, **environment: str) -> tuple[Path, str]:
    """A run that fails, in a process of its own, since W&B keeps a service; its folder and what it warned of."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(folder), mode],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**mine, "WANDB_ERROR_REPORTING": "false", **environment},
    )
    return Path(done.stdout.splitlines()[-1]), done.stderr


def wandb_records(folder: Path) -> list[Any]:
    """Every record of the file that W&B would upload.

    It is LevelDB's log after a header of 7 bytes: blocks of 32 KiB with pieces of (checksum, length, kind). Kind 1
    is a whole record and 4 the last piece of one.
    """
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, whole, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(messages.Record.FromString(whole))
            whole = b""
    return records


def test_offline_run_holds_config_values_and_the_failure(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder, warned = run_script(tmp_path, "offline")
    assert "UserWarning" not in warned
    records = wandb_records(folder)
    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (begun.project, begun.display_name, config["layer"]) == ("p", "run", 3)
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    logged = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for h in history for item in h.item}
    assert (logged["loss"], logged["_step"]) == (0.5, 4)
    assert (logged["rows._type"], logged["rows.nrows"], logged["rows.ncols"]) == ("table-file", 2, 2)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]
    facts = yaml.safe_load((folder / "summary.yaml").read_text())
    assert (facts["status"], facts["evalue"], facts["wandb"]["mode"]) == ("failed", "the model diverged", "offline")
    assert Path(facts["wandb"]["next"].removeprefix("wandb sync ")).is_dir()


def test_online_without_a_login_becomes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder, warned = run_script(tmp_path, "online")
    assert "W&B keeps this run offline. It knows no login here. Run `wandb login` once." in warned
    facts = yaml.safe_load((folder / "summary.yaml").read_text())
    assert (facts["status"], facts["wandb"]["mode"]) == ("failed", "offline")
    assert wandb_records(folder)


def test_fault_inside_wandb_turns_it_off_and_nothing_else(tmp_path: Path) -> None:
    broken = tmp_path / "path"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise RuntimeError('a broken package')")
    folder, warned = run_script(tmp_path / "runs", "offline", PYTHONPATH=str(broken))
    assert "W&B is off for this run, whose files are kept. RuntimeError: a broken package." in warned
    facts = yaml.safe_load((folder / "summary.yaml").read_text())
    assert (facts["status"], facts["wandb"]["why"]) == ("failed", "RuntimeError: a broken package.")
    assert lines(folder / "log.jsonl")[0]["loss"] == 0.5


def test_missing_package_is_told_with_the_command_that_installs_it(tmp_path: Path) -> None:
    absent = tmp_path / "path"
    absent.mkdir()
    (absent / "wandb.py").write_text("raise ModuleNotFoundError('No module named wandb')")
    folder, warned = run_script(tmp_path / "runs", "online", PYTHONPATH=str(absent))
    assert "wandb is not installed. Install it with `pip install interp-kernel[wandb]`." in warned
    assert lines(folder / "tables" / "rows.jsonl") == [{"a": 1, "b": "x"}, {"a": "NaN", "b": 3}]
