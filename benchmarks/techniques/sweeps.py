"""Patching sweeps and hooks beside TransformerLens and nnsight, at the shape of gpt2-small with random weights.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.techniques.sweeps [GROUP ...] [--layers 12] [--cells 48]

Needs transformer-lens: with 4.3 the peers are its bridge and, in the residual sweep, nnsight 0.8; with 3.9 its bridge
and its HookedTransformer, which 4.0 removed. Larger shapes and GPUs: `benchmarks.techniques.shapes`. Groups: residual,
long, heads, positions, hooks. A peer that needs minutes runs a sample of `--cells` cells, spread over the sweep, and
its time is scaled up to all of them.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Figure, Samples, Section, interleaved, median, scaled
from techniques._hooks import HookPoint, record, run
from techniques._model import find_decoder
from techniques._sweep import Patch, Variant, sweep
from techniques._tokens import Batch

GROUPS = ("residual", "long", "heads", "positions", "hooks")
OURS, NNSIGHT = "ours", "nnsight 0.8, positions batched by hand"
LENS, HOOKED = "TransformerLens' bridge", "its HookedTransformer"
ANSWER, WRONG = 262, 290
ROUNDS = 3
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@dataclass(frozen=True)
class Task:
    """A model and two prompts of random tokens, which differ at every position unless `n_shared` are the same."""

    model: Any
    clean: Tensor
    corrupted: Tensor

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return int(self.model.config.num_hidden_layers)

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return self.clean.shape[1]


def main() -> None:
    """Measure some groups, or all; exit with 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all if none is named")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cells", type=int, default=48, help="cells that a slow peer runs")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    held = True
    for group in options.groups or GROUPS:
        section = measure(group, options.layers, options.cells)
        print(section.text(), end="\n\n", flush=True)
        held = held and all(figure.holds for figure in section.figures)
    raise SystemExit(not held)


def measure(group: str, n_layers: int, cells: int) -> Section:
    """One group."""
    if group == "hooks":
        return measure_hooks()
    if group == "residual":
        return measure_residual(task(n_layers, 16), cells, 10, 2.5)
    if group == "long":
        return measure_residual(task(n_layers, 128, n_shared=64), cells, 15, None)
    return measure_heads(task(n_layers, 16), cells, by_position=group == "positions")


def task(n_layers: int, length: int, n_shared: int = 0) -> Task:
    """Random weights and prompts; the first `n_shared` tokens of both prompts are the same."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=n_layers))
    clean, corrupted = torch.randint(0, model.config.vocab_size, (2, 1, length))
    corrupted[:, :n_shared] = clean[:, :n_shared]
    model.config.architectures = ["GPT2LMHeadModel"]
    return Task(model.eval(), clean, corrupted)


# Residual stream, each layer and position.


def measure_residual(given: Task, cells: int, target: float, nnsight_target: float | None) -> Section:
    """resid_pre of each layer and position, copied from the clean run into the corrupted one."""
    all_cells = [(layer, position) for layer in range(given.n_layers) for position in range(given.length)]
    slow = spread(all_cells, cells) if given.length > 16 else all_cells
    contenders: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours_residual(given, all_cells),
        **lens_contenders(given, "resid_pre", slow),
    }
    if nnsight_target is not None and not is_old_lens():
        contenders[NNSIGHT] = NnsightSweep(given).run
    samples = checked(contenders, {name: slow if name in (LENS, HOOKED) else all_cells for name in contenders})
    scale_up(samples, len(all_cells) / len(slow))
    ours = median(samples[OURS])
    targets = {LENS: target, HOOKED: 17 if given.length == 16 else None, NNSIGHT: nnsight_target}
    figures = [
        Figure(f"{name.split(', ')[0]} / ours", median(samples[name]) / ours, limit, "times", at_least=True)
        for name, limit in targets.items()
        if name in samples and limit is not None
    ]
    shared = int((given.clean == given.corrupted).sum())
    return Section(
        f"Residual sweep, {given.n_layers} layers x {given.length} positions",
        f"Logit difference at the last position of each of {len(all_cells)} patched runs; the prompts share {shared} "
        f"tokens. {lens_version()} sweeps with its own `patching` module.",
        "s",
        samples,
        figures,
        [] if slow is all_cells else [f"TransformerLens ran {len(slow)} of the cells; its time is scaled up."],
    )


def ours_residual(given: Task, cells: Sequence[tuple[int, int]]) -> Tensor:
    """The whole sweep with the clean run that it takes its values from."""
    values = clean_values(given, "resid_pre")
    points = [HookPoint("resid_pre", layer) for layer in range(given.n_layers)]
    return swept(given, [Variant(0, [Patch(points[i], values[points[i]][0, [p]], [p])]) for i, p in cells])


def clean_values(given: Task, site: str) -> dict[HookPoint, Tensor]:
    """A site of every layer in the clean run."""
    with torch.no_grad(), record(given.model, [HookPoint(site, layer) for layer in range(given.n_layers)]) as values:
        run(given.model, batch(given.clean), stop_after=given.n_layers - 1)
    return values


def batch(ids: Tensor) -> Batch:
    """Prompts without padding."""
    return Batch(ids, torch.ones_like(ids))


def swept(given: Task, variants: Sequence[Variant]) -> Tensor:
    """Logit difference of every variant of the corrupted prompt."""
    return sweep(given.model, batch(given.corrupted), variants, lambda logits, _: logits[:, ANSWER] - logits[:, WRONG])


def spread(cells: Sequence[Any], n: int) -> list[Any]:
    """About `n` of the cells, evenly over the sweep, so that a scaled time stands for all of them."""
    step = max(1, len(cells) // n)
    return list(cells[step // 2 :: step])


def lens_version() -> str:
    """Name and version of the peer that this environment has."""
    return f"TransformerLens {version('transformer-lens')}"


def is_old_lens() -> bool:
    """Whether this is the release that has HookedTransformer still; nnsight can't share its environment."""
    return version("transformer-lens").startswith("3.")


def lens_contenders(given: Task, kind: str, cells: Sequence[tuple[int, ...]]) -> dict[str, Callable[[], Tensor]]:
    """TransformerLens' sweeps over some cells, on each kind of model that the release has."""
    models = {LENS: bridged(given.model)}
    if is_old_lens():
        from tests.techniques.oracles.record_attribution import hooked

        models[HOOKED] = hooked(given.model, fold_ln=False)
    return {name: partial(LensSweep(given, model, kind).run, cells) for name, model in models.items()}


def scale_up(samples: Samples, factor: float) -> None:
    """Let TransformerLens' time for some cells stand for all of them."""
    for name in (LENS, HOOKED):
        if name in samples:
            samples[name] = [value * factor for value in samples[name]]


def bridged(model: Any) -> Any:
    """TransformerLens' bridge to a copy of the model, which it rebuilds."""
    from transformer_lens.model_bridge import TransformerBridge

    model = copy.deepcopy(model)
    return cast(Any, TransformerBridge).boot_transformers("gpt2", hf_model=model, tokenizer=stand_in(model))


class LensSweep:
    """TransformerLens' own sweep on one of its models."""

    def __init__(self, given: Task, model: Any, kind: str) -> None:
        self.kind, self.corrupted, self.model = kind, given.corrupted, model
        with torch.no_grad():
            _, self.cache = model.run_with_cache(given.clean)

    def run(self, cells: Sequence[tuple[int, ...]]) -> Tensor:
        """Some cells of the sweep, each one forward pass."""
        import pandas
        from transformer_lens import patching

        names = {"resid_pre": ("layer", "pos"), "heads": ("layer", "head"), "positions": ("layer", "pos", "head")}
        patch = {
            "resid_pre": patching.get_act_patch_resid_pre,
            "heads": patching.get_act_patch_attn_head_out_all_pos,
            "positions": patching.get_act_patch_attn_head_out_by_pos,
        }[self.kind]
        chosen = pandas.DataFrame(cells, columns=list(names[self.kind]))
        with torch.no_grad():
            options = {"index_axis_names": None, "index_df": chosen}
            found = patch(self.model, self.corrupted, self.cache, logit_diff, **options)
        return cast(Tensor, found)


def logit_diff(logits: Tensor) -> Tensor:
    """The metric, of one run."""
    return logits[0, -1, ANSWER] - logits[0, -1, WRONG]


class NnsightSweep:
    """The fastest program that we could write with nnsight: one trace per layer, its positions in one batch."""

    def __init__(self, given: Task) -> None:
        from nnsight import LanguageModel

        self.given = given
        self.model: Any = LanguageModel(given.model, tokenizer=stand_in(given.model))

    def run(self) -> Tensor:
        """The whole residual sweep."""
        clean = clean_values(self.given, "resid_pre")
        n = self.given.length
        ids, each = self.given.corrupted.repeat(n, 1), torch.arange(n)
        found = []
        with torch.no_grad():
            for layer in range(self.given.n_layers):
                value = clean[HookPoint("resid_pre", layer)][0]
                with self.model.trace(ids):
                    resid = self.model.transformer.h[layer].input.clone()
                    resid[each, each] = value
                    self.model.transformer.h[layer].input = resid
                    logits = self.model.lm_head.output[:, -1].save()
                found.append(logits[:, ANSWER] - logits[:, WRONG])
        return torch.cat(found)


def stand_in(model: Any) -> Any:
    """A tokenizer that the peers accept; no text is encoded."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0"))
    names = {"bos_token": "t0", "eos_token": "t0", "pad_token": "t0", "unk_token": "t0"}
    folder = tempfile.mkdtemp(prefix="stand-in-")  # TransformerLens opens it again and again
    cast(Any, PreTrainedTokenizerFast)(tokenizer_object=words, **names).save_pretrained(folder)
    return cast(Any, AutoTokenizer).from_pretrained(folder)


def checked(contenders: dict[str, Callable[[], Tensor]], cells: dict[str, Sequence[Any]]) -> Samples:
    """Times of all contenders, once each has given our numbers: a contender that answers wrongly is not measured."""
    found = {name: call().flatten() for name, call in contenders.items()}
    ours = dict(zip(cells[OURS], found[OURS].tolist(), strict=True))
    for name, values in found.items():
        gap = max(abs(ours[cell] - value) for cell, value in zip(cells[name], values.tolist(), strict=True))
        if gap > 1e-3:
            raise RuntimeError(f"{name} differs by up to {gap:.3g} nats.")
    return interleaved(contenders, ROUNDS)


# Heads.


def measure_heads(given: Task, cells: int, *, by_position: bool) -> Section:
    """z of each head, at all positions at once or at each."""
    heads, positions = range(given.model.config.num_attention_heads), range(given.length)
    layers = range(given.n_layers)
    all_cells: list[tuple[int, ...]] = [(layer, head) for layer in layers for head in heads]
    if by_position:
        all_cells = [(layer, position, head) for layer in layers for position in positions for head in heads]
    slow = spread(all_cells, cells)
    peers = lens_contenders(given, "positions" if by_position else "heads", slow)
    contenders = {OURS: lambda: ours_heads(given, all_cells), **peers}
    samples = checked(contenders, {name: slow if name in peers else all_cells for name in contenders})
    scale_up(samples, len(all_cells) / len(slow))
    ours, theirs = median(samples[OURS]), {name: median(samples[name]) for name in peers}
    rate = sum(given.n_layers - cell[0] for cell in all_cells) * given.length * block_operations(given) / ours
    peak = gemm_peak()
    target = Figure("of the peak of a matrix product", rate / peak, 0.75, "times", at_least=True)
    per_rate = f"{rate * ours / 1e9:.0f} GFLOP: {rate / 1e9:.0f} GFLOP/s in our time"
    ratios = ", ".join(f"{name} {value / ours:.1f}" for name, value in theirs.items())
    notes = [
        f"{lens_version()} ran {len(slow)} of the cells; its time is scaled up: {ratios} times ours.",
        f"A matrix product of 1024 x 768 x 3072 runs at {peak / 1e9:.0f} GFLOP/s here.",
        f"Run from the patched layer on at all positions, the cells need {per_rate}.",
        "Fewer operations are made, as positions before the patch are left out.",
    ]
    return Section(
        f"Head sweep of {len(all_cells)} cells",
        f"z of each head {'at each position' if by_position else 'at all positions'}, {given.length} tokens.",
        "s",
        samples,
        [target] if by_position else [Figure(f"{LENS} / ours", theirs[LENS] / ours, 10, "times", at_least=True)],
        notes,
    )


def ours_heads(given: Task, cells: Sequence[tuple[int, ...]]) -> Tensor:
    """The whole sweep with the clean run that it takes its values from."""
    values = clean_values(given, "z")
    variants = []
    for layer, *position, head in cells:
        point = HookPoint("z", layer)
        value = values[point][0, :, head]
        variants.append(Variant(0, [Patch(point, value[position] if position else value, position or None, head)]))
    return swept(given, variants)


def block_operations(given: Task) -> int:
    """Floating-point operations of the matrix products of one block for one position."""
    block = find_decoder(given.model).blocks[0]
    return 2 * sum(int(p.numel()) for p in block.parameters() if p.dim() == 2)


def gemm_peak(sizes: tuple[int, int, int] = (1024, 768, 3072), **options: Any) -> float:
    """Operations per second of a large matrix product, the best of some; `options` say of what kind and where."""
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(times)


# Hooks.


def measure_hooks() -> Section:
    """Six sites of every layer on a small model, where the time of a forward pass is Python's."""
    torch.manual_seed(0)
    sizes = {"n_layer": 12, "n_embd": 64, "n_head": 4, "vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    model: Any = GPT2LMHeadModel(GPT2Config(**cast(Any, sizes)))
    model.eval()
    samples = hooked_passes(model, batch(torch.randint(0, 257, (1, 16))), 20, 20)
    base = median(samples["plain"])
    return Section(
        "Hooks on six sites of twelve layers, d_model 64",
        f"A forward pass of 16 tokens while {', '.join(SITES)} of every layer are recorded.",
        "ms",
        scaled(samples, 1e3),
        [Figure("six sites / plain", median(samples["six sites"]) / base, 1.05, "times")],
        [f"Placed and removed for each pass: {median(samples['placed for each pass']) / base:.2f} times."],
    )


@torch.inference_mode()
def hooked_passes(model: Any, inputs: Batch, rounds: int, block: int) -> Samples:
    """Times of forward passes, plain ones and others while six sites of every layer are recorded."""
    points = [HookPoint(site, layer) for site in SITES for layer in range(model.config.num_hidden_layers)]

    def finished() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    def plain() -> None:
        run(model, inputs)
        finished()

    def anew() -> None:
        with record(model, points):
            plain()

    def states() -> None:
        model(**vars(inputs), use_cache=False, output_hidden_states=True)
        finished()

    samples: Samples = {}
    for _ in range(rounds):
        found = interleaved({"plain": plain, "placed for each pass": anew, "output_hidden_states": states}, 1, block)
        with record(model, points):
            found |= interleaved({"six sites": plain}, 1, block)
        for name, values in found.items():
            samples.setdefault(name, []).extend(values)
    return samples


if __name__ == "__main__":
    main()
