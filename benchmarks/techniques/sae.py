"""Training steps of sparse autoencoders beside SAELens, at the width of gpt2-small.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.techniques.sae [--features 3072 16384] [--batch 4096]

Needs SAELens 6.54.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from benchmarks.measure import Figure, Section, interleaved, median
from techniques._sae_training import Trainer, Weights

D_IN, K, RATE, SAME_STEPS = 768, 32, 3e-4, 3
TARGETS: dict[str, dict[int, float]] = {
    "topk": {3072: 4.0, 16384: 6.0},
    "batchtopk": {3072: 4.0, 16384: 6.0},
    "relu": {},
}


def main() -> None:
    """Measure every kind and size and print them; exit with 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[3072, 16384])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    held = True
    for d_sae in options.features:
        for kind in TARGETS:
            section = measure_kind(kind, d_sae, options.batch, options.rounds)
            print(section.text(), end="\n\n", flush=True)
            held &= all(figure.holds for figure in section.figures)
    raise SystemExit(not held)


def measure_kind(kind: str, d_sae: int, batch: int, rounds: int) -> Section:
    """Seconds per step of both trainers from the same weights on the same batches; their losses are compared first."""
    data = planted(batch)
    theirs, weights = peer(kind, d_sae, batch)
    ours = Trainer(weights, kind, K, dead_window=1000, dead_coefficient=1.0 if kind != "relu" else 0.0)
    coefficient = 1.0 if kind == "relu" else 0.0
    gaps = []
    for x in (data[i % len(data)] for i in range(SAME_STEPS)):
        mine, other = ours.step(x, RATE, coefficient), theirs.step(x)
        theirs.n_training_steps += 1
        gaps.append(abs(mine.mse + mine.sparsity - other.loss.item()) / other.loss.item())
    # The batch that a contender gets next does not matter: steps take the same time on all.
    samples = interleaved(
        {"ours": lambda: ours.step(data[0], RATE, coefficient), "SAELens": lambda: theirs.step(data[0])},
        rounds,
        block=2,
    )
    speeds = {name: batch / median(times) for name, times in samples.items()}
    target = TARGETS[kind].get(d_sae, 1.4)
    return Section(
        f"A training step: {kind}, {d_sae} features",
        f"d_in {D_IN}, batch {batch}, k {K}, float32, {torch.get_num_threads()} thread(s).",
        "s",
        samples,
        [
            Figure("SAELens / ours", speeds["ours"] / speeds["SAELens"], target, "times", at_least=True),
            Figure(f"relative difference of the losses in {SAME_STEPS} steps", max(gaps), 1e-4, ""),
        ],
        [f"Tokens per second: {speeds['ours']:,.0f}; SAELens: {speeds['SAELens']:,.0f}."],
    )


def planted(batch: int) -> list[torch.Tensor]:
    """Two batches of sparse combinations of 2,048 directions with noise, of mean norm sqrt(D_IN)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2048, D_IN, generator=generator), dim=1)
    found = []
    for _ in range(2):
        present = torch.rand(batch, 2048, generator=generator)
        x = torch.where(present < 0.01, 1 + 100 * present, 0.0) @ directions
        x += 0.1 * torch.randn(batch, D_IN, generator=generator)
        found.append(x * (D_IN**0.5 / x.norm(dim=1).mean()))
    return found


def peer(kind: str, d_sae: int, batch: int) -> tuple[Any, Weights]:
    """SAELens' trainer with its defaults, and a copy of its weights."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    known: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 1.0}),
    }
    make, configure, options = known[kind]
    torch.manual_seed(0)
    sae = make(configure(d_in=D_IN, d_sae=d_sae, **options))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device="cpu",
        autocast=False,
        lr=RATE,
        lr_end=RATE,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=1000,
        feature_sampling_window=10**6,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with torch.no_grad():
        parts = (sae.W_enc.T.contiguous().clone(), sae.b_enc.clone(), sae.W_dec.clone(), sae.b_dec.clone())
    return SAETrainer(sae=sae, data_provider=iter([]), cfg=config), Weights(*parts)


if __name__ == "__main__":
    main()
