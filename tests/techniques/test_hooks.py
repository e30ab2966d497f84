"""Sites of many families, against transformers' own outputs, TransformerLens' recorded values and edited weights."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from techniques._hooks import HookPoint, check_sites, edit, hook_point, record, run
from techniques._model import SITES, UnsupportedModelError, find_decoder
from techniques._site_values import weighted
from techniques._tokens import Batch, pad
from tests.techniques.conftest import N_LAYERS, PARTS
from tests.techniques.oracles import record_hooks

FAMILIES = sorted(set(PARTS) - {"mamba"})
PARALLEL = {"gpt_neox", "gptj", "phi", "falcon"}
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"}
# Beside each family's defaults: grouped heads, and the other ways in which a family is built.
BUILDS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"num_attention_heads": 4}) for family in ("llama", "phi3", "gemma2", "qwen3", "olmo2")),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("falcon", {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("falcon", {"multi_query": False, "alibi": True}),
]
IDS = [[1, 2, 3, 4, 5, 6], [6, 7, 8, 2]]


def name_of(build: tuple[str, dict[str, Any]]) -> str:
    return "-".join([build[0], *(f"{key}={value}" for key, value in build[1].items())])


@pytest.fixture(params=BUILDS, ids=name_of)
def model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    family, options = request.param
    return make_model(family, **options)


def batch_of(model: Any) -> Batch:
    return pad(IDS, "right", 0, model.device)


def eager_copy(model: Any) -> Any:
    """The model loaded anew with eager attention: not every family can be switched."""
    copied = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    copied.load_state_dict(model.state_dict())
    return copied


def all_points(model: Any) -> list[HookPoint]:
    layers = find_decoder(model).layers
    return [HookPoint(site, i) for i, layer in enumerate(layers) for site in layer.sites]


def put(index: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return write


# What the sites are.


@torch.no_grad()
def test_every_family_has_its_sites_and_proves_them(architecture: str, make_model: Any) -> None:
    found = check_sites(make_model(architecture))
    expected = set(SITES)
    if architecture in PARALLEL:
        expected -= {"resid_mid"}
    if architecture in EXPERTS:
        expected -= {"mlp_pre", "mlp_post"}
    if architecture == "opt":
        expected -= {"resid_mid", "mlp_pre", "mlp_post", "mlp_out"}
    if architecture == "mamba":
        expected = {"resid_pre", "resid_post"}
    assert [set(layer.sites) for layer in found.layers] == [expected] * N_LAYERS
    assert found.parallel == (architecture in PARALLEL)


@torch.no_grad()
def test_stream_and_patterns_are_transformers_own(model: Any) -> None:
    batch = batch_of(model)
    with record(model, all_points(model)) as found:
        logits = run(model, batch)
    own = eager_copy(model)(**vars(batch), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(logits, own.logits)
    if not getattr(model.config, "alibi", False):  # Falcon's fused and eager attention round their alibi differently
        real = batch.attention_mask.bool()
        torch.testing.assert_close(logits[real], run(model, batch)[real], rtol=1e-4, atol=1e-4)
    for i in range(N_LAYERS):
        torch.testing.assert_close(found[HookPoint("resid_pre", i)], own.hidden_states[i])
        torch.testing.assert_close(found[HookPoint("pattern", i)], own.attentions[i])
    for i in range(N_LAYERS - 1):
        torch.testing.assert_close(found[HookPoint("resid_post", i)], own.hidden_states[i + 1])


@torch.no_grad()
def test_parts_add_up(model: Any) -> None:
    with record(model, all_points(model)) as found:
        run(model, batch_of(model))
    for i, layer in enumerate(find_decoder(model).layers):
        at = {point.site: value for point, value in found.items() if point.layer == i}
        mid = at["resid_pre"] + at["attn_out"]
        if "resid_mid" in layer.sites:
            torch.testing.assert_close(at["resid_mid"], mid)
        if "mlp_out" in layer.sites:
            torch.testing.assert_close(at["resid_post"], mid + at["mlp_out"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weighted(at["pattern"], at["v"]), at["z"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_head_reads_its_own_queries_keys_and_values(model: Any) -> None:
    """However a projection is laid out, a change of one head's q, k or v reaches no other head's pattern and z."""
    decoder, batch = find_decoder(model), batch_of(model)
    points = [HookPoint("pattern", 0), HookPoint("z", 0)]
    with record(model, points) as plain:
        run(model, batch)
    group = decoder.n_heads // decoder.n_kv_heads
    for site, readers in (("q", [1]), ("k", range(group)), ("v", range(group))):
        if site != "v" and model.config.model_type.startswith("olmo") and model.config.model_type != "olmo":
            continue  # OLMo 2 and 3 norm the queries of all heads together; TransformerLens' values stand for them
        head = 1 if site == "q" else 0
        with (
            edit(model, {HookPoint(site, 0): put((slice(None), slice(None), head), 5.0)}),
            record(model, points) as new,
        ):
            run(model, batch)
        changed = {
            point.site: [
                i
                for i in range(decoder.n_heads)
                if not torch.equal(new[point].select(axis, i), plain[point].select(axis, i))
            ]
            for point, axis in zip(points, (1, 2), strict=True)
        }
        assert changed["z"] == list(readers)
        assert changed["pattern"] == ([] if site == "v" else list(readers))


@pytest.mark.parametrize("family", record_hooks.FAMILIES)
def test_values_are_those_of_transformer_lens(family: str) -> None:
    recorded = np.load(record_hooks.FILE)
    model = record_hooks.build(family)
    assert record_hooks.weight_sum(model) == pytest.approx(float(recorded[f"{family}/weights"]), rel=1e-12)
    with torch.no_grad(), record(model, all_points(model)) as found:
        logits = run(model, pad([record_hooks.CLEAN], "right", 0, model.device))
    np.testing.assert_allclose(logits[0], recorded[f"{family}/logits"], atol=1e-5)
    for point, value in found.items():
        theirs = recorded[f"{family}/{point.site}/{point.layer}"]
        np.testing.assert_allclose(value[0], theirs.reshape(value[0].shape), atol=1e-5, err_msg=str(point))


@pytest.mark.parametrize(
    ("family", "o_proj"), [("gpt2", "attn.c_proj"), ("llama", "self_attn.o_proj"), ("phi3", "self_attn.o_proj")]
)
@torch.no_grad()
def test_a_head_without_its_weights_is_a_head_of_zeros(
    family: str, o_proj: str, make_model: Any, blocks_of: Any
) -> None:
    model = make_model(family)
    cut = copy.deepcopy(model)
    weight = blocks_of(family, cut)[1].get_submodule(o_proj).weight
    (weight.T if family == "gpt2" else weight)[:, 8:] = 0.0  # columns of head 1
    with edit(model, {HookPoint("z", 1): put((..., 1, slice(None)), 0.0)}):
        edited = run(model, batch_of(model))
    torch.testing.assert_close(edited, run(cut, batch_of(cut)))


@pytest.mark.parametrize(
    ("family", "down"), [("gpt2", "mlp.c_proj"), ("llama", "mlp.down_proj"), ("opt", ""), ("phi3", "mlp.down_proj")]
)
@torch.no_grad()
def test_a_neuron_without_its_weights_is_zero_or_far_below(
    family: str, down: str, make_model: Any, blocks_of: Any
) -> None:
    model = make_model(family)
    if family == "opt":
        with pytest.raises(
            UnsupportedModelError, match="Layer 1 of this model has no mlp_post; expected one of resid_pre"
        ):
            run_with(model, HookPoint("mlp_post", 1), 0.0)
        return
    cut = copy.deepcopy(model)
    weight = blocks_of(family, cut)[1].get_submodule(down).weight
    (weight.T if family == "gpt2" else weight)[:, 3] = 0.0
    torch.testing.assert_close(run_with(model, HookPoint("mlp_post", 1), 0.0), run(cut, batch_of(cut)))
    # GELU and SiLU give nothing where their input is far below zero.
    torch.testing.assert_close(run_with(model, HookPoint("mlp_pre", 1), -1e4), run(cut, batch_of(cut)))


def run_with(model: Any, point: HookPoint, value: float) -> Tensor:
    with edit(model, {point: put((..., 3), value)}):
        return run(model, batch_of(model))


# Edits.


@torch.no_grad()
def test_an_edit_is_seen_by_what_comes_after_and_by_records(model: Any) -> None:
    batch = batch_of(model)
    for point in all_points(model)[: len(SITES)]:
        with edit(model, {point: lambda x: x * 0.5}), record(model, [point]) as inside:
            changed = run(model, batch)
        with record(model, [point]) as outside:
            plain = run(model, batch)
        torch.testing.assert_close(inside[point], outside[point] * 0.5, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed, plain)
        with edit(model, {point: lambda x: x * 1.0}):
            torch.testing.assert_close(run(model, batch), plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_edits_of_one_layer_see_each_other(make_model: Any) -> None:
    model = make_model("gemma2")
    order = [point for point in all_points(model) if point.layer == 1]
    seen = []

    def note(site: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            seen.append(site)
            return x + 0.1

        return change

    edits = {point: note(point.site) for point in reversed(order)}
    with edit(model, edits), record(model, order) as found:
        run(model, batch_of(model))
    # z is computed once more after the pattern, which is only known then.
    assert [site for i, site in enumerate(seen) if site not in seen[:i]] == [
        *("resid_pre", "q", "k", "v", "z", "pattern", "attn_out"),
        *("resid_mid", "mlp_pre", "mlp_post", "mlp_out", "resid_post"),
    ]
    at = {point.site: value for point, value in found.items()}
    torch.testing.assert_close(at["z"], weighted(at["pattern"], at["v"]) + 0.1)
    torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
    torch.testing.assert_close(at["resid_post"], at["resid_mid"] + at["mlp_out"] + 0.1)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "gemma2", "gpt_oss", "bloom", "falcon"])
@torch.no_grad()
def test_a_pattern_without_a_key_is_a_mask_of_that_key(family: str, make_model: Any) -> None:
    """Weights that leave out a key and are scaled up again are what attention gives if the key is masked."""
    model = make_model(family)
    eager = eager_copy(model)
    ids = torch.tensor([IDS[0]])
    positions = torch.arange(6)[None]

    def leave_out(pattern: Tensor) -> Tensor:
        rest = pattern.clone()
        rest[..., 3:, 1] = 0.0
        scale = (1 - pattern[..., 3:, 1]) if family == "gpt_oss" else rest[..., 3:, :].sum(-1)
        rest[..., 3:, :] /= scale[..., None]
        return rest

    with edit(model, {HookPoint("pattern", i): leave_out for i in range(N_LAYERS)}):
        ours = run(model, Batch(ids, torch.ones_like(ids)))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[3:, 1] = False

    def masked(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        lowest = torch.finfo(torch.float32).min
        given = kwargs.get("attention_mask")
        added = torch.zeros(1, 1, 6, 6).masked_fill(~mask, lowest)
        return args, {**kwargs, "attention_mask": added if given is None else given.masked_fill(~mask, lowest)}

    for module in eager.modules():
        if type(module).__name__.endswith("Attention") and not hasattr(module, "attention"):
            module.register_forward_pre_hook(masked, with_kwargs=True)
    theirs = eager(ids, position_ids=positions).logits if family != "bloom" else eager(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, run(model, Batch(ids, torch.ones_like(ids))))


@torch.no_grad()
def test_edits_reach_generation(demo: Any) -> None:
    model, tokenizer = demo
    inputs = tokenizer("The Eiffel Tower is located in", return_tensors="pt")
    lengths: list[int] = []

    def note(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return x * 0.0

    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with edit(model, {HookPoint("mlp_out", 0): note}):
        changed = model.generate(**inputs, **options)
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1]
    assert not torch.equal(plain, changed)
    assert torch.equal(plain, model.generate(**inputs, **options))
    with (
        edit(model, {HookPoint("pattern", 0): lambda x: x}),
        pytest.raises(
            ValueError, match=r"A pattern over 7 keys met 1 values, as the others lie in a cache. Run the model"
        ),
    ):
        model.generate(**inputs, **options)


# Gradients.


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gpt_neox", "gemma2", "bloom", "falcon"])
def test_gradients_at_all_sites_are_slopes(family: str, make_model: Any) -> None:
    """The gradient with respect to a recorded value, against the change of the output when the value is moved."""
    model = make_model(family).double()  # norms and softmax of most families compute in float32 all the same
    points, batch = all_points(model), pad(IDS[:1], "right", 0, model.device)
    with record(model, points) as found:
        metric = run(model, batch)[0, -1, 3]
    grads = torch.autograd.grad(metric, [found[point] for point in points])
    generator = torch.Generator().manual_seed(0)
    for point, grad in zip(points, grads, strict=True):
        along = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        along /= along.norm()
        moved = []
        for size in (1e-2, -1e-2):
            with torch.no_grad(), edit(model, {point: lambda x, step=size * along: x + step}):  # type: ignore[misc]
                moved.append(run(model, batch)[0, -1, 3])
        slope = (moved[0] - moved[1]) / 2e-2
        torch.testing.assert_close((grad * along).sum(), slope, rtol=1e-2, atol=2e-4, msg=str(point))


def test_gradients_flow_through_an_edit(make_model: Any) -> None:
    model = make_model("llama").requires_grad_(False)
    added = torch.zeros(16, requires_grad=True)
    with edit(model, {HookPoint("resid_mid", 1): lambda x: x + added}):
        (slope,) = torch.autograd.grad(run(model, batch_of(model))[0, -1, 3], added)
    assert slope.abs().min() > 0


# Kinds of models.


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "o_proj", "down_proj"])]
)
@torch.no_grad()
def test_an_adapter_counts(family: str, targets: list[str], make_model: Any) -> None:
    config = LoraConfig(target_modules=targets, fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    plain: Any = make_model(family)
    adapted: Any = get_peft_model(make_model(family), config)
    points = all_points(plain)
    check_sites(adapted.eval())
    with record(adapted, points) as found:
        logits = run(adapted, batch_of(adapted))
    torch.testing.assert_close(logits, adapted(**vars(batch_of(adapted)), use_cache=False).logits, rtol=1e-4, atol=1e-5)
    merged: Any = adapted.merge_and_unload()
    with record(merged, points) as expected:
        run(merged, batch_of(merged))
    for point in points:
        torch.testing.assert_close(found[point], expected[point], rtol=1e-4, atol=1e-4, msg=str(point))
    with record(plain, points) as without:
        run(plain, batch_of(plain))
    assert not torch.allclose(found[HookPoint("z", 1)], without[HookPoint("z", 1)])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@torch.no_grad()
def test_parts_are_searched_again_once_an_adapter_is_put_on(make_model: Any) -> None:
    model = make_model("llama")
    before = find_decoder(model).layers[0].sites["q"].module
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    after = find_decoder(model).layers[0].sites["q"].module
    assert after is not before
    assert after is model.model.layers[0].self_attn.q_proj


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@torch.no_grad()
def test_half_precision_quantised_and_offloaded_models(make_model: Any, tmp_path: Any) -> None:
    from accelerate import cpu_offload

    half = make_model("gemma2").bfloat16()
    check_sites(half)
    quantised = make_model("llama")
    quantise: Any = torch.ao.quantization.quantize_dynamic
    quantise(quantised.model.layers, {nn.Linear}, torch.qint8, inplace=True)
    quantised.eval()  # the new modules come in train mode
    offloaded = make_model("llama")
    expected = run(offloaded, batch_of(offloaded))
    cpu_offload(offloaded, torch.device("cpu"))
    assert offloaded.device.type == "meta"
    for model in (half, quantised, offloaded):
        check_sites(model)
        before = {id(module): module.__dict__.get("forward") for module in model.modules()}
        with edit(model, {point: lambda x: x + 0.5 for point in all_points(model)}), record(model, all_points(model)):
            changed = run(model, batch_of(model))
        assert not torch.allclose(changed, run(model, batch_of(model)))
        assert {id(module): module.__dict__.get("forward") for module in model.modules()} == before
    torch.testing.assert_close(run(offloaded, batch_of(offloaded)), expected)


# What is left behind.


def state_of(model: Any) -> dict[str, Any]:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "forwards": [name for name, module in model.named_modules() if "forward" in module.__dict__],
        "hooks": [
            name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        ],
        "attention": [config._attn_implementation for config in configs],
        "training": [module.training for module in model.modules()],
        "grads": [parameter.grad is not None for parameter in model.parameters()],
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("site", SITES)
def test_nothing_is_left_after_an_error_in_mid_pass(site: str, error: type[BaseException], make_model: Any) -> None:
    model = make_model("llama")
    before = state_of(model)
    assert not before["forwards"]

    def fail(value: Tensor) -> Tensor:
        assert state_of(model)["forwards"]
        raise error("boom")

    with pytest.raises(error, match="boom"), record(model, all_points(model)):  # noqa: SIM117 - one is left at a time
        with edit(model, {HookPoint(site, 1): fail}):
            run(model, batch_of(model))
    assert state_of(model) == before


def test_nothing_is_left_when_placing_fails_or_contexts_end_in_any_order(make_model: Any) -> None:
    model = make_model("gpt2")
    before = state_of(model)
    with (
        pytest.raises(ValueError, match="Layer 9 does not exist"),
        record(model, [HookPoint("z", 0), HookPoint("z", 9)]),
    ):
        pass
    first, second = record(model, [HookPoint("z", 0)]), record(model, [HookPoint("z", 0), HookPoint("pattern", 0)])
    one, two = first.__enter__(), second.__enter__()
    run(model, batch_of(model))
    assert torch.equal(one[HookPoint("z", 0)], two[HookPoint("z", 0)])
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert state_of(model) == before


def test_a_model_that_was_looked_at_can_be_freed(make_model: Any) -> None:
    model = make_model("llama")
    check_sites(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# Running a part.


@torch.no_grad()
def test_a_run_stops_after_the_layer_asked_for(make_model: Any) -> None:
    model = make_model("llama")
    batch = batch_of(model)
    own = model(**vars(batch), output_hidden_states=True)
    with record(model, all_points(model), keep=lambda x: x[:, -1]) as found:
        resid = run(model, batch, stop_after=1)
    torch.testing.assert_close(resid, own.hidden_states[2])
    assert {point.layer for point in found} == {0, 1}
    assert found[HookPoint("resid_post", 1)].shape == (2, 16)
    with pytest.raises(ValueError, match=r"Layer 3 does not exist; the model has 3 layers. Choose one from 0 to 2."):
        run(model, batch, stop_after=3)


# Refusals.


def test_names_of_points() -> None:
    for site in SITES:
        assert hook_point(str(HookPoint(site, 3))) == HookPoint(site, 3) == hook_point(site, 3)
    assert str(hook_point("z", 3)) == "blocks.3.attn.hook_z"
    assert str(hook_point("mlp_post", 0)) == "blocks.0.mlp.hook_post"
    assert str(hook_point("attn_out", 11)) == "blocks.11.hook_attn_out"
    with pytest.raises(
        ValueError, match=r"The site 'hook_zz' is not known; expected one of resid_pre, q.*blocks.0.attn.hook_z"
    ):
        hook_point("hook_zz", 1)
    with pytest.raises(
        ValueError, match=r"The site 'z' has no layer; expected one. Give layer=, or use blocks.0.attn.hook_z"
    ):
        hook_point("z")
    with pytest.raises(ValueError, match="already has a layer, but layer=2 was given"):
        hook_point("blocks.1.attn.hook_z", 2)


def test_a_parallel_block_has_nothing_between_its_parts(make_model: Any) -> None:
    with (
        pytest.raises(UnsupportedModelError, match=r"no resid_mid; expected one of resid_pre, .* both read resid_pre"),
        record(make_model("gptj"), [HookPoint("resid_mid", 0)]),
    ):
        pass


def test_an_edit_that_never_ran_or_changed_the_shape(make_model: Any) -> None:
    model = make_model("llama")
    with (
        pytest.raises(RuntimeError, match=r"The edit at blocks.2.attn.hook_z never ran; expected a forward pass"),
        edit(model, {HookPoint("z", 0): lambda x: x, HookPoint("z", 2): lambda x: x}),
    ):
        run(model, batch_of(model), stop_after=1)
    with (
        pytest.raises(
            ValueError, match=r"blocks.1.hook_resid_pre returned a value of shape \(2, 16\); expected \(2, 6, 16\)"
        ),
        edit(model, {HookPoint("resid_pre", 1): lambda x: x[:, 0]}),
    ):
        run(model, batch_of(model))


def test_models_that_no_technique_can_trust(make_model: Any) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is in train mode, in which dropout"):
        check_sites(make_model("llama").train())
    broken = make_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not all finite"):
        check_sites(broken)
    wrapped: Any = nn.Sequential(make_model("llama"))
    with pytest.raises(
        UnsupportedModelError, match=r"The model is a torch.nn.modules.container.Sequential; expected a Hugging"
    ):
        check_sites(wrapped)
    with pytest.raises(
        UnsupportedModelError, match=r"resid_pre \+ attn_out.* of block 0 differs by up to .*not known here"
    ):
        check_sites(make_model("granite", residual_multiplier=0.5))


@pytest.mark.parametrize(
    ("layer", "what"), [(0, "resid_post of block 0"), (2, "the decoded resid_post of the last block")]
)
def test_a_block_whose_output_is_changed_on_its_way_is_noticed(layer: int, what: str, make_model: Any) -> None:
    model = make_model("llama")
    model.model.layers[layer].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM: {what} differs by up to"):
        check_sites(model)


def test_attention_without_a_pattern_or_without_values(make_model: Any) -> None:
    model = make_model("llama")
    own = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda **kwargs: (own(**kwargs)[0], None)
    with (
        pytest.raises(
            UnsupportedModelError, match=r"returned no pattern, although eager attention was asked for\. Load"
        ),
        record(model, [HookPoint("pattern", 1)]),
    ):
        run(model, batch_of(model))
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    latent = make_model("deepseek_v2", **sizes, first_k_dense_replace=3)
    points = [HookPoint(site, 0) for site in ("z", "pattern")]
    with record(latent, points) as found:
        run(latent, batch_of(latent))
    assert [tuple(found[point].shape) for point in points] == [(2, 6, 2, 8), (2, 2, 6, 6)]
    with (
        pytest.raises(UnsupportedModelError, match=r"has no values of its own; expected a projection"),
        edit(latent, {HookPoint("pattern", 0): lambda x: x}),
    ):
        pass


def test_a_model_that_does_not_run_its_blocks(make_model: Any) -> None:
    model = make_model("llama")
    model.forward = lambda **kwargs: None
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM never ran its block 1; expected one run each"):
        run(model, batch_of(model), stop_after=1)


def test_a_block_in_train_mode_is_refused(make_model: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.model.layers[2].train()
    with pytest.raises(ValueError, match=r"train mode.*Call model.eval\(\) first"):
        check_sites(model)


def test_a_forward_that_is_replaced_inside_stays(make_model: Any) -> None:
    model = make_model("llama")
    block = model.model.layers[1]
    mine = block.mlp.forward
    with record(model, [HookPoint("resid_pre", 1)]):
        block.forward = mine
    assert block.__dict__["forward"] is mine
