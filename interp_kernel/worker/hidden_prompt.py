"""A system prompt that the model sees and the notebook does not.

`read_hidden_prompt` fetches the text where only the worker looks; `hide_prompt` makes a tokenizer put it in front of
whatever it turns into model inputs. The ids are those of the visible equivalent: of `prompt`, a blank line and the
text for plain text, and of the conversation with the prompt as (the start of) its system message for a chat.

    route                                   what goes in
    call, encode, batches, pairs            the prompt before the (first) text, after the BOS token
    text that starts as the chat template   the prompt as system message, so that a chat rendered with
      starts a chat                           `tokenize=False` and tokenized later gives the same ids
    apply_chat_template, tokenize=True      the prompt as system message, before the user's own if there is one; in the
                                              first user turn where the template knows no system role
    apply_chat_template, tokenize=False     nothing: the string shows the user's own messages
    tokenize, convert_*, decode, pad        nothing; `convert_tokens_to_ids(tokenize(" Paris"))` finds an answer's id

The prompt's tokens have offsets (0, 0) and count as special tokens. `max_length` counts them, and truncation takes the
user's text only: a `max_length` without room for any of that is a ValueError.

What this is and is not: the text stands in no attribute, repr, saved file, copy or pickle (a pickled tokenizer arrives
as an ordinary one, without prompt), yet the model must read it, so decoding input ids shows it, and code that runs in
the worker can find it. It keeps a prompt out of sight; it does not keep it from someone who looks for it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from interp_kernel.errors import LoadError
from interp_kernel.spec import SECRET_NAME

SEPARATOR = "\n\n"

_PROMPTS: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
# Chats being tokenized by the running `apply_chat_template`: as the user wrote them -> with the prompt in them.
_RENDERINGS: ContextVar[Mapping[str, str]] = ContextVar("renderings", default=MappingProxyType({}))
_PROBE = "interpkernelprobe"
_PER_TOKEN = ("ids", "type_ids", "tokens", "words", "offsets", "special_tokens_mask", "attention_mask")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)


def read_hidden_prompt(source: str) -> str:
    """Fetch the text of a hidden system prompt.

    Args:
        source: `file:PATH`; or `secret:NAME`, which is the file NAME in `$INTERP_SECRETS_DIR` (by default
            `~/.config/interp-kernel/secrets`), readable by its owner only, or else the environment variable NAME,
            which is then removed from this process's environment.

    Returns:
        The text without surrounding white space.

    Raises:
        LoadError: There is no such file or secret, others may read the secret, or it holds no text.
    """
    kind, _, name = source.partition(":")
    if kind == "file" and name:
        text = _read_text(Path(name).expanduser())
    elif kind == "secret" and SECRET_NAME.fullmatch(name):
        text = _read_secret(name)
    else:
        raise LoadError("The hidden system prompt is given in another way than `file:PATH` or `secret:NAME`.")
    if not text.strip():
        raise LoadError(f"The hidden system prompt of {source!r} is empty; it must hold some text.")
    return text.strip()


def hide_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    """Make `tokenizer` put `text` before everything that it turns into model inputs; see the module's table.

    Args:
        tokenizer: A fast or a Python tokenizer of transformers; it is changed in place (its class becomes a subclass).
        text: The hidden system prompt.

    Returns:
        `tokenizer`. `copy.copy` and `copy.deepcopy` of it hide the prompt too; a pickle of it carries none.

    Raises:
        LoadError: The tokenizer is of another kind, or its ids differ from those of the visible equivalent.
    """
    if not isinstance(tokenizer, _Hidden):
        tokenizer.__class__ = _hidden_class(type(tokenizer))  # type: ignore[arg-type]  # a class is hashable
    _PROMPTS[tokenizer] = text
    ordinary = _ordinary(tokenizer)
    for special in (True, False):
        visible = ordinary.encode(text + SEPARATOR + "a", add_special_tokens=special)
        if not visible or tokenizer.encode("a", add_special_tokens=special) != visible:
            raise LoadError(
                f"The hidden system prompt can't be put into {type(tokenizer).__name__}: its tokens would differ from "
                "those of the visible prompt. Use another tokenizer, or write the prompt into the text."
            )
    return tokenizer


def _read_secret(name: str) -> str:
    folder = Path(os.environ.get("INTERP_SECRETS_DIR") or "~/.config/interp-kernel/secrets").expanduser()
    path = folder / name
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise LoadError(
                f"The secret file {str(path)!r} has mode {mode:o}, so others than its owner may use it. "
                f"Run `chmod 600 {path}`."
            )
        return _read_text(path)
    if (value := os.environ.pop(name, None)) is not None:
        return value
    raise LoadError(
        f"The secret {name!r} was not found: there is neither a file {str(path)!r} nor an environment variable {name} "
        "of the worker. Write the hidden system prompt to that file and make it readable by you only."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        # The error's own text quotes bytes of the prompt, so it must not be chained.
        raise LoadError(f"The hidden system prompt in {str(path)!r} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise LoadError(
            f"The hidden system prompt in {str(path)!r} can't be read ({error.strerror}); "
            "expected a text file on the worker's machine."
        ) from error


# Where the prompt goes.


@dataclass(frozen=True)
class _Joined:
    """A text with the prompt in it: `text[end:]` is the user's own `visible[start:]`, all before holds the prompt."""

    text: str
    end: int
    start: int


def _join(visible: str, prompt: str, openings: Sequence[tuple[str, str]]) -> _Joined:
    hidden = _RENDERINGS.get().get(visible)
    if hidden is not None:
        # Letters that the prompt happens to share with what follows it must not count as the user's.
        end = len(hidden) - _shared(visible[::-1], hidden[::-1])
        end = max(end, hidden.find(prompt, max(0, _shared(visible, hidden) - len(prompt))) + len(prompt))
        return _Joined(hidden, end, max(0, end - len(hidden) + len(visible)))
    for opening, replacement in openings:
        if visible.startswith(opening):
            return _Joined(replacement + visible[len(opening) :], len(replacement), len(opening))
    return _Joined(prompt + SEPARATOR + visible, len(prompt + SEPARATOR), 0)


def _shared(one: str, other: str) -> int:
    """How many characters two texts start with in common."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _openings(ordinary: PreTrainedTokenizerBase, prompt: str) -> list[tuple[str, str]]:
    """How the chat template starts a chat, without and with the prompt; the longest first.

    The rule looks at the text alone, so the ids of a text never depend on which calls came before it.
    """
    if not ordinary.chat_template:
        return []
    pairs = []
    user = {"role": "user", "content": _PROBE}
    for conversation in ([user], [{"role": "system", "content": _PROBE}, user]):
        try:
            visible = _render(ordinary, conversation, {})
        except _TEMPLATE_ERRORS:
            continue
        hidden = _hide_in_chat(ordinary, conversation, prompt, {})
        opening, found, _ = visible.partition(_PROBE)
        if hidden and found and opening.strip():
            pairs.append((opening, hidden[1].partition(_PROBE)[0]))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _render(ordinary: PreTrainedTokenizerBase, conversation: Any, options: Mapping[str, Any]) -> str:
    return str(ordinary.apply_chat_template(conversation, **options, tokenize=False))


def _hide_in_chat(
    ordinary: PreTrainedTokenizerBase, conversation: Any, prompt: str, options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], str] | None:
    """The conversation with the prompt in it and how the template writes it; None if it finds no place for it."""
    messages = [dict(message) for message in getattr(conversation, "messages", conversation)]
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    has_system = bool(messages) and messages[0].get("role") == "system"
    system = [{"role": "system", "content": prompt}, *messages]
    candidates = [_prepend(messages, 0, prompt) if has_system else system]
    candidates += [_prepend(messages, users[0], prompt)] if users else []
    for candidate in candidates:
        try:
            rendered = _render(ordinary, candidate, options)
        except _TEMPLATE_ERRORS:
            continue
        if prompt in rendered:
            return candidate, rendered
    return None


def _prepend(messages: list[dict[str, Any]], index: int, prompt: str) -> list[dict[str, Any]]:
    content = messages[index].get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": prompt + SEPARATOR}, *content]
    else:
        content = prompt + SEPARATOR + content if content else prompt
    return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]


# The tokenizer's class with a prompt.


class _Hidden(PreTrainedTokenizerBase):
    """What both kinds share. The subclass made for a tokenizer's class has that class as its second base."""

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        ordinary, prompt = _ordinary(self), _PROMPTS.get(self)
        signature = inspect.signature(ordinary.apply_chat_template)
        options = dict(signature.bind(conversation, *args, **kwargs).arguments)
        options = {**options, **options.pop("kwargs", {})}
        if prompt is None or not options.get("tokenize", True):
            return ordinary.apply_chat_template(conversation, *args, **kwargs)
        del options["conversation"]
        for name in ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"):
            options.pop(name, None)
        for name in ("return_assistant_tokens_mask", "tokenizer_kwargs"):
            options.pop(name, None)
        if options.pop("sanitize_control_tokens", False):
            return _apply_sanitized(ordinary, conversation, prompt, options, kwargs)
        renderings = {}
        for chat in _chats(conversation):
            visible = _render(ordinary, chat, options)
            hidden = _hide_in_chat(ordinary, chat, prompt, options)
            renderings[visible] = hidden[1] if hidden else prompt + SEPARATOR + visible
        running = _RENDERINGS.set(renderings)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        finally:
            _RENDERINGS.reset(running)

    def __copy__(self) -> PreTrainedTokenizerBase:
        return _hide_again(copy.copy(_ordinary(self)), _PROMPTS.get(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedTokenizerBase:
        return _hide_again(copy.deepcopy(_ordinary(self), memo), _PROMPTS.get(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1 names the class as data; from 2 on pickle insists that it is the class of this very object.
        return _ordinary(self).__reduce_ex__(1)


class _HiddenFast(_Hidden):
    def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        ordinary, prompt = _ordinary(self), _PROMPTS.get(self)
        if prompt is not None:
            openings = _openings(ordinary, prompt)
            injector = _Injector(self._tokenizer, prompt, lambda text: _join(text, prompt, openings))
            object.__setattr__(ordinary, "__dict__", {**self.__dict__, "_tokenizer": injector})
        encoded: BatchEncoding = ordinary._encode_plus(*args, **kwargs)
        return encoded

    def tokenize(self, *args: Any, **kwargs: Any) -> list[str]:
        tokens: list[str] = _ordinary(self).tokenize(*args, **kwargs)
        return tokens


class _HiddenSlow(_Hidden):
    def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        ordinary, prompt = _ordinary(self), _PROMPTS.get(self)
        options = dict(inspect.signature(ordinary._encode_plus).bind(*args, **kwargs).arguments)
        extra = options.pop("kwargs", {})
        text, words = options["text"], options.get("is_split_into_words", False)
        batched = isinstance(text, list | tuple) and (
            isinstance(text[0], list | tuple) or (isinstance(text[0], str) and not words) if text else not words
        )
        if prompt is None or batched:
            # A batch comes back here text by text.
            return super()._encode_plus(*args, **kwargs)
        head, ids = _slow_ids(ordinary, prompt, text, words, extra)
        pair = None if options.get("text_pair") is None else _plain_ids(ordinary, options["text_pair"], words, extra)
        for name in ("text", "text_pair", "is_split_into_words"):
            options.pop(name, None)
        padding, truncation = options.pop("padding_strategy", False), options.pop("truncation_strategy", False)
        return _assemble(
            ordinary, head, ids, pair, padding=padding, truncation=truncation, prepend_batch_axis=True, **options
        )

    def prepare_for_model(self, ids: list[int], pair_ids: list[int] | None = None, **kwargs: Any) -> BatchEncoding:
        ordinary, prompt = _ordinary(self), _PROMPTS.get(self)
        head = [] if prompt is None else _plain_ids(ordinary, prompt + SEPARATOR, False, {})
        return _assemble(ordinary, head, ids, pair_ids, **kwargs)


@functools.cache
def _hidden_class(base: type[PreTrainedTokenizerBase]) -> type[PreTrainedTokenizerBase]:
    if issubclass(base, TokenizersBackend):
        mixin: type[_Hidden] = _HiddenFast
    elif issubclass(base, PythonBackend):
        mixin = _HiddenSlow
    else:
        raise LoadError(
            f"The hidden system prompt can't be put into {base.__name__}; expected a tokenizer of the classes "
            "TokenizersBackend (fast) or PythonBackend. Use one of these, or write the prompt into the text."
        )
    # The name goes into files that save_pretrained writes, so it must be the one that from_pretrained knows.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same tokenizer, attributes shared, as one of its original class, so without a prompt."""
    base = type(tokenizer).__bases__[1]
    view: Any = object.__new__(base)
    object.__setattr__(view, "__dict__", tokenizer.__dict__)
    return view


def _hide_again(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> PreTrainedTokenizerBase:
    return tokenizer if prompt is None else hide_prompt(tokenizer, prompt)


def _is_batch(conversation: Any) -> bool:
    return bool(conversation) and (isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages"))


def _chats(conversation: Any) -> list[Any]:
    return list(conversation) if _is_batch(conversation) else [conversation]


def _apply_sanitized(
    ordinary: Any, conversation: Any, prompt: str, options: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Any:
    """Transformers encodes sanitized chats piece by piece, so here the prompt can only go in as a message."""
    hidden = [_hide_in_chat(ordinary, chat, prompt, options) for chat in _chats(conversation)]
    if kwargs.get("truncation") or None in hidden:
        raise ValueError(
            "sanitize_control_tokens=True with a hidden system prompt works without truncation, and with chat "
            "templates that take a system message or a user turn. Leave one of them out."
        )
    chats = [pair[0] for pair in hidden if pair]
    return ordinary.apply_chat_template(chats if _is_batch(conversation) else chats[0], **kwargs)


def _no_room(max_length: int) -> ValueError:
    return ValueError(
        f"max_length={max_length} leaves no room for the text beside the hidden system prompt, which is never "
        "truncated. Give a larger max_length."
    )


# Fast tokenizers: the prompt's ids go in as the expansion of one special token of the post-processor, so truncation,
# overflow, pairs, offsets and BOS are handled by the Rust code that always handles them.


class _Injector:
    """Stands in for the Rust tokenizer during one call of `_encode_plus`; only `encode_batch` differs."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, join: Callable[[str], _Joined]) -> None:
        self.__dict__.update(tokenizer=tokenizer, prompt=prompt, join=join)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["tokenizer"], name, value)

    def encode_batch(self, inputs: Any, is_pretokenized: bool = False, add_special_tokens: bool = True) -> Any:
        tokenizer = self.__dict__["tokenizer"]
        truncation, padding = tokenizer.truncation, tokenizer.padding
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encodings = []
        for item in inputs:
            paired = isinstance(item, tuple if is_pretokenized else (tuple, list)) and len(item) == 2
            first, second = item if paired else (item, None)
            head, tail = self.encode_first(first, is_pretokenized)
            pair = None
            if second is not None:
                pair = tokenizer.encode(second, is_pretokenized=is_pretokenized, add_special_tokens=False)
            shell = _shell(tokenizer.post_processor, head, add_special_tokens)
            if truncation is not None:
                used = shell.num_special_tokens_to_add(pair is not None)
                if truncation["max_length"] - used <= truncation["stride"]:
                    raise _no_room(truncation["max_length"])
                shell.enable_truncation(**truncation)
            encodings.append(shell.post_process(tail, pair, True))
        return encodings if padding is None else _pad(encodings, padding)

    def encode_first(self, text: Any, is_pretokenized: bool) -> tuple[list[tuple[int, str]], Encoding]:
        """The head as (id, token) and the user's own part."""
        tokenizer, prompt = self.__dict__["tokenizer"], self.__dict__["prompt"]
        if is_pretokenized:
            state = _state(tokenizer, [prompt + SEPARATOR, *text], True)
            return _cut(state, [word > 0 for word in state["words"]], 0)
        joined = self.__dict__["join"](text)
        state = _state(tokenizer, joined.text, False)
        return _cut(state, [start >= joined.end for start, _ in state["offsets"]], joined.start - joined.end)


def _state(tokenizer: Tokenizer, text: Any, is_pretokenized: bool) -> dict[str, Any]:
    encoding = tokenizer.encode(text, is_pretokenized=is_pretokenized, add_special_tokens=False)
    state: dict[str, Any] = json.loads(encoding.__getstate__())
    return state


def _cut(state: dict[str, Any], is_users: list[bool], shift: int) -> tuple[list[tuple[int, str]], Encoding]:
    at = is_users.index(True) if True in is_users else len(is_users)
    head = list(zip(state["ids"][:at], state["tokens"][:at], strict=True))
    tail = {name: state[name][at:] for name in _PER_TOKEN}
    tail["offsets"] = [(max(0, start + shift), max(0, stop + shift)) for start, stop in tail["offsets"]]
    first = next((word for word in tail["words"] if word is not None), 0)
    tail["words"] = [None if word is None else word - first for word in tail["words"]]
    tail |= {"overflowing": [], "sequence_ranges": {"0": {"start": 0, "end": len(tail["ids"])}}}
    encoding = Encoding()
    encoding.__setstate__(json.dumps(tail).encode())
    return head, encoding


def _pad(encodings: list[Encoding], padding: dict[str, Any]) -> list[Encoding]:
    length = padding["length"] or max(len(encoding) for encoding in encodings)
    if multiple := padding["pad_to_multiple_of"]:
        length = -(-length // multiple) * multiple
    options = {name: padding[name] for name in ("direction", "pad_id", "pad_type_id", "pad_token")}
    for encoding in encodings:
        encoding.pad(length, **options)
    return encodings


def _shell(post_processor: Any, head: list[tuple[int, str]], add_special_tokens: bool) -> Tokenizer:
    """A tokenizer without vocabulary whose post-processor adds the head, and what the real one adds around it."""
    blank = Tokenizer(BPE())
    if post_processor is not None:
        blank.post_processor = post_processor
    state = json.loads(blank.to_str())
    template = _template(state["post_processor"])
    for name in ("single", "pair"):
        pieces = [piece for piece in template[name] if add_special_tokens or "Sequence" in piece]
        at = next(index for index, piece in enumerate(pieces) if "Sequence" in piece)
        pieces.insert(at, {"SpecialToken": {"id": SEPARATOR, "type_id": pieces[at]["Sequence"]["type_id"]}})
        template[name] = pieces
    ids, tokens = [token_id for token_id, _ in head], [token for _, token in head]
    template["special_tokens"][SEPARATOR] = {"id": SEPARATOR, "ids": ids, "tokens": tokens}
    return Tokenizer.from_str(json.dumps({**state, "post_processor": template}))


def _template(processor: dict[str, Any] | None) -> dict[str, Any]:
    """The TemplateProcessing in, or equivalent to, a post-processor given as tokenizers' JSON."""
    kind = processor["type"] if processor else None
    if processor and kind == "Sequence":
        found = [_template(part) for part in processor["processors"] if part["type"] != "ByteLevel"]
        return found[-1] if found else _template(None)
    if processor and kind == "TemplateProcessing":
        return processor
    if processor and kind in ("BertProcessing", "RobertaProcessing"):
        between = "[SEP]:0 $B:1 [SEP]:1" if kind == "BertProcessing" else "[SEP]:0 [SEP]:0 $B:0 [SEP]:0"
        specials = {"[CLS]": processor["cls"], "[SEP]": processor["sep"]}
        return _written("[CLS]:0 $A:0 [SEP]:0", f"[CLS]:0 $A:0 {between}", specials)
    return _written("$A:0", "$A:0 $B:1", {})


def _written(single: str, pair: str, specials: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A TemplateProcessing in tokenizers' JSON; `single` and `pair` are pieces with type ids."""

    def piece(word: str) -> dict[str, Any]:
        name, type_id = word.split(":")
        kind = "Sequence" if name.startswith("$") else "SpecialToken"
        return {kind: {"id": name.removeprefix("$"), "type_id": int(type_id)}}

    tokens = {name: {"id": name, "ids": [int(token[1])], "tokens": [token[0]]} for name, token in specials.items()}
    pieces = {"single": [piece(word) for word in single.split()], "pair": [piece(word) for word in pair.split()]}
    return {"type": "TemplateProcessing", **pieces, "special_tokens": tokens}


# Python tokenizers.


def _slow_ids(
    ordinary: Any, prompt: str, text: Any, words: bool, extra: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    if not isinstance(text, str):
        return _plain_ids(ordinary, prompt + SEPARATOR, False, extra), _plain_ids(ordinary, text, words, extra)
    joined = _join(text, prompt, _openings(ordinary, prompt))
    ids = _plain_ids(ordinary, joined.text, False, extra)
    head = _plain_ids(ordinary, joined.text[: joined.end], False, extra)
    same = next((index for index, pair in enumerate(zip(ids, head, strict=False)) if pair[0] != pair[1]), len(head))
    # Without offsets a token across the border shows as the first that differs; it holds a part of the prompt.
    at = same if same == len(head) else same + 1
    return ids[:at], ids[at:]


def _plain_ids(ordinary: Any, text: Any, words: bool, extra: Mapping[str, Any]) -> list[int]:
    if isinstance(text, str):
        text = ordinary.tokenize(text, **extra)
    elif words and text and isinstance(text[0], str):
        text = [token for word in text for token in ordinary.tokenize(word, **extra)]
    elif text and isinstance(text[0], int):
        return list(text)
    return list(ordinary.convert_tokens_to_ids(text))


def _assemble(
    ordinary: Any,
    head: list[int],
    ids: list[int],
    pair: list[int] | None,
    *,
    add_special_tokens: bool = True,
    padding: Any = False,
    truncation: Any = False,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: Any = None,
    return_attention_mask: bool | None = None,
    return_length: bool = False,
    prepend_batch_axis: bool = False,
    **options: Any,
) -> BatchEncoding:
    """`prepare_for_model` with the head after the leading special tokens, where truncation can't reach it."""
    padding, truncation, max_length, _ = ordinary._get_padding_truncation_strategies(
        padding=padding, truncation=truncation, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of
    )
    room = None
    if truncation.value != "do_not_truncate" and max_length is not None:
        special = ordinary.num_special_tokens_to_add(pair=pair is not None) if add_special_tokens else 0
        room = max_length - len(head)
        if room <= special:
            raise _no_room(max_length)
    options |= {"add_special_tokens": add_special_tokens, "truncation": truncation.value, "max_length": room}
    made = ordinary.prepare_for_model(ids, pair, return_attention_mask=False, **options)
    if return_tensors:
        # As transformers does: what overflowed has another length and can't be part of a tensor.
        for name in ("overflowing_tokens", "num_truncated_tokens"):
            made.pop(name, None)
    at = ordinary.build_inputs_with_special_tokens([-1]).index(-1) if add_special_tokens else 0
    data = _insert(made, head, at)
    padded = ordinary.pad(
        data,
        padding=padding,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_side=padding_side,
        return_attention_mask=return_attention_mask,
    )
    if return_length:
        padded["length"] = len(padded["input_ids"])
    return BatchEncoding(padded, tensor_type=return_tensors, prepend_batch_axis=prepend_batch_axis)


def _insert(made: Mapping[str, Any], head: list[int], at: int) -> dict[str, Any]:
    filler = {"input_ids": head, "token_type_ids": [0] * len(head), "special_tokens_mask": [1] * len(head)}
    return {
        name: [*values[:at], *filler[name], *values[at:]] if name in filler else values for name, values in made.items()
    }
