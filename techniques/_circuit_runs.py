"""Runs of a model of which only a part is left as it is: some of its components, or some of the edges between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from techniques._batches import in_batches
from techniques._contrast import MAX_TOKENS, Contrast, as_leaf, frozen
from techniques._edges import Graph, max_tokens, run_edges, sender_outputs, sender_points
from techniques._hooks import Change, HookPoint, edit, record
from techniques._nodes import Node
from techniques._tokens import Batch

Mode = Literal["resample", "mean", "zero"]
MODES = ("resample", "mean", "zero")
SITES_OF = ("z", "mlp_out")  # where heads and MLPs are exchanged


@dataclass(frozen=True)
class Parts:
    """What a circuit is a subset of: components, or edges.

    Attributes:
        graph: The model's graph.
        names: Of all parts.
        nodes: The parts themselves if they are components, else empty.
        edges: Sender and receiver of each part if they are edges, else empty.
    """

    graph: Graph
    names: list[str]
    nodes: list[Node]
    edges: Int[Tensor, "parts 2"]

    def mask(self, names: Iterable[str]) -> Bool[Tensor, " parts"]:
        """Which parts are named."""
        named = set(names)
        return torch.tensor([name in named for name in self.names])


def node_parts(graph: Graph, nodes: list[Node]) -> Parts:
    """Parts that are components."""
    return Parts(graph, [str(node) for node in nodes], nodes, torch.zeros(0, 2, dtype=torch.long))


def edge_parts(graph: Graph) -> Parts:
    """Parts that are edges: all that there are."""
    edges = graph.possible.nonzero()
    return Parts(graph, [graph.edge_name(*edge) for edge in edges.tolist()], [], edges)


@dataclass(frozen=True)
class Runner:
    """Runs circuits on clean prompts; what is not in a circuit gets values that know nothing of the clean prompt.

    Attributes:
        contrast: The pairs.
        parts: What circuits are subsets of.
        mode: "resample" (values of the corrupted prompt), "mean" (their mean over all corrupted prompts and positions)
            or "zero". Edges can be resampled only.
        means: By hook point, for "mean".
    """

    contrast: Contrast
    parts: Parts
    mode: Mode
    means: dict[HookPoint, Tensor]

    def values(self, circuits: Bool[Tensor, "circuits parts"], pairs: Sequence[int]) -> Float[Tensor, "circuits n"]:
        """Logit difference of each circuit on each of the chosen pairs, in nats."""
        lengths = [self.contrast.lengths[i] for i in pairs]
        budget = MAX_TOKENS if self.parts.nodes else max_tokens(self.parts.graph)
        return torch.stack(in_batches(lengths, budget, lambda at: self._run(circuits, [pairs[i] for i in at])), -1)

    @torch.no_grad()
    def _run(self, circuits: Bool[Tensor, "circuits parts"], which: list[int]) -> list[Float[Tensor, " circuits"]]:
        clean = self.contrast.batch(self.contrast.pairs.clean, which)
        given = self.replacements(which)
        run = self._nodes_run if self.parts.nodes else self._edges_run(given)
        return list(torch.stack([run(clean, circuit, given, which).cpu() for circuit in circuits], -1))

    def replacements(self, which: list[int]) -> dict[HookPoint, Tensor]:
        """What the components of the chosen pairs get when they are not in a circuit; broadcasts over tokens."""
        points = sender_points(self.parts.graph.decoder)
        if self.mode == "mean":
            return self.means
        if self.mode == "zero":
            return {point: torch.zeros(()) for point in points}
        with torch.no_grad(), record(self.contrast.model, points) as given:
            self.contrast.logit_diffs(self.contrast.batch(self.contrast.pairs.corrupted, which), which)
        return given

    def _nodes_run(
        self, clean: Batch, circuit: Bool[Tensor, " parts"], given: dict[HookPoint, Tensor], which: list[int]
    ) -> Float[Tensor, " n"]:
        removed = [node for node, is_kept in zip(self.parts.nodes, circuit.tolist(), strict=True) if not is_kept]
        heads: dict[int, list[int]] = {}
        edits: dict[HookPoint, Change] = {}
        for node in removed:
            if node.kind == "head":
                heads.setdefault(node.layer, []).append(node.head)
            else:
                point = HookPoint("mlp_out", node.layer)
                edits[point] = partial(_replaced, given[point])
        for layer, gone in heads.items():
            point = HookPoint("z", layer)
            edits[point] = partial(_heads_replaced, given[point], gone)
        with edit(self.contrast.model, edits):
            return self.contrast.logit_diffs(clean, which)

    def _edges_run(self, given: dict[HookPoint, Tensor]) -> Callable[..., Float[Tensor, " n"]]:
        corrupted = sender_outputs(self.parts.graph.decoder, given)

        def run(clean: Batch, circuit: Bool[Tensor, " parts"], _: object, which: list[int]) -> Float[Tensor, " n"]:
            kept = torch.zeros_like(self.parts.graph.possible)
            kept[self.parts.edges[:, 0], self.parts.edges[:, 1]] = circuit
            read = partial(self.contrast.logit_diffs, which=which)
            return run_edges(self.contrast.model, self.parts.graph, clean, corrupted, kept, read)

        return run


def runner(contrast: Contrast, parts: Parts, mode: str) -> Runner:
    """A runner, with the means that it needs.

    Raises:
        ValueError: The mode is unknown, or is not "resample" for edges.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    if mode != "resample" and not parts.nodes:
        raise ValueError(f'mode is {mode!r} for a circuit of edges; expected "resample", the only one they have.')
    means = _means(contrast, sender_points(parts.graph.decoder)) if mode == "mean" else {}
    return Runner(contrast, parts, cast(Mode, mode), means)


@torch.no_grad()
def _means(contrast: Contrast, points: list[HookPoint]) -> dict[HookPoint, Tensor]:
    """Of each point over all tokens of all corrupted prompts."""

    def sums(which: list[int]) -> list[dict[HookPoint, Tensor]]:
        batch = contrast.batch(contrast.pairs.corrupted, which)
        with record(contrast.model, points) as seen:
            contrast.logit_diffs(batch, which)
        return [
            {point: value[row, : contrast.lengths[i]].float().sum(0) for point, value in seen.items()}
            for row, i in enumerate(which)
        ]

    found = in_batches(contrast.lengths, MAX_TOKENS, sums)
    n_tokens = sum(contrast.lengths)
    dtype = contrast.model.dtype
    return {point: (torch.stack([one[point] for one in found]).sum(0) / n_tokens).to(dtype) for point in points}


def _replaced(given: Tensor, value: Tensor) -> Tensor:
    return given.to(value.device).expand_as(value)


def _heads_replaced(given: Tensor, heads: list[int], value: Tensor) -> Tensor:
    is_gone = torch.zeros(value.shape[2], dtype=torch.bool, device=value.device).index_fill(
        0, torch.tensor(heads, device=value.device), True
    )
    return torch.where(is_gone[:, None], given.to(value.device), value)


def node_effects(runner: Runner, pairs: Sequence[int]) -> Float[Tensor, "n parts"]:
    """Estimated change of the logit difference by removing each component, from one gradient; in nats."""

    def work(which: list[int]) -> list[Tensor]:
        contrast, model = runner.contrast, runner.contrast.model
        given = runner.replacements(which)
        points = [HookPoint(site, layer) for layer in range(runner.parts.graph.decoder.n_layers) for site in SITES_OF]
        start = {HookPoint("resid_pre", 0): as_leaf}
        with frozen(model), edit(model, start), record(model, points) as seen:
            diffs = contrast.logit_diffs(contrast.batch(contrast.pairs.clean, which), which)
            gradients = torch.autograd.grad(diffs.sum(), [seen[point] for point in points])
        effects = {
            point: ((given[point].to(gradient.device) - seen[point].detach()) * gradient).sum((1, -1)).cpu()
            for point, gradient in zip(points, gradients, strict=True)
        }
        return list(torch.stack([_effect(effects, node) for node in runner.parts.nodes], -1))

    lengths = [runner.contrast.lengths[i] for i in pairs]
    return torch.stack(in_batches(lengths, MAX_TOKENS, lambda at: work([pairs[i] for i in at])))


def _effect(effects: dict[HookPoint, Tensor], node: Node) -> Float[Tensor, " n"]:
    if node.kind == "head":
        return effects[HookPoint("z", node.layer)][:, node.head]
    return effects[HookPoint("mlp_out", node.layer)]
