"""What path patching can send a change to: inputs of heads and MLPs, points of the stream, the logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from techniques._components import Component, component_name
from techniques._hooks import HookPoint
from techniques._model import Decoder
from techniques._nodes import Node


@dataclass(frozen=True)
class Receiver:
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


def parse_receivers(
    decoder: Decoder, receivers: Sequence[Component | list[Component]], senders: list[Node]
) -> list[list[Receiver]]:
    """The receivers by name, each group of those that are changed together.

    Raises:
        ValueError: One is not known, no sender comes before it, or the logits stand in a group.
    """
    if isinstance(receivers, str) or not receivers or not senders:
        raise ValueError(f"There are {len(senders)} senders, and receivers is {receivers!r}; expected a list of each.")
    groups = [
        [_receiver(decoder, part) for part in (given if isinstance(given, list) else [given])] for given in receivers
    ]
    for group in groups:
        if len(group) > 1 and any(part.point is None for part in group):
            raise ValueError("The receiver 'logits' stands in a group; expected it alone, as nothing comes after it.")
        if not any(hears(group, node) for node in senders):
            raise ValueError(
                f"No sender comes before the receiver {name_of(group)!r}; expected at least one that it can read. "
                "Choose senders in earlier layers."
            )
    return groups


def _receiver(decoder: Decoder, given: Component) -> Receiver:
    name = component_name(given)
    if name == "logits":
        return Receiver(name, None, None, decoder.n_layers, reads_mid=False, reads_mlp=False)
    if (found := re.fullmatch(r"resid_post\.(\d+)", name)) and int(found[1]) < decoder.n_layers:
        return Receiver(name, HookPoint("resid_post", int(found[1])), None, int(found[1]), True, True)
    if (found := re.fullmatch(r"m(\d+)", name)) and int(found[1]) < decoder.n_layers:
        return Receiver(name, HookPoint("mlp_out", int(found[1])), None, int(found[1]), not decoder.parallel, False)
    found = re.fullmatch(r"a(\d+)\.h(\d+)<([qkv])>", name)
    if found and int(found[1]) < decoder.n_layers and int(found[2]) < decoder.n_heads:
        layer, head, site = int(found[1]), int(found[2]), found[3]
        if site != "q":
            head //= decoder.n_heads // decoder.n_kv_heads
        return Receiver(name, HookPoint(site, layer), head, layer, reads_mid=False, reads_mlp=False)
    last = decoder.n_layers - 1
    raise ValueError(
        f"The receiver {given!r} is not known; expected an input of a head from a0.h0<q> to "
        f"a{last}.h{decoder.n_heads - 1}<v> (<q>, <k> or <v>), an MLP from m0 to m{last}, resid_post.0 to "
        f"resid_post.{last}, or logits."
    )


def hears(group: list[Receiver], node: Node) -> bool:
    """Whether one of the group reads what the sender writes."""
    return any(part.hears(node) for part in group)


def name_of(group: list[Receiver]) -> str:
    """As in the result."""
    return "+".join(part.name for part in group)
