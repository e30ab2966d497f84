"""Batches by length: order, what a prompt's sample depends on, and what happens when memory runs out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from techniques._batches import in_batches, length_batches
from techniques.batch_generate import batch_generate
from techniques.generate_text import generate_text

PROMPTS = ["the cat sat on a mat", "a dog", "the", "to the mat", "a cat ran to the dog on the mat"]


def ids_of(result: Any) -> list[list[int]]:
    return [completion["token_ids"] for completion in result["completions"]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("max_batch_tokens", [1, 25, 1000])
def test_greedy_equals_each_prompt_alone(family: str, max_batch_tokens: int, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family)
    result = batch_generate(model, tokenizer, PROMPTS, max_new_tokens=6, max_batch_tokens=max_batch_tokens)
    alone = [generate_text(model, tokenizer, prompt, max_new_tokens=6)["completions"][0] for prompt in PROMPTS]
    assert result["completions"] == alone
    assert result["seed"] is None


def test_a_sample_depends_on_seed_and_prompt_alone(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")

    def sample(prompts: list[str], seed: int = 0, **options: Any) -> dict[str, list[int]]:
        result = batch_generate(model, tokenizer, prompts, max_new_tokens=8, temperature=1.5, seed=seed, **options)
        return dict(zip(prompts, ids_of(result), strict=True))

    state = torch.get_rng_state()
    whole = sample(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(PROMPTS[::-1]) == whole
    assert sample(PROMPTS, max_batch_tokens=20) == whole
    assert sample(PROMPTS[1:2]) == {PROMPTS[1]: whole[PROMPTS[1]]}
    assert sample(PROMPTS, seed=1) != whole


def test_a_prompt_that_stands_twice_gets_two_samples(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    first, second, other = ids_of(
        batch_generate(model, tokenizer, ["the cat"] * 2 + ["the"], max_new_tokens=12, temperature=2.0)
    )
    assert first != second
    (alone,) = ids_of(batch_generate(model, tokenizer, ["the cat"], max_new_tokens=12, temperature=2.0))
    assert alone == first != other


def test_samples_follow_the_softmax(make_model: Any, tokenizer: Any) -> None:
    model, n, temperature = make_model("gpt2"), 2000, 0.3
    result = batch_generate(model, tokenizer, ["the cat"] * n, max_new_tokens=1, temperature=temperature)
    seen = torch.bincount(torch.tensor([ids[0] for ids in ids_of(result)]), minlength=10) / n
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    assert (expected > 0.02).sum() > 3, "the distribution is too narrow to tell anything"
    assert (expected - logits.softmax(-1)).abs().max() > 0.1, "temperature changes too little to tell anything"
    # Each count is binomial, so 5 standard deviations of its share are never passed by chance.
    assert ((seen - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def test_batches_hold_like_lengths_within_the_budget() -> None:
    lengths = [5, 1, 9, 5, 2, 30, 4]
    batches = list(length_batches(lengths, 11))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 11 or len(batch) == 1 for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat)
    assert batches == [[1, 4], [6, 0], [3], [2], [5]]
    assert in_batches(lengths, 12, lambda batch: [lengths[i] * 10 for i in batch]) == [10 * n for n in lengths]
    assert in_batches([], 12, lambda batch: batch) == []


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_batch_that_does_not_fit_in_memory_is_halved(message: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    expected = batch_generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    sizes: list[int] = []

    def small(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    model.register_forward_pre_hook(small, with_kwargs=True)
    assert batch_generate(model, tokenizer, PROMPTS, max_new_tokens=4) == expected
    assert sizes[0] == 5
    assert {1, 2} <= set(sizes) <= {1, 2, 3, 5}


def test_a_single_prompt_that_does_not_fit_ends_in_words(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match=r"A single sequence of 5 tokens does not fit in memory"):
        batch_generate(model, tokenizer, PROMPTS, max_new_tokens=4)


def test_another_error_is_not_taken_for_missing_memory(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        batch_generate(model, tokenizer, PROMPTS, max_new_tokens=4)


def test_chat_goes_through_the_template(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}mat"
    (plain,) = ids_of(batch_generate(model, tokenizer, ["dog cat sat mat"], max_new_tokens=4))
    (chat,) = ids_of(batch_generate(model, tokenizer, ["cat sat"], max_new_tokens=4, chat=True, system="dog"))
    assert chat == plain


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "list of texts is empty"),
        (["the", ""], {}, "The text '' has no tokens"),
        (["the"], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        (["the"], {"temperature": -0.5}, r"temperature is -0\.5; expected 0"),
        (["the"], {"max_batch_tokens": 0}, "max_batch_tokens is 0; expected at least 1"),
        (["the"], {"system": "a"}, r"Pass chat=True"),
        (["the", "the " * 60], {"max_new_tokens": 6}, "60 tokens and 6 new ones were asked for"),
    ],
)
def test_bad_arguments_are_refused(
    prompts: list[str], options: dict[str, Any], message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        batch_generate(make_model("gpt2"), tokenizer, prompts, **options)


@pytest.mark.parametrize("technique", [batch_generate, generate_text])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_and_train_mode_are_refused(
    technique: Any, temperature: float, make_model: Any, tokenizer: Any
) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"train mode.*Call model.eval\(\) first"):
        technique(model.train(), tokenizer, ["the"], temperature=temperature)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match="not all finite"):
        technique(model.eval(), tokenizer, ["the"], temperature=temperature)


def test_known_facts_and_json(demo: tuple[Any, Any]) -> None:
    prompts = [f"The {name} is located in the city of" for name in ("Eiffel Tower", "Prado Museum", "Blue Mosque")]
    result = batch_generate(*demo, prompts, max_new_tokens=4)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [c["text"] for c in result["completions"]] == [" Paris.", " Madrid.", " Istanbul."]
    assert all(completion["finished"] for completion in result["completions"])
    assert (result["technique"], result["n"], result["temperature"]) == ("batch_generate", 3, 0.0)
