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

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._hooks import Change, HookPoint, check_sites, edit, record, run
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
    recovered_interval,
    with_gap,
)
from techniques._results import Header, header, number
from techniques._stats import N_BOOT
from techniques._sweep import Patch, Variant
from techniques._tokens import Batch
from techniques._variants import site_value, variant_metrics
from techniques.ablation import Component, component_name, parse_components
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


@dataclass(frozen=True)
class _Receiver:
    """What reads the change.

    Attributes:
        name: As in the result.
        point: Where its input, or for an MLP its output, is recorded and then written; None for the logits.
        head: Index in the point's head dimension, if it has one.
        layer: Its layer; n_layers for the logits.
        reads_mid: Whether it reads after attention of its own layer (MLPs of sequential blocks, the end of a block).
        reads_mlp: Whether it reads after the MLP of its own layer as well.
    """

    name: str
    point: HookPoint | None
    head: int | None
    layer: int
    reads_mid: bool
    reads_mlp: bool

    def hears(self, sender: Node) -> bool:
        """Whether the sender writes to the stream before this reads it."""
        own = self.reads_mid if sender.kind == "head" else self.reads_mlp
        return sender.layer < self.layer or (sender.layer == self.layer and own)


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
    groups = _parse_receivers(decoder, receivers, nodes)
    encoded, baselines = with_gap(model, encode_pairs(model, tokenizer, pairs, answers), min_gap)
    setup = _set_up(model, decoder, encoded, freeze_mlps, direction)
    patched = _patched(setup, nodes, groups)
    rows = _rows(nodes, groups, patched, baselines, direction, seed, n_boot)
    return PathPatching(
        **header(model, "path_patching", n=len(encoded), seed=seed, warnings=_warnings(decoder, encoded, groups)),
        direction=direction,
        freeze_mlps=freeze_mlps,
        senders=[str(node) for node in nodes],
        receivers=[_name(group) for group in groups],
        pairs=pair_infos(encoded, baselines),
        excluded=encoded.excluded,
        rows=rows,
    )


# ---------------------------------------------------------------------------------------------- receivers


def _parse_receivers(
    decoder: Decoder, receivers: Sequence[Component | list[Component]], senders: list[Node]
) -> list[list[_Receiver]]:
    if isinstance(receivers, str) or not receivers or not senders:
        raise ValueError(f"There are {len(senders)} senders, and receivers is {receivers!r}; expected a list of each.")
    groups = [
        [_receiver(decoder, part) for part in (given if isinstance(given, list) else [given])] for given in receivers
    ]
    for group in groups:
        if len(group) > 1 and any(part.point is None for part in group):
            raise ValueError("The receiver 'logits' stands in a group; expected it alone, as nothing comes after it.")
        if not any(_hears(group, node) for node in senders):
            raise ValueError(
                f"No sender comes before the receiver {_name(group)!r}; expected at least one that it can read. "
                "Choose senders in earlier layers."
            )
    return groups


def _receiver(decoder: Decoder, given: Component) -> _Receiver:
    name = component_name(given)
    if name == "logits":
        return _Receiver(name, None, None, decoder.n_layers, reads_mid=False, reads_mlp=False)
    if (found := re.fullmatch(r"resid_post\.(\d+)", name)) and int(found[1]) < decoder.n_layers:
        return _Receiver(name, HookPoint("resid_post", int(found[1])), None, int(found[1]), True, True)
    if (found := re.fullmatch(r"m(\d+)", name)) and int(found[1]) < decoder.n_layers:
        return _Receiver(name, HookPoint("mlp_out", int(found[1])), None, int(found[1]), not decoder.parallel, False)
    found = re.fullmatch(r"a(\d+)\.h(\d+)<([qkv])>", name)
    if found and int(found[1]) < decoder.n_layers and int(found[2]) < decoder.n_heads:
        layer, head, site = int(found[1]), int(found[2]), found[3]
        if site != "q":
            head //= decoder.n_heads // decoder.n_kv_heads
        return _Receiver(name, HookPoint(site, layer), head, layer, reads_mid=False, reads_mlp=False)
    last = decoder.n_layers - 1
    raise ValueError(
        f"The receiver {given!r} is not known; expected an input of a head from a0.h0<q> to "
        f"a{last}.h{decoder.n_heads - 1}<v> (<q>, <k> or <v>), an MLP from m0 to m{last}, resid_post.0 to "
        f"resid_post.{last}, or logits."
    )


def _hears(group: list[_Receiver], node: Node) -> bool:
    return any(part.hears(node) for part in group)


def _name(group: list[_Receiver]) -> str:
    return "+".join(part.name for part in group)


# ---------------------------------------------------------------------------------------------- runs


Acts = dict[HookPoint, Tensor]


class _Route(NamedTuple):
    """One row of a batch: a pair and a sender."""

    pair: int
    sender: Node


@dataclass(frozen=True)
class _Setup:
    """What all routes have in common: the base prompts, and what both runs made of theirs."""

    model: PreTrainedModel
    decoder: Decoder
    pairs: Pairs
    base: Batch
    last: Int[Tensor, " n"]
    base_acts: Acts
    source_acts: Acts
    freeze_mlps: bool


def _set_up(model: PreTrainedModel, decoder: Decoder, pairs: Pairs, freeze_mlps: bool, direction: str) -> _Setup:
    points = [HookPoint(site, layer) for layer in range(decoder.n_layers) for site in ("z", "attn_out", "mlp_out")]
    clean, corrupted = pairs.batches(0, model.device)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    acts = []
    for batch in (base, source):
        with record(model, points) as values:
            run(model, batch, stop_after=decoder.n_layers - 1)
        acts.append(dict(values))
    return _Setup(model, decoder, pairs, base, last_positions(pairs.clean), acts[0], acts[1], freeze_mlps)


def _patched(setup: _Setup, nodes: list[Node], groups: list[list[_Receiver]]) -> Float[Tensor, "groups senders n"]:
    """Logit difference of every pair after each sender's change reached each receiver; NaN where it cannot."""
    n = len(setup.pairs)
    routes = [_Route(pair, node) for node in nodes for pair in range(n)]
    found = torch.full((len(groups), len(routes)), torch.nan, dtype=torch.float64)
    for start in range(0, len(routes), CHUNK_ROWS):
        part = routes[start : start + CHUNK_ROWS]
        logits, heard = _send(setup, part, groups)
        for i, group in enumerate(groups):
            rows = [row for row, route in enumerate(part) if _hears(group, route.sender)]
            if rows:
                found[i, [start + row for row in rows]] = _receive(setup, part, rows, group, logits, heard)
    return found.reshape(len(groups), len(nodes), n)


def _send(
    setup: _Setup, routes: list[_Route], groups: list[list[_Receiver]]
) -> tuple[Float[Tensor, "routes d_vocab"], Acts]:
    """Step 2 for a batch of routes: logits after the direct route, and what each receiver reads."""
    pairs = torch.tensor([route.pair for route in routes])
    ids = Batch(setup.base.input_ids[pairs], setup.base.attention_mask[pairs])
    edits: dict[HookPoint, Change] = {}
    for layer in range(setup.decoder.n_layers):
        edits |= _held(setup, routes, layer)
    points = {part.point for group in groups for part in group if part.point is not None}
    # Recorded before it is held: what an MLP makes of the change, although it does not pass it on.
    with record(setup.model, points) as heard, edit(setup.model, edits):
        logits = logits_at(setup.model, ids, torch.arange(len(routes)), setup.last[pairs])
    return logits, heard


def _held(setup: _Setup, routes: list[_Route], layer: int) -> dict[HookPoint, Change]:
    """Edits that hold a layer at the base run, but for the senders in it."""
    z, attn_out, mlp_out = (HookPoint(site, layer) for site in ("z", "attn_out", "mlp_out"))
    pairs = [route.pair for route in routes]
    own = [(row, route) for row, route in enumerate(routes) if route.sender.layer == layer]
    heads = [(row, route) for row, route in own if route.sender.kind == "head"]
    mlps = [(row, route) for row, route in own if route.sender.kind == "mlp"]

    def change_heads(value: Tensor) -> Tensor:
        new = setup.base_acts[z][pairs]
        for row, (pair, sender) in heads:
            new[row, :, sender.head] = setup.source_acts[z][pair, :, sender.head]
        return new

    def hold_attention(value: Tensor) -> Tensor:
        new = setup.base_acts[attn_out][pairs]
        for row, _ in heads:
            new[row] = value[row]
        return new

    def hold_mlp(value: Tensor) -> Tensor:
        new = setup.base_acts[mlp_out][pairs] if setup.freeze_mlps else value.clone()
        for row, (pair, _) in mlps:
            new[row] = setup.source_acts[mlp_out][pair]
        return new

    return {
        attn_out: hold_attention,
        **({z: change_heads} if heads else {}),
        **({mlp_out: hold_mlp} if mlps or setup.freeze_mlps else {}),
    }


def _receive(
    setup: _Setup,
    routes: list[_Route],
    rows: list[int],
    group: list[_Receiver],
    logits: Float[Tensor, "routes d_vocab"],
    heard: Acts,
) -> Float[Tensor, " rows"]:
    """Step 3: the logit difference after the receivers alone were given what they heard."""
    pairs = [routes[row].pair for row in rows]
    if group[0].point is None:
        right, wrong = (ids[pairs] for ids in setup.pairs.answer_pair)
        return metric_values(logits[rows], right, wrong, "logit_diff").double().cpu()
    variants = []
    for row, pair in zip(rows, pairs, strict=True):
        positions = list(range(len(setup.pairs.clean[pair])))
        writes = [
            Patch(
                part.point, site_value(heard[part.point], part.point, row, positions, part.head), positions, part.head
            )
            for part in group
            if part.point is not None and part.hears(routes[row].sender)
        ]
        variants.append(Variant(pair, writes))
    return variant_metrics(setup.model, setup.base, variants, setup.pairs.answer_pair, ["logit_diff"])[:, 0]


# ---------------------------------------------------------------------------------------------- results


def _rows(
    nodes: list[Node],
    groups: list[list[_Receiver]],
    patched: Float[Tensor, "groups senders n"],
    baselines: Baselines,
    direction: str,
    seed: int,
    n_boot: int,
) -> list[PathRow]:
    clean, corrupted = baselines.of("logit_diff")
    start, goal = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    reached = [(i, j) for i, group in enumerate(groups) for j, node in enumerate(nodes) if _hears(group, node)]
    values = torch.stack([patched[i, j] for i, j in reached], -1)
    interval = recovered_interval(values - start[:, None], goal - start, seed, n_boot)
    return [
        PathRow(
            sender=str(nodes[j]),
            receiver=_name(groups[i]),
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


def _warnings(decoder: Decoder, pairs: Pairs, groups: list[list[_Receiver]]) -> list[str]:
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
    return found
