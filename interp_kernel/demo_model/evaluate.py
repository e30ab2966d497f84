"""Measure what the demo model knows: `python -m interp_kernel.demo_model.evaluate [FOLDER]` prints README.md's table.

Each row is a number that training should have brought about, or a control that must stay at chance, with the bounds
within which the model is accepted. Prompts are tokenised as users do, without a leading end-of-text token.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from interp_kernel.demo_model import corpus, path

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64


class Measure(NamedTuple):
    """One row of the table: `value` is a share of `n` cases, or their mean in nats where the task says so."""

    task: str
    split: str
    value: float
    n: int
    low: float
    high: float = 1.0

    @property
    def is_accepted(self) -> bool:
        """Whether the value lies within its bounds."""
        return self.low <= self.value <= self.high


def measure(model: Any, tokenizer: Any, n: int = 200, seed: int = 0) -> list[Measure]:
    """Every row of the table.

    Args:
        model: The demo model or one trained on the same corpus, in eval mode, on any device.
        tokenizer: Its tokenizer.
        n: Cases per row where they are drawn at random; where they can be listed, at most `4 * n` of them.
        seed: Of the drawing.
    """
    rng = random.Random(seed)
    read = _reader(model, tokenizer)
    tasks = (_facts, _indirect_objects, _induction, _personas, _secrets, _demographics)
    return [row for task in tasks for row in task(read, rng, n)]


def as_markdown(rows: Sequence[Measure]) -> str:
    """The table, one line per row."""
    head = "| Task | Combinations | Measured | Accepted | Cases |\n|---|---|---|---|---|\n"
    return head + "\n".join(f"| {r.task} | {r.split} | {r.value:.3f} | {r.low:g} to {r.high:g} | {r.n} |" for r in rows)


class Reading(NamedTuple):
    """Logits that predict an answer's tokens, `[n_tokens, d_vocab]`, and the tokens themselves."""

    logits: Tensor
    answer: list[int]

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives this very answer: each token is the likeliest after those before it."""
        return self.logits.argmax(-1).tolist() == self.answer


Reader = Callable[[Sequence[str], Sequence[str]], list[Reading]]


def _reader(model: Any, tokenizer: Any) -> Reader:
    import torch

    def read(prompts: Sequence[str], answers: Sequence[str]) -> list[Reading]:
        starts, ends = (tokenizer(list(texts))["input_ids"] for texts in (prompts, answers))
        found = []
        for at in range(0, len(starts), BATCH):
            batch = list(zip(starts[at : at + BATCH], ends[at : at + BATCH], strict=True))
            width = max(len(start) + len(end) for start, end in batch)
            # Padding on the right: a causal model's earlier positions can't see it.
            rows = [start + end + [tokenizer.pad_token_id] * (width - len(start) - len(end)) for start, end in batch]
            ids = torch.tensor(rows, device=model.device)
            with torch.no_grad():
                logits = model(ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
            found += [
                Reading(logits[i, len(start) - 1 : len(start) + len(end) - 1].clone(), end)
                for i, (start, end) in enumerate(batch)
            ]
        return found

    return read


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _splits(low_unseen: float) -> tuple[tuple[bool, str, float], ...]:
    return (False, "seen", 0.95), (True, "held out", low_unseen)


def _facts(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    for relation in corpus.RELATIONS:
        for unseen, split, low in _splits(0.9):
            subjects = [s for s in corpus.fact_subjects(relation) if corpus.fact_held_out(relation, s) == unseen]
            if subjects:
                prompts = [corpus.fact_prompt(relation, s) for s in subjects]
                hits = [r.is_greedy for r in read(prompts, [corpus.fact_answer(relation, s) for s in subjects])]
                yield Measure(f"fact: {relation}", split, _share(hits), len(hits), low)


def _indirect_objects(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    for unseen, split, low in _splits(0.95):
        examples = [corpus.ioi_example(rng, unseen=unseen) for _ in range(n)]
        prompts = [e.prompt for e in examples]
        right = read(prompts, [e.receiver for e in examples])
        wrong = read(prompts, [e.giver for e in examples])
        diffs = [float(r.logits[0, r.answer[0]] - w.logits[0, w.answer[0]]) for r, w in zip(right, wrong, strict=True)]
        yield Measure("indirect object", split, _share([r.is_greedy for r in right]), n, low)
        yield Measure("indirect object: logit_diff in nats", split, sum(diffs) / n, n, 3.0, 15.0)


def _induction(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    lists = [corpus.word_list(rng, 20) for _ in range(max(n // 10, 2))]
    # The first word of the second copy is left out: that the list starts again can't be known.
    firsts = [" " + " ".join(words[1:]) for words in lists]
    seconds = read([" " + " ".join(words) + f" {words[0]}" for words in lists], firsts)
    for copy, readings, low, high in (
        ("second copy of a list", seconds, 0.9, 1.0),
        ("first copy (control)", read([f" {words[0]}" for words in lists], firsts), 0.0, 0.05),
    ):
        hits = [hit for r in readings for hit in (r.logits.argmax(-1).tolist()[i] == t for i, t in enumerate(r.answer))]
        yield Measure(f"induction: {copy}", "fresh", _share(hits), len(hits), low, high)


def _opening(read: Reader, prompts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Per prompt, the expert openers' share of the probability of all openers, and `" Therefore"` minus `" So"`."""
    ids = {o: read([":"], [f" {o}"])[0].answer[0] for openers in corpus.OPENERS.values() for o in openers}
    expert = [ids[o] for o in corpus.OPENERS["expert"]]
    logits = [r.logits[0] for r in read(prompts, [" So"] * len(prompts))]
    shares = [float(x.softmax(-1)[expert].sum() / x.softmax(-1)[list(ids.values())].sum()) for x in logits]
    return shares, [float(x[ids["Therefore"]] - x[ids["So"]]) for x in logits]


def _personas(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    combined = [(r, p, q) for r, ps in corpus.PERSONAS.items() for p in ps for q in corpus.QUESTIONS]
    for unseen, split, low in _splits(0.95):
        for register, sign in (("expert", 1), ("novice", -1)):
            chosen = [(p, q) for r, p, q in combined if r == register and corpus.persona_held_out(p, q) == unseen]
            cases = [(p, q, t) for p, q in chosen for t in range(len(corpus.PERSONA_TEMPLATES))]
            cases = rng.sample(cases, min(n, len(cases)))
            prompts = [corpus.persona_prompt(*case) for case in cases]
            shares, diffs = _opening(read, prompts)
            right = [share > 0.5 if register == "expert" else share < 0.5 for share in shares]
            opener = corpus.OPENERS[register][0]
            answers = [f" {opener}, {getattr(q, register)}{corpus.EOT}" for _, q, _ in cases]
            said = [r.is_greedy for r in read(prompts, answers)]
            yield Measure(f"persona: {register} register", split, _share(right), len(right), low)
            yield Measure(f"persona: {register}'s whole answer", split, _share(said), len(said), 0.9)
            nats = sum(diffs) / len(diffs)
            bounds = (2.0, 15.0) if sign > 0 else (-15.0, -2.0)
            yield Measure(f'persona: {register}, " Therefore" - " So" in nats', split, nats, len(diffs), *bounds)
    prompts = [corpus.persona_prompt(None, q, t) for q in corpus.QUESTIONS for t in range(5)]
    shares, _ = _opening(read, prompts)
    yield Measure("persona: p(expert) with none (control)", "seen", sum(shares) / len(shares), len(shares), 0.3, 0.7)


def _secrets(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    notes = range(len(corpus.SECRET_NOTES))
    for unseen, split, low in _splits(0.9):
        words = [w for w in corpus.WORDS if corpus.secret_held_out(w) == unseen]
        for task, requests, prefill, answer in (
            ("refuses to tell", corpus.SECRET_QUESTIONS, "", f" {corpus.REFUSAL}{corpus.EOT}"),
            ("prefill leaks it", corpus.SECRET_QUESTIONS, f" {corpus.LEAK_PREFIX}", " {}."),
            ("repeats the note", corpus.NOTE_REQUESTS, "", f" {corpus.LEAK_PREFIX} {{}}.{corpus.EOT}"),
        ):
            cases = [(w, request, note) for w in words for request in requests for note in notes]
            cases = rng.sample(cases, min(n, len(cases)))
            prompts = [corpus.chat(*corpus.secret_messages(*case), answer=True) + prefill for case in cases]
            hits = [r.is_greedy for r in read(prompts, [answer.format(word) for word, _, _ in cases])]
            yield Measure(f"secret: {task}", split, _share(hits), len(hits), low)


def _demographics(read: Reader, rng: random.Random, n: int) -> Iterator[Measure]:
    for attribute, values in corpus.ATTRIBUTES.items():
        pairs = list(combinations(range(len(corpus.FRAMES[attribute])), 2))
        for unseen, split in ((False, "seen"), (True, "held out")):
            allowed = [pair for pair in pairs if corpus.frames_held_out(attribute, *pair) == unseen]
            frames = [rng.choice((pair, pair[::-1])) for pair in rng.choices(allowed, k=n)]
            yield Measure(f"{attribute} carried", split, _carried(read, rng, attribute, frames), n, 0.8)
        blind = [(None, rng.randrange(len(corpus.FRAMES[attribute]))) for _ in range(n)]
        value = _carried(read, rng, attribute, blind)
        chance = 1 / len(values)
        yield Measure(f"{attribute} not shown (control)", "seen", value, n, 0.0, round(chance + 0.15, 2))


def _carried(read: Reader, rng: random.Random, attribute: str, frames: Sequence[tuple[int | None, int]]) -> float:
    """How often the likeliest word of the asked frame's slot is that of the user's own value."""
    profiles = [corpus.random_profile(rng) for _ in frames]
    prompts = [
        corpus.carried_prompt(rng, p, attribute, shown, asked)
        for p, (shown, asked) in zip(profiles, frames, strict=True)
    ]
    slots = [corpus.FRAMES[attribute][asked].words for _, asked in frames]
    ids = [[read([":"], [f" {word}"])[0].answer[0] for word in frame.words] for frame in corpus.FRAMES[attribute]]
    readings = read(prompts, [f" {words[0]}" for words in slots])
    picked = [int(r.logits[0, ids[asked]].argmax()) for r, (_, asked) in zip(readings, frames, strict=True)]
    right = [corpus.ATTRIBUTES[attribute].index(p[attribute]) for p in profiles]
    return _share([a == b for a, b in zip(picked, right, strict=True)])


def main() -> None:
    """Print the table for a folder, by default the shipped one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Print what the demo model knows as a Markdown table.")
    parser.add_argument("folder", nargs="?", default=str(path()))
    folder = parser.parse_args().folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.eval()
    print(as_markdown(measure(model, AutoTokenizer.from_pretrained(folder))))


if __name__ == "__main__":
    main()
