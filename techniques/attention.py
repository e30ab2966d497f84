"""Attention: what each head looks at, and which heads do a known job.

Sources: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021),
https://transformer-circuits.pub/2021/framework, and Olsson et al., "In-context Learning and Induction Heads" (2022),
https://arxiv.org/abs/2209.11895
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._attention import Score, choose, score
from techniques._batches import in_batches
from techniques._hooks import HookPoint, check_sites, record, run
from techniques._results import ArrayFile, Header, check_file, few, header, number, numbers, save_arrays
from techniques._tokens import check_context, check_lists, encode, pad, single_token_id, token_text

MAX_NUMBERS = 100_000  # of patterns in one result; more go to a file
MAX_TOKENS = 4096  # of a batch whose patterns are computed
KINDS = ("previous_token", "duplicate_token", "induction")


class HeadPattern(TypedDict):
    """What one head looks at in a text; means are over the queries after the first.

    Attributes:
        layer: Its layer.
        head: Its query head.
        kv_head: The key-value head that it reads; several query heads share one under grouped-query attention.
        first_token: Mean attention to the first token, where heads that find nothing often rest.
        previous_token: Mean attention to the token before.
        own_token: Mean attention to the token itself.
        entropy: Mean entropy of a row, in nats; 0 looks at one token.
        missing: Mean of 1 less the sum of a row: what a learned sink takes in models such as GPT-OSS, else 0.
        pattern: Rows are queries, columns keys, each row a distribution; None if they are in the file.
    """

    layer: int
    head: int
    kv_head: int
    first_token: float | None
    previous_token: float | None
    own_token: float | None
    entropy: float | None
    missing: float | None
    pattern: list[list[float]] | None


class AttentionPatterns(Header):
    """Result of `attention_patterns`: a row per layer and head, and the text's tokens.

    Attributes:
        text: The text.
        tokens: Its tokens, special ones included.
        token_ids: Their ids.
        rows: By layer, then head, in the order asked for.
        file: Arrays `layer_3` [n_heads query key] of the heads asked for, if a path was given.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    rows: list[HeadPattern]
    file: ArrayFile | None


class HeadScore(TypedDict):
    """How much one head does three known jobs."""

    layer: int
    head: int
    previous_token: Score
    duplicate_token: Score
    induction: Score


class HeadScores(Header):
    """Result of `head_scores`.

    Attributes:
        seq_len: Tokens of each random list; a sequence is the list twice.
        n_prefix: Special tokens that the tokenizer puts before a text, and so before each sequence.
        rows: By layer, then head.
        uniform: The scores of a head that looks at all tokens alike.
    """

    seq_len: int
    n_prefix: int
    rows: list[HeadScore]
    uniform: dict[str, float | None]


# ---------------------------------------------------------------------------------------------- patterns


@torch.inference_mode()
def attention_patterns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    save: str | Path | None = None,
) -> AttentionPatterns:
    """Read the attention patterns of a text: which earlier tokens each head looks at from each token.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype. Attention runs in eager
            mode during the call, since fused kernels have no pattern.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        text: One text.
        layers: Layers to read; None reads all.
        heads: Query heads to read in each of them; None reads all.
        save: Path of a safetensors file that takes the patterns, for long texts.

    Returns:
        A row per layer and head with its pattern, if no file takes it, and summaries.

    Raises:
        UnsupportedModelError: Attention was not found, or does not return its pattern.
        ValueError: The model is in train mode, the text has no tokens or does not fit the context, a layer or head does
            not exist, the weights are not finite, the patterns are too many for a result without `save`, or `save` is a
            folder.
        MemoryError: The text's patterns do not fit in memory; choose fewer layers, or shorten it.

    Misleads: Attention to a token is not use of it: its value vector may be small or ignored. Much attention to the
        first token often means that a head found nothing to do. See `attention_knockout` for causes.

    Cost: 1 forward in eager mode; about 10 ms on the demo model.

    Example:
        attention_patterns(model, tokenizer, " river stone cloud metal river stone cloud metal", layers=[0, 1])
    """
    check_file(save)
    decoder = check_sites(model)
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r}; expected one string. Call attention_patterns once for each text.")
    ids = encode(tokenizer, [text])
    check_context(model, ids)
    which = choose("layer", layers, decoder.n_layers)
    who = choose("head", heads, decoder.n_heads)
    size = len(which) * len(who) * len(ids[0]) ** 2
    if save is None and size > MAX_NUMBERS:
        raise ValueError(
            f"{len(which)} layers of {len(who)} heads over {len(ids[0])} tokens are {size} numbers; expected at most "
            f"{MAX_NUMBERS} in a result. Choose layers or heads, or pass save= with the path of a file."
        )
    points = [HookPoint("pattern", layer) for layer in which]

    def read(_: list[int]) -> list[dict[HookPoint, Float[Tensor, "head query key"]]]:
        with record(model, points, keep=lambda pattern: pattern[0, who].float().cpu()) as seen:
            run(model, pad(ids, "right", 0, model.device), stop_after=max(which))
        return [seen]

    (found,) = in_batches([len(ids[0])], MAX_TOKENS, read)
    per_group = decoder.n_heads // decoder.n_kv_heads
    file = save_arrays(save, {f"layer_{point.layer}": found[point] for point in points}) if save else None
    return AttentionPatterns(
        **header(model, "attention_patterns", n=1),
        text=text,
        tokens=[token_text(tokenizer, i) for i in ids[0]],
        token_ids=ids[0],
        rows=[
            _head_pattern(point.layer, head, head // per_group, pattern, is_kept=save is None)
            for point in points
            for head, pattern in zip(who, found[point], strict=True)
        ],
        file=file,
    )


def _head_pattern(
    layer: int, head: int, kv_head: int, pattern: Float[Tensor, "query key"], *, is_kept: bool
) -> HeadPattern:
    if not bool(torch.isfinite(pattern).all()):
        raise ValueError(f"The pattern of head {layer}.{head} is not finite; expected numbers. Check the weights.")
    rows = pattern[1:]
    return HeadPattern(
        layer=layer,
        head=head,
        kv_head=kv_head,
        first_token=number(rows[:, 0].mean()),
        previous_token=number(pattern.diagonal(-1).mean()),
        own_token=number(pattern.diagonal()[1:].mean()),
        entropy=number(torch.special.entr(rows).sum(-1).mean()),
        missing=number((1 - rows.sum(-1)).clamp(min=0).mean()),
        pattern=numbers(pattern) if is_kept else None,
    )


# ---------------------------------------------------------------------------------------------- known jobs


@torch.inference_mode()
def head_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int = 20,
    n: int = 32,
    words: Sequence[str] | None = None,
    seed: int = 0,
) -> HeadScores:
    """Find previous-token, duplicate-token and induction heads by their attention on repeated random tokens.

    Each sequence is a list of different random tokens, twice, after whatever special tokens the tokenizer puts first.
    From a token of the second copy, a duplicate-token head looks at the same token in the first copy, and an induction
    head at the one after that. A previous-token head looks one back, from every token but the first. A score is the
    mean attention over these edges: TransformerLens' `detect_head` with "mul", divided by the share of the queries that
    have such an edge, so that 1 is the most that a head can have.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype.
        tokenizer: Its tokenizer. Special tokens are never drawn.
        seq_len: Different tokens of a list.
        n: How many sequences.
        words: Single tokens to draw from, with their leading space; None draws from all tokens that are not special.
        seed: Of the lists and of the bootstrap over sequences.

    Returns:
        Scores by layer and head, and those of a head that looks at all tokens alike.

    Raises:
        UnsupportedModelError: Attention was not found, or does not return its pattern.
        ValueError: The model is in train mode, seq_len or n is too small, there are too few tokens to draw from, a word
            is not one token, the sequence does not fit the context, or the weights are not finite.

    Misleads: A score shows where a head looks on random tokens, not what it does with that, nor what it does on text. A
        small model may know few of its tokens: on all of the demo model's, its induction heads score .1; on its words,
        .9.

    Cost: 1 forward in eager mode per 4,096 tokens; about 0.1 s on the demo model.

    Example:
        words = "river stone cloud metal paper candle mirror bottle ladder hammer window tiger rabbit castle".split()
        head_scores(model, tokenizer, seq_len=12, words=[f" {word}" for word in words])
    """
    check_lists(words=words)
    decoder = check_sites(model)
    if seq_len < 2 or n < 1:
        raise ValueError(f"seq_len is {seq_len} and n is {n}; expected at least 2 tokens and at least 1 sequence.")
    prefix = list(tokenizer("")["input_ids"])
    ids = [[*prefix, *drawn, *drawn] for drawn in _random_lists(_allowed(model, tokenizer, words), seq_len, n, seed)]
    check_context(model, ids)
    points = [HookPoint("pattern", layer) for layer in range(decoder.n_layers)]

    def at_edges(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head kind"]:
        previous = pattern.diagonal(-1, -2, -1).double().mean(-1)
        # The last seq_len entries of a diagonal belong to the queries of the second copy.
        copies = (pattern.diagonal(-back, -2, -1)[..., -seq_len:] for back in (seq_len, seq_len - 1))
        duplicate, induction = (diagonal.double().mean(-1) for diagonal in copies)
        return torch.stack([previous, duplicate, induction], -1).cpu()

    def scores(batch: list[int]) -> list[Float[Tensor, "layer head kind"]]:
        with record(model, points, keep=at_edges) as found:
            run(model, pad([ids[i] for i in batch], "right", 0, model.device), stop_after=decoder.n_layers - 1)
        return list(torch.stack([found[point] for point in points], 1))

    sample = torch.stack(in_batches([len(row) for row in ids], MAX_TOKENS, scores))
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("Attention patterns of the model are not all finite; expected numbers. Check its weights.")
    rows = [
        HeadScore(
            layer=layer,
            head=head,
            previous_token=score(sample[:, layer, head, 0], seed),
            duplicate_token=score(sample[:, layer, head, 1], seed),
            induction=score(sample[:, layer, head, 2], seed),
        )
        for layer in range(decoder.n_layers)
        for head in range(decoder.n_heads)
    ]
    length = len(ids[0])
    uniform = at_edges((torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None])[None, None])
    return HeadScores(
        **header(model, "head_scores", n=n, seed=seed, warnings=few(n, "sequence")),
        seq_len=seq_len,
        n_prefix=len(prefix),
        rows=rows,
        uniform=dict(zip(KINDS, numbers(uniform[0, 0]), strict=True)),
    )


def _allowed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str] | None) -> list[int]:
    """Tokens to draw from."""
    if words is not None:
        return sorted({single_token_id(tokenizer, word) for word in words})
    n_known = min(len(tokenizer), model.config.get_text_config(decoder=True).vocab_size)
    return sorted(set(range(n_known)) - set(tokenizer.all_special_ids))


def _random_lists(allowed: Sequence[int], seq_len: int, n: int, seed: int) -> list[list[int]]:
    if len(allowed) < seq_len:
        raise ValueError(
            f"There are {len(allowed)} tokens to draw from; expected at least seq_len = {seq_len}, as the tokens of a "
            "list differ. Lower seq_len, or give more words."
        )
    tokens, generator = torch.tensor(allowed), torch.Generator().manual_seed(seed)
    return [tokens[torch.randperm(len(tokens), generator=generator)[:seq_len]].tolist() for _ in range(n)]
