"""Path patching: change what one component tells another, and nothing else.

Sources: Wang et al., "Interpretability in the wild" (2022), https://arxiv.org/abs/2211.00593; Goldowsky-Dill et al.,
"Localizing model behavior with path patching" (2023), https://arxiv.org/abs/2304.05969.

The algorithm, for one sender and one receiver, with the base run (clean when noising) and the source run (the other):

1. Run both prompts and keep every head's z and what every attention and MLP adds to the stream.
2. Run the base prompt with the sender's output from the source run, and everything else between it and the receiver
   held at the base run (the MLPs only if they are frozen). Keep what the receiver reads.
3. Run the base prompt once more with only the receiver's input set to that, and measure the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import prompt_values
from techniques._batches import in_memory
from techniques._components import Component, parse_components
from techniques._hooks import Change, HookPoint, check_sites, edit, record
from techniques._model import Decoder, logits_at
from techniques._nodes import Node
from techniques._pairs import (
    CHUNK_ROWS,
    Baselines,
    ExcludedPair,
    PairInfo,
    Pairs,
    encode_pairs,
    last_positions,
    metric_values,
    pair_infos,
    with_gap,
)
from techniques._receivers import Receiver, hears, name_of, parse_receivers
from techniques._results import Header, few, header, number
from techniques._stats import N_BOOT, recovered_interval
from techniques._sweep import Patch, Variant
from techniques._tokens import Batch, pad
from techniques._variants import site_value, variant_metrics
from techniques.patching import Direction


class PathRow(TypedDict):
    """The effect of one sender's direct route to one receiver on the logit difference.

    Attributes:
        sender: The component whose output was changed: a0.h1 is head 1 of layer 0, m2 the MLP of layer 2.
        receiver: What read the change: a1.h0<q> is the query of head 0 of layer 1; several that were changed together
            are joined by "+".
        patched: Mean logit difference over the pairs after the change, in nats.
        recovered: (patched - corrupted) / (clean - corrupted), of the means.
        effect: Share of the way from the base run to the source run: `recovered` when denoising, 1 - `recovered` when
            noising. 0 is no effect, 1 all of it.
        low: Lower end of the 95 % bootstrap interval of `effect` over pairs.
        high: Its upper end.
    """

    sender: str
    receiver: str
    patched: float | None
    recovered: float | None
    effect: float | None
    low: float | None
    high: float | None


class PathPatching(Header):
    """Result of `path_patching`; `n` is the number of pairs that were used.

    Attributes:
        direction: "noise" (corrupted output into the clean run) or "denoise" (clean output into the corrupted run).
        freeze_mlps: Whether the MLPs between sender and receiver were held as well.
        senders: All senders, in the model's order.
        receivers: All receivers, in the order given.
        pairs: The pairs that were used.
        excluded: The pairs that were not, with reasons.
        rows: By receiver, then sender. A sender that cannot reach a receiver has no row.
    """

    direction: str
    freeze_mlps: bool
    senders: list[str]
    receivers: list[str]
    pairs: list[PairInfo]
    excluded: list[ExcludedPair]
    rows: list[PathRow]


@torch.inference_mode()
def path_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    senders: Literal["heads", "mlps", "heads+mlps"] | Sequence[Component] = "heads",
    receivers: Sequence[Component | list[Component]] = ("logits",),
    freeze_mlps: bool = True,
    direction: Direction = "noise",
    min_gap: float = 0.5,
    seed: int = 0,
    n_boot: int = N_BOOT,
) -> PathPatching:
    """Change what one component tells another on the direct route, and see what the answer makes of it.

    The sender's output comes from the other run, at all positions; every other head is held at the base run, and so are
    the MLPs if `freeze_mlps`. What the receiver reads then replaces its input in a run that is free otherwise.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; special tokens are added as it does by default.
        pairs: (clean prompt, corrupted prompt) of as many tokens; pairs of unequal length are left out.
        answers: (right answer, wrong answer) of each pair, each one token with its leading space.
        senders: "heads", "mlps", "heads+mlps", or a list: "a0.h1" is head 1 of layer 0, "m2" the MLP of layer 2;
            ("head", 0, 1) and ("mlp", 2) mean the same.
        receivers: What reads the change: "a1.h0<q>" is the query of head 0 of layer 1 (<k> and <v> its key and value),
            "m2" an MLP's input, "resid_post.2" the stream after layer 2, "logits" the output. A list among them is one
            receiver of several parts that are changed together. ("head", 1, 0, "q") and ("resid_post", 2) do as well.
        freeze_mlps: Whether MLPs between sender and receiver keep their base output. If not, they react, and what
            they pass on counts as part of the route.
        direction: "noise" starts from the clean run and takes the sender's output from the corrupted one, "denoise" the
            other way round.
        min_gap: A pair counts only if its logit difference falls by at least this from clean to corrupted, in nats.
        seed: Of the bootstrap.
        n_boot: Bootstrap resamples.

    Returns:
        One row per receiver and sender that lies before it, with a 95 % interval over pairs.

    Raises:
        ValueError: An unknown sender or receiver; a receiver that no sender can reach; pairs or answers that do not
            fit (see the message); a gap below `min_gap` in every pair; a model in train mode.
        UnsupportedModelError: The model is built in a way that is not understood.
        MemoryError: A single pair does not fit in memory; a batch that does not is halved.

    Misleads:
        An effect belongs to these prompts and to what the base run holds fixed; a route that needs two senders at once
        shows in neither. With grouped heads, a key or value serves several heads, and all of them are changed.

    Cost:
        Two forwards per pair, sender and receiver, batched (one for "logits"); about 10 ms per pair and receiver for
        all heads of the demo model.

    Example:
        ```python
        from techniques.path_patching import path_patching

        pairs = [("The Eiffel Tower is located in the city of", "The Prado Museum is located in the city of")]
        result = path_patching(model, tokenizer, pairs, [(" Paris", " Madrid")], receivers=["logits", "m3"])
        max(result["rows"], key=lambda row: row["effect"])
        ```
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f'direction is {direction!r}; expected "denoise" or "noise".')
    decoder = check_sites(model)
    nodes = parse_components(decoder, senders)
    groups = parse_receivers(decoder, receivers, nodes)
    encoded, baselines = with_gap(model, encode_pairs(model, tokenizer, pairs, answers), min_gap)
    setup = _set_up(model, decoder, encoded, freeze_mlps, direction)
    patched = _patched(setup, nodes, groups)
    rows = _rows(nodes, groups, patched, baselines, direction, seed, n_boot)
    return PathPatching(
        **header(model, "path_patching", n=len(encoded), seed=seed, warnings=_warnings(decoder, encoded, groups)),
        direction=direction,
        freeze_mlps=freeze_mlps,
        senders=[str(node) for node in nodes],
        receivers=[name_of(group) for group in groups],
        pairs=pair_infos(encoded, baselines),
        excluded=encoded.excluded,
        rows=rows,
    )


# ---------------------------------------------------------------------------------------------- runs


Acts = dict[HookPoint, Tensor]


class _Route(NamedTuple):
    """One row of a batch: a pair and a sender."""

    pair: int
    sender: Node


@dataclass(frozen=True)
class _Setup:
    """What all routes have in common: the pairs, and what both runs made of their prompts, by pair, without padding."""

    model: PreTrainedModel
    decoder: Decoder
    pairs: Pairs
    base: list[list[int]]
    base_acts: list[Acts]
    source_acts: list[Acts]
    freeze_mlps: bool

    def batch(self, pairs: Sequence[int]) -> Batch:
        """The base prompts of some pairs."""
        return pad([self.base[pair] for pair in pairs], "right", 0, self.model.device)

    def base_values(self, point: HookPoint, pairs: Sequence[int]) -> Tensor:
        """What the base run has at a point for some pairs, padded with zeros to the width of their batch."""
        return pad_sequence([self.base_acts[pair][point] for pair in pairs], batch_first=True)


def _set_up(model: PreTrainedModel, decoder: Decoder, pairs: Pairs, freeze_mlps: bool, direction: str) -> _Setup:
    points = [HookPoint(site, layer) for layer in range(decoder.n_layers) for site in ("z", "attn_out", "mlp_out")]
    base, source = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    base_acts, source_acts = (prompt_values(model, ids, points, lambda value: value) for ids in (base, source))
    return _Setup(model, decoder, pairs, base, base_acts, source_acts, freeze_mlps)


def _patched(setup: _Setup, nodes: list[Node], groups: list[list[Receiver]]) -> Float[Tensor, "groups senders n"]:
    """Logit difference of every pair after each sender's change reached each receiver; NaN where it cannot."""
    n = len(setup.pairs)
    routes = [_Route(pair, node) for node in nodes for pair in range(n)]
    chunks = [routes[start : start + CHUNK_ROWS] for start in range(0, len(routes), CHUNK_ROWS)]
    found = in_memory(partial(_routed, setup, groups), chunks, lambda route: setup.pairs.name(route.pair))
    return torch.cat([part for _, part in found], -1).reshape(len(groups), len(nodes), n)


def _routed(setup: _Setup, groups: list[list[Receiver]], routes: Sequence[_Route]) -> Float[Tensor, "groups routes"]:
    found = torch.full((len(groups), len(routes)), torch.nan, dtype=torch.float64)
    logits, heard = _send(setup, routes, groups)
    for i, group in enumerate(groups):
        rows = [row for row, route in enumerate(routes) if hears(group, route.sender)]
        if rows:
            found[i, rows] = _receive(setup, routes, rows, group, logits, heard)
    return found


def _send(
    setup: _Setup, routes: Sequence[_Route], groups: list[list[Receiver]]
) -> tuple[Float[Tensor, "routes d_vocab"], Acts]:
    """Step 2 for a batch of routes: logits after the direct route, and what each receiver reads."""
    pairs = [route.pair for route in routes]
    edits: dict[HookPoint, Change] = {}
    for layer in range(setup.decoder.n_layers):
        edits |= _held(setup, routes, layer)
    points = {part.point for group in groups for part in group if part.point is not None}
    # Recorded before it is held: what an MLP makes of the change, although it does not pass it on.
    with record(setup.model, points) as heard, edit(setup.model, edits):
        last = last_positions([setup.base[pair] for pair in pairs])
        logits = logits_at(setup.model, setup.batch(pairs), torch.arange(len(routes)), last)
    return logits, heard


def _held(setup: _Setup, routes: Sequence[_Route], layer: int) -> dict[HookPoint, Change]:
    """Edits that hold a layer at the base run, but for the senders in it."""
    z, attn_out, mlp_out = (HookPoint(site, layer) for site in ("z", "attn_out", "mlp_out"))
    pairs = [route.pair for route in routes]
    own = [(row, route) for row, route in enumerate(routes) if route.sender.layer == layer]
    heads = [(row, route) for row, route in own if route.sender.kind == "head"]
    mlps = [(row, route) for row, route in own if route.sender.kind == "mlp"]

    def change_heads(value: Tensor) -> Tensor:
        new = setup.base_values(z, pairs)
        for row, (pair, sender) in heads:
            value = setup.source_acts[pair][z]
            new[row, : len(value), sender.head] = value[:, sender.head]
        return new

    def hold_attention(value: Tensor) -> Tensor:
        new = setup.base_values(attn_out, pairs)
        for row, _ in heads:
            new[row] = value[row]
        return new

    def hold_mlp(value: Tensor) -> Tensor:
        new = setup.base_values(mlp_out, pairs) if setup.freeze_mlps else value.clone()
        for row, (pair, _) in mlps:
            value = setup.source_acts[pair][mlp_out]
            new[row, : len(value)] = value
        return new

    return {
        attn_out: hold_attention,
        **({z: change_heads} if heads else {}),
        **({mlp_out: hold_mlp} if mlps or setup.freeze_mlps else {}),
    }


def _receive(
    setup: _Setup,
    routes: Sequence[_Route],
    rows: list[int],
    group: list[Receiver],
    logits: Float[Tensor, "routes d_vocab"],
    heard: Acts,
) -> Float[Tensor, " rows"]:
    """Step 3: the logit difference after the receivers alone were given what they heard."""
    pairs = [routes[row].pair for row in rows]
    answers = setup.pairs.answer_ids[pairs], setup.pairs.wrong_ids[pairs]
    if group[0].point is None:
        return metric_values(logits[rows], *answers, "logit_diff").double().cpu()
    different = list(dict.fromkeys(pairs))
    variants = []
    for row, pair in zip(rows, pairs, strict=True):
        positions = list(range(len(setup.base[pair])))
        writes = [
            Patch(
                part.point, site_value(heard[part.point][row], part.point, positions, part.head), positions, part.head
            )
            for part in group
            if part.point is not None and part.hears(routes[row].sender)
        ]
        variants.append(Variant(different.index(pair), writes))
    answers = setup.pairs.answer_ids[different], setup.pairs.wrong_ids[different]
    return variant_metrics(setup.model, setup.batch(different), variants, answers, ["logit_diff"])[:, 0]


# ---------------------------------------------------------------------------------------------- results


def _rows(
    nodes: list[Node],
    groups: list[list[Receiver]],
    patched: Float[Tensor, "groups senders n"],
    baselines: Baselines,
    direction: str,
    seed: int,
    n_boot: int,
) -> list[PathRow]:
    clean, corrupted = baselines.of("logit_diff")
    start, goal = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    reached = [(i, j) for i, group in enumerate(groups) for j, node in enumerate(nodes) if hears(group, node)]
    values = torch.stack([patched[i, j] for i, j in reached], -1)
    interval = recovered_interval(values - start[:, None], goal - start, seed, n_boot)
    return [
        PathRow(
            sender=str(nodes[j]),
            receiver=name_of(groups[i]),
            patched=number(mean),
            recovered=number(effect if direction == "denoise" else 1 - effect),
            effect=number(effect),
            low=number(low),
            high=number(high),
        )
        for (i, j), mean, effect, low, high in zip(
            reached, values.mean(0).tolist(), *(part.tolist() for part in interval), strict=True
        )
    ]


def _warnings(decoder: Decoder, pairs: Pairs, groups: list[list[Receiver]]) -> list[str]:
    found = []
    if pairs.excluded:
        found.append(f"{len(pairs.excluded)} pairs were left out; `excluded` says why.")
    shared = decoder.n_heads // decoder.n_kv_heads
    parts = [part for group in groups for part in group]
    for part in parts:
        if shared > 1 and part.point is not None and part.point.site in ("k", "v") and part.head is not None:
            first = part.head * shared
            heads = f"heads {first} to {first + shared - 1} of layer {part.layer}"
            found.append(f"The receiver {part.name} is read by {heads}, which share it; all of them are changed.")
    return found + few(len(pairs), "pair")
