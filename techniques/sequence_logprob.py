"""Score whole completions: what probability a model gives to texts of any number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._model import logits_at
from techniques._results import Header, header, number
from techniques._tokens import check_context, check_eval, check_lists, encode, log_probs, pad, texts_of, token_text

LOGIT_BYTES = 2**28  # of float32 logits of one batch


class TokenLogprob(TypedDict):
    """A token of a completion and its log-probability given all before it, in nats."""

    token: str
    id: int
    logprob: float | None


class ScoredCompletion(TypedDict):
    """A completion of a prompt.

    Attributes:
        prompt: Index of the prompt.
        completion: Its text as given.
        n_tokens: How many tokens were scored.
        logprob: Sum of their log-probabilities, in nats.
        mean_logprob: The same per token, in nats.
        rank: 1 for the best of this prompt's completions, by sum or mean as `normalize` says.
        share: Its part of the probability of all completions of this prompt, 0 to 1: softmax of what is ranked.
        boundary: "exact" if the prompt's tokens stand unchanged before the completion's; "merged" if the tokenizer
            joins the prompt's end and the completion's start, so that the first scored token holds some of both.
        tokens: The scored tokens, in order.
    """

    prompt: int
    completion: str
    n_tokens: int
    logprob: float | None
    mean_logprob: float | None
    rank: int
    share: float | None
    boundary: Literal["exact", "merged"]
    tokens: list[TokenLogprob]


class SequenceLogprobs(Header):
    """Result of `sequence_logprob`: a row per prompt and completion, by prompt, then in the order of completions."""

    normalize: str
    prompts: list[str]
    rows: list[ScoredCompletion]


class _Sequence(NamedTuple):
    """Prompt and completion as tokens; those from `start` on are scored."""

    ids: list[int]
    start: int
    is_merged: bool


@torch.inference_mode()
def sequence_logprob(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[str],
    completions: Sequence[str],
    normalize: Literal["sum", "mean"] = "sum",
) -> SequenceLogprobs:
    """Score given completions of a prompt by their log-probability, whatever their number of tokens.

    Args:
        model: A causal Hugging Face language model in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompt: One prompt or several; every completion is scored after each. An empty one needs a tokenizer that
            starts a text with a special token.
        completions: Texts with their leading space; prompt and completion are joined as they stand and encoded as one.
        normalize: Rank by the "sum" of log-probabilities, which is the probability of the text, or by the "mean" per
            token, which does not favour short texts.

    Returns:
        Log-probabilities in nats from a float32 softmax (float64 for a float64 model), for each completion and token.

    Raises:
        ValueError: The model is in train mode, a prompt or completion has no tokens, a text does not fit the context, a
            logit is not finite, or normalize is neither "sum" nor "mean".
        MemoryError: A single text does not fit in memory.

    Misleads: Sums favour short completions and means favour completions with predictable ends; where lengths differ,
        look at both. A completion stands for its exact words: the same meaning in other words is not counted.

    Cost: 1 forward per batch of prompt and completion pairs; about 10 ms for ten pairs on the demo model.

    Example:
        prompt = "The Eiffel Tower is located in the city of"
        sequence_logprob(model, tokenizer, prompt, [" Paris.", " Rome.", " Zanzibar."])
    """
    check_lists(completions=completions)
    check_eval(model)
    if normalize not in ("sum", "mean"):
        raise ValueError(f'normalize is {normalize!r}; expected "sum" or "mean".')
    if isinstance(completions, str) or not completions:
        raise ValueError(f"completions is {completions!r}; expected a list of at least one text.")
    prompts = texts_of(prompt)
    sequences = [
        _join(before, text, whole, completion)
        for text, before in zip(prompts, encode(tokenizer, prompts), strict=True)
        for completion, whole in zip(completions, encode(tokenizer, [text + c for c in completions]), strict=True)
    ]
    check_context(model, [sequence.ids for sequence in sequences])
    budget = LOGIT_BYTES // (4 * model.config.get_text_config(decoder=True).vocab_size)
    lengths = [len(sequence.ids) for sequence in sequences]
    scored = in_batches(lengths, budget, lambda batch: _score(model, [sequences[i] for i in batch]))

    rows = [
        _row(tokenizer, i // len(completions), completions[i % len(completions)], sequence, logprobs)
        for i, (sequence, logprobs) in enumerate(zip(sequences, scored, strict=True))
    ]
    for start in range(0, len(rows), len(completions)):
        _compare(rows[start : start + len(completions)], normalize)
    n_merged = sum(sequence.is_merged for sequence in sequences)
    note = (
        f"The tokenizer joins the prompt's end and the completion's start in {n_merged} of {len(rows)} rows, marked "
        '"merged"; their first scored token holds some of both.'
    )
    start_of = header(model, "sequence_logprob", n=len(prompts), warnings=[note] if n_merged else [])
    return SequenceLogprobs(**start_of, normalize=normalize, prompts=prompts, rows=rows)


def _join(before: list[int], prompt: str, whole: list[int], completion: str) -> _Sequence:
    shared = next((i for i, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(before), len(whole)) if shared is None else shared
    if start == len(whole) or not completion:
        raise ValueError(f"The completion {completion!r} adds no token to {prompt!r}; expected at least one.")
    if start == 0:
        raise ValueError(
            f"The completion {completion!r} changes the first token of {prompt!r}, so nothing before it is left to "
            "predict it from. Lengthen the prompt, or begin the completion with a space."
        )
    return _Sequence(whole, start, is_merged=start < len(before))


def _score(model: PreTrainedModel, sequences: list[_Sequence]) -> list[Float[Tensor, " scored"]]:
    """Log-probability of each scored token, on the CPU."""
    batch = pad([sequence.ids for sequence in sequences], "right", 0, model.device)
    counts = [len(sequence.ids) - sequence.start for sequence in sequences]
    rows = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    positions = torch.tensor([p for sequence in sequences for p in range(sequence.start, len(sequence.ids))])
    logprobs = log_probs(logits_at(model, batch, rows, positions - 1))
    ids = batch.input_ids[rows, positions].to(logprobs.device)
    return list(torch.split(logprobs.gather(-1, ids[:, None])[:, 0].cpu(), counts))


def _row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: int,
    completion: str,
    sequence: _Sequence,
    logprobs: Float[Tensor, " scored"],
) -> ScoredCompletion:
    ids = sequence.ids[sequence.start :]
    total = logprobs.double().sum()
    return ScoredCompletion(
        prompt=prompt,
        completion=completion,
        n_tokens=len(ids),
        logprob=number(total),
        mean_logprob=number(total / len(ids)),
        rank=0,
        share=None,
        boundary="merged" if sequence.is_merged else "exact",
        tokens=[
            TokenLogprob(token=token_text(tokenizer, i), id=i, logprob=number(value))
            for i, value in zip(ids, logprobs, strict=True)
        ],
    )


def _compare(rows: list[ScoredCompletion], normalize: str) -> None:
    """Fill in rank and share among the completions of one prompt."""
    found = [row["logprob"] if normalize == "sum" else row["mean_logprob"] for row in rows]
    scores = [-math.inf if value is None else value for value in found]
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
    for row, score, share in zip(rows, scores, shares, strict=True):
        row["rank"] = 1 + sum(other > score for other in scores)
        row["share"] = number(share)
