"""Measure a sparse autoencoder: how well it reconstructs, how sparsely, and what the model loses when it runs on that.

Names and definitions are SAELens' (`sae_lens.evals.run_evals`), https://github.com/decoderesearch/SAELens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches, length_batches
from techniques._hooks import HookPoint, edit, run
from techniques._results import Header, few, header, number, numbers
from techniques._sae import SAE
from techniques._sae_data import MAX_TOKENS, Corpus, activations, locate, read_corpus
from techniques._stats import N_BOOT
from techniques._tokens import Batch, check_finite, check_lists, log_probs, pad

# Of float32 logits that one forward pass may give; a few tensors of this size are alive. On a CPU, fresh pages for more
# of them cost several times the forward pass.
LOGIT_BYTES = {"cpu": 2**23, "cuda": 2**28}
MIN_GAP = 0.01  # nats per token that zero ablation has to cost for a share of it to mean something

Change = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_in"]]


class Baseline(TypedDict):
    """What the same texts lose under principal components instead of features.

    Attributes:
        n_components: As many as the SAE's features are active per token, rounded.
        explained_variance: On these texts, on which the components were fitted: the best that any can do.
        ce_loss_score: As for the SAE.
    """

    n_components: int
    explained_variance: float | None
    ce_loss_score: float | None


class SAEMetrics(Header):
    """Result of `evaluate_sae`; n is the number of texts. Means are over tokens; special tokens are left out.

    Attributes:
        hook_name: Where the SAE stands in.
        n_tokens: Tokens measured.
        d_sae: Number of features.
        l0: Active features per token.
        l1: Sum of the activations per token.
        mse: Squared error of the reconstruction, summed over d_in.
        explained_variance: 1 - mse / variance of the activations around their mean, summed over d_in.
        cossim: Cosine of activation and reconstruction.
        l2_norm_in: Norm of the activations.
        l2_norm_out: Norm of the reconstructions.
        l2_ratio: Mean ratio of the two; below 1, the SAE shrinks.
        relative_reconstruction_bias: Mean squared norm of the reconstruction over its mean inner product with the
            activation; 1 without bias.
        ce_loss_without_sae: Cross-entropy of the next token, in nats.
        ce_loss_with_sae: The same with the reconstruction in place of the activation.
        ce_loss_with_ablation: The same with zero in its place, at all tokens.
        ce_loss_score: Share of what the ablation costs that the SAE keeps: 1 is perfect, 0 no better than zero.
        kl_div_with_sae: KL(model || model with the SAE) of the next token, in nats.
        kl_div_with_ablation: The same for the ablation.
        kl_div_score: 1 - the ratio of the two.
        dead_fraction: Share of features that were never active on these texts.
        feature_density: Share of tokens on which each feature is active.
        intervals: Low and high end of the 95 % bootstrap interval over texts of explained_variance, l0 and
            ce_loss_score.
        pca: A baseline of as many principal components.
    """

    hook_name: str
    n_tokens: int
    d_sae: int
    l0: float | None
    l1: float | None
    mse: float | None
    explained_variance: float | None
    cossim: float | None
    l2_norm_in: float | None
    l2_norm_out: float | None
    l2_ratio: float | None
    relative_reconstruction_bias: float | None
    ce_loss_without_sae: float | None
    ce_loss_with_sae: float | None
    ce_loss_with_ablation: float | None
    ce_loss_score: float | None
    kl_div_with_sae: float | None
    kl_div_with_ablation: float | None
    kl_div_score: float | None
    dead_fraction: float | None
    feature_density: list[float | None]
    intervals: dict[str, list[float | None]]
    pca: Baseline


@torch.no_grad()
def evaluate_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE | str | Path,
    texts: Sequence[str],
    *,
    seed: int = 0,
) -> SAEMetrics:
    """Measure an SAE's error, its sparsity, and what the model's predictions lose when they run on its reconstruction.

    Args:
        model: The model whose activations the SAE was trained on, in eval mode.
        tokenizer: Its tokenizer; special tokens are left out, and keep their own activations when the SAE stands in.
        sae: The SAE, or its folder; it says itself where in the model it belongs.
        texts: Texts that it was not trained on, of two tokens or more.
        seed: Of the intervals.

    Returns:
        The metrics under SAELens' names, an interval for the chief ones, and a baseline of as many principal
        components as the SAE has active features. Scores are None, with a warning, where zero ablation costs nothing.

    Raises:
        FileNotFoundError: The folder holds no SAE.
        ValueError: The SAE does not fit the model, or what `collect_activations` raises about texts and model.

    Misleads: ce_loss_score compares with zero ablation, which ruins any model, so it is near 1 for poor SAEs as well:
    read kl_div_with_sae, and the baseline. A high score says nothing about whether the features mean something.

    Cost: 5 forwards per text, one of them up to the layer; about 0.6 s for 100 texts on the demo model.

    Example:
        ```python
        from itertools import islice
        from tempfile import mkdtemp

        from interp_kernel.demo_model import corpus
        from techniques.evaluate_sae import evaluate_sae
        from techniques.sae import train_sae

        texts = [text for _, text in islice(corpus.documents(seed=1), 400)]
        options = dict(layer=1, d_sae=256, k=8, steps=100, batch_size=512, learning_rate=3e-3)
        trained = train_sae(model, tokenizer, texts[:300], mkdtemp(), **options)
        evaluate_sae(model, tokenizer, trained["path"], texts[300:])
        ```
    """
    check_lists(texts=texts)
    sae, point = locate(model, sae)
    corpus = read_corpus(model, tokenizer, texts)
    sums, moments, density = _reconstruct(model, corpus, point, sae)
    n_components = max(1, round((sums["l0"].sum() / sums["n"].sum()).item()))
    basis = moments.components(n_components)

    def reconstruct(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x))

    def project(x: Tensor) -> Tensor:
        mean, axes = moments.mean.to(x), basis.to(x)
        return mean + (x - mean) @ axes @ axes.T

    sums |= _predict(model, corpus, point, {"sae": reconstruct, "pca": project, "zero": None})
    found = {name: value.item() for name, value in _metrics({k: v.sum() for k, v in sums.items()}).items()}
    intervals, warnings = _intervals(sums, seed), []
    gap = found["ce_loss_with_ablation"] - found["ce_loss_without_sae"]
    if not gap > MIN_GAP:
        warnings.append(
            f"Zero ablation at {point} costs {gap:.3g} nats per token, too little to be shared: no scores are given. "
            "Take texts of several tokens that the model predicts well."
        )
        found |= {"ce_loss_score": math.nan, "kl_div_score": math.nan, "pca_score": math.nan}
        intervals["ce_loss_score"] = [None, None]
    pca_score = found.pop("pca_score")
    result = {
        **header(
            model, "evaluate_sae", n=len(corpus.texts), seed=seed, warnings=warnings + few(len(corpus.texts), "text")
        ),
        **{name: number(value) for name, value in found.items()},
        "hook_name": str(point),
        "n_tokens": corpus.n_tokens,
        "d_sae": sae.d_sae,
        "dead_fraction": number((density == 0).double().mean()),
        "feature_density": numbers(density),
        "intervals": intervals,
        "pca": Baseline(
            n_components=n_components,
            explained_variance=number(moments.explained(basis)),
            ce_loss_score=number(pca_score),
        ),
    }
    return cast(SAEMetrics, result)


@dataclass
class _Moments:
    """Sums over tokens from which mean and covariance follow, in float64 on the CPU."""

    n: int
    x: Float[Tensor, " d_in"]
    xx: Float[Tensor, "d_in d_in"]

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        return self.x / self.n

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        return self.xx / self.n - torch.outer(self.mean, self.mean)

    def components(self, n: int) -> Float[Tensor, "d_in n"]:
        """The principal components of greatest variance."""
        axes: Tensor = torch.linalg.eigh(self.covariance).eigenvectors
        return axes[:, -n:]

    def explained(self, basis: Float[Tensor, "d_in n"]) -> Tensor:
        """Share of the variance that lies along a basis."""
        return (basis * (self.covariance @ basis)).sum() / self.covariance.trace()


def _reconstruct(
    model: PreTrainedModel, corpus: Corpus, point: HookPoint, sae: SAE
) -> tuple[dict[str, Float[Tensor, " texts"]], _Moments, Float[Tensor, " d_sae"]]:
    """Sums per text of what compares activations with their reconstructions; moments; density of each feature."""
    d_in, n_texts = sae.d_in, len(corpus.texts)
    sums: dict[str, Tensor] = {}
    by_text = torch.zeros(n_texts, d_in, dtype=torch.float64)
    second = torch.zeros(d_in, d_in, dtype=torch.float64)
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    for batch in length_batches([len(row) for row in corpus.ids], MAX_TOKENS):
        rows = activations(model, corpus, point, batch)
        text = torch.tensor([i for i, row in zip(batch, rows, strict=True) for _ in row])
        x = torch.cat(rows).float()
        features = sae.encode(x)
        for name, value in _compare(x, features, sae.decode(features).to(x)).items():
            sums.setdefault(name, by_text.new_zeros(n_texts)).index_add_(0, text, value.double().cpu())
        wide = x.double().cpu()
        by_text.index_add_(0, text, wide)
        second += wide.T @ wide
        fired += (features != 0).sum(0).cpu()
    moments = _Moments(corpus.n_tokens, by_text.sum(0), second)
    # Around the mean of all texts, so that texts can be drawn again without another look at their tokens.
    mean = moments.mean
    sums["spread"] = sums.pop("squared") - 2 * by_text @ mean + sums["n"] * mean.dot(mean)
    return sums, moments, fired / corpus.n_tokens


def _compare(
    x: Float[Tensor, "tokens d_in"], features: Float[Tensor, "tokens d_sae"], out: Float[Tensor, "tokens d_in"]
) -> dict[str, Float[Tensor, " tokens"]]:
    norm_in, norm_out, inner = x.norm(dim=1), out.norm(dim=1), (x * out).sum(1)
    return {
        "n": torch.ones_like(inner),
        "l0": (features != 0).sum(1),
        "l1": features.abs().sum(1),
        "error": (x - out).pow(2).sum(1),
        "squared": norm_in.pow(2),
        "cossim": torch.cosine_similarity(x, out),
        "norm_in": norm_in,
        "norm_out": norm_out,
        "norm_ratio": norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in),
        "out_squared": norm_out.pow(2),
        "inner": inner,
    }


def _predict(
    model: PreTrainedModel, corpus: Corpus, point: HookPoint, changes: Mapping[str, Change | None]
) -> dict[str, Float[Tensor, " texts"]]:
    """Sums per text of cross-entropy and divergence: unchanged, and under each change of the activations."""
    lengths = [len(row) for row in corpus.ids]
    d_vocab = model.config.get_text_config(decoder=True).vocab_size

    def of_batch(batch: list[int]) -> list[dict[str, Tensor]]:
        inputs = pad([corpus.ids[i] for i in batch], "right", 0, model.device)
        counted = torch.zeros_like(inputs.attention_mask, dtype=torch.bool)
        for row, i in enumerate(batch):
            counted[row, corpus.kept[i]] = True
        # The last token of a text predicts nothing that is known.
        has_next = counted[:, :-1] & (inputs.attention_mask[:, 1:] > 0)
        clean = log_probs(run(model, inputs))
        by_row = {"n_next": has_next, "ce_clean": _losses(clean, inputs, has_next)}
        for name, change in changes.items():
            with edit(model, {point: _in_place_of(change, counted)}):
                changed = log_probs(run(model, inputs))
            by_row[f"ce_{name}"] = _losses(changed, inputs, has_next)
            by_row[f"kl_{name}"] = (clean.exp() * (clean - changed)).sum(-1) * counted.to(clean.device)
        found = {name: value.double().sum(1).cpu() for name, value in by_row.items()}
        check_finite(torch.stack([*found.values()]))
        return [{name: value[row] for name, value in found.items()} for row in range(len(batch))]

    budget = LOGIT_BYTES["cpu" if model.device.type == "cpu" else "cuda"]
    rows = in_batches(lengths, max(1, budget // (4 * d_vocab)), of_batch)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _losses(
    logprobs: Float[Tensor, "batch pos d_vocab"], inputs: Batch, has_next: Bool[Tensor, "batch pos_less_one"]
) -> Float[Tensor, "batch pos_less_one"]:
    """Cross-entropy of each next token, 0 where there is none."""
    following = inputs.input_ids[:, 1:, None].to(logprobs.device)
    return -logprobs[:, :-1].gather(-1, following)[..., 0] * has_next.to(logprobs.device)


def _in_place_of(change: Change | None, counted: Bool[Tensor, "batch pos"]) -> Callable[[Tensor], Tensor]:
    """An edit that changes the tokens that count, in float32; None sets all of them to zero, special ones too."""

    def new(value: Tensor) -> Tensor:
        if change is None:
            return torch.zeros_like(value)
        flat = value.flatten(2).clone()
        where = counted.to(value.device)
        flat[where] = change(flat[where].float()).to(value.dtype)
        return flat.view_as(value)

    return new


def _metrics(s: Mapping[str, Float[Tensor, "*draws"]]) -> dict[str, Float[Tensor, "*draws"]]:
    """SAELens' metrics from sums over tokens."""
    ce = {name: s[f"ce_{name}"] / s["n_next"] for name in ("clean", "sae", "zero", "pca")}
    kl = {name: s[f"kl_{name}"] / s["n"] for name in ("sae", "zero")}
    means = {name: s[name] / s["n"] for name in ("l0", "l1", "cossim")}
    return means | {
        "mse": s["error"] / s["n"],
        "explained_variance": 1 - s["error"] / s["spread"],
        "l2_norm_in": s["norm_in"] / s["n"],
        "l2_norm_out": s["norm_out"] / s["n"],
        "l2_ratio": s["norm_ratio"] / s["n"],
        "relative_reconstruction_bias": s["out_squared"] / s["inner"],
        "ce_loss_without_sae": ce["clean"],
        "ce_loss_with_sae": ce["sae"],
        "ce_loss_with_ablation": ce["zero"],
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "kl_div_with_sae": kl["sae"],
        "kl_div_with_ablation": kl["zero"],
        "kl_div_score": 1 - kl["sae"] / kl["zero"],
        "pca_score": (ce["zero"] - ce["pca"]) / (ce["zero"] - ce["clean"]),
    }


def _intervals(sums: Mapping[str, Float[Tensor, " texts"]], seed: int) -> dict[str, list[float | None]]:
    """Percentile intervals of ratios of sums, over texts drawn with replacement."""
    n = len(sums["n"])
    drawn = torch.randint(n, (N_BOOT, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(N_BOOT, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    found = _metrics({name: counts @ value for name, value in sums.items()})
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: numbers(found[name].quantile(tails)) for name in ("explained_variance", "l0", "ce_loss_score")}
