"""Record TransformerLens' attention patterns, head scores and knockouts of the demo model: needs transformer-lens 4.3.

    PYTHONPATH=. python tests/techniques/oracles/record_attention.py

Writes attention.npz beside this file: patterns of one prompt, `detect_head` on one repeated list, and logits after
scores were set to minus infinity by a hook before the softmax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model

PROMPT = "The Eiffel Tower is located in the city of"
KEYS = (1, 2)  # " Eiffel Tower"
ANSWERS = (" Paris", " Rome")
WORDS = " river stone cloud metal paper candle mirror bottle"
JOBS = ("previous_token_head", "duplicate_token_head", "induction_head")


def main() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model.path())
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype=torch.float32)
    bridge: Any = TransformerBridge.boot_transformers("gpt2", hf_model=model.eval(), tokenizer=tokenizer)
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"][0].float().numpy() for layer in range(4)]
    bridge.cfg.default_prepend_bos = False
    with torch.no_grad():
        scores = {job: detect_head(bridge, WORDS * 2, job).numpy() for job in JOBS}
    assert len(tokenizer(WORDS * 2)["input_ids"]) == bridge.to_tokens(WORDS * 2).shape[1]
    np.savez_compressed(
        Path(__file__).with_name("attention.npz"),
        patterns=np.stack(patterns),
        knocked_out=np.array(
            [[cut(bridge, tokenizer, tokens, layer, head) for head in range(4)] for layer in range(4)]
        ),
        **scores,
    )


def cut(bridge: Any, tokenizer: Any, tokens: torch.Tensor, layer: int, head: int) -> float:
    """logit(answer) - logit(wrong) with the last token's scores to KEYS at minus infinity in one head."""

    def hide(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores[:, head, -1, list(KEYS)] = -torch.inf
        return scores

    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", hide)])
    right, wrong = (tokenizer(answer)["input_ids"][0] for answer in ANSWERS)
    return float(logits[0, -1, right] - logits[0, -1, wrong])


if __name__ == "__main__":
    main()
