"""Causal tracing: blur the subject with noise, restore one activation, and see where the fact comes back.

Source: Meng, Bau, Andonian, Belinkov, "Locating and editing factual associations in GPT" (2022),
https://arxiv.org/abs/2202.05262.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import prompt_values
from techniques._hooks import HookPoint, check_sites
from techniques._model import Decoder
from techniques._noise import blurred_streams
from techniques._results import Header, few, header, number
from techniques._stats import N_BOOT, mean_interval
from techniques._sweep import Patch, Variant
from techniques._tokens import (
    Batch,
    check_context,
    check_lists,
    encode,
    pad,
    single_token_id,
    span_positions,
    token_text,
)
from techniques._variants import variant_metrics

SITES = ("resid_post", "attn_out", "mlp_out")
WINDOW = 0.2  # of the layers: Meng et al. restore 10 of GPT-2 XL's 48 at once


class TracedPrompt(TypedDict):
    """A prompt with the answer's probability, 0 to 1.

    Attributes:
        prompt: Its text.
        tokens: Its tokens.
        subject: Positions of the subject's tokens.
        answer: The right answer.
        clean: Probability of the answer without noise.
        corrupted: Mean probability over the draws of noise on the subject.
        reason: Why the prompt was left out; None if it was used.
    """

    prompt: str
    tokens: list[str]
    subject: list[int]
    answer: str
    clean: float | None
    corrupted: float | None
    reason: str | None


class TraceRow(TypedDict):
    """What restoring one place brings back.

    Attributes:
        site: resid_post, attn_out or mlp_out.
        layer: The layer restored, or the middle of the window of layers.
        column: Index in `columns`.
        n: How many prompts have such a position.
        prob: Mean probability of the answer with the activation restored, 0 to 1.
        effect: `prob` minus the corrupted probability: the indirect effect.
        low: Lower end of the 95 % bootstrap interval of `effect`.
        high: Its upper end.
    """

    site: str
    layer: int
    column: int
    n: int
    prob: float | None
    effect: float | None
    low: float | None
    high: float | None


class CausalTracing(Header):
    """Result of `causal_tracing`; `n` is the number of prompts that were used.

    Attributes:
        noise_std: Standard deviation of the noise, in the units of the token embedding.
        n_draws: Draws of noise for each prompt.
        window: Layers restored together for attn_out and mlp_out; resid_post is restored at one layer.
        interval_over: What the bootstrap draws from: "prompts", or "draws" where there is one prompt.
        n_layers: Blocks of the model.
        clean: Mean probability of the answer without noise.
        corrupted: With noise and nothing restored.
        columns: Positions by their token, or by their index where prompts have different tokens; parts of the prompts
            ("last subject token", ...) where the subject does not lie at the same positions in all of them.
        prompts: The prompts, those left out as well.
        rows: By site, layer, column.
    """

    noise_std: float | None
    n_draws: int
    window: int
    interval_over: str
    n_layers: int
    clean: float | None
    corrupted: float | None
    columns: list[str]
    prompts: list[TracedPrompt]
    rows: list[TraceRow]


@torch.inference_mode()
def causal_tracing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    subjects: Sequence[str],
    answers: Sequence[str],
    sites: Sequence[str] = SITES,
    noise: float = 3.0,
    n_draws: int = 10,
    window: int | None = None,
    min_drop: float = 0.1,
    seed: int = 0,
    n_boot: int = N_BOOT,
) -> CausalTracing:
    """Blur the subject's embeddings with noise, restore single activations, and see where the fact comes back.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype.
        tokenizer: Its fast tokenizer; special tokens are added as it does by default.
        prompts: Prompts that end where the answer should follow.
        subjects: A piece of each prompt that occurs once in it: what the noise falls on.
        answers: The right answer to each prompt, one token with its leading space.
        sites: Some of resid_post, attn_out, mlp_out.
        noise: Standard deviation of the noise, in standard deviations of the subjects' token embeddings.
        n_draws: Draws of noise for each prompt.
        window: Layers that are restored together for attn_out and mlp_out; default a fifth of the layers.
        min_drop: A prompt counts only if the noise lowers the answer's probability by at least this.
        seed: Of the noise and the bootstrap.
        n_boot: Bootstrap resamples.

    Returns:
        One row per site, layer and column of positions, with a 95 % interval over prompts, or over draws of noise where
        there is one prompt.

    Raises:
        ValueError: An unknown site; prompts, subjects or answers that do not fit (see the message); noise that lowers
            no answer's probability by `min_drop`; logits that are not finite; a model in train mode.
        UnsupportedModelError: The model is built in a way that is not understood.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads:
        Noise is far from anything the model was trained on and can break more than the fact; exchanging the subject
        for another one (`activation_patching`) is the safer corruption. A window of layers shows more than the sum of
        its layers. Where a fact can be restored need not be where it is stored.

    Cost:
        Prompts x draws x sites x layers x positions forwards, batched; 0.4 s for a prompt of the demo model.

    Example:
        ```python
        from techniques.causal_tracing import causal_tracing

        prompt = "The Eiffel Tower is located in the city of"
        result = causal_tracing(model, tokenizer, [prompt], ["Eiffel Tower"], [" Paris"])
        max(result["rows"], key=lambda row: row["effect"])
        ```
    """
    check_lists(prompts=prompts, subjects=subjects, answers=answers, sites=sites)
    decoder = check_sites(model)
    width = _check_options(decoder, sites, noise, n_draws, window)
    every = _encode(model, tokenizer, prompts, subjects, answers)
    std = noise * _embedding_std(decoder, every).item()
    blurred = blurred_streams(model, decoder, every.ids, every.subjects, std, n_draws, seed)
    clean = _probs(model, every, [Variant(i, []) for i in range(len(every.ids))])
    noised = [Variant(i, [_noise(every, blurred, i, draw)]) for i in range(len(every.ids)) for draw in range(n_draws)]
    corrupted = _probs(model, every, noised).reshape(len(every.ids), n_draws)
    kept = clean - corrupted.mean(1) >= min_drop
    if not bool(kept.any()):
        raise ValueError(
            f"The noise lowers the probability of {every.answers[0]!r} after {every.texts[0]!r} from {clean[0]:.3g} to "
            f"{corrupted[0].mean():.3g}, and that of no answer by {min_drop:g}; expected noise that hides the subject. "
            "Choose prompts that the model answers, raise noise, or lower min_drop."
        )
    which = kept.nonzero()[:, 0].tolist()
    columns = _columns(every, which)
    cells = [(site, layer) for site in sites for layer in range(decoder.n_layers)]
    restored = _restore(model, decoder, every, blurred, which, cells, width)
    return CausalTracing(
        **header(model, "causal_tracing", n=len(which), seed=seed, warnings=_warnings(kept, n_draws)),
        noise_std=number(std),
        n_draws=n_draws,
        window=width,
        interval_over="prompts" if len(which) > 1 else "draws",
        n_layers=decoder.n_layers,
        clean=number(clean[kept].mean()),
        corrupted=number(corrupted[kept].mean()),
        columns=[column.label for column in columns],
        prompts=_prompt_infos(every, clean, corrupted.mean(1), min_drop),
        rows=_rows(cells, columns, restored, corrupted[which], seed, n_boot),
    )


@dataclass(frozen=True)
class _Prompts:
    """The prompts as tokens, with the subject's positions."""

    texts: list[str]
    answers: list[str]
    ids: list[list[int]]
    tokens: list[list[str]]
    subjects: list[list[int]]
    answer_ids: Int[Tensor, " n"]
    batch: Batch


class _Column(NamedTuple):
    """Positions that are averaged: for each prompt that was used, which of its positions."""

    label: str
    positions: list[list[int]]


def _check_options(decoder: Decoder, sites: Sequence[str], noise: float, n_draws: int, window: int | None) -> int:
    if isinstance(sites, str) or not sites or not set(sites) <= set(SITES):
        raise ValueError(f"sites is {sites!r}; expected a list of some of {', '.join(SITES)}.")
    if not noise > 0 or n_draws < 1:
        raise ValueError(f"noise is {noise} and n_draws is {n_draws}; expected a positive number and at least 1 draw.")
    width = max(1, round(WINDOW * decoder.n_layers)) if window is None else window
    if not 1 <= width <= decoder.n_layers:
        raise ValueError(f"window is {width}; expected 1 to {decoder.n_layers}, the number of layers.")
    return width


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    subjects: Sequence[str],
    answers: Sequence[str],
) -> _Prompts:
    if any(isinstance(texts, str) for texts in (prompts, subjects, answers)) or not (
        len(prompts) == len(subjects) == len(answers)
    ):
        raise ValueError(
            f"There are {len(prompts)} prompts, {len(subjects)} subjects and {len(answers)} answers; expected three "
            "lists of one length."
        )
    ids = encode(tokenizer, prompts)
    check_context(model, ids)
    return _Prompts(
        texts=list(prompts),
        answers=list(answers),
        ids=ids,
        tokens=[[token_text(tokenizer, i) for i in row] for row in ids],
        subjects=[span_positions(tokenizer, text, part) for text, part in zip(prompts, subjects, strict=True)],
        answer_ids=torch.tensor([single_token_id(tokenizer, answer) for answer in answers]),
        batch=pad(ids, "right", 0, model.device),
    )


# ---------------------------------------------------------------------------------------------- runs


def _embedding_std(decoder: Decoder, prompts: _Prompts) -> Float[Tensor, ""]:
    ids = [row[i] for row, subject in zip(prompts.ids, prompts.subjects, strict=True) for i in subject]
    embedded: Tensor = decoder.embed(torch.tensor(ids, device=prompts.batch.input_ids.device))
    return embedded.double().std()


def _noise(prompts: _Prompts, blurred: list[Tensor], prompt: int, draw: int) -> Patch:
    return Patch(HookPoint("resid_pre", 0), blurred[prompt][draw], prompts.subjects[prompt])


def _probs(model: PreTrainedModel, prompts: _Prompts, variants: list[Variant]) -> Float[Tensor, " variants"]:
    ids = prompts.answer_ids
    return variant_metrics(model, prompts.batch, variants, (ids, ids), ["logprob"])[:, 0].exp()


def _restore(
    model: PreTrainedModel,
    decoder: Decoder,
    prompts: _Prompts,
    blurred: list[Tensor],
    which: list[int],
    cells: list[tuple[str, int]],
    width: int,
) -> list[Float[Tensor, "cells pos draws"]]:
    """Probability of the answer with each place restored, for each prompt that is used."""
    points = [HookPoint(site, layer) for site in dict(cells) for layer in range(decoder.n_layers)]
    restored = []
    for prompt in which:
        (clean,) = prompt_values(model, [prompts.ids[prompt]], points, lambda value: value)
        n_draws, n_pos = len(blurred[prompt]), len(prompts.ids[prompt])
        variants = [
            Variant(
                prompt,
                [
                    _noise(prompts, blurred, prompt, draw),
                    *(
                        Patch(point, clean[point][[position]], [position])
                        for point in _window(site, layer, width, decoder.n_layers)
                    ),
                ],
            )
            for site, layer in cells
            for position in range(n_pos)
            for draw in range(n_draws)
        ]
        restored.append(_probs(model, prompts, variants).reshape(len(cells), n_pos, n_draws))
    return restored


def _window(site: str, layer: int, width: int, n_layers: int) -> list[HookPoint]:
    """The layers around one; the stream at one layer holds all before it, so it is never restored at several."""
    if site == "resid_post":
        return [HookPoint(site, layer)]
    return [HookPoint(site, i) for i in range(max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2))]


# ---------------------------------------------------------------------------------------------- results


def _columns(prompts: _Prompts, which: list[int]) -> list[_Column]:
    """Each position by itself if all prompts are built alike, else the parts that Meng et al. name."""
    subjects = [prompts.subjects[i] for i in which]
    lengths = [len(prompts.ids[i]) for i in which]
    if len(set(lengths)) == 1 and all(subject == subjects[0] for subject in subjects):
        tokens = [{prompts.tokens[i][p] for i in which} for p in range(lengths[0])]
        return [
            _Column(shared.pop() if len(shared) == 1 else str(p), [[p]] * len(which)) for p, shared in enumerate(tokens)
        ]
    parts: dict[str, list[list[int]]] = {
        "before the subject": [list(range(subject[0])) for subject in subjects],
        "first subject token": [[subject[0]] for subject in subjects],
        "middle subject tokens": [subject[1:-1] for subject in subjects],
        "last subject token": [subject[-1:] for subject in subjects],
        "first later token": [
            [subject[-1] + 1][: n - 1 - subject[-1]] for subject, n in zip(subjects, lengths, strict=True)
        ],
        "later tokens": [list(range(subject[-1] + 2, n - 1)) for subject, n in zip(subjects, lengths, strict=True)],
        "last token": [[n - 1] for n in lengths],
    }
    return [_Column(label, positions) for label, positions in parts.items() if any(positions)]


def _rows(
    cells: list[tuple[str, int]],
    columns: list[_Column],
    restored: list[Float[Tensor, "cells pos draws"]],
    corrupted: Float[Tensor, "used draws"],
    seed: int,
    n_boot: int,
) -> list[TraceRow]:
    rows = []
    for c, (site, layer) in enumerate(cells):
        for i, column in enumerate(columns):
            has = [k for k, positions in enumerate(column.positions) if positions]
            probs = torch.stack([restored[k][c, column.positions[k]].mean(0) for k in has])
            effects = probs - corrupted[has]
            effect, low, high = mean_interval(effects.mean(1) if len(restored) > 1 else effects[0], seed, n_boot)
            rows.append(
                TraceRow(
                    site=site,
                    layer=layer,
                    column=i,
                    n=len(has),
                    prob=number(probs.mean()),
                    effect=number(effect),
                    low=number(low),
                    high=number(high),
                )
            )
    return rows


def _prompt_infos(
    prompts: _Prompts, clean: Float[Tensor, " n"], corrupted: Float[Tensor, " n"], min_drop: float
) -> list[TracedPrompt]:
    return [
        TracedPrompt(
            prompt=prompts.texts[i],
            tokens=prompts.tokens[i],
            subject=prompts.subjects[i],
            answer=prompts.answers[i],
            clean=number(before),
            corrupted=number(after),
            reason=None
            if before - after >= min_drop
            else f"the noise lowers its probability by less than {min_drop:g}",
        )
        for i, (before, after) in enumerate(zip(clean.tolist(), corrupted.tolist(), strict=True))
    ]


def _warnings(kept: Tensor, n_draws: int) -> list[str]:
    left_out = int((~kept).sum())
    found = [f"{left_out} prompts were left out, since the noise hardly lowers their answer."] if left_out else []
    return found + (few(n_draws, "draw of one prompt") if int(kept.sum()) == 1 else [])
