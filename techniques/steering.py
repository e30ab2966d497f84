"""Steering: add a direction to the residual stream while the model runs, or take it away, and see what changes.

Sources: Turner et al., "Steering Language Models With Activation Engineering" (2023), https://arxiv.org/abs/2308.10248;
Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2023), https://arxiv.org/abs/2312.06681; Arditi
et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024), https://arxiv.org/abs/2406.11717.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._directions import Direction, check_direction, unit_vector
from techniques._generation import Edits, prompt_ids
from techniques._hooks import HookPoint, check_sites
from techniques._model import UnsupportedModelError
from techniques._results import Header, few, header, number
from techniques._steering import (
    AblatedPrompt,
    Positions,
    Push,
    SteeredPrompt,
    Units,
    check_positions,
    continued,
    finite,
    next_and_cosine,
    next_logits,
    point_of,
    vector_of,
    without,
)
from techniques._steering_sweep import (
    Measure,
    SteeringSweep,
    SweepRow,
    strengths_of,
    used_directions,
    with_controls,
    word_sets,
)
from techniques._tokens import check_context, check_lists, encode, texts_of, whole_numbers

__all__ = [
    "AblatedPrompt",
    "SteeredPrompt",
    "SteeringSweep",
    "SweepRow",
    "ablate_direction",
    "steer_generate",
    "steering_sweep",
]


class SteeredText(Header):
    """Result of `steer_generate`.

    Attributes:
        layer: Where the vector was added.
        site: Where in the block.
        positive_class: What a positive coefficient steers towards.
        coefficient: As given.
        units: What a coefficient of 1 means.
        added_norm: Norm of the vector that was added, in the activation's own units.
        positions: The tokens that it was added to.
        rows: By prompt.
        n_changed: Prompts whose text differs.
    """

    layer: int
    site: str
    positive_class: str
    coefficient: float
    units: Units
    added_norm: float
    positions: Positions
    rows: list[SteeredPrompt]
    n_changed: int


class AblatedDirection(Header):
    """Result of `ablate_direction`.

    Attributes:
        positive_class: What the direction points to.
        clean_cosine: Largest |cosine| of the residual stream with the direction, over layers and tokens, by itself.
        ablated_cosine: The same while the direction is taken away; 0 but for rounding.
        rows: By prompt.
        n_changed: Prompts whose text differs.
    """

    positive_class: str
    clean_cosine: float
    ablated_cosine: float
    rows: list[AblatedPrompt]
    n_changed: int


def steer_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    direction: Direction,
    coefficient: float = 1.0,
    *,
    layer: int | None = None,
    positions: Positions = "all",
    units: Units = "difference",
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
) -> SteeredText:
    """Continue prompts while a direction is added to the model's activations, beside the same without it.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it needs no pad token and is not changed.
        prompts: One prompt or a list of them.
        direction: What `concept_direction` returned, a row of `persona_vector`, or a vector of your own by
            `techniques.directions.vector_direction`.
        coefficient: How much of it is added; positive steers towards `positive_class`, negative away.
        layer: Layer to add it at; None for the direction's own.
        positions: Tokens to add it at: "all"; "prompt"; "last", of the prompt; "response", from the last token of the
            prompt on, which is where each token of the response is chosen.
        units: What a coefficient of 1 adds: "difference", the distance between the two class means along the direction;
            "resid_norm", the mean norm of the activations; "absolute", a vector of norm 1.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 for greedy continuations; above, both are sampled from the same random stream.
        seed: Seed of the sampling.
        chat: Whether each prompt is a user message, laid out by the chat template.
        system: System message before it; needs `chat=True`.

    Returns:
        For each prompt both texts, and how far the first token's distribution moved.

    Raises:
        RuntimeError: No logit changed, so the model was not steered.
        ValueError: The coefficient is 0 or not finite, the direction does not fit the model, or an option is unknown.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: A strong vector breaks any text; a change by itself shows nothing. `steering_sweep` compares it with
    random vectors of the same norm.

    Cost: Two generations and two forwards; about 0.5 s for 10 prompts and 20 tokens on the demo model.

    Example:
        from interp_kernel.demo_model import corpus
        from techniques.directions import concept_direction

        experts, novices = (
            [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
            for kind in ("expert", "novice")
        )
        found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        neutral = [corpus.persona_prompt(None, question) for question in corpus.QUESTIONS[8:]]
        steer_generate(model, tokenizer, neutral, found, 1.0, max_new_tokens=10)
    """
    texts = texts_of(prompts)
    ids = prompt_ids(tokenizer, texts, chat, system)
    if coefficient == 0:
        raise ValueError("coefficient is 0, which adds nothing; expected a positive or a negative number.")
    check_sites(model)
    point = point_of(model, direction, layer)
    vector = vector_of(model, direction, units) * finite(coefficient)
    check_positions(positions)
    check_context(model, ids, max_new_tokens)
    next_tokens = _next_tokens(model, ids, point, vector, positions)
    push: Edits = lambda longest: {point: Push(vector, positions, longest)}  # noqa: E731
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    found = continued(model, tokenizer, ids, push, next_tokens, options)
    rows = [
        SteeredPrompt(prompt=prompt, clean=clean, steered=steered, changed=changed, kl_to_clean=kl)
        for prompt, (clean, steered, changed, kl) in zip(texts, found, strict=True)
    ]
    return SteeredText(
        **header(model, "steer_generate", n=len(texts), seed=seed),
        layer=point.layer,
        site=point.site,
        positive_class=direction["positive_class"],
        coefficient=coefficient,
        units=units,
        added_norm=number(vector.norm()) or 0.0,
        positions=positions,
        rows=rows,
        n_changed=sum(row["changed"] for row in rows),
    )


def steering_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    directions: Direction | Sequence[Direction],
    coefficients: float | Sequence[float],
    targets: Sequence[str],
    against: Sequence[str] = (),
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "all",
    units: Units = "difference",
    controls: Sequence[Literal["random", "shuffled"]] = ("random", "shuffled"),
    n_draws: int = 5,
    max_new_tokens: int = 0,
    seed: int = 0,
) -> SteeringSweep:
    """Measure what a direction does to the next token at several strengths and layers, beside random vectors.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer.
        prompts: The prompts; other ones than the direction was found on.
        directions: One direction or several, each added at its own layer.
        coefficients: Strengths, in `units`; 0 is allowed.
        targets: Texts of one token each that the metric asks for.
        against: Texts of one token each that it compares them with; none for the targets' log-probability.
        layers: Layers to add a single direction at, instead of its own.
        positions: Tokens to add it at; see `steer_generate`.
        units: What a coefficient of 1 adds; see `steer_generate`.
        controls: "random" vectors and "shuffled" ones, the direction's entries in random order, both of its norm.
        n_draws: How many of each control at each layer.
        max_new_tokens: Length of the greedy continuations that n_changed and perplexity come from; 0 writes none.
        seed: Seed of controls and intervals.

    Returns:
        A row per layer, vector and coefficient. The metric is ln(p(targets) / p(against)) in nats at the prompt's last
        token: for one token each, their logit difference.

    Raises:
        RuntimeError: A vector changed no logit at any strength.
        ValueError: A target is not a single token or on both sides, a list is empty, or the direction does not fit.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: The direction should do more than the controls at the same KL, not just more than nothing. Where KL is
    large or the perplexity high, the model is broken rather than steered. Strengths and layers that were picked from
    this table need other prompts for a test.

    Cost: 1 forward for each prompt, layer, coefficient and vector (1 + n_draws per control), and as many generations if
    max_new_tokens is above 0; about 2 s for 16 prompts, 2 layers and 7 coefficients on the demo model.

    Example:
        from interp_kernel.demo_model import corpus
        from techniques.directions import concept_direction

        experts, novices = (
            [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
            for kind in ("expert", "novice")
        )
        found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        neutral = [corpus.persona_prompt(None, question) for question in corpus.QUESTIONS[8:]]
        steering_sweep(model, tokenizer, neutral, found, [-2, -1, 0, 1, 2], [" Therefore"], [" So"])
    """
    check_lists(targets=targets, against=against)
    check_sites(model)
    check_positions(positions)
    used = used_directions(directions, None if layers is None else whole_numbers("layers", layers))
    strengths = strengths_of(coefficients)
    if n_draws < 1 or max_new_tokens < 0 or not set(controls) <= {"random", "shuffled"}:
        raise ValueError(
            f"n_draws is {n_draws}, max_new_tokens {max_new_tokens} and controls {list(controls)}; expected at least "
            '1 and 0, and some of "random" and "shuffled".'
        )
    asked, compared = word_sets(tokenizer, targets, against)
    ids = encode(tokenizer, prompts)
    check_context(model, ids, max_new_tokens)
    measure = Measure(model, tokenizer, ids, asked, compared, positions, max_new_tokens, seed)
    rows: list[SweepRow] = []
    for direction, layer in used:
        point = point_of(model, direction, layer)
        vectors = with_controls(vector_of(model, direction, units), controls, n_draws, seed + point.layer)
        rows += measure.rows(point, vectors, strengths)
    return SteeringSweep(
        **header(model, "steering_sweep", n=len(ids), seed=seed, warnings=few(len(ids), "prompt")),
        site=used[0][0]["site"],
        positive_class=used[0][0]["positive_class"],
        units=units,
        positions=positions,
        metric="ln p(targets) / p(against)" if against else "ln p(targets)",
        targets=list(targets),
        against=list(against),
        clean_metric=number(measure.clean_metric.mean()),
        clean_perplexity=measure.perplexity(measure.clean_texts) if measure.clean_texts else None,
        rows=rows,
    )


def ablate_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    direction: Direction,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
) -> AblatedDirection:
    """Continue prompts while nothing in the model can write along a direction, beside the same without that.

    The direction is projected out of the embeddings and of whatever attention and MLPs add to the residual stream, at
    every layer and token, so the stream never has a component along it. This is checked.

    Args:
        model: A Hugging Face model that generates, in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer; it needs no pad token and is not changed.
        prompts: One prompt or a list of them.
        direction: A direction in the residual stream; its layer does not matter.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 for greedy continuations; above, both are sampled from the same random stream.
        seed: Seed of the sampling.
        chat: Whether each prompt is a user message, laid out by the chat template.
        system: System message before it; needs `chat=True`.

    Returns:
        For each prompt both texts, and how far the first token's distribution moved.

    Raises:
        UnsupportedModelError: The stream still has a component along the direction, or the model lacks a site.
        ValueError: The direction does not fit the model, or an option is out of range.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: No change does not show that the concept is unused: it may lie along other directions too. Projecting out
    any direction with a large mean changes the model, whatever it stands for.

    Cost: Two generations and four forwards; about 0.5 s for 10 prompts and 20 tokens on the demo model.

    Example:
        from interp_kernel.demo_model import corpus
        from techniques.directions import concept_direction

        experts, novices = (
            [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
            for kind in ("expert", "novice")
        )
        found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        ablate_direction(model, tokenizer, experts[:4], found, max_new_tokens=10)
    """
    texts = texts_of(prompts)
    ids = prompt_ids(tokenizer, texts, chat, system)
    decoder = check_sites(model)
    check_context(model, ids, max_new_tokens)
    check_direction(direction)
    if not direction["site"].startswith("resid") and direction["site"] not in ("attn_out", "mlp_out"):
        raise ValueError(
            f"The direction belongs to {direction['site']}; expected one of the residual stream, such as resid_post."
        )
    vector = unit_vector(direction, decoder.d_model)
    writes = [HookPoint("resid_pre", 0)]
    writes += [HookPoint(site, layer) for layer in range(decoder.n_layers) for site in ("attn_out", "mlp_out")]
    edits = dict.fromkeys(writes, without(vector))
    clean_next, clean_cosine = next_and_cosine(model, ids, vector, {})
    ablated_next, cosine = next_and_cosine(model, ids, vector, edits)
    if not cosine <= max(1e-4, 8 * torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"The residual stream of {type(model).__name__} still has a cosine of up to {cosine:.3g} with the "
            "direction; expected none. Something else than its embeddings, attention and MLPs writes to it."
        )
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    found = continued(model, tokenizer, ids, lambda _: edits, (clean_next, ablated_next), options)
    rows = [
        AblatedPrompt(prompt=prompt, clean=clean, ablated=ablated, changed=changed, kl_to_clean=kl)
        for prompt, (clean, ablated, changed, kl) in zip(texts, found, strict=True)
    ]
    return AblatedDirection(
        **header(model, "ablate_direction", n=len(texts), seed=seed),
        positive_class=direction["positive_class"],
        clean_cosine=number(clean_cosine) or 0.0,
        ablated_cosine=number(cosine) or 0.0,
        rows=rows,
        n_changed=sum(row["changed"] for row in rows),
    )


def _next_tokens(
    model: PreTrainedModel, ids: list[list[int]], point: HookPoint, vector: Float[Tensor, " d"], positions: Positions
) -> tuple[Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]:
    """Next-token logits without and with a vector, which has to make a difference."""
    clean = next_logits(model, ids)
    steered = next_logits(model, ids, point, vector.expand(len(ids), -1), positions)
    if torch.equal(clean, steered):
        raise RuntimeError(
            f"A vector of norm {float(vector.norm()):.3g} at {point} changed no logit; expected a change. It is lost "
            f"in the rounding of {model.dtype}, or nothing reads it. Raise the coefficient or choose another layer."
        )
    return clean, steered
