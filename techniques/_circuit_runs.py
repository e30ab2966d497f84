"""Runs of a model of which only a part is left as it is: some of its components, or some of the edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from techniques._activations import token_means
from techniques._batches import in_batches
from techniques._contrast import MAX_TOKENS, Contrast, as_leaf, frozen
from techniques._edges import Graph, max_tokens, run_edges, sender_outputs, sender_points
from techniques._hooks import HookPoint, edit, record
from techniques._nodes import Node
from techniques._results import number
from techniques._stats import recovered_interval

Mode = Literal["resample", "mean", "zero"]
MODES = ("resample", "mean", "zero")
RUN_TOKENS = 2048  # of a pass that runs several circuits at once
EDGES_ALONE = "pair, in a copy for each mixture of edges,"
NODE_SITES = ("z", "mlp_out")  # where heads and MLPs are exchanged


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

    @torch.no_grad()
    def values(self, circuits: Bool[Tensor, "circuits parts"], pairs: Sequence[int]) -> Float[Tensor, "circuits n"]:
        """Logit difference of each circuit on each of the chosen pairs, in nats.

        Raises:
            MemoryError: One circuit on one pair does not fit in memory.
        """
        lengths, n = [self.contrast.lengths[i] for i in pairs], len(circuits)
        if not self.parts.nodes:
            edges = partial(self._run_edges, circuits)
            budget = max_tokens(self.parts.graph)
            return torch.stack(in_batches(lengths, budget, lambda at: edges([pairs[i] for i in at]), EDGES_ALONE), -1)
        masks = self._masks(circuits)
        # The circuits of one pair stand side by side, so that a batch has few pairs, whose replacements it needs.
        found = in_batches(
            [length for length in lengths for _ in range(n)],
            RUN_TOKENS,
            lambda at: self._run_nodes(
                {point: mask[[i % n for i in at]] for point, mask in masks.items()}, [pairs[i // n] for i in at]
            ),
        )
        return torch.stack(found).view(len(pairs), n).T

    def replacements(self, which: Sequence[int]) -> dict[HookPoint, Tensor]:
        """What the components of the chosen pairs get when they are not in a circuit; broadcasts over tokens."""
        points = sender_points(self.parts.graph.decoder)
        if self.mode == "mean":
            return self.means
        if self.mode == "zero":
            return {point: torch.zeros(()) for point in points}
        with torch.no_grad(), record(self.contrast.model, points) as given:
            self.contrast.logit_diffs(self.contrast.batch(self.contrast.pairs.corrupted, which), which)
        return given

    def _masks(self, circuits: Bool[Tensor, "circuits parts"]) -> dict[HookPoint, Bool[Tensor, "circuits 1 ..."]]:
        """Where each circuit keeps what the model computes, for the points at which one of them does not."""
        decoder, n = self.parts.graph.decoder, len(circuits)
        heads = torch.ones(n, decoder.n_layers, decoder.n_heads, dtype=torch.bool)
        mlps = torch.ones(n, decoder.n_layers, dtype=torch.bool)
        for node, kept in zip(self.parts.nodes, circuits.T, strict=True):
            if node.kind == "head":
                heads[:, node.layer, node.head] = kept
            else:
                mlps[:, node.layer] = kept
        masks = {HookPoint("z", i): heads[:, None, i, :, None] for i in range(decoder.n_layers)}
        masks |= {HookPoint("mlp_out", i): mlps[:, i, None, None] for i in range(decoder.n_layers)}
        return {point: mask for point, mask in masks.items() if not mask.all()}

    def _run_nodes(self, masks: dict[HookPoint, Bool[Tensor, "n 1 ..."]], which: list[int]) -> list[Float[Tensor, ""]]:
        """One pass; row i is a clean prompt of which the i-th row of each mask keeps what the model computes."""
        different = list(dict.fromkeys(which))
        rows = torch.tensor([different.index(i) for i in which])
        given = self.replacements(different)
        edits = {
            point: partial(_exchange, mask, given[point][rows] if self.mode == "resample" else given[point])
            for point, mask in masks.items()
        }
        with edit(self.contrast.model, edits):
            clean = self.contrast.batch(self.contrast.pairs.clean, which)
            return list(self.contrast.logit_diffs(clean, which).cpu())

    def _run_edges(
        self, circuits: Bool[Tensor, "circuits parts"], which: list[int]
    ) -> list[Float[Tensor, " circuits"]]:
        graph = self.parts.graph
        clean = self.contrast.batch(self.contrast.pairs.clean, which)
        corrupted = sender_outputs(graph.decoder, self.replacements(which))
        read = partial(self.contrast.logit_diffs, which=which)
        diffs = []
        for circuit in circuits:
            kept = torch.zeros_like(graph.possible)
            kept[self.parts.edges[:, 0], self.parts.edges[:, 1]] = circuit
            diffs.append(run_edges(self.contrast.model, graph, clean, corrupted, kept, read))
        return list(torch.stack(diffs, -1).cpu())


def _exchange(kept: Bool[Tensor, "batch 1 ..."], given: Tensor, value: Tensor) -> Tensor:
    return torch.where(kept.to(value.device), value, given.to(value.device))


def runner(contrast: Contrast, parts: Parts, mode: str) -> Runner:
    """A runner, with the means that it needs.

    Raises:
        ValueError: The mode is unknown, or is not "resample" for edges.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    if mode != "resample" and not parts.nodes:
        raise ValueError(f'mode is {mode!r} for a circuit of edges; expected "resample", the only one they have.')
    points = sender_points(parts.graph.decoder)
    means = token_means(contrast.model, contrast.pairs.corrupted, points) if mode == "mean" else {}
    return Runner(contrast, parts, cast(Mode, mode), means)


def node_effects(runner: Runner, pairs: Sequence[int]) -> Float[Tensor, "n parts"]:
    """Estimated change of the logit difference by removing each component, from one gradient; in nats."""

    def work(which: list[int]) -> list[Tensor]:
        contrast, model = runner.contrast, runner.contrast.model
        given = runner.replacements(which)
        points = [HookPoint(site, layer) for layer in range(runner.parts.graph.decoder.n_layers) for site in NODE_SITES]
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


# ---------------------------------------------------------------------------------------------- faithfulness


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


@dataclass(frozen=True)
class Scale:
    """What counts as everything and as nothing: logit differences of the whole and of the empty model."""

    full: Float[Tensor, " n"]
    empty: Float[Tensor, " n"]
    seed: int

    def of(self, pairs: Sequence[int]) -> Scale:
        """The same for some of the pairs."""
        return Scale(self.full[list(pairs)], self.empty[list(pairs)], self.seed)

    def shares(self, values: Float[Tensor, "circuits n"]) -> Float[Tensor, " circuits"]:
        """Faithfulness of each circuit."""
        return (values - self.empty).mean(-1) / (self.full - self.empty).mean()

    def faithfulness(self, values: Float[Tensor, " n"]) -> Faithfulness:
        """Of one circuit, with its interval."""
        found = recovered_interval((values - self.empty)[:, None], self.full - self.empty, self.seed)
        value, low, high = (number(part[0]) for part in found)
        return Faithfulness(value=value, low=low, high=high)


def scaled(runs: Runner, min_gap: float, seed: int) -> tuple[Runner, Scale]:
    """The runner on the pairs that tell the whole model from the empty circuit, and the two."""
    both = torch.tensor([[True], [False]]).expand(2, len(runs.parts.names))
    full, empty = runs.values(both, range(len(runs.contrast.pairs)))
    contrast, kept = runs.contrast.without_small_gaps(full, empty, min_gap)
    return replace(runs, contrast=contrast), Scale(full[kept], empty[kept], seed)
