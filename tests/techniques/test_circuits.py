"""Oracles: circuits set by hand, a compiled program, forward passes by hand, and held-out prompts of the demo model."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from techniques import _circuit_runs, circuits
from techniques import eap as eap_module
from techniques import iterative_pruning as pruning_module
from techniques._circuit_tests import RandomCircuits
from techniques.circuits import CircuitEvaluation, circuit_graph
from techniques.eap import EdgeAttribution
from techniques.plots import plot
from techniques.plots.circuits import plot_circuit_graph, plot_evaluate_circuit, plot_iterative_pruning
from tests.techniques.by_hand import activations, forward
from tests.techniques.compiled import EDGES, NODES, compiled
from tests.techniques.contrasts import ANSWERS, PAIRS, ioi_pairs
from tests.techniques.handmade import copies, word_tokenizer

# Of any type, so that they can be called with *demo.
evaluate_circuit: Any = circuits.evaluate_circuit
iterative_pruning: Any = pruning_module.iterative_pruning
eap: Any = eap_module.eap
COMPILED = [("BOS a b c", "BOS b b c"), ("BOS c d a d", "BOS c a a d")], [("b", "d"), ("c", "b")]
SHARES = [(0, 0, 4.0), (0, 1, 3.0), (1, 0, 2.0), (1, 1, 1.0)]  # heads that copy the answer, and how strongly
COPIED = (
    [("red green blue", "red gold blue"), ("pink teal red", "pink grey red")],
    [("green", "gold"), ("teal", "grey")],
)
EVERY = [f"{name}" for layer in range(4) for name in (*(f"a{layer}.h{head}" for head in range(4)), f"m{layer}")]


def evaluated(circuit: list[str], **options: Any) -> CircuitEvaluation:
    arguments = {"n_random": 0, **options}
    result: CircuitEvaluation = evaluate_circuit(copies(SHARES), word_tokenizer(), circuit, *COPIED, **arguments)
    return result


# ---------------------------------------------------------------------------------------------- evaluation


def test_faithfulness_of_a_linear_model_is_the_sum_of_its_shares() -> None:
    result = evaluated(
        ["a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"], size=2, ks=[1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1]
    )
    assert result["faithfulness"]["value"] == pytest.approx(0.7, abs=1e-5)
    assert result["complement"] == pytest.approx(0.3, abs=1e-5)
    values = [point["faithfulness"]["value"] for point in result["curve"]]
    assert values == pytest.approx([0.4, 0.7, 0.7, 0.9, 1.0, 1.0], abs=1e-5)
    assert [point["n_parts"] for point in result["curve"]] == [1, 2, 3, 4, 5, 6]
    # Trapezoids of a sixth each.
    assert result["cpr"] == pytest.approx((0.2 + 0.7 + 0.7 + 0.9 + 1.0 + 0.5) / 6, abs=1e-5)
    assert result["cmd"] == pytest.approx(5 / 6 - (result["cpr"] or 0), abs=1e-5)
    losses = {row["part"]: row["loss"] for row in result["minimality"]}
    assert losses == pytest.approx({"a0.h0": 0.4, "a0.h1": 0.3}, abs=1e-5)
    assert (result["full_logit_diff"], result["empty_logit_diff"]) == pytest.approx((10, -10), abs=1e-4)
    assert (result["n_parts"], result["level"], result["null"], result["completeness"]) == (6, "nodes", None, None)


def test_a_part_that_works_against_the_answer_lifts_a_circuit_above_the_whole() -> None:
    model = copies([(0, 0, 2.0), (1, 0, -1.0)])
    result = evaluate_circuit(model, word_tokenizer(), ["a0.h0", "a1.h0"], *COPIED, n_random=0, ks=[1 / 6, 1])
    assert [point["faithfulness"]["value"] for point in result["curve"]] == pytest.approx([2, 1], abs=1e-5)
    assert result["cpr"] == pytest.approx(5 / 6 * 1.5, abs=1e-5)
    assert result["cmd"] == pytest.approx(5 / 6 * 0.5, abs=1e-5)
    assert result["minimality"][1]["loss"] == pytest.approx(-1, abs=1e-5)


def test_random_circuits_of_a_linear_model() -> None:
    best = evaluated(["a0.h0", "a0.h1"], n_random=200)
    worst = evaluated(["m0", "m1"], n_random=200)
    for result in (best, worst):
        assert result["null"] is not None
        assert result["null"]["n"] == 200
        assert result["null"]["mean"] == pytest.approx(1 / 3, abs=0.05)  # two of six parts hold a third on average
        assert result["completeness"] == pytest.approx(0.3 if result is best else 1.0, abs=1e-5)
    assert best["null"]
    assert worst["null"]
    assert 0.02 < (best["null"]["p"] or 1) < 0.2  # one pair of parts in fifteen is as good
    assert worst["null"]["p"] == 1
    again = evaluated(["a0.h0", "a0.h1"], n_random=200)
    assert again == best


@pytest.mark.parametrize("circuit", [EVERY[:5], EVERY[5:12]])
def test_circuits_that_do_the_same_are_tied(circuit: list[str], demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All random circuits are the tested one here, in batches of other sizes, which round otherwise."""
    parts = torch.tensor([name in circuit for name in EVERY])
    monkeypatch.setattr(RandomCircuits, "circuits", lambda random, size, count: parts.expand(count, -1))
    for tokens in (100, 128, 256):
        monkeypatch.setattr(_circuit_runs, "RUN_TOKENS", tokens)
        null = evaluate_circuit(*demo, circuit, PAIRS, ANSWERS, n_random=9, ks=[1])["null"]
        assert null["p"] == 1
        assert null["low"] == pytest.approx(null["high"], abs=1e-6)


@pytest.mark.parametrize("mode", ["resample", "mean", "zero"])
def test_circuits_equal_a_run_by_hand(mode: Any, demo: Any) -> None:
    model, tokenizer = demo
    circuit = ["a0.h0", "m0", "a1.h1", "a1.h2", "a2.h2", "m2", "a3.h1", "m3"]
    result = evaluate_circuit(
        model, tokenizer, circuit, PAIRS[:2], ANSWERS[:2], mode=mode, n_random=0, ks=[1], min_gap=-100
    )
    encoded = [[tokenizer(text)["input_ids"] for text in pair] for pair in PAIRS[:2]]
    corrupted = [activations(model, pair[1]) for pair in encoded]
    sites = [(site, layer) for site in ("z", "mlp_out") for layer in range(4)]
    means = {at: torch.cat([seen[at] for seen in corrupted]).mean(0) for at in sites}

    def run(pair: int, kept: list[str]) -> Tensor:
        def change(site: str, layer: int, value: Tensor) -> Tensor:
            if site not in ("z", "mlp_out"):
                return value
            other = {"resample": corrupted[pair][site, layer], "mean": means[site, layer], "zero": torch.zeros(1)}[mode]
            other = other.double().expand_as(value)
            if site == "mlp_out":
                return value if f"m{layer}" in kept else other
            is_kept = torch.tensor([f"a{layer}.h{head}" in kept for head in range(4)])
            return torch.where(is_kept[:, None], value, other)

        logits = forward(model, encoded[pair][0], change)[-1]
        right, wrong = (tokenizer(text)["input_ids"][0] for text in ANSWERS[pair])
        return logits[right] - logits[wrong]

    full, empty, own = (sum(run(i, kept) for i in range(2)) / 2 for kept in (EVERY, [], circuit))
    assert result["full_logit_diff"] == pytest.approx(float(full), abs=1e-4)
    assert result["empty_logit_diff"] == pytest.approx(float(empty), abs=1e-4)
    assert result["faithfulness"]["value"] == pytest.approx(float((own - empty) / (full - empty)), abs=1e-4)


def test_a_compiled_program_is_the_circuit_that_it_was_compiled_to() -> None:
    model, tokenizer, _ = compiled()
    edges = evaluate_circuit(model, tokenizer, list(EDGES), *COMPILED, n_random=5, ks=[1])
    assert edges["faithfulness"]["value"] == pytest.approx(1, abs=1e-5)
    assert edges["complement"] == pytest.approx(0, abs=1e-5)
    assert [row["loss"] for row in edges["minimality"]] == pytest.approx([1, 1, 1, 1], abs=1e-5)
    for order in ("attribution", "greedy"):
        found = iterative_pruning(model, tokenizer, *COMPILED, order=order)
        assert set(found["circuit"]) == NODES
        assert found["ranking"][-1] == "m0"
        assert found["steps"][-1]["held_out"] == pytest.approx(0, abs=1e-5)  # each of the others is indispensable
    graph = circuit_graph(eap(model, tokenizer, *COMPILED, verify=0), k=4)
    assert {edge["edge"] for edge in graph["edges"]} == set(EDGES)
    assert [node["name"] for node in graph["nodes"]] == ["input", "a0.h0", "a1.h0", "m1", "logits"]


# ---------------------------------------------------------------------------------------------- the demo model


def test_pruned_circuit_holds_on_names_that_never_met(demo: Any) -> None:
    pairs, answers = ioi_pairs(12, seed=1, template=None)
    found = iterative_pruning(*demo, pairs, answers, threshold=0.85)
    assert len(found["circuit"]) <= 15
    assert 0.85 <= (found["faithfulness"]["value"] or 0) <= 1.15
    assert (found["n_train"], found["n_held_out"], found["n"]) == (6, 6, 12)
    assert all(step["train"] != step["held_out"] for step in found["steps"])
    held_out = ioi_pairs(8, seed=2, unseen=True, template=None)
    result = evaluate_circuit(
        *demo, found["ranking"], *held_out, size=len(found["circuit"]), n_random=19, ks=[0.25, 0.5, 1]
    )
    assert (result["faithfulness"]["value"] or 0) > 0.75
    assert result["null"] is not None
    assert (result["null"]["mean"] or 0) < 0.5 < (result["faithfulness"]["value"] or 0)
    assert result["null"]["p"] == pytest.approx(0.05)
    assert abs(result["complement"] or 0) < 0.2
    assert (result["cpr"] or 0) + (result["cmd"] or 0) == pytest.approx(0.75, abs=0.05)  # no size exceeds 1 by much
    assert json.dumps(result, allow_nan=False)


def test_greedy_pruning_ends_where_it_says(demo: Any) -> None:
    found = iterative_pruning(*demo, PAIRS, ANSWERS, components="heads", order="greedy", threshold=0.8)
    gone = [step["removed"] for step in found["steps"]]
    assert all(name.startswith("a") for name in gone)
    assert found["ranking"][-1] == gone[0]
    assert sorted(found["ranking"]) == sorted(name for name in EVERY if name[0] == "a")
    *inside, last = [step["held_out"] or 0 for step in found["steps"]]
    assert all(0.8 <= value <= 1.2 for value in inside)
    assert not 0.8 <= last <= 1.2
    assert gone[-1] in found["circuit"]
    assert len(found["circuit"]) == 16 - len(gone) + 1
    cut = iterative_pruning(*demo, PAIRS, ANSWERS, components="heads", order="greedy", threshold=0.8, max_runs=40)
    assert cut["n_runs"] <= 40
    assert "Stopped after" in cut["warnings"][0]
    assert cut["steps"] == found["steps"][: len(cut["steps"])]


def test_edges_found_by_gradients_beat_random_ones(demo: Any) -> None:
    scores = eap(*demo, PAIRS, ANSWERS, verify=0, top_k=96)
    held_out = ioi_pairs(4, seed=2, unseen=True)
    ranking = [row["edge"] for row in scores["rows"]]
    result = evaluate_circuit(*demo, ranking, *held_out, size=48, ks=[0.05, 0.1], n_random=3)
    assert (result["level"], result["n_parts"]) == ("edges", 479)
    assert (result["faithfulness"]["value"] or 0) > 0.6
    assert result["null"] is not None
    assert (result["null"]["high"] or 0) < 0.2
    assert len(result["minimality"]) == 32
    assert (result["cpr"], result["cmd"]) == (None, None)  # the curve does not reach the whole model


# ---------------------------------------------------------------------------------------------- graphs


def scores_of(edges: dict[str, float], senders: list[str], receivers: list[str]) -> EdgeAttribution:
    rows: Any = [
        {"edge": edge, "sender": edge.split("->")[0], "receiver": edge.split("->")[1], "score": score}
        for edge, score in edges.items()
    ]
    about: Any = {"technique": "eap", "version": 1, "model": "m", "dtype": "float32", "n": 2, "seed": 0, "warnings": []}
    return cast(EdgeAttribution, {**about, "senders": senders, "receivers": receivers, "rows": rows})


def test_a_graph_grows_from_the_output() -> None:
    senders = ["input", "a0.h0", "a0.h1", "m0"]
    slots = [f"a0.h{head}<{slot}>" for slot in "qkv" for head in range(2)]
    edges = {"input->a0.h0<v>": 9.0, "input->m0": -5.0, "m0->logits": 2.0, "a0.h1->logits": -1.0, "a0.h1->m0": 0.5}
    graph = circuit_graph(scores_of(edges, senders, [*slots, "m0", "logits"]), k=4)
    # The largest edge leads into a head that nothing listens to.
    assert [edge["edge"] for edge in graph["edges"]] == ["m0->logits", "input->m0", "a0.h1->logits", "a0.h1->m0"]
    assert [node["name"] for node in graph["nodes"]] == ["input", "a0.h1", "m0", "logits"]
    assert graph["edges"][1]["weight"] == -5.0
    assert [node["layer"] for node in graph["nodes"]] == [None, 0, 0, None]
    assert len(circuit_graph(scores_of(edges, senders, [*slots, "m0", "logits"]), k=1)["edges"]) == 1
    with pytest.raises(ValueError, match="k is 0; expected 1 or more edges"):
        circuit_graph(scores_of(edges, senders, slots), k=0)
    assert (graph["technique"], graph["model"], graph["n"], graph["seed"]) == ("circuit_graph", "m", 2, 0)
    assert plot(graph).data
    with pytest.raises(ValueError, match="The scores are of 'circuit_graph'; expected the result of eap"):
        circuit_graph(cast(Any, graph))


def test_shared_keys_lead_to_every_head_that_reads_them() -> None:
    senders = ["input", *(f"a0.h{head}" for head in range(4)), "m0", *(f"a1.h{head}" for head in range(4)), "m1"]
    receivers = [f"a{layer}.kv{i}<{slot}>" for layer in range(2) for slot in "kv" for i in range(2)]
    edges = {"a1.h2->logits": 3.0, "a1.h3->logits": 2.0, "m0->a1.kv1<k>": 1.0}
    graph = circuit_graph(scores_of(edges, senders, receivers), k=4)
    shared = [(edge["sender"], edge["receiver"], edge["slot"]) for edge in graph["edges"] if edge["slot"]]
    assert sorted(shared) == [("m0", "a1.h2", "k"), ("m0", "a1.h3", "k")]


def test_figures_show_the_results() -> None:
    model, tokenizer, _ = compiled()
    graph = circuit_graph(eap(model, tokenizer, *COMPILED, verify=0), k=4)
    figure = plot_circuit_graph(graph)
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert {trace.text.split(":")[0] for trace in drawn} == {
        "input to a0.h0 as v",
        "a0.h0 to a1.h0 as v",
        "a1.h0 to m1",
        "m1 to logits",
    }
    assert all(trace.line.width == 8 and "2.000 nats" in trace.text for trace in drawn)  # all edges weigh the same
    names = [trace.hovertext for trace in figure.data if trace.mode == "markers+text"]
    assert names == [node["name"] for node in graph["nodes"]]
    result = evaluated(["a0.h0", "a0.h1", "m0"], n_random=4, ks=[1 / 6, 1 / 3, 0.5, 1])
    curve = next(t for t in plot_evaluate_circuit(result).data if t.name == "largest parts first")
    assert list(curve.y) == [point["faithfulness"]["value"] for point in result["curve"]]
    pruned = iterative_pruning(model, tokenizer, *COMPILED)
    lines = {trace.name: list(trace.y) for trace in plot_iterative_pruning(pruned).data}
    assert lines["held-out pairs"] == [step["held_out"] for step in pruned["steps"]]


# ---------------------------------------------------------------------------------------------- guards


def test_batches_do_not_matter(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = [PAIRS[0], *((f"<|endoftext|>{a}", f"<|endoftext|>{b}") for a, b in PAIRS[1:])]
    circuit = ["m0", "a1.h1", "m3", "a2.h2"]
    whole = [
        evaluate_circuit(*demo, circuit, longer, ANSWERS, mode=mode, n_random=2, ks=[0.2, 1], min_gap=-100)
        for mode in ("resample", "mean")
    ]
    pruned = iterative_pruning(*demo, longer, ANSWERS)
    monkeypatch.setattr(_circuit_runs, "MAX_TOKENS", 1)
    with torch.inference_mode():
        for one in whole:
            mode: Any = one["mode"]
            other = evaluate_circuit(*demo, circuit, longer, ANSWERS, mode=mode, n_random=2, ks=[0.2, 1], min_gap=-100)
            assert one["faithfulness"]["value"] == pytest.approx(other["faithfulness"]["value"], abs=1e-4)
        assert iterative_pruning(*demo, longer, ANSWERS)["circuit"] == pruned["circuit"]


@pytest.mark.parametrize("technique", ["evaluate", "prune"])
def test_an_interrupt_leaves_nothing(technique: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    pairs, answers = [("the cat sat on a", "the dog ran on a")] * 2, [("mat", "dog")] * 2
    calls = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    run = partial(evaluate_circuit, circuit=["m0"]) if technique == "evaluate" else iterative_pruning
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, pairs=pairs, answers=answers, min_gap=-100)
    handle.remove()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("circuit", "options", "message"),
    [
        ([], {}, "circuit is \\[\\]; expected a list of names"),
        ("m0", {}, "circuit is the string 'm0'; expected a list"),
        (["m0", "m0"], {}, "names 'm0' twice"),
        (["m0", "a0.h9"], {}, "There is no component 'a0.h9'; expected some of a0.h0, a0.h1, m0"),
        (["m0->a0.h0<q>"], {}, "There is no edge 'm0->a0.h0<q>'"),
        (["m0", "m0->logits"], {}, "There is no edge 'm0'"),
        (["m0"], {"size": 2}, "size is 2; expected 1 to 1"),
        (["m0"], {"ks": [0.0]}, "ks is \\[0.0\\]; expected shares above 0"),
        (["m0"], {"mode": "noise"}, "mode is 'noise'; expected one of resample, mean, zero"),
        (["m0->logits"], {"mode": "zero"}, "mode is 'zero' for a circuit of edges"),
        (["m0"], {"min_gap": 1000}, "No pair of 2"),
        (["m0"], {"n_random": -1}, "n_random is -1; expected 0 or more"),
    ],
)
def test_bad_circuits_are_refused(circuit: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluated(circuit, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "best"}, "order is 'best'"),
        ({"components": "neurons"}, "components is 'neurons'"),
        ({"threshold": 1.5}, "threshold is 1.5 and held_out is 0.5"),
        ({"held_out": 0}, "held_out is 0"),
    ],
)
def test_bad_prunings_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iterative_pruning(copies(SHARES), word_tokenizer(), *COPIED, **options)


def test_one_pair_is_too_few_to_hold_out() -> None:
    with pytest.raises(ValueError, match="1 pair has the gap; expected 2 or more"):
        iterative_pruning(copies(SHARES), word_tokenizer(), COPIED[0][:1], COPIED[1][:1])
