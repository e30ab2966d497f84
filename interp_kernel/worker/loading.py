"""Load the model and tokenizer of a WorkerSpec, in the worker's main thread, with progress and errors in plain words.

Everything is transformers' own `from_pretrained` on `AutoModelForCausalLM`, or peft's on top of it, so what a spec
gives is the plain Hugging Face model that the same options give anywhere else, in eval mode. Four things are added: one
quick look at the hub before anything is fetched (transformers alone retries for 23 s per file without network), float16
checkpoints become float32 on a CPU, weights that the checkpoint lacks are an error rather than random numbers, and so
are a tokenizer without vocabulary and an adapter that fits only a part of the model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_kernel.errors import LoadError
from interp_kernel.spec import WorkerSpec

Progress = Callable[[str, float | None], None]

HUB_TIMEOUT_S = 10.0
UPCAST = "the weights are float16, which is slow on a CPU, and become float32"
MEMORY = re.compile(r"out of memory|n't allocate memory|Cannot allocate memory|not enough memory|Unable to mmap", re.I)
UNREACHABLE = frozenset(
    {"OfflineModeIsEnabled", "TransportError", "ConnectionError", "Timeout", "LocalEntryNotFoundError"}
)


@dataclass
class Loaded:
    """What a worker holds.

    Attributes:
        model: A `PreTrainedModel`, or the `PeftModel` around one, in eval mode; or what the spec's loader made of it.
        tokenizer: Its tokenizer, with the hidden system prompt in it if the spec names one.
        info: JSON-able facts: names, sizes, dtypes, devices, versions, how long the load took.
    """

    model: Any
    tokenizer: Any
    info: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """Where from_pretrained finds something: a folder, which may be the cache's, or a name on the hub."""

    where: str
    revision: str | None = None
    commit: str | None = None
    files: frozenset[str] = field(default_factory=frozenset)

    @property
    def options(self) -> dict[str, Any]:
        # By name, not by commit: only then does the cache note what the name means, which a later start offline needs.
        return {"revision": self.revision or "main"}


def load(spec: WorkerSpec, progress: Progress) -> Loaded:
    """Load what `spec` names.

    Args:
        spec: What to load.
        progress: Called with a text and the fraction done (0 to 1, None where unknown), one call at a time, but from
            a download's own threads too.

    Raises:
        LoadError: It can't be loaded; the message says why and what to do.
    """
    started = time.perf_counter()
    _check_loader(spec.loader)
    adapter, base = _find_sources(spec, progress)
    progress("importing torch and transformers", None)
    import torch  # noqa: F401  imported here, so that a wrong name is told first and the line above is seen
    import transformers  # noqa: F401

    prompt = _read_prompt(spec.hidden_system_prompt)
    with _bars(progress):
        tokenizer = _load_tokenizer(_tokenizer_source(spec, adapter, base, progress), spec, progress)
        model = _load_model(base, spec, progress)
        if adapter is not None:
            model = _put_adapter(model, adapter, base, progress)
    model.eval()
    if prompt is not None:
        from interp_kernel.worker.hidden_prompt import hide_prompt

        tokenizer = hide_prompt(tokenizer, prompt)
    info = _model_info(model, tokenizer, spec, adapter, base)
    model = _wrapped(model, tokenizer, spec, progress)
    info["load_s"] = round(time.perf_counter() - started, 3)
    return Loaded(model, tokenizer, info)


def _check_loader(loader: str) -> None:
    if importlib.util.find_spec(loader) is None:
        extra = loader.replace("_", "-")
        raise LoadError(
            f'loader={loader!r} needs the package {extra}. Install it with `pip install "interp-kernel[{extra}]"`.'
        )


def _wrapped(model: Any, tokenizer: Any, spec: WorkerSpec, progress: Progress) -> Any:
    if spec.loader == "transformers":
        return model
    progress(f"wrapping the model with {spec.loader}", None)
    with _stage("model", spec.model_name):
        if spec.loader == "nnsight":
            from nnsight import LanguageModel

            return LanguageModel(model, tokenizer=tokenizer)
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(spec.model_name, hf_model=model, tokenizer=tokenizer)


def _read_prompt(source: str | None) -> str | None:
    if source is None:
        return None
    from interp_kernel.worker.hidden_prompt import read_hidden_prompt

    return read_hidden_prompt(source)


# Where things are.


def _find_sources(spec: WorkerSpec, progress: Progress) -> tuple[_Source | None, _Source]:
    """The adapter, if there is one, and the model."""
    if not spec.is_peft:
        return None, _find_model(spec.model_name, spec.revision, progress)
    if importlib.util.find_spec("peft") is None:
        raise LoadError('is_peft=True needs the package peft. Install it with `pip install "interp-kernel[peft]"`.')
    adapter = _find(spec.model_name, spec.revision, progress)
    if "adapter_config.json" not in adapter.files:
        raise LoadError(
            f"{spec.model_name!r} is no PEFT adapter: it has no adapter_config.json. "
            "Name an adapter's folder or repository, or leave is_peft out to load a whole model."
        )
    name, revision = spec.base_model, None
    if name is None:
        name, revision = _base_of(adapter, spec)
    try:
        return adapter, _find_model(name, revision, progress)
    except LoadError as error:
        raise LoadError(
            f"{error} It is the base model of the adapter {spec.model_name!r}; base_model names another."
        ) from None


def _base_of(adapter: _Source, spec: WorkerSpec) -> tuple[str, str | None]:
    from peft import PeftConfig

    with _stage("adapter", spec.model_name):
        config = PeftConfig.from_pretrained(adapter.where, **adapter.options)
    if not config.base_model_name_or_path:
        raise LoadError(f"The adapter {spec.model_name!r} does not say what its base model is. Name it as base_model.")
    return config.base_model_name_or_path, config.revision


def _find_model(name: str, revision: str | None, progress: Progress) -> _Source:
    source = _find(name, revision, progress)
    if "config.json" not in source.files:
        has = "an adapter_config.json: it is a PEFT adapter. Load it with is_peft=True"
        if "adapter_config.json" not in source.files:
            has = f"{len(source.files)} other files. Name a folder that save_pretrained wrote, or a hub model"
        raise LoadError(f"{name!r} has no config.json, which a transformers model needs, but {has}.")
    return source


def _find(name: str, revision: str | None, progress: Progress) -> _Source:
    path = _demo_folder() if name == "demo" else Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise LoadError(f"revision={revision!r} was given for the folder {str(path)!r}; only hub models have any.")
        return _Source(str(path), files=frozenset(file.name for file in path.iterdir()))
    if path.is_file():
        raise LoadError(f"{name!r} is a file; expected a folder that save_pretrained wrote, or a name on the hub.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LoadError(
            f"There is no folder {str(path)!r} on the worker's machine. Check the path, or give a hub name."
        )
    progress(f"looking for {name} on the hub", None)
    with _stage("model", name):
        return _find_on_hub(name, revision)


def _demo_folder() -> Path:
    from interp_kernel import demo_model

    return Path(demo_model.path())


def _find_on_hub(name: str, revision: str | None) -> _Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        broken = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code >= 500
        if not broken and not _is_unreachable(error):
            raise
        cached = _find_in_cache(name, revision)
        if cached is None:
            raise
        return cached
    files = frozenset(sibling.rfilename for sibling in found.siblings or [])
    return _Source(name, revision, found.sha, files=files)


def _find_in_cache(name: str, revision: str | None) -> _Source | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parent
            files = frozenset(entry.name for entry in folder.iterdir())
            # As a folder, because transformers asks the hub for some files even if told local_files_only.
            return _Source(str(folder), commit=folder.name, files=files)
    return None


# Loading.


def _tokenizer_source(spec: WorkerSpec, adapter: _Source | None, base: _Source, progress: Progress) -> _Source:
    if spec.tokenizer_name is not None:
        return _find(spec.tokenizer_name, None, progress)
    if adapter is not None and "tokenizer_config.json" in adapter.files:
        return adapter
    return base


def _load_tokenizer(source: _Source, spec: WorkerSpec, progress: Progress) -> Any:
    from transformers import AutoTokenizer

    progress("reading the tokenizer", None)
    with _stage("tokenizer", source.where):
        tokenizer = AutoTokenizer.from_pretrained(
            source.where, trust_remote_code=spec.trust_remote_code, **source.options
        )
    # Without vocabulary files transformers 5 makes a tokenizer that knows its special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise LoadError(
            f"No tokenizer was found in {source.where!r}: it has no vocabulary. Name a folder or hub model "
            "that has one as tokenizer_name."
        )
    return tokenizer


def _load_model(source: _Source, spec: WorkerSpec, progress: Progress) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM

    with _stage("model", source.where):
        config = AutoConfig.from_pretrained(source.where, trust_remote_code=spec.trust_remote_code, **source.options)
        device_map = _device_map(spec)
        upcasts = spec.dtype == "auto" and spec.quantization is None and device_map in (None, "cpu", {"": "cpu"})
        options: dict[str, Any] = {
            "device_map": device_map,
            "dtype": getattr(torch, spec.dtype, "auto"),
            "attn_implementation": spec.attn_implementation,
            "quantization_config": _quantization_config(spec),
        }
        if upcasts and config.dtype == torch.float16:
            progress(UPCAST, None)
            options["dtype"] = torch.float32
        progress("reading weights", 0.0)
        model, loading = auto.from_pretrained(
            source.where,
            config=config,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            tqdm_class=_bar_class(progress),
            **source.options,
            **{name: value for name, value in options.items() if value is not None},
        )
        if upcasts and model.dtype == torch.float16:
            # A config need not say its dtype; then only the loaded weights tell.
            progress(UPCAST, None)
            model = model.float()
    missing = sorted(loading["missing_keys"])
    if missing and spec.quantization is None:
        raise LoadError(
            f"The checkpoint {source.where!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as "
            f"{missing[0]!r}; they would be random numbers. Name a checkpoint of a whole language model."
        )
    return model


def _device_map(spec: WorkerSpec) -> Any:
    import torch

    if spec.device_map is not None and torch.accelerator.is_available():
        return spec.device_map
    if spec.device_map is not None:
        # `auto` on a machine without GPU is the CPU; saying so keeps accelerate from splitting the model to disk.
        return "cpu" if spec.device_map == "auto" else spec.device_map
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None else {"": f"{accelerator.type}:0"}


def _quantization_config(spec: WorkerSpec) -> Any:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    bits_and_bytes: Any = BitsAndBytesConfig

    if spec.quantization is None:
        return None
    if isinstance(spec.quantization, dict):
        return AutoQuantizationConfig.from_dict(dict(spec.quantization))
    if spec.quantization == "bnb-8bit":
        return bits_and_bytes(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _put_adapter(model: Any, adapter: _Source, base: _Source, progress: Progress) -> Any:
    from peft import PeftModel

    progress("putting the adapter on the model", None)
    with _stage("adapter", adapter.where), warnings.catch_warnings():
        # What the adapter lacks is only a warning of peft's, and what it has too much of is not even that.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter.where, **adapter.options)
    if surplus := _surplus_weights(adapted, adapter):
        raise LoadError(
            f"The adapter {adapter.where!r} does not fit its base model {base.where!r}: it has {len(surplus)} weights "
            f"more, such as {surplus[0]!r}. Name the model that it was trained on as base_model."
        )
    return adapted


def _surplus_weights(adapted: Any, adapter: _Source) -> list[str]:
    from huggingface_hub import hf_hub_download
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    name = "adapter_model.safetensors"
    if name not in adapter.files:
        return []
    folder = Path(adapter.where)
    path = str(folder / name) if folder.is_dir() else hf_hub_download(adapter.where, name, **adapter.options)
    with safe_open(path, framework="pt") as file:
        return sorted(set(file.keys()) - set(get_peft_model_state_dict(adapted)))


@contextmanager
def _stage(what: str, name: str) -> Iterator[None]:
    """Turn whatever fails inside into a LoadError; anything may, remote code included."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explain(error, what, name)) from error


# Progress.


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    from transformers.utils import logging

    bar = _bar_class(progress)
    previous = logging.set_tqdm_hook(lambda _factory, args, kwargs: bar(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def _bar_class(progress: Progress) -> Any:
    """A tqdm that tells `progress` what it would draw, and draws nothing."""
    from tqdm.std import tqdm

    lock = threading.RLock()

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        """Bar for transformers' weight loading (`Loading weights`) and the hub's downloads (counted in bytes)."""

        monitor_interval = 0  # no extra thread
        _lock = lock  # tqdm's own is a multiprocessing lock, which starts a process

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *_args: Any, **_kwargs: Any) -> bool:
            # The hub shortens long paths from the left, as in `(…)4567/model.safetensors`.
            file = str(self.desc).removesuffix(": ").rpartition("/")[2]
            text = f"downloading {file}" if self.unit == "B" else "reading weights"
            with lock:
                progress(text, min(1.0, self.n / self.total) if self.total else None)
            return True

        def close(self) -> None:
            self.display()

    return Bar


# Facts.


def _model_info(model: Any, tokenizer: Any, spec: WorkerSpec, adapter: _Source | None, base: _Source) -> dict[str, Any]:
    plain = model.get_base_model() if adapter is not None else model
    parameters = list(model.parameters())
    main = adapter or base
    return {
        "model_name": spec.model_name,
        "revision": spec.revision,
        "commit": main.commit,
        "class": type(plain).__name__,
        "tokenizer_class": type(tokenizer).__name__,
        "n_params": plain.num_parameters(),
        **_shape(plain.config.get_text_config()),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "devices": sorted({str(p.device) for p in parameters}),
        "device_map": {str(k): str(v) for k, v in (getattr(plain, "hf_device_map", None) or {}).items()} or None,
        "memory_bytes": plain.get_memory_footprint(),
        "is_peft": adapter is not None,
        "adapter": _adapter_info(model) if adapter is not None else None,
        "base_model": base.where if adapter is not None else None,
        "base_commit": base.commit if adapter is not None else None,
        "quantization": _jsonable(getattr(plain.config, "quantization_config", None)),
        "attn_implementation": plain.config._attn_implementation,
        "hidden_system_prompt": spec.hidden_system_prompt is not None,
        "versions": {name: _version(name) for name in ("torch", "transformers", "tokenizers", "peft", "accelerate")},
    }


def _shape(config: Any) -> dict[str, int | None]:
    def first(*names: str) -> int | None:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    d_model, n_heads = first("hidden_size"), first("num_attention_heads")
    d_mlp = first("intermediate_size", "n_inner", "ffn_dim")
    if d_mlp is None and hasattr(config, "n_inner") and d_model:
        d_mlp = 4 * d_model  # GPT-2's meaning of n_inner=None
    return {
        "n_layers": first("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": first("num_key_value_heads") or n_heads,
        "d_head": first("head_dim") or (d_model // n_heads if d_model and n_heads else None),
        "d_mlp": d_mlp,
        "d_vocab": first("vocab_size"),
        "context_length": first("max_position_embeddings"),
    }


def _adapter_info(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    info = {"peft_type": str(getattr(config.peft_type, "value", config.peft_type)), "r": getattr(config, "r", None)}
    return {
        **info,
        "n_params": sum(p.numel() for name, p in model.named_parameters() if model.active_adapter in name.split(".")),
    }


def _jsonable(config: Any) -> Any:
    if config is None:
        return None
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return json.loads(json.dumps(dict(fields), default=str))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# Errors in words.


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub could not be asked at all: no network, refused, timed out, or switched off by HF_HUB_OFFLINE."""
    # By name, because the hub's client has changed its HTTP library (requests, httpx) and keeps several error trees.
    return any(not UNREACHABLE.isdisjoint(_class_names(cause)) for cause in _causes(error))


def _explain(error: BaseException, what: str, name: str) -> str:
    """What went wrong and what to do, in full sentences, without any access token.

    Args:
        error: What was raised.
        what: `model`, `tokenizer` or `adapter`.
        name: Its hub name or folder.
    """
    text = "\n".join(str(cause) for cause in _causes(error))
    names = {known for cause in _causes(error) for known in _class_names(cause)}
    subject = f"The {what} {name!r}"
    for rule in (_memory, _hub, _package, _files, _options):
        if (sentences := rule(names, text)) is not None:
            return _redact(f"{subject} {sentences}")
    line = " ".join(str(error).split())[:500]
    return _redact(f"{subject} could not be loaded: {type(error).__name__}: {line}")


def _redact(text: str) -> str:
    """`text` without the values of Hugging Face tokens."""
    from huggingface_hub import get_token

    values = {os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token()}
    for value in filter(None, values):
        text = text.replace(value, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _class_names(error: BaseException) -> set[str]:
    return {known.__name__ for known in type(error).__mro__}


def _memory(names: set[str], text: str) -> str | None:
    if not names & {"MemoryError", "OutOfMemoryError"} and not MEMORY.search(text):
        return None
    return (
        "does not fit into memory. Load it in fewer bytes (dtype='bfloat16', quantization='bnb-4bit'), spread it over "
        "several GPUs with device_map='auto', or choose a smaller model."
    )


def _hub(names: set[str], text: str) -> str | None:
    if "GatedRepoError" in names or ("HfHubHTTPError" in names and "403" in text):
        return (
            "is gated: its owner gives access to accounts that asked for it. Ask on its page on the hub, then run "
            "`huggingface-cli login` or set HF_TOKEN to a token of that account."
        )
    if "RevisionNotFoundError" in names:
        return (
            "exists on the hub, but not in the revision that was asked for. Give one of its branches, tags or commits."
        )
    if "RepositoryNotFoundError" in names:
        return (
            "is neither a local folder nor a model on the hub that can be seen from here. Check the spelling; for a "
            "private model run `huggingface-cli login` or set HF_TOKEN."
        )
    if "HFValidationError" in names:
        return "is neither a local folder nor a valid hub name, which has the form `owner/model`."
    if not UNREACHABLE.isdisjoint(names):
        how = "HF_HUB_OFFLINE is set" if "OfflineModeIsEnabled" in names else "the hub can't be reached"
        return (
            f"is neither a local folder nor in this machine's cache, and {how}. Check the name and the network, "
            "or give a folder."
        )
    if "HfHubHTTPError" in names:
        return f"could not be fetched; the hub answered: {_first_line(text)} Try again later."
    return None


def _package(names: set[str], text: str) -> str | None:
    if not names & {"ImportError", "PackageNotFoundError"}:
        return None
    for package, extra in (("bitsandbytes", "quantization"), ("accelerate", "quantization"), ("peft", "peft")):
        if package in text.lower():
            return f'needs the package {package}. Install it with `pip install "interp-kernel[{extra}]"`.'
    if "flash" in text.lower():
        return "can't use the attn_implementation: flash attention is not installed. Use 'sdpa' or 'eager'."
    return f"needs a package that is not installed: {_first_line(text)}"


def _files(names: set[str], text: str) -> str | None:
    if "SafetensorError" in names or "UnpicklingError" in names or "PytorchStreamReader" in text:
        return f"has a damaged weights file ({_first_line(text)}). Copy or download it again."
    if "JSONDecodeError" in names or "not a valid JSON" in text:
        return f"has a damaged JSON file ({_first_line(text)}). Copy or download it again."
    if "no file named" in text or "does not appear to have a file named" in text:
        return f"has no weights: {_first_line(text)}"
    if "instantiate the backend tokenizer" in text:
        return (
            "has no vocabulary that transformers can read. Name a folder or hub model with a tokenizer.json as "
            "tokenizer_name; older formats need `pip install sentencepiece tiktoken`."
        )
    if "EntryNotFoundError" in names:
        return f"lacks a file that it needs: {_first_line(text)}"
    if "trust_remote_code" in text:
        return (
            "is defined by code in its own repository, which runs with your rights. Read that code, and if you trust "
            "it, set trust_remote_code=True."
        )
    if "Unrecognized configuration class" in text:
        return "is no causal language model of transformers, so it has no next-token logits. Choose one that is."
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return (
            f"has an architecture that transformers {importlib.metadata.version('transformers')} does not know. "
            "Update transformers, or check `model_type` in its config.json."
        )
    return None


def _options(names: set[str], text: str) -> str | None:
    if "attn_implementation" in text:
        return f"does not support this attn_implementation. {_first_line(text)}"
    if "missing adapter keys" in text:
        return (
            "does not fit its base model: it lacks weights for it. Name the model that it was trained on as base_model."
        )
    for word in ("Target modules", "size mismatch"):
        if word in text:
            line = _first_line(text, word)
            return f"does not fit its base model: {line} Name the model that it was trained on as base_model."
    if "ignore_mismatched_sizes" in text:
        return "has a config.json and weights of different shapes, so one of them belongs to another model."
    if any(word in text for word in ("not compiled with CUDA", "nvalid device", "No CUDA GPUs", "no NVIDIA driver")):
        return f"can't be put where device_map says: {_first_line(text)} Use device_map='auto', or leave it out."
    return None


def _first_line(text: str, word: str = "") -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip() and word in line), "no reason given")[:300]
    return line if line.endswith((".", "!", "?")) else line + "."
