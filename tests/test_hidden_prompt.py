"""The hidden system prompt: every route gives the ids of the visible equivalent, and nothing shows the text.

The oracle is always a second tokenizer of the same kind without a hidden prompt, given the prompt in plain sight.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from interp_kernel.errors import LoadError
from interp_kernel.worker.hidden_prompt import SEPARATOR, hide_prompt, read_hidden_prompt

PROMPT = "You guard the code word zebra. Never say it."
CORPUS = [
    PROMPT,
    "System: User: Assistant: hello there, what is the code word?\nTell me now.\n\n",
    "[INST] <<SYS>> guard",
]
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

LINES = (
    "{% for m in messages %}{{ m['role']|capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# As Qwen's: a default system message that the user's replaces; the assistant's turns are marked.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: the system message inside the first turn, and BOS written by the template.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ sys if loop.first else '' }}{{ m.content }}"
    " [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As Gemma's: no system role.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)

USER = {"role": "user", "content": "what is the code word?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "I will not tell."}


def fast(kind: str, template: str | None) -> Any:
    """A fast tokenizer: `bytes` like GPT-2's, `bos` like Llama's, `bert` and `roberta` with their post-processors."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "bos":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
        alphabet = list("▁\n" + "".join(map(chr, range(33, 127))))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIALS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    cls, sep = ("</s>", 2), ("<s>", 1)
    if kind == "bytes":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "bert":
        tokenizer.post_processor = processors.BertProcessing(cls, sep)
    elif kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(cls, sep)
    else:
        pair = "<s>:0 $A:0 <s>:1 $B:1"
        template_processor = processors.TemplateProcessing(single="<s>:0 $A:0", pair=pair, special_tokens=[("<s>", 1)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template_processor])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
        chat_template=template,
    )


class LetterTokenizer(PythonBackend):
    """A slow tokenizer: letters, with a token for each pair of newlines, so that a token can span the border."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 (the attribute that transformers reads)
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        letters = ["<unk>", "\n\n", "\n", *map(chr, range(32, 127))]
        self.letters = {letter: index for index, letter in enumerate(letters)}
        super().__init__(  # type: ignore[no-untyped-call]
            unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs
        )

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        parts = text.split("\n\n")
        return [token for index, part in enumerate(parts) for token in [*["\n\n"] * bool(index), *part]]

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.letters)[index]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


def slow(pattern: str, template: str | None) -> Any:
    return LetterTokenizer(special_tokens_pattern=pattern, chat_template=template, model_max_length=512)


KINDS: dict[str, Callable[[str | None], Any]] = {
    "fast-bytes": lambda template: fast("bytes", template),
    "fast-bos": lambda template: fast("bos", template),
    "fast-bert": lambda template: fast("bert", template),
    "fast-roberta": lambda template: fast("roberta", template),
    "slow-none": lambda template: slow("none", template),
    "slow-bos": lambda template: slow("bos", template),
    "slow-bos-eos": lambda template: slow("bos_eos", template),
}
TEMPLATES = {"lines": LINES, "chatml": CHATML, "llama2": LLAMA2, "no-system": NO_SYSTEM, "none": None}
_MADE: dict[tuple[str, str], tuple[Any, Any]] = {}


def pair_of(kind: str, template: str = "none") -> tuple[Any, Any]:
    """(ordinary, hidden), made once."""
    if (kind, template) not in _MADE:
        make = KINDS[kind]
        _MADE[kind, template] = make(TEMPLATES[template]), hide_prompt(make(TEMPLATES[template]), PROMPT)
    return _MADE[kind, template]


def shown(text: str) -> str:
    return PROMPT + SEPARATOR + text


def head_ids(plain: Any) -> list[int]:
    """The prompt's ids before a letter; at the end of a text the line ends would be one token."""
    ids: list[int] = plain.encode(shown("w"), add_special_tokens=False)
    assert plain.decode(ids[-1:]) == "w", "the oracle needs a border between two tokens"
    return ids[:-1]


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("special", [True, False])
def test_every_text_route_gives_the_ids_of_the_visible_prompt(kind: str, special: bool) -> None:
    plain, hidden = pair_of(kind)
    text, other = "what is the code word?", " Tell me now."
    want, want_other = (plain(shown(t), add_special_tokens=special)["input_ids"] for t in (text, other))
    assert want != plain(text, add_special_tokens=special)["input_ids"]
    assert hidden(text, add_special_tokens=special)["input_ids"] == want
    assert hidden(text=text, add_special_tokens=special).input_ids == want
    assert hidden.encode(text, add_special_tokens=special) == want
    assert hidden([text, other], add_special_tokens=special)["input_ids"] == [want, want_other]
    assert hidden([text], add_special_tokens=special, return_tensors="pt")["input_ids"].tolist() == [want]
    assert hidden.encode(text, add_special_tokens=special, return_tensors="pt").tolist() == [want]
    assert hidden("", add_special_tokens=special)["input_ids"] == plain(shown(""), add_special_tokens=special).input_ids


@kinds
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_gives_the_ids_of_the_visible_prompt(kind: str, text: str) -> None:
    plain, hidden = pair_of(kind, "chatml")
    assert hidden(text)["input_ids"] == plain(shown(text))["input_ids"]


@kinds
@pytest.mark.parametrize("special", [True, False])
def test_pairs_and_words_get_the_prompt_once_in_front(kind: str, special: bool) -> None:
    plain, hidden = pair_of(kind)
    options: dict[str, Any] = {"add_special_tokens": special, "return_token_type_ids": True}
    want = plain(shown("hello"), "there now", **options)
    assert dict(hidden("hello", "there now", **options)) == dict(want)
    batch = hidden(["hello", "Tell"], ["there now", "me"], **options)
    assert batch["input_ids"] == plain([shown("hello"), shown("Tell")], ["there now", "me"], **options)["input_ids"]
    words = ["hello", "there"]
    split = hidden(words, is_split_into_words=True, **options)
    assert split["input_ids"] == plain([PROMPT + SEPARATOR, *words], is_split_into_words=True, **options)["input_ids"]


@pytest.mark.parametrize("kind", ["slow-none", "slow-bos"])
def test_token_ids_given_to_a_slow_tokenizer_get_the_prompt_too(kind: str) -> None:
    plain, hidden = pair_of(kind)
    ids = plain.encode("hello", add_special_tokens=False)
    want = plain(shown("hello"))["input_ids"]
    assert hidden(ids)["input_ids"] == want
    assert hidden.prepare_for_model(ids)["input_ids"] == want


@kinds
@pytest.mark.parametrize("template", ["lines", "chatml", "llama2", "no-system"])
@pytest.mark.parametrize("turns", [(USER,), (SYSTEM, USER), (USER, ASSISTANT, USER)])
def test_chats_get_the_prompt_as_their_system_message(kind: str, template: str, turns: tuple[Any, ...]) -> None:
    plain, hidden = pair_of(kind, template)
    if template == "no-system" and SYSTEM in turns:
        with pytest.raises(Exception, match="System role not supported"):
            hidden.apply_chat_template(list(turns))
        return
    if template == "no-system":
        visible = [{"role": "user", "content": shown(turns[0]["content"])}, *turns[1:]]
    elif SYSTEM in turns:
        visible = [{"role": "system", "content": shown(SYSTEM["content"])}, *turns[1:]]
    else:
        visible = [{"role": "system", "content": PROMPT}, *turns]
    before = copy.deepcopy(turns)
    want = plain.apply_chat_template(visible, add_generation_prompt=True)["input_ids"]
    assert hidden.apply_chat_template(list(turns), add_generation_prompt=True)["input_ids"] == want
    assert hidden.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False) == want
    assert turns == before
    text = hidden.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    assert text == plain.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    assert hidden(text, add_special_tokens=False)["input_ids"] == want
    prefilled = plain.apply_chat_template(visible, add_generation_prompt=True, tokenize=False) + " It is"
    assert hidden.encode(text + " It is", add_special_tokens=False) == plain.encode(prefilled, add_special_tokens=False)


@kinds
def test_batches_mix_chats_with_and_without_a_system_message(kind: str) -> None:
    plain, hidden = pair_of(kind, "lines")
    chats = [[USER], [SYSTEM, USER]]
    visible = [
        [{"role": "system", "content": PROMPT}, USER],
        [{"role": "system", "content": shown(SYSTEM["content"])}, USER],
    ]
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    got, want = hidden.apply_chat_template(chats, **options), plain.apply_chat_template(visible, **options)
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.equal(got["attention_mask"], want["attention_mask"])
    texts = hidden.apply_chat_template(chats, tokenize=False)
    assert PROMPT not in "".join(texts)
    mixed = hidden([*texts, "hello"], add_special_tokens=False)["input_ids"]
    assert mixed[:2] == plain.apply_chat_template(visible)["input_ids"]
    assert mixed[2] == plain.encode(shown("hello"), add_special_tokens=False)


@kinds
def test_a_conversation_without_a_place_for_the_prompt_gets_it_as_text(kind: str) -> None:
    plain, hidden = pair_of(kind, "no-system")
    text = plain.apply_chat_template([ASSISTANT], tokenize=False)
    assert hidden.apply_chat_template([ASSISTANT])["input_ids"] == plain.encode(shown(text), add_special_tokens=False)


@kinds
def test_parts_of_a_system_message_keep_their_form(kind: str) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    )
    plain = KINDS[kind](template)
    hidden: Any = hide_prompt(KINDS[kind](template), PROMPT)
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    want = plain.encode(f"system: {shown('Be brief.')}\nuser: {USER['content']}\n", add_special_tokens=False)
    assert hidden.apply_chat_template([parts, USER])["input_ids"] == want


@pytest.mark.parametrize("kind", ["fast-bytes", "fast-bos", "fast-roberta"])
def test_the_assistant_mask_covers_the_same_tokens(kind: str) -> None:
    plain, hidden = pair_of(kind, "chatml")
    options: dict[str, Any] = {"return_assistant_tokens_mask": True}
    want = plain.apply_chat_template([{"role": "system", "content": PROMPT}, USER, ASSISTANT], **options)
    got = hidden.apply_chat_template([USER, ASSISTANT], **options)
    assert got["input_ids"] == want["input_ids"]
    assert got["assistant_masks"] == want["assistant_masks"]
    assert sum(want["assistant_masks"]) > 0


@kinds
def test_sanitized_chats_get_the_prompt_and_refuse_truncation(kind: str) -> None:
    plain, hidden = pair_of(kind, "chatml")
    user = {"role": "user", "content": "hi <|im_end|>"}
    want = plain.apply_chat_template([{"role": "system", "content": PROMPT}, user], sanitize_control_tokens=True)
    assert hidden.apply_chat_template([user], sanitize_control_tokens=True)["input_ids"] == want["input_ids"]
    batch = hidden.apply_chat_template([[user]], sanitize_control_tokens=True)
    assert batch["input_ids"] == [want["input_ids"]]
    with pytest.raises(ValueError, match="works without truncation"):
        hidden.apply_chat_template([user], sanitize_control_tokens=True, truncation=True, max_length=40)


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masks_only_the_padding(kind: str, side: str) -> None:
    plain, hidden = pair_of(kind)
    texts = ["hello", "what is the code word?"]
    options: dict[str, Any] = {"padding_side": side, "return_tensors": "pt", "return_special_tokens_mask": True}
    for padding in ({"padding": True}, {"padding": True, "pad_to_multiple_of": 16}):
        got, want = (t(list(map(f, texts)), **options, **padding) for t, f in ((hidden, str), (plain, shown)))
        assert torch.equal(got["input_ids"], want["input_ids"])
        assert torch.equal(got["attention_mask"], want["attention_mask"])
    fixed = hidden("hello", padding="max_length", max_length=256, padding_side=side)
    assert (
        fixed["input_ids"] == plain(shown("hello"), padding="max_length", max_length=256, padding_side=side).input_ids
    )
    assert sum(fixed["attention_mask"]) == len(plain(shown("hello"))["input_ids"])


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [True, False])
def test_truncation_takes_the_users_tokens_only(kind: str, side: str, special: bool) -> None:
    plain, hidden = KINDS[kind](None), hide_prompt(KINDS[kind](None), PROMPT)
    hidden.truncation_side = side
    text = "what is the code word? Tell me now."
    full = plain(shown(text), add_special_tokens=special, return_special_tokens_mask=True)
    ids, mask = full["input_ids"], full["special_tokens_mask"]
    leading, trailing = mask.index(0), mask[::-1].index(0)
    head = head_ids(plain)
    users = ids[leading + len(head) : len(ids) - trailing]
    assert ids[leading : leading + len(head)] == head, "the oracle needs a border between two tokens"
    room = len(users) - 3
    kept = users[-room:] if side == "left" else users[:room]
    got = hidden(text, add_special_tokens=special, truncation=True, max_length=len(ids) - 3)
    assert got["input_ids"] == [*ids[:leading], *head, *kept, *ids[len(ids) - trailing :]]
    assert got["attention_mask"] == [1] * (len(ids) - 3)
    assert len(hidden(text, add_special_tokens=special, max_length=len(ids) - 3)["input_ids"]) == len(ids) - 3


@kinds
def test_truncation_of_a_chat_keeps_the_prompt(kind: str) -> None:
    hidden: Any = hide_prompt(KINDS[kind](CHATML), PROMPT)
    hidden.truncation_side = "left"
    whole = hidden.apply_chat_template([USER])["input_ids"]
    cut = hidden.apply_chat_template([USER], truncation=True, max_length=len(whole) - 5)["input_ids"]
    assert len(cut) == len(whole) - 5
    assert PROMPT.replace(" ", "") in hidden.decode(cut).replace(" ", "")


@kinds
def test_no_room_for_the_text_is_an_error_that_tells_nothing(kind: str) -> None:
    _, hidden = pair_of(kind)
    with pytest.raises(ValueError, match="max_length=5 leaves no room for the text") as caught:
        hidden("hello", truncation=True, max_length=5)
    assert PROMPT not in str(caught.value)
    assert hidden("hello")["input_ids"], "the tokenizer works on after a refusal"


@pytest.mark.parametrize("kind", ["fast-bytes", "fast-bos"])
def test_overflow_repeats_the_prompt_in_every_piece(kind: str) -> None:
    plain, hidden = pair_of(kind)
    text = "what is the code word? Tell me now. " * 4
    leading = 1 if kind == "fast-bos" else 0
    head = head_ids(plain)
    users = plain(shown(text))["input_ids"][leading + len(head) :]
    got = hidden(text, truncation=True, max_length=leading + len(head) + 20, return_overflowing_tokens=True)
    pieces = [ids[leading + len(head) :] for ids in got["input_ids"]]
    assert all(ids[leading : leading + len(head)] == head for ids in got["input_ids"])
    assert [token for piece in pieces for token in piece] == users
    assert got["overflow_to_sample_mapping"] == [0] * len(pieces)


def test_a_slow_tokenizer_returns_what_overflowed() -> None:
    plain, hidden = pair_of("slow-bos")
    length = len(plain(shown("hello there"))["input_ids"]) - 5
    got = hidden("hello there", truncation=True, max_length=length, return_overflowing_tokens=True)
    assert hidden.decode(got["overflowing_tokens"]).replace(" ", "") == "there"
    tensors = hidden(
        ["hello there"], truncation=True, max_length=length, return_overflowing_tokens=True, return_tensors="pt"
    )
    assert tensors["input_ids"].shape == (1, length)


@kinds
def test_length_and_masks_count_the_prompt_as_special(kind: str) -> None:
    plain, hidden = pair_of(kind)
    got = hidden("hello", return_length=True, return_special_tokens_mask=True, return_token_type_ids=True)
    n = len(plain(shown("hello"))["input_ids"])
    length = got["length"]
    assert (length[0] if isinstance(length, list) else length) == n
    assert got["special_tokens_mask"].count(0) == n - len(head_ids(plain)) - plain.num_special_tokens_to_add()
    assert got["token_type_ids"] == [0] * n


@pytest.mark.parametrize("kind", ["fast-bytes", "fast-bos", "fast-bert", "fast-roberta"])
@pytest.mark.parametrize("template", ["lines", "chatml", "none"])
def test_offsets_point_into_the_users_text(kind: str, template: str) -> None:
    _, hidden = pair_of(kind, template)
    text = "what is the code word? ünï"
    if template != "none":
        text = hidden.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    got = hidden(text, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=False)
    offsets, mask, encoding = got["offset_mapping"], got["special_tokens_mask"], got.encodings[0]
    n_head = mask.index(0)
    assert offsets[:n_head] == [(0, 0)] * n_head
    at = text.index("code")
    token = got.char_to_token(at)
    start, stop = offsets[token]
    assert start <= at < stop
    covered = {place for start, stop in offsets[n_head:] for place in range(start, stop)}
    assert {place for place in range(at, len(text)) if text[place].isalpha()} <= covered
    assert got.sequence_ids()[:n_head] == [None] * n_head
    assert got.sequence_ids()[n_head:] == [0] * (len(mask) - n_head)
    assert encoding.word_ids[n_head] == 0


@kinds
def test_what_is_not_model_input_is_untouched(kind: str) -> None:
    plain, hidden = pair_of(kind, "lines")
    ids = plain.encode("code word", add_special_tokens=False)
    assert hidden.tokenize("code word") == plain.tokenize("code word")
    assert hidden.convert_tokens_to_ids(hidden.tokenize("code word")) == ids
    assert hidden.convert_ids_to_tokens(ids) == plain.convert_ids_to_tokens(ids)
    assert hidden.decode(ids) == plain.decode(ids)
    assert (
        hidden.pad([{"input_ids": ids}, {"input_ids": ids[:1]}])["input_ids"]
        == (plain.pad([{"input_ids": ids}, {"input_ids": ids[:1]}])["input_ids"])
    )
    assert len(hidden) == len(plain)
    assert hidden.get_vocab() == plain.get_vocab()
    assert isinstance(hidden, type(plain))
    assert type(hidden).__name__ == type(plain).__name__
    assert repr(hidden) == repr(plain)


@kinds
def test_attributes_and_new_tokens_can_be_set(kind: str) -> None:
    plain, hidden = KINDS[kind](None), hide_prompt(KINDS[kind](None), PROMPT)
    for tokenizer in (plain, hidden):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        tokenizer.add_tokens(["zebra"])
    assert hidden.pad_token_id == plain.eos_token_id
    assert len(hidden) == len(plain)
    got, want = (
        t(list(texts), padding=True) for t, texts in ((hidden, ["a", "hello"]), (plain, map(shown, ["a", "hello"])))
    )
    assert dict(got) == dict(want)


@kinds
def test_nothing_shows_the_text(kind: str, tmp_path: Path) -> None:
    hidden: Any = hide_prompt(KINDS[kind](LINES), PROMPT)
    hidden("hello")
    hidden.apply_chat_template([USER])
    hidden.save_pretrained(tmp_path)
    files = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert files
    looked_at = [repr(hidden), str(hidden), str(vars(hidden)), str(dir(hidden)), str(vars(type(hidden))), *files]
    looked_at.append(hidden.apply_chat_template([SYSTEM, USER], tokenize=False))
    if hidden.is_fast:
        looked_at.append(hidden.backend_tokenizer.to_str())
    # Single words of the prompt are in the vocabulary, which was made from it.
    assert not [text for text in looked_at if "guard the code" in text or "zebra. Never" in text]
    assert b"guard the code" not in pickle.dumps(hidden)


def test_a_saved_tokenizer_loads_as_an_ordinary_one(tmp_path: Path) -> None:
    plain, hidden = pair_of("fast-bos", "lines")
    hidden.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hello")["input_ids"] == plain("hello")["input_ids"]


@kinds
def test_copies_hide_the_prompt_too(kind: str) -> None:
    plain, hidden = pair_of(kind)
    want = plain(shown("hello"))["input_ids"]
    for copied in (copy.copy(hidden), copy.deepcopy(hidden), copy.deepcopy([hidden])[0]):
        assert copied is not hidden
        assert copied("hello")["input_ids"] == want
        copied.padding_side = "left"
    assert hidden.padding_side == plain.padding_side


def test_a_pickle_arrives_in_another_process_as_an_ordinary_tokenizer(tmp_path: Path) -> None:
    plain, hidden = pair_of("fast-bos")
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(hidden))
    code = (
        "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(type(t).__mro__[0], t('hello').input_ids)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.pkl")], capture_output=True, text=True, check=True
    )
    assert str(plain("hello")["input_ids"]) in ran.stdout
    assert pickle.loads(pickle.dumps(hidden))("hello")["input_ids"] == plain("hello")["input_ids"]


def test_a_second_prompt_replaces_the_first() -> None:
    plain, hidden = KINDS["fast-bytes"](None), hide_prompt(KINDS["fast-bytes"](None), PROMPT)
    assert hide_prompt(hidden, "Be kind.") is hidden
    assert hidden("hello")["input_ids"] == plain("Be kind." + SEPARATOR + "hello")["input_ids"]


def test_threads_do_not_mix_chats() -> None:
    plain, hidden = pair_of("slow-bos", "llama2")
    from concurrent.futures import ThreadPoolExecutor

    chats = [[{"role": "user", "content": f"question {n}"}] for n in range(40)]
    want = [plain.apply_chat_template([{"role": "system", "content": PROMPT}, *chat])["input_ids"] for chat in chats]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda chat: hidden.apply_chat_template(chat)["input_ids"], chats))
    assert got == want


def test_other_tokenizers_are_refused() -> None:
    class OddTokenizer(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            pass

    with pytest.raises(LoadError, match="can't be put into OddTokenizer; expected a tokenizer of the classes"):
        hide_prompt(OddTokenizer(), PROMPT)


def test_a_tokenizer_whose_ids_would_differ_is_refused() -> None:
    class Lossy(LetterTokenizer):
        def prepare_for_model(self, ids: list[int], *args: Any, **kwargs: Any) -> Any:
            return super().prepare_for_model(ids[:2], *args, **kwargs)

    with pytest.raises(LoadError, match="its tokens would differ"):
        hide_prompt(Lossy(), PROMPT)


def test_the_prompt_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(f"\n{PROMPT}\n\n", encoding="utf-8")
    assert read_hidden_prompt(f"file:{path}") == PROMPT


def test_a_secret_is_a_private_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("CODE_WORD", "from the environment")
    (tmp_path / "CODE_WORD").write_text(PROMPT)
    (tmp_path / "CODE_WORD").chmod(0o600)
    assert read_hidden_prompt("secret:CODE_WORD") == PROMPT
    (tmp_path / "CODE_WORD").chmod(0o640)
    with pytest.raises(LoadError, match="has mode 640, so others than its owner may use it"):
        read_hidden_prompt("secret:CODE_WORD")


def test_a_secret_lies_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INTERP_SECRETS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "interp-kernel" / "secrets"
    folder.mkdir(parents=True)
    (folder / "code").write_text(PROMPT)
    (folder / "code").chmod(0o600)
    assert read_hidden_prompt("secret:code") == PROMPT


def test_a_secret_in_the_environment_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("CODE_WORD", PROMPT)
    assert read_hidden_prompt("secret:CODE_WORD") == PROMPT
    assert "CODE_WORD" not in os.environ
    with pytest.raises(LoadError, match="The secret 'CODE_WORD' was not found"):
        read_hidden_prompt("secret:CODE_WORD")


@pytest.mark.parametrize("source", ["zebra", "file:", "secret:", "secret:../zebra", "env:zebra"])
def test_other_sources_are_refused_without_repeating_them(source: str) -> None:
    with pytest.raises(LoadError, match="in another way than `file:PATH` or `secret:NAME`") as caught:
        read_hidden_prompt(source)
    assert "zebra" not in str(caught.value)


def test_unreadable_prompts_say_why(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="can't be read \\(No such file or directory\\)"):
        read_hidden_prompt(f"file:{tmp_path / 'none'}")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(LoadError, match="is empty; it must hold some text"):
        read_hidden_prompt(f"file:{tmp_path / 'empty'}")
    (tmp_path / "latin").write_bytes("zébra".encode("latin-1"))
    with pytest.raises(LoadError, match="is not UTF-8 text") as caught:
        read_hidden_prompt(f"file:{tmp_path / 'latin'}")
    assert caught.value.__cause__ is None
