"""Sweeps, attribution and hooks at the shapes of larger models with random weights, on a GPU or the CPU, without peers.

    PYTHONPATH=. python -m benchmarks.techniques.shapes --shape gpt2-xl --device cuda --dtype bfloat16 [--length 16]

Nothing is downloaded, and torch, transformers and jaxtyping are all it needs. Beside ours runs what one would write by
hand: a forward pass for each cell. Shapes: tiny, gpt2-small, gpt2-xl, 7b (Llama's).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks.measure import Figure, Samples, Section, interleaved, median, scaled
from benchmarks.techniques import attribution
from benchmarks.techniques.sweeps import (
    ANSWER,
    OURS,
    WRONG,
    Task,
    batch,
    block_operations,
    clean_values,
    gemm_peak,
    hooked_passes,
    ours_heads,
    ours_residual,
    spread,
)
from techniques._hooks import HookPoint, edit, run

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0),
    "gpt2-small": GPT2Config,
    "gpt2-xl": lambda: GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    "7b": LlamaConfig,
}
GEMM = {"cpu": (1024, 768, 3072), "cuda": (8192, 8192, 8192)}
BY_HAND = "a forward pass for each cell"
SAMPLE = 8  # cells that are run by hand
ROUNDS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--device", choices=GEMM, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--length", type=int, default=16, help="tokens of each prompt")
    options = parser.parse_args()
    given = task(options.shape, options.device, getattr(torch, options.dtype), options.length)
    name = f"{options.shape}, {options.dtype}, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}"
    held = True
    for section in (residual(given, name), heads(given, name), gradients(given, name), hooks(given, name)):
        print(section.text(), end="\n\n", flush=True)
        held = held and all(figure.holds for figure in section.figures)
    raise SystemExit(not held)


def task(shape: str, device: str, dtype: torch.dtype, length: int) -> Task:
    """A model of this shape, made where it runs, and two prompts of random tokens."""
    torch.manual_seed(0)
    config = SHAPES[shape]()
    with torch.device(device):
        model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
        clean, corrupted = torch.randint(0, config.vocab_size, (2, 1, length))
    return Task(model.eval(), clean, corrupted)


def residual(given: Task, name: str) -> Section:
    """resid_pre of each layer and position."""
    cells = [(layer, position) for layer in range(given.n_layers) for position in range(given.length)]

    def change(cell: Sequence[int], values: dict[HookPoint, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda value: value.index_copy(
            1, at(cell[1], value), values[HookPoint("resid_pre", cell[0])][:, [cell[1]]]
        )

    return swept(given, name, "resid_pre", cells, ours_residual, change)


def heads(given: Task, name: str) -> Section:
    """z of each head, at all positions."""
    cells = [(i, head) for i in range(given.n_layers) for head in range(given.model.config.num_attention_heads)]

    def change(cell: Sequence[int], values: dict[HookPoint, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda value: value.index_copy(2, at(cell[1], value), values[HookPoint("z", cell[0])][:, :, [cell[1]]])

    return swept(given, name, "z", cells, ours_heads, change)


def at(index: int, value: Tensor) -> Tensor:
    """An index as a tensor beside a value."""
    return torch.tensor([index], device=value.device)


def swept(
    given: Task,
    name: str,
    site: str,
    cells: Sequence[tuple[int, int]],
    ours: Callable[[Task, Sequence[tuple[int, int]]], Tensor],
    change: Callable[[Sequence[int], dict[HookPoint, Tensor]], Callable[[Tensor], Tensor]],
) -> Section:
    """A sweep of ours beside a sample of its cells by hand, once both give the same numbers."""
    sample = spread(cells, SAMPLE)
    values = clean_values(given, site)

    @torch.no_grad()
    def by_hand() -> Tensor:
        found = []
        for cell in sample:
            with edit(given.model, {HookPoint(site, cell[0]): change(cell, values)}):
                logits = run(given.model, batch(given.corrupted))[0, -1].float()
            found.append(logits[ANSWER] - logits[WRONG])
        return torch.stack(found).cpu()

    found = dict(zip(cells, ours(given, cells).float().tolist(), strict=True))
    gap = max(abs(found[cell] - value) for cell, value in zip(sample, by_hand().tolist(), strict=True))
    if gap > (1e-3 if given.model.dtype == torch.float32 else 0.25):
        raise RuntimeError(f"A cell by hand differs from ours by {gap:.3g} nats.")
    samples = interleaved({OURS: lambda: ours(given, cells), BY_HAND: by_hand}, ROUNDS)
    samples[BY_HAND] = [value * len(cells) / len(sample) for value in samples[BY_HAND]]
    own = median(samples[OURS])
    return Section(
        f"{site} sweep of {len(cells)} cells: {name}",
        f"{given.length} tokens, one pair. By hand, {len(sample)} cells are run and the time is scaled up; they differ "
        f"from ours by {gap:.2g} nats at most.",
        "s",
        samples,
        [Figure(f"{BY_HAND} / ours", median(samples[BY_HAND]) / own, 1, "times", at_least=True)],
        [of_peak(given, sum(given.n_layers - cell[0] for cell in cells), own)],
    )


def of_peak(given: Task, blocks: int, seconds: float, passes: int = 1) -> str:
    """What was achieved of the peak, if `blocks` blocks were run at all positions in so many seconds."""
    device = given.model.device.type
    rate = blocks * passes * given.length * block_operations(given) / seconds
    peak = gemm_peak(GEMM[device], device=device, dtype=given.model.dtype)
    sizes = " x ".join(map(str, GEMM[device]))
    return (
        f"Matrix products of whole prompts from the patched layer on: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.3g} of "
        f"the {peak / 1e12:.3g} TFLOP/s of a product of {sizes}."
    )


def gradients(given: Task, name: str) -> Section:
    """Attribution patching of all heads."""
    contenders: dict[str, Callable[[], Any]] = {
        OURS: attribution.ours(given.model, given.clean, given.corrupted),
        attribution.FLOOR: lambda: finished(given, attribution.floor),
    }
    for call in contenders.values():
        call()
    samples = interleaved(contenders, ROUNDS)
    own = median(samples[OURS])
    return Section(
        f"Attribution patching: {name}",
        f"One pair of {given.length} tokens, all heads. Ours is the whole call, from text to rows with intervals.",
        "ms",
        scaled(samples, 1e3),
        [Figure("ours / floor", own / median(samples[attribution.FLOOR]), 1.25, "times")],
        [of_peak(given, given.n_layers, own, passes=3)],
    )


def finished(given: Task, call: Callable[[Any, Tensor, Tensor], None]) -> None:
    """Call, and wait until the device is done."""
    call(given.model, given.clean, given.corrupted)
    if given.model.device.type == "cuda":
        torch.cuda.synchronize()


def hooks(given: Task, name: str) -> Section:
    """Six sites of every layer."""
    samples: Samples = hooked_passes(given.model, batch(given.corrupted), ROUNDS, ROUNDS)
    ratio = median(samples["six sites"]) / median(samples["plain"])
    return Section(
        f"Hooks on six sites: {name}",
        f"A forward pass of {given.length} tokens.",
        "ms",
        scaled(samples, 1e3),
        [Figure("six sites / plain", ratio, 1.05, "times")],
        [of_peak(given, given.n_layers, median(samples["plain"]))],
    )


if __name__ == "__main__":
    main()
