"""Continue token sequences: one padded batch, an own random stream, and only what is new comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._tokens import check_context, pad

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


@torch.inference_mode()
def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Continuation]:
    """Continue each sequence of token ids; greedy at temperature 0, else sampled from the whole distribution.

    The checkpoint's own sampling defaults (top-k, top-p, repetition penalty) are switched off: what comes back is
    what the model's probabilities say.

    Raises:
        ValueError: max_new_tokens or temperature is out of range, or a sequence does not fit the context.
    """
    _check_options(max_new_tokens, temperature)
    check_context(model, ids, max_new_tokens)
    ends = _end_ids(model)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = pad(ids, "left", filler, model.device)
    with own_random_stream(model, seed), _without_mask_warning():
        output = cast(Any, model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            num_beams=1,
            repetition_penalty=1.0,
            top_p=1.0,
            # Greedy decoding warns about sampling options that are not transformers' defaults.
            **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else GREEDY),
        )
    new = output[:, batch.input_ids.shape[1] :].tolist()
    return [_continuation(tokenizer, row, ends) for row in new]


def _check_options(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 for greedy decoding or a positive number.")


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
