"""The graph of a model's components: which reads from which, and runs in which chosen edges carry corrupted values.

A sender is the embedding, a head or an MLP; a receiver is the query, key or value of a head, an MLP, or the output. An
edge from each sender to each receiver after it: what the receiver reads is the sum of all that came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from techniques._hooks import HookPoint, edit
from techniques._model import Decoder
from techniques._nodes import INPUT, LOGITS, Node, head_outputs
from techniques._tokens import Batch

BUDGET_BYTES = 512 * 2**20  # of what senders add and receivers' gradients in a batch of pairs


class Receiver(NamedTuple):
    """Where a component reads the residual stream; `slot` is q, k or v of a head, and empty for others.

    For k and v the head is the key-value head, which several heads may share.
    """

    node: Node
    slot: str = ""
    is_shared: bool = False

    def __str__(self) -> str:
        head = f"a{self.node.layer}.kv{self.node.head}" if self.is_shared else str(self.node)
        return f"{head}<{self.slot}>" if self.slot else head


@dataclass(frozen=True)
class Graph:
    """All senders and receivers of a model, in the order in which they are computed.

    Attributes:
        decoder: The model's parts.
        senders: The embedding, then each layer's heads and MLP.
        receivers: Each layer's queries, keys, values and MLP, then the output.
        n_before: For each receiver, how many of the senders, from the first, it reads.
    """

    decoder: Decoder
    senders: list[Node]
    receivers: list[Receiver]
    n_before: list[int]

    @property
    def possible(self) -> Bool[Tensor, "senders receivers"]:
        """Which pairs are edges."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self.n_before)

    def edge_name(self, sender: int, receiver: int) -> str:
        """As `a0.h1->a1.h0<k>`."""
        return f"{self.senders[sender]}->{self.receivers[receiver]}"

    def edge_index(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """(sender, receiver) of each name.

        Raises:
            ValueError: There is no such edge.
        """
        senders = {str(node): i for i, node in enumerate(self.senders)}
        receivers = {str(receiver): i for i, receiver in enumerate(self.receivers)}
        found = []
        for name in names:
            sender, _, receiver = name.partition("->")
            at = senders.get(sender, -1), receivers.get(receiver, -1)
            if min(at) < 0 or at[0] >= self.n_before[at[1]]:
                raise ValueError(
                    f"There is no edge {name!r}; expected sender->receiver, where the senders are {_some(senders)}, "
                    f"the receivers {_some(receivers)}, and the sender is computed before the receiver."
                )
            found.append(at)
        return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed if len(listed) <= 8 else [*listed[:4], "...", *listed[-3:]])


def graph_of(decoder: Decoder) -> Graph:
    """The graph of a model."""
    senders, receivers, n_before = [INPUT], list[Receiver](), list[int]()
    is_shared = decoder.n_kv_heads < decoder.n_heads
    for layer in range(decoder.n_layers):
        for slot, n in (("q", decoder.n_heads), ("k", decoder.n_kv_heads), ("v", decoder.n_kv_heads)):
            receivers += [Receiver(Node("head", layer, head), slot, is_shared and slot != "q") for head in range(n)]
        n_before += [len(senders)] * (len(receivers) - len(n_before))
        receivers.append(Receiver(Node("mlp", layer)))
        n_before.append(len(senders) + (0 if decoder.parallel else decoder.n_heads))
        senders += [Node("head", layer, head) for head in range(decoder.n_heads)] + [Node("mlp", layer)]
    return Graph(decoder, senders, [*receivers, Receiver(LOGITS)], [*n_before, len(senders)])


def sender_points(decoder: Decoder) -> list[HookPoint]:
    """What has to be recorded for `sender_outputs`."""
    return [
        HookPoint("resid_pre", 0),
        *(HookPoint(site, layer) for layer in range(decoder.n_layers) for site in ("z", "attn_out", "mlp_out")),
    ]


@torch.no_grad()
def sender_outputs(decoder: Decoder, seen: dict[HookPoint, Tensor]) -> Float[Tensor, "batch pos senders d_model"]:
    """What each sender adds to the residual stream, on the device of the embedding's."""
    parts = [seen[HookPoint("resid_pre", 0)].unsqueeze(2)]
    for layer, modules in enumerate(decoder.layers):
        z, attn, mlp = (seen[HookPoint(site, layer)] for site in ("z", "attn_out", "mlp_out"))
        parts += [head_outputs(modules, z, attn), mlp.unsqueeze(2)]
    return torch.cat([part.to(parts[0].device) for part in parts], 2)


# ---------------------------------------------------------------------------------------------- partial runs


class _Rows(NamedTuple):
    """How one layer's receivers share the rows of a run.

    Attributes:
        wanted: For each copy of the batch after the first, which senders its input has uncorrupted.
        slots: For q, k and v, the copy that each head is taken from.
        mlp: The copy that the MLP is taken from.
        mlp_wanted: Which senders the MLP's input has uncorrupted.
    """

    wanted: list[Bool[Tensor, " senders"]]
    slots: dict[str, list[int]]
    mlp: int
    mlp_wanted: Bool[Tensor, " senders"]


def _rows(graph: Graph, kept: Bool[Tensor, "senders receivers"], layer: int) -> _Rows:
    """Receivers that read the same set of edges share a copy of the batch."""
    copies: dict[tuple[bool, ...], int] = {}

    def copy_of(column: Bool[Tensor, " senders"]) -> int:
        return 0 if column.all() else copies.setdefault(tuple(column.tolist()), len(copies) + 1)

    slots: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    mlp, mlp_wanted = 0, kept[:, 0]
    for i, receiver in enumerate(graph.receivers):
        if receiver.node.layer != layer or receiver.node == LOGITS:
            continue
        column = kept[:, i] | ~graph.possible[:, i]
        if receiver.slot:
            slots[receiver.slot].append(copy_of(column))
        else:
            mlp_wanted = column
            # A block that is not parallel has its MLP's input set after attention, in the first copy there is.
            mlp = copy_of(column) if graph.decoder.parallel else int(not column.all())
    return _Rows([torch.tensor(column) for column in copies], slots, mlp, mlp_wanted)


@dataclass
class _Run:
    """One forward pass over copies of a batch: the first is the run itself, the others serve its receivers' inputs."""

    graph: Graph
    kept: Bool[Tensor, "senders receivers"]
    corrupted: Float[Tensor, "batch pos senders d_model"]
    rows: list[_Rows]
    current: list[Tensor] = field(default_factory=list)
    stream: Tensor | None = None
    z: Tensor | None = None

    @property
    def n(self) -> int:
        return len(self.corrupted)

    def missing(self, wanted: Bool[Tensor, " senders"], like: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """What turns the stream as it is into one whose unwanted senders are corrupted."""
        now = torch.cat([part.to(like.device) for part in self.current], 2)
        unwanted = ~wanted[: now.shape[2]].to(like.device)
        change = self.corrupted[:, :, : now.shape[2]].to(like.device) - now
        return change[:, :, unwanted].sum(2)

    def edits(self) -> dict[HookPoint, Callable[[Tensor], Tensor]]:
        """What the hooks do, layer by layer."""
        found: dict[HookPoint, Callable[[Tensor], Tensor]] = {}
        n_layers = self.graph.decoder.n_layers
        for layer in range(n_layers):
            found[HookPoint("resid_pre", layer)] = partial(self.enter, layer)
            found |= {HookPoint(slot, layer): partial(self.pick, layer, slot) for slot in "qkv"}
            found[HookPoint("z", layer)] = self.keep_z
            found[HookPoint("attn_out", layer)] = partial(self.after_attention, layer)
            found[HookPoint("mlp_out", layer)] = partial(self.after_mlp, layer)
        found[HookPoint("resid_post", n_layers - 1)] = self.leave
        return found

    def enter(self, layer: int, value: Tensor) -> Tensor:
        base = value[: self.n]
        if layer == 0:
            self.current = [base.unsqueeze(2)]
        copies = [base, *(base + self.missing(wanted, base) for wanted in self.rows[layer].wanted)]
        n_copies = len(value) // self.n
        self.stream = torch.cat([*copies, *[base] * (n_copies - len(copies))])
        return self.stream

    def pick(self, layer: int, slot: str, value: Tensor) -> Tensor:
        copies = value.view(-1, self.n, *value.shape[1:])
        heads = [copies[copy, :, :, head] for head, copy in enumerate(self.rows[layer].slots[slot])]
        return torch.cat([torch.stack(heads, 2), value[self.n :]])

    def keep_z(self, value: Tensor) -> Tensor:
        self.z = value[: self.n]
        return value

    def after_attention(self, layer: int, value: Tensor) -> Tensor:
        assert self.z is not None
        assert self.stream is not None
        base = value[: self.n]
        self.current.append(head_outputs(self.graph.decoder.layers[layer], self.z, base))
        if self.graph.decoder.parallel or not self.rows[layer].mlp:
            return value
        middle = self.stream[: self.n] + base
        copy = middle + self.missing(self.rows[layer].mlp_wanted, middle) - self.stream[self.n : 2 * self.n]
        return torch.cat([base, copy, value[2 * self.n :]])

    def after_mlp(self, layer: int, value: Tensor) -> Tensor:
        copies = value.view(-1, self.n, *value.shape[1:])
        base = copies[self.rows[layer].mlp]
        self.current.append(base.unsqueeze(2))
        return torch.cat([base, value[self.n :]])

    def leave(self, value: Tensor) -> Tensor:
        base = value[: self.n]
        return torch.cat([base + self.missing(self.kept[:, -1], base), value[self.n :]])


@torch.no_grad()
def run_edges(
    model: PreTrainedModel,
    graph: Graph,
    batch: Batch,
    corrupted: Float[Tensor, "batch pos senders d_model"],
    kept: Bool[Tensor, "senders receivers"],
    read: Callable[[Batch], Tensor],
) -> Tensor:
    """Run a batch in which only the kept edges carry what their senders compute; all others carry `corrupted`.

    Each query, key, value and MLP reads its own mixture, so the batch holds one copy of itself for every different
    mixture of a layer. What a sender computes depends on the mixtures before it.

    Args:
        model: The model.
        graph: Its graph.
        batch: The clean prompts.
        corrupted: What the senders add on the corrupted prompts, as `sender_outputs` gives it.
        kept: The edges that are left as they are.
        read: Runs the model on a batch and reads what is wanted from its first rows.
    """
    rows = [_rows(graph, kept, layer) for layer in range(graph.decoder.n_layers)]
    run = _Run(graph, kept, corrupted, rows)
    n_copies = 1 + max(max(len(one.wanted), one.mlp) for one in rows)
    with edit(model, run.edits()):
        return read(Batch(batch.input_ids.repeat(n_copies, 1), batch.attention_mask.repeat(n_copies, 1)))


def receiver_columns(graph: Graph, layer: int) -> dict[str, list[int]]:
    """Indices of one layer's receivers, by q, k, v and (under the empty name) the MLP."""
    found: dict[str, list[int]] = {}
    for i, receiver in enumerate(graph.receivers):
        if receiver.node.layer == layer and receiver.node != LOGITS:
            found.setdefault(receiver.slot, []).append(i)
    return found


def max_tokens(graph: Graph) -> int:
    """How many tokens a batch may have for what senders add and receivers' gradients to fit the budget."""
    per_token = 4 * graph.decoder.d_model * (3 * len(graph.senders) + len(graph.receivers))
    return max(1, BUDGET_BYTES // per_token)
