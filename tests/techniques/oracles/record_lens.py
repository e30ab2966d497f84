"""Record TransformerLens' logit lens of the demo model: run in an environment with transformer-lens 4.3.

    PYTHONPATH=. python tests/techniques/oracles/record_lens.py

Writes lens.npz beside this file: the log-probabilities of some tokens and the entropy at every depth and position of
two prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_lens
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model

PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "When Mary and John went to the store, John gave a drink to",
)
TOKENS = (" Paris", " Rome", " Mary", " John")


def main() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model.path())
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model.eval(), tokenizer=tokenizer)
    ids = [tokenizer(token)["input_ids"][0] for token in TOKENS]
    arrays: dict[str, Any] = {"token_ids": np.array(ids)}
    for i, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            lens = logit_lens(bridge, tokens, positions=None, return_type="logits")
        logprobs = lens.values[:, 0].double().log_softmax(-1)  # [depth pos d_vocab]
        arrays[f"logprobs_{i}"] = logprobs[..., ids].float().numpy()
        arrays[f"entropy_{i}"] = -(logprobs.exp() * logprobs).sum(-1).float().numpy()
    np.savez_compressed(Path(__file__).with_name("lens.npz"), **arrays)


if __name__ == "__main__":
    main()
