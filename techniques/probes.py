"""Linear probes: what a linear classifier can read off a model's activations, with the controls that belong to it.

Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes" (2016),
https://arxiv.org/abs/1610.01644; Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks" (2019),
https://arxiv.org/abs/1909.03368; Marks & Tegmark, "The Geometry of Truth" (2023), https://arxiv.org/abs/2310.06824.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._folds import (
    METHODS,
    Method,
    cross_validate,
    group_folds,
    group_labels,
    held_classes,
    merged_groups,
    one_vs_rest,
    predictions,
    shuffled_labels,
)
from techniques._generation import own_random_stream
from techniques._hooks import HookPoint
from techniques._results import Header, header, number
from techniques._stats import (
    N_BOOT,
    auroc,
    auroc_draws,
    balanced_accuracy_draws,
    percentiles,
    permutation_p,
    recalls,
    resamples,
)
from techniques._tokens import token_text
from techniques.extract import Layers, Position, Reading, activations_at, points_of, read_at

SHOWN = 5  # names and tokens that are listed
N_CONTROLS = 5  # random labellings of the control task
TELLING = 0.9  # balanced accuracy of a single token from which a warning is given


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


class ProbeRow(ProbeScore):
    """One layer.

    Attributes:
        layer: The layer.
        confusion: Texts by true class (rows) and by the class they were put in (columns).
        null_auroc: Mean AUROC of shuffled labels.
        null_auroc_high: Their 95th percentile.
        p: Share of shuffles that do as well, for this layer by itself.
        row_split_auroc: AUROC where texts, not groups, are split, so that groups are in train and test alike.
        control_auroc: The same for labels drawn at random for each group: what the probe can memorise of groups.
        selectivity: row_split_auroc - control_auroc.
        untrained_auroc: AUROC on the same architecture with random weights.
    """

    layer: int
    confusion: list[list[int]]
    null_auroc: float | None
    null_auroc_high: float | None
    p: float | None
    row_split_auroc: float | None
    control_auroc: float | None
    selectivity: float | None
    untrained_auroc: float | None


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


class LinearProbe(Header):
    """Result of `linear_probe`.

    Attributes:
        site: Where in a block, in TransformerLens' words.
        method: How the weights were fitted.
        c: Inverse strength of the penalty.
        classes: The labels in order; of two, the second is positive.
        class_counts: Texts of each class.
        n_groups: Groups, after those that share a text were made one.
        n_folds: Folds; the groups of a fold are held out together.
        majority: Accuracy of always saying the most frequent class.
        bag_of_words: The same probe on counts of the tokens that the model had read, the embedding's own knowledge.
        rows: By layer.
        best_layer: The layer with the highest AUROC; picked after the fact.
        p_any: Share of shuffles whose best layer does as well as the best layer here.
        n_permutations: Shuffles.
        shuffled: "labels of groups" or "labels within groups": what the null exchanges.
        tokens: The tokens that tell a class best.
    """

    site: str
    method: Method
    c: float
    classes: list[str]
    class_counts: list[int]
    n_groups: int
    n_folds: int
    majority: float
    bag_of_words: ProbeScore
    rows: list[ProbeRow]
    best_layer: int
    p_any: float | None
    n_permutations: int
    shuffled: str
    tokens: list[TellingToken]


@dataclass(frozen=True)
class _Options:
    """How probes are fitted and compared with chance."""

    method: Method
    c: float
    n_folds: int
    n_permutations: int
    n_boot: int
    seed: int


@dataclass(frozen=True)
class _Task:
    """Labels, groups and folds: what is the same for all layers."""

    names: list[str]
    classes: Int[Tensor, " n"]
    groups: Int[Tensor, " n"]
    folds: Int[Tensor, " n"]
    row_folds: Int[Tensor, " n"]
    shuffles: Int[Tensor, "n sets"]
    controls: Int[Tensor, "n sets"]
    draws: Float[Tensor, "boot n_groups"]
    options: _Options
    eps: float


def linear_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    layers: Layers = "all",
    site: str = "resid_post",
    position: Position = "last",
    method: Method = "logistic",
    c: float = 1.0,
    n_folds: int = 5,
    n_permutations: int = 100,
    untrained: bool = False,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> LinearProbe:
    """Probe every layer for a label by a linear classifier, on groups that it was not fitted on, beside its controls.

    Features are standardised within each training fold. More than two classes are classified one against the rest.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        texts: The texts.
        labels: The label of each text, of two or more values.
        groups: What each text belongs to (a person, a topic, a template): texts of one group are held out together.
            None makes each distinct text a group. Groups that share a text up to the position count as one.
        layers: Layers from 0, or "all".
        site: Where in a block; resid_pre of layer 0 is the embedding, a control by itself.
        position: Which token to read; see `extract`.
        method: "logistic", "ridge" (least squares) or "mean_difference" (the class means' difference).
        c: Inverse strength of the penalty, as scikit-learn's C; "mean_difference" has none.
        n_folds: Most folds; there are no more than the class in the fewest groups allows.
        n_permutations: Shuffles of the labels for the null.
        untrained: Whether to probe the same architecture with random weights too; it needs memory for a second model.
        n_boot: Bootstrap resamples of the groups.
        seed: Seed of folds, shuffles, control labels, resamples and random weights.

    Returns:
        One row per layer, and the baselines that need no model.

    Raises:
        ValueError: There is one class only; a class is in fewer than two groups (after merging those that share
            texts); lists differ in length; a position, layer or site does not exist; an activation is not a number.

    Misleads: A probe shows what can be read, not what the model uses; that takes an intervention. A high AUROC beside
    a high bag of words, control or untrained AUROC says little about the model. The best of many layers is best by
    luck in part: `p_any` accounts for that. Intervals over few groups are too narrow.

    Cost: 1 forward per text (2 if untrained), then n_folds fits per layer for all label sets at once; about 1 s for
    250 texts on the demo model.

    Example:
        >>> from interp_kernel.demo_model import corpus
        >>> said = [(v, f) for v in ("female", "male") for f in range(5)] * 4
        >>> texts = [f"{corpus.TOPICS[i // 10]} {corpus.demographic_sentence('sex', *s)}" for i, s in enumerate(said)]
        >>> found = linear_probe(model, tokenizer, texts, [v for v, _ in said], groups=[f for _, f in said])
        >>> [row["auroc"] for row in found["rows"]]
    """
    options = _Options(method, c, n_folds, n_permutations, n_boot, seed)
    _check_options(options)
    reading = read_at(model, tokenizer, texts, position)
    task, notes = _task(reading, labels, groups, options, torch.finfo(model.dtype).eps)
    points = points_of(model, site, layers)
    counts, vocabulary = _counts(reading)
    words, value, _ = _cross_validate(task, counts, task.classes[:, None], task.folds)
    found = activations_at(model, reading, points).flatten(2)
    blank = _untrained(model, reading, points, seed) if untrained else None
    measured = [
        _row(task, point.layer, found[:, i], None if blank is None else blank[:, i]) for i, point in enumerate(points)
    ]
    rows = [row for row, _, _ in measured]
    null = torch.stack([null for _, null, _ in measured]).amax(0)
    pure = bool((held_classes(task.classes, task.groups).sum(1) == 1).all())
    best = max(rows, key=lambda row: row["auroc"] or 0)
    tokens = _telling_tokens(tokenizer, counts, vocabulary, task)
    if not all(converged for _, _, converged in measured):
        notes.append("A fit did not converge; lower c.")
    notes += [
        f"The token {t['token']!r} tells {t['label']!r} by itself (balanced accuracy {t['balanced_accuracy']:.2f})."
        for t in tokens
        if t["balanced_accuracy"] >= TELLING
    ]
    sizes = task.classes.bincount().tolist()
    return LinearProbe(
        **header(model, "linear_probe", n=len(reading.texts), seed=seed, warnings=notes),
        site=points[0].site,
        method=method,
        c=c,
        classes=task.names,
        class_counts=sizes,
        n_groups=task.draws.shape[1],
        n_folds=len(task.folds.unique()),
        majority=max(sizes) / len(reading.texts),
        bag_of_words=_score(task, words[:, 0], value[0]),
        rows=rows,
        best_layer=best["layer"],
        p_any=number(permutation_p(best["auroc"] or 0, null)) if n_permutations else None,
        n_permutations=n_permutations,
        shuffled="labels of groups" if pure else "labels within groups",
        tokens=tokens,
    )


def _check_options(options: _Options) -> None:
    if options.method not in METHODS:
        raise ValueError(f"The method {options.method!r} is not known; expected one of {', '.join(METHODS)}.")
    if not 0 < options.c < float("inf"):
        raise ValueError(f"c is {options.c}; expected a positive number, the inverse strength of the penalty.")
    if options.n_folds < 2 or options.n_permutations < 0 or options.n_boot < 1:
        raise ValueError(
            f"n_folds is {options.n_folds}, n_permutations {options.n_permutations} and n_boot {options.n_boot}; "
            "expected at least 2, 0 and 1."
        )


def _task(
    reading: Reading, labels: Sequence[Hashable], groups: Sequence[Hashable] | None, options: _Options, eps: float
) -> tuple[_Task, list[str]]:
    names, classes = _classes(labels, len(reading.texts))
    inputs = reading.inputs()
    given = inputs if groups is None else list(groups)
    if len(given) != len(inputs):
        raise ValueError(f"groups has {len(given)} entries for {len(inputs)} texts; expected one for each.")
    numbered, merged = merged_groups(given, inputs)
    members = torch.tensor(numbered)
    in_class = held_classes(classes, members).sum(0).tolist()
    notes = [f"The groups {_listed(found)} share texts and were held out together." for found in merged]
    if min(in_class) < 2:
        rare = names[in_class.index(min(in_class))]
        raise ValueError(
            f"The label {rare!r} is in 1 group only; expected at least 2, one to fit and one to test. "
            f"{' '.join(notes) or 'Give it more groups, or fewer texts to each.'}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    n_groups = int(members.max()) + 1
    each = torch.arange(len(inputs))
    n_controls = N_CONTROLS if n_groups < len(inputs) else 0
    task = _Task(
        names=names,
        classes=classes,
        groups=members,
        folds=group_folds(classes, members, min(options.n_folds, *in_class), generator),
        row_folds=group_folds(classes, each, min(options.n_folds, *classes.bincount().tolist()), generator),
        shuffles=shuffled_labels(classes, members, options.n_permutations, generator),
        controls=group_labels(classes, members, n_controls, generator),
        draws=resamples(n_groups, options.seed, options.n_boot),
        options=options,
        eps=eps,
    )
    return task, notes


def _classes(labels: Sequence[Hashable], n: int) -> tuple[list[str], Int[Tensor, " n"]]:
    if len(labels) != n:
        raise ValueError(f"labels has {len(labels)} entries for {n} texts; expected one for each.")
    try:
        values = sorted(set(cast(Any, labels)))
    except TypeError:  # of several types
        values = sorted(set(labels), key=str)
    if len(values) < 2:
        raise ValueError(f"All {n} labels are {values[0]!r}; expected at least two different labels.")
    return [str(value) for value in values], torch.tensor([values.index(label) for label in labels])


def _listed(names: set[Hashable]) -> str:
    texts = sorted(str(name) for name in names)
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def _cross_validate(
    task: _Task, x: Float[Tensor, "n d"], sets: Int[Tensor, "n sets"], folds: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n sets outputs"], Float[Tensor, " sets"], bool]:
    """Scores and AUROC of each label set, and whether all fits converged."""
    device, method, c = x.device, task.options.method, task.options.c
    k = len(task.names)
    scores, converged = cross_validate(x, sets.to(device), k, folds.to(device), method, c, task.eps)
    return scores.cpu(), auroc(scores.cpu(), one_vs_rest(sets, k), folds).mean(-1), converged


def _row(
    task: _Task, layer: int, x: Float[Tensor, "n d"], untrained: Float[Tensor, "n d"] | None
) -> tuple[ProbeRow, Float[Tensor, " permutations"], bool]:
    sets = torch.cat([task.classes[:, None], task.shuffles], 1)
    scores, aurocs, converged = _cross_validate(task, x, sets, task.folds)
    null = aurocs[1:]
    sets = torch.cat([task.classes[:, None], task.controls], 1)
    row_split, *controls = _cross_validate(task, x, sets, task.row_folds)[1].tolist()
    control = sum(controls) / len(controls) if controls else None
    blank = None
    if untrained is not None:
        blank = number(_cross_validate(task, untrained, task.classes[:, None], task.folds)[1][0])
    k = len(task.names)
    chosen = predictions(scores[:, 0])
    row = ProbeRow(
        layer=layer,
        **_score(task, scores[:, 0], aurocs[0]),
        confusion=(task.classes * k + chosen).bincount(minlength=k * k).view(k, k).tolist(),
        null_auroc=number(null.mean()) if len(null) else None,
        null_auroc_high=number(null.quantile(0.95)) if len(null) else None,
        p=number(permutation_p(float(aurocs[0]), null)) if len(null) else None,
        row_split_auroc=number(row_split),
        control_auroc=None if control is None else number(control),
        selectivity=None if control is None else number(row_split - control),
        untrained_auroc=blank,
    )
    return row, null, converged


def _score(task: _Task, scores: Float[Tensor, "n outputs"], value: Float[Tensor, ""]) -> ProbeScore:
    right = predictions(scores) == task.classes
    positive = one_vs_rest(task.classes, len(task.names))
    drawn = [
        auroc_draws(scores[:, i], positive[:, i], task.folds, task.groups, task.draws) for i in range(scores.shape[1])
    ]
    low, high = percentiles(torch.stack(drawn).mean(0))
    balanced_low, balanced_high = percentiles(balanced_accuracy_draws(right, task.classes, task.groups, task.draws))
    return ProbeScore(
        auroc=number(value),
        auroc_low=number(low),
        auroc_high=number(high),
        balanced_accuracy=number(recalls(right, task.classes, len(task.names)).mean()),
        balanced_accuracy_low=number(balanced_low),
        balanced_accuracy_high=number(balanced_high),
        accuracy=number(right.double().mean()),
    )


def _counts(reading: Reading) -> tuple[Float[Tensor, "n tokens"], list[int]]:
    """How often each token stands up to the position of each text, for tokens that more than one text has."""
    inputs = reading.inputs()
    vocabulary = sorted({i for ids in inputs for i in ids})
    column = {token: i for i, token in enumerate(vocabulary)}
    counts = torch.zeros(len(inputs), len(vocabulary))
    for row, ids in enumerate(inputs):
        counts[row] = torch.tensor([column[i] for i in ids]).bincount(minlength=len(vocabulary))
    kept = (counts > 0).sum(0) > 1
    return counts[:, kept], [token for token, keep in zip(vocabulary, kept.tolist(), strict=True) if keep]


def _telling_tokens(
    tokenizer: PreTrainedTokenizerBase, counts: Float[Tensor, "n tokens"], vocabulary: list[int], task: _Task
) -> list[TellingToken]:
    has = (counts > 0).double()
    found = []
    for k, name in enumerate(task.names[-1:] if len(task.names) == 2 else task.names, len(task.names) == 2):
        inside, outside = has[task.classes == k].mean(0), has[task.classes != k].mean(0)
        rule = 0.5 + (inside - outside).abs() / 2
        for value, i in zip(*(part.tolist() for part in rule.topk(min(SHOWN, len(vocabulary)))), strict=True):
            found.append((value, i, name, float(inside[i]), float(outside[i])))
    return [
        TellingToken(
            token=token_text(tokenizer, vocabulary[i]),
            label=name,
            share_in=inside,
            share_out=outside,
            balanced_accuracy=value,
        )
        for value, i, name, inside, outside in sorted(found, reverse=True)[:SHOWN]
    ]


def _untrained(
    model: PreTrainedModel, reading: Reading, points: Sequence[HookPoint], seed: int
) -> Float[Tensor, "n layers d"]:
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    with own_random_stream(model, seed):
        blank = type(base)(copy.deepcopy(base.config))
    return activations_at(blank.to(model.device, model.dtype).eval(), reading, points).flatten(2)
