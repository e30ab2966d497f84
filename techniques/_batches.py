"""Work in pieces that fit: batches of like length within a budget of tokens, and smaller ones where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    lengths: Sequence[int],
    max_tokens: int,
    run: Callable[[list[int]], Sequence[Result]],
    alone: str = "sequence",
) -> list[Result]:
    """Call `run(indices)` on batches of like length and return one result per sequence, in the order of `lengths`.

    A padded batch has at most `max_tokens` tokens, unless it is a single longer sequence. A batch that does not fit
    in memory is halved, and so are those after it. `alone` is what the error calls one that does not fit by itself.

    Raises:
        MemoryError: A single sequence does not fit in memory.
    """

    def tokens(batch: Sequence[int]) -> int:
        return len(batch) * max(lengths[i] for i in batch)

    def name(i: int) -> str:
        return f"A single {alone} of {lengths[i]} tokens"

    results: dict[int, Result] = {}
    biggest_first = reversed(list(length_batches(lengths, max_tokens)))
    for batch, done in in_memory(lambda batch: run(list(batch)), biggest_first, name, tokens):
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
    """Each chunk with its result, in turn; one that does not fit in memory is halved, and all later ones like it.

    Where `work` works in pieces itself and one of those does not fit alone, its chunk is halved as well, as less is
    kept beside the piece then.

    Args:
        work: What to do with a chunk; it is called again with each half of a chunk that did not fit.
        chunks: What to begin with.
        alone: What to call an item that does not fit by itself, as the start of a sentence.
        cost: What the memory that a chunk takes grows with.

    Raises:
        MemoryError: A chunk of one does not fit.
    """
    waiting = list(chunks)[::-1]
    limit = math.inf
    while waiting:
        chunk = waiting.pop()
        if len(chunk) == 1 or cost(chunk) <= limit:
            if (done := _attempt(work, chunk)) is not None:
                yield chunk, done.result
                continue
            torch.cuda.empty_cache()
            if len(chunk) == 1:
                raise MemoryError(
                    f"{alone(chunk[0])} does not fit in memory beside the model. Shorten the text, free memory, or "
                    "load the model in a smaller dtype."
                )
        halves = chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]
        limit = min(limit, max(map(cost, halves)))
        waiting += reversed(halves)


class _Done(NamedTuple, Generic[Result]):
    result: Result


def _attempt(work: Callable[[Sequence[Item]], Result], chunk: Sequence[Item]) -> _Done[Result] | None:
    """The result, or None where memory ran out; by then the error's frames, which hold the tensors, are gone."""
    try:
        return _Done(work(chunk))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: torch's on a GPU or on the CPU, or Python's own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
