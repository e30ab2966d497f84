"""Token probabilities: what a model expects after a text, or after any token in it."""

from __future__ import annotations

from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._model import logits_at
from techniques._results import Header, header
from techniques._tokens import (
    TokenProb,
    check_context,
    check_eval,
    check_top_k,
    chosen_tokens,
    encode,
    log_probs,
    pad,
    resolve_position,
    texts_of,
    token_text,
    top_tokens,
)

MAX_TOKENS = 8192  # of a batch, padding included


class NextToken(TypedDict):
    """The distribution over the token that follows one position of a text.

    Attributes:
        text: The text as given.
        n_tokens: Its length in tokens, special ones included.
        position: Index of the token after which the distribution stands, from 0.
        token: That token.
        entropy: Entropy of the distribution, in nats.
        top: The most probable next tokens, best first.
        actual: The token that the text really goes on with; None at its end.
    """

    text: str
    n_tokens: int
    position: int
    token: str
    entropy: float
    top: list[TokenProb]
    actual: TokenProb | None


class TokenProbs(Header):
    """Result of `analyze_token_probs`: a row per text, in order."""

    rows: list[NextToken]


@torch.inference_mode()
def analyze_token_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | list[str],
    top_k: int = 10,
    position: int = -1,
) -> TokenProbs:
    """Read the model's next-token distribution after one position of a text, or of several texts.

    Args:
        model: A causal Hugging Face language model in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        text: One text or a list of them, of any lengths.
        top_k: How many tokens to list.
        position: Token after which the distribution is read, counted in each text's own tokens; negative from its end.

    Returns:
        A row per text with probabilities from a float32 softmax (float64 for a float64 model).

    Raises:
        ValueError: The model is in train mode, a text has no tokens, does not fit the context or has no such position,
            a logit is not finite, or top_k is out of range.
        MemoryError: A single text does not fit in memory; a batch that does not is halved.

    Misleads: A high probability says that the model is sure, not that it is right. A word of several tokens shows only
        its first one here; `sequence_logprob` scores it whole.

    Cost: 1 forward per 8,192 tokens; about 5 ms on the demo model.

    Example:
        analyze_token_probs(model, tokenizer, "The Eiffel Tower is located in the city of", top_k=5)
    """
    check_eval(model)
    texts = texts_of(text)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    positions = [resolve_position(position, len(row), text) for row, text in zip(ids, texts, strict=True)]

    def run(which: list[int]) -> list[NextToken]:
        rows = [ids[i] for i in which]
        after = torch.tensor([positions[i] for i in which])
        batch = pad(rows, "right", 0, model.device)
        logprobs = log_probs(logits_at(model, batch, torch.arange(len(rows)), after))
        check_top_k(top_k, logprobs.shape[-1])
        return _rows(tokenizer, [texts[i] for i in which], rows, after.tolist(), logprobs, top_k)

    rows = in_batches([len(row) for row in ids], MAX_TOKENS, run)
    return TokenProbs(**header(model, "analyze_token_probs", n=len(texts)), rows=rows)


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    ids: list[list[int]],
    positions: list[int],
    logprobs: Float[Tensor, "n d_vocab"],
    top_k: int,
) -> list[NextToken]:
    following = [row[i + 1 : i + 2] for row, i in zip(ids, positions, strict=True)]
    stand_in = torch.tensor([(new or [0]) for new in following], device=logprobs.device)
    columns = zip(
        texts,
        ids,
        positions,
        torch.special.entr(logprobs.exp()).sum(-1).tolist(),
        top_tokens(tokenizer, logprobs, top_k),
        [
            found if new else [None]
            for found, new in zip(chosen_tokens(tokenizer, logprobs, stand_in), following, strict=True)
        ],
        strict=True,
    )
    return [
        NextToken(
            text=text,
            n_tokens=len(row),
            position=i,
            token=token_text(tokenizer, row[i]),
            entropy=entropy,
            top=top,
            actual=actual,
        )
        for text, row, i, entropy, top, (actual,) in columns
    ]
