"""Components of a model as nodes of a graph: their names, and what each adds to the residual stream.

A node is the embedding (`input`), a head (`a3.h1`), an MLP (`m3`) or the output (`logits`); the names are those of
Hanna et al., https://github.com/hannamw/EAP-IG.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from techniques._model import Decoder, Layer, UnsupportedModelError

Components = Literal["heads", "mlps", "heads+mlps"]


class Node(NamedTuple):
    """One component; `layer` and `head` are 0 where they mean nothing."""

    kind: Literal["input", "head", "mlp", "logits"]
    layer: int = 0
    head: int = 0

    def __str__(self) -> str:
        names = {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}
        return names.get(self.kind, self.kind)


INPUT, LOGITS = Node("input"), Node("logits")


def layer_nodes(decoder: Decoder, components: Components = "heads+mlps") -> list[Node]:
    """All heads and MLPs, layer by layer, in the order in which a layer computes them.

    Raises:
        ValueError: `components` is unknown.
    """
    if components not in ("heads", "mlps", "heads+mlps"):
        raise ValueError(f'components is {components!r}; expected "heads", "mlps" or "heads+mlps".')
    return [
        node
        for layer in range(decoder.n_layers)
        for node in (*(Node("head", layer, head) for head in range(decoder.n_heads)), Node("mlp", layer))
        if f"{node.kind}s" in components
    ]


def parse_node(name: str) -> Node | None:
    """The node of a name, or None if it is no node's name."""
    if name in ("input", "logits"):
        return INPUT if name == "input" else LOGITS
    if found := re.fullmatch(r"a(\d+)\.h(\d+)", name):
        return Node("head", int(found[1]), int(found[2]))
    found = re.fullmatch(r"m(\d+)", name)
    return Node("mlp", int(found[1])) if found else None


# ---------------------------------------------------------------------------------------------- linear parts


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale held at what it was for some input: an affine map.

    Attributes:
        gain: What the normed vector is multiplied by.
        offset: What is added last.
        scale: Of each vector, [..., 1].
        is_centred: Whether the mean is taken off, as LayerNorm does and RMSNorm does not.
    """

    gain: Float[Tensor, " d_model"]
    offset: Float[Tensor, " d_model"]
    scale: Float[Tensor, "*points 1"]
    is_centred: bool

    def part(self, x: Float[Tensor, "*points d_model"]) -> Float[Tensor, "*points d_model"]:
        """What a summand of the input becomes; the parts of all summands and the offset make the output."""
        return self._centred(x) * self.gain * self.scale

    def pulled(self, direction: Float[Tensor, "*points d_model"]) -> Float[Tensor, "*points d_model"]:
        """The direction before the norm that reads what `direction` reads after it."""
        return self._centred(direction * self.gain * self.scale)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.is_centred else x


def frozen_norm(
    norm: nn.Module, inputs: Float[Tensor, "*points d_model"], outputs: Float[Tensor, "*points d_model"]
) -> FrozenNorm:
    """Find what a norm does from what it makes of two probes, so that quantised and wrapped weights work as well.

    Raises:
        UnsupportedModelError: `outputs` is not what a LayerNorm or an RMSNorm would make of `inputs`.
    """
    d_model = inputs.shape[-1]
    unit = torch.ones(d_model, dtype=torch.float64)
    unit[1::2] = -1
    unit = unit - unit.mean()
    unit = unit / unit.square().mean().sqrt()
    # Large probes, so that the norm's epsilon does not count; what is even in the input is the offset.
    probe = (100 * unit).to(inputs.dtype).to(inputs.device)
    plus, minus = (_without_hooks(norm)(side.expand(1, 1, -1))[0, 0].double() for side in (probe, -probe))
    offset, gain = (plus + minus) / 2, (plus - minus) / 2 / (probe.double() / 100)
    wide, target = inputs.double(), outputs.double() - offset
    best: FrozenNorm | None = None
    error = torch.inf
    for is_centred in (False, True):
        x = (wide - wide.mean(-1, keepdim=True) if is_centred else wide) * gain
        power = x.square().sum(-1, keepdim=True)
        # Padding beyond a sliding window attends to nothing, so there is nothing to scale.
        scale = torch.where(power > 0, (x * target).sum(-1, keepdim=True) / power, 0.0)
        found = ((x * scale - target).norm() / outputs.double().norm()).item()
        if found < error:
            best, error = FrozenNorm(gain, offset, scale, is_centred), found
    if best is None or error > max(1e-4, 8 * torch.finfo(inputs.dtype).eps):
        raise UnsupportedModelError(
            f"{type(norm).__name__} differs by {error:.3g} of its output from a LayerNorm or RMSNorm with its scale "
            "held fixed; expected one of these. What it reads can't be divided among components."
        )
    return best


def head_outputs(
    layer: Layer, z: Float[Tensor, "*points n_heads d_head"], attn_out: Float[Tensor, "*points d_model"]
) -> Float[Tensor, "*points n_heads d_model"]:
    """What each head adds to the residual stream, biases left out.

    The output projection is run on one head at a time, so any module will do. Where a norm stands between it and the
    stream (Gemma 2 and 3, OLMo 2 and 3), its scale is held at that of the whole, so that the heads still add up.

    Raises:
        UnsupportedModelError: Attention has no output projection, or the norm is of another kind.
    """
    if layer.o_proj is None:
        raise UnsupportedModelError(
            f"{type(layer.attn or layer.block).__name__} has no output projection that reads the heads side by side; "
            "expected one. Its attention can't be split into heads."
        )
    o_proj = _without_hooks(layer.o_proj)

    def project(heads: Tensor) -> Tensor:  # in rows, as quantised maps take no more than two leading dimensions
        return o_proj(heads.flatten(0, -2)).view(*heads.shape[:-1], -1)

    n_heads = z.shape[-2]
    alone = z.unsqueeze(-3) * torch.eye(n_heads, dtype=z.dtype, device=z.device)[..., None]
    silent = project(torch.zeros_like(z).flatten(-2))
    parts = project(alone.flatten(-2)) - silent.unsqueeze(-2)
    if layer.attn_add is None or layer.attn_add is layer.attn or layer.attn_add is layer.o_proj:
        return parts
    norm = frozen_norm(layer.attn_add, parts.sum(-2) + silent, attn_out)
    each = FrozenNorm(norm.gain, norm.offset, norm.scale.unsqueeze(-2), norm.is_centred)
    return each.part(parts.double()).to(parts.dtype)


def _without_hooks(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's function without what `_hooks` has placed around it: a probe is no part of the model's own pass."""
    function: Callable[[Tensor], Tensor] = getattr(module.forward, "forward", module.forward)
    return function
