"""Steering: add a direction to the residual stream while the model runs, or take it away, and see what changes.

Sources: Turner et al., "Steering Language Models With Activation Engineering" (2023), https://arxiv.org/abs/2308.10248;
Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2023), https://arxiv.org/abs/2312.06681; Arditi
et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024), https://arxiv.org/abs/2406.11717.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._generation import continue_tokens
from techniques._hooks import Change, HookPoint, check_sites, edit, record
from techniques._model import UnsupportedModelError, logits_at
from techniques._results import Header, header, number
from techniques._stats import mean_interval
from techniques._tokens import chat_ids, check_context, encode, log_probs, pad, single_token_id
from techniques.directions import Direction, unit_vector
from techniques.extract import points_of

MAX_TOKENS = 8192  # of a batch, padding included
Positions = Literal["all", "prompt", "last", "response"]
POSITIONS = ("all", "prompt", "last", "response")
Units = Literal["difference", "resid_norm", "absolute"]
UNITS = ("difference", "resid_norm", "absolute")


class SteeredPrompt(TypedDict):
    """One prompt, continued with and without steering.

    Attributes:
        prompt: The prompt.
        clean: What the model wrote by itself.
        steered: What it wrote when it was steered.
        changed: Whether the two differ.
        kl_to_clean: KL(clean || steered) of the first token's distribution, in nats.
    """

    prompt: str
    clean: str
    steered: str
    changed: bool
    kl_to_clean: float | None


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


class SweepRow(TypedDict):
    """One vector at one strength, over all prompts.

    Attributes:
        layer: Where the vector was added.
        coefficient: Its strength, in the sweep's units.
        kind: "direction"; "random", a random vector of the same norm; or "shuffled", the direction's own entries in
            random order.
        draw: Which random vector, from 0; 0 for the direction itself.
        metric: Mean over prompts.
        metric_low: Lower end of its 95 % interval, prompts resampled.
        metric_high: Upper end.
        kl_to_clean: Mean KL(clean || steered) of the next token's distribution, in nats.
        n_changed: Prompts whose greedy continuation differs from the clean one; None if none was written.
        perplexity: Of the steered continuations, by the model without steering; None if none was written.
        clean_perplexity: Of the clean continuations; None if none was written.
    """

    layer: int
    coefficient: float
    kind: Literal["direction", "random", "shuffled"]
    draw: int
    metric: float | None
    metric_low: float | None
    metric_high: float | None
    kl_to_clean: float | None
    n_changed: int | None
    perplexity: float | None


class SteeringSweep(Header):
    """Result of `steering_sweep`.

    Attributes:
        site: Where in a block.
        positive_class: What positive coefficients steer towards.
        units: What a coefficient of 1 means.
        positions: The tokens that the vectors were added to.
        metric: What the metric is, in words.
        targets: The tokens that it asks for.
        against: The tokens that it compares them with.
        clean_metric: Its mean without steering.
        clean_perplexity: Perplexity of the clean continuations, by the model itself; None if none was written.
        rows: By layer, then kind, draw and coefficient.
    """

    site: str
    positive_class: str
    units: Units
    positions: Positions
    metric: str
    targets: list[str]
    against: list[str]
    clean_metric: float | None
    clean_perplexity: float | None
    rows: list[SweepRow]


class AblatedPrompt(TypedDict):
    """One prompt, continued with and without the direction.

    Attributes:
        prompt: The prompt.
        clean: What the model wrote by itself.
        ablated: What it wrote without the direction.
        changed: Whether the two differ.
        kl_to_clean: KL(clean || ablated) of the first token's distribution, in nats.
    """

    prompt: str
    clean: str
    ablated: str
    changed: bool
    kl_to_clean: float | None


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


class _Push:
    """Adds a vector at some tokens of a generation, whose passes bring first the prompts and then a token each."""

    def __init__(self, vector: Float[Tensor, " d"], positions: Positions, prompt_length: int) -> None:
        self.vector, self.positions, self.prompt_length = vector, positions, prompt_length
        self.seen = 0

    def __call__(self, value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        width = value.shape[1]
        # Without a cache, every pass brings the whole sequence again.
        start = 0 if width >= self.seen else self.seen
        self.seen = start + width
        columns = torch.arange(start, start + width, device=value.device)
        return value + _where(columns, self.prompt_length, self.positions)[:, None] * self.vector.to(value)


def _where(columns: Int[Tensor, " pos"], prompt_length: int, positions: Positions) -> Bool[Tensor, " pos"]:
    if positions == "prompt":
        return columns < prompt_length
    if positions == "last":
        return columns == prompt_length - 1
    return columns >= (prompt_length - 1 if positions == "response" else 0)


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
        direction: What `concept_direction` or `vector_direction` returned, or a row of `persona_vector`.
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

    Misleads: A strong vector breaks any text; a change by itself shows nothing. `steering_sweep` compares it with
    random vectors of the same norm.

    Cost: Two generations and two forwards; about 0.5 s for 10 prompts and 20 tokens on the demo model.

    Example:
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = (
        ...     [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
        ...     for kind in ("expert", "novice")
        ... )
        >>> found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        >>> neutral = [corpus.persona_prompt(None, question) for question in corpus.QUESTIONS[8:]]
        >>> steer_generate(model, tokenizer, neutral, found, 2.0, max_new_tokens=10)["rows"]
    """
    texts, ids = _encoded(tokenizer, prompts, chat, system)
    if coefficient == 0:
        raise ValueError("coefficient is 0, which adds nothing; expected a positive or a negative number.")
    check_sites(model)
    point = _point(model, direction, layer)
    vector = _vector(model, direction, units) * _finite(coefficient)
    _check_positions(positions)
    check_context(model, ids, max_new_tokens)
    clean_next = _next_logits(model, ids)
    steered_next = _next_logits(model, ids, point, vector.expand(len(ids), -1), positions)
    if torch.equal(clean_next, steered_next):
        raise RuntimeError(
            f"A vector of norm {float(vector.norm()):.3g} at {point} changed no logit; expected a change. It is lost in "
            f"the rounding of {model.dtype}, or nothing reads it. Raise the coefficient or choose another layer."
        )
    kl = _kl(log_probs(clean_next), log_probs(steered_next))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    clean = continue_tokens(model, tokenizer, ids, **options)
    with edit(model, {point: _Push(vector, positions, _longest(ids))}):
        steered = continue_tokens(model, tokenizer, ids, **options)
    rows = [
        SteeredPrompt(
            prompt=text,
            clean=before["text"],
            steered=after["text"],
            changed=before["token_ids"] != after["token_ids"],
            kl_to_clean=number(moved),
        )
        for text, before, after, moved in zip(texts, clean, steered, kl, strict=True)
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
    coefficients: Sequence[float],
    targets: Sequence[str],
    against: Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
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

    Misleads: The direction should do more than the controls at the same KL, not just more than nothing. Where KL is
    large or the perplexity high, the model is broken rather than steered. Strengths and layers that were picked from
    this table need other prompts for a test.

    Cost: 1 forward for each prompt, layer, coefficient and vector (1 + n_draws per control), and as many generations if
    max_new_tokens is above 0; about 2 s for 16 prompts, 2 layers and 7 coefficients on the demo model.

    Example:
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = (
        ...     [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
        ...     for kind in ("expert", "novice")
        ... )
        >>> found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        >>> neutral = [corpus.persona_prompt(None, question) for question in corpus.QUESTIONS[8:]]
        >>> sweep = steering_sweep(model, tokenizer, neutral, found, [-2, 0, 2], [" Therefore"], [" So"])
        >>> [row["metric"] for row in sweep["rows"] if row["kind"] == "direction"]
    """
    check_sites(model)
    _check_positions(positions)
    used = _used(directions, layers)
    if not coefficients or n_draws < 1 or max_new_tokens < 0 or not set(controls) <= {"random", "shuffled"}:
        raise ValueError(
            f"coefficients is {list(coefficients)}, n_draws {n_draws}, max_new_tokens {max_new_tokens} and controls "
            f'{list(controls)}; expected at least one coefficient, 1, 0, and "random" or "shuffled".'
        )
    asked, compared = _answer_ids(tokenizer, targets, against)
    ids = encode(tokenizer, prompts)
    check_context(model, ids, max_new_tokens)
    measure = _Measure(model, tokenizer, ids, asked, compared, positions, max_new_tokens, seed)
    rows: list[SweepRow] = []
    for direction, layer in used:
        point = _point(model, direction, layer)
        vectors = _with_controls(_vector(model, direction, units), controls, n_draws, seed + point.layer)
        rows += measure.rows(point, vectors, [_finite(c) for c in coefficients])
    clean = number(measure.clean_metric.mean())
    return SteeringSweep(
        **header(model, "steering_sweep", n=len(ids), seed=seed),
        site=used[0][0]["site"],
        positive_class=used[0][0]["positive_class"],
        units=units,
        positions=positions,
        metric="log p(targets) / p(against), nats" if against else "log p(targets), nats",
        targets=list(targets),
        against=list(against),
        clean_metric=clean,
        clean_perplexity=measure.perplexity(measure.clean_texts) if measure.clean_texts else None,
        rows=rows,
    )


class _Measure:
    """What a sweep compares every variant with: the prompts' next token and continuation without steering."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[list[int]],
        targets: list[int],
        against: list[int],
        positions: Positions,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.ids, self.seed = model, tokenizer, ids, seed
        self.targets, self.against, self.positions, self.max_new_tokens = targets, against, positions, max_new_tokens
        self.clean = log_probs(_next_logits(model, ids))
        self.clean_metric = self.metric(self.clean)
        self.clean_texts = self.continued(None, None) if max_new_tokens else []

    def metric(self, logprobs: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        """ln p(targets), minus ln p(against) where there are any."""
        asked = logprobs[:, self.targets].logsumexp(-1)
        return asked - logprobs[:, self.against].logsumexp(-1) if self.against else asked

    def rows(self, point: HookPoint, vectors: list[_Named], coefficients: list[float]) -> list[SweepRow]:
        """Every vector at every strength, at one point."""
        variants = [(vector, coefficient) for vector in vectors for coefficient in coefficients]
        added = torch.stack([vector.values * coefficient for vector, coefficient in variants])
        n = len(self.ids)

        def run(which: list[int]) -> list[tuple[float, float]]:
            prompts = [i % n for i in which]
            steered = _next_logits(
                self.model, [self.ids[i] for i in prompts], point, added[[i // n for i in which]], self.positions
            )
            logprobs = log_probs(steered)
            kl = _kl(self.clean[prompts], logprobs)
            return list(zip(self.metric(logprobs).tolist(), kl.tolist(), strict=True))

        found = in_batches([len(ids) for _ in variants for ids in self.ids], MAX_TOKENS, run)
        metric, kl = torch.tensor(found, dtype=torch.float64).view(len(variants), n, 2).unbind(-1)
        if any(coefficients) and not bool((kl > 0).any()):
            raise RuntimeError(
                f"No vector at {point} changed a next token's probability at any strength; expected a change. Raise "
                "the coefficients or choose another layer."
            )
        mean, low, high = mean_interval(metric.T, self.seed)
        return [
            SweepRow(
                layer=point.layer,
                coefficient=coefficient,
                kind=vector.kind,
                draw=vector.draw,
                metric=number(mean[i]),
                metric_low=number(low[i]),
                metric_high=number(high[i]),
                kl_to_clean=number(kl[i].mean()),
                **self.texts(point, added[i]),
            )
            for i, (vector, coefficient) in enumerate(variants)
        ]

    def texts(self, point: HookPoint, vector: Float[Tensor, " d"]) -> _Written:
        """How many greedy continuations the vector changes, and their perplexity."""
        if not self.max_new_tokens:
            return _Written(n_changed=None, perplexity=None)
        steered = self.continued(point, vector)
        changed = sum(a != b for a, b in zip(steered, self.clean_texts, strict=True))
        return _Written(n_changed=changed, perplexity=self.perplexity(steered))

    def continued(self, point: HookPoint | None, vector: Float[Tensor, " d"] | None) -> list[list[int]]:
        """Greedy continuations of all prompts."""
        push = {} if point is None or vector is None else {point: _Push(vector, self.positions, _longest(self.ids))}
        with edit(self.model, push):
            found = continue_tokens(
                self.model, self.tokenizer, self.ids, max_new_tokens=self.max_new_tokens, temperature=0.0, seed=0
            )
        return [row["token_ids"] for row in found]

    def perplexity(self, continuations: list[list[int]]) -> float | None:
        """Of the tokens that follow the prompts, by the model without steering; None where there is no token."""
        whole = [[*ids, *new] for ids, new in zip(self.ids, continuations, strict=True)]
        points = [
            (i, at, whole[i][at + 1]) for i, ids in enumerate(self.ids) for at in range(len(ids) - 1, len(whole[i]) - 1)
        ]

        def run(which: list[int]) -> list[list[float]]:
            here = [(which.index(i), at, token) for i, at, token in points if i in which]
            batch = pad([whole[i] for i in which], "right", 0, self.model.device)
            rows, columns, tokens = torch.tensor(here, dtype=torch.long).view(-1, 3).unbind(1)
            logprobs = log_probs(logits_at(self.model, batch, rows, columns))
            chosen = logprobs.gather(-1, tokens[:, None].to(logprobs.device))[:, 0].tolist()
            return [
                [value for value, row in zip(chosen, rows.tolist(), strict=True) if row == j] for j in range(len(which))
            ]

        with torch.inference_mode():
            values = [value for row in in_batches([len(ids) for ids in whole], MAX_TOKENS, run) for value in row]
        return number(torch.tensor(values).double().mean().neg().exp()) if values else None


class _Written(TypedDict):
    n_changed: int | None
    perplexity: float | None


class _Named(NamedTuple):
    """A vector of a sweep."""

    kind: Literal["direction", "random", "shuffled"]
    draw: int
    values: Float[Tensor, " d"]


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

    Misleads: No change does not show that the concept is unused: it may lie along other directions too. Projecting out
    any direction with a large mean changes the model, whatever it stands for.

    Cost: Two generations and four forwards; about 0.5 s for 10 prompts and 20 tokens on the demo model.

    Example:
        >>> from interp_kernel.demo_model import corpus
        >>> experts, novices = (
        ...     [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:8]]
        ...     for kind in ("expert", "novice")
        ... )
        >>> found = concept_direction(model, tokenizer, experts, novices, layer=2, classes=("expert", "novice"))
        >>> ablate_direction(model, tokenizer, experts[:2], found, max_new_tokens=10)["rows"]
    """
    texts, ids = _encoded(tokenizer, prompts, chat, system)
    decoder = check_sites(model)
    check_context(model, ids, max_new_tokens)
    if not direction["site"].startswith("resid") and direction["site"] not in ("attn_out", "mlp_out"):
        raise ValueError(
            f"The direction belongs to {direction['site']}; expected one of the residual stream, such as resid_post."
        )
    vector = unit_vector(direction, decoder.d_model)
    writes = [HookPoint("resid_pre", 0)]
    writes += [HookPoint(site, layer) for layer in range(decoder.n_layers) for site in ("attn_out", "mlp_out")]
    edits = dict.fromkeys(writes, _without(vector))
    clean_next, clean_cosine = _next_and_cosine(model, ids, vector, {})
    ablated_next, cosine = _next_and_cosine(model, ids, vector, edits)
    if not cosine <= max(1e-4, 8 * torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"The residual stream of {type(model).__name__} still has a cosine of up to {cosine:.3g} with the "
            "direction; expected none. Something else than its embeddings, attention and MLPs writes to it."
        )
    kl = _kl(log_probs(clean_next), log_probs(ablated_next))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    clean = continue_tokens(model, tokenizer, ids, **options)
    with edit(model, edits):
        ablated = continue_tokens(model, tokenizer, ids, **options)
    rows = [
        AblatedPrompt(
            prompt=text,
            clean=before["text"],
            ablated=after["text"],
            changed=before["token_ids"] != after["token_ids"],
            kl_to_clean=number(moved),
        )
        for text, before, after, moved in zip(texts, clean, ablated, kl, strict=True)
    ]
    return AblatedDirection(
        **header(model, "ablate_direction", n=len(texts), seed=seed),
        positive_class=direction["positive_class"],
        clean_cosine=number(clean_cosine) or 0.0,
        ablated_cosine=number(cosine) or 0.0,
        rows=rows,
        n_changed=sum(row["changed"] for row in rows),
    )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str], chat: bool, system: str | None
) -> tuple[list[str], list[list[int]]]:
    if system is not None and not chat:
        raise ValueError("A system message was given for plain text; it needs the chat template. Pass chat=True.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return texts, [chat_ids(tokenizer, text, system) for text in texts] if chat and texts else encode(tokenizer, texts)


def _longest(ids: list[list[int]]) -> int:
    return max(len(row) for row in ids)


def _without(vector: Float[Tensor, " d"]) -> Change:
    def project_out(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        unit = vector.to(value.device)
        return (value.float() - (value.float() @ unit)[..., None] * unit).to(value.dtype)

    return project_out


@torch.inference_mode()
def _next_and_cosine(
    model: PreTrainedModel, ids: list[list[int]], vector: Float[Tensor, " d"], edits: Mapping[HookPoint, Change]
) -> tuple[Float[Tensor, "n d_vocab"], float]:
    """Next-token logits under edits, and the largest |cosine| of the residual stream after any block."""
    batch = pad(ids, "right", 0, model.device)
    real = batch.attention_mask.bool()
    last = torch.tensor([len(row) - 1 for row in ids])

    def keep(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, ""]:
        cosine = torch.nn.functional.cosine_similarity(value.float(), vector.to(value.device), dim=-1)
        return cosine[real.to(value.device)].abs().max()

    points = points_of(model, "resid_post", "all")
    with edit(model, edits), record(model, points, keep) as seen:
        logits = logits_at(model, batch, torch.arange(len(ids)), last)
    return logits, max(float(value) for value in seen.values())


@torch.inference_mode()
def _next_logits(
    model: PreTrainedModel,
    ids: list[list[int]],
    point: HookPoint | None = None,
    vectors: Float[Tensor, "n d"] | None = None,
    positions: Positions = "all",
) -> Float[Tensor, "n d_vocab"]:
    """Next-token logits of each prompt, with its vector added at a point."""

    def run(which: list[int]) -> list[Tensor]:
        lengths = torch.tensor([len(ids[i]) for i in which])
        batch = pad([ids[i] for i in which], "right", 0, model.device)
        columns = torch.arange(batch.input_ids.shape[1])
        edits: dict[HookPoint, Change] = {}
        if point is not None and vectors is not None:
            mask = torch.stack([_where(columns, int(length), positions) for length in lengths])
            added = mask[..., None] * vectors[which][:, None]
            edits = {point: lambda value: value + added.to(value)}
        with edit(model, edits):
            return list(logits_at(model, batch, torch.arange(len(which)), lengths - 1))

    return torch.stack(in_batches([len(row) for row in ids], MAX_TOKENS, run))


def _kl(clean: Float[Tensor, "n d_vocab"], other: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """KL(clean || other) of log-probabilities, in nats."""
    return (clean.exp() * (clean - other)).sum(-1).clamp(min=0)


def _point(model: PreTrainedModel, direction: Direction, layer: int | None) -> HookPoint:
    return points_of(model, direction["site"], [direction["layer"] if layer is None else layer])[0]


def _vector(model: PreTrainedModel, direction: Direction, units: Units) -> Float[Tensor, " d"]:
    """What a coefficient of 1 adds."""
    if units not in UNITS:
        raise ValueError(f"units is {units!r}; expected one of {', '.join(UNITS)}.")
    size = {"difference": direction["separation"], "resid_norm": direction["norm"], "absolute": 1.0}[units]
    if size is None:
        raise ValueError(
            f'units is {units!r}, but the direction does not say how long activations are; expected "difference" or '
            '"absolute" for a vector of your own.'
        )
    return unit_vector(direction, check_sites(model).d_model) * size


def _finite(coefficient: float) -> float:
    if not math.isfinite(coefficient):
        raise ValueError(f"The coefficient is {coefficient}; expected a finite number.")
    return float(coefficient)


def _check_positions(positions: str) -> None:
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}.")


def _used(
    directions: Direction | Sequence[Direction], layers: Sequence[int] | None
) -> list[tuple[Direction, int | None]]:
    """Each direction with the layer to add it at; None for its own."""
    several = (
        [cast(Direction, directions)] if isinstance(directions, dict) else list(cast(Sequence[Direction], directions))
    )
    if not several or (layers is not None and (len(several) > 1 or not layers)):
        raise ValueError(
            f"There are {len(several)} directions and layers is {layers}; expected at least one direction, and layers "
            "for a single one only."
        )
    return [(several[0], layer) for layer in layers] if layers is not None else [(one, None) for one in several]


def _answer_ids(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], against: Sequence[str]
) -> tuple[list[int], list[int]]:
    if isinstance(targets, str) or isinstance(against, str) or not targets:
        raise ValueError(f"targets is {targets!r} and against {against!r}; expected lists of texts of one token each.")
    asked, compared = ([single_token_id(tokenizer, text) for text in part] for part in (targets, against))
    if set(asked) & set(compared):
        raise ValueError(f"targets {list(targets)} and against {list(against)} share a token; expected different ones.")
    return asked, compared


def _with_controls(
    vector: Float[Tensor, " d"], controls: Sequence[Literal["random", "shuffled"]], n_draws: int, seed: int
) -> list[_Named]:
    """The direction's vector, then vectors of its norm that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    named = [_Named("direction", 0, vector)]
    for kind in dict.fromkeys(controls):
        for draw in range(n_draws):
            noise = torch.randn(len(vector), generator=generator)
            mixed = vector[torch.randperm(len(vector), generator=generator)]
            named.append(_Named(kind, draw, noise / noise.norm() * vector.norm() if kind == "random" else mixed))
    return named
