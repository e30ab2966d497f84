"""The benchmark of larger shapes, at a tiny one: a session with a GPU has no time to find it broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.techniques import shapes

LLAMA: Any = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_runs(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "llama":
        monkeypatch.setitem(shapes.SHAPES, "tiny", lambda: LlamaConfig(**LLAMA))
    monkeypatch.setattr(shapes, "ROUNDS", 2)
    monkeypatch.setitem(shapes.GEMM, "cpu", (64, 64, 64))
    given = shapes.task("tiny", "cpu", dtype, 8)
    assert next(given.model.parameters()).dtype == dtype
    for part in (shapes.residual, shapes.heads, shapes.gradients, shapes.hooks):
        section = part(given, "tiny")
        assert all(min(times) > 0 for times in section.samples.values())
        assert section.figures[0].value > 0
        assert "TFLOP/s" in section.notes[0]


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = shapes.task("tiny", "cpu", torch.float32, 8)
    module: Any = shapes
    right = module.ours_heads
    monkeypatch.setattr(shapes, "ours_heads", lambda given, cells: right(given, cells) + 1)
    with pytest.raises(RuntimeError, match="A cell by hand differs from ours by 1 nats"):
        shapes.heads(given, "tiny")
