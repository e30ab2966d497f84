"""Directions: unit vectors in activation space along which two kinds of text differ.

Sources: Marks & Tegmark, "The Geometry of Truth" (2023), https://arxiv.org/abs/2310.06824 (difference of means); Zou et
al., "Representation Engineering" (2023), https://arxiv.org/abs/2310.01405 (principal component); Chen et al., "Persona
Vectors" (2025), https://arxiv.org/abs/2507.21509.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._folds import Scale, group_folds, merged_groups
from techniques._generation import continue_tokens
from techniques._hooks import HookPoint
from techniques._logistic import fit_logistic
from techniques._results import Header, header, number, numbers
from techniques._stats import auroc, auroc_draws, percentiles, resamples
from techniques._tokens import chat_ids
from techniques.extract import Layers, Position, Reading, ReadText, activations_at, points_of, read_at

DirectionMethod = Literal["mean", "probe", "pca"]
METHODS = ("mean", "probe", "pca")


class Direction(TypedDict):
    """A unit vector at one point of the model; it points from the negative to the positive class.

    Attributes:
        direction: The unit vector.
        layer: The layer.
        site: Where in the block, in TransformerLens' words.
        positive_class: Name of the class that it points to.
        negative_class: Name of the class that it points away from.
        positive_mean: Mean projection of the positive class on it, in the activation's own units; None for a vector
            that comes from elsewhere.
        negative_mean: The same of the negative class.
        separation: positive_mean - negative_mean, never negative; the unit "difference" of steering.
        norm: Mean norm of the activations there, the unit "resid_norm" of steering; None where it was not measured.
        norm_ratio: separation / norm.
        held_out_auroc: Probability that a held-out positive text projects above a held-out negative one.
        held_out_low: Lower end of its 95 % interval, groups resampled.
        held_out_high: Upper end.
    """

    direction: list[float]
    layer: int
    site: str
    positive_class: str
    negative_class: str
    positive_mean: float | None
    negative_mean: float | None
    separation: float
    norm: float | None
    norm_ratio: float | None
    held_out_auroc: float | None
    held_out_low: float | None
    held_out_high: float | None


class ConceptDirection(Header, Direction):
    """Result of `concept_direction`.

    Attributes:
        method: How the direction was found.
        position: Which token was read; "one per text" where a list was given.
        n_fit: Texts that the direction, its means and its norm come from.
        n_held_out: Texts that the AUROC comes from.
        cosine_to_mean: Cosine with the difference of the class means.
        held_out_projections: Of each held-out text: whether it is positive, and its projection.
    """

    method: DirectionMethod
    position: str
    n_fit: int
    n_held_out: int
    cosine_to_mean: float
    held_out_projections: list[tuple[bool, float]]


class PersonaVector(Header):
    """Result of `persona_vector`.

    Attributes:
        site: Where in a block, in TransformerLens' words.
        rows: A direction per layer; each can be passed to the functions that take a direction.
        responses: What was answered and kept or not.
        n_fit: Responses to the questions that the vectors come from.
        n_held_out: Responses to the other questions.
    """

    site: str
    rows: list[Direction]
    responses: list[PersonaResponse]
    n_fit: int
    n_held_out: int


class PersonaResponse(TypedDict):
    """One answer.

    Attributes:
        positive: Whether the system message was a positive one.
        system: The system message.
        question: The question.
        response: The answer.
        score: What `score` said of it, 0 to 100; None without one.
        kept: Whether it was used.
        held_out: Whether its question was kept for the test.
    """

    positive: bool
    system: str
    question: str
    response: str
    score: float | None
    kept: bool
    held_out: bool


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
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = (
        ...     [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS]
        ...     for kind in ("expert", "novice")
        ... )
        >>> found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        >>> found["held_out_auroc"], found["separation"]
    """
    if method not in METHODS:
        raise ValueError(f"The method {method!r} is not known; expected one of {', '.join(METHODS)}.")
    reading = read_at(model, tokenizer, [*positive, *negative], position)
    is_positive = torch.tensor([True] * len(positive) + [False] * len(negative))
    held_out, members = _split(reading, is_positive, groups, holdout, seed)
    point = points_of(model, site, [layer])[0]
    found = activations_at(model, reading, [point]).flatten(2)[:, 0]
    fitted, labels = found[~held_out], is_positive[~held_out]
    mean = fitted[labels].mean(0) - fitted[~labels].mean(0)
    vector = _oriented(_raw_direction(method, fitted, labels, torch.finfo(model.dtype).eps), fitted, labels)
    test = _Test(found[held_out], is_positive[held_out], members[held_out].unique(return_inverse=True)[1], seed)
    return ConceptDirection(
        **header(model, "concept_direction", n=len(found), seed=seed),
        **_direction(vector, fitted, labels, test, point, classes),
        method=method,
        position=str(position) if isinstance(position, int | str) else "one per text",
        n_fit=len(fitted),
        n_held_out=len(test.found),
        cosine_to_mean=_digits(vector @ mean / mean.norm()),
        held_out_projections=[
            (bool(label), _digits(value)) for label, value in zip(test.positive, test.found @ vector, strict=True)
        ],
    )


def persona_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive_systems: Sequence[str],
    negative_systems: Sequence[str],
    questions: Sequence[str],
    *,
    layers: Layers = "all",
    site: str = "resid_post",
    rollouts: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    score: Callable[[str], float] | None = None,
    classes: tuple[str, str] = ("positive", "negative"),
    seed: int = 0,
) -> PersonaVector:
    """Find a trait's direction at every layer from answers under system messages that ask for it or for its opposite.

    Each question is answered under each system message; the vector of a layer is the difference of the mean
    activations over the tokens of the answers. It comes from one half of the questions and is tested on the other.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; its chat template lays out system message and question.
        positive_systems: System messages that ask for the trait.
        negative_systems: System messages that ask for its opposite.
        questions: User messages, at least two.
        layers: Layers from 0, or "all".
        site: Where in a block.
        rollouts: Answers to each question under each system message.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 for greedy answers; then more than one rollout is refused, as all would be equal.
        score: Says how much an answer shows the trait, 0 to 100. Positive answers above 50 and negative ones below 50
            are kept; without it, all are.
        classes: Names of the two classes, positive first.
        seed: Seed of the answers, the split and the intervals.

    Returns:
        A direction per layer and all answers. Answers of no token are not kept.

    Raises:
        ValueError: A list is empty, no answer of one kind is left in one half, or an option is out of range.

    Misleads: Without a score, the vector is that of the instructions, whether or not the model followed them. The
    answers of both kinds differ in their words too, and a mean over their tokens holds those words.

    Cost: Generation of all answers and 1 forward over each; about 2 s for 16 system messages and 8 questions on the
    demo model.

    Example:
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = ([f"You are a {p}." for p in corpus.PERSONAS[kind][:3]] for kind in ("expert", "novice"))
        >>> questions = [question.text for question in corpus.QUESTIONS[:4]]
        >>> found = persona_vector(model, tokenizer, experts, novices, questions, max_new_tokens=8)
        >>> [row["held_out_auroc"] for row in found["rows"]]
    """
    if rollouts < 1 or (rollouts > 1 and temperature == 0):
        raise ValueError(
            f"rollouts is {rollouts} at temperature {temperature}; expected at least 1, and 1 at temperature 0, where "
            "all rollouts are equal."
        )
    if not positive_systems or not negative_systems or len(set(questions)) < 2:
        raise ValueError(
            f"There are {len(positive_systems)} positive and {len(negative_systems)} negative system messages and "
            f"{len(set(questions))} different questions; expected at least 1, 1 and 2."
        )
    points = points_of(model, site, layers)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {questions[i] for i in order[: len(order) // 2]}
    asked = [
        (is_positive, system, question)
        for is_positive, systems in ((True, positive_systems), (False, negative_systems))
        for system in systems
        for question in questions
        for _ in range(rollouts)
    ]
    prompts = [chat_ids(tokenizer, question, system) for _, system, question in asked]
    answers = continue_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    responses = [
        _response(is_positive, system, question, answer["text"], bool(answer["token_ids"]), score, question in tested)
        for (is_positive, system, question), answer in zip(asked, answers, strict=True)
    ]
    kept = [i for i, response in enumerate(responses) if response["kept"]]
    is_positive = torch.tensor([responses[i]["positive"] for i in kept])
    held_out = torch.tensor([responses[i]["held_out"] for i in kept])
    _check_kept(responses)
    reading = Reading(
        [responses[i]["response"] for i in kept],
        [[*prompts[i], *answers[i]["token_ids"]] for i in kept],
        [(len(prompts[i]), len(prompts[i]) + len(answers[i]["token_ids"])) for i in kept],
    )
    found = activations_at(model, reading, points).flatten(2)
    groups = torch.tensor([questions.index(responses[i]["question"]) for i in kept])
    rows = []
    for column, point in enumerate(points):
        fitted, labels = found[~held_out, column], is_positive[~held_out]
        vector = _oriented(fitted[labels].mean(0) - fitted[~labels].mean(0), fitted, labels)
        test = _Test(
            found[held_out, column], is_positive[held_out], groups[held_out].unique(return_inverse=True)[1], seed
        )
        rows.append(_direction(vector, fitted, labels, test, point, classes))
    return PersonaVector(
        **header(model, "persona_vector", n=len(kept), seed=seed),
        site=points[0].site,
        rows=rows,
        responses=responses,
        n_fit=int((~held_out).sum()),
        n_held_out=int(held_out.sum()),
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
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = (
        ...     [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:4]]
        ...     for kind in ("expert", "novice")
        ... )
        >>> found = concept_direction(model, tokenizer, experts, novices, layer=2)
        >>> [row["relative"] for row in project(model, tokenizer, [experts[0], novices[0]], found)["rows"]]
    """
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
        separation=_digits(norm),
        norm=None,
        norm_ratio=None,
        held_out_auroc=None,
        held_out_low=None,
        held_out_high=None,
    )


def unit_vector(direction: Direction, width: int) -> Float[Tensor, " d"]:
    """The direction as a tensor of exactly unit length, float32 on the CPU.

    Raises:
        ValueError: It is of another width than the activations it is meant for.
    """
    vector = torch.tensor(direction["direction"])
    if len(vector) != width:
        raise ValueError(
            f"The direction has {len(vector)} entries, but {direction['site']} of this model has {width}; expected a "
            "direction that was found in this model."
        )
    return vector / vector.norm()


def _response(
    positive: bool,
    system: str,
    question: str,
    text: str,
    has_tokens: bool,
    score: Callable[[str], float] | None,
    held_out: bool,
) -> PersonaResponse:
    value = float(score(text)) if score is not None else None
    shows = value is None or (value > 50 if positive else value < 50)
    return PersonaResponse(
        positive=positive,
        system=system,
        question=question,
        response=text,
        score=value,
        kept=has_tokens and shows,
        held_out=held_out,
    )


def _check_kept(responses: list[PersonaResponse]) -> None:
    for positive in (True, False):
        for held_out in (False, True):
            kind = [r for r in responses if (r["positive"], r["held_out"]) == (positive, held_out)]
            if not any(r["kept"] for r in kind):
                raise ValueError(
                    f"None of {len(kind)} {'positive' if positive else 'negative'} answers to half of the questions was "
                    f"kept; the first is {kind[0]['response']!r}. Expected one at least. Use clearer system "
                    "messages, more questions, or another score."
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
    in_class = [len(members[part].unique()) for part in (is_positive, ~is_positive)]
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
        return torch.linalg.svd(found - found.mean(0), full_matrices=False).Vh[0]
    scale = Scale(found, eps)
    return fit_logistic(scale(found), positive[:, None]).weights[:, 0] / scale.spread


def _oriented(vector: Float[Tensor, " d"], found: Float[Tensor, "n d"], positive: Bool[Tensor, " n"]) -> Tensor:
    """A unit vector on which the positive class has the higher mean."""
    gap = (found[positive].mean(0) - found[~positive].mean(0)) @ vector
    if not float(gap.abs()) > 0:
        raise ValueError(
            "Both classes have the same mean activation; expected a difference. Read them at a position and a layer "
            "where the model has seen what differs."
        )
    return vector / vector.norm() * gap.sign()


class _Test(NamedTuple):
    """Held-out activations."""

    found: Float[Tensor, "n d"]
    positive: Bool[Tensor, " n"]
    groups: Int[Tensor, " n"]
    seed: int


def _direction(
    vector: Float[Tensor, " d"],
    found: Float[Tensor, "n d"],
    positive: Bool[Tensor, " n"],
    test: _Test,
    point: HookPoint,
    classes: tuple[str, str],
) -> Direction:
    above, below = (float((found[part] @ vector).mean()) for part in (positive, ~positive))
    norm = float(found.norm(dim=1).mean())
    scores, one_fold = test.found @ vector, torch.zeros(len(test.found), dtype=torch.long)
    draws = resamples(int(test.groups.max()) + 1, test.seed)
    low, high = percentiles(auroc_draws(scores, test.positive, one_fold, test.groups, draws))
    return Direction(
        direction=numbers(vector),
        layer=point.layer,
        site=point.site,
        positive_class=classes[0],
        negative_class=classes[1],
        positive_mean=_digits(above),
        negative_mean=_digits(below),
        separation=_digits(above - below),
        norm=_digits(norm),
        norm_ratio=_digits((above - below) / norm),
        held_out_auroc=number(auroc(scores, test.positive)),
        held_out_low=number(low),
        held_out_high=number(high),
    )


def _digits(value: float | Tensor) -> float:
    """As `number`, of a value that is known to be finite."""
    return number(value) or 0.0
