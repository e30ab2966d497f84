"""Single features of a sparse autoencoder: what makes them active, and what they write.

Source: Bricken et al., "Towards Monosemanticity" (2023), https://transformer-circuits.pub/2023/monosemantic-features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import length_batches
from techniques._hooks import HookPoint, record, run
from techniques._model import find_decoder
from techniques._results import Header, header, number, numbers
from techniques._sae import SAE
from techniques._sae_data import MAX_TOKENS, Corpus, activations, locate, read_corpus
from techniques._tokens import check_lists, pad, single_token_id, token_text

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
        feature: The feature of highest AUROC on half of the texts.
        auroc_chosen: Its AUROC on that half: too high, since it was chosen by it.
        auroc: Its AUROC on the other half.
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
    seen = _activity(model, corpus, point, sae)
    truths = {name: _truth(tokenizer, corpus, seen, name, label) for name, label in (labels or {}).items()}
    best = [_best(seen, name, truth) for name, truth in truths.items()]
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
    if not len(features or []) and not labels:
        raise ValueError("Neither features nor labels are given; expected one of them. Say what to look for.")
    for feature in features or []:
        if not 0 <= feature < d_sae:
            raise ValueError(f"Feature {feature} does not exist; the SAE has {d_sae}. Choose from 0 to {d_sae - 1}.")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1.")


@dataclass(frozen=True)
class _Truth:
    """A label of all counted tokens, or of all texts; `chooses` says which of them may choose the best feature."""

    level: Literal["token", "text"]
    is_positive: Bool[Tensor, " items"]
    chooses: Bool[Tensor, " items"]


def _truth(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seen: _Activity, name: str, label: str | Sequence[bool]
) -> _Truth:
    n_texts = len(corpus.texts)
    if isinstance(label, str):
        token = single_token_id(tokenizer, label)
        found = [ids[at] == token for ids, kept in zip(corpus.ids, corpus.kept, strict=True) for at in kept]
        positive, text = torch.tensor(found), seen.text
    else:
        if len(label) != n_texts:
            raise ValueError(f"The label {name!r} has {len(label)} values for {n_texts} texts; expected one per text.")
        positive, text = torch.tensor([bool(value) for value in label]), torch.arange(n_texts)
    # Every other text that has a positive chooses, and every other one that has none.
    has_positive = torch.zeros(n_texts, dtype=torch.bool)
    has_positive[text[positive]] = True
    chooses = torch.zeros(n_texts, dtype=torch.bool)
    for group in (has_positive.nonzero(), (~has_positive).nonzero()):
        chooses[group[::2]] = True
    truth = _Truth("token" if isinstance(label, str) else "text", positive, chooses[text])
    if any(positive[half].all() or not positive[half].any() for half in (truth.chooses, ~truth.chooses)):
        raise ValueError(
            f"The label {name!r} is true of {int(positive.sum())} of {len(positive)} {truth.level}s, in "
            f"{int(has_positive.sum())} of {n_texts} texts; expected positives and negatives in both halves of the "
            "texts. Give more texts."
        )
    return truth


def _per_item(seen: _Activity, feature: int, truth: _Truth) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
    """The items on which a feature is active, and how strong it is there at most."""
    token, value = seen.of(feature)
    if truth.level == "token":
        return token, value
    strongest = value.new_zeros(len(truth.is_positive)).scatter_reduce_(0, seen.text[token], value, "amax")
    found = strongest.nonzero().squeeze(1)
    return found, strongest[found]


def _auroc(seen: _Activity, feature: int, truth: _Truth, among: Bool[Tensor, " items"]) -> float:
    """Chance that the feature is stronger on a positive than on a negative; a tie, at 0 too, counts half."""
    items, values = _per_item(seen, feature, truth)
    items, values = items[among[items]], values[among[items]]
    positive = values[truth.is_positive[items]]
    negative = values[~truth.is_positive[items]].sort().values
    n_positive, n_negative = int((truth.is_positive & among).sum()), int((~truth.is_positive & among).sum())
    silent = n_negative - len(negative)
    beaten = (torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)).sum() / 2
    wins = float(beaten) + silent * (len(positive) + (n_positive - len(positive)) / 2)
    return wins / (n_positive * n_negative)


def _best(seen: _Activity, name: str, truth: _Truth) -> LabelRow:
    """The best feature for a label on half of the texts, and its AUROC on the others."""
    scores = [_auroc(seen, feature, truth, truth.chooses) for feature in range(len(seen.starts) - 1)]
    feature = max(range(len(scores)), key=scores.__getitem__)
    return LabelRow(
        label=name,
        level=truth.level,
        n_positive=int(truth.is_positive.sum()),
        n=len(truth.is_positive),
        feature=feature,
        auroc_chosen=number(scores[feature]),
        auroc=number(_auroc(seen, feature, truth, ~truth.chooses)),
    )


def _examples(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seen: _Activity, feature: int, top_k: int
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
    seen: _Activity,
    feature: int,
    truths: Mapping[str, _Truth],
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
        auroc={name: number(_auroc(seen, feature, truth, everywhere[name])) for name, truth in truths.items()},
    )


def _extreme(
    tokenizer: PreTrainedTokenizerBase, weights: Float[Tensor, " d_vocab"], sign: int, top_k: int
) -> list[LogitWeight]:
    best = weights.topk(min(top_k, len(weights)))
    return [
        LogitWeight(token=token_text(tokenizer, i), id=i, weight=number(sign * weight))
        for i, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
