"""Directions: unit vectors in activation space along which two kinds of text differ.

Sources: Marks & Tegmark, "The Geometry of Truth" (2023), https://arxiv.org/abs/2310.06824 (difference of means); Zou et
al., "Representation Engineering" (2023), https://arxiv.org/abs/2310.01405 (principal component).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import Position, Reading, ReadText, activations_at, points_of, read_at
from techniques._directions import Direction, HeldOut, check_direction, described, digits, oriented, unit_vector
from techniques._folds import Scale, group_folds, merged_groups
from techniques._logistic import fit_logistic
from techniques._results import Header, few, header, number, numbers
from techniques._tokens import check_lists

DirectionMethod = Literal["mean", "probe", "pca"]
METHODS = ("mean", "probe", "pca")


class HeldOutText(TypedDict):
    """A text that the direction was not found on.

    Attributes:
        text: Its index, the positive texts first.
        positive: Whether it is one of these.
        projection: Its projection, in the activation's own units.
    """

    text: int
    positive: bool
    projection: float


class ConceptDirection(Header, Direction):
    """Result of `concept_direction`.

    Attributes:
        method: How the direction was found.
        position: Which token was read; "one per text" where a list was given.
        n_fit: Texts that the direction, its means and its norm come from.
        n_held_out: Texts that the AUROC comes from.
        cosine_to_mean: Cosine with the difference of the class means.
        held_out: The held-out texts.
    """

    method: DirectionMethod
    position: str
    n_fit: int
    n_held_out: int
    cosine_to_mean: float
    held_out: list[HeldOutText]


class ProjectedText(ReadText):
    """A text's projection on a direction.

    Attributes:
        projection: In the activation's own units.
        relative: 0 at the mean of the negative class, 1 at that of the positive class.
        cosine: With the activation itself, -1 to 1.
    """

    projection: float | None
    relative: float | None
    cosine: float | None


class Projection(Header):
    """Result of `project`.

    Attributes:
        layer: The layer.
        site: Where in the block.
        positive_class: The class that high projections stand for.
        negative_class: The other one.
        rows: By text.
    """

    layer: int
    site: str
    positive_class: str
    negative_class: str
    rows: list[ProjectedText]


def concept_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive: Sequence[str],
    negative: Sequence[str],
    layer: int,
    *,
    groups: Sequence[Hashable] | None = None,
    classes: tuple[str, str] = ("positive", "negative"),
    site: str = "resid_post",
    position: Position = "last",
    method: DirectionMethod = "mean",
    holdout: float = 0.5,
    seed: int = 0,
) -> ConceptDirection:
    """Find the direction along which two sets of texts differ at a layer, and test it on texts that were held out.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        positive: Texts that the direction is to point to.
        negative: Texts that it is to point away from.
        layer: The layer, from 0.
        groups: What each text belongs to, those of the positive texts first; whole groups are held out. None makes
            each distinct text a group.
        classes: Names of the two classes, positive first.
        site: Where in the block.
        position: Which token to read; see `extract`. A list has the positions of the positive texts first.
        method: "mean" is the difference of the class means, "probe" the gradient of a logistic classifier of
            standardised features, "pca" the first principal component of all texts.
        holdout: About which share of the groups is held out, at most 0.5.
        seed: Seed of the split and the interval.

    Returns:
        The unit vector, oriented so that the positive texts project higher, with what gives its length a meaning.

    Raises:
        ValueError: A class has fewer than two groups, a text is in both classes, both means are equal, or a position,
            layer or site does not exist.

    Misleads: A direction that separates two sets of texts need not be what the model uses, nor mean what the sets were
    chosen for: they may differ in length or topic too. The first principal component follows the largest difference
    between texts, which may have nothing to do with the classes.

    Cost: 1 forward per text up to the layer; about 0.1 s for 100 short texts on the demo model.

    Example:
        from interp_kernel.demo_model import corpus

        experts, novices = (
            [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
            for kind in ("expert", "novice")
        )
        concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
    """
    check_lists(positive=positive, negative=negative)
    if method not in METHODS:
        raise ValueError(f"The method {method!r} is not known; expected one of {', '.join(METHODS)}.")
    reading = read_at(model, tokenizer, [*positive, *negative], position)
    is_positive = torch.tensor([True] * len(positive) + [False] * len(negative))
    held_out, members = _split(reading, is_positive, groups, holdout, seed)
    point = points_of(model, site, [layer])[0]
    found = activations_at(model, reading, [point]).flatten(2)[:, 0]
    fitted, labels = found[~held_out], is_positive[~held_out]
    mean = fitted[labels].mean(0) - fitted[~labels].mean(0)
    vector = oriented(_raw_direction(method, fitted, labels, torch.finfo(model.dtype).eps), fitted, labels)
    test = HeldOut(
        found[held_out], is_positive[held_out], torch.unique(members[held_out], return_inverse=True)[1], seed
    )
    return ConceptDirection(
        **header(
            model,
            "concept_direction",
            n=len(found),
            seed=seed,
            warnings=few(len(set(test.groups.tolist())), "held-out group"),
        ),
        **described(vector, fitted, labels, test, point, classes),
        method=method,
        position=str(position) if isinstance(position, int | str) else "one per text",
        n_fit=len(fitted),
        n_held_out=len(test.found),
        cosine_to_mean=digits(vector @ mean / mean.norm()),
        held_out=[
            HeldOutText(text=i, positive=bool(is_positive[i]), projection=digits(found[i] @ vector))
            for i in held_out.nonzero()[:, 0].tolist()
        ],
    )


def project(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    direction: Direction,
    *,
    position: Position = "last",
) -> Projection:
    """Project texts on a direction, at the point of the model that the direction belongs to.

    Args:
        model: The model that the direction was found in.
        tokenizer: Its tokenizer.
        texts: The texts.
        direction: What `concept_direction` returned, or a row of `persona_vector`.
        position: Which token to read; see `extract`.

    Returns:
        For each text its projection, where it lies between the two class means, and the cosine.

    Raises:
        ValueError: The direction is of another width than the model's site, or a position or layer does not exist.

    Misleads: Projections compare texts that were read at like places. The zero of `relative` is the mean of the
    negative texts that the direction was fitted on; other texts need not lie between the means at all.

    Cost: 1 forward per text up to the layer; about 0.1 s for 100 short texts on the demo model.

    Example:
        from interp_kernel.demo_model import corpus
        from techniques.directions import concept_direction

        experts, novices = (
            [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
            for kind in ("expert", "novice")
        )
        found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        project(model, tokenizer, [experts[0], novices[0], corpus.persona_prompt(None, corpus.QUESTIONS[0])], found)
    """
    check_lists(texts=texts)
    check_direction(direction)
    reading = read_at(model, tokenizer, texts, position)
    point = points_of(model, direction["site"], [direction["layer"]])[0]
    found = activations_at(model, reading, [point]).flatten(2)[:, 0]
    projections = found @ unit_vector(direction, found.shape[1])
    cosines = projections / found.norm(dim=1)
    zero = math.nan if direction["negative_mean"] is None else direction["negative_mean"]
    relative = (projections - zero) / direction["separation"]
    return Projection(
        **header(model, "project", n=len(found)),
        layer=point.layer,
        site=point.site,
        positive_class=direction["positive_class"],
        negative_class=direction["negative_class"],
        rows=[
            ProjectedText(**row, projection=number(p), relative=number(r), cosine=number(c))
            for row, p, r, c in zip(reading.rows(tokenizer), projections, relative, cosines, strict=True)
        ],
    )


def vector_direction(
    vector: Sequence[float] | Float[Tensor, " d"],
    layer: int,
    *,
    site: str = "resid_post",
    classes: tuple[str, str] = ("positive", "negative"),
) -> Direction:
    """Make a direction of a vector that comes from elsewhere, so that it can be projected on and steered with.

    Its length is kept as `separation`: a steering coefficient of 1 in units of "difference" adds the vector as it is.

    Raises:
        ValueError: The vector is not a list of finite numbers, or they are all 0.
    """
    values = torch.as_tensor(vector).detach().float().cpu()
    norm = float(values.norm())
    if values.dim() != 1 or not 0 < norm < math.inf:
        raise ValueError(
            f"The vector has shape {list(values.shape)} and norm {norm:.3g}; expected one row of finite numbers that "
            "are not all 0."
        )
    return Direction(
        direction=numbers(values / norm),
        layer=layer,
        site=site,
        positive_class=classes[0],
        negative_class=classes[1],
        positive_mean=None,
        negative_mean=None,
        separation=digits(norm),
        norm=None,
        norm_ratio=None,
        held_out_auroc=None,
        held_out_low=None,
        held_out_high=None,
    )


def _split(
    reading: Reading, is_positive: Bool[Tensor, " n"], groups: Sequence[Hashable] | None, holdout: float, seed: int
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
    """Which texts are held out, and the number of the group of each."""
    if not 0 < holdout <= 0.5:
        raise ValueError(f"holdout is {holdout}; expected a share above 0 and at most 0.5.")
    inputs = reading.inputs()
    both = set(inputs[: int(is_positive.sum())]) & set(inputs[int(is_positive.sum()) :])
    if both:
        shared = reading.texts[inputs.index(min(both))]
        raise ValueError(
            f"The text {shared!r} is in both classes up to the position that is read; expected texts that differ."
        )
    if groups is not None and len(groups) != len(inputs):
        raise ValueError(f"groups has {len(groups)} entries for {len(inputs)} texts; expected one for each.")
    members = torch.tensor(merged_groups(inputs if groups is None else groups, inputs)[0])
    in_class = [len(torch.unique(members[part])) for part in (is_positive, ~is_positive)]
    if min(in_class) < 2:
        raise ValueError(
            f"The positive texts are in {in_class[0]} groups and the negative ones in {in_class[1]}; expected at least "
            "2 of each, one to fit and one to test."
        )
    generator = torch.Generator().manual_seed(seed)
    folds = group_folds(is_positive.long(), members, max(2, min(round(1 / holdout), *in_class)), generator)
    return folds == 0, members


def _raw_direction(
    method: DirectionMethod, found: Float[Tensor, "n d"], positive: Bool[Tensor, " n"], eps: float
) -> Float[Tensor, " d"]:
    if method == "mean":
        return found[positive].mean(0) - found[~positive].mean(0)
    if method == "pca":
        first: Tensor = torch.linalg.svd(found - found.mean(0), full_matrices=False).Vh[0]
        return first
    scale = Scale(found, eps)
    return fit_logistic(scale(found), positive[:, None]).weights[:, 0] / scale.spread
