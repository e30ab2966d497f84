"""Iterative pruning: take components away as long as the rest does the task.

Source: Conmy et al., "Towards automated circuit discovery for mechanistic interpretability" (2023),
https://arxiv.org/abs/2304.14997, whose search this simplifies to components in the place of edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._circuit_runs import Faithfulness, Mode, Runner, Scale, node_effects, node_parts, runner, scaled
from techniques._contrast import Contrast
from techniques._edges import graph_of
from techniques._hooks import check_sites
from techniques._nodes import Components, layer_nodes
from techniques._pairs import ExcludedPair, encode_pairs
from techniques._results import Header, few, header, number


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
        mode: What replaces removed parts: "resample" takes the values of the corrupted prompt, "mean" their mean over
            all corrupted prompts and positions, "zero" nothing.
        order: "attribution" ranks the parts once by gradients and removes the smallest first; "greedy" tries each part
            in each round and removes the one without which faithfulness stays closest to 1.
        threshold: Faithfulness, on held-out pairs, must stay between this and 2 - this.
        held_out: Share of the pairs that decide when to stop.
        max_runs: Stop when so many circuits were run.
        min_gap: Pairs whose logit difference falls by less, in nats, from the whole model to the empty circuit are left
            out.
        seed: Of the split and of the bootstrap.

    Returns:
        The circuit and how it was reached. If heads and MLPs could both go, evaluate_circuit takes its `ranking`.

    Raises:
        ValueError: An option is unknown or out of range, the pairs or answers can't be compared, or fewer than two
            pairs have the gap.
        UnsupportedModelError: The model's attention can't be split into heads.
        MemoryError: A single pair does not fit in memory; a batch that does not is halved.

    Misleads: Parts that stand in for each other look needless one by one, and removing many small ones can harm more
    than the sum of their effects. Held-out pairs of the same templates say nothing of other wordings. Since the
    held-out pairs chose the size, evaluate_circuit on yet other pairs gives the unbiased number.

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
    runs, scale = scaled(runner(contrast, parts, mode), min_gap, seed)
    task = _Pruning(runs, scale, *_split(len(scale.full), held_out, seed), threshold, max_runs)
    (task.by_attribution if order == "attribution" else task.greedily)()
    values = runs.values(runs.parts.mask(task.circuit)[None], task.held_out)[0]
    stopped = [f"Stopped after {task.n_runs} runs, before faithfulness left its bounds."] if task.is_cut else []
    return CircuitPruning(
        **header(
            model,
            "iterative_pruning",
            n=len(scale.full),
            seed=seed,
            warnings=[*stopped, *few(len(task.held_out), "held-out pair")],
        ),
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
    scale: Scale
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
