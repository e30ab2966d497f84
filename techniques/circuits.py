"""Circuits: find a small part of the model that does the task, and test whether it does.

Sources: Wang et al., "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small" (2022),
https://arxiv.org/abs/2211.00593 (faithfulness, completeness, minimality); Conmy et al., "Towards automated circuit
discovery for mechanistic interpretability" (2023), https://arxiv.org/abs/2304.14997; Mueller et al., "MIB: a
mechanistic interpretability benchmark" (2025), https://arxiv.org/abs/2504.13151 (sizes, CPR, CMD)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._circuit_runs import Mode, Parts, Runner, edge_parts, node_effects, node_parts, runner
from techniques._contrast import Contrast
from techniques._edges import graph_of
from techniques._hooks import check_sites
from techniques._nodes import Components, layer_nodes, parse_node
from techniques._pairs import ExcludedPair, encode_pairs, recovered_interval
from techniques._results import Header, header, number
from techniques.eap import EdgeAttribution

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MAX_MINIMALITY = 32  # parts of a circuit whose need is measured: its least important ones


class Faithfulness(TypedDict):
    """(m(C) - m(0)) / (m(N) - m(0)): 1 if the circuit does what the model does, 0 if it does what nothing does.

    Attributes:
        value: Ratio of means over pairs.
        low: Lower end of the 95 % bootstrap interval over pairs.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


class RandomNull(TypedDict):
    """Faithfulness of random circuits of the same size.

    Attributes:
        n: How many were drawn.
        mean: Of their faithfulness.
        low: 2.5th percentile.
        high: 97.5th percentile.
        p: Share of circuits, the tested one included, that are as faithful or more.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


class CurvePoint(TypedDict):
    """Faithfulness of the first parts of a ranking.

    Attributes:
        k: Share of all parts.
        n_parts: Their number.
        faithfulness: Of the circuit of these parts.
        null: Of random circuits of this size; None for the whole model, or if none were asked for.
    """

    k: float
    n_parts: int
    faithfulness: Faithfulness
    null: RandomNull | None


class PartLoss(TypedDict):
    """What a circuit loses with one of its parts.

    Attributes:
        part: Its name.
        loss: Faithfulness of the circuit minus that without the part.
    """

    part: str
    loss: float | None


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
        completeness: Mean over random halves K of the circuit of abs(f(circuit without K) - f(model without K)); 0 if the
            circuit reacts to damage as the model does. None if no random draws were asked for.
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

    Misleads: Faithfulness may exceed 1, where parts that work against the answer are left out: read cmd beside cpr. It
    depends on the corrupted prompts, which decide what counts as knowing nothing. In circuits of nodes the embedding
    always stays clean. A faithful circuit need not be the only one.

    Cost: a forward of all pairs for each circuit: (sizes + 2) x (n_random + 1) or so, and a forward over up to 3 n_heads
    + 2 copies of the pairs for each circuit of edges; about 1 s on the demo model for nodes.

    Example:
        prompt = "When Mary and John went to the store, {} gave a drink to"
        pairs = [(prompt.format("John"), prompt.format("Tom")), (prompt.format("Mary"), prompt.format("Tom"))]
        answers = [(" Mary", " John"), (" John", " Mary")]
        circuit = ["m0", "a1.h1", "m3", "a2.h2", "a3.h1", "a3.h0", "m2", "a3.h2", "a2.h1", "a2.h0"]
        evaluate_circuit(model, tokenizer, circuit, pairs, answers)
    """
    parts = _parts(model, circuit)
    names = list(circuit)[: _size(circuit, size)]
    contrast = Contrast(model, encode_pairs(model, tokenizer, pairs, answers))
    runs, scale = _scaled(runner(contrast, parts, mode), min_gap, seed)
    random = _Random(len(parts.names), seed)
    chosen, everything = parts.mask(names), range(len(scale.full))
    curve = _curve(runs, scale, list(circuit), ks, n_random, random)
    shares, values = [point["k"] for point in curve], [point["faithfulness"]["value"] or 0.0 for point in curve]
    cpr, cmd = _areas(shares, values) if len(curve) > 1 and shares[-1] == 1 else (None, None)
    return CircuitEvaluation(
        **header(model, "evaluate_circuit", n=len(scale.full), seed=seed),
        level="nodes" if parts.nodes else "edges",
        mode=mode,
        circuit=names,
        n_parts=len(parts.names),
        full_logit_diff=number(scale.full.mean()),
        empty_logit_diff=number(scale.empty.mean()),
        faithfulness=scale.faithfulness(runs.values(chosen[None], everything)[0]),
        null=_null(runs, scale, chosen, n_random, random),
        complement=number(scale.shares(runs.values(~chosen[None], everything))[0]),
        completeness=_completeness(runs, scale, chosen, n_random, random),
        minimality=_minimality(runs, scale, names),
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


class _Random:
    """Random subsets, in the order in which they are asked for."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.generator = torch.Generator().manual_seed(seed)

    def circuits(self, size: int, count: int) -> Bool[Tensor, "count parts"]:
        order = torch.rand(count, self.n, generator=self.generator).argsort(-1)
        return order.argsort(-1) < size

    def half_of(self, circuit: Bool[Tensor, " parts"], count: int) -> Bool[Tensor, "count parts"]:
        place = torch.rand(count, self.n, generator=self.generator).masked_fill(~circuit, 2.0).argsort(-1).argsort(-1)
        return place < (int(circuit.sum()) + 1) // 2


@dataclass(frozen=True)
class _Scale:
    """What counts as everything and as nothing: logit differences of the whole and of the empty model."""

    full: Float[Tensor, " n"]
    empty: Float[Tensor, " n"]
    seed: int

    def of(self, pairs: Sequence[int]) -> _Scale:
        """The same for some of the pairs."""
        return _Scale(self.full[list(pairs)], self.empty[list(pairs)], self.seed)

    def shares(self, values: Float[Tensor, "circuits n"]) -> Float[Tensor, " circuits"]:
        """Faithfulness of each circuit."""
        return (values - self.empty).mean(-1) / (self.full - self.empty).mean()

    def faithfulness(self, values: Float[Tensor, " n"]) -> Faithfulness:
        """Of one circuit, with its interval."""
        ratio, low, high = recovered_interval(values - self.empty, self.full - self.empty, self.seed)
        return Faithfulness(value=number(ratio), low=number(low), high=number(high))


def _scaled(runs: Runner, min_gap: float, seed: int) -> tuple[Runner, _Scale]:
    """The runner on the pairs that tell the whole model from the empty circuit, and the two."""
    both = torch.tensor([[True], [False]]).expand(2, len(runs.parts.names))
    full, empty = runs.values(both, range(len(runs.contrast.pairs)))
    contrast, kept = runs.contrast.without_small_gaps(full, empty, min_gap)
    return replace(runs, contrast=contrast), _Scale(full[kept], empty[kept], seed)


def _curve(
    runs: Runner, scale: _Scale, ranking: list[str], ks: Sequence[float], n_random: int, random: _Random
) -> list[CurvePoint]:
    if any(not 0 < k <= 1 for k in ks):
        raise ValueError(f"ks is {list(ks)}; expected shares above 0 and up to 1.")
    n_parts = len(runs.parts.names)
    sizes = sorted({n_parts if k == 1 else max(1, round(k * n_parts)) for k in ks})
    points = []
    for size in sizes:
        if size > len(ranking) and size < n_parts:
            continue
        chosen = runs.parts.mask(ranking[:size] if size < n_parts else runs.parts.names)
        values = runs.values(chosen[None], range(len(scale.full)))[0]
        points.append(
            CurvePoint(
                k=size / n_parts,
                n_parts=size,
                faithfulness=scale.faithfulness(values),
                null=_null(runs, scale, chosen, n_random, random),
            )
        )
    return points


def _null(
    runs: Runner, scale: _Scale, circuit: Bool[Tensor, " parts"], n_random: int, random: _Random
) -> RandomNull | None:
    """Random circuits of a circuit's size; None if there is only one of that size."""
    if not n_random or circuit.all():
        return None
    drawn = torch.cat([circuit[None], random.circuits(int(circuit.sum()), n_random)])
    own, *others = scale.shares(runs.values(drawn, range(len(scale.full)))).double()
    null = torch.stack(others)
    low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return RandomNull(
        n=n_random,
        mean=number(null.mean()),
        low=number(low),
        high=number(high),
        p=number((1 + (null >= own).sum()) / (1 + n_random)),
    )


def _completeness(
    runs: Runner, scale: _Scale, circuit: Bool[Tensor, " parts"], n_random: int, random: _Random
) -> float | None:
    if not n_random:
        return None
    halves = random.half_of(circuit, n_random)
    damaged = scale.shares(runs.values(torch.cat([circuit & ~halves, ~halves]), range(len(scale.full))))
    return number((damaged[:n_random] - damaged[n_random:]).abs().mean())


def _minimality(runs: Runner, scale: _Scale, names: list[str]) -> list[PartLoss]:
    tested = names[-MAX_MINIMALITY:]
    circuits = torch.stack([runs.parts.mask(set(names) - {name}) for name in tested])
    whole = runs.parts.mask(names)[None]
    own, *without = scale.shares(runs.values(torch.cat([whole, circuits]), range(len(scale.full))))
    return [PartLoss(part=name, loss=number(own - rest)) for name, rest in zip(tested, without, strict=True)]


def _areas(shares: list[float], values: list[float]) -> tuple[float, float]:
    """CPR and CMD by the trapezoid rule."""
    x = torch.tensor(shares, dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    return float(torch.trapezoid(y, x)), float(torch.trapezoid((1 - y).abs(), x))


# ---------------------------------------------------------------------------------------------- finding circuits


class PruningStep(TypedDict):
    """One part less.

    Attributes:
        removed: Its name.
        n_kept: How many are left.
        train: Faithfulness on the pairs that parts are chosen by.
        held_out: Faithfulness on the others.
    """

    removed: str
    n_kept: int
    train: float | None
    held_out: float | None


class CircuitPruning(Header):
    """What `iterative_pruning` returns.

    Attributes:
        components: What could be removed.
        mode: What removed parts are replaced by.
        order: "attribution" or "greedy".
        threshold: As it was given.
        circuit: What is left, the most important first.
        ranking: All that could be removed, the most important first.
        faithfulness: Of the circuit, on held-out pairs.
        steps: What was removed, in that order; the last step may be one too far, and then is not part of the circuit.
        n_runs: How many circuits were run.
        n_train: Pairs that parts were chosen by.
        n_held_out: Pairs that decided when to stop.
        excluded: Pairs that were left out, with reasons.
    """

    components: str
    mode: str
    order: str
    threshold: float
    circuit: list[str]
    ranking: list[str]
    faithfulness: Faithfulness
    steps: list[PruningStep]
    n_runs: int
    n_train: int
    n_held_out: int
    excluded: list[ExcludedPair]


def iterative_pruning(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    *,
    components: Components = "heads+mlps",
    mode: Mode = "resample",
    order: Literal["attribution", "greedy"] = "attribution",
    threshold: float = 0.9,
    held_out: float = 0.5,
    max_runs: int = 2000,
    min_gap: float = 0.5,
    seed: int = 0,
) -> CircuitPruning:
    """Remove components one by one as long as the rest still does the task on held-out pairs.

    Answers how few heads and MLPs suffice. What is removed is chosen on one part of the pairs and the end is decided on
    the other, so that the circuit is no accident of the prompts that it was found on.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        pairs: (clean prompt, corrupted prompt), of equal length in tokens; others are left out.
        answers: (right answer, wrong answer) after the clean prompt, a token each, with their leading space.
        components: "heads", "mlps" or "heads+mlps": what may be removed; the rest always stays.
        mode: What replaces removed parts: "resample" takes the values of the corrupted prompt, "mean" their mean over all
            corrupted prompts and positions, "zero" nothing.
        order: "attribution" ranks the parts once by gradients and removes the smallest first; "greedy" tries each part in
            each round and removes the one without which faithfulness stays closest to 1.
        threshold: Faithfulness, on held-out pairs, must stay between this and 2 - this.
        held_out: Share of the pairs that decide when to stop.
        max_runs: Stop when so many circuits were run.
        min_gap: Pairs whose logit difference falls by less, in nats, from the whole model to the empty circuit are left
            out.
        seed: Of the split and of the bootstrap.

    Returns:
        The circuit and how it was reached. `ranking` can be given to evaluate_circuit.

    Raises:
        ValueError: An option is unknown or out of range, the pairs or answers can't be compared, or fewer than two pairs
            have the gap.
        UnsupportedModelError: The model's attention can't be split into heads.

    Misleads: Parts that stand in for each other look needless one by one, and removing many small ones can harm more
    than the sum of their effects. Held-out pairs of the same templates say nothing of other wordings. Since the held-out
    pairs chose the size, evaluate_circuit on yet other pairs gives the unbiased number.

    Cost: "attribution" runs 2 circuits per part, a forward of all pairs each, and 1 backward; "greedy" up to parts
    squared / 2; about 0.5 and 3 s on the demo model.

    Example:
        import random
        from interp_kernel.demo_model.corpus import ioi_example

        rng = random.Random(0)
        examples = [ioi_example(rng) for _ in range(16)]
        pairs = [(e.prompt, e.third_name) for e in examples]
        answers = [(e.receiver, e.giver) for e in examples]
        iterative_pruning(model, tokenizer, pairs, answers)
    """
    if order not in ("attribution", "greedy"):
        raise ValueError(f'order is {order!r}; expected "attribution" or "greedy".')
    if not 0 < threshold < 1 or not 0 < held_out < 1:
        raise ValueError(f"threshold is {threshold} and held_out is {held_out}; expected each between 0 and 1.")
    graph = graph_of(check_sites(model))
    parts = node_parts(graph, layer_nodes(graph.decoder, components))
    contrast = Contrast(model, encode_pairs(model, tokenizer, pairs, answers))
    runs, scale = _scaled(runner(contrast, parts, mode), min_gap, seed)
    task = _Pruning(runs, scale, *_split(len(scale.full), held_out, seed), threshold, max_runs)
    (task.by_attribution if order == "attribution" else task.greedily)()
    values = runs.values(runs.parts.mask(task.circuit)[None], task.held_out)[0]
    stopped = [f"Stopped after {task.n_runs} runs, before faithfulness left its bounds."] if task.is_cut else []
    return CircuitPruning(
        **header(model, "iterative_pruning", n=len(scale.full), seed=seed, warnings=stopped),
        components=components,
        mode=mode,
        order=order,
        threshold=threshold,
        circuit=task.circuit,
        ranking=task.ranking,
        faithfulness=scale.of(task.held_out).faithfulness(values),
        steps=task.steps,
        n_runs=task.n_runs,
        n_train=len(task.train),
        n_held_out=len(task.held_out),
        excluded=runs.contrast.pairs.excluded,
    )


def _split(n: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Pairs to choose by and pairs to stop by; one at least of each."""
    if n < 2:
        raise ValueError(f"{n} pair has the gap; expected 2 or more, one to choose by and one to stop by.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    n_held_out = min(n - 1, max(1, round(n * held_out)))
    return sorted(order[n_held_out:]), sorted(order[:n_held_out])


@dataclass
class _Pruning:
    """The parts that are left, and how it came to that."""

    runs: Runner
    scale: _Scale
    train: list[int]
    held_out: list[int]
    threshold: float
    max_runs: int
    circuit: list[str] = field(default_factory=list)
    ranking: list[str] = field(default_factory=list)
    steps: list[PruningStep] = field(default_factory=list)
    n_runs: int = 0
    is_cut: bool = False

    def by_attribution(self) -> None:
        """Remove the parts of the smallest estimated effect first."""
        effects = node_effects(self.runs, self.train).mean(0)
        self.ranking = [self.runs.parts.names[i] for i in effects.abs().argsort(descending=True).tolist()]
        self.circuit = list(self.ranking)
        while len(self.circuit) > 1 and self._is_affordable(2) and self._removed(self.circuit[-1], None):
            pass

    def greedily(self) -> None:
        """Remove the part without which the rest stays closest to the whole model."""
        self.circuit = list(self.runs.parts.names)
        gone: list[str] = []
        while len(self.circuit) > 1 and self._is_affordable(len(self.circuit) + 1):
            without = self._shares([[name for name in self.circuit if name != out] for out in self.circuit], self.train)
            harm = (1 - without).abs()
            order = harm.argsort(descending=True).tolist()
            self.circuit = [self.circuit[i] for i in order]  # what harms most when it goes comes first
            last = self.circuit[-1]
            if not self._removed(last, float(without[order[-1]])):
                break
            gone.append(last)
        self.ranking = [*self.circuit, *reversed(gone)]

    def _is_affordable(self, n: int) -> bool:
        self.is_cut = self.n_runs + n > self.max_runs
        return not self.is_cut

    def _removed(self, name: str, train: float | None) -> bool:
        """Remove a part and note what that did; False, with the part still there, if it was one too many."""
        rest = [other for other in self.circuit if other != name]
        if train is None:
            train = float(self._shares([rest], self.train)[0])
        unseen = float(self._shares([rest], self.held_out)[0])
        self.steps.append(PruningStep(removed=name, n_kept=len(rest), train=number(train), held_out=number(unseen)))
        if abs(1 - unseen) > 1 - self.threshold:
            return False
        self.circuit = rest
        return True

    def _shares(self, circuits: list[list[str]], pairs: list[int]) -> Float[Tensor, " circuits"]:
        self.n_runs += len(circuits)
        masks = torch.stack([self.runs.parts.mask(names) for names in circuits])
        return self.scale.of(pairs).shares(self.runs.values(masks, pairs))


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


class CircuitGraph(TypedDict):
    """What `circuit_graph` returns; edges in the order in which they were chosen."""

    technique: str
    version: int
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
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more edges.")
    heads = _query_heads(scores)
    into: dict[str, list[tuple[float, int, GraphEdge]]] = {}
    for i, row in enumerate(scores["rows"]):
        for node, slot in heads.get(row["receiver"], [(row["receiver"], "")]):
            weight = row["score"] or 0.0
            edge = GraphEdge(edge=row["edge"], sender=row["sender"], receiver=node, slot=slot, weight=weight)
            into.setdefault(node, []).append((-abs(weight), i, edge))
    names, edges, frontier = ["logits"], list[GraphEdge](), into.get("logits", [])[:]
    heapq.heapify(frontier)
    while frontier and len({edge["edge"] for edge in edges}) < k:
        edge = heapq.heappop(frontier)[2]
        edges.append(edge)
        if edge["sender"] not in names:
            names.append(edge["sender"])
            for entry in into.get(edge["sender"], []):
                heapq.heappush(frontier, entry)
    order = {name: i for i, name in enumerate([*scores["senders"], "logits"])}
    nodes = [_graph_node(name) for name in sorted(names, key=lambda name: order[name])]
    return CircuitGraph(technique="circuit_graph", version=1, nodes=nodes, edges=edges)


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
