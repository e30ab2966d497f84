"""Oracles: TransformerLens' recorded scores, models that are linear, finite differences, and forward passes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from techniques import attribution as module
from techniques import direct_logit_attribution as direct_module
from techniques import eap as eap_module
from techniques._hooks import HookPoint, check_sites, edit, record
from techniques._model import UnsupportedModelError
from techniques._nodes import FrozenNorm, frozen_norm
from techniques._results import Header
from techniques.plots.attribution import plot_attribution_patching, plot_direct_logit_attribution, plot_eap
from tests.techniques.by_hand import activations, forward
from tests.techniques.conftest import N_LAYERS
from tests.techniques.contrasts import ANSWERS, PAIRS, ioi_pairs
from tests.techniques.handmade import copies, word_tokenizer

# Of any type, so that they can be called with *demo.
attribution_patching: Any = module.attribution_patching
direct_logit_attribution: Any = direct_module.direct_logit_attribution
eap: Any = eap_module.eap
RECORDED = np.load(Path(__file__).parent / "oracles" / "attribution.npz")
WORD_PAIRS = [("the cat sat on a", "the dog ran on a"), ("a dog sat to the", "a mat sat to the")]
WORD_ANSWERS = [("mat", "dog"), ("cat", "ran")]
LONGER = [PAIRS[0], *((f"<|endoftext|>{a}", f"<|endoftext|>{b}") for a, b in PAIRS[1:])]  # by one token
FAMILIES = ["gpt2", "llama", "gemma2", "gpt_neox", "olmo2", "qwen3"]
uses_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def scores(result: Any, site: str) -> Tensor:
    return torch.tensor([row["score"] for row in result["rows"] if row["site"] == site])


def answer_gap(logits: Tensor, tokenizer: Any, pair: tuple[str, str]) -> Tensor:
    right, wrong = (tokenizer(text)["input_ids"][0] for text in pair)
    gap: Tensor = logits[..., right] - logits[..., wrong]
    return gap


# ---------------------------------------------------------------------------------------------- attribution patching


def test_scores_equal_transformerlens(demo: Any) -> None:
    result = attribution_patching(*demo, PAIRS, ANSWERS, verify=0)
    heads, mlps = (torch.tensor(RECORDED[name]).mean(0).flatten() for name in ("heads", "mlps"))
    torch.testing.assert_close(scores(result, "z"), heads, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(scores(result, "mlp_out"), mlps, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_linear_model_is_estimated_exactly(direction: Any) -> None:
    gains = {(0, 0): 2.0, (0, 1): 1.0, (1, 1): -0.5}
    model = copies([(*head, gain) for head, gain in gains.items()])
    pairs, answers = [("red green blue", "red gold blue"), ("pink teal red", "pink grey red")], [("green", "gold")] * 2
    result = attribution_patching(
        model, word_tokenizer(), pairs, [answers[0], ("teal", "grey")], direction=direction, sites=["z"], verify=4
    )
    sign = 1 if direction == "denoise" else -1
    for row in result["rows"]:
        gain = gains.get((row["layer"], row["head"] or 0), 0.0)
        # The corrupted prompt has the wrong answer in the right one's place, so each head's share counts twice.
        assert row["score"] == pytest.approx(sign * 2 * gain, abs=1e-5)
        assert row["exact"] == pytest.approx(sign * 2 * gain, abs=1e-5)
        assert row["share"] == pytest.approx(gain / 2.5, abs=1e-5)
    assert (result["clean_logit_diff"], result["corrupted_logit_diff"]) == pytest.approx((2.5, -2.5), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_derivative_of_patching(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family, num_attention_heads=4).double()
    pair, answers = WORD_PAIRS[:1], WORD_ANSWERS[:1]
    sites = ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"]
    result = attribution_patching(model, tokenizer, pair, answers, sites=sites, verify=0, min_gap=-100)
    clean, corrupted = (tokenizer(text, return_tensors="pt").input_ids for text in pair[0])
    points = [HookPoint(site, 1) for site in sites]
    with torch.no_grad(), record(model, points) as given:
        model(clean)
    step = 2e-3  # RMSNorm rounds to 32 bits in a 64-bit model too
    for row in [row for row in result["rows"] if row["layer"] == 1]:
        values = []
        for part in (step, -step):
            with torch.no_grad(), edit(model, {HookPoint(row["site"], 1): mover(given, row, part)}):
                values.append(answer_gap(model(corrupted).logits[0, -1], tokenizer, answers[0]).item())
        assert row["score"] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=5e-4)


def mover(given: Any, row: Any, part: float) -> Any:
    """Moves one component a part of the way to the given value."""

    def move(value: Tensor) -> Tensor:
        change = part * (given[HookPoint(row["site"], row["layer"])] - value)
        if row["head"] is not None:
            change = change * torch.eye(value.shape[2])[row["head"]][:, None]
        moved: Tensor = value + change
        return moved

    return move


@pytest.mark.parametrize("limit", [0, 128], ids=["apart", "together"])
def test_scores_equal_those_of_prompts_run_one_by_one(
    limit: int, architecture: str, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_TOGETHER", limit)
    if architecture in ("mamba", "opt"):
        pytest.skip("it has no mlp_out")
    model = make_model(architecture)
    result = attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, verify=0, min_gap=-100)
    points = [HookPoint(site, layer) for site in ("z", "mlp_out") for layer in range(N_LAYERS)]
    expected = torch.zeros(len(result["rows"]))
    for pair, answers in zip(WORD_PAIRS, WORD_ANSWERS, strict=True):
        clean, corrupted = (tokenizer(text, return_tensors="pt").input_ids for text in pair)
        with record(model, points) as given:
            model(clean)
        with record(model, points) as own:
            gap = answer_gap(model(corrupted).logits[0, -1], tokenizer, answers)
        gradients = torch.autograd.grad(gap, [own[point] for point in points])
        parts = [
            ((given[point] - own[point]) * gradient).detach()[0].sum((0, -1)).flatten()
            for point, gradient in zip(points, gradients, strict=True)
        ]
        expected += torch.cat(parts) / len(WORD_PAIRS)
    torch.testing.assert_close(torch.tensor([row["score"] for row in result["rows"]]), expected, rtol=1e-3, atol=1e-5)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of matrix products with weights."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        is_product = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if is_product and output.dtype == torch.float32:  # the bootstrap is in float64
            self.operations += flop_registry[function.overloadpacket](*args, out_val=output)
        return output


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_more_products_than_two_forwards_and_one_backward(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family).requires_grad_(False)
    check_sites(model)
    with Products() as used:
        attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, verify=0, min_gap=-100)
    with Products() as needed:
        for side in (0, 1):
            ids = torch.cat([tokenizer(pair[side], return_tensors="pt").input_ids for pair in WORD_PAIRS])
            start = model.get_input_embeddings()(ids).requires_grad_(side == 1)
            logits = model(inputs_embeds=start, logits_to_keep=1).logits
        torch.autograd.grad(logits.sum(), start)
    assert 0 < used.operations <= needed.operations


def test_measured_effects_equal_patching_by_hand(demo: Any) -> None:
    model, tokenizer = demo
    result = attribution_patching(model, tokenizer, PAIRS[:2], ANSWERS[:2], by_position=True, sites=["z"], verify=8)
    checked = [row for row in result["rows"] if row["exact"] is not None]
    assert len(checked) == 8
    for row in sorted(checked, key=lambda row: -abs(row["exact"] or 0))[:3]:
        changes = []
        for pair, answers in zip(PAIRS[:2], ANSWERS[:2], strict=True):
            clean, corrupted = (tokenizer(text)["input_ids"] for text in pair)
            given = activations(model, clean)["z", row["layer"]]

            def patch(site: str, layer: int, value: Tensor, row: Any = row, given: Tensor = given) -> Tensor:
                if (site, layer) == ("z", row["layer"]):
                    value = value.clone()
                    value[int(row["position"]), row["head"]] = given[int(row["position"]), row["head"]]
                return value

            after, before = forward(model, corrupted, patch)[-1], forward(model, corrupted)[-1]
            changes.append(answer_gap(after - before, tokenizer, answers))
        assert row["exact"] == pytest.approx(float(torch.stack(changes).mean()), abs=1e-4)


def test_the_demo_model_is_estimated_well(demo: Any) -> None:
    pairs, answers = ioi_pairs(16)
    result = attribution_patching(*demo, pairs, answers, verify=20)
    check = result["check"]
    assert check is not None
    assert (check["n_top"], check["n_random"]) == (10, 10)
    assert (check["pearson"] or 0) > 0.9
    assert (check["spearman"] or 0) > 0.9
    largest = max(result["rows"], key=lambda row: abs(row["score"] or 0))
    assert (largest["site"], largest["layer"]) == ("mlp_out", 0)
    assert (largest["low"] or 0) < (largest["score"] or 0) < (largest["high"] or 0)


def test_positions_add_up_and_are_counted_from_the_end(demo: Any) -> None:
    pairs, answers = LONGER, ANSWERS
    by_position = attribution_patching(*demo, pairs, answers, by_position=True, sites=["mlp_out"], verify=6)
    labels = [column["label"] for column in by_position["columns"]]
    assert labels == [str(i - len(labels)) for i in range(len(labels))]
    assert {row["position"] for row in by_position["rows"]} == set(labels)
    differs = [column["label"] for column in by_position["columns"] if column["differs"]]
    assert differs  # the giver
    one_length = attribution_patching(*demo, PAIRS, ANSWERS, by_position=True, sites=["mlp_out"], verify=0)
    summed = attribution_patching(*demo, PAIRS, ANSWERS, sites=["mlp_out"], verify=0)
    for layer in range(4):
        parts = [row["score"] or 0 for row in one_length["rows"] if row["layer"] == layer]
        assert sum(parts) == pytest.approx(scores(summed, "mlp_out")[layer].item(), abs=1e-4)
    nowhere = next(row for row in one_length["rows"] if row["position"] == "0")  # both prompts begin alike
    assert nowhere["score"] == pytest.approx(0, abs=1e-6)


def test_batches_and_modes_of_the_caller_do_not_matter(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, answers = LONGER, ANSWERS
    whole = attribution_patching(*demo, pairs, answers, verify=4)
    monkeypatch.setattr(module, "MAX_TOKENS", 1)
    with torch.inference_mode():
        single = attribution_patching(*demo, pairs, answers, verify=4)
    for one, other in zip(whole["rows"], single["rows"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["exact"] == pytest.approx(other["exact"], abs=1e-4)


@uses_peft
def test_adapter_equals_the_merged_model(make_model: Any, tokenizer: Any) -> None:
    adapter = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model: Any = get_peft_model(make_model("llama"), adapter).eval()
    options: Any = {"min_gap": -100, "verify": 4}
    adapted = attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, **options)
    parts = direct_logit_attribution(model, tokenizer, ["the cat sat"], [("mat", "dog")])
    merged = model.merge_and_unload()
    plain = attribution_patching(merged, tokenizer, WORD_PAIRS, WORD_ANSWERS, **options)
    plain_parts = direct_logit_attribution(merged, tokenizer, ["the cat sat"], [("mat", "dog")])
    torch.testing.assert_close(scores(adapted, "z"), scores(plain, "z"), rtol=1e-3, atol=1e-5)
    for one, other in zip(parts["rows"], plain_parts["rows"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_weights_that_lie_on_disk(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    options: Any = {"min_gap": -100, "verify": 4}
    runs = []
    for _ in range(2):
        patched = attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, **options)
        direct = direct_logit_attribution(model, tokenizer, ["the cat sat"], [("mat", "dog")])
        edges = eap(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, steps=2, **options)
        runs.append([row["score"] for result in (patched, direct, edges) for row in result["rows"]])
        if model.device.type != "meta":
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_figures_show_the_results(demo: Any) -> None:
    patched = attribution_patching(*demo, PAIRS, ANSWERS, verify=6)
    maps = {len(trace.z[0]): trace for trace in plot_attribution_patching(patched).data if trace.type == "heatmap"}
    assert maps[4].z[1][2] == next(r["score"] for r in patched["rows"] if (r["layer"], r["head"]) == (1, 2))
    dots = plot_attribution_patching(patched).data[-1]
    assert set(zip(dots.x, dots.y, strict=True)) == {
        (row["score"], row["exact"]) for row in patched["rows"] if row["exact"] is not None
    }
    by_position = attribution_patching(*demo, PAIRS[:1], ANSWERS[:1], by_position=True, verify=0)
    figure = plot_attribution_patching(by_position)
    assert any("<b>" in text for text in figure.layout.xaxis.ticktext)  # the name that differs
    direct = direct_logit_attribution(*demo, [PAIRS[0][0]], ANSWERS[:1])
    bars = [trace for trace in plot_direct_logit_attribution(direct).data if trace.type == "bar"]
    assert sum(sum(bar.x) for bar in bars) == pytest.approx(direct["logit_diff"], abs=1e-3)
    edges = eap(*demo, PAIRS, ANSWERS, verify=4, top_k=10)
    assert list(plot_eap(edges).data[0].x) == [row["score"] for row in edges["rows"]]


def test_bfloat16(demo: Any, make_model: Any, tokenizer: Any) -> None:
    exact = attribution_patching(*demo, PAIRS, ANSWERS, verify=0)
    model = make_model("llama")
    wide = direct_logit_attribution(model, tokenizer, ["the cat sat"], [("mat", "dog")])
    narrow = direct_logit_attribution(model.bfloat16(), tokenizer, ["the cat sat"], [("mat", "dog")])
    assert narrow["dtype"] == "bfloat16"
    assert narrow["sum"] == pytest.approx(wide["sum"], abs=0.1)
    assert json.dumps(exact, allow_nan=False)
    assert exact.keys() >= Header.__annotations__.keys()


def test_model_is_left_as_it_was(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    before = [(p.requires_grad, p.clone()) for p in parameters]

    def check() -> None:
        assert [p.requires_grad for p in parameters] == [flag for flag, _ in before]
        assert all(torch.equal(p, old) and p.grad is None for p, (_, old) in zip(parameters, before, strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, min_gap=-100)
    check()
    for n in range(1, 5):  # an interrupt in the n-th pass: the donor's, the gradient's, those that verify
        calls = iter(range(100))

        def interrupt(*_: Any, n: int = n, calls: Any = calls) -> None:
            if next(calls) == n:
                raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            attribution_patching(model, tokenizer, WORD_PAIRS, WORD_ANSWERS, min_gap=-100)
        handle.remove()
        check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "z"}, "sites is 'z'; expected a list"),
        ({"sites": []}, "expected a list of hook points"),
        ({"sites": ["pattern"]}, "a value per pair of positions"),
        ({"sites": ["hook_z"]}, "The site 'hook_z' is not known"),
        ({"direction": "both"}, "direction is 'both'"),
        ({"min_gap": 1000}, "No pair of 4 has a gap to be recovered: .*at least 1000 was asked for"),
        ({"verify": -1}, "verify is -1; expected 0 or more"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str, demo: Any) -> None:
    with pytest.raises(ValueError, match=message):
        attribution_patching(*demo, PAIRS, ANSWERS, **options)


def test_pairs_without_a_gap_are_named(demo: Any) -> None:
    result = attribution_patching(*demo, [*PAIRS, (PAIRS[0][1], PAIRS[0][1])], [*ANSWERS, ANSWERS[0]], verify=0)
    assert result["n"] == 4
    assert [pair["pair"] for pair in result["excluded"]] == [4]
    assert "at least 0.5 was asked for" in result["excluded"][0]["reason"]


def test_train_mode_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="is in train mode"):
        attribution_patching(make_model("gpt2").train(), tokenizer, WORD_PAIRS, WORD_ANSWERS)
    with pytest.raises(ValueError, match="is in train mode"):
        direct_logit_attribution(make_model("gpt2").train(), tokenizer, ["the cat"], [("mat", "dog")])


# ---------------------------------------------------------------------------------------------- direct attribution


def test_direct_parts_equal_transformerlens(demo: Any) -> None:
    prompts = [clean for clean, _ in PAIRS]
    by_layer = direct_logit_attribution(*demo, prompts, ANSWERS, grain="layer")["rows"]
    by_head = direct_logit_attribution(*demo, prompts, ANSWERS)["rows"]
    recorded = torch.tensor(RECORDED["direct_layers"]).mean(-1)  # token and position embedding, then attn and mlp
    expected = [recorded[:2].sum(), *recorded[2:]]
    for row, value in zip(by_layer, expected, strict=False):
        assert row["score"] == pytest.approx(float(value), abs=2e-5)
    heads = torch.tensor([row["score"] for row in by_head if row["part"] == "head"])
    torch.testing.assert_close(heads, torch.tensor(RECORDED["direct_heads"]).mean(-1)[:16], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("grain", ["head", "layer"])
def test_parts_add_up_in_every_family(grain: Any, architecture: str, make_model: Any, tokenizer: Any) -> None:
    if architecture in ("mamba", "mpt", "opt"):
        pytest.skip("its attention or MLP is not known")
    model = make_model(architecture)
    prompts = ["the cat sat on a", "a dog ran"]
    result = direct_logit_attribution(model, tokenizer, prompts, WORD_ANSWERS, grain=grain)
    assert (result["max_abs_error"] or 0) < 1e-4
    if architecture in ("llama", "gemma2", "gemma3_text", "olmo2", "qwen3"):  # their attention has no output bias
        left = [row["score"] for row in result["rows"] if row["part"] == "attn_bias"]
        assert left == pytest.approx([0] * len(left), abs=1e-4)
    expected = []
    for prompt, answers in zip(prompts, WORD_ANSWERS, strict=True):
        logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1].detach()
        expected.append(answer_gap(logits, tokenizer, answers).item())
    capped = result["logit_diff_capped"] if architecture == "gemma2" else result["logit_diff"]
    assert capped == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert result["sum"] == pytest.approx(result["logit_diff"], abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_parts_equal_the_sum_by_hand(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family, num_attention_heads=4).double().requires_grad_(False)
    found = direct_logit_attribution(model, tokenizer, [WORD_PAIRS[0][0]], WORD_ANSWERS[:1])["rows"]
    seen = activations(model, tokenizer(WORD_PAIRS[0][0])["input_ids"])
    final = seen["resid_post", 2][-1]
    centre = final.mean() if family == "gpt2" else 0.0
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    eps = norm.eps if family == "gpt2" else norm.variance_epsilon
    scale = ((final - centre).square().mean() + eps).sqrt()
    gap = answer_gap(model.lm_head.weight.T, tokenizer, WORD_ANSWERS[0])

    def read(part: Tensor) -> float:
        return float(((part - (part.mean() if family == "gpt2" else 0.0)) / scale * norm.weight) @ gap)

    for row in found:
        if row["part"] == "head":
            z = seen["z", row["layer"]][-1, row["head"]]
            at = slice(row["head"] * 4, row["head"] * 4 + 4)
            out = (
                model.transformer.h[row["layer"]].attn.c_proj.weight[at]
                if family == "gpt2"
                else model.model.layers[row["layer"]].self_attn.o_proj.weight[:, at].T
            )
            assert row["score"] == pytest.approx(read(z @ out), abs=1e-5)
        elif row["part"] == "mlp":
            assert row["score"] == pytest.approx(read(seen["mlp_out", row["layer"]][-1]), abs=1e-5)
        elif row["part"] == "embedding":
            assert row["score"] == pytest.approx(read(seen["resid_pre", 0][-1]), abs=1e-5)


@pytest.mark.parametrize("broken", ["centre", "gain"])
def test_a_wrong_norm_is_noticed(broken: str, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "centre":
        monkeypatch.setattr(FrozenNorm, "_centred", lambda norm, x: x + 0.1)
    else:
        monkeypatch.setattr(FrozenNorm, "pulled", lambda norm, direction: direction * norm.scale)
    with pytest.raises(UnsupportedModelError, match="add up to within"):
        direct_logit_attribution(*demo, [PAIRS[0][0]], ANSWERS[:1])


def test_frozen_norms() -> None:
    torch.manual_seed(0)
    for width in (6, 7):
        x = torch.randn(4, width)
        for norm in (nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)):
            with torch.no_grad():
                for parameter in norm.parameters():
                    parameter.copy_(torch.randn(width))
                found = frozen_norm(norm, x, norm(x))
            assert found.is_centred == isinstance(norm, nn.LayerNorm)
            halves = found.part(x.double() * 0.3) + found.part(x.double() * 0.7) + found.offset
            torch.testing.assert_close(halves.float(), norm(x).detach(), rtol=1e-4, atol=1e-5)
            direction = torch.randn(4, width).double()
            read = (found.part(x.double()) * direction).sum(-1)
            torch.testing.assert_close((found.pulled(direction) * x).sum(-1), read, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="Tanh differs by"):
        frozen_norm(nn.Tanh(), x, x.tanh())


@pytest.mark.parametrize(
    ("prompts", "answers", "options", "message"),
    [
        (["the cat"], [], {}, "answers is"),
        ("the cat", ["mat", "dog"], {}, "prompts is the string 'the cat'; expected a list"),
        (["the cat"], ["mat"], {}, "one \\(right answer, wrong answer\\) for each"),
        (["the cat"], [("mat", "dog")], {"grain": "neuron"}, "grain is 'neuron'"),
        (["the cat"], [("mat mat", "dog")], {}, "is 2 tokens"),
        ([""], [("mat", "dog")], {}, "has no tokens"),
    ],
)
def test_bad_input_is_refused(
    prompts: Any, answers: Any, options: Any, message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        direct_logit_attribution(make_model("gpt2"), tokenizer, prompts, answers, **options)


def test_a_full_name_stands_for_its_layer(demo: tuple[Any, Any]) -> None:
    named = attribution_patching(*demo, PAIRS, ANSWERS, verify=0, sites=["blocks.1.hook_mlp_out"])["rows"]
    every = attribution_patching(*demo, PAIRS, ANSWERS, verify=0, sites=["mlp_out"])["rows"]
    assert [row["score"] for row in named] == [row["score"] for row in every if row["layer"] == 1]
