"""Continue token sequences: one padded batch, an own random stream, and only what is new comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from techniques._tokens import chat_ids, check_context, check_eval, check_finite, encode, pad

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50}


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
    seed: int | Sequence[int],
) -> list[Continuation]:
    """Continue each sequence of token ids; greedy at temperature 0, else sampled from the whole distribution.

    The checkpoint's own sampling defaults (top-k, top-p, repetition penalty) are switched off: what comes back is
    what the model's probabilities say. One seed draws for the whole batch; with a seed for each row, a row's sample
    depends on that seed alone.

    Raises:
        ValueError: max_new_tokens or temperature is out of range, a sequence does not fit the context, the model is
            in train mode, or a logit is not finite.
    """
    check_eval(model)
    check_options(max_new_tokens, temperature)
    check_context(model, ids, max_new_tokens)
    ends = _end_ids(model)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = pad(ids, "left", filler, model.device)
    own_seeds = None if isinstance(seed, int) else seed
    is_drawn_by_torch = temperature > 0 and own_seeds is None
    with own_random_stream(model, seed if isinstance(seed, int) else 0), _without_mask_warning():
        output = cast(Any, model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            num_beams=1,
            repetition_penalty=1.0,
            top_p=1.0,
            logits_processor=_processors(temperature, own_seeds),
            # Greedy decoding warns about sampling options that are not transformers' defaults.
            **({"do_sample": True, "temperature": temperature, "top_k": 0} if is_drawn_by_torch else GREEDY),
        )
    new = output[:, batch.input_ids.shape[1] :].tolist()
    return [_continuation(tokenizer, row, ends) for row in new]


def check_options(max_new_tokens: int, temperature: float) -> None:
    """Raise a ValueError unless there is at least one new token, and a temperature of 0 or more."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 for greedy decoding or a positive number.")


def _processors(temperature: float, seeds: Sequence[int] | None) -> LogitsProcessorList:
    """What `generate` does to the logits of each step before it draws."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds or []]

    def check(_: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        check_finite(logits)
        return logits

    def draw(_: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        # The largest of logits plus Gumbel noise is a draw from their softmax, and each row has noise of its own.
        waits = [torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=g) for g in streams]
        return logits / temperature - torch.stack(waits).log().to(logits.device, logits.dtype)

    return LogitsProcessorList([check, draw] if temperature and streams else [check])


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


@contextmanager
def own_random_stream(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed the CPU and the model's GPUs, and give them their former random state back at the end."""
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs that are not ours to restore
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield
