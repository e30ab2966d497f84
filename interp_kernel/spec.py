"""WorkerSpec: which model a worker holds and how it is loaded; equal specs share one worker."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.errors import SpecError

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
QUANTISATION = ("bnb-4bit", "bnb-8bit")
LOADERS = ("transformers", "transformer_lens", "nnsight")
TEXTS = ("revision", "base_model", "tokenizer_name", "attn_implementation", "hidden_system_prompt")
SECRET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What to load. All fields are plain data, so a spec travels as JSON and its key is a hash of it.

    Attributes:
        model_name: `demo`, a name on the Hugging Face hub, or a local folder; a LoRA adapter if `is_peft`.
        revision: Branch, tag or commit on the hub.
        is_peft: `model_name` is a PEFT adapter that is put on `base_model`.
        base_model: Model under the adapter; by default the one that the adapter's own config names.
        tokenizer_name: Tokenizer, where it is not the model's own.
        dtype: One of DTYPES; `auto` keeps the checkpoint's.
        device_map: transformers' `device_map`: `auto` shards over all GPUs; a device name; or a dict.
            None puts the model on the first GPU if there is one, else on the CPU.
        quantization: One of QUANTISATION, or a dict of transformers' own `quantization_config` fields.
        attn_implementation: transformers' own name, as `eager` or `sdpa`.
        loader: One of LOADERS, who makes the object that code gets as `model`: the plain model, TransformerLens' bridge
            over it, or nnsight's LanguageModel. Techniques take the plain model alone.
        trust_remote_code: Whether code from the model's repository may run.
        hidden_system_prompt: `file:PATH` or `secret:NAME`, never the text itself; the worker reads it.
    """

    model_name: str = "demo"
    revision: str | None = None
    is_peft: bool = False
    base_model: str | None = None
    tokenizer_name: str | None = None
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
    quantization: str | dict[str, Any] | None = None
    attn_implementation: str | None = None
    loader: str = "transformers"
    trust_remote_code: bool = False
    hidden_system_prompt: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model_name, str) or not self.model_name.strip():
            raise SpecError(f"model_name is {self.model_name!r}; expected `demo`, a hub name or a local folder.")
        self._check_types()
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype {self.dtype!r} is not known; expected one of {', '.join(DTYPES)}.")
        if isinstance(self.quantization, str) and self.quantization not in QUANTISATION:
            raise SpecError(
                f"quantization {self.quantization!r} is not known; expected one of {', '.join(QUANTISATION)}, "
                "or a dict of transformers' quantization_config."
            )
        if self.base_model is not None and not self.is_peft:
            raise SpecError(f"base_model={self.base_model!r} needs is_peft=True; without it no adapter is loaded.")
        if self.loader not in LOADERS:
            raise SpecError(f"loader {self.loader!r} is not known; expected one of {', '.join(LOADERS)}.")
        if self.loader == "transformer_lens" and self.is_peft:
            raise SpecError(
                "TransformerLens leaves the adapter of a PEFT model out without a word. Merge it into its base model "
                "and load that, or use another loader."
            )
        _check_hidden_prompt(self.hidden_system_prompt)

    def _check_types(self) -> None:
        for name in TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                # What is given for the hidden prompt may hold the prompt itself, so only its type is told.
                shown = type(value).__name__ if name == "hidden_system_prompt" else repr(value)
                raise SpecError(f"{name} is {shown}; expected text, or None to leave it out.")
        for name in ("is_peft", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} is {getattr(self, name)!r}; expected True or False.")

    @property
    def key(self) -> str:
        """16 hex digits, equal for equal specs; the name of the worker's rendezvous folder."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Only the fields that differ from their default, so that a new field keeps old keys valid.

        A local folder is given by its resolved path: the worker starts in another working directory.
        """
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        for name in ("model_name", "base_model", "tokenizer_name"):
            if isinstance(changed.get(name), str) and Path(changed[name]).expanduser().is_dir():
                changed[name] = str(Path(changed[name]).expanduser().resolve())
        if (self.hidden_system_prompt or "").startswith("file:"):
            path = Path(self.hidden_system_prompt.removeprefix("file:")).expanduser()  # type: ignore[union-attr]
            changed["hidden_system_prompt"] = f"file:{path.resolve()}"
        return changed

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WorkerSpec:
        """Build a spec from options by name; an unknown name is refused with those that exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise SpecError(f"Worker option {unknown[0]!r} is not known; expected one of {', '.join(known)}.")
        return cls(**fields)


def _check_hidden_prompt(source: str | None) -> None:
    if source is None:
        return
    kind, _, rest = source.partition(":")
    if kind == "file" and rest:
        return
    if kind == "secret" and SECRET_NAME.fullmatch(rest):
        return
    # The text given may be the prompt itself, so the message must not repeat it.
    raise SpecError(
        "hidden_system_prompt takes `file:PATH` or `secret:NAME`, not the text itself, so that it never stands in "
        "the notebook. Write the text to a file that only you can read and pass its path."
    )
