"""Generate text: the model's continuation of one prompt or of a batch of prompts."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._generation import Completion, continue_tokens, prompt_ids
from techniques._results import Header, header
from techniques._tokens import texts_of


class GeneratedText(Header):
    """Result of `generate_text`: a completion for each prompt, in order, and how they were made; greedy has no seed."""

    completions: list[Completion]
    max_new_tokens: int
    temperature: float


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
) -> GeneratedText:
    """Continue a prompt, or several in one batch, greedily or by sampling.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it needs no pad token and is not changed.
        prompt: One prompt or a list of them.
        max_new_tokens: Most tokens that a continuation may have.
        temperature: 0 takes the most probable token each time; above 0 samples from the softmax of the logits
            divided by it, without top-k or top-p cuts.
        seed: Of the sampling. A prompt's stream comes from this, its tokens, and how often it stood in the list before,
            as in `batch_generate`; the process's own random state is left as it was.
        chat: Whether each prompt is a user message, laid out by the chat template, rather than plain text.
        system: System message before it; needs `chat=True`.

    Returns:
        One completion per prompt, in order: only the new text, its token ids, and whether the model ended it itself.

    Raises:
        ValueError: A prompt has no tokens or does not fit the model's context, an option is out of range, the model is
            in train mode, or a logit is not finite.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: Greedy text hides how sure the model is, and one sample hides how much samples vary.

    Cost: 1 forward per new token, cached; about 0.1 s for 20 tokens on the demo model.

    Example:
        generate_text(model, tokenizer, "The Eiffel Tower is located in the city of", max_new_tokens=8)
    """
    prompts = texts_of(prompt)
    ids = prompt_ids(tokenizer, prompts, chat, system)
    continuations = continue_tokens(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    return GeneratedText(
        **header(model, "generate_text", n=len(prompts), seed=seed if temperature else None),
        completions=[Completion(prompt=text, **new) for text, new in zip(prompts, continuations, strict=True)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
