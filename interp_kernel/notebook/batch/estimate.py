"""What a study would do, how long that takes and what it costs, by what earlier runs took."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from interp_kernel.notebook import files
from interp_kernel.notebook.batch.study import Run, Study
from interp_kernel.notebook.files import Facts
from interp_kernel.notebook.words import duration


def describe_plan(study: Study, runs: list[Run], todo: list[Run]) -> Iterator[str]:
    """What a batch would do, in lines."""
    yield f"Study {study.name}: {len(runs)} runs, {len(todo)} to be run now, into {study.folder}"
    factors = [f"{len(study.notebooks)} notebooks"] if len(study.notebooks) > 1 else [Path(study.notebooks[0]).name]
    factors += [f"{name} ({len(values)})" for name, values in study.grid.items()]
    factors += [f"models ({len(study.models)})"] if len(study.models) > 1 else []
    factors += [f"seeds ({len(study.seeds)})"] if study.seeds else []
    factors += [f"repeats ({study.repeats})"] if study.repeats > 1 else []
    yield "  " + " x ".join(factors)
    yield from (f"  {number:4}  {run.key}  {run.label or run.notebook.stem}" for number, run in enumerate(todo, 1))
    yield from estimate(study, todo)


def estimate(study: Study, todo: Iterable[Run]) -> Iterator[str]:
    """How long it takes and what it costs, by what earlier runs took."""
    known = defaultdict(list)
    for record in files.read_attempts(study.folder, ("status", "notebook", "seconds")):
        if record["status"] == "completed":
            known[Path(record["notebook"]).resolve()].append(record["seconds"])
    todo, total = list(todo), 0.0
    containers: dict[str, float] = defaultdict(float)
    for run in todo:
        seconds = statistics.median(known[run.notebook.resolve()] or taken_before(run.notebook) or [0.0])
        total += seconds
        if (price := price_of(run.model, None)) is not None:
            containers[f"{price['gpu'] or 'no GPU'} ({price['price_class'] or 'price as it comes'})"] += seconds
    if total:
        yield f"Time: about {duration(total / min(study.jobs, len(todo)))}, by what earlier runs took."
    elif todo:
        yield "Time: not known, since none of these notebooks has run yet; run one of each first."
    if not containers:
        yield "Cost: none; all workers are on this machine."
    hourly = study.price_per_hour
    for place, seconds in containers.items():
        money = f", {hourly * seconds / 3600:.2f} at {hourly:g} an hour" if hourly else ""
        yield f"Cost: about {duration(seconds)} of a container with {place}{money}."
    if containers and not hourly:
        yield "Set price_per_hour to have the cost as an amount."


@cache
def taken_before(path: Path) -> list[float]:
    """How long the notebook took when it was last run by papermill, if it was."""
    facts = json.loads(path.read_text(encoding="utf-8")).get("metadata", {}).get("papermill", {})
    return [facts["duration"]] if facts.get("duration") else []


def price_of(model: Mapping[str, Any] | None, price_per_hour: float | None) -> Facts | None:
    """What is known of a model's price before it runs; None on this machine."""
    if model is None or model.get("mode", "local") != "modal":
        return None
    from interp_kernel.backends.modal.options import GPUS, check_gpu

    gpu = check_gpu(model.get("gpu"))
    first = (gpu,) if isinstance(gpu, str) else gpu or ()
    classes = [GPUS[name.partition(":")[0]][0] for name in first if name.partition(":")[0] in GPUS]
    return {"gpu": gpu, "price_class": " to ".join(dict.fromkeys(classes)) or None, "price_per_hour": price_per_hour}
