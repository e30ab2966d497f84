"""Logit lens: decode the residual stream after each block as if the model ended there.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020),
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._lens import Points, run_points
from techniques._model import find_decoder
from techniques._results import Header, header
from techniques._tokens import (
    TokenProb,
    check_context,
    check_eval,
    check_finite,
    check_lists,
    check_top_k,
    chosen_tokens,
    encode,
    log_probs,
    resolve_position,
    single_token_id,
    texts_of,
    token_text,
    top_tokens,
    whole_numbers,
)

MAX_TOKENS = 2048  # of a batch, padding included; there are logits at each of them


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


class LogitLens(Header):
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


@torch.inference_mode()
def logit_lens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    targets: Sequence[str] | None = None,
    top_k: int = 5,
    positions: int | Sequence[int] | None = None,
) -> LogitLens:
    """Decode the residual stream at every depth with the final norm and the unembedding, as tokens.

    It answers from which depth on the next token can be read off the residual stream. The last depth must give the
    model's own logits; this is checked on every call, so a model whose head does more than final norm, unembedding and
    soft cap is refused rather than misread.

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
        ValueError: The model is in train mode, a prompt has no tokens, does not fit the context or has no such
            position, a target is not a single token, a logit is not finite, or top_k is out of range.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: The output head was trained for the last depth, so a blank early depth may hold the answer in a form that
        this head does not read; and what is readable need not be used. Which part computed it takes an intervention.

    Cost: 1 forward, and one unembedding per depth and position; about 10 ms on the demo model.

    Example:
        prompt = "The Eiffel Tower is located in the city of"
        logit_lens(model, tokenizer, prompt, targets=[" Paris", " Rome"])
    """
    check_lists(targets=targets)
    check_eval(model)
    texts = texts_of(prompt)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    target_ids = [single_token_id(tokenizer, target) for target in targets or []]
    asked = None if positions is None else whole_numbers("positions", positions)
    chosen = [_choose(asked, len(row), text) for row, text in zip(ids, texts, strict=True)]
    decoder = find_decoder(model)
    errors: list[float] = []

    def run(which: list[int]) -> list[list[LensRow]]:
        where = [(row, position) for row, i in enumerate(which) for position in chosen[i]]
        points = Points(*map(list, zip(*where, strict=True)))
        stream = run_points(model, decoder, [ids[i] for i in which], points)
        check_top_k(top_k, stream.own.shape[-1])
        found: list[list[LensRow]] = [[] for _ in which]
        for part, logits, error in stream.decoded():
            errors.append(error)
            here = points.part(part)
            told = Points([which[row] for row in here.prompts], here.positions)
            rows = iter(_rows(tokenizer, told, logits, target_ids, top_k))
            for row in here.prompts:
                found[row] += islice(rows, logits.shape[1])
        return found

    found = in_batches([len(row) for row in ids], MAX_TOKENS, run)
    prompts = [
        LensPrompt(text=text, tokens=[token_text(tokenizer, i) for i in row], token_ids=row, positions=where)
        for text, row, where in zip(texts, ids, chosen, strict=True)
    ]
    start = header(model, "logit_lens", n=len(texts))
    rows = [row for of_prompt in found for row in of_prompt]
    return LogitLens(**start, n_layers=len(decoder.blocks), prompts=prompts, rows=rows, max_error=max(errors))


def _choose(positions: list[int] | None, length: int, text: str) -> list[int]:
    if positions is None:
        return list(range(length))
    if not positions:
        raise ValueError("positions is empty; expected at least one. Leave it out to decode all.")
    return [resolve_position(position, length, text) for position in positions]


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    points: Points,
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
