"""Single features of a sparse autoencoder: what makes them active, what they write, and what the model does with more.

Sources: Bricken et al., "Towards Monosemanticity" (2023), https://transformer-circuits.pub/2023/monosemantic-features;
Templeton et al., "Scaling Monosemanticity" (2024), https://transformer-circuits.pub/2024/scaling-monosemanticity (clamps)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import length_batches
from techniques._generation import continue_tokens
from techniques._hooks import HookPoint, edit, record, run
from techniques._model import find_decoder
from techniques._results import Header, header, number, numbers
from techniques._sae import SAE
from techniques._sae_data import MAX_TOKENS, Corpus, activations, locate, read_corpus
from techniques._tokens import check_finite, check_top_k, encode, log_probs, pad, single_token_id, token_text

BINS = 20  # of the histogram of a feature's activations
BEFORE, AFTER = 12, 4  # tokens shown around an example's strongest one
WRITING = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # sites whose rows the unembedding can read

Labels = Mapping[str, str | Sequence[bool]]


class Example(TypedDict):
    """A stretch of a text around one of the tokens where a feature is strongest.

    Attributes:
        text: Index of the text.
        position: Index of that token in the text.
        tokens: The tokens of the stretch.
        activations: The feature's activation at each of them; 0 at special tokens.
        peak: Index of the strongest token in the stretch.
    """

    text: int
    position: int
    tokens: list[str]
    activations: list[float | None]
    peak: int


class LogitWeight(TypedDict):
    """What a unit of a feature's activation adds to a token's logit, less the mean over the vocabulary, in nats."""

    token: str
    id: int
    weight: float | None


class Histogram(TypedDict):
    """How often a feature's activation lies between edges i and i + 1, where it is active at all."""

    edges: list[float | None]
    counts: list[int]


class FeatureRow(TypedDict):
    """One feature.

    Attributes:
        feature: Its index.
        density: Share of tokens on which it is active.
        max_activation: Its largest activation on these texts; 0 if it was never active.
        mean_activation: Mean where it is active; None if it never was.
        histogram: Of its activations where it is active; None if it never was.
        examples: The texts where it is strongest, strongest first, one stretch of each.
        top_logits: The tokens that it makes likelier, most so first; None where the site does not write to the
            residual stream, or it was never active.
        bottom_logits: The tokens that it makes less likely, most so first.
        auroc: By label, the chance that it is stronger on a random positive than on a random negative.
    """

    feature: int
    density: float | None
    max_activation: float | None
    mean_activation: float | None
    histogram: Histogram | None
    examples: list[Example]
    top_logits: list[LogitWeight] | None
    bottom_logits: list[LogitWeight] | None
    auroc: dict[str, float | None]


class LabelRow(TypedDict):
    """The feature that tells a label best.

    Attributes:
        label: Its name.
        level: "token" or "text".
        n_positive: Positives among the items.
        n: Items: tokens, or texts with the feature's strongest token in each.
        feature: The feature of highest AUROC on every other text.
        auroc_chosen: Its AUROC on those texts: too high, since it was chosen by it.
        auroc: Its AUROC on the rest of the texts, which did not choose it.
    """

    label: str
    level: str
    n_positive: int
    n: int
    feature: int
    auroc_chosen: float | None
    auroc: float | None


class FeatureReport(Header):
    """Result of `feature_report`; n is the number of texts.

    Attributes:
        hook_name: Where the SAE belongs.
        n_tokens: Tokens that were read; special tokens are left out.
        features: A row per feature, in the order asked for; without features, the best one of each label.
        labels: The best feature of each label.
    """

    hook_name: str
    n_tokens: int
    features: list[FeatureRow]
    labels: list[LabelRow]


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
def feature_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE | str | Path,
    texts: Sequence[str],
    features: Sequence[int] | None = None,
    *,
    labels: Labels | None = None,
    top_k: int = 8,
) -> FeatureReport:
    """Describe features: strongest examples, what they write to the logits, activation histogram, AUROC for labels.

    Args:
        model: The model whose activations the SAE was trained on, in eval mode.
        tokenizer: Its tokenizer; special tokens are left out.
        sae: The SAE, or its folder; it says itself where in the model it belongs.
        texts: Texts to look for the features in.
        features: Indices of features. None takes the best one of each label.
        labels: By name, either a token with its leading space, whose occurrences are the positives among all tokens, or
            one truth value per text, which is compared with the feature's strongest activation in the text.
        top_k: Examples and logits per feature.

    Returns:
        A row per feature, and for each label the feature that tells it best, found on every other text and measured on
        the rest. Logit weights are the direct path alone: the derivative through the final norm at the feature's
        strongest token, with all later blocks left as they are.

    Raises:
        ValueError: Neither features nor labels are given, a feature does not exist, top_k is out of range, a label's
            token is not one token or its values are not one per text, positives or negatives are missing in either
            half, or what `evaluate_sae` raises about texts, model and SAE.

    Misleads: The strongest examples show a feature at its clearest; its weak activations, which are most of them, may
    mean something else. Look at the histogram. A token's feature is easy to find at an early layer, as it is the input.

    Cost: 1 forward per text up to the layer, and one whole forward per feature; about 0.5 s for 200 texts on the demo
    model.

    Example:
        >>> report = feature_report(model, tokenizer, "sae", texts, labels={"persona": "PERSONA"})
        >>> report["labels"][0]["auroc"] > 0.95
        True
    """
    sae, point = locate(model, sae)
    corpus = read_corpus(model, tokenizer, texts)
    _check_request(features, labels, sae.d_sae, top_k)
    seen = _activity(model, corpus, point, sae)
    truths = {name: _truth(tokenizer, corpus, name, label) for name, label in (labels or {}).items()}
    best = [_best(seen, name, truth, corpus) for name, truth in truths.items()]
    chosen = list(dict.fromkeys(row["feature"] for row in best)) if features is None else list(features)
    rows = [_describe(model, tokenizer, sae, point, corpus, seen, feature, truths, top_k) for feature in chosen]
    return FeatureReport(
        **header(model, "feature_report", n=len(corpus.texts)),
        hook_name=str(point),
        n_tokens=corpus.n_tokens,
        features=rows,
        labels=best,
    )


@dataclass(frozen=True)
class _Activity:
    """All activations that are not 0, feature by feature, and where each counted token stands."""

    token: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    starts: Int[Tensor, " d_sae_and_one"]
    text: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]

    def of(self, feature: int) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        """The tokens on which a feature is active, and its activations there."""
        part = slice(int(self.starts[feature]), int(self.starts[feature + 1]))
        return self.token[part], self.value[part]


def _activity(model: PreTrainedModel, corpus: Corpus, point: HookPoint, sae: SAE) -> _Activity:
    firsts = torch.tensor([0, *(len(kept) for kept in corpus.kept)]).cumsum(0)
    tokens, features, values = [], [], []
    for batch in length_batches([len(row) for row in corpus.ids], MAX_TOKENS):
        rows = activations(model, corpus, point, batch)
        at = torch.cat([firsts[i] + torch.arange(len(row)) for i, row in zip(batch, rows, strict=True)])
        found = sae.encode(torch.cat(rows)).cpu()
        token, feature = found.nonzero(as_tuple=True)
        tokens.append(at[token])
        features.append(feature)
        values.append(found[token, feature])
    feature = torch.cat(features)
    order = torch.argsort(feature, stable=True)
    starts = torch.bincount(feature, minlength=sae.d_sae).cumsum(0)
    return _Activity(
        token=torch.cat(tokens)[order],
        value=torch.cat(values)[order],
        starts=torch.cat([starts.new_zeros(1), starts]),
        text=torch.tensor([i for i, kept in enumerate(corpus.kept) for _ in kept]),
        position=torch.tensor([position for kept in corpus.kept for position in kept]),
    )


def _check_request(features: Sequence[int] | None, labels: Labels | None, d_sae: int, top_k: int) -> None:
    if not features and not labels:
        raise ValueError("Neither features nor labels are given; expected one of them. Say what to look for.")
    for feature in features or []:
        if not 0 <= feature < d_sae:
            raise ValueError(f"Feature {feature} does not exist; the SAE has {d_sae}. Choose from 0 to {d_sae - 1}.")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1.")


def _truth(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, name: str, label: str | Sequence[bool]
) -> Bool[Tensor, " items"]:
    """Which items are positive: all counted tokens for a token's label, all texts for one value per text."""
    if isinstance(label, str):
        token = single_token_id(tokenizer, label)
        return torch.tensor([ids[at] == token for ids, kept in zip(corpus.ids, corpus.kept, strict=True) for at in kept])
    if len(label) != len(corpus.texts):
        raise ValueError(
            f"The label {name!r} has {len(label)} values for {len(corpus.texts)} texts; expected one per text."
        )
    return torch.tensor([bool(value) for value in label])
