"""Tokens as text, over the kinds of vocabularies that models come with."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from techniques._tokens import check_context, pad, single_token_id, token_text

MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def sentencepiece_like() -> Any:
    pieces = [(f"{MARK}the", -1.0), (f"{MARK}cat", -1.0), ("s", -2.0), (MARK, -3.0), ("<unk>", -9.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=4))
    # As Llama 2: a mark before the text and for every space, and the first space dropped in decoding.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend, unk_token="<unk>")


def byte_level() -> Any:
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend)


def test_leading_space_of_a_sentencepiece_token_is_kept() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("the cats")["input_ids"]
    assert [token_text(tokenizer, token_id) for token_id in ids] == [" the", " cat", "s"]


def test_byte_level_tokens_are_text_where_they_are_whole_characters() -> None:
    tokenizer = byte_level()
    ids = tokenizer(" \u00e9\n")["input_ids"]
    texts = [token_text(tokenizer, token_id) for token_id in ids]
    assert (texts[0], texts[3]) == (" ", "\n")
    assert texts[1:3] == tokenizer.convert_ids_to_tokens(ids[1:3])
    assert len(set(texts)) == 4, "two halves of a character must not look the same"


def test_single_token_id_needs_one_token() -> None:
    tokenizer = sentencepiece_like()
    cat = tokenizer.convert_tokens_to_ids(f"{MARK}cat")
    assert len(tokenizer.tokenize(" cat")) == 2
    assert single_token_id(tokenizer, " cat") == single_token_id(tokenizer, "cat") == cat
    with pytest.raises(ValueError, match=f"is 2 tokens, \\['{MARK}cat', 's'\\]; expected one. Check its leading space"):
        single_token_id(tokenizer, "cats")
    with pytest.raises(ValueError, match="is 0 tokens"):
        single_token_id(tokenizer, "")


def test_a_leading_space_is_never_dropped() -> None:
    with pytest.raises(ValueError, match=r"The target ' a' is 2 tokens"):
        single_token_id(byte_level(), " a")


def test_padding_masks_what_it_fills() -> None:
    ids = [[5, 6, 7], [8]]
    left, right = (pad(ids, side, 9, torch.device("cpu")) for side in ("left", "right"))
    assert left.input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_context_check_is_exact(make_model: Any) -> None:
    model = make_model("gpt2")
    check_context(model, [[1] * 64])
    check_context(model, [[1] * 60], 5)  # the fifth new token is never fed back
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        check_context(model, [[1] * 60], 6)
