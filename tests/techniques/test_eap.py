"""Oracles: scores recorded after the published definition, a compiled program, and partial runs by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from techniques import eap as module
from techniques._contrast import Contrast
from techniques._edges import Graph, graph_of, run_edges, sender_outputs, sender_points
from techniques._hooks import check_sites, record
from techniques._pairs import encode_pairs
from techniques._tokens import Batch
from tests.techniques.by_hand import activations, forward
from tests.techniques.compiled import EDGES, compiled
from tests.techniques.contrasts import ANSWERS, PAIRS, STEPS
from tests.techniques.handmade import copies, word_tokenizer

eap: Any = module.eap  # of any type, so that it can be called with *demo
RECORDED = np.load(Path(__file__).parent / "oracles" / "attribution.npz")
COMPILED_PAIRS = [("BOS a b c", "BOS b b c"), ("BOS c d a d", "BOS c a a d")]
COMPILED_ANSWERS = [("b", "d"), ("c", "b")]
CLEAN, CORRUPTED = "the cat sat on a", "the dog ran on the"
FAMILIES = ["gpt2", "gpt_neox", "gptj", "llama", "gemma2", "olmo2", "qwen3", "falcon", "mixtral"]


def built(family: str, make_model: Any) -> Any:
    """Four heads, in pairs that share keys and values where the family has that."""
    shared = {} if family in ("gpt2", "gpt_neox", "gptj", "falcon") else {"num_key_value_heads": 2}
    return make_model(family, num_attention_heads=4, **shared).requires_grad_(False)


def batch_of(tokenizer: Any, text: str) -> Batch:
    ids = tokenizer(text, return_tensors="pt").input_ids
    return Batch(ids, torch.ones_like(ids))


def corrupted_outputs(model: Any, graph: Graph, batch: Batch) -> Tensor:
    with torch.no_grad(), record(model, sender_points(graph.decoder)) as seen:
        model(batch.input_ids)
    return sender_outputs(graph.decoder, seen)


def last_logits(model: Any) -> Any:
    return lambda batch: model(batch.input_ids).logits[0, -1]


@pytest.mark.parametrize(("method", "recorded"), [("eap", "eap"), ("eap-ig", "eap_ig")])
def test_scores_equal_the_published_definition(method: Any, recorded: str, demo: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    result = eap(*demo, PAIRS, ANSWERS, method=method, steps=STEPS, verify=0, save=file, top_k=1000)
    ours = load_file(file)["scores"]
    is_edge = graph_of(check_sites(demo[0])).possible
    torch.testing.assert_close(ours, torch.tensor(RECORDED[recorded]) * is_edge, rtol=1e-4, atol=2e-5)
    assert result["n_edges"] == len(result["rows"]) == 479
    for row in result["rows"][::50]:
        at = result["senders"].index(row["sender"]), result["receivers"].index(row["receiver"])
        assert row["score"] == pytest.approx(ours[at].item(), abs=1e-5)
    sizes = [abs(row["score"] or 0) for row in result["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert result["scores"] is not None
    assert result["scores"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_a_compiled_program_has_the_edges_that_it_was_compiled_to(method: Any) -> None:
    model, tokenizer, recorded = compiled()
    for prompt, output in zip(recorded["prompts"].tolist(), recorded["outputs"].tolist(), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        told = str(tokenizer.decode(model(ids).logits[0].argmax(-1))).split()
        assert told[3:] == output.split()[3:]  # before that no token is two places back
    result = eap(model, tokenizer, COMPILED_PAIRS, COMPILED_ANSWERS, method=method, top_k=23, verify=23)
    rows = {row["edge"]: row for row in result["rows"]}
    assert len(rows) == result["n_edges"] == 23
    for edge, row in rows.items():
        assert row["exact"] == pytest.approx(2.0 if edge in EDGES else 0.0, abs=1e-5)
    assert {edge for edge, row in rows.items() if abs(row["score"] or 0) > 1e-5} == set(EDGES)


def test_a_linear_model_is_estimated_exactly() -> None:
    model = copies([(0, 0, 2.0), (0, 1, 1.0), (1, 1, -0.5)])
    result = eap(model, word_tokenizer(), [("red green blue", "red gold blue")], [("green", "gold")], verify=40)
    gains = {"a0.h0": 2.0, "a0.h1": 1.0, "a1.h1": -0.5}
    expected = {f"{head}->logits": 2 * gain for head, gain in gains.items()}
    expected |= {f"input->{head}<v>": 2 * gain for head, gain in gains.items()}
    for row in result["rows"]:
        assert row["score"] == pytest.approx(expected.get(row["edge"], 0.0), abs=1e-4)
        assert row["exact"] in (None, pytest.approx(expected.get(row["edge"], 0.0), abs=1e-4))


def test_the_demo_model_is_estimated_well(demo: Any) -> None:
    checks = {m: eap(*demo, PAIRS, ANSWERS, method=m, verify=40, top_k=30) for m in ("eap", "eap-ig")}
    found = {method: result["check"] for method, result in checks.items()}
    assert all((check["pearson"] or 0) > 0.9 for check in found.values() if check)
    errors = {
        method: sum(abs((row["score"] or 0) - row["exact"]) for row in result["rows"] if row["exact"] is not None)
        for method, result in checks.items()
    }
    assert errors["eap-ig"] < errors["eap"]  # what integrated gradients are for
    assert checks["eap-ig"]["steps"] == 5
    assert checks["eap"]["steps"] == 1
    assert len(checks["eap"]["rows"]) > 30  # edges that were only measured come after the largest


# ---------------------------------------------------------------------------------------------- runs of edges


def by_hand(model: Any, graph: Graph, clean: list[int], corrupted: list[int], kept: Tensor) -> Tensor:
    """Last logits, from one pass by hand for every receiver: what it reads is put into the stream before it alone."""
    given = outputs_by_hand(model, graph, activations(model, corrupted))
    done: dict[tuple[str, int], Tensor] = {}

    def changes(extra: dict[tuple[str, int], Tensor]) -> Any:
        return lambda site, layer, value: {**done, **extra}.get((site, layer), value)

    def mixture(receiver: int, site: str, layer: int) -> Tensor:
        seen = activations(model, clean, changes({}))
        now = outputs_by_hand(model, graph, seen)
        gone = graph.possible[:, receiver] & ~kept[:, receiver]
        return seen[site, layer] + (given - now)[gone].sum(0)

    for i, receiver in enumerate(graph.receivers[:-1]):
        layer, slot = receiver.node.layer, receiver.slot
        site, made = ("resid_pre", slot) if slot else ("resid_mid", "mlp_out")
        reading = {(site, layer): mixture(i, site, layer)}
        so_far = done.pop((made, layer), None)
        value = activations(model, clean, changes(reading))[made, layer]
        if so_far is not None:
            so_far[:, receiver.node.head] = value[:, receiver.node.head]
        done[made, layer] = value.clone() if so_far is None else so_far
    last = ("resid_post", graph.decoder.n_layers - 1)
    return forward(model, clean, changes({last: mixture(len(graph.receivers) - 1, *last)}))[-1]


def outputs_by_hand(model: Any, graph: Graph, seen: dict[tuple[str, int], Tensor]) -> Tensor:
    """[senders, pos, d_model] from values and weights; the embedding is resid_pre of layer 0."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    parts = [seen["resid_pre", 0]]
    for layer in range(graph.decoder.n_layers):
        z = seen["z", layer]
        if model.config.model_type == "gpt2":
            out = weights[f"transformer.h.{layer}.attn.c_proj.weight"]
        else:
            out = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        parts += [z[:, head] @ out.unflatten(0, (z.shape[1], -1))[head] for head in range(z.shape[1])]
        parts.append(seen["mlp_out", layer])
    return torch.stack(parts)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_random_edges_equal_a_run_by_hand(family: str, share: float, make_model: Any, tokenizer: Any) -> None:
    model = built(family, make_model)
    graph = graph_of(check_sites(model))
    kept = (torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(1)) < share) & graph.possible
    clean, corrupted = batch_of(tokenizer, CLEAN), batch_of(tokenizer, CORRUPTED)
    found = run_edges(model, graph, clean, corrupted_outputs(model, graph, corrupted), kept, last_logits(model))
    ids = clean.input_ids[0].tolist(), corrupted.input_ids[0].tolist()
    expected = by_hand(model, graph, *ids, kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (forward(model, ids[0])[-1] - expected).abs().max() > 1e-2, (
        "the edges do not matter, so the test says nothing"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_or_no_edges_are_the_clean_or_the_corrupted_run(family: str, make_model: Any, tokenizer: Any) -> None:
    model = built(family, make_model)
    graph = graph_of(check_sites(model))
    clean, corrupted = batch_of(tokenizer, CLEAN), batch_of(tokenizer, CORRUPTED)
    given = corrupted_outputs(model, graph, corrupted)
    everything = run_edges(model, graph, clean, given, graph.possible, last_logits(model))
    nothing = run_edges(model, graph, clean, given, torch.zeros_like(graph.possible), last_logits(model))
    torch.testing.assert_close(everything, model(clean.input_ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nothing, model(corrupted.input_ids).logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES[:-1])  # Mixtral's experts do not run in 64 bits
def test_scores_are_the_derivative_of_running_edges(
    family: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = built(family, make_model).double()
    graph = graph_of(check_sites(model))
    file = tmp_path / "scores.safetensors"
    eap(model, tokenizer, [(CLEAN, CORRUPTED)], [("mat", "dog")], method="eap", verify=0, min_gap=-100, save=file)
    scores = load_file(file)["scores"]
    clean, corrupted = batch_of(tokenizer, CLEAN), batch_of(tokenizer, CORRUPTED)
    ends = [corrupted_outputs(model, graph, batch) for batch in (clean, corrupted)]
    right, wrong = (tokenizer(text)["input_ids"][0] for text in ("mat", "dog"))
    step = 2e-3
    drawn = graph.possible.nonzero()[
        torch.randperm(int(graph.possible.sum()), generator=torch.Generator().manual_seed(0))
    ]
    for edge in drawn[:12].tolist():
        kept = graph.possible.clone()
        kept[tuple(edge)] = False
        values = []
        for part in (step, -step):
            logits = run_edges(model, graph, clean, ends[0] + part * (ends[1] - ends[0]), kept, last_logits(model))
            values.append((logits[right] - logits[wrong]).item())
        fall = (values[1] - values[0]) / (2 * step)
        assert scores[tuple(edge)].item() == pytest.approx(fall, rel=5e-3, abs=1e-3), graph.edge_name(*edge)


def test_heads_that_share_keys_are_named_so(make_model: Any) -> None:
    graph = graph_of(check_sites(built("llama", make_model)))
    names = [str(receiver) for receiver in graph.receivers[:9]]
    assert names[:4] == [f"a0.h{head}<q>" for head in range(4)]
    assert names[4:] == ["a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>", "m0"]
    assert graph.edge_index(["a0.h3->a1.kv1<k>"]) == [(4, 14)]
    for wrong in ("a0.h3->a1.h1<k>", "a1.h0->a1.h0<q>", "m0", "m2->m0"):
        with pytest.raises(ValueError, match="There is no edge"):
            graph.edge_index([wrong])


# ---------------------------------------------------------------------------------------------- guards


def test_batches_do_not_matter(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = [PAIRS[0], *((f"<|endoftext|>{a}", f"<|endoftext|>{b}") for a, b in PAIRS[1:])]
    whole = eap(*demo, longer, ANSWERS, verify=4, top_k=40)
    monkeypatch.setattr(module, "max_tokens", lambda graph: 1)
    with torch.inference_mode():
        single = eap(*demo, longer, ANSWERS, verify=4, top_k=40)
    for one, other in zip(whole["rows"], single["rows"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["exact"] == pytest.approx(other["exact"], abs=1e-4)


def test_model_is_left_as_it_was(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    before = [p.clone() for p in model.parameters()]
    for n in (None, 1, 2, 4):
        calls = iter(range(100))

        def interrupt(*_: Any, n: Any = n, calls: Any = calls) -> None:
            if next(calls) == n:
                raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_hook(interrupt)
        if n is None:
            eap(model, tokenizer, [(CLEAN, CORRUPTED)], [("mat", "dog")], steps=2, verify=2, min_gap=-100)
        else:
            with pytest.raises(KeyboardInterrupt):
                eap(model, tokenizer, [(CLEAN, CORRUPTED)], [("mat", "dog")], steps=2, verify=2, min_gap=-100)
        handle.remove()
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ig"}, "method is 'ig'; expected one of eap, eap-ig"),
        ({"steps": 0}, "steps is 0 and top_k is 200 and verify is 16"),
        ({"top_k": 0}, "top_k is 0"),
        ({"verify": -1}, "verify is -1"),
        ({"min_gap": 1000}, "No pair of 4"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str, demo: Any) -> None:
    with pytest.raises(ValueError, match=message):
        eap(*demo, PAIRS, ANSWERS, **options)


def test_pairs_that_cannot_be_compared_are_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match="No pair has prompts of equal length"):
        eap(*demo, [("When Mary went", "When")], [(" Mary", " John")])


def test_a_contrast_reads_the_first_rows(demo: Any) -> None:
    model, tokenizer = demo
    contrast = Contrast(model, encode_pairs(model, tokenizer, PAIRS, ANSWERS))
    batch = contrast.batch(contrast.pairs.clean, [1, 3])
    twice = Batch(batch.input_ids.repeat(2, 1), batch.attention_mask.repeat(2, 1))
    with torch.no_grad():
        torch.testing.assert_close(contrast.logit_diffs(twice, [1, 3]), contrast.logit_diffs(batch, [1, 3]))


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_padding_beyond_a_sliding_window_takes_no_part(family: str, make_model: Any, tokenizer: Any) -> None:
    short, long = "the cat sat on", "the cat sat on the mat to the dog"
    pairs = [(short, short.replace("cat", "dog")), (long, long.replace("cat", "dog"))]
    answers = [("mat", "dog")] * 2
    together = eap(make_model(family), tokenizer, pairs, answers, verify=0, min_gap=0.0)
    assert together["rows"]
    assert all(row["score"] is not None for row in together["rows"])
