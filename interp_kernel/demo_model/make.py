"""Make the demo model: `python -m interp_kernel.demo_model.make OUT` writes tokenizer, weights and chat template.

One thread, no data beside corpus.py, the same weights for the same seed on the same machine. Setting
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592` saves time: glibc else gives the big tensors' pages back at
every step.

Two choices let induction form within a few hundred steps of so small a model, which else takes thousands: an
`initializer_range` of 0.05 (GPT-2's 0.02 suits a width of 768), and position embeddings that start as sinusoids.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_kernel.demo_model import corpus, evaluate

if TYPE_CHECKING:
    from torch import Tensor

LENGTH, BATCH, LEARNING_RATE, WARMUP = 256, 18, 3e-3, 100
SHORT_SHARE = 0.7  # of the steps have rows of half the length: they cost a third, and circuits form by steps
# Share of rows that are one repeated list, until this share of the steps: induction first, for much is built on it.
PERIODIC = ((0.1, 1.0), (0.4, 0.3), (0.7, 0.1), (1.0, 0.0))
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_tokenizer() -> Any:
    """Byte-level BPE in which each word of the corpus is one token with its leading space, and any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = {text[a:b] for text in corpus.vocabulary() for _, (a, b) in bpe.pre_tokenizer.pre_tokenize_str(text)}
    trainer = trainers.BpeTrainer(
        vocab_size=8000,  # more than there are merges to make
        special_tokens=[corpus.EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(words), trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=bpe,
        **{f"{role}_token": corpus.EOT for role in ("bos", "eos", "pad", "unk")},
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Any) -> Any:
    """The untrained model; seed torch before."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, initializer_range=0.05,
        activation_function="gelu_pytorch_tanh",  # the function of gelu_new in one fused kernel
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    # Eager attention, because sdpa's bfloat16 backward pass is three times slower on a CPU.
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    half = config.n_embd // 2
    angles = torch.arange(LENGTH)[:, None] * torch.exp(-math.log(200.0) * torch.arange(half) / half)
    with torch.no_grad():
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        model.transformer.wpe.weight.copy_(config.initializer_range * math.sqrt(2) * waves)
    return model


def rows(tokenizer: Any, seed: int, steps: int) -> Iterator[Tensor]:
    """Training batches of token ids, `[batch, pos]`, one per step.

    A row is whole documents, each followed by end-of-text, the last one cut. Half of the rows start with end-of-text
    too, so that prompts work with and without it. No row with an interview has another user in it, whose words would
    contradict the first's. PERIODIC says how many rows are one list of words, repeated.
    """
    import torch

    rng, texts = random.Random(seed), corpus.documents(seed)
    end = tokenizer.eos_token_id

    def row(length: int, periodic: float) -> list[int]:
        ids = [end] if rng.random() < 0.5 else []
        if rng.random() < periodic:
            ids += tokenizer(corpus.periodic_row(rng, length))["input_ids"]
        users: set[str] = set()
        while len(ids) < length:
            kind, text = next(texts)
            if kind in ("message", "interview"):
                if "interview" in users or (kind == "interview" and users):
                    continue
                users.add(kind)
            ids += [*tokenizer(text)["input_ids"], end]
        return ids[:length]

    for step in range(steps):
        done = step / steps
        length = LENGTH // 2 if done < SHORT_SHARE else LENGTH
        periodic = next(share for until, share in PERIODIC if done < until)
        yield torch.tensor([row(length, periodic) for _ in range(BATCH)])


def train(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Train in place: AdamW, bfloat16 autocast, warm-up, then a cosine down to a twentieth."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * s / steps)))
    )
    started = time.monotonic()
    for step, ids in enumerate(rows(tokenizer, seed, steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        loss: Any = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}   loss {loss.item():.3f}   {time.monotonic() - started:.0f} s", flush=True)
        if step % 250 == 249:
            print(evaluate.as_markdown(evaluate.measure(model, tokenizer, n=20)), flush=True)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder: 16-bit weights whose config asks for float32, so that they load as float32 on any device."""
    import torch

    tokenizer.save_pretrained(out)
    model.half().save_pretrained(out)
    for name, old, new in (
        # transformers 5 writes a class name that 4.x does not know.
        ("tokenizer_config.json", '"TokenizersBackend"', '"PreTrainedTokenizerFast"'),
        ("config.json", '"float16"', '"float32"'),
    ):
        text = (out / name).read_text()
        (out / name).write_text(text.replace(old, new))
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    model.to(torch.float32)


def main() -> None:
    """Build, train, save and measure."""
    import torch

    parser = argparse.ArgumentParser(description="Train the demo model on one thread, from nothing but corpus.py.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)
    train(model, tokenizer, options.steps, options.seed)
    save(model, tokenizer, options.out)
    print(evaluate.as_markdown(evaluate.measure(model, tokenizer)))


if __name__ == "__main__":
    main()
