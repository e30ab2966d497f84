"""Work in pieces that fit: batches of like length within a budget of tokens, and smaller ones where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], Sequence[Result]]) -> list[Result]:
    """Call `run(indices)` on batches of like length and return one result per sequence, in the order of `lengths`.

    A padded batch has at most `max_tokens` tokens, unless it is a single longer sequence. A batch that does not fit
    in memory is halved, and so are those after it.

    Raises:
        MemoryError: A single sequence does not fit in memory.
    """

    def tokens(batch: Sequence[int]) -> int:
        return len(batch) * max(lengths[i] for i in batch)

    def alone(i: int) -> str:
        return f"A single sequence of {lengths[i]} tokens"

    results: dict[int, Result] = {}
    biggest_first = reversed(list(length_batches(lengths, max_tokens)))
    for batch, done in in_memory(lambda batch: run(list(batch)), biggest_first, alone, tokens):
        results.update(zip(batch, done, strict=True))
    return [results[i] for i in range(len(lengths))]


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices by growing length, in batches whose longest member times their number is at most `max_tokens`.

    A caller that takes the last batch first meets the biggest one at once, so that what does not fit shows early.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def in_memory(
    work: Callable[[Sequence[Item]], Result],
    chunks: Iterable[Sequence[Item]],
    alone: Callable[[Item], str],
    cost: Callable[[Sequence[Item]], int] = len,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Each chunk with its result, in turn; one that does not fit in memory is halved, and so are all that cost as much.

    `work` may itself work in pieces: where one of those does not fit alone, less may be kept beside it.

    Args:
        work: What to do with a chunk; it may be called again with a part of it.
        chunks: What to begin with.
        alone: What to call an item that does not fit although it is alone, as the start of a sentence.
        cost: What the memory that a chunk takes grows with.

    Raises:
        MemoryError: A chunk of one does not fit.
    """
    waiting = list(chunks)[::-1]
    limit: float = math.inf
    while waiting:
        chunk = waiting.pop()
        is_alone = len(chunk) == 1
        if is_alone or cost(chunk) <= limit:
            for done in _attempt(work, chunk):
                yield chunk, done
                break
            else:
                torch.cuda.empty_cache()  # no-op without a GPU; its fragments may be what the next chunk lacks
                if not is_alone:
                    limit = cost(chunk) - 1
