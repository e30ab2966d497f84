"""Sparse autoencoders: a model's activations as sums of few features, trained, measured, saved as SAELens saves them.

Sources: Bricken et al., "Towards Monosemanticity" (2023), https://transformer-circuits.pub/2023/monosemantic-features;
Gao et al., "Scaling and evaluating sparse autoencoders" (2024), https://arxiv.org/abs/2406.04093. Names and definitions
of the metrics: SAELens, https://github.com/decoderesearch/SAELens
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._hooks import HookPoint, find_site, hook_point
from techniques._model import find_decoder
from techniques._results import ArrayFile, Header, header, number
from techniques._sae import SAE, load_sae, save_sae
from techniques._sae_data import file_pass, model_pass, read_corpus, shuffled, write_activations
from techniques._sae_training import CHOOSING, KINDS, Losses, Trainer, Weights, initial_weights, train
from techniques._tokens import check_lists

__all__ = ["SAE", "collect_activations", "load_sae", "save_sae", "train_sae"]

Kind = Literal["topk", "batchtopk", "jumprelu", "relu"]
CURVE_POINTS = 100
AUX_COEFFICIENT, LACK_COEFFICIENT = 1 / 32, 3e-6  # what the losses that revive dead features weigh: Gao; Anthropic
LOG = "training.json"


class ActivationFile(Header):
    """Result of `collect_activations`.

    Attributes:
        hook_name: Where the activations were read, in TransformerLens' words.
        n_tokens: Rows of the array; special tokens are not among them.
        d_in: Numbers per token; heads lie side by side.
        file: `activations` [tokens, d_in] in the model's dtype, `text` and `position` [tokens]: the index of the text
            and of the token in it.
    """

    hook_name: str
    n_tokens: int
    d_in: int
    file: ArrayFile


class TrainingPoint(TypedDict):
    """Means over the steps since the point before, in units in which the activations' mean norm is sqrt(d_in).

    Attributes:
        step: Steps done.
        mse: Squared error, summed over d_in.
        explained_variance: 1 - mse / variance of the activations.
        l0: Active features per token.
        sparsity_loss: The penalty on activations, for relu and jumprelu.
        dead_loss: What the features that no longer fire were charged.
        dead: How many features have not fired for `dead_window` steps.
    """

    step: int
    mse: float | None
    explained_variance: float | None
    l0: float | None
    sparsity_loss: float | None
    dead_loss: float | None
    dead: int


class TrainedSAE(Header):
    """Result of `train_sae`; n is the number of tokens that were seen, repeats included.

    Attributes:
        path: The folder of the SAE, absolute.
        hook_name: Where the activations were read.
        kind: topk, batchtopk, jumprelu or relu.
        d_in: Width of the activations.
        d_sae: Number of features.
        k: The L0 that was asked for; relu ignores it.
        steps: Steps done.
        batch_size: Tokens per step.
        learning_rate: Its highest value.
        sparsity_coefficient: What the penalty weighed; 0 for topk and batchtopk.
        scale: The activations were multiplied by this in training; it is folded into the weights.
        dead_window: Steps without firing after which a feature counts as dead.
        curve: How training went.
    """

    path: str
    hook_name: str
    kind: str
    d_in: int
    d_sae: int
    k: int
    steps: int
    batch_size: int
    learning_rate: float
    sparsity_coefficient: float
    scale: float | None
    dead_window: int
    curve: list[TrainingPoint]


def collect_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    path: str | Path,
    *,
    layer: int,
    site: str = "resid_post",
) -> ActivationFile:
    """Write the activations of all tokens at one site to a file, from which several SAEs can be trained.

    Special tokens are left out: their activations are few, huge and always the same.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        texts: Texts of any lengths up to the model's context.
        path: The safetensors file to write; one in its place is replaced.
        layer: Layer from 0.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, mlp_pre or mlp_post.

    Returns:
        Where the file is and what is in it. Activations go to it batch by batch, so they need not fit in memory.

    Raises:
        ValueError: The model is in train mode, a text is empty or too long, or the layer or site does not exist.
        MemoryError: A single text does not fit in memory.

    Misleads: The tokens of one text are no independent samples, and an SAE learns what these texts hold: few or
        similar texts give features of their own wording.

    Cost: 1 forward per text up to the layer; about 0.3 s for 200 texts on the demo model.

    Example:
        ```python
        from tempfile import mkdtemp

        from techniques.sae import collect_activations

        texts = ["The Eiffel Tower is in Paris.", "Mary gave a drink to John."]
        collect_activations(model, tokenizer, texts, mkdtemp() + "/activations.safetensors", layer=1)
        ```
    """
    check_lists(texts=texts)
    point = _point(model, site, layer)
    corpus = read_corpus(model, tokenizer, texts)
    file = write_activations(path, model, corpus, point)
    return ActivationFile(
        **header(model, "collect_activations", n=len(corpus.texts)),
        hook_name=str(point),
        n_tokens=corpus.n_tokens,
        d_in=file["shapes"]["activations"][1],
        file=file,
    )


def train_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str] | ActivationFile,
    path: str | Path,
    *,
    d_sae: int,
    kind: Kind = "batchtopk",
    k: int = 32,
    layer: int | None = None,
    site: str = "resid_post",
    steps: int = 5000,
    batch_size: int = 4096,
    learning_rate: float | None = None,
    sparsity_coefficient: float = 1.0,
    buffer_bytes: int = 2**30,
    seed: int = 0,
) -> TrainedSAE:
    """Train a sparse autoencoder on a model's activations and save it in SAELens' format.

    Activations are scaled to a mean norm of sqrt(d_in), b_dec starts at their mean, the encoder starts as the decoder's
    transpose, the learning rate rises for 5 % of the steps and falls to 0 over the last 20 %, gradients are clipped at
    norm 1. Features that stopped firing are revived: those of topk and batchtopk by having to explain the error (AuxK),
    those of relu and jumprelu by a small charge on what they lack. The saved decoder rows are unit vectors, and the
    scale is folded in, so activations are in the model's own units.

    Args:
        model: A decoder-only Hugging Face model in eval mode; it is only read.
        tokenizer: Its tokenizer; special tokens are left out.
        data: Texts, which are run through the model as training goes on, or what `collect_activations` returned.
        path: The folder to save to; an SAE in its place is replaced.
        d_sae: Number of features.
        kind: "topk" keeps k features of each token, "batchtopk" k on average over a batch, and is saved as a jumprelu
            of one threshold; "jumprelu" learns thresholds, under a penalty that pulls L0 towards k; "relu" is penalised
            by its activations, so that its L0 follows from the coefficient.
        k: Features per token.
        layer: Layer from 0; None where `data` is a file.
        site: Site of the layer, as `collect_activations` takes it; a file has its own.
        steps: Updates.
        batch_size: Tokens per update.
        learning_rate: Adam's. None takes 2e-4 times sqrt(16384 / d_sae).
        sparsity_coefficient: Weight of relu's and jumprelu's penalty, which rises from 0 for 5 % of the steps.
        buffer_bytes: Activations held for shuffling; data that fit are read only once.
        seed: Of the initial weights and the order of the data.

    Returns:
        Where the SAE is and how training went. The same is in the folder as `training.json`.

    Raises:
        ValueError: An option is out of range, no layer is given or a file and a layer are, the loss or a weight is no
            longer finite (nothing is saved then, and an older SAE stays), or what `collect_activations` raises.
        KeyboardInterrupt: Training was stopped; what was trained so far has been saved, with a warning in
            `training.json`.

    Misleads: A low error says nothing about whether features mean anything, and L0 too low makes features mix
    (https://arxiv.org/abs/2508.16560): compare several k. One seed is one of many dictionaries.

    Cost: `steps` times 6 x batch_size x d_in x d_sae multiplications for relu and jumprelu, a third of it for topk and
    batchtopk, and the forwards of the texts; about 8 s for 1,000 steps of 1,024 tokens on the demo model.

    Example:
        ```python
        from itertools import islice
        from tempfile import mkdtemp

        from interp_kernel.demo_model import corpus
        from techniques.sae import train_sae

        texts = [text for _, text in islice(corpus.documents(seed=1), 300)]
        options = dict(layer=1, d_sae=256, k=8, steps=100, batch_size=512, learning_rate=3e-3)
        train_sae(model, tokenizer, texts, mkdtemp(), **options)
        ```
    """
    _check_options(kind, d_sae, k, steps, batch_size)
    generator = torch.Generator().manual_seed(seed)
    point, one_pass = _source(model, tokenizer, data, layer, site, generator)
    batches = shuffled(one_pass, batch_size, buffer_bytes, generator)
    sample = torch.cat([next(batches) for _ in range(4)])
    scale = math.sqrt(sample.shape[1]) / sample.norm(dim=1).mean().item()
    trainer = _trainer(initial_weights(d_sae, kind, sample.mean(0) * scale, generator), kind, k, steps)
    rate = 2e-4 * math.sqrt(2**14 / d_sae) if learning_rate is None else learning_rate
    log, stop = train(trainer, (batch * scale for batch in batches), steps, rate, sparsity_coefficient)

    sae = _check_weights(_finished(trainer, scale, _metadata(model, point, kind, len(log))))
    curve = _curve(log, scale**2 * sample.var(0, correction=0).sum().item())
    folder = save_sae(sae, path)
    result = TrainedSAE(
        **header(model, "train_sae", n=len(log) * batch_size, seed=seed, warnings=_warnings(curve, len(log), steps)),
        path=str(folder),
        hook_name=str(point),
        kind=kind,
        d_in=sample.shape[1],
        d_sae=d_sae,
        k=k,
        steps=len(log),
        batch_size=batch_size,
        learning_rate=rate,
        sparsity_coefficient=0.0 if kind in CHOOSING else sparsity_coefficient,
        scale=number(scale),
        dead_window=trainer.dead_window,
        curve=curve,
    )
    (folder / LOG).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if stop is not None:
        raise stop
    return result


def _check_options(kind: str, d_sae: int, k: int, steps: int, batch_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is {k}; expected 1 to {d_sae}, the number of features.")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size is {batch_size}; expected at least 1 of each.")


def _point(model: PreTrainedModel, site: str, layer: int | None) -> HookPoint:
    point = hook_point(site, layer)
    if point.site == "pattern":
        raise ValueError("The site 'pattern' has no vector per token; expected another site, such as resid_post.")
    find_site(find_decoder(model), point)
    return point


def _source(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str] | ActivationFile,
    layer: int | None,
    site: str,
    generator: torch.Generator,
) -> tuple[HookPoint, Callable[[], Iterator[Tensor]]]:
    """Where the activations come from, and a function that reads them once."""
    if not isinstance(data, Mapping):
        check_lists(data=data)
        point = _point(model, site, layer)
        corpus = read_corpus(model, tokenizer, data)
        return point, lambda: model_pass(model, corpus, point, generator)
    if layer is not None:
        raise ValueError(
            f"layer is {layer}, but the data are a file of {data['hook_name']}; expected no layer with a file. "
            "Leave layer out."
        )
    point = hook_point(data["hook_name"])
    device = next(find_decoder(model).blocks[point.layer].parameters()).device
    return point, lambda: (part.to(device) for part in file_pass(data["file"]["path"], generator))


def _trainer(weights: Weights, kind: str, k: int, steps: int) -> Trainer:
    dead_window = max(25, min(1000, steps // 10))
    return Trainer(weights, kind, k, dead_window, AUX_COEFFICIENT if kind in CHOOSING else LACK_COEFFICIENT)


def _check_weights(sae: SAE) -> SAE:
    """The SAE, if its last update left only numbers in it."""
    parts = (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, sae.threshold)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise ValueError(
            "The trained weights are not all finite; expected numbers. Nothing was saved. Lower learning_rate."
        )
    return sae


def _warnings(curve: Sequence[TrainingPoint], n_steps: int, steps: int) -> list[str]:
    warnings = [] if n_steps == steps else [f"Training was stopped after {n_steps} of {steps} steps."]
    explained = curve[-1]["explained_variance"]
    if explained is not None and explained < 0:
        warnings.append(
            f"The SAE explains {explained:.3g} of the variance, less than the mean activation does; expected above 0. "
            "Lower learning_rate, or train for more steps."
        )
    return warnings


def _finished(trainer: Trainer, scale: float, metadata: dict[str, Any]) -> SAE:
    """The SAE for activations in the model's own units."""
    sae = trainer.result()
    in_units = replace(sae, w_enc=sae.w_enc * scale, w_dec=sae.w_dec / scale, b_dec=sae.b_dec / scale)
    return replace(in_units.unit_rows(), metadata=metadata)


def _metadata(model: PreTrainedModel, point: HookPoint, kind: str, steps: int) -> dict[str, Any]:
    return {
        "model_name": str(model.config.name_or_path or type(model).__name__),
        "hook_name": str(point),
        "hook_head_index": None,
        "prepend_bos": False,
        "training_architecture": "standard" if kind == "relu" else kind,
        "training_steps": steps,
    }


def _curve(log: Sequence[tuple[Losses, int]], variance: float) -> list[TrainingPoint]:
    """Means over up to CURVE_POINTS stretches of equal length."""
    size = max(1, len(log) // CURVE_POINTS)
    points = []
    for end in range(size, len(log) + 1, size):
        part = [losses for losses, _ in log[end - size : end]]
        mse, sparsity, dead, l0 = (sum(values) / size for values in zip(*part, strict=True))
        points.append(
            TrainingPoint(
                step=end,
                mse=number(mse),
                explained_variance=number(1 - mse / variance),
                l0=number(l0),
                sparsity_loss=number(sparsity),
                dead_loss=number(dead),
                dead=log[end - 1][1],
            )
        )
    return points
