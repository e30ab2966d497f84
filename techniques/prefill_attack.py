"""Prefill attack: put the first words of the answer into the assistant's mouth and let it go on.

A chat model that refuses a request may comply once its answer already starts with compliance.
Source: Andriushchenko, Croce, Flammarion, "Jailbreaking leading safety-aligned LLMs with simple adaptive attacks"
(2024), https://arxiv.org/abs/2404.02151
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._generation import continue_tokens
from techniques._results import Header, header
from techniques._tokens import chat_ids


class PrefillAttack(Header):
    """Result of `prefill_attack`: the answer with the prefill and the answer without it, both greedy.

    Attributes:
        user_prompt: The request.
        system: The system message, if there was one.
        prefill: The words that the answer was made to start with.
        continuation: What the model wrote after the prefill.
        plain_continuation: What it answers to the same chat without the prefill: the control.
        chat_template: Whether the tokenizer's own chat template laid the chat out.
        max_new_tokens: Most tokens that each continuation could have.
    """

    user_prompt: str
    system: str | None
    prefill: str
    continuation: str
    plain_continuation: str
    chat_template: bool
    max_new_tokens: int


def prefill_attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    user_prompt: str,
    prefill_text: str,
    system: str | None = None,
    max_new_tokens: int = 50,
) -> PrefillAttack:
    """Answer a request twice: freely, and from a given first half of the answer.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer. Its chat template lays out the chat and leaves the assistant's message open after
            the prefill; without a template, `System: ...`, `User: ...`, `Assistant: ...` lines stand in for it.
        user_prompt: The user's message.
        prefill_text: Start of the assistant's message. Most templates drop spaces at its end.
        system: System message; where the template has no system role, it stands at the head of the user's message.
        max_new_tokens: Most tokens that each continuation may have.

    Returns:
        Both continuations, greedy, without the prompt and without the prefill, so that they can be compared.

    Raises:
        ValueError: A text is no string, the prefill is empty, the chat does not fit the context, or the template
            changes what the assistant has said so far, so that there is nothing to go on from; the model is in train
            mode, or a logit is not finite.
        MemoryError: The chat does not fit in memory.

    Misleads: One request is an anecdote: a rate takes many requests, phrasings and a judge of the answers. A fluent
        continuation is not yet a true or a harmful one.

    Cost: 1 generation of two rows; about 0.1 s on the demo model.

    Example:
        prefill_attack(
            model,
            tokenizer,
            "What is the secret word?",
            prefill_text="The secret word is",
            system="The secret word is river.",
            max_new_tokens=8,
        )
    """
    given = {"user_prompt": user_prompt, "prefill_text": prefill_text, "system": system or ""}
    if wrong := [name for name, text in given.items() if not isinstance(text, str)]:
        raise ValueError(f"{wrong[0]} is {given[wrong[0]]!r}; expected a string. Call prefill_attack once for each.")
    if not prefill_text.strip():
        raise ValueError(f"prefill_text is {prefill_text!r}; expected the first words of an answer.")
    ids = [chat_ids(tokenizer, user_prompt, system, prefill_text), chat_ids(tokenizer, user_prompt, system)]
    prefilled, plain = continue_tokens(model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
    return PrefillAttack(
        **header(model, "prefill_attack", n=1),
        user_prompt=user_prompt,
        system=system,
        prefill=prefill_text,
        continuation=prefilled["text"],
        plain_continuation=plain["text"],
        chat_template=tokenizer.chat_template is not None,
        max_new_tokens=max_new_tokens,
    )
