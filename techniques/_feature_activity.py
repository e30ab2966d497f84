"""Where the features of a sparse autoencoder are active in some texts, and how well they tell a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import length_batches
from techniques._hooks import HookPoint
from techniques._results import number
from techniques._sae import SAE
from techniques._sae_data import MAX_TOKENS, Corpus, activations
from techniques._tokens import single_token_id


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


@dataclass(frozen=True)
class Activity:
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


def activity_of(model: PreTrainedModel, corpus: Corpus, point: HookPoint, sae: SAE) -> Activity:
    """Run all texts, and keep what is active of an SAE's features at a point."""
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
    return Activity(
        token=torch.cat(tokens)[order],
        value=torch.cat(values)[order],
        starts=torch.cat([starts.new_zeros(1), starts]),
        text=torch.tensor([i for i, kept in enumerate(corpus.kept) for _ in kept]),
        position=torch.tensor([position for kept in corpus.kept for position in kept]),
    )


@dataclass(frozen=True)
class Truth:
    """A label of all counted tokens, or of all texts; `chooses` says which of them may choose the best feature."""

    level: Literal["token", "text"]
    is_positive: Bool[Tensor, " items"]
    chooses: Bool[Tensor, " items"]


def truth_of(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seen: Activity, name: str, label: str | Sequence[bool]
) -> Truth:
    """A label by tokens or by texts, and which half of the texts chooses its feature.

    Raises:
        ValueError: Its token is not one token, its values are not one per text, or half of the texts lack positives or
            negatives.
    """
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
    truth = Truth("token" if isinstance(label, str) else "text", positive, chooses[text])
    if any(positive[half].all() or not positive[half].any() for half in (truth.chooses, ~truth.chooses)):
        raise ValueError(
            f"The label {name!r} is true of {int(positive.sum())} of {len(positive)} {truth.level}s, in "
            f"{int(has_positive.sum())} of {n_texts} texts; expected positives and negatives in both halves of the "
            "texts. Give more texts."
        )
    return truth


def _per_item(seen: Activity, feature: int, truth: Truth) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
    """The items on which a feature is active, and how strong it is there at most."""
    token, value = seen.of(feature)
    if truth.level == "token":
        return token, value
    strongest = value.new_zeros(len(truth.is_positive)).scatter_reduce_(0, seen.text[token], value, "amax")
    found = strongest.nonzero().squeeze(1)
    return found, strongest[found]


def auroc(seen: Activity, feature: int, truth: Truth, among: Bool[Tensor, " items"]) -> float:
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


def best_feature(seen: Activity, name: str, truth: Truth) -> LabelRow:
    """The best feature for a label on half of the texts, and its AUROC on the others."""
    scores = [auroc(seen, feature, truth, truth.chooses) for feature in range(len(seen.starts) - 1)]
    feature = max(range(len(scores)), key=scores.__getitem__)
    return LabelRow(
        label=name,
        level=truth.level,
        n_positive=int(truth.is_positive.sum()),
        n=len(truth.is_positive),
        feature=feature,
        auroc_chosen=number(scores[feature]),
        auroc=number(auroc(seen, feature, truth, ~truth.chooses)),
    )
