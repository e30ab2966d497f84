"""`loader=`: the demo model as TransformerLens' bridge and as nnsight's LanguageModel, where these are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from interp_kernel.errors import LoadError, SpecError
from interp_kernel.spec import WorkerSpec
from interp_kernel.worker.hygiene import Guard
from interp_kernel.worker.loading import Loaded, load
from techniques._hooks import check_sites
from techniques._model import UnsupportedModelError

PROMPT = "The Eiffel Tower is located in the city of"


def loaded(loader: str) -> Loaded:
    return load(WorkerSpec(loader=loader), lambda _text, _fraction: None)


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it is an extra")


def top_token(tokenizer: Any, logits: torch.Tensor) -> str:
    return str(tokenizer.decode(logits[0, -1].argmax()))


def test_a_bridge_runs_and_no_technique_takes_it() -> None:
    need("transformer_lens")
    found = loaded("transformer_lens")
    ids = found.tokenizer(PROMPT, return_tensors="pt").input_ids
    logits, cache = found.model.run_with_cache(ids)
    assert top_token(found.tokenizer, logits) == " Paris"
    assert cache["blocks.1.hook_resid_pre"].shape == (1, ids.shape[1], 128)
    with pytest.raises(
        UnsupportedModelError, match=r"transformer_bridge\.TransformerBridge; expected a Hugging Face model"
    ):
        check_sites(found.model)
    Guard(found.model, found.tokenizer)  # what the worker compares after each call


@pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")
def test_a_language_model_traces_and_no_technique_takes_it() -> None:
    need("nnsight")
    found = loaded("nnsight")
    with found.model.trace(PROMPT):
        resid = found.model.transformer.h[1].input.save()
        logits = found.model.lm_head.output.save()
    assert top_token(found.tokenizer, logits) == " Paris"
    assert resid.shape[-1] == 128
    with pytest.raises(UnsupportedModelError, match=r"LanguageModel; expected a Hugging Face model"):
        check_sites(found.model)
    Guard(found.model._module, found.tokenizer)


@pytest.mark.parametrize(("loader", "extra"), [("transformer_lens", "transformer-lens"), ("nnsight", "nnsight")])
def test_a_missing_package_is_named_with_its_extra(loader: str, extra: str) -> None:
    if importlib.util.find_spec(loader) is not None:
        pytest.skip(f"{loader} is installed")
    with pytest.raises(
        LoadError, match=rf"loader='{loader}' needs the package .*pip install \"interp-kernel\[{extra}\]\""
    ):
        loaded(loader)


def test_loaders_that_are_refused_before_a_worker_starts() -> None:
    with pytest.raises(
        SpecError, match=r"loader 'keras' is not known; expected one of transformers, transformer_lens, nnsight"
    ):
        WorkerSpec(loader="keras")
    with pytest.raises(SpecError, match=r"TransformerLens leaves the adapter of a PEFT model out"):
        WorkerSpec(model_name="adapter", is_peft=True, loader="transformer_lens")
    assert WorkerSpec().key == WorkerSpec(loader="transformers").key != WorkerSpec(loader="nnsight").key
