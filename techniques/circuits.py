"""Circuits: test whether a small part of the model does the task, and draw it.

Sources: Wang et al., "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small"
(2022), https://arxiv.org/abs/2211.00593 (faithfulness, completeness, minimality); Mueller et al., "MIB: a
mechanistic interpretability benchmark" (2025), https://arxiv.org/abs/2504.13151 (sizes, CPR, CMD)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._circuit_runs import (
    Faithfulness,
    Mode,
    Parts,
    edge_parts,
    node_parts,
    runner,
    scaled,
)
from techniques._circuit_tests import (
    CurvePoint,
    PartLoss,
    RandomCircuits,
    RandomNull,
    areas,
    completeness,
    curve_of,
    minimality,
    null_of,
)
from techniques._contrast import Contrast
from techniques._edges import graph_of
from techniques._hooks import check_sites
from techniques._nodes import layer_nodes, parse_node
from techniques._pairs import ExcludedPair, encode_pairs
from techniques._results import Header, few, header, number
from techniques._tokens import check_lists
from techniques.eap import EdgeAttribution

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class CircuitEvaluation(Header):
    """What `evaluate_circuit` returns.

    Attributes:
        level: "nodes" or "edges".
        mode: What everything outside the circuit is replaced by.
        circuit: The parts of the circuit.
        n_parts: How many parts the whole model has.
        full_logit_diff: m(N), of the whole model, in nats, mean over pairs.
        empty_logit_diff: m(0), with every part replaced.
        faithfulness: Of the circuit.
        null: Of random circuits of the circuit's size; None if none were asked for.
        complement: Faithfulness of the model without the circuit; near 0 if nothing else does the task.
        completeness: Mean over random halves K of the circuit of abs(f(circuit without K) - f(model without K)); 0 if
            the circuit reacts to damage as the model does. None if no random draws were asked for.
        minimality: What the circuit loses with each of its parts; of a large circuit with its last 32 only.
        curve: Faithfulness by size.
        cpr: Area under the curve over k, from its smallest size to 1; higher is better.
        cmd: Area between the curve and 1 over k; 0 is best.
        excluded: Pairs that were left out, with reasons.
    """

    level: Literal["nodes", "edges"]
    mode: str
    circuit: list[str]
    n_parts: int
    full_logit_diff: float | None
    empty_logit_diff: float | None
    faithfulness: Faithfulness
    null: RandomNull | None
    complement: float | None
    completeness: float | None
    minimality: list[PartLoss]
    curve: list[CurvePoint]
    cpr: float | None
    cmd: float | None
    excluded: list[ExcludedPair]


def evaluate_circuit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    circuit: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    *,
    size: int | None = None,
    ks: Sequence[float] = MIB_SIZES,
    mode: Mode = "resample",
    n_random: int = 20,
    min_gap: float = 0.5,
    seed: int = 0,
) -> CircuitEvaluation:
    """Test whether a circuit does the task: faithfulness at several sizes against random circuits of the same size.

    Answers how much of the logit difference is left when everything outside the circuit gets values that know nothing
    of the clean prompt, and whether any other part of that size would do. Use pairs that the circuit was not found on.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        circuit: Names of components (`a1.h0`, `m2`) or of edges (`a0.h1->a1.h0<k>`), the most important first.
        pairs: (clean prompt, corrupted prompt), of equal length in tokens; others are left out.
        answers: (right answer, wrong answer) after the clean prompt, a token each, with their leading space.
        size: How many of the first names are the circuit; all by default.
        ks: Sizes of the curve, as shares of all parts of the model: the first names of `circuit` are taken. Sizes that
            need more names than there are are left out, except 1, which is the whole model.
        mode: What replaces the rest: "resample" takes the values of the corrupted prompt, "mean" their mean over all
            corrupted prompts and positions, "zero" nothing. Edges can be resampled only.
        n_random: Random circuits per size, and random halves for completeness; 0 draws none.
        min_gap: Pairs whose logit difference falls by less, in nats, from the whole model to the empty circuit are left
            out.
        seed: Of the random circuits and of the bootstrap.

    Returns:
        Faithfulness, its null, completeness, minimality and the curve.

    Raises:
        ValueError: A part does not exist or is named twice, an option is out of range, the pairs or answers can't be
            compared, or no pair has the gap.
        UnsupportedModelError: The model's attention can't be split into heads.
        MemoryError: A single pair does not fit in memory; a batch that does not is halved.

    Misleads: Faithfulness may exceed 1, where parts that work against the answer are left out: read cmd beside cpr. It
    depends on the corrupted prompts, which decide what counts as knowing nothing. In circuits of nodes the embedding
    always stays clean. A faithful circuit need not be the only one.

    Cost: a forward of all pairs for each circuit, of which there are about (sizes + 2) x (n_random + 1); for edges a
    forward over up to 3 n_heads + 2 copies of the pairs. About 1 s on the demo model for nodes.

    Example:
        prompt = "When Mary and John went to the store, {} gave a drink to"
        pairs = [(prompt.format("John"), prompt.format("Tom")), (prompt.format("Mary"), prompt.format("Tom"))]
        answers = [(" Mary", " John"), (" John", " Mary")]
        circuit = ["m0", "a1.h1", "m3", "a2.h2", "a3.h1", "a3.h0", "m2", "a3.h2", "a2.h1", "a2.h0"]
        evaluate_circuit(model, tokenizer, circuit, pairs, answers)
    """
    check_lists(circuit=circuit)
    if n_random < 0:
        raise ValueError(f"n_random is {n_random}; expected 0 or more.")
    parts = _parts(model, circuit)
    names = list(circuit)[: _size(circuit, size)]
    contrast = Contrast(model, encode_pairs(model, tokenizer, pairs, answers))
    runs, scale = scaled(runner(contrast, parts, mode), min_gap, seed)
    random = RandomCircuits(len(parts.names), seed)
    chosen, everything = parts.mask(names), range(len(scale.full))
    curve = curve_of(runs, scale, list(circuit), ks, n_random, random)
    shares, values = [point["k"] for point in curve], [point["faithfulness"]["value"] or 0.0 for point in curve]
    cpr, cmd = areas(shares, values) if len(curve) > 1 and shares[-1] == 1 else (None, None)
    return CircuitEvaluation(
        **header(model, "evaluate_circuit", n=len(scale.full), seed=seed, warnings=few(len(scale.full), "pair")),
        level="nodes" if parts.nodes else "edges",
        mode=mode,
        circuit=names,
        n_parts=len(parts.names),
        full_logit_diff=number(scale.full.mean()),
        empty_logit_diff=number(scale.empty.mean()),
        faithfulness=scale.faithfulness(runs.values(chosen[None], everything)[0]),
        null=null_of(runs, scale, chosen, n_random, random),
        complement=number(scale.shares(runs.values(~chosen[None], everything))[0]),
        completeness=completeness(runs, scale, chosen, n_random, random),
        minimality=minimality(runs, scale, names),
        curve=curve,
        cpr=number(cpr) if cpr is not None else None,
        cmd=number(cmd) if cmd is not None else None,
        excluded=runs.contrast.pairs.excluded,
    )


def _parts(model: PreTrainedModel, circuit: Sequence[str]) -> Parts:
    """All edges if the circuit names an edge, else all components.

    Raises:
        ValueError: The circuit is empty, or names a part twice or one that does not exist.
    """
    if isinstance(circuit, str) or not circuit:
        raise ValueError(f"circuit is {circuit!r}; expected a list of names, as ['a1.h0', 'm2'].")
    if len(set(circuit)) < len(circuit):
        twice = next(name for i, name in enumerate(circuit) if name in circuit[:i])
        raise ValueError(f"The circuit names {twice!r} twice; expected each part once.")
    graph = graph_of(check_sites(model))
    if any("->" in name for name in circuit):
        graph.edge_index(circuit)
        return edge_parts(graph)
    parts = node_parts(graph, layer_nodes(graph.decoder))
    for name in circuit:
        if name not in parts.names:
            raise ValueError(f"There is no component {name!r}; expected some of {', '.join(parts.names)}.")
    return parts


def _size(circuit: Sequence[str], size: int | None) -> int:
    if size is None:
        return len(circuit)
    if not 1 <= size <= len(circuit):
        raise ValueError(f"size is {size}; expected 1 to {len(circuit)}, the number of names in the circuit.")
    return size


# ---------------------------------------------------------------------------------------------- drawing circuits


class GraphNode(TypedDict):
    """A component of a circuit graph; `layer` is None for the embedding and the output."""

    name: str
    kind: Literal["input", "head", "mlp", "logits"]
    layer: int | None


class GraphEdge(TypedDict):
    """An edge of a circuit graph.

    Attributes:
        edge: Its name, which evaluate_circuit takes.
        sender: Name of the node that it starts from.
        receiver: Name of the node that it ends in.
        slot: "q", "k" or "v" of a head; empty for others.
        weight: Its score, in nats.
    """

    edge: str
    sender: str
    receiver: str
    slot: str
    weight: float


class CircuitGraph(Header):
    """What `circuit_graph` returns; edges in the order in which they were chosen."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]


def circuit_graph(scores: EdgeAttribution, k: int = 30) -> CircuitGraph:
    """The circuit of k edges that grows from the output along the largest scores.

    Starting from the output, the edge with the largest absolute score into what is already there is added, again and
    again. So every edge lies on a path to the output, which the k largest edges by themselves need not.

    Args:
        scores: What `eap` returned; its `top_k` bounds what can be chosen.
        k: How many edges.

    Returns:
        Nodes from the embedding to the output, and edges.

    Raises:
        ValueError: k is not positive, or the scores are no result of `eap`.
    """
    if not isinstance(scores, Mapping) or scores.get("technique") != "eap":
        found = scores.get("technique") if isinstance(scores, Mapping) else scores
        raise ValueError(f"The scores are of {found!r}; expected the result of eap.")
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more edges.")
    heads = _query_heads(scores)
    rows = scores["rows"]
    readers = [heads.get(row["receiver"], [(row["receiver"], "")]) for row in rows]
    into: dict[str, list[tuple[float, int]]] = {}
    for i, row in enumerate(rows):
        for node, _ in readers[i]:
            into.setdefault(node, []).append((-abs(row["score"] or 0.0), i))
    names, chosen, frontier = ["logits"], list[int](), sorted(into.get("logits", []))
    while frontier and len(chosen) < k:
        i = heapq.heappop(frontier)[1]
        if i in chosen:  # shared keys and values lead to several heads
            continue
        chosen.append(i)
        if rows[i]["sender"] not in names:
            names.append(rows[i]["sender"])
            for entry in into.get(rows[i]["sender"], []):
                heapq.heappush(frontier, entry)
    edges = [
        GraphEdge(
            edge=rows[i]["edge"], sender=rows[i]["sender"], receiver=node, slot=slot, weight=rows[i]["score"] or 0.0
        )
        for i in chosen
        for node, slot in readers[i]
        if node in names
    ]
    order = {name: i for i, name in enumerate([*scores["senders"], "logits"])}
    nodes = [_graph_node(name) for name in sorted(names, key=lambda name: order[name])]
    return CircuitGraph(
        technique="circuit_graph",
        version=1,
        model=scores["model"],
        dtype=scores["dtype"],
        n=scores["n"],
        seed=scores["seed"],
        warnings=scores["warnings"],
        nodes=nodes,
        edges=edges,
    )


def _query_heads(scores: EdgeAttribution) -> dict[str, list[tuple[str, str]]]:
    """For each head's receiver, the heads that it serves and its slot; keys and values may serve several."""
    n_heads = sum(name.startswith("a0.") for name in scores["senders"])
    n_shared = sum(name.startswith("a0.kv") and name.endswith("<k>") for name in scores["receivers"])
    found = {}
    for name in scores["receivers"]:
        head, _, slot = name.rstrip(">").partition("<")
        layer, _, index = head.partition(".kv")
        per = n_heads // n_shared if index else 1
        of = [f"{layer}.h{int(index) * per + i}" for i in range(per)] if index else [head]
        found[name] = [(one, slot) for one in of]
    return found


def _graph_node(name: str) -> GraphNode:
    node = parse_node(name)
    assert node is not None  # names come from a result
    is_inner = node.kind in ("head", "mlp")
    return GraphNode(name=name, kind=node.kind, layer=node.layer if is_inner else None)
