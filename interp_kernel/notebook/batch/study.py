"""The spec of a batch: notebooks x grid x models x seeds x repeats, from YAML or Python, refused with line and hint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_kernel.errors import NotebookError, SpecError, did_you_mean
from interp_kernel.notebook.provenance import run_key
from interp_kernel.options import MODES

SLUG_LENGTH = 48


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a batch runs and how; in YAML under the same names.

    Attributes:
        notebooks: Paths; those of a study file are relative to its folder.
        name: By default the study file's own.
        parameters: Values that every run sets.
        grid: Values by parameter; every combination is run.
        models: Names, or mappings of InterpClient's options; none leaves the choice to the notebooks. A notebook that
            has the parameters `model_name` and `mode` gets them too.
        seeds: Values of the parameter `seed`.
        repeats: How often each combination is run.
        backend: `local` or `modal`, for all models that do not say it themselves.
        output: Folder of the results; by default `out/NAME`.
        jobs: Notebooks at once, each in a process of its own.
        per_worker: Notebooks at once on one worker; None sets no bound beside `jobs`.
        containers: Containers at once at Modal, for each model; None sets no bound beside `jobs`.
        timeout: Seconds that each cell may take.
        retries: How often a run is begun anew whose kernel or worker died or did not start; other failures never are.
        stop_on_failure: Whether nothing more is begun after a failure.
        price_per_hour: What an hour of a container costs, for the estimate, in any currency.
        lines: Where parameters, notebooks and models stand in the study's file, for messages; no key of the file.

    Raises:
        SpecError: A value is wrong.
    """

    notebooks: tuple[str, ...]
    name: str = "study"
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    models: tuple[str | dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()
    repeats: int = 1
    backend: str | None = None
    output: str | None = None
    jobs: int = 2
    per_worker: int | None = None
    containers: int | None = None
    timeout: float | None = None
    retries: int = 2
    stop_on_failure: bool = False
    price_per_hour: float | None = None
    lines: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and those together that exclude each other."""
        for known in dataclasses.fields(self):
            object.__setattr__(self, known.name, check(known.name, getattr(self, known.name)))
        twice = sorted(set(self.parameters) & set(self.grid))
        if twice:
            raise SpecError(f"{twice[0]!r} stands under both parameters and grid; expected it under one of them.")
        if self.seeds and "seed" in {**self.parameters, **self.grid}:
            raise SpecError("seeds and a parameter `seed` are both given; expected one of them.")
        if self.backend and not self.models:
            raise SpecError(f"backend is {self.backend!r} and no models are given; expected models, which run there.")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.output or f"out/{self.name}")

    def settings(self) -> list[dict[str, Any] | None]:
        """InterpClient's options of each model; None if the notebooks choose.

        Raises:
            SpecError: InterpClient refuses them.
        """
        from interp_kernel.client import InterpClient
        from interp_kernel.magics import settings_from

        found: list[dict[str, Any] | None] = []
        for index, model in enumerate(self.models):
            with located(self.lines.get(f"models[{index}]")):
                options = settings_from(model, "models")
                if self.backend:
                    options.setdefault("mode", self.backend)
                try:
                    json.dumps(options)
                except TypeError as error:
                    what = f"models holds {model!r}: {error}."
                    raise SpecError(f"{what} Expected names, numbers and texts only.") from None
                InterpClient(**options).close()
            found.append(options)
        return found or [None]

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, as plain data."""
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "lines"}
        return {name: plain[name] for name, default in defaults.items() if plain[name] not in (default, {}, [])}


@dataclass(frozen=True)
class Run:
    """One notebook with one set of values.

    Attributes:
        key: 12 hex digits, equal for the same notebook, values, model, seed and repeat.
        notebook: Its path.
        parameters: All that are set, seed and model's name included.
        model: InterpClient's options; None leaves them to the notebook.
        seed: Value of the parameter `seed`, if the study has seeds.
        repeat: From 0.
        label: What sets it apart from the others, as `layer=1 prompt=rain`.
    """

    key: str
    notebook: Path
    parameters: dict[str, Any]
    model: dict[str, Any] | None = None
    seed: int | None = None
    repeat: int = 0
    label: str = ""

    @property
    def output(self) -> str:
        """File name of the executed notebook."""
        slug = re.sub(r"[^A-Za-z0-9=._-]+", "-", self.label).strip("-.")[:SLUG_LENGTH]
        return ".".join(part for part in (self.notebook.stem, slug, self.key, "ipynb") if part)


def plan(study: Study) -> list[Run]:
    """Every run of a study, in the order of the spec, the last of the grid's names varying fastest.

    Raises:
        NotebookError: A notebook is missing or malformed, or doesn't take a parameter.
        SpecError: A model's options are wrong.
    """
    from interp_kernel.notebook.checks import kernel_of, read_notebook
    from interp_kernel.notebook.parameters import check_parameters, declared_parameters

    models, runs = study.settings(), []
    for index, text in enumerate(study.notebooks):
        path = Path(text)
        with located(study.lines.get(f"notebooks[{index}]")):
            notebook = read_notebook(path)
            kernel_of(path, notebook, None)
            takes = declared_parameters(path, notebook) or {}
        # Neither the working directory nor how the study's path is written may change a run's name.
        place = os.path.relpath(path.resolve(), study.folder.resolve())
        for model, point, seed, repeat in combinations(study, models):
            parameters = {**study.parameters, **point, **({} if seed is None else {"seed": seed})}
            if model is not None:
                named = {"model_name": model.get("model_name", "demo"), "mode": model.get("mode", "local")}
                parameters = {name: value for name, value in named.items() if name in takes} | parameters
            with located(study.lines):
                check_parameters(path, notebook, parameters)
            key = run_key(place, parameters, model, seed, repeat)
            label = label_of(study, text, models, (model, point, seed, repeat))
            runs.append(Run(key, path, parameters, model, seed, repeat, label))
    return runs


@contextmanager
def located(where: str | Mapping[str, str] | None) -> Iterator[None]:
    """Say in an error where its cause stands: at the given place, or at that of the name which the message quotes."""
    try:
        yield
    except (NotebookError, SpecError) as error:
        if isinstance(where, Mapping):
            where = next((line for name, line in where.items() if repr(name) in str(error)), None)
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


def combinations(
    study: Study, models: list[dict[str, Any] | None]
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any], int | None, int]]:
    """Every model with every point of the grid, seed and repeat."""
    points = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    return itertools.product(models, points, study.seeds or (None,), range(study.repeats))


def label_of(study: Study, notebook: str, models: list[Any], chosen: tuple[Any, dict[str, Any], Any, int]) -> str:
    """The values that are not the same in all runs of a study."""
    model, point, seed, repeat = chosen
    parts = [Path(notebook).stem] if len(study.notebooks) > 1 else []
    if len(models) > 1:
        name = model.get("model_name", "demo")
        others = [f"{key}={short(value)}" for key, value in model.items() if key not in ("model_name", "mode")]
        is_alone = sum(other.get("model_name", "demo") == name for other in models) == 1
        parts += [name] if is_alone else [name, *others]
    parts += [f"{name}={short(value)}" for name, value in point.items() if len(study.grid[name]) > 1]
    parts += [f"seed={seed}"] if len(study.seeds) > 1 else []
    parts += [f"repeat={repeat}"] if study.repeats > 1 else []
    return " ".join(parts)


def short(value: Any) -> str:
    """A value in a label."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 24 else text[:23] + "…"


# Reading.


def read_study(path: Path) -> Study:
    """A study file: YAML, JSON, or Python that assigns a Study, or a mapping of its fields, to `study`.

    Raises:
        SpecError: The file is missing or wrong; the message names the line, and what may have been meant.
    """
    try:
        if path.suffix == ".py":
            return in_folder(path, study_of_python(path))
        return in_folder(path, study_of_yaml(path, path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} can't be read as a study: {error}.") from None


def in_folder(path: Path, fields: dict[str, Any]) -> Study:
    """A Study whose paths are those of its file."""
    if "notebooks" not in fields:
        raise SpecError(f"{path} names no notebooks; expected a list of paths under `notebooks`.")
    fields = {"name": path.stem, **fields}
    fields["notebooks"] = [str(path.parent / text) for text in check("notebooks", fields["notebooks"])]
    if fields.get("output"):
        fields["output"] = str(path.parent / fields["output"])
    return Study(**fields)


def study_of_python(path: Path) -> dict[str, Any]:
    """The fields of the study that a Python file makes."""
    found = runpy.run_path(str(path)).get("study")
    if isinstance(found, Study):
        return found.to_json()
    if not isinstance(found, dict):
        raise SpecError(f"{path} assigns {found!r} to `study`; expected a Study or a dict of its fields.")
    for name in found:
        refuse_unknown(name, f"{path}")
    return found


def study_of_yaml(path: Path, text: str) -> dict[str, Any]:
    """The fields of a YAML text, each checked where its line is known."""
    from interp_kernel.notebook.batch.yaml12 import LineError, entries

    fields: dict[str, Any] = {}
    try:
        lines: dict[str, str] = {}
        for line, key, value, inner in entries(text):
            where = f"{path}, line {line}"
            refuse_unknown(key, where)
            try:
                fields[key] = check(key, value)
            except SpecError as error:
                raise SpecError(f"{where}: {error}") from None
            for name, number in inner.items():
                lines[f"{key}[{name}]" if isinstance(name, int) else name] = f"{path}, line {number}"
    except LineError as error:
        where = f"{path}, line {error.line}" if error.line else f"{path}"
        raise SpecError(f"{where}: {error}.") from None
    return {**fields, "lines": lines}


def refuse_unknown(name: Any, where: str) -> None:
    """Refuse a key that a study doesn't have, with the one that may have been meant."""
    known = [f.name for f in dataclasses.fields(Study) if f.name != "lines"]
    if name not in known:
        hint = did_you_mean(name, known) or f" Expected one of {', '.join(known)}."
        raise SpecError(f"{where}: {name!r} is no key of a study.{hint}")


# Checks of single fields.


def check(name: str, value: Any) -> Any:
    """A field's value in its own form.

    Raises:
        SpecError: It is of a wrong type or range.
    """
    if name in ("notebooks", "models", "seeds"):
        return check_list(name, value)
    if name in ("parameters", "grid"):
        return check_names(name, value)
    if name in ("repeats", "jobs", "per_worker", "containers", "retries"):
        return check_count(name, value)
    if name in ("timeout", "price_per_hour") and value is not None and not (is_number(value) and value > 0):
        raise SpecError(f"{name} is {value!r}; expected a number above 0.")
    if name == "stop_on_failure" and not isinstance(value, bool):
        raise SpecError(f"stop_on_failure is {value!r}; expected true or false.")
    if name == "backend" and value not in (None, *MODES):
        raise SpecError(f"backend is {value!r}; expected one of {', '.join(MODES)}.{did_you_mean(value, MODES)}")
    if name in ("name", "output") and value is not None and not (isinstance(value, str | Path) and str(value)):
        raise SpecError(f"{name} is {value!r}; expected text.")
    return str(value) if isinstance(value, Path) else value


def check_list(name: str, value: Any) -> tuple[Any, ...]:
    """A list of paths, models or seeds; a single one counts as a list."""
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    kinds: dict[str, tuple[type, ...]] = {"notebooks": (str, Path), "models": (str, dict), "seeds": (int,)}
    words = {"notebooks": "paths", "models": "names or mappings of options", "seeds": "whole numbers"}
    wrong = [item for item in items if not isinstance(item, kinds[name]) or isinstance(item, bool)]
    if wrong or (name == "notebooks" and not items):
        raise SpecError(f"{name} holds {wrong[0] if wrong else 'nothing'!r}; expected a list of {words[name]}.")
    items = tuple(str(item) if isinstance(item, Path) else item for item in items)
    twice = next((item for index, item in enumerate(items) if item in items[:index]), None)
    if twice is not None:
        raise SpecError(f"{name} holds {twice!r} twice; expected each once. Use repeats to run it again.")
    return items


def check_names(name: str, value: Any) -> dict[str, Any]:
    """Values, or for a grid lists of values, by names that Python can assign."""
    if not isinstance(value, dict):
        raise SpecError(
            f"{name} is {value!r}; expected a mapping from names to {'lists' if name == 'grid' else 'values'}."
        )
    for key, values in value.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise SpecError(f"{name} has the name {key!r}; expected a name that Python can assign.")
        if name == "grid" and not (isinstance(values, list | tuple) and values):
            raise SpecError(
                f"grid gives {key!r} the value {values!r}; expected a list of values. One that every run shares "
                "belongs under parameters."
            )
    if name == "grid":
        return {key: tuple(values) for key, values in value.items()}
    return dict(value)


def check_count(name: str, value: Any) -> int | None:
    """A whole number; of retries also 0."""
    least = 0 if name == "retries" else 1
    if value is None and name in ("per_worker", "containers"):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(f"{name} is {value!r}; expected a whole number of at least {least}.")
    return value


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != float("inf")
