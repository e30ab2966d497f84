"""Sweeps against one forward pass per variant with torch's own hooks, and TransformerLens' recorded sweeps."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from techniques._hooks import HookPoint, check_sites, edit, record, run
from techniques._model import UnsupportedModelError, find_decoder
from techniques._sweep import Patch, Variant, sweep
from techniques._tokens import Batch, pad
from tests.techniques.conftest import N_LAYERS, PARTS
from tests.techniques.oracles import record_hooks

FAMILIES = sorted(PARTS)
PLAIN = [[1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8, 2, 1]]
OTHER = [[3, 2, 9, 4, 8, 6, 1, 8], [2, 7, 1, 8, 4]]
EAGER = {"bloom", "gpt_neo", "gptj", "gemma2", "gpt_oss", "mpt", "mamba"}  # transformers has nothing else for them


def batches(model: Any) -> tuple[Batch, Batch]:
    return pad(PLAIN, "right", 0, model.device), pad(OTHER, "right", 0, model.device)


def recorded(model: Any, batch: Batch, *, patterns: bool) -> dict[HookPoint, Tensor]:
    layers = find_decoder(model).layers
    sites = [HookPoint(s, i) for i, layer in enumerate(layers) for s in layer.sites if patterns or s != "pattern"]
    with torch.no_grad(), record(model, sites) as values:
        run(model, batch)
    return values


def one_by_one(model: Any, batch: Batch, variants: list[Variant]) -> Tensor:
    """The last logits of each variant: its prompt alone, unpadded, in a full forward pass with torch's own hooks."""
    found = []
    for variant in variants:
        n = len(PLAIN[variant.row])
        ids = batch.input_ids[variant.row, :n][None]
        with hooked(model, variant.patches, n), torch.no_grad():
            found.append(model(ids, use_cache=False).logits[0, -1])
    return torch.stack(found)


@contextmanager
def hooked(model: Any, patches: Any, n: int) -> Iterator[None]:
    """resid_mid, pattern and parts of fused projections have no module of their own, so no plain hook: not here."""
    decoder = find_decoder(model)
    handles = []
    for patch in patches:
        site = decoder.layers[patch.point.layer].sites[patch.point.site]
        write = writer(patch, n, decoder.n_heads if patch.point.site == "z" else None)
        if site.is_input:

            def before(module: nn.Module, args: Any, kwargs: Any, write: Any = write) -> Any:
                return (
                    ((write(args[0]), *args[1:]), kwargs)
                    if args
                    else (args, {**kwargs, "hidden_states": write(kwargs["hidden_states"])})
                )

            handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: nn.Module, args: Any, output: Any, write: Any = write) -> Any:
                return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

            handles.append(site.module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def writer(patch: Patch, n: int, n_heads: int | None) -> Callable[[Tensor], Tensor]:
    def write(raw: Tensor) -> Tensor:
        raw = raw.clone()
        value = raw[0] if n_heads is None else raw[0].view(n, n_heads, -1)
        for i, position in enumerate(range(n) if patch.positions is None else patch.positions):
            target = value[position] if patch.units is None else value[position, patch.units]
            target[...] = patch.value(target[None])[0] if callable(patch.value) else patch.value[i].to(target)
        return raw

    return write


def single_patches(model: Any, other: dict[HookPoint, Tensor], sites: Any) -> list[Variant]:
    variants = []
    for row, ids in enumerate(PLAIN):
        last = len(ids) - 1
        for point, values in other.items():
            if point.site not in sites:
                continue
            for positions in ([last] if row else None, [1, 3]):
                value = values[row] if positions is None else values[row][positions]
                variants.append(Variant(row, [Patch(point, value, positions)]))
                if point.site == "z":
                    variants.append(Variant(row, [Patch(point, value[:, 1], positions, 1)]))
    return variants


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_is_one_forward_pass_per_variant(family: str, attention: str, make_model: Any) -> None:
    if attention == "sdpa" and family in EAGER:
        pytest.skip("transformers has eager attention only for this family")
    model = make_model(family)
    model.config._attn_implementation = attention
    batch, others = batches(model)
    other = recorded(model, others, patterns=False)
    variants = single_patches(
        model, other, ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_pre", "mlp_post")
    )
    some = [
        Patch(point, lambda x: 2 * x + 1, [2])
        for point in list(other)[::5]
        if point.site in ("z", "mlp_out", "resid_pre")
    ]
    variants += [Variant(0, []), Variant(1, []), Variant(0, some), Variant(1, some)]
    expected = one_by_one(model, batch, variants)
    for budget in (None, 30_000):
        found = sweep(model, batch, variants, budget_bytes=budget)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (expected - expected[-4]).abs().amax(-1)[:-4].median() > 0.01
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", record_hooks.SWEPT)
@pytest.mark.parametrize("kind", record_hooks.SWEEPS)
def test_sweeps_are_those_of_transformer_lens(family: str, kind: str) -> None:
    model = record_hooks.build(family)
    clean, corrupted = (pad([ids], "right", 0, model.device) for ids in (record_hooks.CLEAN, record_hooks.CORRUPTED))
    other = recorded(model, clean, patterns=False)
    n, heads = len(record_hooks.CLEAN), range(record_hooks.N_HEADS)
    variants = []
    for layer in range(record_hooks.N_LAYERS):
        if kind == "attn_head_out_by_pos":
            value = other[HookPoint("z", layer)][0]
            variants += [
                Variant(0, [Patch(HookPoint("z", layer), value[[p], h], [p], h)]) for p in range(n) for h in heads
            ]
        elif kind == "attn_head_v_all_pos":
            value = other[HookPoint("v", layer)][0]
            variants += [
                Variant(0, [Patch(HookPoint("v", layer), value[:, h], None, h)]) for h in range(value.shape[1])
            ]
        else:
            point = HookPoint(kind, layer)
            variants += [Variant(0, [Patch(point, other[point][0, [p]], [p])]) for p in range(n)]
    found = sweep(
        model, corrupted, variants, lambda logits, _: logits[:, record_hooks.ANSWER] - logits[:, record_hooks.WRONG]
    )
    theirs = np.load(record_hooks.FILE)[f"{family}/sweep/{kind}"]
    np.testing.assert_allclose(found, theirs.flatten(), atol=2e-5)
    assert np.ptp(theirs) > 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss", "bloom"])
def test_patterns_and_projections_are_patched_as_they_are_edited(family: str, make_model: Any) -> None:
    model = make_model(family)
    batch, others = batches(model)
    other = recorded(model, others, patterns=True)
    variants, expected = [], []
    for point in [p for p in other if p.site in ("q", "k", "v", "pattern", "resid_mid")]:
        index: Any = (0, 1) if point.site == "pattern" else (0, slice(None), 1)
        units: Any = 1 if point.site != "resid_mid" else slice(1, 2)
        value = other[point][index]
        value = value[:, None] if point.site == "resid_mid" else value
        variants.append(Variant(0, [Patch(point, value, None, units)]))

        def write(x: Tensor, index: Any = index, theirs: Tensor = other[point]) -> Tensor:
            x = x.clone()
            x[index] = theirs[index]
            return x

        with torch.no_grad(), edit(model, {point: write}):
            expected.append(run(model, batch)[0, -1])
    both = [variants[0].patches[0], variants[-1].patches[0]]
    found = sweep(model, batch, [*variants, Variant(0, both)])
    torch.testing.assert_close(found[:-1], torch.stack(expected), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found[-1], found[0])
    assert not torch.allclose(found[-1], found[-2])


def test_heads_and_neurons_can_be_chosen_by_slice_or_list(make_model: Any) -> None:
    model = make_model("llama", num_attention_heads=4)
    batch, _ = batches(model)
    z, post = HookPoint("z", 1), HookPoint("mlp_post", 0)
    zero = torch.zeros(4)

    def heads(*chosen: int) -> list[Patch]:
        return [Patch(z, zero, [1, 4], head) for head in chosen]

    variants = [
        Variant(0, heads(0, 2)),
        Variant(0, [Patch(z, torch.zeros(2, 4), [1, 4], torch.tensor([0, 2]))]),
        Variant(0, [Patch(z, torch.zeros(2, 4), [1, 4], slice(0, 3, 2))]),
        Variant(0, [Patch(post, torch.zeros(2), None, torch.tensor([3, 5]))]),
        Variant(0, [Patch(post, lambda x: 0 * x, None, torch.tensor([3, 5]))]),
    ]
    found = sweep(model, batch, variants)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[4], found[3])
    assert not torch.allclose(found[3], found[0])
    nowhere = [Variant(0, [Patch(z, torch.zeros(0, 4, 4), [])]), Variant(0, [])]
    assert torch.equal(*sweep(model, batch, nowhere))


def test_a_change_of_one_coordinate_counts(make_model: Any) -> None:
    model = make_model("llama")
    batch, _ = batches(model)
    point = HookPoint("resid_pre", 1)
    value = recorded(model, batch, patterns=False)[point][0, [4]]
    nearly = value.clone()
    nearly[0, 3] += 1
    plain, same, other, added = sweep(
        model,
        batch,
        [
            Variant(0, []),
            Variant(0, [Patch(point, value, [4])]),
            Variant(0, [Patch(point, nearly, [4])]),
            Variant(0, [Patch(point, lambda x: x + 1, [4], torch.tensor([3]))]),
        ],
    )
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other)
    torch.testing.assert_close(added, other)


def test_only_what_a_patch_changes_is_computed(make_model: Any) -> None:
    """A value that is the plain one needs no block at all, and positions before the first difference none either."""
    model = make_model("gpt2")
    batch = pad([[1, 2, 3, 4, 5, 6, 7, 8]], "right", 0, model.device)
    others = pad([[1, 2, 3, 4, 9, 6, 7, 8]], "right", 0, model.device)
    other = recorded(model, others, patterns=False)
    check_sites(model)
    sweep(model, batch, [Variant(0, [])])
    points = [HookPoint("z", layer) for layer in range(N_LAYERS)]
    variants = [Variant(0, [Patch(point, other[point][0, [p]], [p])]) for point in points for p in range(8)]
    shapes: list[tuple[int, ...]] = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple((args or kwargs["hidden_states"])[0].shape)),
            with_kwargs=True,
        )
    found = sweep(model, batch, variants)
    whole = [shape for shape in shapes if shape == (1, 8, 16)]
    assert len(whole) == N_LAYERS  # the plain run
    assert max(shape[1] for shape in shapes if shape not in whole) == 4
    expected = one_by_one_of(model, batch, variants)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    unchanged = found.view(N_LAYERS, 8, -1)[:, :4]
    assert torch.equal(unchanged, unchanged[:1, :1].expand_as(unchanged))


def one_by_one_of(model: Any, batch: Batch, variants: list[Variant]) -> Tensor:
    found = []
    for variant in variants:
        with hooked(model, variant.patches, batch.input_ids.shape[1]), torch.no_grad():
            found.append(model(batch.input_ids[[variant.row]], use_cache=False).logits[0, -1])
    return torch.stack(found)


def test_where_it_is_read_and_by_which_metric(make_model: Any) -> None:
    model = make_model("llama")
    batch, others = batches(model)
    other = recorded(model, others, patterns=False)[HookPoint("resid_pre", 1)]
    variants = [
        Variant(row, [Patch(HookPoint("resid_pre", 1), other[row, [p]], [p])]) for row in (0, 1) for p in range(5)
    ]
    rows: list[int] = []

    def metric(logits: Tensor, row: Tensor) -> Tensor:
        rows.extend(row.tolist())
        return torch.stack([logits[:, 1], logits[:, 2] + row], -1)

    found = sweep(model, batch, variants, metric, readout=[3, 2])
    logits = sweep(model, batch, variants, readout=[3, 2])
    assert sorted(rows) == [0] * 5 + [1] * 5
    torch.testing.assert_close(
        found, torch.stack([logits[:, 1], logits[:, 2] + torch.tensor([0.0] * 5 + [1.0] * 5)], -1)
    )
    plain = run(model, batch)
    torch.testing.assert_close(logits[4], plain[0, 3])  # what comes after the position that is read can't matter
    torch.testing.assert_close(logits[[8, 9]], plain[1, [2, 2]])
    assert not torch.allclose(logits[3], plain[0, 3])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["adapter", "half", "offloaded"])
def test_adapters_half_precision_and_offloaded_weights(kind: str, make_model: Any) -> None:
    from accelerate import cpu_offload

    model = make_model("llama")
    batch, others = batches(model)
    if kind == "adapter":
        model = get_peft_model(
            model, LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
        ).eval()
    if kind == "half":
        model = model.bfloat16()
    if kind == "offloaded":
        cpu_offload(model, torch.device("cpu"))
    other = recorded(model, others, patterns=False)
    variants = single_patches(model, other, ("resid_pre", "z", "mlp_out"))
    expected = one_by_one(model, batch, variants)
    found = sweep(model, batch, variants)
    # bfloat16 has three digits, and products of other shapes round otherwise.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.15 if kind == "half" else 2e-5)
    assert not any("_tap" in dir(module.forward) for module in model.modules())


# Memory.


class Tracked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known or not storage.nbytes():
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def wide_model(attention: str) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=2001, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [2**21, 2**24])
def test_memory_stays_within_the_budget(budget: int, attention: str) -> None:
    model = wide_model(attention)
    batch = pad([list(range(48)), list(range(1, 41))], "right", 0, model.device)
    value = torch.ones(16)
    variants = [
        Variant(row, [Patch(HookPoint("z", layer), value, [p], head)])
        for row in (0, 1) for layer in range(4) for p in range(0, 40, 8) for head in range(4)
    ]  # fmt: skip
    sweep(model, batch, variants[:1])
    gc.collect()
    with Tracked() as tracked:
        found = sweep(model, batch, variants, lambda logits, _: logits[:, 1], budget_bytes=budget)
    assert tracked.peak <= budget
    if budget > 2**21:
        assert tracked.peak > budget / 20
    torch.testing.assert_close(found, sweep(model, batch, variants)[:, 1], rtol=1e-4, atol=1e-5)


LIMITED = """
import resource, torch
from transformers import GPT2Config, GPT2LMHeadModel
from techniques._hooks import HookPoint
from techniques._sweep import Patch, Variant, sweep
from techniques._tokens import pad
torch.set_num_threads(1)
sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64, "vocab_size": 101}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
batch = pad([list(range(60))], "right", 0, model.device)
point = HookPoint("resid_pre", 0)
variants = [Variant(0, [Patch(point, torch.full((128,), float(i)), [i % 60])]) for i in range(100)]
some = sweep(model, batch, variants[:20], budget_bytes=2**22)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
found = sweep(model, batch, variants, budget_bytes=2**40)
torch.testing.assert_close(found[:20], some, rtol=1e-3, atol=1e-4)
print("swept", len(found))
"""


def test_chunks_shrink_to_the_memory_that_there_is() -> None:
    """A process that may take 32 MB more, and a first chunk that is made for a terabyte."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "swept 100\n", done.stderr[-2000:]


def test_without_memory_for_one_variant_it_says_so(make_model: Any) -> None:
    model = make_model("llama")
    batch, _ = batches(model)
    sizes: list[int] = []

    def greedy(logits: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(logits))
        return torch.empty(2**60) if len(logits) > 3 else logits[:, 0]

    variants = [Variant(0, [])] * 20
    assert sweep(model, batch, variants, greedy).shape == (20,)
    assert sizes[:4] == [20, 10, 5, 2]  # halves that are still too large are not tried again
    assert max(sizes[3:]) <= 3
    with pytest.raises(
        MemoryError, match=r"One variant of one prompt does not fit in memory beside the model\. Shorten"
    ):
        sweep(model, batch, [Variant(0, [Patch(HookPoint("z", 0), lambda x: torch.empty(2**60))])])


# Refusals.


def test_what_a_sweep_refuses(make_model: Any) -> None:
    model = make_model("llama")
    batch, _ = batches(model)
    point = HookPoint("z", 1)
    value = torch.zeros(8, 2, 8)

    def swept(*patches: Patch, row: int = 0) -> Tensor:
        return sweep(model, batch, [Variant(row, patches)])

    with pytest.raises(ValueError, match=r"Row 2 does not exist; the batch has 2 prompts\."):
        swept(row=2)
    with pytest.raises(ValueError, match=r"Position 8 does not exist; choose one from 0 to 7\."):
        swept(Patch(point, value[:1], [8]))
    with pytest.raises(ValueError, match=r"Position 9 does not exist; choose one from 0 to 7\."):
        sweep(model, batch, [Variant(0, [])], readout=[2, 9])
    with pytest.raises(ValueError, match=r"Layer 5 does not exist; the model has 3 layers"):
        swept(Patch(HookPoint("resid_post", 5), value))
    with pytest.raises(
        ValueError, match=r"value for blocks.1.attn.hook_z has shape \(8, 2, 8\); expected \(2, 2, 8\).*or \(2, 8\)"
    ):
        swept(Patch(point, value, [0, 1]))
    with pytest.raises(ValueError, match=r"The list of variants is empty; expected at least one"):
        sweep(model, batch, [])
    with pytest.raises(UnsupportedModelError, match=r"no resid_mid; expected one of"):
        sweep(make_model("gptj"), batch, [Variant(0, [Patch(HookPoint("resid_mid", 0), value)])])
    with pytest.raises(ValueError, match=r"logits are not all finite"):
        swept(Patch(HookPoint("resid_pre", 1), torch.full((16,), torch.nan), [1]))


def test_blocks_that_can_not_be_called_again_are_refused(make_model: Any) -> None:
    """A block that does more than its arguments say, as one that counts its calls."""
    model = make_model("llama")
    batch, _ = batches(model)
    block = model.model.layers[1]
    calls: list[int] = []
    norm = block.input_layernorm.forward

    def counting(hidden: Tensor) -> Tensor:
        calls.append(1)
        scaled: Tensor = norm(hidden) * (1 + 0.1 * len(calls))
        return scaled

    block.input_layernorm.forward = counting
    with pytest.raises(UnsupportedModelError, match=r"called a second time, differ by up to .* from the first time"):
        sweep(model, batch, [Variant(0, [])])


def test_an_interrupt_in_mid_sweep_leaves_nothing_behind(make_model: Any) -> None:
    model = make_model("llama")
    batch, _ = batches(model)
    before = model.config._attn_implementation

    def stop(value: Tensor) -> Tensor:
        raise KeyboardInterrupt

    patches = [Patch(HookPoint("pattern", 1), torch.zeros(8, 8), None, 0), Patch(HookPoint("z", 1), stop)]
    with pytest.raises(KeyboardInterrupt):
        sweep(model, batch, [Variant(0, patches)])
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation == before
