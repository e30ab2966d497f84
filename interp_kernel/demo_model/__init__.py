"""The embedded model: a trained GPT-2 of 1 M parameters whose right answers are known. README.md is its card."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Folder of weights, tokenizer and chat template, as `from_pretrained` takes it."""
    return Path(__file__).with_name("weights")
