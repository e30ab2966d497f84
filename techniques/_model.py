"""Where the parts of a Hugging Face decoder are: the only file in `techniques` that knows how models are built.

Parts are found by structure, not by a table of architectures, and every technique that relies on them checks the
outcome against the model at hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._tokens import Batch, check_finite, check_model


class UnsupportedModelError(ValueError):
    """The model lacks a part that a technique needs, or does more with it than the technique knows."""


# In the order in which a block computes them.
SITES = (
    "resid_pre",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_pre",
    "mlp_post",
    "mlp_out",
    "resid_post",
)
PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")  # what configs call parallel blocks
FUSED = {
    "query_key_value": True,
    "c_attn": False,
    "qkv_proj": False,
    "Wqkv": False,
}  # whether grouped by key-value head


class Heads(NamedTuple):
    """Where the heads of one site lie in a vector that a projection reads or writes.

    The vector is [groups, slots, d_head]; the site is the slots from `start` to before `stop` of every group.
    """

    groups: int
    start: int
    stop: int
    d_head: int


class Site(NamedTuple):
    """Where a site is read: at the input or the output of a module; `pattern` is the second output of attention."""

    module: nn.Module
    is_input: bool
    heads: Heads | None = None


@dataclass(frozen=True)
class Layer:
    """The modules of one block; None where the block has no such module of its own.

    Attributes:
        block: Its input is resid_pre, its output resid_post.
        attn: The attention module.
        attn_add: The module whose output is what attention adds to the stream: `attn`, a norm after it, or its o_proj.
        o_proj: Attention's output projection; its input is z, the heads side by side.
        mlp: The MLP or mixture of experts.
        mlp_add: The module whose output is what the MLP adds to the stream.
        mid: Its input is resid_mid: the second norm, or the MLP where that has no norm before it. None if parallel.
        sites: Where each site is read, in the order of SITES; only those that this block has.
    """

    block: nn.Module
    attn: nn.Module | None
    attn_add: nn.Module | None
    o_proj: nn.Module | None
    mlp: nn.Module | None
    mlp_add: nn.Module | None
    mid: nn.Module | None
    sites: Mapping[str, Site]


@dataclass(frozen=True)
class Decoder:
    """The modules that the residual stream passes through, in order.

    Attributes:
        blocks: n_layers of them; the input of `blocks[layer]` is resid_pre of that layer.
        layers: The parts of each block.
        embed: The token embedding.
        ln_final: The final norm; its input is resid_post of the last layer.
        unembed: [..., d_model] -> [..., d_vocab].
        soft_cap: The model squashes its logits into (-soft_cap, soft_cap), as Gemma 2 does; None if it does not.
        n_heads: Query heads of each attention.
        n_kv_heads: Key-value heads; each serves n_heads / n_kv_heads query heads.
        d_model: Width of the residual stream.
        d_head: Width of one head of z.
        d_vocab: Logits at each position.
        parallel: Attention and MLP both read resid_pre, so there is no resid_mid.
    """

    blocks: nn.ModuleList
    layers: tuple[Layer, ...]
    embed: nn.Module
    ln_final: nn.Module
    unembed: nn.Module
    soft_cap: float | None
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    parallel: bool

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def logits(self, resid: Float[Tensor, "*points d_model"]) -> Float[Tensor, "*points d_vocab"]:
        """Decode a point of the residual stream as the model decodes its last one; keeps the dtype."""
        logits: Tensor = self.unembed(self.ln_final(resid))
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


class _Found(NamedTuple):
    """A decoder found earlier, with each of its modules' children as they were then."""

    decoder: Decoder
    children: list[tuple[Mapping[str, nn.Module | None], dict[str, nn.Module | None]]]


_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the blocks, the final norm and the unembedding of a decoder-only model, also under a PEFT adapter.

    The residual stream starts at the token embedding, so the blocks are the list of `num_hidden_layers` modules that
    lies beside it, and the final norm is the last norm beside them: the embedding may have one of its own before.
    What was found is kept as long as the model's modules are the same ones.

    Raises:
        UnsupportedModelError: The model is no decoder with a language-model head, or is built in another way.
    """
    check_model(model)
    known = _found.get(model)
    if known is None or any(now != then for now, then in known.children):
        known = _Found(
            _search(model), [(part._modules, dict(part._modules)) for part in model.modules() if part._modules]
        )
        _found[model] = known
    return known.decoder


def _search(model: PreTrainedModel) -> Decoder:
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"The model is a {type(model).__module__}.{type(model).__name__}; expected a Hugging Face model, or one "
            "under a PEFT adapter. Pass the plain model that the wrapper holds, or load it without a wrapper."
        )
    config = model.config.get_text_config(decoder=True)
    embedding, unembed = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if unembed is not None:
        for parent in model.modules():
            children = dict(parent.named_children())
            if any(child is embedding for child in children.values()):
                blocks = _blocks(children, config.num_hidden_layers)
                ln_final = _final_norm(children)
                if blocks is not None and ln_final is not None:
                    return _decoder(config, blocks, embedding, ln_final, unembed)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no token embedding beside a list of {config.num_hidden_layers} blocks and a final "
        "norm, with an unembedding. A decoder-only language model was expected; load one with AutoModelForCausalLM."
    )


def _decoder(config: Any, blocks: nn.ModuleList, embed: nn.Module, ln_final: nn.Module, unembed: nn.Module) -> Decoder:
    n_heads = int(getattr(config, "num_attention_heads", None) or 1)
    layers = tuple(_layer(config, n_heads, block) for block in blocks)
    sites = layers[0].sites
    k, z = (sites[name].heads if name in sites else None for name in ("k", "z"))
    return Decoder(
        blocks=blocks,
        layers=layers,
        embed=embed,
        ln_final=ln_final,
        unembed=unembed,
        soft_cap=getattr(config, "final_logit_softcapping", None),
        n_heads=n_heads,
        n_kv_heads=k.groups * (k.stop - k.start) if k else n_heads,
        d_model=config.hidden_size,
        d_head=z.d_head if z else config.hidden_size // n_heads,
        d_vocab=config.vocab_size,
        parallel=layers[0].mlp is not None and layers[0].mid is None,
    )


def _blocks(children: dict[str, nn.Module], n_layers: int) -> nn.ModuleList | None:
    lists = (child for child in children.values() if isinstance(child, nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == n_layers), None)


def _is_norm(name: str, module: nn.Module) -> bool:
    # The attribute's name counts too: PEFT may have wrapped the norm in a class that is not called one.
    text = f"{name} {type(module).__name__}".lower()
    return "norm" in text or "ln_" in text


def _final_norm(children: dict[str, nn.Module]) -> nn.Module | None:
    norms = [child for name, child in children.items() if _is_norm(name, child)]
    return norms[-1] if norms else None


def _layer(config: Any, n_heads: int, block: nn.Module) -> Layer:
    children = dict(block.named_children())
    norms = {name: child for name, child in children.items() if _is_norm(name, child)}
    others = [child for name, child in children.items() if name not in norms]
    attn = next((child for child in others if "Attention" in type(child).__name__), None)
    if attn is None:
        return Layer(block, None, None, None, None, None, None, _sites(block, {}))
    mlp = next((child for child in others if child is not attn and any(child.children())), None)
    reads, o_proj = _projections(attn)
    mlp_proj = _last_linear(mlp) if mlp is not None else None
    after_attn, after_mlp = _post_norms(norms)
    attn_add = after_attn or (o_proj if _adds_residual(attn) else attn)
    mlp_add = after_mlp or (mlp_proj if mlp is not None and _adds_residual(mlp) else mlp)
    before = [name for name in norms if norms[name] not in (after_attn, after_mlp)]
    second = sorted(before, key=lambda name: "input" not in name)[1:]  # Falcon lists its first norm last
    mid = norms[second[-1]] if second else mlp if after_mlp is not None else None
    if mlp is None or any(getattr(config, flag, False) for flag in PARALLEL):
        mid = None
    found = {"pattern": Site(attn, False)} | (_head_sites(reads, o_proj, n_heads) if o_proj is not None else {})
    found |= _neuron_sites(mlp, mlp_proj) if mlp is not None else {}
    added = {"attn_out": (attn_add, False), "mlp_out": (mlp_add, False), "resid_mid": (mid, True)}
    found |= {name: Site(part, is_input) for name, (part, is_input) in added.items() if part is not None}
    return Layer(block, attn, attn_add, o_proj, mlp, mlp_add, mid, _sites(block, found))


def _sites(block: nn.Module, found: Mapping[str, Site]) -> dict[str, Site]:
    every = {"resid_pre": Site(block, True), "resid_post": Site(block, False), **found}
    return {name: every[name] for name in SITES if name in every}


def _post_norms(norms: Mapping[str, nn.Module]) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms that attention's and the MLP's output pass before they are added to the stream, as in Gemma 2."""
    after_mlp = next((norms[name] for name in norms if re.match("post_(feedforward|mlp|ffn)", name)), None)
    after_attn = next((norms[name] for name in norms if re.match("post_(self_)?att", name)), None)
    return (after_attn, after_mlp) if after_mlp is not None else (None, None)


def _adds_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(type(module).forward).parameters


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear map, also if it is quantised or has an adapter; None for other modules."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(width, int) for width in found):
            return cast(tuple[int, int], tuple(found))
    return None


def _projections(attn: nn.Module) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The projections that read the stream, by name, and the one that writes to it."""
    linear = {name: child for name, child in attn.named_children() if widths(child) is not None}
    if not linear:  # GPT-Neo wraps its attention once more
        inner = next((child for child in attn.children() if any(child.children())), None)
        return _projections(inner) if inner is not None else ({}, None)
    writes = [name for name in linear if name in ("o_proj", "out_proj", "c_proj", "dense", "wo")]
    reads = {name: child for name, child in linear.items() if name in ("q_proj", "k_proj", "v_proj", *FUSED)}
    return reads, linear[writes[0]] if len(writes) == 1 else None


def _head_sites(reads: Mapping[str, nn.Module], o_proj: nn.Module, n_heads: int) -> dict[str, Site]:
    width = cast(tuple[int, int], widths(o_proj))[0]
    if width % n_heads:
        return {}
    d_head = width // n_heads
    sites = {"z": Site(o_proj, True, Heads(1, 0, n_heads, d_head))}
    for name, module in reads.items():
        slots = cast(tuple[int, int], widths(module))[1] // d_head
        if name in FUSED:
            n_kv = max(1, (slots - n_heads) // 2)
            groups = n_kv if FUSED[name] else 1
            q, kv = n_heads // groups, n_kv // groups
            bounds = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
            sites |= {site: Site(module, False, Heads(groups, *bounds[site], d_head)) for site in bounds}
        else:
            sites[name[0]] = Site(module, False, Heads(1, 0, slots, d_head))
    return sites


def _last_linear(mlp: nn.Module) -> nn.Module | None:
    linear = [child for child in mlp.children() if widths(child) is not None]
    return linear[-1] if linear else None


def _neuron_sites(mlp: nn.Module, mlp_proj: nn.Module | None) -> dict[str, Site]:
    """mlp_pre at the activation function's input, mlp_post at the last projection's; a mixture of experts has none."""
    if mlp_proj is None or any("expert" in name for name, _ in mlp.named_children()):
        return {}
    others = [child for child in mlp.children() if widths(child) is None and not isinstance(child, nn.Dropout)]
    pre = {"mlp_pre": Site(others[0], True)} if len(others) == 1 else {}
    return {**pre, "mlp_post": Site(mlp_proj, True)}


@contextmanager
def record_inputs(modules: Iterable[nn.Module], keep: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Record `keep(hidden states)` at each call of `modules`, in the order in which they run, until the block ends."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(keep(args[0] if args else kwargs["hidden_states"]))

    with ExitStack() as hooks:  # removes the hooks already placed even if placing a later one fails
        for module in dict.fromkeys(modules):  # a block that stands at two depths needs one hook, as it runs twice
            hooks.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield seen


def logits_at(
    model: PreTrainedModel, batch: Batch, rows: Int[Tensor, " points"], positions: Int[Tensor, " points"]
) -> Float[Tensor, "points d_vocab"]:
    """Run the model once and return its own logits at `(rows[i], positions[i])`, in its dtype and on its device.

    The unembedding runs at those positions alone where the model allows it, since logits at all positions of a long
    prompt can need more memory than the model.

    Raises:
        ValueError: A logit is infinite or not a number.
    """
    kept, columns = torch.unique(positions, return_inverse=True)  # kept is sorted; positions == kept[columns]
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model  # below PEFT's wrapper
    can_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
    limit = {"logits_to_keep": kept.to(batch.input_ids.device)} if can_keep else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **limit)
    logits: Tensor = output.logits[rows, columns if can_keep else positions]
    check_finite(logits)
    return logits
