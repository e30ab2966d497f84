"""Every technique on models whose weights lie elsewhere or in few bits: on disk, and in bitsandbytes' formats."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from interp_kernel import demo_model
from techniques._model import UnsupportedModelError
from techniques.attribution import attribution_patching
from techniques.eap import eap
from tests.techniques.test_memory import CASES, PAIR_ANSWERS, PAIRS, assert_same, usual

GRADIENTS: dict[str, Callable[[Any, Any], Any]] = {
    "attribution_patching": lambda m, t: attribution_patching(m, t, PAIRS, PAIR_ANSWERS, verify=2, min_gap=1e-3),
    "eap": lambda m, t: eap(m, t, PAIRS, PAIR_ANSWERS, verify=2, min_gap=1e-3),
}
EVERY = {**CASES, **GRADIENTS}


def bits(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return cast(Any, transformers).BitsAndBytesConfig(**options)


def load(**options: Any) -> Any:
    return cast(Any, AutoModelForCausalLM).from_pretrained(demo_model.path(), dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Blocks by turns in memory and on disk: each is somewhere else than the one before."""
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    blocks = {f"transformer.h.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    model = load(device_map={**places, **blocks}, offload_folder=str(tmp_path_factory.mktemp("offload")))
    assert model.transformer.h[1].mlp.c_fc.weight.device.type == "meta"
    return model


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_model_spread_over_devices(name: str, sharded: Any, demo: tuple[Any, Any]) -> None:
    expected = usual(name, demo) if name in CASES else EVERY[name](*demo)
    assert_same(EVERY[name](sharded, demo[1]), expected)


@pytest.fixture(scope="module")
def eight_bit() -> Any:
    # Above a threshold, a row would be rounded by what others in its batch hold.
    return load(quantization_config=bits(load_in_8bit=True, llm_int8_threshold=0.0), device_map="cpu")


@pytest.fixture(scope="module")
def four_bit() -> Any:
    config = bits(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return load(quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("name", sorted(EVERY))
def test_eight_bit_weights(name: str, eight_bit: Any, demo: tuple[Any, Any]) -> None:
    result = EVERY[name](eight_bit, demo[1])
    assert result["technique"] == EVERY[name](*demo)["technique"]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"iterative_pruning"}))
def test_four_bit_weights(name: str, four_bit: Any, demo: tuple[Any, Any]) -> None:
    result = CASES[name](four_bit, demo[1])
    assert result["technique"] == CASES[name](*demo)["technique"]


@pytest.mark.parametrize("name", sorted({*GRADIENTS, "iterative_pruning"}))
def test_four_bit_weights_without_gradients_are_refused(name: str, demo: tuple[Any, Any]) -> None:
    """bitsandbytes marks the weights that it has laid out for its CPU kernel."""
    model = load()
    model.transformer.h[0].mlp.c_fc.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(UnsupportedModelError, match=r"4-bit weights on the CPU, where .* by a kernel without grad"):
        EVERY[name](model, demo[1])


def test_a_threshold_of_eight_bits_is_named(demo: tuple[Any, Any]) -> None:
    model = load(quantization_config=bits(load_in_8bit=True), device_map="cpu")
    with pytest.raises(UnsupportedModelError, match="unless it is loaded with llm_int8_threshold=0"):
        CASES["activation_patching"](model, demo[1])
