"""Edge attribution patching: which connections between components carry the answer.

Sources: Syed et al., "Attribution patching outperforms automated circuit discovery" (2023),
https://arxiv.org/abs/2310.10348; Hanna et al., "Have faith in faithfulness: going beyond circuit overlap when finding
model mechanisms" (2024), https://arxiv.org/abs/2403.17806, and its code, https://github.com/hannamw/EAP-IG
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._contrast import Check, Contrast, agreement, as_leaf, frozen, sample_of
from techniques._edges import (
    Graph,
    graph_of,
    max_tokens,
    receiver_columns,
    run_edges,
    sender_outputs,
    sender_points,
)
from techniques._hooks import HookPoint, check_sites, edit, record
from techniques._pairs import ExcludedPair, encode_pairs
from techniques._results import ArrayFile, Header, check_file, few, header, number, save_arrays
from techniques._stats import mean_interval

METHODS = ("eap", "eap-ig")


class EdgeScore(TypedDict):
    """The estimated effect of one edge.

    Attributes:
        edge: `sender->receiver`, as `a0.h1->a1.h0<k>`: head 1 of layer 0 to the keys of head 0 of layer 1.
        sender: `input` (the embedding), a head `a0.h1` or an MLP `m0`.
        receiver: A head's queries, keys or values `a1.h0<q>` (`a1.kv0<k>` where heads share keys and values), an MLP
            `m1`, or `logits`.
        score: Estimated fall of the logit difference, in nats, when the edge carries what it does on the corrupted
            prompt; mean over pairs. Positive edges support the answer.
        low: Lower end of the 95 % bootstrap interval over pairs.
        high: Upper end.
        exact: The same fall measured by patching the edge, where it was; None elsewhere.
    """

    edge: str
    sender: str
    receiver: str
    score: float | None
    low: float | None
    high: float | None
    exact: float | None


class EdgeAttribution(Header):
    """What `eap` returns.

    Attributes:
        method: "eap" or "eap-ig".
        steps: Of the path from the corrupted to the clean embedding; 1 for "eap".
        clean_logit_diff: Mean over pairs, nats.
        corrupted_logit_diff: Mean over pairs, nats.
        n_edges: How many edges the model has.
        senders: Names of all senders, in the order in which they are computed.
        receivers: Names of all receivers, in that order.
        rows: The edges with the largest scores, largest first.
        check: Agreement with patching; None if nothing was checked.
        scores: File with all scores, [senders, receivers], 0 where there is no edge; None if it was not asked for.
        excluded: Pairs that were left out, with reasons.
    """

    method: str
    steps: int
    clean_logit_diff: float | None
    corrupted_logit_diff: float | None
    n_edges: int
    senders: list[str]
    receivers: list[str]
    rows: list[EdgeScore]
    check: Check | None
    scores: ArrayFile | None
    excluded: list[ExcludedPair]


class _Scored(NamedTuple):
    clean: Float[Tensor, ""]
    corrupted: Float[Tensor, ""]
    scores: Float[Tensor, "senders receivers"]


def eap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    *,
    method: Literal["eap", "eap-ig"] = "eap-ig",
    steps: int = 5,
    top_k: int = 200,
    verify: int = 16,
    min_gap: float = 0.5,
    save: str | Path | None = None,
    seed: int = 0,
) -> EdgeAttribution:
    """Score every edge between the embedding, heads, MLPs and the output by gradients.

    Answers through which connections the answer travels. The score of an edge is the difference of what its sender adds
    on the clean and on the corrupted prompt, times the gradient of the logit difference with respect to what its
    receiver reads, through the norm before it.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        pairs: (clean prompt, corrupted prompt), of equal length in tokens; others are left out.
        answers: (right answer, wrong answer) after the clean prompt, a token each, with their leading space.
        method: "eap" takes the gradient on the clean prompt; "eap-ig" its mean over embeddings between the corrupted
            and the clean one, `corrupted + k / steps * (clean - corrupted)` for k = 0 to steps - 1.
        steps: How many; only for "eap-ig".
        top_k: How many edges are listed.
        verify: How many edges are measured by patching: half of them those with the largest scores, half drawn at
            random from the rest. 0 measures none.
        min_gap: Pairs whose logit difference falls by less, in nats, from clean to corrupted are left out.
        save: A safetensors file for all scores.
        seed: Of that draw and of the bootstrap.

    Returns:
        A row per edge, largest first, and `check`, the agreement of scores and measurements. Edges that were measured
        but are not among the largest come last.

    Raises:
        ValueError: The pairs or answers can't be compared, an option is out of range, the model is in train mode, or no
            pair has the gap.
        UnsupportedModelError: The model's attention can't be split into heads.

    Misleads: A large score says that an edge matters for these pairs, given all the others. A set of the k largest
    edges is a circuit only once evaluate_circuit has shown that it is faithful. "eap" misses edges into saturated
    attention or norms; "eap-ig" does less. Heads' biases are no edges.

    Cost: 2 forwards, then a forward and a backward per step, plus a small backward for each head's query, key and
    value; about 1 s on the demo model.

    Example:
        prompt = "When Mary and John went to the store, {} gave a drink to"
        pairs = [(prompt.format("John"), prompt.format("Tom")), (prompt.format("Mary"), prompt.format("Tom"))]
        answers = [(" Mary", " John"), (" John", " Mary")]
        scores = eap(model, tokenizer, pairs, answers, top_k=30)
        # The circuit that grows from the output along these edges, as a drawing; no model is needed for it.
        from techniques.circuits import circuit_graph
        from techniques.plots import plot

        plot(circuit_graph(scores, k=20))
    """
    graph = graph_of(check_sites(model))
    check_file(save)
    _check_options(method, steps, top_k, verify)
    steps = steps if method == "eap-ig" else 1
    contrast = Contrast(model, encode_pairs(model, tokenizer, pairs, answers))
    scored = in_batches(
        contrast.lengths, max_tokens(graph), lambda which: _scores_of(contrast, graph, which, method, steps)
    )
    clean, corrupted = torch.stack([one.clean for one in scored]), torch.stack([one.corrupted for one in scored])
    contrast, kept = contrast.without_small_gaps(clean, corrupted, min_gap)
    scores = torch.stack(list(compress((one.scores for one in scored), kept)))
    rows, check = _rows(contrast, graph, scores, top_k, verify, seed)
    return EdgeAttribution(
        **header(model, "eap", n=len(contrast.pairs), seed=seed, warnings=few(len(contrast.pairs), "pair")),
        method=method,
        steps=steps,
        clean_logit_diff=number(clean[kept].mean()),
        corrupted_logit_diff=number(corrupted[kept].mean()),
        n_edges=int(graph.possible.sum()),
        senders=[str(sender) for sender in graph.senders],
        receivers=[str(receiver) for receiver in graph.receivers],
        rows=rows,
        check=check,
        scores=None if save is None else save_arrays(save, {"scores": scores.mean(0)}),
        excluded=contrast.pairs.excluded,
    )


def _check_options(method: str, steps: int, top_k: int, verify: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if steps < 1 or top_k < 1 or verify < 0:
        raise ValueError(
            f"steps is {steps} and top_k is {top_k} and verify is {verify}; expected 1 or more of the first two, and 0 "
            "or more to verify."
        )


def _scores_of(contrast: Contrast, graph: Graph, which: list[int], method: str, steps: int) -> list[_Scored]:
    """The scores of some pairs."""
    points, diffs, outputs, starts = sender_points(graph.decoder), [], [], []
    sides = contrast.pairs.clean, contrast.pairs.corrupted
    for ids in sides:
        with torch.no_grad(), record(contrast.model, points) as seen:
            diffs.append(contrast.logit_diffs(contrast.batch(ids, which), which).cpu())
        outputs.append(sender_outputs(graph.decoder, seen))
        starts.append(seen[points[0]])
    shares = [k / steps for k in range(steps)] if method == "eap-ig" else [1.0]
    total = torch.zeros(())
    for share in shares:
        start = starts[1] + share * (starts[0] - starts[1])
        total = total + _receiver_gradients(contrast, graph, which, start)
    moved = (outputs[0] - outputs[1]).float()
    scores = torch.einsum("bpsd,bprd->bsr", moved, total.to(moved.device) / len(shares)).cpu()
    return [_Scored(*one) for one in zip(*diffs, scores * graph.possible, strict=True)]


def _receiver_gradients(
    contrast: Contrast, graph: Graph, which: list[int], start: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos receivers d_model"]:
    """Gradient of the logit difference with respect to what each receiver reads, given the embeddings."""
    decoder, model = graph.decoder, contrast.model
    # What each receiver makes of its input, and where it reads that from.
    made = ["q", "k", "v", "mlp_out"]
    middle = "resid_pre" if decoder.parallel else "resid_mid"
    points = [HookPoint(site, i) for i in range(decoder.n_layers) for site in (*made, middle, "resid_pre")]
    final = HookPoint("resid_post", decoder.n_layers - 1)
    batch = contrast.batch(contrast.pairs.clean, which)
    with (
        frozen(model),
        edit(model, {HookPoint("resid_pre", 0): lambda _: as_leaf(start)}),
        record(model, [*points, final]) as seen,
    ):
        diff = contrast.logit_diffs(batch, which).sum()
        ends = [HookPoint(site, i) for i in range(decoder.n_layers) for site in made]
        *gradients, last = torch.autograd.grad(diff, [seen[p] for p in [*ends, final]], retain_graph=True)
        by_end = dict(zip(ends, gradients, strict=True))
        found = torch.zeros(*start.shape[:2], len(graph.receivers), start.shape[2], device=start.device)
        for layer in range(decoder.n_layers):
            for slot, columns in receiver_columns(graph, layer).items():
                end = HookPoint(slot or "mlp_out", layer)
                source = seen[HookPoint("resid_pre" if slot else middle, layer)]
                pulled = _pull_heads if slot else _pull
                found[:, :, columns] = pulled(seen[end], source, by_end[end]).to(found.device, found.dtype)
        found[:, :, -1] = last.to(found.device)
    return found


def _pull(output: Tensor, source: Tensor, gradient: Tensor) -> Float[Tensor, "batch pos 1 d_model"]:
    return torch.autograd.grad(output, source, gradient, retain_graph=True)[0].unsqueeze(2)


def _pull_heads(
    output: Float[Tensor, "batch pos heads d_head"], source: Tensor, gradient: Tensor
) -> Float[Tensor, "batch pos heads d_model"]:
    """The gradient at the source through each head of the output alone."""
    parts = []
    for head in range(output.shape[2]):
        alone = torch.zeros_like(gradient)
        alone[:, :, head] = gradient[:, :, head]
        parts.append(_pull(output, source, alone))
    return torch.cat(parts, 2)


# ---------------------------------------------------------------------------------------------- rows


def _rows(
    contrast: Contrast, graph: Graph, scores: Float[Tensor, "n senders receivers"], top_k: int, verify: int, seed: int
) -> tuple[list[EdgeScore], Check | None]:
    """The largest edges and those that are measured, and how the measurements agree."""
    edges = graph.possible.nonzero()
    by_edge = scores[:, edges[:, 0], edges[:, 1]]
    estimates = by_edge.mean(0)
    sample = sample_of(estimates, verify, seed)
    measured = [*sample.top, *sample.drawn]
    top = estimates.abs().argsort(descending=True)[:top_k].tolist()
    listed = [*top, *sorted(set(measured) - set(top), key=lambda i: -abs(estimates[i]))]
    exact = measure_edges(contrast, graph, [tuple(edges[i].tolist()) for i in measured]) if measured else None
    by_index = {} if exact is None else dict(zip(measured, exact.tolist(), strict=True))
    mean, low, high = mean_interval(by_edge[:, listed], seed)
    rows = []
    for place, i in enumerate(listed):
        sender, receiver = edges[i].tolist()
        rows.append(
            EdgeScore(
                edge=graph.edge_name(sender, receiver),
                sender=str(graph.senders[sender]),
                receiver=str(graph.receivers[receiver]),
                score=number(mean[place]),
                low=number(low[place]),
                high=number(high[place]),
                exact=number(by_index[i]) if i in by_index else None,
            )
        )
    return rows, None if exact is None else agreement(sample, estimates[measured], exact)


def measure_edges(contrast: Contrast, graph: Graph, edges: list[tuple[int, int]]) -> Float[Tensor, " edges"]:
    """Mean fall of the logit difference when each edge alone carries what it does on the corrupted prompt."""

    @torch.no_grad()
    def falls(which: list[int]) -> list[Tensor]:
        clean, corrupted = (contrast.batch(ids, which) for ids in (contrast.pairs.clean, contrast.pairs.corrupted))
        with record(contrast.model, sender_points(graph.decoder)) as seen:
            contrast.logit_diffs(corrupted, which)
        given = sender_outputs(graph.decoder, seen)
        before = contrast.logit_diffs(clean, which)
        found = []
        for edge in edges:
            kept = graph.possible.clone()
            kept[edge] = False
            after = run_edges(contrast.model, graph, clean, given, kept, lambda rows: contrast.logit_diffs(rows, which))
            found.append(before - after)
        return list(torch.stack(found, -1).cpu())

    return torch.stack(in_batches(contrast.lengths, max_tokens(graph), falls)).mean(0)
