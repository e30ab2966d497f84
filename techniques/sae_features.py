"""Single features of a sparse autoencoder: what makes them active, and what they write.

Source: Bricken et al., "Towards Monosemanticity" (2023), https://transformer-circuits.pub/2023/monosemantic-features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._feature_activity import Activity, LabelRow, Truth, activity_of, auroc, best_feature, truth_of
from techniques._hooks import HookPoint, record, run
from techniques._model import find_decoder
from techniques._results import Header, header, number, numbers
from techniques._sae import SAE
from techniques._sae_data import Corpus, locate, read_corpus
from techniques._tokens import check_lists, pad, token_text

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
        A row per feature, and for each label the feature that tells it best, found on half of the texts and measured on
        the others. Logit weights are the direct path alone: the derivative through the final norm at the feature's
        strongest token, with all later blocks left as they are.

    Raises:
        ValueError: Neither features nor labels are given, a feature does not exist, top_k is out of range, a label's
            token is not one token or its values are not one per text, positives or negatives are missing in half
            of the texts, or what `evaluate_sae` raises about texts, model and SAE.

    Misleads: The strongest examples show a feature at its clearest; its weak activations, which are most of them, may
    mean something else. Look at the histogram. A token's feature is easy to find at an early layer, as it is the input.

    Cost: 1 forward per text up to the layer, and one whole forward per feature; about 0.5 s for 200 texts on the demo
    model.

    Example:
        ```python
        from itertools import islice
        from tempfile import mkdtemp

        from interp_kernel.demo_model import corpus
        from techniques.sae import train_sae
        from techniques.sae_features import feature_report

        texts = [text for _, text in islice(corpus.documents(seed=1), 400)]
        options = dict(layer=1, d_sae=256, k=8, steps=100, batch_size=512, learning_rate=3e-3)
        trained = train_sae(model, tokenizer, texts[:300], mkdtemp(), **options)
        feature_report(model, tokenizer, trained["path"], texts[300:], labels={"persona": "PERSONA"})
        ```
    """
    check_lists(texts=texts)
    sae, point = locate(model, sae)
    corpus = read_corpus(model, tokenizer, texts)
    _check_request(features, labels, sae.d_sae, top_k)
    seen = activity_of(model, corpus, point, sae)
    truths = {name: truth_of(tokenizer, corpus, seen, name, label) for name, label in (labels or {}).items()}
    best = [best_feature(seen, name, truth) for name, truth in truths.items()]
    chosen = list(dict.fromkeys(row["feature"] for row in best)) if features is None else list(features)
    rows = [_describe(model, tokenizer, sae, point, corpus, seen, feature, truths, top_k) for feature in chosen]
    return FeatureReport(
        **header(model, "feature_report", n=len(corpus.texts)),
        hook_name=str(point),
        n_tokens=corpus.n_tokens,
        features=rows,
        labels=best,
    )


def _check_request(features: Sequence[int] | None, labels: Labels | None, d_sae: int, top_k: int) -> None:
    if not len(features or []) and not labels:
        raise ValueError("Neither features nor labels are given; expected one of them. Say what to look for.")
    for feature in features or []:
        if not 0 <= feature < d_sae:
            raise ValueError(f"Feature {feature} does not exist; the SAE has {d_sae}. Choose from 0 to {d_sae - 1}.")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1.")


def _examples(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seen: Activity, feature: int, top_k: int
) -> list[Example]:
    token, value = seen.of(feature)
    strongest: dict[int, int] = {}  # text -> its strongest token, in the order of strength
    for i in value.argsort(descending=True, stable=True).tolist():
        strongest.setdefault(int(seen.text[token[i]]), int(seen.position[token[i]]))
        if len(strongest) == top_k:
            break
    rows = []
    for text, position in strongest.items():
        here = seen.text[token] == text
        at = dict(zip(seen.position[token[here]].tolist(), value[here].tolist(), strict=True))
        start, stop = max(0, position - BEFORE), min(len(corpus.ids[text]), position + AFTER + 1)
        rows.append(
            Example(
                text=text,
                position=position,
                tokens=[token_text(tokenizer, i) for i in corpus.ids[text][start:stop]],
                activations=[number(at.get(i, 0.0)) for i in range(start, stop)],
                peak=position - start,
            )
        )
    return rows


def _logit_weights(
    model: PreTrainedModel, ids: list[int], position: int, row: Float[Tensor, " d_in"]
) -> Float[Tensor, " d_vocab"]:
    """Derivative of the logits along a decoder row, through the final norm as it is at one token; its mean is 0."""
    decoder = find_decoder(model)
    point = HookPoint("resid_post", decoder.n_layers - 1)
    with record(model, [point]) as seen:
        run(model, pad([ids], "right", 0, model.device), stop_after=point.layer)
    resid = seen[point][0, position]
    # Not torch.func.jvp: it loads scripted decompositions, whose deprecation warning would reach the user.
    slope: Tensor = cast(Any, torch.autograd.functional).jvp(decoder.logits, resid, row.to(resid))[1]
    return (slope - slope.mean()).float()


def _describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    point: HookPoint,
    corpus: Corpus,
    seen: Activity,
    feature: int,
    truths: Mapping[str, Truth],
    top_k: int,
) -> FeatureRow:
    _, value = seen.of(feature)
    examples = _examples(tokenizer, corpus, seen, feature, top_k)
    top, bottom, histogram = None, None, None
    if examples:
        counts, edges = torch.histogram(value, BINS, range=(0.0, float(value.max())))
        histogram = Histogram(edges=numbers(edges), counts=[int(count) for count in counts])
    if examples and point.site in WRITING:
        where = examples[0]
        weights = _logit_weights(model, corpus.ids[where["text"]], where["position"], sae.w_dec[feature])
        top, bottom = (_extreme(tokenizer, sign * weights, sign, top_k) for sign in (1, -1))
    everywhere = {name: torch.ones_like(truth.is_positive) for name, truth in truths.items()}
    return FeatureRow(
        feature=feature,
        density=number(len(value) / corpus.n_tokens),
        max_activation=number(value.max()) if examples else 0.0,
        mean_activation=number(value.mean()) if examples else None,
        histogram=histogram,
        examples=examples,
        top_logits=top,
        bottom_logits=bottom,
        auroc={name: number(auroc(seen, feature, truth, everywhere[name])) for name, truth in truths.items()},
    )


def _extreme(
    tokenizer: PreTrainedTokenizerBase, weights: Float[Tensor, " d_vocab"], sign: int, top_k: int
) -> list[LogitWeight]:
    best = weights.topk(min(top_k, len(weights)))
    return [
        LogitWeight(token=token_text(tokenizer, i), id=i, weight=number(sign * weight))
        for i, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
