"""Positions that correspond over prompts: by their index, or by a named piece of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from techniques._pairs import Pairs
from techniques._tokens import span_positions

TOKENS_SHOWN = 4  # different tokens of a column that a result lists


class ColumnInfo(TypedDict):
    """A column of positions that correspond over all pairs.

    Attributes:
        label: The position, counted from the start (0, 1, ...) or from the end (-1 is the last), or the span's name.
        clean: The different tokens that clean prompts have there, at most four of them.
        corrupted: The same of the corrupted prompts.
        differs: Whether clean and corrupted differ there in any pair.
    """

    label: str
    clean: list[str]
    corrupted: list[str]
    differs: bool


@dataclass(frozen=True)
class Column:
    """Positions that correspond over all pairs: for each pair its (clean, corrupted) positions."""

    label: str
    positions: list[list[tuple[int, int]]]

    def info(self, pairs: Pairs) -> ColumnInfo:
        """The column as a result shows it."""
        found = [
            tuple("".join(tokens[at[side]] for at in where) for side, tokens in enumerate(pairs.tokens[i]))
            for i, where in enumerate(self.positions)
        ]
        clean, corrupted = (list(dict.fromkeys(both[side] for both in found))[:TOKENS_SHOWN] for side in (0, 1))
        return ColumnInfo(label=self.label, clean=clean, corrupted=corrupted, differs=any(a != b for a, b in found))


def position_columns(pairs: Pairs) -> list[Column]:
    """A column per position: from the start if all prompts have one length, else from the end as far as all reach."""
    matches = [pairs.matches(i) for i in range(len(pairs))]
    shared = min(len(row) for row in matches)
    one_length = len({len(row) for row in [*pairs.clean, *pairs.corrupted]}) == 1
    return [
        Column(str(i if one_length else i - shared), [[row[len(row) - shared + i]] for row in matches])
        for i in range(shared)
    ]


def span_columns(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, spans: Mapping[str, Sequence[str]], n_given: int
) -> list[Column]:
    """A column per named span: the tokens that hold a piece of the clean prompt's text, and what matches them.

    Raises:
        ValueError: A span has not one text for each of the `n_given` pairs, or does not occur once in its prompt, or
            lies where the corrupted prompt has no matching position.
    """
    columns = []
    for name, texts in spans.items():
        if isinstance(texts, str) or len(texts) != n_given:
            raise ValueError(f"The span {name!r} is {texts!r}; expected a list of {n_given} texts, one for each pair.")
        where = []
        for i, index in enumerate(pairs.indices):
            partner = dict(pairs.matches(i))
            positions = span_positions(tokenizer, pairs.texts[i][0], texts[index])
            if not set(positions) <= set(partner):
                raise ValueError(
                    f"The span {texts[index]!r} of {pairs.texts[i][0]!r} begins before the corrupted prompt does, "
                    "counted from the end; expected a span that both prompts have room for."
                )
            where.append([(position, partner[position]) for position in positions])
        columns.append(Column(name, where))
    return columns
