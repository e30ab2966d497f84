"""Linear probes: what a linear classifier can read off a model's activations, with the controls that belong to it.

Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes" (2016),
https://arxiv.org/abs/1610.01644; Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks" (2019),
https://arxiv.org/abs/1909.03368; Marks & Tegmark, "The Geometry of Truth" (2023), https://arxiv.org/abs/2310.06824.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import Layers, Position, Reading, activations_at, points_of, read_at, untrained_activations
from techniques._folds import Method, predictions
from techniques._probe_groups import Split, domains_of, split_of
from techniques._probing import (
    Labels,
    Options,
    ProbeScore,
    TellingToken,
    contradictions,
    cross_validated,
    number_labels,
    probe_score,
    telling_tokens,
    token_counts,
    transfer_score,
)
from techniques._results import Header, header, number
from techniques._stats import N_BOOT, permutation_p
from techniques._tokens import plain

TELLING = 0.9  # balanced accuracy of a single token from which a warning is given


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
        from interp_kernel.demo_model import corpus

        said = [(k, p, q) for k in ("expert", "novice") for p in corpus.PERSONAS[k] for q in corpus.QUESTIONS[:6]]
        texts, questions = [corpus.persona_prompt(p, q) for _, p, q in said], [q.text for _, _, q in said]
        labels, personas = [k for k, _, _ in said], [p for _, p, _ in said]
        linear_probe(model, tokenizer, texts, labels, personas, site="resid_pre", position=questions)
    """
    options = Options(method, c, n_folds, n_permutations, n_boot, seed)
    reading = read_at(model, tokenizer, texts, position)
    named = number_labels(labels, len(reading.texts))
    split, notes = split_of(reading, named, plain(groups), options)
    points = points_of(model, site, layers)
    found = activations_at(model, reading, points).flatten(2)
    blank = untrained_activations(model, reading, points, seed) if untrained else None
    eps = torch.finfo(model.dtype).eps
    at_layers = [(found[:, i], None if blank is None else blank[:, i]) for i in range(len(points))]
    fits = [_row(split, named, options, eps, point.layer, *x) for point, x in zip(points, at_layers, strict=True)]
    rows, nulls, converged = (list(column) for column in zip(*fits, strict=True))
    best = max(rows, key=lambda row: row["auroc"] or 0)
    words, tokens = _bag_of_words(tokenizer, reading, split, named, options, eps)
    warnings = contradictions(reading, named) + notes + _notes(all(converged), tokens)
    return LinearProbe(
        **header(model, "linear_probe", n=len(reading.texts), seed=seed, warnings=warnings),
        site=points[0].site,
        method=method,
        c=c,
        classes=named.names,
        class_counts=named.counts(),
        n_groups=split.draws.shape[1],
        n_folds=len(torch.unique(split.folds)),
        majority=number(max(named.counts()) / len(reading.texts)) or 0.0,
        bag_of_words=words,
        rows=rows,
        best_layer=best["layer"],
        p_any=number(permutation_p(best["auroc"] or 0, torch.stack(nulls).amax(0))) if n_permutations else None,
        n_permutations=n_permutations,
        shuffled="labels of groups" if split.is_pure(named) else "labels within groups",
        tokens=tokens,
    )


class TransferRow(ProbeScore):
    """A probe that was fitted on one group and tested on another.

    Attributes:
        train: The group it was fitted on; None for all groups but the tested one.
        test: The group it was tested on; where both are the same, by cross-validation within it.
        n_train: Texts it was fitted on; of cross-validation, all texts of the group.
        n_test: Texts it was tested on.
    """

    train: str | None
    test: str
    n_train: int
    n_test: int


class ProbeTransfer(Header):
    """Result of `probe_transfer`.

    Attributes:
        layer: The layer.
        site: Where in the block.
        method: How the weights were fitted.
        c: Inverse strength of the penalty.
        classes: The labels in order; of two, the second is positive.
        groups: The groups, in order of appearance.
        rows: By train group, then test group.
    """

    layer: int
    site: str
    method: Method
    c: float
    classes: list[str]
    groups: list[str]
    rows: list[TransferRow]


def probe_transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[Hashable],
    groups: Sequence[Hashable],
    layer: int,
    *,
    site: str = "resid_post",
    position: Position = "last",
    method: Method = "logistic",
    c: float = 1.0,
    n_folds: int = 5,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> ProbeTransfer:
    """Fit a probe on each group of texts and test it on each other group: whether one classifier holds for all of them.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        texts: The texts.
        labels: The label of each text, of two or more values.
        groups: The topic, template or source of each text; every group needs two texts of every label at least.
        layer: The layer, from 0.
        site: Where in the block.
        position: Which token to read; see `extract`.
        method: As for `linear_probe`.
        c: As for `linear_probe`.
        n_folds: Most folds of the cross-validation within a group.
        n_boot: Bootstrap resamples of the tested texts.
        seed: Seed of folds and resamples.

    Returns:
        A row for each pair of groups, and one per tested group of a probe fitted on all others.

    Raises:
        ValueError: There is one group or one label only, a group has fewer than two texts of a label, a text is in two
            groups up to the position that is read, or a position, layer or site does not exist.

    Misleads: What else the groups share (names, wording) can carry a probe from one to the other. Scales differ between
    groups: a high AUROC with a low balanced accuracy means the direction holds but the threshold does not.

    Cost: 1 forward per text up to the layer and one fit per group; about 0.3 s for 250 texts on the demo model.

    Example:
        from interp_kernel.demo_model import corpus

        said = [(k, p, q) for k in ("expert", "novice") for p in corpus.PERSONAS[k][:4] for q in corpus.QUESTIONS]
        texts, questions = [corpus.persona_prompt(p, q) for _, p, q in said], [q.text for _, _, q in said]
        labels, topics = [k for k, _, _ in said], [q.topic for _, _, q in said]
        probe_transfer(model, tokenizer, texts, labels, topics, layer=0, position=questions)
    """
    options = Options(method, c, n_folds, 0, n_boot, seed)
    reading = read_at(model, tokenizer, texts, position)
    named = number_labels(labels, len(reading.texts))
    domains, members = domains_of(reading, plain(groups), named)
    point = points_of(model, site, [layer])[0]
    found = activations_at(model, reading, [point]).flatten(2)[:, 0]
    eps = torch.finfo(model.dtype).eps
    k = len(domains)
    sources = [*range(k), None] if k > 2 else [*range(k)]
    rows = []
    for train, test in ((train, test) for train in sources for test in range(k)):
        here = members == test
        fitted = members != test if train is None else members == train
        rows.append(
            TransferRow(
                train=None if train is None else domains[train],
                test=domains[test],
                n_train=int(fitted.sum()),
                n_test=int(here.sum()),
                **transfer_score(found, fitted, here, reading, named, options, eps),
            )
        )
    return ProbeTransfer(
        **header(model, "probe_transfer", n=len(reading.texts), seed=seed, warnings=contradictions(reading, named)),
        layer=point.layer,
        site=point.site,
        method=method,
        c=c,
        classes=named.names,
        groups=domains,
        rows=rows,
    )


def _bag_of_words(
    tokenizer: PreTrainedTokenizerBase, reading: Reading, split: Split, labels: Labels, options: Options, eps: float
) -> tuple[ProbeScore, list[TellingToken]]:
    """What a probe of the tokens' counts reads, and the tokens that tell most."""
    counts, vocabulary = token_counts(reading)
    scores = cross_validated(counts, labels.classes[:, None], split.folds, labels, options, eps)[0][:, 0]
    score = probe_score(scores, labels, split.folds, split.groups, split.draws)
    return score, telling_tokens(tokenizer, counts, vocabulary, labels)


def _row(
    split: Split,
    labels: Labels,
    options: Options,
    eps: float,
    layer: int,
    x: Float[Tensor, "n d"],
    untrained: Float[Tensor, "n d"] | None,
) -> tuple[ProbeRow, Float[Tensor, " permutations"], bool]:
    """The row of a layer, the AUROC of each shuffle, and whether all fits converged."""
    truth = labels.classes[:, None]
    scores, aurocs, converged = cross_validated(
        x, torch.cat([truth, split.shuffles], 1), split.folds, labels, options, eps
    )
    by_row = cross_validated(x, torch.cat([truth, split.controls], 1), split.row_folds, labels, options, eps)[1]
    null, controls = aurocs[1:], by_row[1:]
    blank = None
    if untrained is not None:
        blank = number(cross_validated(untrained, truth, split.folds, labels, options, eps)[1][0])
    k = len(labels.names)
    row = ProbeRow(
        layer=layer,
        **probe_score(scores[:, 0], labels, split.folds, split.groups, split.draws),
        confusion=(labels.classes * k + predictions(scores[:, 0])).bincount(minlength=k * k).view(k, k).tolist(),
        null_auroc=number(null.mean()),
        null_auroc_high=number(null.quantile(0.95)) if len(null) else None,
        p=number(permutation_p(float(aurocs[0]), null)) if len(null) else None,
        row_split_auroc=number(by_row[0]),
        control_auroc=number(controls.mean()),
        selectivity=number(by_row[0] - controls.mean()),
        untrained_auroc=blank,
    )
    return row, null, converged


def _notes(converged: bool, tokens: Sequence[TellingToken]) -> list[str]:
    notes = [] if converged else ["A fit did not converge, so its scores are approximate. Lower c."]
    return notes + [
        f"The token {t['token']!r} tells {t['label']!r} by itself (balanced accuracy {t['balanced_accuracy']:.2f})."
        for t in tokens
        if t["balanced_accuracy"] >= TELLING
    ]
