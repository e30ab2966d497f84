"""What `linear_probe` and `probe_transfer` share: labels in numbers, scores with intervals, and baselines."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from techniques._activations import Reading
from techniques._folds import (
    METHODS,
    Method,
    Scale,
    cross_validate,
    fit,
    group_folds,
    held_classes,
    merged_groups,
    one_vs_rest,
    predictions,
)
from techniques._results import number
from techniques._stats import auroc, auroc_draws, balanced_accuracy_draws, percentiles, recalls, resamples
from techniques._tokens import check_lists, plain, token_text

SHOWN = 5  # names and tokens that are listed


class ProbeScore(TypedDict):
    """How well held-out groups were classified.

    Attributes:
        auroc: Probability that a positive text scores above a negative one of the same fold; the mean over classes
            where there are more than two.
        auroc_low: Lower end of its 95 % interval, groups resampled.
        auroc_high: Upper end.
        balanced_accuracy: Mean over classes of the share that was classified rightly; thresholds come from the fit.
        balanced_accuracy_low: Lower end of its 95 % interval, groups resampled.
        balanced_accuracy_high: Upper end.
        accuracy: Share of all texts that was classified rightly.
    """

    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    balanced_accuracy: float | None
    balanced_accuracy_low: float | None
    balanced_accuracy_high: float | None
    accuracy: float | None


class TellingToken(TypedDict):
    """A token whose presence tells a class by itself.

    Attributes:
        token: Its text.
        label: The class.
        share_in: Share of the class's texts that hold it.
        share_out: Share of the other texts that hold it.
        balanced_accuracy: Of the rule "has it" or "lacks it", whichever is right more often.
    """

    token: str
    label: str
    share_in: float
    share_out: float
    balanced_accuracy: float


@dataclass(frozen=True)
class Options:
    """How probes are fitted and compared with chance.

    Raises:
        ValueError: An option is out of range.
    """

    method: Method
    c: float
    n_folds: int
    n_permutations: int
    n_boot: int
    seed: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"The method {self.method!r} is not known; expected one of {', '.join(METHODS)}.")
        if not 0 < self.c < float("inf"):
            raise ValueError(f"c is {self.c}; expected a positive number, the inverse strength of the penalty.")
        if self.n_folds < 2 or self.n_permutations < 0 or self.n_boot < 1:
            raise ValueError(
                f"n_folds is {self.n_folds}, n_permutations {self.n_permutations} and n_boot {self.n_boot}; expected "
                "at least 2, 0 and 1."
            )


@dataclass(frozen=True)
class Labels:
    """Labels as numbers, with their names in order."""

    names: list[str]
    classes: Int[Tensor, " n"]

    def counts(self) -> list[int]:
        """Texts of each class."""
        counts: list[int] = self.classes.bincount().tolist()
        return counts


def number_labels(labels: Sequence[Hashable], n: int) -> Labels:
    """Number the labels of n texts in their natural order.

    Raises:
        ValueError: There are not n labels, one is not a number, or they are all the same.
    """
    labels = plain(labels)
    check_lists(labels=labels)
    if len(labels) != n:
        raise ValueError(f"labels has {len(labels)} entries for {n} texts; expected one for each.")
    if missing := [i for i, label in enumerate(labels) if label != label]:
        raise ValueError(f"Label {missing[0]} is {labels[missing[0]]}; expected a value. Leave the text out.")
    try:
        values = sorted(set(cast(Any, labels)))
    except TypeError:  # of several types
        values = sorted(set(labels), key=str)
    if len(values) < 2:
        raise ValueError(f"All {n} labels are {values[0]!r}; expected at least two different labels.")
    return Labels([str(value) for value in values], torch.tensor([values.index(label) for label in labels]))


def contradictions(reading: Reading, labels: Labels) -> list[str]:
    """The warning for texts that stand under several labels, of which a probe can get one right at most."""
    of_text: dict[tuple[int, ...], set[int]] = {}
    for text, label in zip(reading.inputs(), labels.classes.tolist(), strict=True):
        of_text.setdefault(text, set()).add(label)
    n = sum(len(found) > 1 for found in of_text.values())
    return [f"{n} of the texts stand under several labels, so no probe can be right about all of them."] if n else []


def listed(names: set[Hashable]) -> str:
    """Names for a message, the first few of them."""
    texts = sorted(str(name) for name in names)
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def cross_validated(
    x: Float[Tensor, "n d"],
    sets: Int[Tensor, "n sets"],
    folds: Int[Tensor, " n"],
    labels: Labels,
    options: Options,
    eps: float,
) -> tuple[Float[Tensor, "n sets outputs"], Float[Tensor, " sets"], bool]:
    """Scores of each label set on the folds that were held out, its AUROC, and whether all fits converged."""
    k = len(labels.names)
    scores, converged = cross_validate(x, sets, k, folds, options.method, options.c, eps)
    return scores, auroc(scores, one_vs_rest(sets, k), folds).mean(-1), converged


def probe_score(
    scores: Float[Tensor, "n outputs"],
    labels: Labels,
    folds: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    draws: Float[Tensor, "boot n_groups"],
) -> ProbeScore:
    """How well the scores tell the classes, with intervals from resampled groups."""
    right = predictions(scores) == labels.classes
    positive = one_vs_rest(labels.classes, len(labels.names))
    drawn = [auroc_draws(scores[:, i], positive[:, i], folds, groups, draws) for i in range(scores.shape[1])]
    low, high = percentiles(torch.stack(drawn).mean(0))
    balanced_low, balanced_high = percentiles(balanced_accuracy_draws(right, labels.classes, groups, draws))
    return ProbeScore(
        auroc=number(auroc(scores, positive, folds).mean()),
        auroc_low=number(low),
        auroc_high=number(high),
        balanced_accuracy=number(recalls(right, labels.classes, len(labels.names)).mean()),
        balanced_accuracy_low=number(balanced_low),
        balanced_accuracy_high=number(balanced_high),
        accuracy=number(right.double().mean()),
    )


def token_counts(reading: Reading) -> tuple[Float[Tensor, "n tokens"], list[int]]:
    """How often each token stands up to the position of each text, for tokens that more than one text has."""
    inputs = reading.inputs()
    vocabulary = sorted({i for ids in inputs for i in ids})
    column = {token: i for i, token in enumerate(vocabulary)}
    counts = torch.zeros(len(inputs), len(vocabulary))
    for row, ids in enumerate(inputs):
        counts[row] = torch.tensor([column[i] for i in ids]).bincount(minlength=len(vocabulary))
    kept = (counts > 0).sum(0) > 1
    return counts[:, kept], [token for token, keep in zip(vocabulary, kept.tolist(), strict=True) if keep]


def telling_tokens(
    tokenizer: PreTrainedTokenizerBase, counts: Float[Tensor, "n tokens"], vocabulary: list[int], labels: Labels
) -> list[TellingToken]:
    """The tokens whose presence tells a class best; of two classes, the second is looked for."""
    has = (counts > 0).double()
    found = []
    for k in range(1 if len(labels.names) == 2 else 0, len(labels.names)):
        inside, outside = has[labels.classes == k].mean(0), has[labels.classes != k].mean(0)
        rule = 0.5 + (inside - outside).abs() / 2
        found += [
            TellingToken(
                token=token_text(tokenizer, vocabulary[i]),
                label=labels.names[k],
                share_in=float(inside[i]),
                share_out=float(outside[i]),
                balanced_accuracy=float(rule[i]),
            )
            for i in rule.topk(min(SHOWN, len(vocabulary))).indices.tolist()
        ]
    return sorted(found, key=lambda token: -token["balanced_accuracy"])[:SHOWN]


def transfer_score(
    x: Float[Tensor, "n d"],
    train: Bool[Tensor, " n"],
    test: Bool[Tensor, " n"],
    reading: Reading,
    labels: Labels,
    options: Options,
    eps: float,
) -> ProbeScore:
    """Score of the tested texts: by a probe fitted on `train`, or by cross-validation where both are the same."""
    here = Labels(labels.names, labels.classes[test])
    texts = [text for text, tested in zip(reading.inputs(), test.tolist(), strict=True) if tested]
    members = torch.tensor(merged_groups(texts, texts)[0])
    draws = resamples(int(members.max()) + 1, options.seed, options.n_boot)
    folds = torch.zeros_like(members)
    if bool((train == test).all()):
        n_folds = min(options.n_folds, *held_classes(here.classes, members).sum(0).tolist())
        folds = group_folds(here.classes, members, n_folds, torch.Generator().manual_seed(options.seed))
        scores = cross_validated(x[test], here.classes[:, None], folds, labels, options, eps)[0][:, 0]
    else:
        scale = Scale(x[train], eps)
        positive = one_vs_rest(labels.classes[train], len(labels.names))
        scores = fit(options.method, scale(x[train]), positive, options.c).scores(scale(x[test]))
    return probe_score(scores, here, folds, members, draws)
