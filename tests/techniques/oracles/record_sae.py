"""Record what SAELens computes, for `test_sae*.py`.

    PYTHONPATH=. python tests/techniques/oracles/record_sae.py

runs with SAELens 6.54.12, TransformerLens 3.9.0, transformers 5.23 and torch 2.13. It writes `sae.npz` and two folders
as SAELens saves them, and checks that SAELens reads what `save_sae` writes.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sae_lens import SAE as LensSAE  # noqa: N811 - two libraries call it so
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model
from interp_kernel.demo_model import corpus
from techniques._sae import load_sae, save_sae
from techniques.sae import train_sae

HERE = Path(__file__).parent
D_IN, D_SAE, K, BATCH, STEPS, RATE, WINDOW = 12, 48, 4, 64, 15, 3e-3, 2
SAES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
    "jumprelu": (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {
            "l0_coefficient": 0.3,
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": K,
            "pre_act_loss_coefficient": 0.05,
        },
    ),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 0.4}),
}


def batches() -> torch.Tensor:
    """Sparse combinations of planted directions off the origin: [STEPS, BATCH, D_IN]."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(30, D_IN, generator=generator)
    present = torch.rand(STEPS * BATCH, 30, generator=generator)
    return (torch.where(present < 0.1, present * 20, 0.0) @ directions + 1.0).view(STEPS, BATCH, D_IN)


def record_training(kind: str, data: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters before and after STEPS steps of SAELens' trainer, its losses, and its threshold."""
    make, configure, options = SAES[kind]
    torch.manual_seed(0)
    sae = make(configure(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(model_name="none", hook_name="none"), **options))
    with torch.no_grad():
        sae.W_dec *= torch.rand(D_SAE, 1) + 0.5
        sae.b_enc -= torch.rand(D_SAE) * 8 * (torch.arange(D_SAE) % 3 == 0)
    trainer = SAETrainer(
        sae=sae,
        data_provider=iter(data),
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=STEPS * BATCH,
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
            train_batch_size_samples=BATCH,
            dead_feature_window=WINDOW,
            feature_sampling_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
        ),
    )
    found = {f"{kind}/before/{name}": value.detach().numpy().copy() for name, value in sae.named_parameters()}
    losses = []
    for batch in data:
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        rest = sum(value.item() for name, value in output.losses.items() if name != "mse_loss")
        losses.append([output.losses["mse_loss"].item(), rest])
    found |= {f"{kind}/after/{name}": value.detach().numpy().copy() for name, value in sae.named_parameters()}
    found[f"{kind}/losses"] = np.array(losses)
    if kind == "batchtopk":
        found[f"{kind}/threshold"] = sae.topk_threshold.numpy().copy()
    if kind in ("topk", "batchtopk"):
        sae.save_inference_model(HERE / f"sae_lens_{kind}")
        read = LensSAE.load_from_disk(HERE / f"sae_lens_{kind}")
        with torch.no_grad():
            features = read.encode(data[0])
            found |= {f"{kind}/encoded": features.numpy(), f"{kind}/decoded": read.decode(features).numpy()}
    return found


class Store:
    """What SAELens' evaluation asks of its activation store: one batch of tokens, again and again."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.store_batch_size_prompts, self.context_size = tokens.shape

    def get_batch_tokens(self, _: int) -> torch.Tensor:
        return self.tokens

    def reset_input_dataset(self) -> None:
        pass


def hooked(model: Any, tokenizer: Any) -> HookedTransformer:
    """The demo model as SAELens' evaluation wants it."""
    config = model.config
    hooked_config = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    twin = HookedTransformer(hooked_config, tokenizer=tokenizer)
    twin.load_state_dict(convert_gpt2_weights(model, hooked_config), strict=False)
    return twin


def record_evaluation(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """SAELens' metrics of a small SAE of the demo model, on texts that begin with a special token."""
    model = cast(Any, AutoModelForCausalLM).from_pretrained(demo_model.path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model.path())
    documents = [text for _, text in itertools.islice(corpus.documents(1), 300)]
    trained = train_sae(
        model, tokenizer, documents, folder / "sae", layer=1, d_sae=96, k=6, kind="batchtopk", steps=400, batch_size=512
    )
    texts = []
    for _, document in itertools.islice(corpus.documents(2), 60):
        ids = tokenizer("<|endoftext|>" + document)["input_ids"][:20]
        text = tokenizer.decode(ids)
        if len(ids) == 20 and tokenizer(text)["input_ids"] == ids:
            texts.append(text)
    tokens = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    twin = hooked(model, tokenizer)
    with torch.no_grad():
        assert (twin(tokens) - model(tokens).logits).abs().max() < 1e-3
    ours, theirs = load_sae(trained["path"]), LensSAE.load_from_disk(trained["path"])
    check_reading(ours, theirs)
    config = get_eval_everything_config(batch_size_prompts=len(texts), n_eval_reconstruction_batches=1)
    metrics, by_feature = run_evals(theirs, Store(tokens), twin, ActivationScaler(), config)
    flat = {name: value for group in metrics.values() for name, value in group.items()}
    found = {f"metrics/{name}": np.array(value) for name, value in flat.items() if isinstance(value, float)}
    found["metrics/feature_density"] = np.array(by_feature["feature_density"])
    for name, value in ours._tensors().items():
        found[f"sae/{name}"] = value.numpy()
    return found | {"texts": np.array(texts)}


def check_reading(ours: Any, theirs: Any) -> None:
    """SAELens reads our folder as the same function, whatever the architecture."""
    x = torch.randn(50, ours.d_in) * 8
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        for kind in ("topk", "relu"):
            like = {"architecture": "topk", "k": 3} if kind == "topk" else {"architecture": "standard"}
            other = replace(ours, threshold=None, **like)
            read = LensSAE.load_from_disk(save_sae(other, Path(folder) / kind))
            torch.testing.assert_close(other.decode(other.encode(x)), read(x))


def main() -> None:
    """Write the fixtures."""
    data = batches()
    found = {"batches": data.numpy()}
    for kind in SAES:
        found |= record_training(kind, data)
    with tempfile.TemporaryDirectory() as folder:
        found |= record_evaluation(Path(folder))
    np.savez_compressed(HERE / "sae.npz", **cast(Any, found))


if __name__ == "__main__":
    main()
