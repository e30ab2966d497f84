"""Where memory runs out, batches shrink and the numbers stay: each technique on a model that takes few rows at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from techniques._batches import in_batches, in_memory
from techniques._directions import Direction
from techniques.ablation import ablate
from techniques.analyze_token_probs import analyze_token_probs
from techniques.attention import attention_patterns, head_scores
from techniques.attention_knockout import attention_knockout
from techniques.batch_generate import batch_generate
from techniques.causal_tracing import causal_tracing
from techniques.circuits import evaluate_circuit
from techniques.direct_logit_attribution import direct_logit_attribution
from techniques.directions import vector_direction
from techniques.eap import eap
from techniques.generate_text import generate_text
from techniques.iterative_pruning import iterative_pruning
from techniques.logit_diff_lens import logit_diff_lens
from techniques.logit_lens import logit_lens
from techniques.patching import activation_patching
from techniques.path_patching import path_patching
from techniques.persona_vector import persona_vector
from techniques.prefill_attack import prefill_attack
from techniques.sequence_logprob import sequence_logprob
from techniques.steering import ablate_direction, steer_generate, steering_sweep
from tests.techniques import contrasts

LANDMARKS = {"Eiffel Tower": " Paris", "Prado Museum": " Madrid", "Big Ben": " London", "Galata Tower": " Istanbul"}
PROMPTS = [f"The {name} is located in the city of" for name in LANDMARKS]
OTHERS = [f"The {name} is located in the town of" for name in LANDMARKS]
ANSWERS = [(right, " Rome") for right in LANDMARKS.values()]
UNEQUAL = [f"{'The cat sat. ' * i}{prompt}" for i, prompt in enumerate(PROMPTS)]
PAIRS, PAIR_ANSWERS = contrasts.ioi_pairs(4)
CIRCUIT = ["a0.h0", "a1.h1", "m0", "m3"]


def direction(model: Any) -> Direction:
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return vector_direction(vector.tolist(), layer=1)


CASES: dict[str, Callable[[Any, Any], Any]] = {
    "generate_text": lambda m, t: generate_text(m, t, PROMPTS, max_new_tokens=6),
    "generate_text, sampled": lambda m, t: generate_text(m, t, PROMPTS, max_new_tokens=6, temperature=1.5),
    "batch_generate": lambda m, t: batch_generate(m, t, PROMPTS, max_new_tokens=4, temperature=1.5),
    "prefill_attack": lambda m, t: prefill_attack(m, t, "What is the secret word?", "The secret", max_new_tokens=4),
    "analyze_token_probs": lambda m, t: analyze_token_probs(m, t, PROMPTS),
    "sequence_logprob": lambda m, t: sequence_logprob(m, t, PROMPTS, list(LANDMARKS.values())),
    "logit_lens": lambda m, t: logit_lens(m, t, PROMPTS, [" Paris"], positions=[-1, -3]),
    "logit_diff_lens": lambda m, t: logit_diff_lens(m, t, PROMPTS, ANSWERS),
    "head_scores": lambda m, t: head_scores(m, t, 6, 8),
    "attention_knockout": lambda m, t: attention_knockout(m, t, PROMPTS, ANSWERS, keys=list(LANDMARKS)),
    "activation_patching": lambda m, t: activation_patching(m, t, PAIRS, PAIR_ANSWERS, ["z"], "head"),
    "path_patching": lambda m, t: path_patching(m, t, PAIRS, PAIR_ANSWERS, "heads", ["logits", "m3"]),
    "causal_tracing": lambda m, t: causal_tracing(
        m, t, PROMPTS, list(LANDMARKS), list(LANDMARKS.values()), ["mlp_out"], n_draws=3, n_boot=50
    ),
    "direct_logit_attribution": lambda m, t: direct_logit_attribution(m, t, PROMPTS, ANSWERS),
    "ablate, resample": lambda m, t: ablate(m, t, PROMPTS, ANSWERS, ["m1"], reference_prompts=[*PROMPTS, *OTHERS]),
    "ablate, mean": lambda m, t: ablate(m, t, PROMPTS, ANSWERS, ["a1.h0", "m1"], "mean"),
    "ablate, mean_position": lambda m, t: ablate(m, t, PROMPTS, ANSWERS, ["m1"], "mean_position", [*PROMPTS, *OTHERS]),
    "evaluate_circuit": lambda m, t: evaluate_circuit(m, t, CIRCUIT, PAIRS, PAIR_ANSWERS, n_random=5),
    "evaluate_circuit, mean": lambda m, t: evaluate_circuit(
        m, t, CIRCUIT, PAIRS, PAIR_ANSWERS, mode="mean", n_random=5
    ),
    "iterative_pruning": lambda m, t: iterative_pruning(m, t, PAIRS, PAIR_ANSWERS),
    "ablate_direction": lambda m, t: ablate_direction(m, t, PROMPTS, direction(m), max_new_tokens=4),
    # As strong as it takes to change texts: where a vector is added has to show.
    "steer_generate": lambda m, t: steer_generate(
        m, t, UNEQUAL, direction(m), 30.0, units="absolute", positions="response", max_new_tokens=6
    ),
    "steering_sweep": lambda m, t: steering_sweep(
        m, t, UNEQUAL, direction(m), [30.0], [" Paris"], units="absolute", positions="last", n_draws=1, max_new_tokens=4
    ),
    "persona_vector": lambda m, t: persona_vector(
        m, t, ["You are a physicist."], ["You are a child."], ["What is the sky?", "What is a river?"], max_new_tokens=6
    ),
}


USUAL: dict[str, Any] = {}


def usual(name: str, demo: tuple[Any, Any]) -> Any:
    """A case's result on the demo model as it is, computed once for all tests that compare with it."""
    if name not in USUAL:
        USUAL[name] = CASES[name](*demo)
    return USUAL[name]


@contextmanager
def few_rows(model: Any, n_rows: int) -> Iterator[list[int]]:
    """Let each block fail as a full device does when it gets more than `n_rows` rows; the sizes that were tried."""
    sizes: list[int] = []

    def fail(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))
        if sizes[-1] > n_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hooks = [block.register_forward_pre_hook(fail, with_kwargs=True) for block in model.transformer.h]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal but for the rounding of sums over batches of other sizes."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_that_does_not_fit_gives_the_same_numbers(name: str, n_rows: int, demo: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    with few_rows(model, n_rows) as sizes:
        found = CASES[name](model, tokenizer)
    assert_same(found, usual(name, demo))
    assert max(sizes) > n_rows or name == "prefill_attack", "nothing ran out of memory"


@pytest.mark.parametrize("name", sorted({*CASES, "attention_patterns", "eap"}))
def test_what_does_not_fit_alone_is_named(name: str, demo: tuple[Any, Any]) -> None:
    cases: dict[str, Callable[[Any, Any], Any]] = {
        **CASES,
        "attention_patterns": lambda m, t: attention_patterns(m, t, PROMPTS[0]),
        "eap": lambda m, t: eap(m, t, PAIRS, PAIR_ANSWERS),
    }
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    cases[name](model, tokenizer)  # by which the sites are proven
    with (
        few_rows(model, 0),
        pytest.raises(
            MemoryError, match=r"^(A single|One|The pair of).* does not fit in memory beside the model\. Sho"
        ),
    ):
        cases[name](model, tokenizer)


def test_a_circuit_of_edges_runs_in_copies_and_says_so(demo: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    edges = ["input->m0", "a0.h0->m1", "m3->logits"]

    def evaluated() -> Any:
        return evaluate_circuit(model, tokenizer, edges, PAIRS, PAIR_ANSWERS, n_random=2)

    whole = evaluated()
    n_copies = 1 + model.config.n_head * 3  # the most different mixtures that a layer's queries, keys and values read
    with few_rows(model, n_copies) as sizes:
        assert_same(evaluated(), whole)
    assert max(sizes) > n_copies
    with few_rows(model, 1), pytest.raises(MemoryError, match="A single pair, in a copy for each mixture of edges, of"):
        evaluated()


# The loop itself.


def failing(above: int) -> Callable[[Any], list[int]]:
    def work(chunk: Any) -> list[int]:
        if sum(chunk) > above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(chunk)

    return work


def test_chunks_keep_their_order_and_a_limit_that_was_met_is_remembered() -> None:
    tried: list[int] = []

    def work(chunk: Any) -> list[int]:
        tried.append(len(chunk))
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(chunk)

    done = list(in_memory(work, [range(8), range(8, 16), [16, 17]], str))
    assert [i for _, found in done for i in found] == list(range(18))
    assert tried == [8, 4, *[2] * 9]  # the second chunk of 8 is not tried whole


def test_the_limit_counts_what_costs_memory_not_pieces() -> None:
    """After two long sequences that do not fit together, many short ones still do."""
    lengths = [100, 100, *[1] * 50]
    sizes: list[int] = []

    def run(which: list[int]) -> list[int]:
        sizes.append(len(which))
        if sum(lengths[i] for i in which) > 150:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return [lengths[i] for i in which]

    assert in_batches(lengths, 200, run) == lengths
    assert sizes == [2, 1, 1, 50]


def test_pieces_within_pieces_halve_what_is_kept_beside_them() -> None:
    def outer(chunk: Any) -> int:
        kept = 10 * len(chunk)
        return sum(sum(done) for _, done in in_memory(failing(25 - kept), [list(chunk)], lambda _: "A piece"))

    assert sum(done for _, done in in_memory(outer, [[1, 2, 3, 4, 5]], lambda _: "A whole")) == 15
    with pytest.raises(MemoryError, match="A whole does not fit in memory"):
        list(in_memory(outer, [[1, 16]], lambda _: "A whole"))


def test_other_errors_pass() -> None:
    def work(chunk: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        list(in_memory(work, [[1, 2]], str))
