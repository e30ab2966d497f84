"""What a run logs, kept in a folder of plain files, and at Weights & Biases too if that is wanted and there.

    with track("steering", {"layer": 3}, wandb="offline") as run:
        run.log({"loss": 0.25}, step=1)

The folder alone is enough: `config.yaml`, `log.jsonl` (a line for each call of `log`), `tables/`, `figures/`,
`artifacts/`, and `summary.yaml`, which says how the run ended. It says `running` from the start, so that a run that was
killed can't look finished. Nothing that W&B does can end a run: what goes wrong first is told, and turns it off.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from interp_kernel.notebook.files import replace, utc
from interp_kernel.notebook.metrics import plain

MODES = ("off", "offline", "online")
INIT_TIMEOUT_S = 30
STATUSES = ("completed", "failed", "interrupted")

_NAME = re.compile(r"[\w .=+-]*\w[\w .=+-]*")


def track(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    folder: str | Path = "runs",
    wandb: Literal["off", "offline", "online"] = "off",
    project: str = "interp-kernel",
) -> Tracker:
    """Begin a run in a new folder, to be used in a `with` statement or ended by `finish`.

    Args:
        name: Of the run; its folder is this name with the time.
        config: What was set: parameters, model, seeds.
        folder: Where the run's folder is made.
        wandb: Whether W&B keeps the run too: `online`, or `offline` for a later `wandb sync`. Online without a login
            becomes offline; without the package (extra `wandb`) it is off. Either is told in a warning.
        project: Project at W&B.

    Raises:
        ValueError: The name can't be that of a folder, or the mode is not known; nothing was made.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"The name of the run is {name!r}; expected letters, digits, spaces and any of . = + - _.")
    if wandb not in MODES:
        raise ValueError(f"wandb is {wandb!r}; expected one of {', '.join(MODES)}.")
    return Tracker(name, dict(config or {}), _new_folder(Path(folder), name), wandb, project)


class Tracker:
    """A run that is being logged; see `track`.

    Attributes:
        folder: Where its files are.
    """

    def __init__(self, name: str, config: dict[str, Any], folder: Path, wandb: str, project: str) -> None:
        """Write what is known at the start."""
        self.folder = folder
        self._summary: dict[str, Any] = {"name": name, "status": "running", "started": utc()}
        self._start, self._step, self._last = time.monotonic(), 0, dict[str, Any]()
        _write_yaml(folder / "config.yaml", config)
        self._mirror = Mirror(wandb, project, name, config, folder)
        self._save()

    def __enter__(self) -> Tracker:
        """The run itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the run as the block has ended."""
        status = "completed" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted"
        if kind is SystemExit:
            status = "failed" if getattr(error, "code", 0) else "completed"
        self.finish(status, error if status != "completed" else None)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append a line of numbers, truth values or texts to `log.jsonl`.

        Args:
            values: By name; an array or tensor of one element counts as its number.
            step: Where they belong; by default one more than the last.

        Raises:
            TypeError: A value is none of these; nothing was written.
            ValueError: The run has ended.
        """
        self._refuse_ended("log")
        line = {str(name): plain(str(name), value) for name, value in values.items()}
        step = self._step if step is None else step
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": utc(), **line}, ensure_ascii=False) + "\n")
        self._step = step + 1
        self._last |= line
        self._mirror.send(lambda run, _: run.log(line, step=step))

    def log_table(self, name: str, rows: Any) -> Path:
        """Write a table to `tables/NAME.jsonl`, a line for each row.

        Args:
            name: Of the table; one of the same name is replaced.
            rows: Mappings from column to value, or a pandas DataFrame.

        Raises:
            TypeError: A row is no mapping.
            ValueError: The name can't be that of a file, or the run has ended.
        """
        path = self._place("tables", name, ".jsonl")
        records: Sequence[Any] = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        wrong = next((row for row in records if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise TypeError(f"A row of the table {name!r} is a {type(wrong).__name__}; expected a mapping by column.")
        lines = [{str(column): _cell(name, value) for column, value in row.items()} for row in records]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        columns = list(dict.fromkeys(column for line in lines for column in line))
        data = [[line.get(column) for column in columns] for line in lines]
        # A number and the text `NaN` may stand in one column.
        self._mirror.send(lambda run, wandb: run.log({name: wandb.Table(columns, data, allow_mixed_types=True)}))
        return path

    def log_figure(self, name: str, figure: Any) -> Path:
        """Write a figure to `figures/`: plotly's as data (NAME.json) and as a page beside it, others as NAME.png.

        Args:
            name: Of the figure; one of the same name is replaced.
            figure: Of plotly or matplotlib, or a PIL image.

        Raises:
            TypeError: It is none of these.
            ValueError: The name can't be that of a file, or the run has ended.
        """
        path = self._place("figures", name, ".png")
        if hasattr(figure, "to_plotly_json"):
            path = path.with_name(f"{name}.json")
            path.write_text(figure.to_json(), encoding="utf-8")
            figure.write_html(path.with_name(f"{name}.html"), include_plotlyjs="directory")
            self._mirror.send(lambda run, wandb: run.log({name: wandb.Plotly(figure)}))
            return path
        save = getattr(figure, "savefig", None) or getattr(figure, "save", None)
        if save is None or not type(figure).__module__.startswith(("matplotlib", "PIL")):
            raise TypeError(
                f"The figure {name!r} is a {type(figure).__name__}; expected one of plotly or matplotlib, "
                "or a PIL image."
            )
        save(path, format="png")
        self._mirror.send(lambda run, wandb: run.log({name: wandb.Image(str(path))}))
        return path

    def log_artifact(self, path: str | Path, name: str | None = None) -> Path:
        """Copy a file or a folder to `artifacts/`.

        Args:
            path: What is copied.
            name: What it is called there; by default as it is.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The name can't be that of a file, or the run has ended.
        """
        source = Path(path)
        if not source.exists():
            raise FileNotFoundError(f"The artifact {str(source)!r} doesn't exist; expected a file or a folder.")
        target = self._place("artifacts", name or source.name, "")
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
        self._mirror.send(lambda run, _: run.log_artifact(str(target), name=_wandb_name(target.name), type="file"))
        return target

    def finish(self, status: str = "completed", error: BaseException | None = None) -> None:
        """End the run; a second call changes nothing.

        Args:
            status: `completed`, `failed` or `interrupted`.
            error: What ended it.

        Raises:
            ValueError: The status is not known.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; expected one of {', '.join(STATUSES)}.")
        if self._summary["status"] != "running":
            return
        self._summary |= {"status": status, "ended": utc(), "seconds": round(time.monotonic() - self._start, 3)}
        if error is not None:
            self._summary |= {"ename": type(error).__name__, "evalue": str(error)}
        self._mirror.finish(exit_code=0 if status == "completed" else 1)
        self._save()

    def _save(self) -> None:
        facts = {**self._summary, "wandb": self._mirror.state, "last": self._last}
        _write_yaml(self.folder / "summary.yaml", facts)

    def _place(self, kind: str, name: str, suffix: str) -> Path:
        self._refuse_ended(f"log_{kind.removesuffix('s')}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"The name is {name!r}; expected letters, digits, spaces and any of . = + - _.")
        (self.folder / kind).mkdir(exist_ok=True)
        return self.folder / kind / f"{name}{suffix}"

    def _refuse_ended(self, verb: str) -> None:
        if self._summary["status"] != "running":
            raise ValueError(f"{verb} was called after the run {self._summary['name']!r} had ended. Begin a new one.")


class Mirror:
    """The same run at Weights & Biases, as far as it goes.

    Attributes:
        state: What W&B keeps and where, for the summary; after a fault why it does not.
    """

    def __init__(self, mode: str, project: str, name: str, config: dict[str, Any], folder: Path) -> None:
        """Start W&B's run, unless it is off."""
        self._run: Any = None
        self._wandb: Any = None
        self.state: dict[str, Any] = {"mode": mode}
        if mode != "off":
            self._guard(lambda: self._begin(mode, project, name, config, folder))

    def send(self, act: Callable[[Any, Any], Any]) -> None:
        """Do something with W&B's run and its module, if there is one."""
        if self._run is not None:
            self._guard(lambda: act(self._run, self._wandb))

    def finish(self, exit_code: int) -> None:
        """End W&B's run, which shows an exit code above 0 as failed."""
        self.send(lambda run, _: run.finish(exit_code=exit_code))
        self._run = None

    def _begin(self, mode: str, project: str, name: str, config: dict[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            self._stop("wandb is not installed. Install it with `pip install interp-kernel[wandb]`.")
            return
        self._wandb = wandb

        def start(mode: Any) -> Any:
            settings = wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S)
            return wandb.init(
                project=project,
                name=name,
                config=config,
                dir=str(folder),
                mode=mode,
                settings=settings,
                reinit="create_new",
            )

        if mode == "online":
            try:
                if wandb.login(prompt=False):
                    self._run = start(mode)
                    self.state |= {"id": self._run.id, "url": self._run.url}
                    return
                why = "It knows no login here. Run `wandb login` once."
            except wandb.errors.Error as error:
                why = f"Online it failed: {_first_line(error)}."
            warnings.warn(f"W&B keeps this run offline. {why}", stacklevel=2)
            self.state["why"] = why
        self._run = start("offline")
        self.state |= {
            "mode": "offline",
            "id": self._run.id,
            "next": f"wandb sync {shlex.quote(self._run.settings.sync_dir)}",
        }

    def _guard(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the user's run goes on
            self._stop(f"{type(error).__name__}: {_first_line(error)}.")

    def _stop(self, why: str) -> None:
        self._run = None
        self.state |= {"mode": "off", "why": why}
        warnings.warn(f"W&B is off for this run, whose files are kept. {why}", stacklevel=2)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message").rstrip(".")


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that no other run has, also if two start in one second."""
    stem, count = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}", 1
    while True:
        folder = parent / (stem if count == 1 else f"{stem}-{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1


def _cell(table: str, value: Any) -> Any:
    """A value of a table as JSON holds it."""
    if value is None:
        return None
    try:
        return plain(table, value)
    except TypeError:
        return json.loads(json.dumps(value, default=str), parse_constant=str)


def _write_yaml(path: Path, facts: Mapping[str, Any]) -> None:
    import yaml

    plain_facts = json.loads(json.dumps(facts, default=_in_yaml))
    replace(path, yaml.safe_dump(plain_facts, sort_keys=False, allow_unicode=True))


def _in_yaml(value: Any) -> Any:
    try:
        return plain("config", value)
    except TypeError:
        return str(value)


def _wandb_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)
