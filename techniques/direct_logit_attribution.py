"""Direct logit attribution: what each part of the model adds to the logits.

Source: Elhage et al., "A mathematical framework for transformer circuits" (2021),
https://transformer-circuits.pub/2021/framework/index.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._contrast import MAX_TOKENS, as_leaf, frozen
from techniques._hooks import HookPoint, check_sites, record
from techniques._lens import check_head
from techniques._model import Decoder, UnsupportedModelError, logits_at
from techniques._nodes import frozen_norm, head_outputs
from techniques._pairs import metric_values
from techniques._results import Header, few, header, number
from techniques._stats import mean_interval
from techniques._tokens import check_context, check_lists, encode, pad, single_token_id


class LogitPart(TypedDict):
    """What one part of the model adds to the logit difference directly.

    Attributes:
        part: "embedding", "head", "attn" (all heads of a layer, with its biases), "attn_bias", "mlp" or "constant"
            (the biases of the final norm and the unembedding).
        layer: Its layer; None for the embedding and the constant.
        head: Its head; None for other parts.
        score: In nats, mean over prompts; positive favours the right answer.
        low: Lower end of the 95 % bootstrap interval over prompts.
        high: Upper end.
    """

    part: str
    layer: int | None
    head: int | None
    score: float | None
    low: float | None
    high: float | None


class DirectLogitAttribution(Header):
    """What `direct_logit_attribution` returns.

    Attributes:
        grain: "head" or "layer".
        logit_diff: The model's own, in nats, mean over prompts, before its soft cap if it has one.
        logit_diff_capped: The same after the soft cap; None if the model has none.
        sum: Of all rows.
        max_abs_error: Largest difference, over prompts, of the sum of the parts and the model's own logit difference.
        rows: A row per part, in the order in which the model computes them.
    """

    grain: Literal["head", "layer"]
    logit_diff: float | None
    logit_diff_capped: float | None
    sum: float | None
    max_abs_error: float | None
    rows: list[LogitPart]


class _Part(NamedTuple):
    part: str
    layer: int | None = None
    head: int | None = None


@torch.inference_mode(False)  # the caller's would keep gradients from being taken
@torch.no_grad()
def direct_logit_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[tuple[str, str]],
    *,
    grain: Literal["head", "layer"] = "head",
    seed: int = 0,
) -> DirectLogitAttribution:
    """Split the logit difference at the last token among the embedding, heads, MLPs and biases.

    Answers which parts write the answer into the residual stream at the last position. The final residual is a sum of
    what the parts added; with the scale of the final norm held at what it was, so is the logit difference.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompts: Of any lengths; each ends before its answer.
        answers: (right answer, wrong answer) for each prompt, a token each, with their leading space.
        grain: "head" splits attention into its heads, "layer" does not.
        seed: Of the bootstrap.

    Returns:
        A row per part. The rows add up to `logit_diff`; `max_abs_error` says how exactly.

    Raises:
        ValueError: There is no prompt, not as many answers, an answer is not one token, or the model is in train mode.
        UnsupportedModelError: The final norm is no LayerNorm or RMSNorm, or the parts do not add up.

    Misleads: Only the direct way to the output counts: a head that moves a name for a later MLP to read scores near
    zero and may still be indispensable. Parts often cancel, so a large score is not a large effect either.
    Where a norm stands between attention and the stream (Gemma 2 and 3, OLMo 2 and 3), heads are split with its scale
    held too. A soft cap is not linear, so what is split is the difference before it.

    Cost: 1 forward, and 1 backward through the unembedding; about 0.05 s on the demo model.

    Example:
        prompts = ["The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"]
        direct_logit_attribution(model, tokenizer, prompts, [(" Paris", " Rome"), (" Rome", " Paris")])
    """
    check_lists(prompts=prompts)
    if grain not in ("head", "layer"):
        raise ValueError(f'grain is {grain!r}; expected "head" or "layer".')
    if isinstance(prompts, str) or len(answers) != len(prompts) or any(isinstance(pair, str) for pair in answers):
        raise ValueError(
            f"answers is {answers!r} for prompts {prompts!r}; expected a list of prompts and one (right answer, wrong "
            "answer) for each."
        )
    ids = encode(tokenizer, prompts)
    check_context(model, ids)
    answer_ids = torch.tensor([[single_token_id(tokenizer, text) for text in pair] for pair in answers])
    decoder = check_sites(model)
    parts = _part_names(decoder, grain)
    split = in_batches(
        [len(row) for row in ids],
        MAX_TOKENS,
        lambda which: _split(model, decoder, [ids[i] for i in which], answer_ids[which], grain),
    )
    scores = torch.stack([one.scores for one in split])
    own, capped = torch.stack([one.own for one in split]), torch.stack([one.capped for one in split])
    error = _check_sum(model, scores, own)
    mean, low, high = mean_interval(scores, seed)
    rows = [
        LogitPart(part=part.part, layer=part.layer, head=part.head, score=number(a), low=number(b), high=number(c))
        for part, a, b, c in zip(parts, mean, low, high, strict=True)
    ]
    return DirectLogitAttribution(
        **header(model, "direct_logit_attribution", n=len(ids), seed=seed, warnings=few(len(ids), "prompt")),
        grain=grain,
        logit_diff=number(own.mean()),
        logit_diff_capped=None if decoder.soft_cap is None else number(capped.mean()),
        sum=number(mean.sum()),
        max_abs_error=number(error),
        rows=rows,
    )


class _Split(NamedTuple):
    own: Float[Tensor, ""]
    capped: Float[Tensor, ""]
    scores: Float[Tensor, " parts"]


def _part_names(decoder: Decoder, grain: str) -> list[_Part]:
    parts = [_Part("embedding")]
    for layer in range(decoder.n_layers):
        heads = [_Part("head", layer, head) for head in range(decoder.n_heads)]
        parts += [*heads, _Part("attn_bias", layer)] if grain == "head" else [_Part("attn", layer)]
        parts.append(_Part("mlp", layer))
    return [*parts, _Part("constant")]


def _split(
    model: PreTrainedModel, decoder: Decoder, ids: list[list[int]], answer_ids: Int[Tensor, "batch 2"], grain: str
) -> list[_Split]:
    """One forward pass, and each part's share in the logit difference after the last token."""
    at = torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])
    embedding, final = HookPoint("resid_pre", 0), HookPoint("resid_post", decoder.n_layers - 1)
    sites = ["attn_out", "mlp_out", *(["z"] if grain == "head" else [])]
    points = [embedding, final, *(HookPoint(site, layer) for site in sites for layer in range(decoder.n_layers))]
    with torch.no_grad():
        with record(model, points, keep=lambda value: value[at]) as seen:
            own = logits_at(model, pad(ids, "right", 0, model.device), *at)
        lens = decoder.logits(seen[final])
        check_head(model, lens, own.to(lens.device))
        normed = decoder.ln_final(seen[final])
        norm = frozen_norm(decoder.ln_final, seen[final], normed)
    diff, direction, bias = _reader(decoder, normed, answer_ids)
    pulled = norm.pulled(direction)
    parts = [seen[embedding].unsqueeze(1), *_layer_parts(decoder, seen, grain)]
    scores = [(part.to(pulled.device, torch.float64) * pulled[:, None]).sum(-1) for part in parts]
    constant = (direction * norm.offset).sum(-1) + bias
    capped = metric_values(own, answer_ids[:, 0], answer_ids[:, 1], "logit_diff")
    return [
        _Split(*one)
        for one in zip(diff.cpu(), capped.cpu(), torch.cat([*scores, constant[:, None]], 1).cpu(), strict=True)
    ]


def _layer_parts(
    decoder: Decoder, seen: dict[HookPoint, Tensor], grain: str
) -> Iterator[Float[Tensor, "batch parts d_model"]]:
    """What each layer adds, in the order of the part names."""
    for layer, modules in enumerate(decoder.layers):
        attn = seen[HookPoint("attn_out", layer)]
        if grain == "head":
            with torch.no_grad():
                heads = head_outputs(modules, seen[HookPoint("z", layer)], attn)
            yield torch.cat([heads, (attn - heads.sum(1)).unsqueeze(1)], 1)
        else:
            yield attn.unsqueeze(1)
        yield seen[HookPoint("mlp_out", layer)].unsqueeze(1)


def _reader(
    decoder: Decoder, normed: Float[Tensor, "batch d_model"], answer_ids: Int[Tensor, "batch 2"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """The logit difference before a soft cap, the direction in the normed residual that makes it, and its bias."""
    right, wrong = answer_ids.to(normed.device).T
    with frozen(decoder.unembed):
        leaf = as_leaf(normed)
        diff = metric_values(decoder.unembed(leaf), right, wrong, "logit_diff")
        direction = torch.autograd.grad(diff.sum(), leaf)[0]
    with torch.no_grad():
        bias = metric_values(decoder.unembed(torch.zeros_like(normed)), right, wrong, "logit_diff")
    return diff.detach().double(), direction.double(), bias.double()


def _check_sum(model: PreTrainedModel, scores: Float[Tensor, "n parts"], own: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    error = (scores.sum(-1) - own).abs().max()
    # The stream is rounded to the model's dtype at each addition, so the sum is as exact as its largest terms allow.
    if not error <= max(1e-4, 8 * torch.finfo(model.dtype).eps) * scores.abs().sum(-1).max():
        raise UnsupportedModelError(
            f"{type(model).__name__}: embedding, heads, MLPs and biases add up to within {error:.3g} nats of the logit "
            "difference; expected equality. It adds something else to its residual stream."
        )
    return error
