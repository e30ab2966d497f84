"""Text to tokens and back, without ever changing the tokenizer's settings.

Padding is done here by hand: it needs no pad token, and the worker's tokenizer, which all clients share, keeps its
padding side and its pad token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TokenProb(TypedDict):
    """One token of a next-token distribution.

    Attributes:
        token: Its text, with the leading space where it has one.
        id: Its id in the vocabulary.
        prob: Its probability, 0 to 1.
        logprob: Natural log of the probability, in nats.
        rank: 1 for the most probable token; tokens of equal probability share a rank.
    """

    token: str
    id: int
    prob: float
    logprob: float
    rank: int


@dataclass(frozen=True)
class Batch:
    """Token sequences padded to one length; the padding is masked, so the id that fills it has no effect."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


def check_lists(**lists: object) -> None:
    """Raise a ValueError if a string was given for a list of strings, as it would be read letter by letter."""
    for name, given in lists.items():
        if isinstance(given, str):
            raise ValueError(f"{name} is the string {given!r}; expected a list of strings. Put it in a list.")


def texts_of(given: str | Sequence[str]) -> list[str]:
    """One text or several as a list.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise ValueError(f"The text is {given!r}; expected a string or a list of strings.")
    return list(given)


def plain(given: Any) -> Any:
    """Numbers, arrays and tensors of numpy and torch as Python's own, also inside a list or tuple."""
    if isinstance(given, list | tuple):
        return type(given)(plain(part) for part in given)
    return given.tolist() if hasattr(given, "tolist") else given


def whole_numbers(name: str, given: object) -> list[int]:
    """A whole number or several, also numpy's or torch's, as a list.

    Raises:
        ValueError: It is something else.
    """
    values = plain(given)
    several = [values] if isinstance(values, int) else values
    if not isinstance(several, list | tuple | range) or any(type(value) is not int for value in several):
        raise ValueError(f"{name} is {given!r}; expected whole numbers, as 1 or [0, 1].")
    return list(several)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer adds by default.

    Raises:
        ValueError: There is no text, or one is no string or has no tokens.
    """
    check_lists(texts=texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"The text {text!r} is of type {type(text).__name__}; expected a string.")
    if not texts:
        raise ValueError("The list of texts is empty; expected at least one text. Pass a string or a list of strings.")
    if isinstance(tokenizer, torch.nn.Module) or not callable(tokenizer):
        raise ValueError(
            f"The tokenizer is of the type {type(tokenizer).__name__}; expected a Hugging Face tokenizer. Pass the "
            "model first, then its tokenizer."
        )
    encoded = [list(tokenizer(text)["input_ids"]) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"The text {text!r} has no tokens; expected at least one. Give it some content.")
    return encoded


def pad(ids: Sequence[Sequence[int]], side: Literal["left", "right"], filler: int, device: torch.device) -> Batch:
    """Pad to the longest sequence.

    Right padding is exact for a plain forward pass of a causal model: real tokens keep positions 0, 1, ... and never
    see what follows them. Generation needs left padding, so that each row ends with its last real token.
    """
    if device.type == "meta":
        device = torch.device("cpu")  # the weights are offloaded; accelerate moves the inputs to where they run
    longest = max(len(row) for row in ids)
    filled, masks = [], []
    for row in ids:
        gap = longest - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        filled.append([filler] * before + [*row] + [filler] * after)
        masks.append([0] * before + [1] * len(row) + [0] * after)
    return Batch(torch.tensor(filled, device=device), torch.tensor(masks, device=device))


def check_model(model: object) -> None:
    """Raise a ValueError if it is no model at all, as a name, or a tokenizer in its place."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"The model is of the type {type(model).__name__}; expected a loaded Hugging Face model. Pass the model "
            "first, then its tokenizer; of a wrapper, the plain model that it holds."
        )


def check_eval(model: PreTrainedModel) -> None:
    """Raise a ValueError if any part of the model is in train mode, where dropout would change every run."""
    check_model(model)
    if any(part.training for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in train mode, in which dropout changes every run; expected eval mode. "
            "Call model.eval() first."
        )


def check_context(model: PreTrainedModel, ids: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """Refuse what does not fit the model's context; on a GPU an index out of range would end the worker.

    Raises:
        ValueError: The longest sequence and `new_tokens` exceed the model's context.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(row) for row in ids)
    # The last new token is never fed back, so it takes no position.
    if context is not None and longest + max(new_tokens - 1, 0) > context:
        more = f" and {new_tokens} new ones were asked for" if new_tokens else ""
        raise ValueError(
            f"The longest text has {longest} tokens{more}, but the model's context holds {context}. "
            f"Shorten the text{' or lower max_new_tokens' if new_tokens else ''}."
        )


def span_positions(tokenizer: PreTrainedTokenizerBase, text: str, span: str) -> list[int]:
    """Positions of the tokens that hold any character of `span`, which must occur once in `text`.

    Raises:
        ValueError: The span is empty, absent or there more than once, or the tokenizer does not tell where its tokens
            lie.
    """
    if not span.strip() or text.count(span) != 1:
        raise ValueError(
            f"The span {span!r} occurs {text.count(span) if span else 0} times in {text!r}; expected once. "
            "Give a piece of the text, long enough to be the only one."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in a text; expected a fast tokenizer, "
            "which named spans need. Load one with use_fast=True."
        )
    start = text.index(span) + len(span) - len(span.lstrip())
    end = text.index(span) + len(span.rstrip())
    offsets: Any = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [i for i, (first, last) in enumerate(offsets) if first < end and last > start]


def resolve_position(position: int, length: int, text: str) -> int:
    """Index from the start of a text of `length` tokens; negative positions count from its end.

    Raises:
        ValueError: The text has no such position.
    """
    if not -length <= position < length:
        raise ValueError(
            f"Position {position} is outside the text {text!r}, which has {length} tokens. "
            f"Choose one from {-length} to {length - 1}."
        )
    return position % length


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Text of one token with its leading space; the vocabulary's own spelling where it is no whole character."""
    raw = str(tokenizer.convert_ids_to_tokens(token_id))
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return raw
    # SentencePiece marks a leading space with this sign, and decoding a lone token drops it.
    return f" {text}" if raw.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" ") else text


def single_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of a text that is one token, leading space included.

    Raises:
        ValueError: The text is not exactly one token; the message shows its pieces.
    """
    pieces = tokenizer.tokenize(text)
    # SentencePiece puts a space before every text, so there " Paris" is what "Paris" alone becomes.
    for found in (pieces, tokenizer.tokenize(text.removeprefix(" "))):
        if len(found) == 1:
            token_id = cast(int, tokenizer.convert_tokens_to_ids(found[0]))
            if found is pieces or token_text(tokenizer, token_id) == text:
                return token_id
    raise ValueError(
        f"The target {text!r} is {len(pieces)} tokens, {pieces}; expected one. "
        "Check its leading space, or choose the piece in which the answers differ."
    )


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, answers: tuple[str, str] | Sequence[tuple[str, str]], n: int
) -> Int[Tensor, "n 2"]:
    """Ids of (right, wrong) answers for `n` prompts: one pair for all of them, or one for each; on the CPU.

    Raises:
        ValueError: There are not as many pairs as prompts, an answer is not one token, or both are the same token.
    """
    pairs: list[Any] = [answers] * n if len(answers) == 2 and isinstance(answers[0], str) else list(answers)
    if len(pairs) != n or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"answers is {answers!r} for {n} prompts; expected one pair (right answer, wrong answer), or one for each."
        )
    ids = torch.tensor([[single_token_id(tokenizer, text) for text in pair] for pair in pairs])
    for pair, (right, wrong) in zip(pairs, ids.tolist(), strict=True):
        if right == wrong:
            raise ValueError(f"Both answers of {pair!r} are the same token; expected two different ones.")
    return ids


def check_top_k(top_k: int, d_vocab: int) -> None:
    """Raise a ValueError unless `top_k` is between 1 and the size of the vocabulary."""
    if not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k is {top_k}; expected 1 to {d_vocab}, the size of the model's vocabulary.")


def check_finite(logits: Float[Tensor, "*points d_vocab"]) -> None:
    """Raise a ValueError if a logit is infinite or not a number, so that no probability would be."""
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"The model's logits are not all finite in {logits.dtype}; expected numbers. "
            "Load the model in bfloat16 or float32, or check its weights."
        )


def log_probs(logits: Float[Tensor, "*points d_vocab"]) -> Float[Tensor, "*points d_vocab"]:
    """Log-softmax in nats, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def top_tokens(
    tokenizer: PreTrainedTokenizerBase, logprobs: Float[Tensor, "points d_vocab"], top_k: int
) -> list[list[TokenProb]]:
    """The most probable tokens at each point, best first."""
    found = logprobs.topk(top_k)
    # Whatever beats a token of the top is in the top itself, so the rest of the vocabulary need not be compared.
    ranks = 1 + (found.values[:, None, :] > found.values[:, :, None]).sum(-1)
    return _token_probs(tokenizer, found.indices, found.values, ranks)


def chosen_tokens(
    tokenizer: PreTrainedTokenizerBase,
    logprobs: Float[Tensor, "points d_vocab"],
    token_ids: Int[Tensor, "points chosen"],
) -> list[list[TokenProb]]:
    """Given tokens at each point, in the order given."""
    values = logprobs.gather(-1, token_ids)
    # One comparison per column, as [points, chosen, d_vocab] would not fit where [points, d_vocab] just does.
    columns = [1 + (logprobs > column[:, None]).sum(-1) for column in values.T]
    return _token_probs(tokenizer, token_ids, values, torch.stack(columns, -1) if columns else token_ids)


def _token_probs(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Int[Tensor, "points chosen"],
    values: Float[Tensor, "points chosen"],
    ranks: Int[Tensor, "points chosen"],
) -> list[list[TokenProb]]:
    texts = {i: token_text(tokenizer, i) for i in set(token_ids.flatten().tolist())}
    columns = (token_ids, values.exp(), values, ranks)
    return [
        [TokenProb(token=texts[i], id=i, prob=p, logprob=logp, rank=r) for i, p, logp, r in zip(*point, strict=True)]
        for point in zip(*(column.tolist() for column in columns), strict=True)
    ]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, user: str, system: str | None = None, prefill: str | None = None
) -> list[int]:
    """Token ids of a chat of one user message, up to where the assistant's answer starts or, with `prefill`, goes on.

    The tokenizer's chat template lays it out. A template without a system role gets the system text at the head of
    the user message; a tokenizer without a template gets `System: ...`, `User: ...` and `Assistant:` lines.
    """
    if tokenizer.chat_template is None:
        head = f"System: {system}\n" if system else ""
        answer = f" {prefill}" if prefill else ""
        return encode(tokenizer, [f"{head}User: {user}\nAssistant:{answer}"])[0]
    try:
        return _template_ids(tokenizer, user, system, prefill)
    except _template_error():
        if system is None:
            raise
        return _template_ids(tokenizer, f"{system}\n\n{user}", None, prefill)


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError  # noqa: PLC0415 - comes with transformers' chat templates, not with transformers

    return TemplateError


def _template_ids(tokenizer: PreTrainedTokenizerBase, user: str, system: str | None, prefill: str | None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    if prefill:
        messages.append({"role": "assistant", "content": prefill})
    options: dict[str, Any] = {"continue_final_message": True} if prefill else {"add_generation_prompt": True}
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])
