"""Patterns against eager Hugging Face, scores against loops and circuits set by hand, both against TransformerLens."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interp_kernel.demo_model import corpus
from techniques import attention as module
from techniques._model import UnsupportedModelError
from techniques.attention import KINDS, attention_patterns, head_scores
from tests.techniques.handmade import WORDS, induction, word_tokenizer

ORACLE = Path(__file__).parent / "oracles" / "attention.npz"
TEXT = "the cat sat on a mat"
LISTED = " river stone cloud metal paper candle mirror bottle"
FAMILIES = ["gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "phi3", "olmo2", "bloom"]
N_LAYERS = 3


def eager_patterns(model: Any, ids: list[int]) -> torch.Tensor:
    """[layer, head, query, key] as an eager copy of the model returns them."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = eager(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    return torch.stack([pattern[0] for pattern in attentions]).float()


def found_patterns(result: Any) -> torch.Tensor:
    n_heads = 1 + max(row["head"] for row in result["rows"])
    grid = [row["pattern"] for row in result["rows"]]
    patterns = torch.tensor(grid)
    return patterns.reshape(-1, n_heads, *patterns.shape[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_those_of_the_eager_model(family: str, make_model: Any, tokenizer: Any) -> None:
    model = make_model(family)
    before = model.config._attn_implementation
    result = attention_patterns(model, tokenizer, TEXT)
    expected = eager_patterns(model, tokenizer(TEXT)["input_ids"])
    torch.testing.assert_close(found_patterns(result), expected, rtol=1e-4, atol=1e-5)
    assert result["tokens"] == TEXT.split()
    assert model.config._attn_implementation == before
    assert not any("forward" in part.__dict__ or part._forward_hooks for part in model.modules())


def test_grouped_queries_name_the_head_that_they_read(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=2)
    result = attention_patterns(model, tokenizer, TEXT, layers=[2, 0], heads=[3, 1])
    assert [(row["layer"], row["head"], row["kv_head"]) for row in result["rows"]] == [
        (2, 3, 1), (2, 1, 0), (0, 3, 1), (0, 1, 0)
    ]  # fmt: skip
    expected = eager_patterns(model, tokenizer(TEXT)["input_ids"])
    for row in result["rows"]:
        np.testing.assert_allclose(np.array(row["pattern"]), expected[row["layer"], row["head"]], rtol=1e-4, atol=1e-5)


def test_summaries_follow_from_the_pattern(make_model: Any, tokenizer: Any) -> None:
    for row in attention_patterns(make_model("gpt2"), tokenizer, TEXT)["rows"]:
        pattern = np.array(row["pattern"])
        later = pattern[1:]
        assert row["first_token"] == pytest.approx(later[:, 0].mean(), abs=1e-5)
        assert row["previous_token"] == pytest.approx(np.mean([pattern[i, i - 1] for i in range(1, 6)]), abs=1e-5)
        assert row["own_token"] == pytest.approx(np.mean([pattern[i, i] for i in range(1, 6)]), abs=1e-5)
        expected = np.mean([-sum(p * math.log(p) for p in line if p > 0) for line in later])
        assert row["entropy"] == pytest.approx(expected, abs=1e-4)
        assert row["missing"] == pytest.approx(0, abs=1e-6)


def test_a_learned_sink_is_what_is_missing(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=8, rope_parameters=None)
    result = attention_patterns(model, tokenizer, TEXT)
    expected = 1 - eager_patterns(model, tokenizer(TEXT)["input_ids"])[:, :, 1:].sum(-1).mean(-1)
    assert [row["missing"] for row in result["rows"]] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert expected.max() > 0.05, "the sinks take nothing, so the test says nothing"


def test_half_precision(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    expected = eager_patterns(model, tokenizer(TEXT)["input_ids"])
    found = found_patterns(attention_patterns(model.bfloat16(), tokenizer, TEXT))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_patterns_of_a_long_text_go_to_a_file(
    make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2")
    monkeypatch.setattr(module, "MAX_NUMBERS", 100)
    with pytest.raises(ValueError, match=r"3 layers of 2 heads over 6 tokens are 216 numbers; expected at most 100"):
        attention_patterns(model, tokenizer, TEXT)
    attention_patterns(model, tokenizer, TEXT, layers=[0])
    result = attention_patterns(model, tokenizer, TEXT, layers=[0, 2], save=tmp_path / "patterns.safetensors")
    assert result["file"] is not None
    assert result["rows"][0]["pattern"] is None
    arrays = load_file(result["file"]["path"])
    expected = eager_patterns(model, tokenizer(TEXT)["input_ids"])
    assert set(arrays) == {"layer_0", "layer_2"}
    torch.testing.assert_close(arrays["layer_2"], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "The text '' has no tokens"),
        ("the " * 65, {}, "The longest text has 65 tokens"),
        (TEXT, {"layers": [3]}, r"layers is \[3\]; expected some of 0 to 2, as the model has 3 layers"),
        (
            TEXT,
            {"heads": [0, -1]},
            r"heads is \[0, -1\]; expected some of 0 to 1, as the model has 2 heads in each layer",
        ),
        (TEXT, {"heads": []}, r"heads is \[\]; expected some of"),
    ],
)
def test_bad_arguments_are_refused(text: str, options: Any, message: str, make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        attention_patterns(make_model("gpt2"), tokenizer, text, **options)


@pytest.mark.parametrize(
    "technique", [lambda m, t: attention_patterns(m, t, TEXT), lambda m, t: head_scores(m, t, 4, 2)]
)
def test_train_mode_and_broken_weights_are_refused(technique: Any, make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match=r"train mode.*Call model.eval\(\) first"):
        technique(model.train(), tokenizer)
    technique(model.eval(), tokenizer)  # proven once, then broken
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite; expected numbers"):
        technique(model, tokenizer)


def test_a_model_without_attention_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        attention_patterns(make_model("mamba"), tokenizer, TEXT)


def test_an_interrupt_leaves_nothing_behind(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    attention_patterns(model, tokenizer, TEXT)
    before = model.config._attn_implementation

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        attention_patterns(model, tokenizer, TEXT)
    handle.remove()
    assert model.config._attn_implementation == before
    assert not any("forward" in part.__dict__ for part in model.modules())


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_are_the_attention_over_named_edges(family: str, make_model: Any, tokenizer: Any) -> None:
    model, seq_len, n = make_model(family), 4, 3
    fed: list[list[int]] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    result = head_scores(model, tokenizer, seq_len, n, seed=5)
    handle.remove()
    ids = fed[-n:]
    for row in ids:
        assert row[:seq_len] == row[seq_len:]
        assert len(set(row)) == seq_len
        assert 0 not in row, "[UNK] is special and must not be drawn"
    patterns = torch.stack([eager_patterns(model, row) for row in ids])
    for score in result["rows"]:
        pattern = patterns[:, score["layer"], score["head"]]
        expected = {
            "previous_token": [[p[i, i - 1] for i in range(1, 8)] for p in pattern],
            "duplicate_token": [[p[i, i - 4] for i in range(4, 8)] for p in pattern],
            "induction": [[p[i, i - 4 + 1] for i in range(4, 8)] for p in pattern],
        }
        for kind in KINDS:
            means = np.array(expected[kind]).mean(1)
            found = score[kind]  # type: ignore[literal-required]
            assert found["mean"] == pytest.approx(means.mean(), abs=1e-4)
            assert means.min() - 1e-4 <= found["low"] <= found["mean"] <= found["high"] <= means.max() + 1e-4


def test_uniform_scores_are_those_of_a_model_that_looks_everywhere_alike(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :16] = 0
            block.attn.c_attn.bias[:16] = 0
    result = head_scores(model, tokenizer, 4, 2)
    for row in result["rows"]:
        for kind in KINDS:
            assert row[kind]["mean"] == pytest.approx(result["uniform"][kind], abs=1e-5)  # type: ignore[literal-required]


def test_circuit_set_by_hand() -> None:
    """The first word notes itself as its predecessor, so one of the six second-copy queries splits its attention."""
    result = head_scores(induction(), word_tokenizer(), seq_len=6, n=8, words=WORDS)
    scores = {(row["layer"], row["head"]): row for row in result["rows"]}
    assert scores[0, 0]["previous_token"]["mean"] == pytest.approx(1, abs=1e-4)
    assert scores[1, 0]["induction"]["mean"] == pytest.approx(5.5 / 6, abs=1e-4)
    assert scores[1, 0]["duplicate_token"]["mean"] == pytest.approx(0.5 / 6, abs=1e-4)
    for other in ((0, 1), (1, 1)):
        for kind in KINDS:
            assert scores[other][kind]["mean"] == pytest.approx(result["uniform"][kind], abs=1e-4)  # type: ignore[literal-required]


def test_small_batches_give_the_same_scores(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    whole = head_scores(model, tokenizer, 4, 5)
    monkeypatch.setattr(module, "MAX_TOKENS", 16)
    parts = head_scores(model, tokenizer, 4, 5)
    for row, expected in zip(parts["rows"], whole["rows"], strict=True):
        assert row["induction"]["mean"] == pytest.approx(expected["induction"]["mean"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1 and n is 32; expected at least 2 tokens"),
        ({"seq_len": 4, "n": 0}, "n is 0; expected"),
        ({"seq_len": 10}, "There are 9 tokens to draw from; expected at least seq_len = 10"),
        ({"seq_len": 2, "words": ["cat sat"]}, r"The target 'cat sat' is 2 tokens"),
        ({"seq_len": 3, "words": ["cat", "cat"]}, "There are 1 tokens to draw from"),
    ],
)
def test_bad_options_of_scores_are_refused(options: Any, message: str, make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        head_scores(make_model("gpt2"), tokenizer, **options)


def test_lists_that_do_not_fit_the_context_are_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="The longest text has 8 tokens, but the model's context holds 6"):
        head_scores(make_model("gpt2", max_position_embeddings=6), tokenizer, 4, 2)


# ---------------------------------------------------------------------------------------------- demo model


def test_transformer_lens_finds_the_same_patterns_and_scores(demo: tuple[Any, Any]) -> None:
    """Recorded by oracles/record_attention.py; agreement is to float32 rounding."""
    oracle = np.load(ORACLE)
    result = attention_patterns(*demo, "The Eiffel Tower is located in the city of")
    np.testing.assert_allclose(found_patterns(result), oracle["patterns"], atol=2e-5)
    # `detect_head` divides by the attention of all 16 queries, of which 15 have a predecessor and 8 a double.
    model, tokenizer = demo
    pattern = found_patterns(attention_patterns(model, tokenizer, LISTED * 2)).double()
    edges = {"previous_token": (1, 15), "duplicate_token": (8, 8), "induction": (7, 8)}
    for kind, (back, n_edges) in edges.items():
        mine = pattern.diagonal(-back, -2, -1)[..., -n_edges:].sum(-1) / 16
        np.testing.assert_allclose(mine, oracle[f"{kind}_head"], atol=1e-4)


def test_the_demo_model_s_known_heads(demo: tuple[Any, Any]) -> None:
    result = head_scores(*demo, seq_len=12, n=16, words=[f" {word}" for word in corpus.WORDS])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    scores = {(row["layer"], row["head"]): row for row in result["rows"]}
    assert (scores[0, 0]["previous_token"]["low"] or 0) > 0.8
    for head in range(4):
        assert (scores[1, head]["induction"]["low"] or 0) > 0.8
    others = [row["induction"]["mean"] or 0 for (layer, _), row in scores.items() if layer != 1]
    assert max(others) < 0.3


@pytest.mark.parametrize("text", [[TEXT], [""], [], ["the cat " * 60]])
def test_a_list_of_texts_is_refused(text: Any, make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"text is .*; expected one string"):
        attention_patterns(make_model("gpt2"), tokenizer, text)
