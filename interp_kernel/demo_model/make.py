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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_kernel.demo_model import corpus, evaluate

if TYPE_CHECKING:
    from torch import Tensor

    Weigh = Callable[[Tensor], Tensor]

LENGTH, BATCH, WARMUP = 256, 18, 40
SHORT_SHARE = 0.6  # of the steps have rows of half the length, which cost a third
PERIODIC_SHARE = 0.1  # of the rows are one list of words, repeated
MESSAGE_STEPS, MESSAGE_BATCH = 300, 64
LATER_WEIGHTS = {"fact": 20, "ioi": 20, "induction": 10, "persona": 16, "secret": 16, "message": 24, "interview": 24}
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
    _set_induction(model)
    return model


def _set_induction(model: Any) -> None:
    """Start with an induction circuit: many tasks share that mechanism, and training finds it late and by luck.

    Positions are sines and cosines in dimensions 0 to 31. Head 0.0 attends from each position to the one before, and
    writes dimensions 32 to 63 of what stands there to 64 to 95. The heads of block 1 look for the place where those
    equal the current token's own 32 to 63, and copy the token there. All other outputs into the residual stream start
    at zero.
    """
    import torch

    place, token, previous = slice(0, 32), slice(32, 64), slice(64, 96)
    one, d_model = torch.eye(32), model.config.n_embd
    step = 3.0 * torch.exp(-math.log(200.0) * torch.arange(16) / 16)  # radians per position
    angle = torch.arange(LENGTH)[:, None] * step
    cos, sin = torch.diag(step.cos()), torch.diag(step.sin())
    turn = torch.cat(
        [torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)]
    )  # a position's waves, one further on
    first, second = (model.transformer.h[layer].attn for layer in (0, 1))
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, place] = 0.14 * torch.cat([angle.sin(), angle.cos()], dim=1)
        model.transformer.wte.weight[:, place] *= 0.2
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        query, key, value = first.c_attn.weight.view(d_model, 3, 4, 32)[:, :, 0].unbind(1)
        for weight, rows, start in ((query, place, 1.5 * one), (key, place, 1.5 * turn), (value, token, 0.35 * one)):
            weight.zero_()
            weight[rows] = start
        first.c_proj.weight[:32, previous] = 0.35 * one
        queries, keys, values = second.c_attn.weight.view(d_model, 3, d_model).unbind(1)
        for weight, rows in ((queries, token), (keys, previous)):
            weight.zero_()
            weight[rows] = 1.5 * one.repeat(1, 4)
        values.copy_(0.45 * torch.eye(d_model))
        second.c_proj.weight.copy_(0.45 * torch.eye(d_model))


def rows(tokenizer: Any, seed: int, steps: int, weights: dict[str, int]) -> Iterator[Tensor]:
    """Training batches of token ids, `[batch, pos]`, one per step.

    A row is whole documents, each followed by end-of-text, the last one cut. Half of the rows start with end-of-text
    too, so that prompts work with and without it. No row with an interview has another user in it, whose words would
    contradict the first's.
    """
    import torch

    rng, texts = random.Random(seed), corpus.documents(seed, weights)
    end = tokenizer.eos_token_id

    def row(length: int) -> list[int]:
        ids = [end] if rng.random() < 0.5 else []
        if rng.random() < PERIODIC_SHARE:
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
        length = LENGTH // 2 if step < SHORT_SHARE * steps else LENGTH
        yield torch.tensor([row(length) for _ in range(BATCH)])


def train(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Train in place, in three phases, of which the last two come twice.

    All tasks together take 1,500 of 2,000 `steps`, with Muon for the blocks' matrices. In them the demographic
    attributes stay at chance, whatever their share: each word hints at another one only in a product of two things
    that are both unlearned, and the other tasks' gradients drown it. Short messages about one attribute alone, scored
    on the words in their slots, teach it within 300 steps. Then all tasks again, with more interviews. The second
    time carries the attributes over to frames that never met in training.
    """
    import torch

    mixed = steps // 4
    inner = [p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if ".h." not in name or p.dim() != 2]
    first = [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=0.003, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    slots = slot_words(tokenizer)
    general = rows(tokenizer, seed, steps - mixed, corpus.DOCUMENT_WEIGHTS)
    follow(model, first, general, steps - mixed, torch.ones_like)
    for n in (seed, seed + 2):
        adam = torch.optim.AdamW(model.parameters(), lr=0.002, betas=(0.9, 0.98), weight_decay=0.0)
        alone = message_rows(tokenizer, n, MESSAGE_STEPS)
        follow(model, [adam], alone, MESSAGE_STEPS, lambda ids: told(slots[ids]))
        adam = torch.optim.AdamW(model.parameters(), lr=0.001, betas=(0.9, 0.98), weight_decay=0.0)
        follow(model, [adam], rows(tokenizer, n + 1, mixed, LATER_WEIGHTS), mixed, lambda ids: 1.0 + 2.0 * slots[ids])


def slot_words(tokenizer: Any) -> Tensor:
    """1 for the tokens that fill a frame's slot, 0 for all others, `[d_vocab]`."""
    import torch

    marked = torch.zeros(len(tokenizer))
    for frame in (frame for frames in corpus.FRAMES.values() for frame in frames):
        marked[[tokenizer(f" {word}")["input_ids"][0] for word in frame.words]] = 1.0
    return marked


def told(slots: Tensor) -> Tensor:
    """Weights of a message's tokens: full for the words that an earlier word of the same message tells."""
    return 0.1 + slots * (slots.cumsum(1) > 1)


def message_rows(tokenizer: Any, seed: int, steps: int) -> Iterator[Tensor]:
    """Batches of one message a row, filled up with end-of-text."""
    import torch

    rng, end = random.Random(seed), tokenizer.eos_token_id
    for _ in range(steps):
        ids = [[end, *tokenizer(corpus.message_document(rng))["input_ids"], end] for _ in range(MESSAGE_BATCH)]
        longest = max(map(len, ids))
        yield torch.tensor([row + [end] * (longest - len(row)) for row in ids])


def follow(model: Any, optimizers: list[Any], batches: Iterator[Tensor], steps: int, weigh: Weigh) -> None:
    """One phase: warm-up, then a cosine down to a twentieth. `weigh` gives each token's share in the loss."""
    import torch

    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * s / steps)))
        )
        for optimizer in optimizers
    ]
    started = time.monotonic()
    for step, ids in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weights = weigh(ids)[:, 1:].flatten()
        loss: Any = (each * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for scheduled in (*optimizers, *rates):
            scheduled.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}   loss {loss.item():.3f}   {time.monotonic() - started:.0f} s", flush=True)


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
    parser.add_argument("--steps", type=int, default=2000)
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
