"""Raters against counts and formulas worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from interp_kernel.demo_model import corpus
from techniques.behaviour import _syllables, lexical_register, readability

LEXICONS = {"expert": ["therefore", "time dilation", "implies"], "novice": ["so", "stays"]}


def test_whole_words_and_phrases_are_counted_whatever_their_case() -> None:
    text = "Therefore, TIME  dilation implies therefore nothing so-called; sofa, also implied time. Dilation."
    (row,) = lexical_register([text], LEXICONS)["rows"]
    # "so" in "so-called" is a word of its own; in "sofa" and "also" it is not.
    assert row["counts"] == {"expert": 4, "novice": 1}
    assert row["n_words"] == 12
    assert row["per_100_words"] == pytest.approx({"expert": 400 / 12, "novice": 100 / 12}, rel=1e-5)
    assert row["first"] == "expert"


def test_the_longest_phrase_wins_where_two_begin_alike() -> None:
    (row,) = lexical_register(["a black hole, a black hat"], {"x": ["black", "black hole"]})["rows"]
    assert row["counts"] == {"x": 2}


def test_first_word_decides_the_order() -> None:
    rows = lexical_register(["So it implies.", "It implies so.", "Nothing."], LEXICONS)["rows"]
    assert [row["first"] for row in rows] == ["novice", "expert", None]


def test_group_means_and_intervals() -> None:
    texts = ["so a", "so so", "therefore a b c", ""]
    result = lexical_register(texts, {"n": ["so"], "e": ["therefore"]}, groups=["child", "child", "prof", "prof"])
    means = {(row["group"], row["measure"]): row for row in result["groups"]}
    assert list(means) == [("child", "n"), ("child", "e"), ("prof", "n"), ("prof", "e")]
    assert (means["child", "n"]["mean"], means["child", "n"]["n"]) == (75, 2)
    assert (means["child", "n"]["low"], means["child", "n"]["high"]) == (50, 100)
    # The empty text has no rate, so it is left out.
    assert (means["prof", "e"]["mean"], means["prof", "e"]["n"]) == (25, 1)
    empty = lexical_register(["..."], {"n": ["so"]})
    assert (empty["groups"][0]["mean"], empty["groups"][0]["n"]) == (None, 0)
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty


@pytest.mark.parametrize(
    ("word", "syllables"),
    [("cat", 1), ("make", 1), ("table", 2), ("the", 1), ("reading", 2), ("university", 5), ("rhythm", 1), ("b", 1)],
)
def test_syllables(word: str, syllables: int) -> None:
    assert _syllables(word) == syllables


def test_formulas_worked_out_by_hand() -> None:
    # 6 words in 2 sentences, 6 syllables: 206.835 - 1.015 * 3 - 84.6 = 119.19; .39 * 3 + 11.8 - 15.59 = -2.62
    (easy, hard) = readability(["The cat sat. The dog ran!", "The university table."])["rows"]
    assert (easy["n_words"], easy["n_sentences"]) == (6, 2)
    assert easy["reading_ease"] == pytest.approx(119.19)
    assert easy["grade"] == pytest.approx(-2.62)
    assert easy["letters_per_word"] == 3
    assert easy["different_words"] == pytest.approx(5 / 6, abs=1e-5)
    # 3 words, 1 + 5 + 2 syllables
    assert hard["reading_ease"] == pytest.approx(206.835 - 1.015 * 3 - 84.6 * 8 / 3, abs=1e-3)
    assert hard["syllables_per_word"] == pytest.approx(8 / 3, abs=1e-5)


def test_numbers_and_abbreviations_end_no_sentence_and_words_keep_apostrophes() -> None:
    (row,) = readability(["It's 3.14 or so... a well-known value"])["rows"]
    assert (row["n_words"], row["n_sentences"]) == (6, 1)


def test_a_text_without_words_has_no_scores() -> None:
    result = readability(["123 ...", "A cat sat."])
    assert result["rows"][0]["reading_ease"] is None
    assert result["groups"][0]["n"] == 1
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_short_texts_are_named() -> None:
    result = readability(["cat " * 100, "cat"])
    assert result["warnings"] == ["1 of 2 texts have fewer than 100 words; single scores of them are unreliable."]
    assert readability(["cat " * 100] * 2)["warnings"] == []


def test_a_group_of_one_text_is_told() -> None:
    texts = ["cat " * 100] * 3
    note = "The intervals rest on one text of a group, so they have no width and say nothing about others."
    for result in (readability(texts, ["a", "a", "b"]), lexical_register(texts, {"x": ["cat"]}, ["a", "a", "b"])):
        assert result["warnings"] == [note]
        assert all(mean["low"] == mean["high"] for mean in result["groups"] if mean["group"] == "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], LEXICONS), r"texts is \[\]; expected a list of at least one"),
        (("a text", LEXICONS), "texts is 'a text'; expected a list"),
        ((["a"], {}), "lexicons is empty"),
        ((["a"], {"x": []}), r"The lexicon 'x' is \[\]; expected words"),
        ((["a"], {"x": ["so", " "]}), r"The lexicon 'x' is \['so', ' '\]; expected words"),
        ((["a"], {"x": ["so"], "y": ["So"]}), "The word 'So' is in the lexicons 'x' and 'y'"),
        ((["a"], LEXICONS, ["b", "c"]), r"groups is \['b', 'c'\] for 1 texts"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lexical_register(*arguments)


def test_bad_groups_of_readability_are_refused() -> None:
    with pytest.raises(ValueError, match="groups is 'ab' for 2 texts"):
        readability(["a", "b"], groups="ab")


def test_registers_of_the_demo_world_are_told_apart() -> None:
    opened = {
        register: [f"{openers[i % 3]}, {getattr(question, register)}" for i, question in enumerate(corpus.QUESTIONS)]
        for register, openers in corpus.OPENERS.items()
    }
    texts = [*opened["expert"], *opened["novice"]]
    groups = ["expert"] * len(opened["expert"]) + ["novice"] * len(opened["novice"])
    register = lexical_register(texts, {name: list(words) for name, words in corpus.OPENERS.items()}, groups)
    assert [row["first"] for row in register["rows"]] == groups
    grade = {row["group"]: row for row in readability(texts, groups)["groups"] if row["measure"] == "grade"}
    assert (grade["expert"]["low"] or 0) > (grade["novice"]["high"] or 99)
