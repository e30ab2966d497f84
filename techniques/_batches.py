"""Many sequences in batches of like length, within a budget of tokens and of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_batches(lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Call `run(indices)` on batches of like length and return one result per sequence, in the order of `lengths`.

    A padded batch has at most `max_tokens` tokens, unless it is a single longer sequence. A batch that does not fit
    in memory is halved, and halved again.

    Raises:
        MemoryError: A single sequence does not fit in memory.
    """
    results: dict[int, T] = {}
    waiting = list(length_batches(lengths, max_tokens))
    while waiting:
        batch = waiting.pop()
        done = _try(run, batch)
        if done is not None:
            results.update(zip(batch, done, strict=True))
        elif len(batch) > 1:
            waiting += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
        else:
            raise MemoryError(
                f"A single sequence of {lengths[batch[0]]} tokens does not fit in memory beside the model. "
                "Shorten it, or load the model in a smaller dtype."
            )
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


def _try(run: Callable[[list[int]], Sequence[T]], batch: list[int]) -> Sequence[T] | None:
    """The results, or None where memory ran out; by then the error's frames, which hold the tensors, are gone."""
    try:
        return run(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or on the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
