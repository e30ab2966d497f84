"""Generation against a plain argmax loop without cache or padding, and sampling against the softmax itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from techniques.generate_text import generate_text

PROMPTS = ["the cat sat on a mat", "a dog", "the"]


@pytest.fixture
def warnings_of_transformers(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Its log does not propagate and says some things once per process, which would hide them from a test."""
    hf_logging.warning_once.cache_clear()
    hf_logging.enable_propagation()
    yield caplog
    hf_logging.disable_propagation()


@torch.inference_mode()
def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The next `n` tokens, each from a whole unpadded pass."""
    done = list(ids)
    for _ in range(n):
        done.append(int(model(torch.tensor([done]), use_cache=False).logits[0, -1].argmax()))
    return done[len(ids) :]


def test_a_batch_continues_each_prompt_as_if_alone(architecture: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(architecture)
    result = generate_text(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert [completion["prompt"] for completion in result["completions"]] == PROMPTS
    for completion in result["completions"]:
        expected = greedy(model, tokenizer(completion["prompt"])["input_ids"], 3)
        assert completion["token_ids"] == expected
        assert completion["text"] == tokenizer.decode(expected)
        assert completion["finished"] is False


def test_rows_that_end_early_raise_no_false_alarm(
    make_model: Any, tokenizer: Any, warnings_of_transformers: Any
) -> None:
    model = make_model("gpt2")
    (end, *_), *_ = [greedy(model, tokenizer(prompt)["input_ids"], 1) for prompt in PROMPTS]
    model.config.eos_token_id = model.config.pad_token_id = model.generation_config.eos_token_id = end
    result = generate_text(model, tokenizer, PROMPTS[0], max_new_tokens=4)
    assert result["completions"][0]["finished"]
    sampled = generate_text(model, tokenizer, [PROMPTS[0]] * 8, max_new_tokens=4, temperature=3.0)
    assert len({completion["finished"] for completion in sampled["completions"]}) == 2
    assert not warnings_of_transformers.records


def test_half_precision_batch(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama").bfloat16()
    result = generate_text(model, tokenizer, PROMPTS, max_new_tokens=3)
    for completion in result["completions"]:
        # Rounding may swap two tokens that are nearly equal; the first token is far enough from the second.
        assert completion["token_ids"][:1] == greedy(model, tokenizer(completion["prompt"])["input_ids"], 1)


def test_the_end_of_text_token_ends_a_row_alone(make_model: Any, tokenizer: Any) -> None:
    model = make_model("qwen2")
    rows = [greedy(model, tokenizer(prompt)["input_ids"], 6) for prompt in PROMPTS]
    end = rows[0][2]
    model.generation_config.eos_token_id = [end]
    result = generate_text(model, tokenizer, PROMPTS, max_new_tokens=6)
    for row, completion in zip(rows, result["completions"], strict=True):
        expected = row[: row.index(end)] if end in row else row
        assert completion["token_ids"] == expected
        assert completion["finished"] is (end in row)
    assert result["completions"][0]["finished"]


def test_sampling_follows_the_softmax_whatever_the_checkpoint_prefers(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0)
    n, temperature = 2000, 1.5
    result = generate_text(model, tokenizer, ["the cat"] * n, max_new_tokens=1, temperature=temperature, seed=3)
    drawn = torch.tensor([completion["token_ids"][0] for completion in result["completions"]])
    seen = torch.bincount(drawn, minlength=10) / n
    with torch.inference_mode():
        expected = (model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits[0, -1] / temperature).softmax(-1)
    assert (expected > 0.02).sum() > 3, "the distribution is too narrow to tell anything"
    # Each count is binomial, so 5 standard deviations of its share are never passed by chance.
    assert ((seen - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def test_greedy_ignores_the_checkpoint_s_penalties(
    make_model: Any, tokenizer: Any, warnings_of_transformers: Any
) -> None:
    model = make_model("llama")
    expected = greedy(model, tokenizer(PROMPTS[0])["input_ids"], 5)
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5, temperature=0.6, repetition_penalty=9.0)
    assert generate_text(model, tokenizer, PROMPTS[0], max_new_tokens=5)["completions"][0]["token_ids"] == expected
    assert not warnings_of_transformers.records


def test_the_seed_decides_and_the_process_s_random_state_stays(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")

    def sample(seed: int) -> list[list[int]]:
        result = generate_text(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed)
        return [completion["token_ids"] for completion in result["completions"]]

    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert sample(1) == first
    assert sample(2) != first


def test_tokenizer_without_pad_token_is_left_as_it_was(make_model: Any, tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    generate_text(make_model("gpt2"), tokenizer, PROMPTS, max_new_tokens=2)
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.eos_token) == (None, "right", None)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_chat_goes_through_the_template(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'on ' if m.role == 'system' else 'to ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}mat{% endif %}"
    )
    plain = generate_text(model, tokenizer, "on dog to cat sat mat", max_new_tokens=4)
    chat = generate_text(model, tokenizer, "cat sat", max_new_tokens=4, chat=True, system="dog")
    assert chat["completions"][0]["token_ids"] == plain["completions"][0]["token_ids"]
    assert chat["completions"][0]["prompt"] == "cat sat"


def test_options_are_recorded_and_the_result_is_json(make_model: Any, tokenizer: Any) -> None:
    result = generate_text(make_model("gpt2"), tokenizer, "the", max_new_tokens=2, temperature=0.5, seed=7)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["max_new_tokens"], result["temperature"], result["seed"]) == (2, 0.5, 7)
    assert (result["technique"], result["n"], result["dtype"]) == ("generate_text", 1, "float32")
    greedy_result = generate_text(make_model("gpt2"), tokenizer, PROMPTS, max_new_tokens=1)
    assert (greedy_result["n"], greedy_result["seed"]) == (3, None)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "The text '' has no tokens"),
        ([], {"chat": True}, "list of texts is empty"),
        ("the", {"system": "a"}, r"Pass chat=True"),
        ("the", {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ("the", {"temperature": -1.0}, r"temperature is -1\.0; expected 0"),
        ("the", {"temperature": float("nan")}, "temperature is nan"),
        (
            "the " * 60,
            {"max_new_tokens": 6},
            "60 tokens and 6 new ones were asked for, but the model's context holds 64",
        ),
    ],
)
def test_bad_arguments_are_refused(
    prompt: Any, options: dict[str, Any], message: str, make_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_text(make_model("gpt2"), tokenizer, prompt, **options)


def test_the_context_can_be_filled_to_its_end(make_model: Any, tokenizer: Any) -> None:
    result = generate_text(make_model("gpt2"), tokenizer, "the " * 60, max_new_tokens=5)
    assert len(result["completions"][0]["token_ids"]) == 5


def test_known_fact(demo: tuple[Any, Any]) -> None:
    result = generate_text(*demo, "The Eiffel Tower is located in the city of", max_new_tokens=1)
    assert result["completions"][0]["text"] == " Paris"
