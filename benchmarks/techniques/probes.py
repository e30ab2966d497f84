"""Probes beside scikit-learn, and activations beside plain transformers and nnsight, at the shape of gpt2-small.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.techniques.probes [--layers 12] [--texts 2000] [--sets 101]

Needs scikit-learn; nnsight is measured where it is installed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Figure, Section, interleaved, median, scaled
from techniques._activations import Reading, activations_at, points_of
from techniques._folds import Scale, fit, one_vs_rest
from techniques._tokens import Batch

POSITIONS = 16  # tokens of a text that is probed
BATCH, LENGTH, MIDDLE = 8, 128, 6  # of the collection: texts, their tokens, and the layer that is wanted
ROUNDS = 5


def main() -> None:
    """Measure both and print them; exit with 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--sets", type=int, default=101, help="label sets: the true one and its shuffles")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    model.eval()
    sections = [measure_probe(model, options.layers, options.texts, options.sets), measure_collection(model)]
    print("\n\n".join(section.text() for section in sections))
    raise SystemExit(not all(figure.holds for section in sections for figure in section.figures))


def measure_probe(model: Any, n_layers: int, n: int, n_sets: int) -> Section:
    """One split, 80 % to fit: every layer, every label set."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, labels = task(model, n_layers, n, n_sets)
    test = torch.arange(n) % 5 == 0
    train = ~test
    chosen: dict[str, list[Any]] = {}

    def ours() -> None:
        chosen["ours"] = [fit_and_score(x[:, layer], labels, train, test) > 0 for layer in range(n_layers)]

    def peer() -> None:
        kept = []
        for layer in range(n_layers):
            scaler = StandardScaler().fit(x[train, layer].numpy())
            fitted, tested = (scaler.transform(x[part, layer].numpy()) for part in (train, test))
            columns = [LogisticRegression(max_iter=1000).fit(fitted, labels[train, i].numpy()) for i in range(n_sets)]
            kept.append(torch.stack([torch.tensor(column.predict(tested) > 0) for column in columns], 1))
        chosen["scikit-learn"] = kept

    samples = interleaved({"ours": ours, "scikit-learn": peer}, rounds=1)
    ratio = median(samples["scikit-learn"]) / median(samples["ours"])
    accuracy = {name: torch.stack(kept).eq(labels[test] > 0).float().mean((0, 1)) for name, kept in chosen.items()}
    true = {name: float(values[0]) for name, values in accuracy.items()}
    gap = float((accuracy["ours"].mean() - accuracy["scikit-learn"].mean()).abs())
    return Section(
        "Probes of many label sets",
        f"{n_layers} layers of width {x.shape[-1]}, {int(train.sum())} texts to fit and {int(test.sum())} to test, "
        f"{n_sets} label sets, float32: scaling, fitting and predicting. scikit-learn loops over layers and label sets "
        "with its default solver and tolerance.",
        "s",
        samples,
        [
            Figure("scikit-learn / ours", ratio, 10, "times", at_least=True),
            Figure("difference in accuracy of the true labels", abs(true["ours"] - true["scikit-learn"]), 0.01, ""),
            Figure("difference in mean accuracy of all label sets", gap, 0.005, ""),
        ],
        [f"Accuracy of the true labels: {true['ours']:.4f} ours, {true['scikit-learn']:.4f} scikit-learn's."],
    )


def fit_and_score(x: Any, labels: Any, train: Any, test: Any) -> Any:
    """What `linear_probe` does in one of its folds."""
    scale = Scale(x[train], torch.finfo(torch.float32).eps)
    fitted = fit("logistic", scale(x[train]), one_vs_rest(labels[train], 2).flatten(1), 1.0)
    return fitted.scores(scale(x[test]))


def task(model: Any, n_layers: int, n: int, n_sets: int) -> tuple[Any, Any]:
    """Activations of random texts, and labels: a planted direction with noise, and its shuffles."""
    reading = random_texts(n, POSITIONS)
    x = activations_at(model, reading, points_of(model, "resid_post", range(n_layers)))
    middle = x[:, n_layers // 2]
    planted = (middle - middle.mean(0)) @ torch.randn(x.shape[-1])
    true = planted + planted.std() * torch.randn(n) > 0
    return x, torch.stack([true, *(true[torch.randperm(n)] for _ in range(n_sets - 1))], 1).long()


def random_texts(n: int, length: int) -> Reading:
    ids = torch.randint(GPT2Config().vocab_size, (n, length)).tolist()
    return Reading([""] * n, ids, [(length - 1, length)] * n)


def measure_collection(model: Any) -> Section:
    """The last token's resid_post in the middle of the model."""
    reading = random_texts(BATCH, LENGTH)
    points = points_of(model, "resid_post", [MIDDLE])
    batch = Batch(torch.tensor(reading.ids), torch.ones(BATCH, LENGTH, dtype=torch.long))

    def plain() -> Any:
        with torch.no_grad():
            return model(batch.input_ids, output_hidden_states=True, use_cache=False).hidden_states[MIDDLE + 1][:, -1]

    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: activations_at(model, reading, points)[:, 0],
        "output_hidden_states": plain,
        **nnsight_collection(model, batch),
    }
    expected = plain()
    for name, call in contenders.items():
        gap = float((call() - expected).abs().max())
        if gap > 1e-4 * float(expected.abs().max()):
            raise RuntimeError(f"{name} differs by {gap:.3g}.")
    samples = scaled(interleaved(contenders, ROUNDS), 1e3)
    ratio = median(samples["output_hidden_states"]) / median(samples["ours"])
    figures = [Figure("output_hidden_states / ours", ratio, 1.1, "times", at_least=True)]
    if "nnsight, stopped" in samples:
        ratio = median(samples["nnsight, stopped"]) / median(samples["ours"])
        figures.append(Figure("nnsight, stopped / ours", ratio, 0.95, "times", at_least=True))
    return Section(
        "Activations of a middle layer",
        f"resid_post of block {MIDDLE} of 12 at the last of {LENGTH} tokens, {BATCH} texts, float32.",
        "ms",
        samples,
        figures,
    )


def nnsight_collection(model: Any, batch: Batch) -> dict[str, Callable[[], Any]]:
    """nnsight on the same weights, ending its pass after the block; nothing where it is not installed."""
    try:
        from nnsight import NNsight
    except ImportError:
        return {}
    wrapped = NNsight(model)

    def stopped() -> Any:
        with torch.no_grad(), wrapped.trace(batch.input_ids, use_cache=False) as tracer:
            output = wrapped.transformer.h[MIDDLE].output
            found = (output[0] if isinstance(output, tuple) else output)[:, -1].save()
            tracer.stop()
        return found

    return {"nnsight, stopped": stopped}


if __name__ == "__main__":
    main()
