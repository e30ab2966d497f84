"""What every result carries, and how numbers and arrays get into JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

DIGITS = 6  # significant digits of the numbers in a result; a float32 holds seven


class Header(TypedDict):
    """The fields that every result has.

    Attributes:
        technique: Name of the function that made the result.
        version: Rises when the meaning of a field changes.
        model: The model's name or folder, as its config has it.
        dtype: The dtype of its weights.
        n: How many independent things (prompts, pairs, texts) the numbers rest on.
        seed: Seed of all that was drawn at random; None where nothing was.
        warnings: What a reader has to know before believing the numbers.
    """

    technique: str
    version: int
    model: str
    dtype: str
    n: int
    seed: int | None
    warnings: list[str]


class ArrayFile(TypedDict):
    """Arrays too big for JSON, in a safetensors file.

    Attributes:
        path: The file, absolute.
        sha256: Of the file's bytes.
        shapes: Shape of each array by its name.
    """

    path: str
    sha256: str
    shapes: dict[str, list[int]]


def header(
    model: PreTrainedModel,
    technique: str,
    *,
    n: int,
    seed: int | None = None,
    version: int = 1,
    warnings: Sequence[str] = (),
) -> Header:
    """The fields that every result starts with."""
    return Header(
        technique=technique,
        version=version,
        model=str(model.config.name_or_path or type(model).__name__),
        dtype=str(model.dtype).removeprefix("torch."),
        n=n,
        seed=seed,
        warnings=list(warnings),
    )


def few(n: int, what: str) -> list[str]:
    """The warning for a result whose intervals rest on one thing alone, such as a "prompt"."""
    return [] if n > 1 else [f"The intervals rest on one {what}, so they have no width and say nothing about others."]


def number(value: float | Tensor) -> float | None:
    """A number for JSON: rounded to DIGITS significant digits; None where it is not finite, as JSON knows no NaN."""
    value = float(value)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def numbers(array: Tensor) -> Any:
    """Nested lists of `number`s, in the shape of the array."""
    return _nested(array.detach().double().cpu().tolist())


def _nested(value: Any) -> Any:
    return [_nested(part) for part in value] if isinstance(value, list) else number(value)


def check_file(path: str | Path | None) -> None:
    """Raise a ValueError if what is to be a file is a folder; before the work, as it is written after it."""
    if path is not None and Path(path).is_dir():
        raise ValueError(
            f"save is {str(path)!r}, which is a folder; expected the path of a file, such as "
            f"{str(Path(path) / 'arrays.safetensors')!r}."
        )


def save_arrays(path: str | Path, arrays: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> ArrayFile:
    """Write arrays to a safetensors file, replacing it; the folder is made if it is missing."""
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    save_file(kept, file, metadata=dict(metadata or {}))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return ArrayFile(path=str(file), sha256=digest, shapes={name: list(array.shape) for name, array in kept.items()})
