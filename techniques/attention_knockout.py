"""Attention knockout: what the answer loses when some positions cannot look at others.

Source: Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language Models" (2023),
https://arxiv.org/abs/2304.14767
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._attention import Score, choose, knocked_out, score
from techniques._batches import in_batches
from techniques._hooks import check_sites
from techniques._model import UnsupportedModelError, logits_at
from techniques._pairs import last_positions
from techniques._results import Header, few, header, number
from techniques._tokens import (
    answer_ids,
    check_context,
    encode,
    pad,
    plain,
    resolve_position,
    span_positions,
    texts_of,
    token_text,
)

MAX_TOKENS = 8192  # of a batch, padding included

Where = int | str | Sequence[int] | Sequence[str]


class KnockoutPrompt(TypedDict):
    """A prompt, the positions whose edges were cut, and its clean logit(answer) - logit(wrong), in nats."""

    text: str
    tokens: list[str]
    answer: str
    wrong: str
    queries: list[int]
    keys: list[int]
    control_keys: list[int]
    logit_diff: float | None


class KnockoutRow(TypedDict):
    """One cut, over all prompts; effects are changes of logit(answer) - logit(wrong), in nats, with 95 % intervals.

    Attributes:
        layer: Centre of the window of layers; None if all layers were cut.
        layers: The layers that were cut.
        head: The head that was cut; None if all heads asked for were.
        logit_diff: Mean with the cut.
        effect: Mean change; negative if the edges supported the answer.
        low: Lower end of its interval.
        high: Upper end.
        control: Mean change when as many other keys are cut instead; None where there are no others.
        control_low: Lower end of its interval.
        control_high: Upper end.
    """

    layer: int | None
    layers: list[int]
    head: int | None
    logit_diff: float | None
    effect: float | None
    low: float | None
    high: float | None
    control: float | None
    control_low: float | None
    control_high: float | None


class AttentionKnockout(Header):
    """Result of `attention_knockout`.

    Attributes:
        grain: "layer" or "head".
        window: How many neighbouring layers were cut at once.
        clean: Mean logit difference without a cut, in nats.
        prompts: The prompts, in order.
        rows: By layer, then head.
        all_layers: The same edges cut in all layers at once, for all heads asked for.
    """

    grain: str
    window: int
    clean: Score
    prompts: list[KnockoutPrompt]
    rows: list[KnockoutRow]
    all_layers: KnockoutRow


class _Edges(NamedTuple):
    """Positions of each prompt between which attention is cut."""

    queries: list[list[int]]
    keys: list[list[int]]
    control: list[list[int]] | None

    def mask(self, keys: list[list[int]], which: list[int], size: int) -> Bool[Tensor, "batch 1 query key"]:
        """True where a query of the chosen prompts must not see a key."""
        cut = torch.zeros(len(which), 1, size, size, dtype=torch.bool)
        for row, i in enumerate(which):
            cut[row, 0, torch.tensor(self.queries[i])[:, None], torch.tensor(keys[i], dtype=torch.long)] = True
        return cut


class _Cut(NamedTuple):
    """Heads that are cut together; no `heads` means all of them."""

    layer: int | None
    layers: list[int]
    heads: list[int] | None

    def masks(
        self, edges: Bool[Tensor, "batch 1 query key"], n_heads: int
    ) -> dict[int, Bool[Tensor, "batch heads query key"]]:
        """By layer, where a query must not see a key."""
        if self.heads is not None:
            chosen = torch.zeros(n_heads, 1, 1, dtype=torch.bool)
            chosen[self.heads] = True
            edges = edges & chosen
        return dict.fromkeys(self.layers, edges)


@torch.inference_mode()
def attention_knockout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    answers: tuple[str, str] | Sequence[tuple[str, str]],
    keys: Where,
    queries: Where = -1,
    grain: Literal["layer", "head"] = "layer",
    window: int = 1,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    seed: int = 0,
) -> AttentionKnockout:
    """Cut attention from some positions to others, layer by layer or head by head, and measure what the answer loses.

    It answers where in the model information moves from `keys` to `queries`. Scores of the cut edges are masked before
    the softmax, so the attention that they had goes to the other keys. As a control, as many other keys, drawn at
    random for each prompt between the first token and the queries, are cut in the same way.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, with any attention kernel
            that takes a mask (not flash attention).
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompts: One prompt or several, of any lengths.
        answers: One (answer, wrong answer) for all prompts, or one for each; single tokens, with their leading space.
        keys: What can't be seen: a position or several, the same for all prompts and negative from the end; or a piece
            of text that stands once in every prompt; or such a piece for each prompt.
        queries: What can't see it, given in the same ways; the default is the last token.
        grain: "layer" cuts all `heads` in `window` neighbouring layers at once; "head" cuts one head of one layer.
        window: How many layers around each centre, an odd number; at the first and last layers it is cut short.
        layers: Centres to try; None tries all.
        heads: Heads that take part; None takes all.
        seed: Of the control's draws and of the bootstrap over prompts.

    Returns:
        Effects in nats of logit(answer) - logit(wrong) by layer or head; negative effects mean that the answer needed
        the edges.

    Raises:
        UnsupportedModelError: Attention was not found, takes no mask or ignores it.
        ValueError: The model is in train mode, a prompt has no tokens or does not fit the context, the answers are not
            two different single tokens, a position, span, layer or head does not exist, no key lies at or before a
            query, a query has no key left, the window or grain is out of range, or a logit is not finite.
        MemoryError: A single prompt does not fit in memory; a batch that does not is halved.

    Misleads: Information that takes two steps passes by a cut of one; and a wide window finds an effect that no single
        layer has. Look at the control: cutting any token may hurt. Effects of single cuts do not add up.

    Cost: 2 forwards of all prompts per layer (or head) tried; about 0.1 s on the demo model.

    Example:
        landmarks = ["Eiffel Tower", "Louvre Museum", "Trevi Fountain", "Borghese Gallery"]
        prompts = [f"The {landmark} is located in the city of" for landmark in landmarks]
        answers = [(" Paris", " Rome")] * 2 + [(" Rome", " Paris")] * 2
        attention_knockout(model, tokenizer, prompts, answers, keys=landmarks)
    """
    decoder = check_sites(model)
    texts = texts_of(prompts)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    chosen = answer_ids(tokenizer, answers, len(texts))
    centres = choose("layer", layers, decoder.n_layers)
    who = None if heads is None else choose("head", heads, decoder.n_heads)
    cuts = _cuts(grain, window, centres, who, decoder.n_layers, decoder.n_heads)
    edges = _edges(tokenizer, texts, ids, queries, keys, seed)

    def diffs(cut: _Cut, hidden: list[list[int]]) -> Float[Tensor, " n"]:
        def masks(which: list[int], size: int) -> dict[int, Bool[Tensor, "batch heads query key"]]:
            return cut.masks(edges.mask(hidden, which, size), decoder.n_heads)

        return _logit_diffs(model, ids, chosen, masks)

    clean = _logit_diffs(model, ids, chosen, lambda *_: {})

    def row(cut: _Cut) -> KnockoutRow:
        after = diffs(cut, edges.keys)
        control = None if edges.control is None else diffs(cut, edges.control) - clean
        return _row(cut, after, after - clean, control, seed)

    everywhere = _Cut(None, list(range(decoder.n_layers)), who)
    is_null = _is_same(diffs(everywhere, edges.keys), clean)
    earlier = [list(range(min(positions))) for positions in edges.queries]
    if is_null and _is_same(diffs(everywhere, earlier), clean):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives the same logits although its queries can't see any earlier token; expected "
            "a change. Its attention ignores the mask that it is given."
        )
    return AttentionKnockout(
        **header(model, "attention_knockout", n=len(texts), seed=seed, warnings=_warnings(edges, is_null=is_null)),
        grain=grain,
        window=window,
        clean=score(clean, seed),
        prompts=_prompts(tokenizer, texts, ids, chosen, edges, clean),
        rows=[row(cut) for cut in cuts],
        all_layers=row(everywhere),
    )


def _cuts(
    grain: str, window: int, centres: list[int], heads: list[int] | None, n_layers: int, n_heads: int
) -> list[_Cut]:
    if grain not in ("layer", "head"):
        raise ValueError(f'grain is {grain!r}; expected "layer" or "head".')
    if window < 1 or window % 2 == 0 or (grain == "head" and window != 1):
        raise ValueError(f'window is {window} with grain="{grain}"; expected an odd number of layers, and 1 for heads.')
    if grain == "head":
        return [_Cut(layer, [layer], [head]) for layer in centres for head in heads or range(n_heads)]
    reach = window // 2
    return [_Cut(c, list(range(max(0, c - reach), min(n_layers, c + reach + 1))), heads) for c in centres]


def _edges(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], ids: list[list[int]], queries: Where, keys: Where, seed: int
) -> _Edges:
    from_, to = _positions(tokenizer, "queries", queries, texts, ids), _positions(tokenizer, "keys", keys, texts, ids)
    for text, above, below in zip(texts, from_, to, strict=True):
        if min(below) > max(above):
            raise ValueError(
                f"The keys {below} of {text!r} all lie after its queries {above}, which never see them; expected a key "
                "at or before a query."
            )
    generator = torch.Generator().manual_seed(seed)
    control = []
    for above, below in zip(from_, to, strict=True):
        others = torch.tensor([p for p in range(1, min(above)) if p not in below], dtype=torch.long)
        drawn = others[torch.randperm(len(others), generator=generator)[: len(below)]]
        control.append(sorted(drawn.tolist()))
    return _Edges(from_, to, control if all(control) else None)


def _positions(
    tokenizer: PreTrainedTokenizerBase, name: str, where: Where, texts: list[str], ids: list[list[int]]
) -> list[list[int]]:
    """For each prompt, the positions that `where` means."""
    where = plain(where)
    if isinstance(where, str):
        where = [where] * len(texts)
    values = [where] if isinstance(where, int) else list(where)
    if values and all(isinstance(value, int) for value in values):
        given = cast(list[int], values)
        return [
            sorted({resolve_position(position, len(row), text) for position in given})
            for row, text in zip(ids, texts, strict=True)
        ]
    if len(values) != len(texts) or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"{name} is {where!r} for {len(texts)} prompts; expected positions, one text, or one text for each prompt."
        )
    return [span_positions(tokenizer, text, str(span)) for text, span in zip(texts, values, strict=True)]


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    ids: list[list[int]],
    chosen: Int[Tensor, "n 2"],
    edges: _Edges,
    clean: Float[Tensor, " n"],
) -> list[KnockoutPrompt]:
    return [
        KnockoutPrompt(
            text=text,
            tokens=[token_text(tokenizer, token_id) for token_id in ids[i]],
            answer=token_text(tokenizer, right),
            wrong=token_text(tokenizer, wrong),
            queries=edges.queries[i],
            keys=edges.keys[i],
            control_keys=[] if edges.control is None else edges.control[i],
            logit_diff=number(clean[i]),
        )
        for i, (text, (right, wrong)) in enumerate(zip(texts, chosen.tolist(), strict=True))
    ]


def _row(
    cut: _Cut,
    after: Float[Tensor, " n"],
    effect: Float[Tensor, " n"],
    control: Float[Tensor, " n"] | None,
    seed: int,
) -> KnockoutRow:
    change = score(effect, seed)
    other = Score(mean=None, low=None, high=None) if control is None else score(control, seed)
    return KnockoutRow(
        layer=cut.layer,
        layers=cut.layers,
        head=cut.heads[0] if cut.heads is not None and len(cut.heads) == 1 else None,
        logit_diff=number(after.mean()),
        effect=change["mean"],
        low=change["low"],
        high=change["high"],
        control=other["mean"],
        control_low=other["low"],
        control_high=other["high"],
    )


def _logit_diffs(
    model: PreTrainedModel,
    ids: list[list[int]],
    chosen: Int[Tensor, "n 2"],
    masks: Callable[[list[int], int], dict[int, Bool[Tensor, "batch heads query key"]]],
) -> Float[Tensor, " n"]:
    """logit(answer) - logit(wrong) at each prompt's last token while attention is masked, on the CPU.

    `masks` says where, for a batch of prompts that is so many tokens wide.
    """

    def run(which: list[int]) -> list[Float[Tensor, ""]]:
        rows = [ids[i] for i in which]
        with knocked_out(model, masks(which, max(map(len, rows))), which):
            batch = pad(rows, "right", 0, model.device)
            logits = logits_at(model, batch, torch.arange(len(rows)), last_positions(rows))
        answer, wrong = logits.double().gather(-1, chosen[which].to(logits.device)).cpu().unbind(-1)
        return list(answer - wrong)

    return torch.stack(in_batches([len(row) for row in ids], MAX_TOKENS, run))


def _is_same(diffs: Float[Tensor, " n"], clean: Float[Tensor, " n"]) -> bool:
    return torch.allclose(diffs, clean, rtol=1e-6, atol=1e-6)


def _warnings(edges: _Edges, *, is_null: bool) -> list[str]:
    notes, alone = [], few(len(edges.keys), "prompt")
    if is_null:
        notes.append("Cutting these edges in all layers changes nothing: no attention flows along them.")
    if edges.control is None:
        return [
            *notes,
            "A prompt has no other token between its first one and the queries, so there is no control.",
            *alone,
        ]
    n_short = sum(len(other) < len(keys) for other, keys in zip(edges.control, edges.keys, strict=True))
    short = f"In {n_short} prompts the control cuts fewer keys, as there are not as many others."
    return [*notes, *([short] if n_short else []), *alone]
