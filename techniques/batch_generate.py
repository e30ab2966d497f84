"""Generate text for many prompts: in batches of like length, each prompt with a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._generation import Completion, check_options, continue_tokens, prompt_ids
from techniques._results import Header, header
from techniques._tokens import check_lists


class GeneratedBatch(Header):
    """Result of `batch_generate`: a completion for each prompt, in order, and how they were made; greedy has no seed.

    Attributes:
        completions: One per prompt, in the order given.
        max_new_tokens: Most tokens that each could have.
        temperature: 0 for greedy decoding.
    """

    completions: list[Completion]
    max_new_tokens: int
    temperature: float


def batch_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    max_batch_tokens: int = 16384,
) -> GeneratedBatch:
    """Continue many prompts in batches of like length; a prompt's sample does not depend on its neighbours.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it needs no pad token and is not changed.
        prompts: The prompts, of any lengths and in any order.
        max_new_tokens: Most tokens that a continuation may have.
        temperature: 0 takes the most probable token each time; above 0 samples from the softmax of the logits
            divided by it, without top-k or top-p cuts.
        seed: A prompt's stream comes from this, its tokens, and how often it stood in the list before. So the same
            prompt in another list gets the same sample, and a prompt that stands twice gets two.
        chat: Whether each prompt is a user message, laid out by the chat template, rather than plain text.
        system: System message before it; needs `chat=True`.
        max_batch_tokens: Most tokens of a batch, padding and new tokens included. A batch that does not fit in memory
            is halved.

    Returns:
        One completion per prompt, in the order given: only the new text, its token ids, and whether the model ended it
        itself. Another split into batches changes the rounding of logits, so it may swap tokens that are nearly equal.

    Raises:
        ValueError: There is no prompt, one has no tokens or does not fit the model's context, an option is out of
            range, the model is in train mode, or a logit is not finite.
        MemoryError: A single prompt does not fit in memory.

    Misleads: Greedy text hides how sure the model is, and one sample hides how much samples vary.

    Cost: 1 forward per new token and batch, cached; about 0.2 s for 50 prompts of 8 new tokens on the demo model.

    Example:
        landmarks = ["Eiffel Tower", "Prado Museum", "Galata Tower", "Big Ben"]
        prompts = [f"The {landmark} is located in the city of" for landmark in landmarks]
        batch_generate(model, tokenizer, prompts, max_new_tokens=2)
    """
    check_lists(prompts=prompts)
    check_options(max_new_tokens, temperature)
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens is {max_batch_tokens}; expected at least 1.")
    ids = prompt_ids(tokenizer, list(prompts), chat, system)
    new = continue_tokens(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        max_tokens=max_batch_tokens,
    )
    return GeneratedBatch(
        **header(model, "batch_generate", n=len(ids), seed=seed if temperature else None),
        completions=[Completion(prompt=text, **written) for text, written in zip(prompts, new, strict=True)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
