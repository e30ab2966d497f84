"""Generate text: the model's continuation of one prompt or of a batch of prompts."""

from __future__ import annotations

from typing import TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._generation import Continuation, continue_tokens
from techniques._tokens import chat_ids, encode


class Completion(Continuation):
    """A continuation and the prompt that it belongs to."""

    prompt: str


class GeneratedText(TypedDict):
    """Result of `generate_text`: a completion for each prompt, in order, and how they were made."""

    completions: list[Completion]
    max_new_tokens: int
    temperature: float
    seed: int


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
    """Continue a prompt, or several in one batch.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it needs no pad token and is not changed.
        prompt: One prompt or a list of them.
        max_new_tokens: Most tokens that a continuation may have.
        temperature: 0 takes the most probable token each time; above 0 samples from the softmax of the logits
            divided by it, without top-k or top-p cuts.
        seed: Seed of the sampling; the process's own random state is left as it was. The draw belongs to the whole
            batch: the same prompt in another batch gets another sample.
        chat: Whether each prompt is a user message, laid out by the chat template, rather than plain text.
        system: System message before it; needs `chat=True`.

    Returns:
        One completion per prompt, in order: only the new text, its token ids, and whether the model ended it itself.

    Raises:
        ValueError: A prompt has no tokens or does not fit the model's context, or an option is out of range.
    """
    if system is not None and not chat:
        raise ValueError("A system message was given for plain text; it needs the chat template. Pass chat=True.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [chat_ids(tokenizer, text, system) for text in prompts] if chat and prompts else encode(tokenizer, prompts)
    continuations = continue_tokens(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    completions = [Completion(prompt=text, **new) for text, new in zip(prompts, continuations, strict=True)]
    return GeneratedText(completions=completions, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
