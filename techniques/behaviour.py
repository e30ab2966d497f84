"""Rate texts without a model: the register of their words, and how hard they are to read.

Sources: Flesch, "A new readability yardstick" (1948), https://doi.org/10.1037/h0057532; Kincaid et al., "Derivation of
new readability formulas for Navy enlisted personnel" (1975), https://stars.library.ucf.edu/istlibrary/56
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from techniques._results import few, number
from techniques._stats import mean_interval

SHORT = 100  # words; formulas for readability were fitted on passages of about this length
_WORD = re.compile(r"[^\W\d_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


class Ratings(TypedDict):
    """What every rating of texts starts with; no model takes part.

    Attributes:
        technique: Name of the function that made the result.
        version: Rises when the meaning of a field changes.
        n: How many texts.
        seed: Seed of the bootstrap.
        warnings: What a reader has to know before believing the numbers.
    """

    technique: str
    version: int
    n: int
    seed: int
    warnings: list[str]


class GroupMean(TypedDict):
    """Mean of one measure over the texts of one group, with its 95 % bootstrap interval."""

    group: str
    measure: str
    n: int
    mean: float | None
    low: float | None
    high: float | None


class RegisterRow(TypedDict):
    """How often a text uses the words of each lexicon.

    Attributes:
        text: The text.
        group: Its group.
        n_words: Its words.
        counts: Occurrences by lexicon.
        per_100_words: The same per 100 words; None for a text without words.
        first: The lexicon whose word comes first; None if none does.
    """

    text: str
    group: str
    n_words: int
    counts: dict[str, int]
    per_100_words: dict[str, float | None]
    first: str | None


class LexicalRegister(Ratings):
    """Result of `lexical_register`: a row per text, in order, and the mean rate of each lexicon in each group."""

    lexicons: dict[str, list[str]]
    rows: list[RegisterRow]
    groups: list[GroupMean]


class ReadabilityRow(TypedDict):
    """How hard a text is to read.

    Attributes:
        text: The text.
        group: Its group.
        n_words: Its words: runs of letters, apostrophes and hyphens inside a word included.
        n_sentences: Its sentences, by `.`, `!` and `?`; at least 1.
        reading_ease: Flesch's score; about 90 is easy, 30 is hard. None for a text without words.
        grade: Flesch-Kincaid grade, in years of school.
        letters_per_word: Mean length of a word.
        words_per_sentence: Mean length of a sentence.
        syllables_per_word: Counted by rule, see `readability`.
        different_words: Share of words that are different ones, case ignored; it falls with length.
    """

    text: str
    group: str
    n_words: int
    n_sentences: int
    reading_ease: float | None
    grade: float | None
    letters_per_word: float | None
    words_per_sentence: float | None
    syllables_per_word: float | None
    different_words: float | None


class Readability(Ratings):
    """Result of `readability`: a row per text, in order, and the mean of each measure in each group."""

    rows: list[ReadabilityRow]
    groups: list[GroupMean]


def lexical_register(
    texts: Sequence[str],
    lexicons: Mapping[str, Sequence[str]],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> LexicalRegister:
    """Count how often texts use the words of given lists: a deterministic rater of register or topic.

    Args:
        texts: Answers alone, without their prompts, so that no rating can come from the prompt's words.
        lexicons: Words or phrases by name of their list, such as {"expert": [...], "novice": [...]}. They match whole
            words, case ignored; a phrase's words must follow each other.
        groups: The condition of each text, such as "steered" and "plain"; None puts all in one group, "all".
        seed: Of the bootstrap over texts.

    Returns:
        Counts and rates per 100 words for each text, and their means by group with an interval.

    Raises:
        ValueError: There are no texts or lexicons, a lexicon has no words or an empty one, two lexicons share a word,
            or groups differ from texts in number.

    Misleads: Words are not meaning: a negated or quoted word counts like any other. A list made while looking at the
        texts that it rates proves nothing; make it beforehand, and rate blind to the condition.

    Cost: No model; about 10 microseconds per word.

    Example:
        texts = ["Therefore, relative velocity implies time dilation.", "So, the fast twin stays young."]
        lexicons = {"expert": ["therefore", "implies"], "novice": ["so", "stays"]}
        lexical_register(texts, lexicons, groups=["professor", "child"])
    """
    labels = _check_texts(texts, groups)
    lists = _check_lexicons(lexicons)
    patterns = {name: _pattern(words) for name, words in lists.items()}
    rows = []
    for text, group in zip(texts, labels, strict=True):
        n_words = len(_WORD.findall(text))
        counts = {name: len(pattern.findall(text)) for name, pattern in patterns.items()}
        starts = {name: match.start() for name, pattern in patterns.items() if (match := pattern.search(text))}
        rows.append(
            RegisterRow(
                text=text,
                group=group,
                n_words=n_words,
                counts=counts,
                per_100_words={
                    name: number(100 * count / n_words) if n_words else None for name, count in counts.items()
                },
                first=min(starts, key=lambda name: starts[name]) if starts else None,
            )
        )
    measures = {name: [row["per_100_words"][name] for row in rows] for name in lists}
    return LexicalRegister(
        **_ratings("lexical_register", rows, seed, few(_smallest(labels), "text of a group")),
        lexicons=lists,
        rows=rows,
        groups=_group_means(measures, labels, seed),
    )


def readability(texts: Sequence[str], groups: Sequence[str] | None = None, seed: int = 0) -> Readability:
    """Measure how hard texts are to read: Flesch reading ease, Flesch-Kincaid grade, lengths of words and sentences.

    Syllables are counted by rule: groups of vowels, less a silent final e, at least one per word. That is right for
    most English words and wrong for some ("area" has three and counts two), so compare texts, not absolute grades.

    Args:
        texts: English texts; answers alone, without their prompts.
        groups: The condition of each text; None puts all in one group, "all".
        seed: Of the bootstrap over texts.

    Returns:
        Measures for each text, and their means by group with an interval.

    Raises:
        ValueError: There are no texts, or groups differ from texts in number.

    Misleads: The formulas see lengths only: word salad of short words reads easily. On fewer than 100 words one long
        word moves the score by whole grades; such texts are named in `warnings`.

    Cost: No model; about 10 microseconds per word.

    Example:
        texts = ["Therefore, relative velocity implies time dilation.", "So, the fast twin stays young."]
        readability(texts, groups=["professor", "child"])
    """
    labels = _check_texts(texts, groups)
    rows = [_readability(text, group) for text, group in zip(texts, labels, strict=True)]
    measures: dict[str, list[float | None]] = {
        "reading_ease": [row["reading_ease"] for row in rows],
        "grade": [row["grade"] for row in rows],
        "letters_per_word": [row["letters_per_word"] for row in rows],
        "words_per_sentence": [row["words_per_sentence"] for row in rows],
    }
    n_short = sum(row["n_words"] < SHORT for row in rows)
    short = f"{n_short} of {len(rows)} texts have fewer than {SHORT} words; single scores of them are unreliable."
    return Readability(
        **_ratings("readability", rows, seed, [short] * bool(n_short) + few(_smallest(labels), "text of a group")),
        rows=rows,
        groups=_group_means(measures, labels, seed),
    )


def _check_texts(texts: Sequence[str], groups: Sequence[str] | None) -> list[str]:
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}; expected a list of at least one text.")
    if groups is not None and (isinstance(groups, str) or len(groups) != len(texts)):
        raise ValueError(f"groups is {groups!r} for {len(texts)} texts; expected one group for each text.")
    return ["all"] * len(texts) if groups is None else [str(group) for group in groups]


def _check_lexicons(lexicons: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    lists = {name: [words] if isinstance(words, str) else list(words) for name, words in lexicons.items()}
    if not lists:
        raise ValueError("lexicons is empty; expected at least one list of words by its name.")
    seen: dict[str, str] = {}
    for name, words in lists.items():
        if not words or not all(_WORD.search(word) for word in words):
            raise ValueError(f"The lexicon {name!r} is {words!r}; expected words, each with a letter in it.")
        for word in words:
            other = seen.setdefault(word.lower(), name)
            if other != name:
                raise ValueError(f"The word {word!r} is in the lexicons {other!r} and {name!r}; expected it in one.")
    return lists


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Matches whole words or phrases, the longest first, across any white space."""
    phrases = (r"\s+".join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)


def _readability(text: str, group: str) -> ReadabilityRow:
    words = _WORD.findall(text)
    n_words, n_sentences = len(words), max(1, len(_SENTENCE_END.findall(text)))
    syllables = sum(_syllables(word) for word in words) / n_words if n_words else float("nan")
    length = n_words / n_sentences if n_words else float("nan")
    letters = sum(sum(c.isalpha() for c in word) for word in words)
    return ReadabilityRow(
        text=text,
        group=group,
        n_words=n_words,
        n_sentences=n_sentences,
        reading_ease=number(206.835 - 1.015 * length - 84.6 * syllables),
        grade=number(0.39 * length + 11.8 * syllables - 15.59),
        letters_per_word=number(letters / n_words) if n_words else None,
        words_per_sentence=number(length),
        syllables_per_word=number(syllables),
        different_words=number(len({word.lower() for word in words}) / n_words) if n_words else None,
    )


def _syllables(word: str) -> int:
    lowered = word.lower()
    groups = len(re.findall(r"[aeiouy]+", lowered))
    # A final e is silent after a consonant ("make"), but not in "-le" after one ("table").
    is_silent = re.search(r"[^aeiouy]e$", lowered) and not re.search(r"[^aeiouy]le$", lowered)
    return max(1, groups - bool(is_silent))


def _ratings(technique: str, rows: Sequence[object], seed: int, warnings: Sequence[str] = ()) -> Ratings:
    return Ratings(technique=technique, version=1, n=len(rows), seed=seed, warnings=list(warnings))


def _smallest(labels: Sequence[str]) -> int:
    return min(Counter(labels).values())


def _group_means(measures: Mapping[str, Sequence[float | None]], labels: Sequence[str], seed: int) -> list[GroupMean]:
    """By group in order of appearance, then measure; texts without words have no value and are left out."""
    means = []
    for group in dict.fromkeys(labels):
        for measure, values in measures.items():
            kept = [v for v, label in zip(values, labels, strict=True) if label == group and v is not None]
            found = mean_interval(torch.tensor(kept), seed) if kept else [float("nan")] * 3
            mean, low, high = (number(value) for value in found)
            means.append(GroupMean(group=group, measure=measure, n=len(kept), mean=mean, low=low, high=high))
    return means
