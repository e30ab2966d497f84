"""Logit-difference lens: how far each depth of the model prefers one answer to another, and where that is settled.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020), for the decoding,
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens; the difference of two answers' logits
as in Wang et al., "Interpretability in the Wild" (2022), https://arxiv.org/abs/2211.00593
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches
from techniques._lens import Points, run_points
from techniques._model import find_decoder
from techniques._results import Header, few, header, number, numbers
from techniques._stats import mean_interval
from techniques._tokens import answer_ids, check_context, check_eval, check_lists, encode, texts_of, token_text

STABLE = 0.1  # a curve is stable once it stays this close to its last value, as a share of that value
CLOSE_CALL = 0.5  # nats; below this at the last depth, the model hardly prefers either answer
MAX_TOKENS = 8192  # of a batch of prompts


class Decision(TypedDict):
    """Where a curve of logit differences is settled; depth is the number of blocks that have run.

    Attributes:
        prefers: "answer" or "wrong", as at the last depth; None if that difference is 0.
        decision_depth: First depth from which on the sign is that of the last depth.
        jump_depth: The depth that brings the largest step towards the last depth's sign.
        jump: That step, in nats, in the direction of the last depth's sign.
        stable_depth: First depth from which on the difference stays within a tenth of its last value.
    """

    prefers: str | None
    decision_depth: int | None
    jump_depth: int | None
    jump: float | None
    stable_depth: int | None


class PromptCurve(Decision):
    """One prompt: its answers, as tokens, and logit(answer) - logit(wrong) at its last position by depth, in nats."""

    prompt: str
    answer: str
    wrong: str
    diffs: list[float | None]


class DepthMean(TypedDict):
    """Mean over prompts at one depth with its 95 % bootstrap interval, in nats.

    Attributes:
        depth: How many blocks have run: 0 is the embedding, n_layers the model's own output.
        mean: Mean difference.
        low: Lower end of the interval.
        high: Upper end.
        decided: Share of the prompts whose decision depth is at most this one.
    """

    depth: int
    mean: float | None
    low: float | None
    high: float | None
    decided: float


class LogitDiffLens(Header):
    """Result of `logit_diff_lens`.

    Attributes:
        n_layers: Blocks of the model; there are n_layers + 1 depths.
        curves: By prompt, in order.
        depths: Means over prompts, by depth.
        mean_curve: Where the mean over prompts is settled.
        baseline: The same means for the baseline prompts; None without any.
        effect: Mean of prompt minus its own baseline; its `decided` counts where that difference is settled.
        max_error: Largest difference between the last depth's logits and the model's own, in nats.
    """

    n_layers: int
    curves: list[PromptCurve]
    depths: list[DepthMean]
    mean_curve: Decision
    baseline: list[DepthMean] | None
    effect: list[DepthMean] | None
    max_error: float


@torch.inference_mode()
def logit_diff_lens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    answers: tuple[str, str] | Sequence[tuple[str, str]],
    baseline_prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> LogitDiffLens:
    """Follow logit(answer) - logit(wrong) through the depths, and find where the model's choice is settled.

    It answers at which depth a choice between two answers can be read off the last token, over many prompts. Each
    depth is decoded with the final norm, the unembedding and the soft cap, and the last one must give the model's own
    logits; both are checked on every call.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        prompts: One prompt or several, of any lengths, each read at its last token.
        answers: One (answer, wrong answer) for all prompts, or one for each; single tokens, with their leading space.
        baseline_prompts: For each prompt one to compare it with, such as the same question without a hint; the answers
            are the prompt's own.
        seed: Of the bootstrap over prompts.

    Returns:
        Curves by prompt and their mean with an interval. Positive values prefer the answer, negative the wrong one.

    Raises:
        UnsupportedModelError: The parts were not found, the blocks do not run once each in a row, or the last depth
            differs from the model's own logits.
        ValueError: The model is in train mode, a prompt has no tokens or does not fit the context, the answers are not
            two different single tokens, prompts and answers or baselines differ in number, or a logit is not finite.

    Misleads: A sign is never absent, so a curve of noise is "decided" at depth 0 half of the time: look at the size and
        the interval. Readable is not yet used. If the right answer is always the same token, or always stands
        first, the curve may show a preference for that token and nothing else: counterbalance.

    Cost: 1 forward, and one unembedding per depth and prompt; about 20 ms for 20 prompts on the demo model.

    Example:
        landmarks = ["Eiffel Tower", "Louvre Museum", "Trevi Fountain", "Borghese Gallery"]
        prompts = [f"The {landmark} is located in the city of" for landmark in landmarks]
        answers = [(" Paris", " Rome")] * 2 + [(" Rome", " Paris")] * 2
        logit_diff_lens(model, tokenizer, prompts, answers)
    """
    check_lists(baseline_prompts=baseline_prompts)
    check_eval(model)
    texts = texts_of(prompts)
    baselines = list(baseline_prompts or [])
    if baseline_prompts is not None and len(baselines) != len(texts):
        raise ValueError(
            f"There are {len(baselines)} baseline prompts for {len(texts)} prompts; expected one for each."
        )
    ids = encode(tokenizer, [*texts, *baselines])
    check_context(model, ids)
    chosen = answer_ids(tokenizer, answers, len(texts))
    both, max_error = _differences(model, ids, chosen.repeat(len(ids) // len(texts), 1))

    n = len(texts)
    diffs, base = both[:n], both[n:]
    curves = [
        PromptCurve(
            prompt=text,
            answer=token_text(tokenizer, right),
            wrong=token_text(tokenizer, wrong),
            diffs=numbers(curve),
            **_decision(curve),
        )
        for text, (right, wrong), curve in zip(texts, chosen.tolist(), diffs, strict=True)
    ]
    return LogitDiffLens(
        **header(model, "logit_diff_lens", n=n, seed=seed, warnings=_warnings(diffs)),
        n_layers=diffs.shape[1] - 1,
        curves=curves,
        depths=_means(diffs, seed),
        mean_curve=_decision(diffs.mean(0)),
        baseline=_means(base, seed) if baselines else None,
        effect=_means(diffs - base, seed) if baselines else None,
        max_error=max_error,
    )


def _differences(
    model: PreTrainedModel, ids: list[list[int]], chosen: Int[Tensor, "n 2"]
) -> tuple[Float[Tensor, "n depth"], float]:
    """logit(answer) - logit(wrong) at each prompt's last token and each depth, on the CPU; and the largest error."""
    decoder = find_decoder(model)
    errors: list[float] = []

    def run(batch: list[int]) -> list[Float[Tensor, " depth"]]:
        rows = [ids[i] for i in batch]
        stream = run_points(model, decoder, rows, Points(list(range(len(rows))), [len(row) - 1 for row in rows]))
        curves: list[Float[Tensor, " depth"]] = []
        for part, logits, error in stream.decoded():
            errors.append(error)
            index = chosen[batch][part].to(logits.device)[:, None].expand(-1, logits.shape[1], -1)
            answer, wrong = logits.gather(-1, index).double().cpu().unbind(-1)
            curves += (answer - wrong).unbind(0)
        return curves

    curves = in_batches([len(row) for row in ids], MAX_TOKENS, run)
    return torch.stack(curves), max(errors)


def _decision(curve: Float[Tensor, " depth"]) -> Decision:
    final = curve[-1]
    if final == 0:
        return Decision(prefers=None, decision_depth=None, jump_depth=None, jump=None, stable_depth=None)
    steps = curve.diff() * final.sign()
    return Decision(
        prefers="answer" if final > 0 else "wrong",
        decision_depth=_settled(curve.sign() == final.sign()),
        jump_depth=int(steps.argmax()) + 1,
        jump=number(steps.max()),
        stable_depth=_settled((curve - final).abs() <= STABLE * final.abs()),
    )


def _settled(holds: Tensor) -> int:
    """First depth from which on it holds at every depth; it does at the last."""
    return len(holds) - int(holds.flip(0).long().cumprod(0).sum())


def _means(diffs: Float[Tensor, "n depth"], seed: int) -> list[DepthMean]:
    settled = [_decision(curve)["decision_depth"] for curve in diffs]
    return [
        DepthMean(
            depth=depth,
            mean=number(mean),
            low=number(low),
            high=number(high),
            decided=sum(at is not None and at <= depth for at in settled) / len(settled),
        )
        for depth, (mean, low, high) in enumerate(zip(*mean_interval(diffs, seed), strict=True))
    ]


def _warnings(diffs: Float[Tensor, "n depth"]) -> list[str]:
    n_close = int((diffs[:, -1].abs() < CLOSE_CALL).sum())
    note = (
        f"{n_close} of {len(diffs)} prompts end with a difference below {CLOSE_CALL} nats: the model hardly prefers "
        "either answer there, so their decision depth says little."
    )
    return [note] * bool(n_close) + few(len(diffs), "prompt")
