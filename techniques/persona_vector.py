"""Persona vectors: the direction of a trait at every layer, from what the model writes when it is told to have it.

Source: Chen, Arditi, Sleight, Evans & Lindsey, "Persona Vectors: Monitoring and Controlling Character Traits in
Language Models" (2025), https://arxiv.org/abs/2507.21509
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import Layers, Reading, activations_at, points_of
from techniques._directions import Direction, HeldOut, described, oriented
from techniques._generation import Continuation, continue_tokens
from techniques._hooks import HookPoint
from techniques._results import Header, few, header
from techniques._tokens import chat_ids, check_lists


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
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: Without a score, the vector is that of the instructions, whether or not the model followed them. The
    answers of both kinds differ in their words too, and a mean over their tokens holds those words.

    Cost: Generation of all answers and 1 forward over each; about 2 s for 16 system messages and 8 questions on the
    demo model.

    Example:
        from interp_kernel.demo_model import corpus

        experts, novices = ([f"You are a {p}." for p in corpus.PERSONAS[kind][:3]] for kind in ("expert", "novice"))
        questions = [question.text for question in corpus.QUESTIONS[:4]]
        persona_vector(model, tokenizer, experts, novices, questions, classes=("expert", "novice"))
    """
    check_lists(positive_systems=positive_systems, negative_systems=negative_systems, questions=questions)
    _check_options(positive_systems, negative_systems, questions, rollouts, temperature)
    points = points_of(model, site, layers)
    asked = _all_asked(positive_systems, negative_systems, questions, rollouts)
    prompts = [chat_ids(tokenizer, one.question, one.system) for one in asked]
    answers = continue_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    tested = _held_out(questions, seed)
    responses = [_response(one, new, score, one.question in tested) for one, new in zip(asked, answers, strict=True)]
    _check_kept(responses)
    kept = [i for i, response in enumerate(responses) if response["kept"]]
    reading = Reading(
        [responses[i]["response"] for i in kept],
        [[*prompts[i], *answers[i]["token_ids"]] for i in kept],
        [(len(prompts[i]), len(prompts[i]) + len(answers[i]["token_ids"])) for i in kept],
    )
    found = activations_at(model, reading, points).flatten(2)
    is_positive = torch.tensor([responses[i]["positive"] for i in kept])
    held_out = torch.tensor([responses[i]["held_out"] for i in kept])
    topics = torch.tensor([questions.index(asked[i].question) for i in kept])
    groups = torch.unique(topics[held_out], return_inverse=True)[1]
    tests = [HeldOut(found[held_out, i], is_positive[held_out], groups, seed) for i in range(len(points))]
    fits = [(found[~held_out, i], is_positive[~held_out]) for i in range(len(points))]
    rows = [_direction(*fits[i], tests[i], point, classes) for i, point in enumerate(points)]
    warnings = few(len(set(groups.tolist())), "held-out question")
    return PersonaVector(
        **header(model, "persona_vector", n=len(kept), seed=seed, warnings=warnings),
        site=points[0].site,
        rows=rows,
        responses=responses,
        n_fit=int((~held_out).sum()),
        n_held_out=int(held_out.sum()),
    )


def _check_options(
    positive_systems: Sequence[str],
    negative_systems: Sequence[str],
    questions: Sequence[str],
    rollouts: int,
    temperature: float,
) -> None:
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


class _Asked(NamedTuple):
    """A question under a system message."""

    positive: bool
    system: str
    question: str


def _all_asked(
    positive_systems: Sequence[str], negative_systems: Sequence[str], questions: Sequence[str], rollouts: int
) -> list[_Asked]:
    return [
        _Asked(is_positive, system, question)
        for is_positive, systems in ((True, positive_systems), (False, negative_systems))
        for system in systems
        for question in questions
        for _ in range(rollouts)
    ]


def _held_out(questions: Sequence[str], seed: int) -> set[str]:
    """Half of the questions, whose answers no direction is found on."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    return {questions[i] for i in order[: len(order) // 2]}


def _direction(
    found: Float[Tensor, "n d"],
    positive: Bool[Tensor, " n"],
    test: HeldOut,
    point: HookPoint,
    classes: tuple[str, str],
) -> Direction:
    """The difference of the class means, and what it does on held-out answers."""
    vector = oriented(found[positive].mean(0) - found[~positive].mean(0), found, positive)
    return described(vector, found, positive, test, point, classes)


def _response(
    asked: _Asked, answer: Continuation, score: Callable[[str], float] | None, held_out: bool
) -> PersonaResponse:
    value = float(score(answer["text"])) if score is not None else None
    shows = value is None or (value > 50 if asked.positive else value < 50)
    return PersonaResponse(
        positive=asked.positive,
        system=asked.system,
        question=asked.question,
        response=answer["text"],
        score=value,
        kept=bool(answer["token_ids"]) and shows,
        held_out=held_out,
    )


def _check_kept(responses: list[PersonaResponse]) -> None:
    for positive in (True, False):
        for held_out in (False, True):
            kind = [r for r in responses if (r["positive"], r["held_out"]) == (positive, held_out)]
            if not any(r["kept"] for r in kind):
                raise ValueError(
                    f"None of {len(kind)} {'positive' if positive else 'negative'} answers to half of the questions "
                    f"was kept; the first is {kind[0]['response']!r}. Expected one at least. Use clearer system "
                    "messages, more questions, or another score."
                )
