"""Logit lens: decode the residual stream after each block as if the model ended there.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020),
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._model import Decoder, UnsupportedModelError, find_decoder, logits_at, record_inputs
from techniques._tokens import (
    TokenProb,
    check_context,
    check_finite,
    check_top_k,
    chosen_tokens,
    encode,
    log_probs,
    pad,
    resolve_position,
    single_token_id,
    token_text,
    top_tokens,
)

CHUNK_BYTES = 2**26  # of float32 logits that are decoded at once; a few tensors of this size are alive


class LensPrompt(TypedDict):
    """A prompt as the model saw it; `positions` are those that have rows."""

    text: str
    tokens: list[str]
    token_ids: list[int]
    positions: list[int]


class LensRow(TypedDict):
    """What the residual stream says at one point.

    Attributes:
        prompt: Index of the prompt.
        position: Index of the token in the prompt, from 0.
        depth: How many blocks have run: 0 is the embedding, n_layers the model's own output.
        entropy: Entropy of the decoded distribution, in nats.
        kl_to_final: KL divergence of this distribution from the model's own at the same position, KL(final || depth),
            in nats; 0 at the last depth.
        top: The most probable next tokens, best first.
        targets: The targets, in the order given.
    """

    prompt: int
    position: int
    depth: int
    entropy: float
    kl_to_final: float
    top: list[TokenProb]
    targets: list[TokenProb]


class LogitLens(TypedDict):
    """Result of `logit_lens`.

    Attributes:
        n_layers: Blocks of the model; each point has n_layers + 1 rows.
        prompts: The prompts, in order.
        rows: By prompt, then position, then depth.
        max_error: Largest difference between the last depth's logits and the model's own, in nats.
    """

    n_layers: int
    prompts: list[LensPrompt]
    rows: list[LensRow]
    max_error: float


@dataclass(frozen=True)
class _Points:
    """The (prompt, position) pairs that are decoded, in order."""

    prompts: list[int]
    positions: list[int]

    def part(self, which: slice) -> _Points:
        return _Points(self.prompts[which], self.positions[which])


@torch.inference_mode()
def logit_lens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    targets: Sequence[str] | None = None,
    top_k: int = 5,
    positions: Sequence[int] | None = None,
) -> LogitLens:
    """Apply the final norm and the unembedding to the residual stream at every depth.

    The last depth must give the model's own logits; this is checked on every call, so a model whose head does more
    than final norm, unembedding and soft cap is refused rather than misread.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompt: One prompt or a list of them, of any lengths.
        targets: Texts of one token each, with their leading space, followed through all depths.
        top_k: How many of the most probable tokens each row lists.
        positions: Tokens to decode, counted in each prompt's own tokens; negative from its end. None decodes all.

    Returns:
        Rows of plain numbers, so no tensor of size n_layers x pos x d_vocab ever exists. Probabilities come from a
        float32 softmax (float64 for a float64 model) of logits in the model's own dtype.

    Raises:
        UnsupportedModelError: The parts were not found, the blocks do not run once each in a row, or the last depth
            differs from the model's own logits.
        ValueError: A prompt has no tokens or no such position, a target is not a single token, or top_k is out of
            range.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    target_ids = [single_token_id(tokenizer, target) for target in targets or []]
    chosen = [_choose(positions, len(row), text) for row, text in zip(ids, texts, strict=True)]
    points = _Points([i for i, row in enumerate(chosen) for _ in row], [p for row in chosen for p in row])
    decoder = find_decoder(model)
    resid, own = _run(model, decoder, ids, points)
    check_top_k(top_k, own.shape[-1])

    rows: list[LensRow] = []
    max_error = 0.0
    step = max(1, CHUNK_BYTES // (4 * len(resid) * own.shape[-1]))
    for chunk in (slice(start, start + step) for start in range(0, len(own), step)):
        logits = decoder.logits(torch.stack([at_depth[chunk].to(own.device) for at_depth in resid], 1))
        max_error = max(max_error, _check_head(model, logits[:, -1], own[chunk].to(logits.device)))
        rows += _rows(tokenizer, points.part(chunk), logits, target_ids, top_k)
    prompts = [
        LensPrompt(text=text, tokens=[token_text(tokenizer, i) for i in row], token_ids=row, positions=where)
        for text, row, where in zip(texts, ids, chosen, strict=True)
    ]
    return LogitLens(n_layers=len(decoder.blocks), prompts=prompts, rows=rows, max_error=max_error)


def _choose(positions: Sequence[int] | None, length: int, text: str) -> list[int]:
    if positions is None:
        return list(range(length))
    if not positions:
        raise ValueError("positions is empty; expected at least one. Leave it out to decode all.")
    return [resolve_position(position, length, text) for position in positions]


def _run(
    model: PreTrainedModel, decoder: Decoder, ids: list[list[int]], points: _Points
) -> tuple[list[Float[Tensor, "points d_model"]], Float[Tensor, "points d_vocab"]]:
    """Run the model once: the residual stream at each depth and the model's own logits, at `points` alone."""
    batch = pad(ids, "right", 0, model.device)
    where = torch.tensor(points.prompts), torch.tensor(points.positions)

    def keep(hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "points d_model"]:
        if hidden.shape[:2] != batch.input_ids.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a residual stream of shape {tuple(hidden.shape)} for tokens of shape "
                f"{tuple(batch.input_ids.shape)}; expected one vector per token. Prompt tuning, which adds tokens of "
                "its own, is not supported."
            )
        return hidden[where]

    with record_inputs([*decoder.blocks, decoder.ln_final], keep) as resid:
        own = logits_at(model, batch, *where)
    if len(resid) != len(decoder.blocks) + 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} entered its {len(decoder.blocks)} blocks and final norm {len(resid)} times in one "
            "forward pass; expected once each. Its residual stream is not one line through them."
        )
    return resid, own


def _check_head(
    model: PreTrainedModel, lens: Float[Tensor, "points d_vocab"], own: Float[Tensor, "points d_vocab"]
) -> float:
    gap, size = (lens - own).abs().max().item(), own.abs().max().item()
    # The same operations on the same numbers differ only by the rounding of a matrix product of another shape.
    if not gap <= max(1e-4, 4 * torch.finfo(own.dtype).eps) * size:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the lens after the last block differs from the model's own logits by up to "
            f"{gap:.3g} nats; expected none. Its head does more than final norm, unembedding and soft cap, so earlier "
            "depths would be misread as well."
        )
    return gap


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    points: _Points,
    logits: Float[Tensor, "points depth d_vocab"],
    target_ids: list[int],
    top_k: int,
) -> list[LensRow]:
    logprobs = log_probs(logits)
    probs = logprobs.exp()
    # Sums of products as matrix products: no third tensor of this size. cross is the entropy of the model's own
    # distribution relative to each depth's, so what exceeds the last depth's is the divergence.
    entropy = -(probs[..., None, :] @ logprobs[..., None])[..., 0, 0]
    cross = -(logprobs @ probs[:, -1, :, None])[..., 0]
    kl = (cross - cross[:, -1:]).clamp(min=0)
    check_finite(entropy)
    top = top_tokens(tokenizer, logprobs.flatten(0, 1), top_k)
    ids = torch.tensor(target_ids, dtype=torch.long, device=logits.device).expand(len(top), -1)
    targets = chosen_tokens(tokenizer, logprobs.flatten(0, 1), ids)
    where = [
        (*point, depth)
        for point in zip(points.prompts, points.positions, strict=True)
        for depth in range(cross.shape[1])
    ]
    return [
        LensRow(prompt=prompt, position=position, depth=depth, entropy=h, kl_to_final=d, top=best, targets=followed)
        for (prompt, position, depth), h, d, best, followed in zip(
            where, entropy.flatten().tolist(), kl.flatten().tolist(), top, targets, strict=True
        )
    ]
