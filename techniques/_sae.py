"""A sparse autoencoder: its parameters, its arithmetic and its folder, in the format of SAELens.

Source of the format: SAELens 6 (`SAE.load_from_disk`), https://github.com/decoderesearch/SAELens
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FORMAT = "6.54.12"  # version of SAELens whose format is written; without one it takes a folder for an older one
ARCHITECTURES = ("standard", "topk", "jumprelu")


@dataclass(frozen=True)
class SAE:
    """A trained sparse autoencoder; its decoder rows are unit vectors if it was trained here.

    Attributes:
        architecture: "standard" (ReLU), "topk" or "jumprelu".
        w_enc, b_enc: Activations minus b_dec -> pre-activations of the features.
        w_dec, b_dec: Features -> activations; row i of w_dec is what feature i writes.
        threshold: What a pre-activation has to exceed to pass, for jumprelu alone.
        k: How many features a token keeps, for topk alone.
        subtracts_b_dec: Whether b_dec is taken off before encoding.
        metadata: What it was trained on: `model_name`, `hook_name` and more, as SAELens names them.
    """

    architecture: str
    w_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    subtracts_b_dec: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.w_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.w_dec.shape[0]

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Activations of all features, most of them 0, in the SAE's dtype."""
        x = x.to(self.w_enc)
        pre = (x - self.b_dec if self.subtracts_b_dec else x) @ self.w_enc + self.b_enc
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        if self.k is None:
            return pre.relu()
        top = pre.topk(self.k, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    def decode(self, features: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_in"]:
        """What the features together say that the activations are."""
        return features @ self.w_dec + self.b_dec

    def to(self, device: torch.device) -> SAE:
        """The same SAE on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def unit_rows(self) -> SAE:
        """Decoder rows of norm 1, so that activations of different features compare; the rest scaled to match.

        It is the same function, except that topk then chooses by activation times norm. A row of zeros stays.
        """
        norms = self.w_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        return replace(
            self,
            w_enc=self.w_enc * norms,
            b_enc=self.b_enc * norms,
            w_dec=self.w_dec / norms[:, None],
            threshold=None if self.threshold is None else self.threshold * norms,
        )

    def _tensors(self) -> dict[str, Tensor]:
        threshold = {} if self.threshold is None else {"threshold": self.threshold}
        return {"w_enc": self.w_enc, "b_enc": self.b_enc, "w_dec": self.w_dec, "b_dec": self.b_dec, **threshold}


def save_sae(sae: SAE, path: str | Path) -> Path:
    """Write an SAE as SAELens writes one: a folder with `sae_weights.safetensors` and `cfg.json`.

    Args:
        sae: The SAE.
        path: The folder; it is made if it is missing, and an SAE in it is replaced.

    Returns:
        The folder, absolute. `sae_lens.SAE.load_from_disk` reads it, as does `load_sae`.
    """
    folder = Path(path).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    tensors = {names.get(name, name): tensor.cpu().contiguous() for name, tensor in sae._tensors().items()}
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts_b_dec,
        "normalize_activations": "none",
        # Heads come side by side, as they do here; SAELens puts them so for z alone.
        "reshape_activations": "hook_z" if str(sae.metadata.get("hook_name")).endswith("hook_z") else "none",
        "metadata": {"sae_lens_version": FORMAT} | sae.metadata,
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def load_sae(path: str | Path) -> SAE:
    """Read an SAE from a folder that `save_sae` or SAELens wrote.

    Args:
        path: The folder with `sae_weights.safetensors` and `cfg.json`.

    Returns:
        The SAE on the CPU, in the dtype of its file.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The architecture or one of its settings is not supported, a tensor is missing or has another
            shape than the configuration says, or a number is not finite.
    """
    folder = Path(path)
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no {' and no '.join(missing)}; expected an SAE in SAELens' format. "
            "Give the folder that train_sae or SAELens' save_model wrote."
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _check_config(config)
    tensors = load_file(folder / WEIGHTS)
    _check_tensors(config, tensors)
    is_topk = config["architecture"] == "topk"
    sae = SAE(
        architecture=config["architecture"],
        w_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        w_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold"),
        k=int(config["k"]) if is_topk else None,
        subtracts_b_dec=config.get("apply_b_dec_to_input", True),
        metadata=config["metadata"],
    )
    return sae.unit_rows() if is_topk and config.get("rescale_acts_by_decoder_norm", False) else sae


def _check_config(config: dict[str, Any]) -> None:
    if "metadata" not in config:
        raise ValueError(
            "The SAE's cfg.json has no metadata; expected the format of SAELens 6 or later. Load it with SAELens and "
            "save it again."
        )
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The SAE's architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}. "
            "Save a batchtopk SAE for inference, which makes it a jumprelu."
        )
    scaling = config.get("normalize_activations", "none")
    if scaling != "none":
        raise ValueError(
            f"The SAE's normalize_activations is {scaling!r}; expected 'none'. Fold the scaling into its weights "
            "before saving it, as SAELens does at the end of training."
        )


def _check_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config["architecture"] == "jumprelu":
        shapes["threshold"] = (d_sae,)
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(
                f"The SAE's {name} is {found}; expected the shape {shape}. Its files do not belong together."
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"The SAE's {name} has numbers that are not finite; expected none. Train it again.")
