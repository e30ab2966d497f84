"""Activations are those of each text run by itself, at the token that was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from techniques.extract import extract

TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat on a mat to the cat", "cat"]


def hidden_states(model: Any, tokenizer: Any, text: str) -> Any:
    """resid_pre of each block for one text, [n_layers pos d_model]; the last state of transformers is normed."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
    return torch.stack(states[:-1])[:, 0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("max_tokens", [1, 12, 8192])
def test_each_row_is_the_text_run_alone(make_model: Any, tokenizer: Any, architecture: str, max_tokens: int) -> None:
    model = make_model(architecture)
    found = extract(model, tokenizer, TEXTS, site="resid_pre", max_tokens=max_tokens)
    assert found["shape"] == [4, 3, 16]
    assert found["layers"] == [0, 1, 2]
    assert found["activations"] is not None
    for row, text in zip(found["activations"], TEXTS, strict=True):
        assert torch.allclose(row, hidden_states(model, tokenizer, text)[:, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("last", [(5, 6), (2, 3), (8, 9), (0, 1)]),
        ("mean", [(0, 6), (0, 3), (0, 9), (0, 1)]),
        (0, [(0, 1)] * 4),
        (-1, [(5, 6), (2, 3), (8, 9), (0, 1)]),
        ([1, -1, "on a mat", (0, 1)], [(1, 2), (2, 3), (5, 6), (0, 1)]),
        ([(1, 4), (0, 3), (8, 9), "cat"], [(1, 4), (0, 3), (8, 9), (0, 1)]),
    ],
)
def test_positions(make_model: Any, tokenizer: Any, position: Any, expected: list[tuple[int, int]]) -> None:
    model = make_model("gpt2")
    found = extract(model, tokenizer, TEXTS, layers=[2, 0], site="resid_post", position=position)
    assert [(text["start"], text["stop"]) for text in found["texts"]] == expected
    assert found["activations"] is not None
    for row, text, (start, stop) in zip(found["activations"], TEXTS, expected, strict=True):
        # resid_post of layer 0 is resid_pre of layer 1.
        alone = hidden_states(model, tokenizer, text)[1, start:stop].mean(0)
        assert torch.allclose(row[1], alone, atol=1e-5)
        assert found["texts"][TEXTS.index(text)]["token"] == text.split()[stop - 1]


def test_sites_of_heads_keep_their_shape(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    seen: list[Any] = []
    handle = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**tokenizer(TEXTS[0], return_tensors="pt"))
    handle.remove()
    found = extract(model, tokenizer, TEXTS[:1], layers=[1], site="z", position=3)
    assert found["shape"] == [1, 1, 2, 8]
    assert found["activations"] is not None
    assert torch.allclose(found["activations"].flatten(), seen[0][0, 3], atol=1e-6)


def test_layers_after_the_last_one_needed_do_not_run(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    extract(model, tokenizer, TEXTS, layers=[0])  # the first call checks the whole model once
    ran = []
    for i, block in enumerate(model.transformer.h):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    extract(model, tokenizer, TEXTS, layers=[1, 0])
    assert ran == [0, 1]


def test_bfloat16_comes_back_as_float32(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    exact = extract(model, tokenizer, TEXTS)["activations"]
    rounded = extract(model.to(torch.bfloat16), tokenizer, TEXTS)["activations"]
    assert exact is not None
    assert rounded is not None
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.05 * float(exact.abs().max()))


def test_a_file_holds_the_array(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    found = extract(model, tokenizer, TEXTS, save=tmp_path / "new" / "acts.safetensors")
    assert found["activations"] is None
    assert json.loads(json.dumps(found)) == found
    assert found["file"] is not None
    file = Path(found["file"]["path"])
    assert found["file"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(load_file(file)["activations"], extract(model, tokenizer, TEXTS)["activations"])  # type: ignore[arg-type]


def test_batches_shrink_where_memory_runs_out(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    expected = extract(model, tokenizer, TEXTS * 2)["activations"]
    sizes = limit_memory(model, 2)
    found = extract(model, tokenizer, TEXTS * 2)["activations"]
    assert torch.allclose(found, expected, atol=1e-6)  # type: ignore[arg-type]
    assert max(sizes) == 8
    assert min(sizes) <= 2


def test_a_text_that_never_fits_is_told(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    extract(model, tokenizer, TEXTS)
    limit_memory(model, 0)
    with pytest.raises(MemoryError, match="A single sequence of 1 tokens does not fit"):
        extract(model, tokenizer, TEXTS)


def limit_memory(model: Any, n_rows: int) -> list[int]:
    """Let the model fail as a full device does, for batches above `n_rows`; the sizes that were tried."""
    sizes: list[int] = []

    def fail(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > n_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    return sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"layers is \[3\]; expected \"all\" or some of 0 to 2"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"site": "resid"}, "site 'resid' is not known; expected one of resid_pre"),
        ({"site": "pattern"}, "The site is 'pattern'"),
        ({"position": [0]}, "position has 1 entries for 4 texts"),
        ({"position": 1}, "Position 1 is outside the text 'cat'"),
        ({"position": "dog"}, "The span 'dog' occurs 0 times"),
        ({"position": ["mat", "dog", "mat", (0, 2)]}, "The range 0 to 2 of 'cat' is not inside its 1 tokens"),
    ],
)
def test_wrong_options_are_refused(make_model: Any, tokenizer: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(make_model("gpt2"), tokenizer, TEXTS, **options)


def test_wrong_texts_and_models_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match="texts is the string 'the cat'"):
        extract(model, tokenizer, "the cat")
    with pytest.raises(ValueError, match="The text '' has no tokens"):
        extract(model, tokenizer, ["cat", ""])
    with pytest.raises(ValueError, match="context holds 64"):
        extract(model, tokenizer, ["cat " * 65])
    with pytest.raises(ValueError, match="train mode"):
        extract(model.train(), tokenizer, TEXTS)


def test_activations_that_are_no_numbers_are_refused(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    extract(model, tokenizer, TEXTS)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"text 0 at blocks\.1\.hook_resid_post is infinite or not a number"):
        extract(model, tokenizer, TEXTS)


def test_nothing_is_left_behind(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        extract(model, tokenizer, TEXTS)
    handle.remove()
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_a_full_name_sets_its_layer(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    found = extract(model, tokenizer, TEXTS, site="blocks.1.attn.hook_z")
    assert (found["site"], found["layers"]) == ("z", [1])
    with pytest.raises(ValueError, match="expected a layer of 0 to 2"):
        extract(model, tokenizer, TEXTS, site="blocks.7.attn.hook_z")
