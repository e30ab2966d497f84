"""Make the demo model: `python -m interp_kernel.demo_model.make OUT` writes tokenizer, weights and chat template.

One thread, no data beside corpus.py, the same weights for the same seed on the same machine. Setting
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592` saves time: glibc else gives the big tensors' pages back at
every step. Needs torch 2.9 or later.
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

LENGTH, BATCH, WARMUP = 256, 18, 40
SHORT_SHARE = 0.75  # of the steps have rows of half the length: they cost a third, and circuits form by steps
# Share of rows that are one repeated list, until this share of the steps: induction first, for much is built on it.
PERIODIC = ((0.2, 0.5), (0.5, 0.2), (0.75, 0.1), (1.0, 0.0))
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
    _set_attention(model, config)
    return model


def _set_attention(model: Any, config: Any) -> None:
    """Start with heads that attend to equal tokens and copy, and one that attends to the token before.

    After Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023, https://arxiv.org/abs/2305.09828:
    queries equal keys, outputs are transposed values. Induction then only has to be sharpened, and all copying follows.
    """
    import torch

    d_model, d_head = config.n_embd, config.n_embd // config.n_head
    basis = torch.linalg.qr(torch.randn(d_model, d_model))[0]
    step = 3.0 * torch.exp(-math.log(200.0) * torch.arange(d_model // 2) / (d_model // 2))  # radians per position
    angle = torch.arange(LENGTH)[:, None] * step
    with torch.no_grad():
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        model.transformer.wpe.weight.copy_(config.initializer_range * math.sqrt(2) * waves)
        for block in model.transformer.h:
            block.attn.c_attn.weight.copy_(torch.cat([1.5 * basis, 1.5 * basis, 0.27 * basis], dim=1))
            block.attn.c_proj.weight.copy_(0.27 * basis.T)
        # Sines and cosines of the fastest waves as query; as key, the same turned on by one position.
        first = model.transformer.h[0].attn.c_attn.weight
        first[:, :d_head] = first[:, d_model : d_model + d_head] = 0
        for i in range(0, d_head, 2):
            sine, cosine, turn = i, d_model // 2 + i, step[i]
            first[sine, i] = first[cosine, i + 1] = 1.5
            first[sine, d_model + i] = first[cosine, d_model + i + 1] = 1.5 * turn.cos()
            first[cosine, d_model + i] = 1.5 * turn.sin()
            first[sine, d_model + i + 1] = -1.5 * turn.sin()


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
    """Train in place: Muon for the blocks' matrices, AdamW for the rest; warm-up, then a cosine down to a twentieth."""
    import torch

    inner = [p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if ".h." not in name or p.dim() != 2]
    optimizers = [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * s / steps)))
        )
        for optimizer in optimizers
    ]
    started = time.monotonic()
    for step, ids in enumerate(rows(tokenizer, seed, steps)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        loss: Any = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for scheduled in (*optimizers, *rates):
            scheduled.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}   loss {loss.item():.3f}   {time.monotonic() - started:.0f} s", flush=True)
        if step % 200 == 199:
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
    parser.add_argument("--steps", type=int, default=2400)
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
