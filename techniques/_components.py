"""Heads and MLPs as callers name them: "a0.h1" or ("head", 0, 1), "m2" or ("mlp", 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from techniques._model import Decoder
from techniques._nodes import Node, layer_nodes, parse_node

Component = str | tuple[str | int, ...]


def parse_components(decoder: Decoder, components: str | Sequence[Component]) -> list[Node]:
    """The nodes of "heads", "mlps" or "heads+mlps", or of a list of names or tuples.

    Raises:
        ValueError: A component is unknown; the message says which ones there are.
    """
    if isinstance(components, str):
        return layer_nodes(decoder, cast(Any, components))
    return [parse_component(decoder, component) for component in components]


def parse_component(decoder: Decoder, component: Component) -> Node:
    """The node of "a0.h1" or ("head", 0, 1), or of "m2" or ("mlp", 2).

    Raises:
        ValueError: The model has no such component; the message says which ones there are.
    """
    node = parse_node(component_name(component))
    if node is None or node not in layer_nodes(decoder):
        raise ValueError(
            f"The component {component!r} is not known; expected a head from a0.h0 to a{decoder.n_layers - 1}.h"
            f"{decoder.n_heads - 1} or an MLP from m0 to m{decoder.n_layers - 1}."
        )
    return node


def component_name(component: Component) -> str:
    """The name of what may be given as a tuple, such as ("head", 0, 1)."""
    if isinstance(component, str):
        return component
    patterns = {
        ("head", 3): "a{}.h{}",
        ("mlp", 2): "m{}",
        ("head", 4): "a{}.h{}<{}>",
        ("resid_post", 2): "resid_post.{}",
    }
    pattern = patterns.get((str(component[0]), len(component)))
    return pattern.format(*component[1:]) if pattern else str(component)
