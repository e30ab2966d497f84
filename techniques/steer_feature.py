"""Steer a model by one feature of a sparse autoencoder.

Source: Templeton et al., "Scaling Monosemanticity" (2024), https://transformer-circuits.pub/2024/scaling-monosemanticity
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._generation import continue_tokens
from techniques._hooks import HookPoint, edit
from techniques._results import Header, header, number
from techniques._sae import SAE
from techniques._sae_data import activations, locate, read_corpus
from techniques._steering import next_logits
from techniques._tokens import check_lists, encode, log_probs, texts_of


class SteerRow(TypedDict):
    """One continuation.

    Attributes:
        prompt: Index of the prompt.
        coefficient: In units of the feature's largest activation on the reference texts.
        control: Whether a random direction of the same length was written in the feature's place.
        text: The continuation.
        changed: Whether it differs from the unsteered one.
        kl_to_clean: KL(unsteered || steered) of the first new token, in nats.
    """

    prompt: int
    coefficient: float
    control: bool
    text: str
    changed: bool
    kl_to_clean: float | None


class FeatureSteering(Header):
    """Result of `steer_feature`; n is the number of prompts.

    Attributes:
        hook_name: Where the feature is written.
        feature: Its index.
        mode: "add" or "clamp".
        max_activation: Its largest activation on the reference texts: the unit of the coefficients.
        norm_ratio: Length of what coefficient 1 adds over the mean norm of the activations there.
        prompts: The prompts.
        clean: The unsteered continuations.
        rows: By coefficient, then the feature before its control, then prompt.
    """

    hook_name: str
    feature: int
    mode: str
    max_activation: float | None
    norm_ratio: float | None
    prompts: list[str]
    clean: list[str]
    rows: list[SteerRow]


@torch.no_grad()
def steer_feature(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE | str | Path,
    feature: int,
    prompts: str | Sequence[str],
    reference_texts: Sequence[str],
    *,
    coefficients: Sequence[float] = (0.5, 1.0, 2.0),
    mode: Literal["add", "clamp"] = "add",
    max_new_tokens: int = 20,
    seed: int = 0,
) -> FeatureSteering:
    """Continue prompts with a feature turned up or down, beside the plain continuation and a random direction.

    Args:
        model: The model whose activations the SAE was trained on, in eval mode.
        tokenizer: Its tokenizer.
        sae: The SAE, or its folder; it says itself where in the model it belongs.
        feature: Index of the feature.
        prompts: One prompt or several, of any lengths.
        reference_texts: Texts on which the feature is active; its largest activation there is the unit.
        coefficients: How much of the unit. Positive ones turn the feature up, negative ones down.
        mode: "add" adds coefficient times unit times the feature's decoder row to every token's activation; "clamp"
            adds what sets the feature to coefficient times unit, so that a coefficient of 0 ablates it.
        max_new_tokens: Longest continuation; greedy decoding.
        seed: Of the random direction.

    Returns:
        For each coefficient and prompt the continuation and the divergence of its first token; then the same with a
        random direction as long as the decoder row in its place.

    Raises:
        ValueError: The feature does not exist or is never active on the reference texts, no coefficient or an infinite
            one is given, the mode is not known, or what `evaluate_sae` raises about texts, model and SAE.

    Misleads: Far beyond 1 any direction breaks the model; an effect that the random direction has as well is none of
    the feature's. The direction also acts where the feature would never be active.

    Cost: 2 x coefficients + 1 generations, and 1 forward per reference text; about 0.5 s for a prompt on the demo
    model.

    Example:
        ```python
        from itertools import islice
        from tempfile import mkdtemp

        from interp_kernel.demo_model import corpus
        from techniques.sae import train_sae
        from techniques.steer_feature import steer_feature

        texts = [text for _, text in islice(corpus.documents(seed=1), 400)]
        options = dict(layer=1, d_sae=256, k=8, steps=100, batch_size=512, learning_rate=3e-3)
        trained = train_sae(model, tokenizer, texts[:300], mkdtemp(), **options)
        steer_feature(model, tokenizer, trained["path"], 7, ["The river is", "The cat"], texts[300:], max_new_tokens=8)
        ```
    """
    check_lists(reference_texts=reference_texts)
    sae, point = locate(model, sae)
    _check_steering(feature, sae.d_sae, coefficients, mode)
    asked = texts_of(prompts)
    ids = encode(tokenizer, asked)
    unit, norm = _unit(model, tokenizer, sae, point, feature, reference_texts)
    row = sae.w_dec[feature]
    random = torch.randn(len(row), generator=torch.Generator().manual_seed(seed)).to(row)
    directions = {False: row, True: random * (row.norm() / random.norm())}

    def continued() -> list[str]:
        found = continue_tokens(model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=0.0, seed=seed)
        return [continuation["text"] for continuation in found]

    clean, next_clean = continued(), _next_logprobs(model, ids)
    rows = []
    for coefficient in coefficients:
        for is_control, direction in directions.items():
            with edit(model, {point: _push(sae, feature, direction, coefficient * unit, mode)}):
                texts, next_steered = continued(), _next_logprobs(model, ids)
            kl = (next_clean.exp() * (next_clean - next_steered)).sum(-1).clamp(min=0)
            rows += _rows(coefficient, is_control, texts, clean, kl)
    return FeatureSteering(
        **header(model, "steer_feature", n=len(asked), seed=seed),
        hook_name=str(point),
        feature=feature,
        mode=mode,
        max_activation=number(unit),
        norm_ratio=number(unit * row.norm().item() / norm),
        prompts=asked,
        clean=clean,
        rows=rows,
    )


def _rows(
    coefficient: float, control: bool, texts: list[str], clean: list[str], kl: Float[Tensor, " prompts"]
) -> list[SteerRow]:
    return [
        SteerRow(
            prompt=i,
            coefficient=coefficient,
            control=control,
            text=text,
            changed=text != clean[i],
            kl_to_clean=number(kl[i]),
        )
        for i, text in enumerate(texts)
    ]


def _check_steering(feature: int, d_sae: int, coefficients: Sequence[float], mode: str) -> None:
    if not 0 <= feature < d_sae:
        raise ValueError(f"Feature {feature} does not exist; the SAE has {d_sae}. Choose from 0 to {d_sae - 1}.")
    if not coefficients or not all(math.isfinite(coefficient) for coefficient in coefficients):
        raise ValueError(f"coefficients is {list(coefficients)}; expected at least one, all of them finite numbers.")
    if mode not in ("add", "clamp"):
        raise ValueError(f"mode is {mode!r}; expected 'add' or 'clamp'.")


def _unit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    point: HookPoint,
    feature: int,
    texts: Sequence[str],
) -> tuple[float, float]:
    """The feature's largest activation on the texts, and the mean norm of the activations there."""
    corpus = read_corpus(model, tokenizer, texts)
    rows = activations(model, corpus, point, range(len(corpus.texts)))
    largest = max(sae.encode(row)[:, feature].max().item() for row in rows if len(row))
    if largest == 0:
        raise ValueError(
            f"Feature {feature} is never active on the {len(corpus.texts)} reference texts, so they give no unit; "
            "expected texts on which it is. feature_report shows some."
        )
    return largest, torch.cat(rows).float().norm(dim=1).mean().item()


def _push(
    sae: SAE, feature: int, direction: Float[Tensor, " d_in"], amount: float, mode: str
) -> Callable[[Tensor], Tensor]:
    """An edit that writes along a direction at every token."""

    def pushed(value: Tensor) -> Tensor:
        flat = value.flatten(2).to(direction.dtype)
        missing = amount - sae.encode(flat)[..., feature, None] if mode == "clamp" else amount
        return (flat + missing * direction).to(value.dtype).view_as(value)

    return pushed


def _next_logprobs(model: PreTrainedModel, ids: list[list[int]]) -> Float[Tensor, "prompts d_vocab"]:
    return log_probs(next_logits(model, ids)).cpu()
