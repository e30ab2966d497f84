"""Continue token sequences: batches that fit in memory, a random stream for each row, and only what is new."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._hooks import Change, HookPoint, edit
from techniques._tokens import chat_ids, check_context, check_eval, check_finite, encode, pad

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50}
MAX_TOKENS = 16384  # of a batch, padding and new tokens included

Edits = Callable[[int], Mapping[HookPoint, Change]]


class Continuation(TypedDict):
    """What the model wrote after a prompt.

    Attributes:
        text: The continuation without the prompt and without the end-of-text token.
        token_ids: Its token ids; the end-of-text token is not among them.
        finished: Whether the model ended the text itself, before `max_new_tokens` ran out.
    """

    text: str
    token_ids: list[int]
    finished: bool


class Completion(Continuation):
    """A continuation and the prompt that it belongs to."""

    prompt: str


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool, system: str | None
) -> list[list[int]]:
    """Token ids of prompts as plain text or, with `chat`, as a user message each.

    Raises:
        ValueError: There is no prompt, one has no tokens, or a system message has no chat to stand in.
    """
    if system is not None and not chat:
        raise ValueError("A system message was given for plain text; it needs the chat template. Pass chat=True.")
    return [chat_ids(tokenizer, text, system) for text in prompts] if chat and prompts else encode(tokenizer, prompts)


@torch.inference_mode()
def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    edits: Edits | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[Continuation]:
    """Continue each sequence of token ids; greedy at temperature 0, else sampled from the whole distribution.

    The checkpoint's own sampling defaults (top-k, top-p, repetition penalty) are switched off: what comes back is
    what the model's probabilities say. Each row draws from a stream of its own, that of the seed, its tokens and how
    often they stood in the list before, so its sample does not depend on the batch that it came to be in.

    `edits` gives what to change while a batch runs, from the length of its longest prompt; each batch gets new ones.

    Raises:
        ValueError: max_new_tokens or temperature is out of range, a sequence does not fit the context, the model is
            in train mode, or a logit is not finite.
        MemoryError: A single sequence does not fit in memory.
    """
    check_eval(model)
    check_options(max_new_tokens, temperature)
    check_context(model, ids, max_new_tokens)
    seeds = _row_seeds(ids, seed)

    def run(which: list[int]) -> list[Continuation]:
        rows, streams = [ids[i] for i in which], [seeds[i] for i in which]
        with edit(model, {} if edits is None else edits(max(map(len, rows)))):
            return _generate(model, tokenizer, rows, max_new_tokens, _processors(temperature, streams))

    return in_batches([len(row) + max_new_tokens for row in ids], max_tokens, run)


def _row_seeds(ids: Sequence[Sequence[int]], seed: int) -> list[int]:
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for row in ids:
        digest = hashlib.sha256(repr((seed, seen[tuple(row)], list(row))).encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
        seen[tuple(row)] += 1
    return seeds


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    processors: LogitsProcessorList,
) -> list[Continuation]:
    """One padded batch; what is drawn at random is drawn by the processors."""
    ends = _end_ids(model)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = pad(ids, "left", filler, model.device)
    with _without_mask_warning():
        output = cast(Any, model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            num_beams=1,
            repetition_penalty=1.0,
            top_p=1.0,
            logits_processor=processors,
            **GREEDY,  # decoding without sampling warns about sampling options that are not transformers' defaults
        )
    new = output[:, batch.input_ids.shape[1] :].tolist()
    return [_continuation(tokenizer, row, ends) for row in new]


def check_options(max_new_tokens: int, temperature: float) -> None:
    """Raise a ValueError unless there is at least one new token, and a temperature of 0 or more."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 for greedy decoding or a positive number.")


def _processors(temperature: float, seeds: Sequence[int]) -> LogitsProcessorList:
    """What `generate` does to the logits of each step before it takes the largest."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def check(_: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        check_finite(logits)
        return logits

    def draw(_: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        # The largest of logits plus Gumbel noise is a draw from their softmax, and each row has noise of its own.
        waits = [torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=g) for g in streams]
        return logits / temperature - torch.stack(waits).log().to(logits.device, logits.dtype)

    return LogitsProcessorList([check, draw] if temperature else [check])


def _end_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _continuation(tokenizer: PreTrainedTokenizerBase, row: list[int], ends: set[int]) -> Continuation:
    stop = next((i for i, token_id in enumerate(row) if token_id in ends), None)
    kept = row[:stop]
    return Continuation(text=str(tokenizer.decode(kept)), token_ids=kept, finished=stop is not None)


@contextmanager
def _without_mask_warning() -> Iterator[None]:
    """Hush a false alarm: `generate` drops a mask that masks nothing, then some models miss it once a row has ended."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "passing in an `attention_mask`" not in record.getMessage()

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)
