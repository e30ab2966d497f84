"""Compile a RASP program with Tracr and record its weights: needs tracr-pypi, which needs jax.

    PYTHONPATH=. python tests/techniques/oracles/record_tracr.py

Writes tracr.npz beside this file. The program looks up the token two places back in a table. Its circuit is known: a
head of layer 0 copies the previous token, a head of layer 1 copies what that one left at the previous position, the MLP
after it looks up the table. It runs causally.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tracr.compiler import compiling  # type: ignore[import-not-found]
from tracr.rasp import rasp  # type: ignore[import-not-found]

TABLE = {"a": "b", "b": "d", "c": "a", "d": "c"}
BOS = "BOS"
N_POSITIONS = 8
PROMPTS = (("a", "b", "c", "d", "a"), ("d", "d", "b", "a", "c", "c"), ("c", "a", "b"))


def program() -> Any:
    """TABLE[token two places back]."""
    is_previous = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1)
    once = rasp.Aggregate(is_previous, rasp.tokens).named("once")
    twice = rasp.Aggregate(is_previous, once).named("twice")
    return rasp.Map(lambda token: TABLE.get(token, "a"), twice).named("answer")


def main() -> None:
    model = compiling.compile_rasp_to_model(
        program(), vocab=set(TABLE), max_seq_len=N_POSITIONS, compiler_bos=BOS, causal=True
    )
    ids: dict[str, int] = model.input_encoder.encoding_map
    weights: Any = {
        f"{name}/{key}": np.asarray(array) for name, group in model.params.items() for key, array in group.items()
    }
    config = model.model_config
    np.savez_compressed(
        Path(__file__).with_name("tracr.npz"),
        features=np.array(model.residual_labels),
        tokens=np.array(sorted(ids, key=lambda token: ids[token])),
        sizes=np.array([config.num_layers, config.num_heads, config.key_size, config.mlp_hidden_size]),
        prompts=np.array([" ".join([BOS, *prompt]) for prompt in PROMPTS]),
        outputs=np.array([" ".join(model.apply([BOS, *prompt]).decoded) for prompt in PROMPTS]),
        **weights,
    )


if __name__ == "__main__":
    main()
