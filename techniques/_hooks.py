"""Read and write a model's activations at named sites while it runs, and leave no trace.

The names are TransformerLens': `blocks.3.hook_resid_pre`, `blocks.3.attn.hook_z`. Values have these shapes:

    resid_pre, resid_mid, resid_post, attn_out, mlp_out    [batch pos d_model]
    q, z                                                   [batch pos n_heads d_head]
    k, v                                                   [batch pos n_kv_heads d_head]
    pattern                                                [batch n_heads query key]
    mlp_pre, mlp_post                                      [batch pos d_mlp]

attn_out and mlp_out are what is added to the residual stream. q, k and v are what the projections give, before any norm
and rotary embedding. mlp_pre is the input of the activation function, mlp_post the input of the last projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._model import SITES, Decoder, Heads, Layer, Site, UnsupportedModelError, find_decoder
from techniques._site_values import (
    Look,
    eager_attention,
    join_heads,
    note_heads,
    note_input,
    note_output,
    on_input,
    on_output,
    pattern_of,
    placement,
    split_heads,
    weighted,
)
from techniques._taps import Placement, after, placed
from techniques._tokens import Batch, check_eval, check_finite

Change = Callable[[Tensor], Tensor]


class HookPoint(NamedTuple):
    """A site of one layer; as text, TransformerLens' name of it."""

    site: str
    layer: int

    def __str__(self) -> str:
        prefix = {"q": "attn.", "k": "attn.", "v": "attn.", "z": "attn.", "pattern": "attn."}.get(self.site, "")
        name = {"mlp_pre": "mlp.hook_pre", "mlp_post": "mlp.hook_post"}.get(self.site, f"{prefix}hook_{self.site}")
        return f"blocks.{self.layer}.{name}"


def hook_point(name: str, layer: int | None = None) -> HookPoint:
    """A point from a site's name and a layer, or from a full name such as `blocks.3.attn.hook_z`.

    Raises:
        ValueError: The name is not known, or no layer is given, or two.
    """
    if name in SITES:
        if layer is None:
            raise ValueError(f"The site {name!r} has no layer; expected one. Give layer=, or use {HookPoint(name, 0)}.")
        return HookPoint(name, layer)
    full = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    for site in SITES:
        if full and name == str(HookPoint(site, int(full[1]))):
            if layer not in (None, int(full[1])):
                raise ValueError(
                    f"The name {name!r} already has a layer, but layer={layer} was given. Drop one of them."
                )
            return HookPoint(site, int(full[1]))
    raise ValueError(
        f"The site {name!r} is not known; expected one of {', '.join(SITES)}, or a full name such as "
        f"{', '.join(str(HookPoint(site, 0)) for site in ('resid_pre', 'z', 'mlp_post'))}."
    )


def points_in(decoder: Decoder, sites: Iterable[str]) -> list[HookPoint]:
    """Points of each site in all layers, or in the one layer that its full name has.

    Raises:
        ValueError: A name is not known, or its layer does not exist.
        UnsupportedModelError: A layer has no such site.
    """
    layers = range(decoder.n_layers)
    by_site = [[hook_point(s)] if s.startswith("blocks.") else [HookPoint(s, i) for i in layers] for s in sites]
    points = [hook_point(point.site, point.layer) for points in by_site for point in points]
    for point in points:
        find_site(decoder, point)
    return points


def find_site(decoder: Decoder, point: HookPoint) -> tuple[Layer, Site]:
    """The layer of a point and where its site is read.

    Raises:
        ValueError: The model has no such layer.
        UnsupportedModelError: The layer has no such site.
    """
    if not 0 <= point.layer < decoder.n_layers:
        raise ValueError(
            f"Layer {point.layer} does not exist; the model has {decoder.n_layers} layers. "
            f"Choose one from 0 to {decoder.n_layers - 1}."
        )
    layer = decoder.layers[point.layer]
    site = layer.sites.get(point.site)
    if site is None:
        why = " Its attention and MLP both read resid_pre, so nothing lies between them." if decoder.parallel else ""
        raise UnsupportedModelError(
            f"Layer {point.layer} of this model has no {point.site}; expected one of {', '.join(layer.sites)}."
            f"{why if point.site == 'resid_mid' else ''}"
        )
    return layer, site


@contextmanager
def record(
    model: PreTrainedModel, points: Iterable[HookPoint], keep: Change | None = None
) -> Iterator[dict[HookPoint, Tensor]]:
    """Record values at `points` in every forward pass inside; the last pass stands in the dict.

    Args:
        model: A decoder-only Hugging Face model.
        points: Where to record.
        keep: What to keep of a value, such as one position; the value itself if None. Values are not detached:
            `torch.autograd.grad` works with respect to a value that is kept whole.

    Yields:
        Values by point, in their own dtype and on the device where they were computed.

    Raises:
        ValueError: A layer does not exist.
        UnsupportedModelError: The model lacks a site.
    """
    found: dict[HookPoint, Tensor] = {}
    decoder, wanted = find_decoder(model), list(points)
    placements = [_recorder(*find_site(decoder, point), point, found, keep) for point in wanted]
    with ExitStack() as stack:
        if any(point.site == "pattern" for point in wanted):
            stack.enter_context(eager_attention(model))
        stack.enter_context(placed(placements))
        yield found


def _recorder(
    layer: Layer, site: Site, point: HookPoint, found: dict[HookPoint, Tensor], keep: Change | None
) -> Placement:
    if point.site == "pattern":
        change = _seen(point, found, keep)
        return Placement(site.module, False, after(lambda output: change(pattern_of(output))))
    if site.heads is not None:
        see = _seen_heads(site.heads, _seen(point, found, keep))
        if keep is None and point.site == "z" and site.heads.groups == 1:
            return Placement(site.module, True, note_heads(point, found, site.heads, on_input(see)))
        return placement(site, see)
    if point.site == "mlp_out" and layer.mid is None:
        look = _seen(point, found, keep)
        # Falcon adds attention's output to it in place.
        return placement(site, lambda raw: raw.clone() if look(raw) is None else None)
    if keep is None:
        return Placement(site.module, site.is_input, (note_input if site.is_input else note_output)(point, found))
    return placement(site, _seen(point, found, keep))


def _seen(point: HookPoint, found: dict[HookPoint, Tensor], keep: Change | None) -> Look:
    def see(value: Tensor) -> None:
        found[point] = value if keep is None else keep(value)

    return see


def _seen_heads(heads: Heads, see: Look) -> Look:
    def split(raw: Tensor) -> Tensor | None:
        value = split_heads(raw, heads)
        see(value)
        # What is recorded has to be what is computed with, or no gradient would reach it.
        return join_heads(raw, heads, value) if raw.requires_grad else None

    return split


@contextmanager
def edit(model: PreTrainedModel, edits: Mapping[HookPoint, Change]) -> Iterator[None]:
    """Replace the value at each point by a function of it, in every forward pass inside, `generate` included.

    A function gets the value of the pass, whose `pos` is the number of new tokens, and returns one of the same shape;
    it must not change the value in place. resid_mid is written through what attention adds to resid_pre, so that both
    the MLP and the stream see it. Gradients flow through the functions.

    Raises:
        ValueError: A layer does not exist, or a function returned a value of another shape.
        UnsupportedModelError: The model lacks a site.
        RuntimeError: An edit never ran, although the block ended without an error.
    """
    fired: set[HookPoint] = set()
    with ExitStack() as stack:
        if any(point.site == "pattern" for point in edits):
            stack.enter_context(eager_attention(model))
        stack.enter_context(placed(editors(find_decoder(model), edits, fired)))
        yield
    if missed := [str(point) for point in edits if point not in fired]:
        raise RuntimeError(
            f"The edit at {missed[0]} never ran; expected a forward pass through it. Run the model inside the block."
        )


def editors(decoder: Decoder, edits: Mapping[HookPoint, Change], fired: set[HookPoint]) -> list[Placement]:
    """What `edit` places on the modules; the points that were reached are added to `fired`."""
    placements: list[Placement] = []
    # In the order in which the model computes them, so that each sees the edits before it.
    for point in sorted(edits, key=lambda point: SITES.index(point.site) if point.site in SITES else 0):
        layer, site = find_site(decoder, point)
        change = _checked(point, edits[point], fired)
        if point.site == "pattern":
            placements += _pattern_editor(layer, change)
        elif point.site == "resid_mid":
            placements += _mid_editor(layer, change)
        else:
            placements.append(placement(site, _through(site.heads, change)))
    return placements


def _checked(point: HookPoint, change: Change, fired: set[HookPoint]) -> Change:
    def checked(value: Tensor) -> Tensor:
        fired.add(point)
        new = change(value)
        if new.shape != value.shape:
            raise ValueError(
                f"The edit at {point} returned a value of shape {tuple(new.shape)}; expected {tuple(value.shape)}, the "
                "shape of what it was given."
            )
        return new

    return checked


def _through(heads: Heads | None, change: Change) -> Change:
    if heads is None:
        return change
    return lambda raw: join_heads(raw, heads, change(split_heads(raw, heads)))


def _mid_editor(layer: Layer, change: Change) -> list[Placement]:
    assert layer.attn_add is not None  # a layer with resid_mid has it
    resid_pre: list[Tensor] = []

    def see(raw: Tensor) -> None:
        resid_pre[:] = [raw]

    def shift(attn_out: Tensor) -> Tensor:
        resid_mid = resid_pre.pop() + attn_out
        return attn_out + (change(resid_mid) - resid_mid)

    return [placement(layer.sites["resid_pre"], see), Placement(layer.attn_add, False, on_output(shift))]


def _pattern_editor(layer: Layer, change: Change) -> list[Placement]:
    """The pattern is known only after attention has used it, so what it weighs and projects is computed once more."""
    attn, o_proj, v = layer.attn, layer.o_proj, layer.sites.get("v")
    if attn is None or o_proj is None or v is None:
        raise UnsupportedModelError(
            "Attention of this model has no values of its own; expected a projection that gives v. Read the pattern, "
            "or edit another site."
        )
    seen: dict[str, Tensor] = {}

    def see_values(raw: Tensor) -> None:
        assert v.heads is not None  # v is a site of heads
        seen["v"] = split_heads(raw, v.heads)

    def see_output(raw: Tensor) -> None:
        seen["o"] = raw

    def weigh_again(output: Any) -> Any:
        pattern, values, old = change(pattern_of(output)), seen.pop("v"), seen.pop("o")
        if pattern.shape[-1] != values.shape[1]:
            raise ValueError(
                f"A pattern over {pattern.shape[-1]} keys met {values.shape[1]} values, as the others lie in a cache. "
                "Run the model with use_cache=False to edit a pattern."
            )
        new = o_proj(weighted(pattern, values).flatten(-2))
        seen.pop("o", None)
        # Bloom's attention has added the stream already.
        attn_out = new if layer.attn_add is not o_proj else output[0] - old + new
        return (attn_out, pattern, *output[2:])

    return [
        Placement(v.module, False, on_output(see_values)),
        Placement(o_proj, False, on_output(see_output)),
        Placement(attn, False, after(weigh_again)),
    ]


class Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass, of a model or a block, whose rest nobody needs."""


def run(model: PreTrainedModel, batch: Batch, *, stop_after: int | None = None) -> Tensor:
    """Run the model once, without a cache.

    Args:
        model: A decoder-only Hugging Face model.
        batch: Token sequences.
        stop_after: Stop after this block, where only activations are wanted.

    Returns:
        Logits [batch pos d_vocab]; with `stop_after`, resid_post of that block.

    Raises:
        ValueError: The layer does not exist.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if stop_after is None:
        logits: Tensor = model(**inputs).logits
        return logits
    _, site = find_site(find_decoder(model), HookPoint("resid_post", stop_after))
    last: list[Tensor] = []

    def stop(resid: Tensor) -> Tensor:
        last.append(resid)
        raise Stop

    with placed([placement(site, stop)]):
        try:
            model(**inputs)
        except Stop:
            return last[0]
    raise UnsupportedModelError(f"{type(model).__name__} never ran its block {stop_after}; expected one run each.")


_proven: WeakKeyDictionary[nn.Module, Decoder] = WeakKeyDictionary()


def check_sites(model: PreTrainedModel) -> Decoder:
    """Prove on the model at hand that its sites mean what they are called; done once for a model.

    Of a short input: the parts add up (resid_pre + attn_out + mlp_out = resid_post), each block hands its output to the
    next one, the last one decodes to the model's own logits, and pattern times v is z.

    Returns:
        The model's parts.

    Raises:
        ValueError: A part of the model is in train mode, or its logits are not finite.
        UnsupportedModelError: The model is built in another way.
    """
    decoder = find_decoder(model)
    check_eval(model)
    if _proven.get(model) is not decoder:
        _prove(model, decoder)
        _proven[model] = decoder
    return decoder


@torch.no_grad()
def _prove(model: PreTrainedModel, decoder: Decoder) -> None:
    wanted = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "v", "z", "pattern")
    points = [HookPoint(s, i) for i, layer in enumerate(decoder.layers) for s in wanted if s in layer.sites]
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    ids = (torch.arange(1, 6, device=device) % decoder.d_vocab)[None]
    with record(model, points) as found:
        logits = run(model, Batch(ids, torch.ones_like(ids)))
    check_finite(logits)
    for i, layer in enumerate(decoder.layers):
        at = {point.site: value for point, value in found.items() if point.layer == i}
        missing = [site for site in wanted if site in layer.sites and site not in at]
        if missing or at["resid_pre"].shape[:2] != ids.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} did not run through {missing or 'resid_pre'} of block {i} as expected: once, "
                "with one vector per token. Its residual stream is not one line through the blocks."
            )
        _prove_layer(model, i, at)
        if i + 1 < decoder.n_layers:
            _same(model, f"resid_post of block {i}", at["resid_post"], found[HookPoint("resid_pre", i + 1)])
    _same(model, "the decoded resid_post of the last block", decoder.logits(at["resid_post"]), logits)


def _prove_layer(model: PreTrainedModel, i: int, at: Mapping[str, Tensor]) -> None:
    if "attn_out" in at and "mlp_out" in at:
        total = at["resid_pre"].double() + at["attn_out"].double() + at["mlp_out"].double()
        _same(model, f"resid_pre + attn_out + mlp_out of block {i}", total, at["resid_post"])
    if "resid_mid" in at:
        _same(model, f"resid_pre + attn_out of block {i}", at["resid_pre"] + at["attn_out"], at["resid_mid"])
    if {"pattern", "v", "z"} <= at.keys():
        _same(model, f"pattern times v of block {i}", weighted(at["pattern"], at["v"]), at["z"])


def _same(model: PreTrainedModel, what: str, found: Tensor, expected: Tensor) -> None:
    expected = expected.to(found.device)
    gap, size = (found - expected).abs().max().item(), expected.abs().max().item()
    # The same numbers, rounded a few times on their way.
    if not gap <= max(1e-4, 8 * torch.finfo(expected.dtype).eps) * size:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {what} differs by up to {gap:.3g} from what the model goes on with, which is "
            f"up to {size:.3g}; expected no difference. This model is built in a way that is not known here."
        )
