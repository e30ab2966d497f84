"""Pairs of a clean and a corrupted prompt with their answers: what every causal comparison starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._hooks import check_sites
from techniques._model import logits_at
from techniques._results import number
from techniques._tokens import check_context, check_finite, encode, log_probs, pad, single_token_id, token_text

Align = Literal["equal", "end"]
Metric = Literal["logit_diff", "logprob", "rank"]
METRICS = ("logit_diff", "logprob", "rank")
CHUNK_ROWS = 64  # prompts whose activations are kept at once
MAX_TOKENS = 8192  # of a batch of prompts of which only the last logits are wanted, padding included


class ExcludedPair(TypedDict):
    """A pair that was left out, by its index in what was given, and why."""

    pair: int
    clean: str
    corrupted: str
    reason: str


class PairInfo(TypedDict):
    """A pair that was used, with its logit differences in nats in the two unpatched runs."""

    pair: int
    clean: str
    corrupted: str
    answer: str
    wrong: str
    clean_logit_diff: float | None
    corrupted_logit_diff: float | None


@dataclass(frozen=True)
class Pairs:
    """Pairs that can be compared; all lists run over the same n pairs.

    Attributes:
        clean: Token ids of the clean prompts.
        corrupted: Token ids of the corrupted prompts.
        answer_ids: The token that is right after the clean prompt; on the CPU.
        wrong_ids: The token that it is compared with; on the CPU.
        texts: The prompts, (clean, corrupted).
        answers: The answers, (right, wrong).
        tokens: Texts of the tokens, (clean, corrupted).
        indices: Index of each pair in what was given.
        align: "equal" (position i matches position i) or "end" (the i-th from the end matches the i-th from the end).
        excluded: Pairs that were left out.
    """

    clean: list[list[int]]
    corrupted: list[list[int]]
    answer_ids: Int[Tensor, " n"]
    wrong_ids: Int[Tensor, " n"]
    texts: list[tuple[str, str]]
    answers: list[tuple[str, str]]
    tokens: list[tuple[list[str], list[str]]]
    indices: list[int]
    align: Align
    excluded: list[ExcludedPair]

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def answer_pair(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Ids of the right and of the wrong answers."""
        return self.answer_ids, self.wrong_ids

    def keep(self, kept: Sequence[bool], reasons: Sequence[str]) -> Pairs:
        """Only the pairs for which `kept` is true; the others join `excluded`, each with its reason."""
        which = [i for i, keep in enumerate(kept) if keep]
        index = torch.tensor(which, dtype=torch.long)
        left_out = [
            ExcludedPair(pair=self.indices[i], clean=self.texts[i][0], corrupted=self.texts[i][1], reason=reasons[i])
            for i in range(len(self))
            if i not in set(which)
        ]
        return Pairs(
            clean=[self.clean[i] for i in which],
            corrupted=[self.corrupted[i] for i in which],
            answer_ids=self.answer_ids[index],
            wrong_ids=self.wrong_ids[index],
            texts=[self.texts[i] for i in which],
            answers=[self.answers[i] for i in which],
            tokens=[self.tokens[i] for i in which],
            indices=[self.indices[i] for i in which],
            align=self.align,
            excluded=sorted([*self.excluded, *left_out], key=lambda pair: pair["pair"]),
        )

    def matches(self, pair: int) -> list[tuple[int, int]]:
        """Positions of one pair that correspond, (clean, corrupted), from left to right."""
        n_clean, n_corrupted = len(self.clean[pair]), len(self.corrupted[pair])
        shared = min(n_clean, n_corrupted)
        return [(n_clean - shared + i, n_corrupted - shared + i) for i in range(shared)]

    def chunks(self) -> list[range]:
        """All pairs, in order, in parts whose activations may be kept at once."""
        return [range(len(self))[start : start + CHUNK_ROWS] for start in range(0, len(self), CHUNK_ROWS)]

    def name(self, pair: int) -> str:
        """What an error message calls a pair."""
        return f"The pair of the prompt {self.texts[pair][0]!r}"


def encode_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    align: Align = "equal",
) -> Pairs:
    """Encode (clean, corrupted) prompts and their (right, wrong) answers, and check that they can be compared.

    Pairs whose prompts differ in length are left out unless `align` is "end".

    Raises:
        ValueError: The model is in train mode; there are no pairs, or not as many answers; a prompt is empty, too
            long or already ends with its answer; an answer is not one token; both answers are the same token; no
            pair is left.
        UnsupportedModelError: The model is built in a way that is not understood.
    """
    check_sites(model)
    _check_lists(pairs, answers, align)
    clean, corrupted = (encode(tokenizer, [str(pair[side]) for pair in pairs]) for side in (0, 1))
    check_context(model, [*clean, *corrupted])
    ids = torch.tensor([[single_token_id(tokenizer, text) for text in pair] for pair in answers])
    _check_answers(pairs, answers, clean, ids)
    every = Pairs(
        clean=clean,
        corrupted=corrupted,
        answer_ids=ids[:, 0],
        wrong_ids=ids[:, 1],
        texts=[(str(a), str(b)) for a, b in pairs],
        answers=[(str(a), str(b)) for a, b in answers],
        tokens=[
            ([token_text(tokenizer, i) for i in a], [token_text(tokenizer, i) for i in b])
            for a, b in zip(clean, corrupted, strict=True)
        ],
        indices=list(range(len(pairs))),
        align=align,
        excluded=[],
    )
    kept = [align == "end" or len(a) == len(b) for a, b in zip(clean, corrupted, strict=True)]
    reasons = [_unequal(*tokens) for tokens in every.tokens]
    if not any(kept):
        raise ValueError(
            f"No pair has prompts of equal length; in the first, {reasons[0]}. Choose words of as many tokens; "
            'activation_patching also takes align="end", to compare positions counted from the end.'
        )
    return every.keep(kept, reasons)


def _check_lists(pairs: Sequence[object], answers: Sequence[object], align: str) -> None:
    if align not in ("equal", "end"):
        raise ValueError(f'align is {align!r}; expected "equal" or "end".')
    if isinstance(pairs, str) or not pairs or any(isinstance(p, str) or len(cast(Any, p)) != 2 for p in pairs):
        raise ValueError(f"pairs is {pairs!r}; expected a list of (clean prompt, corrupted prompt).")
    if len(answers) != len(pairs) or any(isinstance(a, str) or len(cast(Any, a)) != 2 for a in answers):
        raise ValueError(
            f"answers is {answers!r} for {len(pairs)} pairs; expected one (right answer, wrong answer) for each."
        )


def _check_answers(
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    clean: list[list[int]],
    ids: Int[Tensor, "n 2"],
) -> None:
    for (prompt, _), texts, tokens, (right, wrong) in zip(pairs, answers, clean, ids.tolist(), strict=True):
        if right == wrong:
            raise ValueError(f"Both answers to {prompt!r} are {texts[0]!r}; expected two different tokens.")
        if tokens[-1] == right:
            raise ValueError(
                f"The prompt {prompt!r} ends with its own answer {texts[0]!r}; expected a prompt whose next token is "
                "the answer. Cut the answer off."
            )


def _unequal(clean: list[str], corrupted: list[str]) -> str:
    return f"the clean prompt has {len(clean)} tokens, {clean}, and the corrupted one {len(corrupted)}, {corrupted}"


def last_positions(ids: Sequence[Sequence[int]]) -> Int[Tensor, " n"]:
    """Index of each prompt's last token."""
    return torch.tensor([len(row) - 1 for row in ids])


# ---------------------------------------------------------------------------------------------- metrics


def logit_diffs(logits_last: Float[Tensor, "n d_vocab"], pairs: Pairs) -> Float[Tensor, " n"]:
    """Logit of the right answer minus that of the wrong one, in nats; keeps device and graph."""
    return metric_values(logits_last, pairs.answer_ids, pairs.wrong_ids, "logit_diff")


def metric_values(
    logits: Float[Tensor, "rows d_vocab"],
    answer_ids: Int[Tensor, " rows"],
    wrong_ids: Int[Tensor, " rows"],
    metric: str,
) -> Float[Tensor, " rows"]:
    """One metric per row of logits, in float32 at least.

    `logit_diff` is logit(answer) - logit(wrong) in nats, `logprob` the answer's log-probability in nats, `rank` the
    answer's rank (1 is the most probable token).

    Raises:
        ValueError: A logit is infinite or not a number, or the metric is unknown.
    """
    check_finite(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    answer = logits.gather(-1, answer_ids.to(logits.device)[:, None])
    if metric == "logit_diff":
        return (answer - logits.gather(-1, wrong_ids.to(logits.device)[:, None]))[:, 0]
    if metric == "logprob":
        return log_probs(logits).gather(-1, answer_ids.to(logits.device)[:, None])[:, 0]
    if metric == "rank":
        return 1 + (logits > answer).sum(-1).to(logits.dtype)
    raise ValueError(f"The metric {metric!r} is not known; expected one of {', '.join(METRICS)}.")


@dataclass(frozen=True)
class Baselines:
    """Every metric of METRICS for every pair in the two unpatched runs, in float64 on the CPU."""

    clean: Float[Tensor, "n metrics"]
    corrupted: Float[Tensor, "n metrics"]

    def of(self, metric: str) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """One metric, (clean, corrupted)."""
        which = METRICS.index(metric)
        return self.clean[:, which], self.corrupted[:, which]


def with_gap(model: PreTrainedModel, pairs: Pairs, min_gap: float) -> tuple[Pairs, Baselines]:
    """Run all prompts unpatched, and leave out the pairs whose logit difference falls by less than `min_gap` nats.

    Raises:
        ValueError: `min_gap` is not positive, no pair is left, or a logit is infinite or not a number.
    """
    if not min_gap > 0:
        raise ValueError(f"min_gap is {min_gap}; expected more than 0 nats, since effects are divided by the gap.")
    clean, corrupted = (pair_metrics(model, ids, pairs) for ids in (pairs.clean, pairs.corrupted))
    pairs, kept = apart(pairs, clean[:, 0], corrupted[:, 0], min_gap)
    return pairs, Baselines(clean[kept], corrupted[kept])


def apart(
    pairs: Pairs, clean: Float[Tensor, " n"], corrupted: Float[Tensor, " n"], min_gap: float
) -> tuple[Pairs, list[bool]]:
    """Only the pairs whose logit difference falls by `min_gap` nats from clean to corrupted, and which these are.

    Raises:
        ValueError: There are none.
    """
    kept: list[bool] = (clean - corrupted >= min_gap).tolist()
    reasons = [
        f"its logit difference is {a:.3g} nats in the clean run and {b:.3g} in the corrupted one, a gap of "
        f"{a - b:.3g}; at least {min_gap:g} was asked for"
        for a, b in zip(clean.tolist(), corrupted.tolist(), strict=True)
    ]
    if not any(kept):
        raise ValueError(
            f"No pair of {len(kept)} has a gap to be recovered: for the first, {reasons[0]}. Choose prompts between "
            "which the model's answer changes, check that the right answer belongs to the clean prompt, or lower "
            "min_gap."
        )
    return pairs.keep(kept, reasons), kept


def pair_infos(pairs: Pairs, baselines: Baselines) -> list[PairInfo]:
    """The pairs as a result shows them."""
    clean, corrupted = baselines.of("logit_diff")
    return [
        PairInfo(
            pair=pairs.indices[i],
            clean=pairs.texts[i][0],
            corrupted=pairs.texts[i][1],
            answer=pairs.answers[i][0],
            wrong=pairs.answers[i][1],
            clean_logit_diff=number(clean[i]),
            corrupted_logit_diff=number(corrupted[i]),
        )
        for i in range(len(pairs))
    ]


def pair_metrics(model: PreTrainedModel, ids: list[list[int]], pairs: Pairs) -> Float[Tensor, "n metrics"]:
    """Every metric of METRICS after the last token of each prompt, in float64 on the CPU."""

    def measure(which: list[int]) -> list[Tensor]:
        rows = [ids[i] for i in which]
        last = last_positions(rows)
        logits = logits_at(model, pad(rows, "right", 0, model.device), torch.arange(len(rows)), last)
        answer_ids, wrong_ids = pairs.answer_ids[which], pairs.wrong_ids[which]
        values = [metric_values(logits, answer_ids, wrong_ids, metric) for metric in METRICS]
        return list(torch.stack(values, -1).double().cpu())

    return torch.stack(in_batches([len(row) for row in ids], MAX_TOKENS, measure))
