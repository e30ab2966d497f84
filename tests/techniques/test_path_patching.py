"""Path patching against three runs of the model written out by hand, and on models whose circuit is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from techniques import path_patching as module
from techniques.path_patching import PathPatching, path_patching
from tests.techniques import by_hand, handmade
from tests.techniques.oracles.record_patching import PAIRS
from tests.techniques.test_patching import CLEAN, CORRUPTED, MODELS, ORACLE, TINY, fact_pairs, oriented

RECEIVERS = ["logits", "resid_post.1", "m2", "a1.h1<q>", "a2.h0<k>", "a2.h1<v>"]


def parse(name: str) -> tuple[str, int, int]:
    """(kind, layer, head) of a1.h0 or m2."""
    layer, _, head = name[1:].partition(".h")
    return ("head" if name[0] == "a" else "mlp", int(layer), int(head or 0))


def three_runs(model: Any, base: list[int], source: list[int], sender: str, receiver: str, freeze_mlps: bool) -> Tensor:
    """Last logits after the sender's direct route to the receiver; all heads are held by their z."""
    kind, at, head = parse(sender)
    own, other = by_hand.activations(model, base), by_hand.activations(model, source)
    raw: dict[tuple[str, int], Tensor] = {}

    def send(site: str, layer: int, value: Tensor) -> Tensor:
        raw[site, layer] = value
        if site == "z":
            new = own["z", layer].clone()
            if (kind, at) == ("head", layer):
                new[:, head] = other["z", layer][:, head]
            return new
        if site == "mlp_out" and (kind, at) == ("mlp", layer):
            return other["mlp_out", layer]
        return own["mlp_out", layer] if site == "mlp_out" and freeze_mlps else value

    logits = by_hand.forward(model, base, send)
    if receiver == "logits":
        return logits[-1]
    heard = dict(raw)

    def receive(site: str, layer: int, value: Tensor) -> Tensor:
        if receiver.startswith("resid_post"):
            return heard[site, layer] if (site, layer) == ("resid_post", int(receiver[-1])) else value
        if receiver.startswith("m"):
            return heard[site, layer] if (site, layer) == ("mlp_out", int(receiver[1:])) else value
        _, to, slot = parse(receiver[: receiver.index("<")])
        wanted = receiver[-2]
        if (site, layer) != (wanted, to):
            return value
        slot = slot if wanted == "q" else slot * value.shape[1] // model.config.num_attention_heads
        new = value.clone()
        new[:, slot] = heard[site, layer][:, slot]
        return new

    return by_hand.forward(model, base, receive)[-1]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize(("family", "options"), MODELS)
def test_every_path_equals_three_runs_of_the_model_written_out(
    family: str, options: Any, freeze_mlps: bool, direction: Any, make_model: Any, tokenizer: Any
) -> None:
    model = make_model(family, **options)
    pairs = [(CLEAN, CORRUPTED), ("a dog sat on the cat", "a mat sat to the cat")]
    answers = oriented(model, tokenizer, pairs)
    result = path_patching(model, tokenizer, pairs, answers, "heads+mlps", RECEIVERS, freeze_mlps, direction, **TINY)
    assert len(result["rows"]) == 9 + 6 + 8 + 3 + 6 + 6
    for row in result["rows"]:
        found = []
        for (clean, corrupted), answer in zip(pairs, answers, strict=True):
            texts = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
            base, source = (tokenizer(text)["input_ids"] for text in texts)
            logits = three_runs(model, base, source, row["sender"], row["receiver"], freeze_mlps)
            right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in answer)
            found.append((logits[right] - logits[wrong]).item())
        assert row["patched"] == pytest.approx(sum(found) / 2, abs=2e-5), row


def test_a_frozen_route_is_one_term_of_the_receivers_input(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2").double()
    base, source = (tokenizer(text)["input_ids"] for text in (CLEAN, CORRUPTED))
    own, other = by_hand.activations(model, base), by_hand.activations(model, source)
    block, reader = model.transformer.h[0], model.transformer.h[2]
    output = block.attn.c_proj.weight[8:16]  # rows of head 1, whose width is 8
    told = own["resid_pre", 2] + (other["z", 0] - own["z", 0])[:, 1] @ output
    normed = layer_norm(told, (16,), reader.ln_1.weight, reader.ln_1.bias, reader.ln_1.eps)
    query = (normed @ reader.attn.c_attn.weight + reader.attn.c_attn.bias)[:, :8]  # head 0

    def set_query(site: str, layer: int, value: Tensor) -> Tensor:
        return torch.stack([query, value[:, 1]], 1) if (site, layer) == ("q", 2) else value

    logits = by_hand.forward(model, base, set_query)[-1]
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    right, wrong = (tokenizer.convert_tokens_to_ids(text) for text in answers[0])
    result = path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, ["a0.h1"], ["a2.h0<q>"], **TINY)
    assert result["rows"][0]["patched"] == pytest.approx((logits[right] - logits[wrong]).item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_paths_into_heads_equal_those_of_transformer_lens(name: str, demo: tuple[Any, Any]) -> None:
    pair, answer = PAIRS[name]
    receivers = [f"a{layer}.h{head}<{site}>" for site in "qkv" for layer in range(1, 4) for head in range(4)]
    result = path_patching(*demo, [pair], [answer], "heads", receivers, direction="denoise")
    assert len(result["rows"]) == 3 * 4 * (4 + 8 + 12)
    for row in result["rows"]:
        _, layer, head = parse(row["sender"])
        _, to_layer, to_head = parse(row["receiver"][:-3])
        expected = ORACLE[f"{name}_{row['receiver'][-2]}_path"][layer, head, to_layer, to_head]
        assert row["patched"] == pytest.approx(expected.item(), abs=2e-4), row


# ---------------------------------------------------------------------------------------------- known circuits


def effects(result: PathPatching) -> dict[tuple[str, str], float]:
    assert all(row["effect"] is not None for row in result["rows"])
    return {(row["sender"], row["receiver"]): row["effect"] for row in result["rows"] if abs(row["effect"]) > 1e-5}  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("freeze_mlps", [True, False])
def test_the_induction_heads_compose_through_the_key(freeze_mlps: bool, direction: Any) -> None:
    # blue and gold stay where they are; what changes is which of them a `red` stands before.
    pair = ("plum red blue pink gold red", "plum pink blue red gold red")
    receivers = ["logits", "a1.h0<q>", "a1.h0<k>", "a1.h0<v>", "m1", "a1.h1<k>"]
    words = handmade.word_tokenizer()
    result = path_patching(
        handmade.induction(), words, [pair], [("blue", "gold")], "heads+mlps", receivers, freeze_mlps, direction
    )
    assert effects(result) == pytest.approx({("a0.h0", "a1.h0<k>"): 1.0, ("a1.h0", "logits"): 1.0}, abs=1e-5)


def test_a_looked_up_fact_goes_through_the_mlp_and_not_around_it() -> None:
    model, words = handmade.looked_up_facts([1, 2, 3, 4, 5, 6, 7, 0]), handmade.word_tokenizer()
    pair, answers = ("plum red plum", "plum gold plum"), [("blue", "grey")]  # red -> blue, gold -> grey
    held = path_patching(model, words, [pair], answers, "heads+mlps", ["logits", "m0", "m1"])
    assert effects(held) == pytest.approx({("a0.h0", "m1"): 1.0, ("m1", "logits"): 1.0}, abs=1e-5)
    free = path_patching(model, words, [pair], answers, "heads+mlps", ["logits", "m0", "m1"], freeze_mlps=False)
    expected = {("a0.h0", "m1"): 1.0, ("m1", "logits"): 1.0, ("a0.h0", "logits"): 1.0}
    assert effects(free) == pytest.approx(expected, abs=1e-5)


def test_receivers_in_one_list_are_changed_together() -> None:
    model, words = handmade.induction(), handmade.word_tokenizer()
    pair = ("plum red blue pink gold red", "plum pink blue red gold red")
    parts: list[Any] = [[("head", 1, 0, "q"), ("head", 1, 0, "k")], ("head", 1, 0, "q"), ("resid_post", 0)]
    result = path_patching(model, words, [pair], [("blue", "gold")], [("head", 0, 0)], parts)
    assert result["receivers"] == ["a1.h0<q>+a1.h0<k>", "a1.h0<q>", "resid_post.0"]
    assert [row["effect"] for row in result["rows"]] == pytest.approx([1.0, 0.0, 1.0], abs=1e-5)


def test_the_demo_model_looks_facts_up_in_its_first_mlp(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(6)
    result = path_patching(*demo, pairs, answers, "heads+mlps", ["logits", "m3"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["n"], result["seed"], result["direction"]) == (6, 0, "noise")
    effect = {(row["sender"], row["receiver"]): row["effect"] for row in result["rows"]}
    assert max(effect, key=lambda path: effect[path] or 0.0) == ("m3", "logits")
    assert all(abs(effect[f"a0.h{head}", "logits"] or 0.0) < 0.01 for head in range(4))
    assert {row["receiver"] for row in result["rows"] if row["sender"] == "m3"} == {"logits"}


# ---------------------------------------------------------------------------------------------- conditions


def test_small_batches_give_the_same_rows(make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    whole = path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, "heads", RECEIVERS, **TINY)
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    parts = path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, "heads", RECEIVERS, **TINY)
    assert [row["patched"] for row in parts["rows"]] == pytest.approx(
        [row["patched"] for row in whole["rows"]], abs=1e-5
    )


def test_heads_that_share_a_key_are_named(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", num_key_value_heads=1)
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    result = path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, "heads", ["a1.h1<k>", "a1.h1<q>"], **TINY)
    warning, _ = result["warnings"]
    assert (
        warning == "The receiver a1.h1<k> is read by heads 0 to 1 of layer 1, which share it; all of them are changed."
    )


def gaining(model: Any, tokenizer: Any, pair: tuple[str, str]) -> tuple[str, str]:
    """The answers that gain and lose most from the clean over the corrupted prompt, in any family."""
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in pair]
    with torch.no_grad():
        gain = (model(ids[0]).logits - model(ids[1]).logits)[0, -1]
    gain[[0, int(ids[0][0, -1])]] = 0
    return tokenizer.decode([int(gain.argmax())]), tokenizer.decode([int(gain.argmin())])


FAMILIES = [
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "phi",
    "phi3",
    "mistral",
    "mixtral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_last_block_hears_what_the_logits_hear(family: str, make_model: Any, tokenizer: Any) -> None:
    model, pair = make_model(family), (CLEAN, "the dog ran to the dog")  # the last words differ: no window hides it
    answer = gaining(model, tokenizer, pair)
    receivers = ["logits", "resid_post.2"]
    result = path_patching(model, tokenizer, [pair], [answer], "heads+mlps", receivers, **TINY)
    half = len(result["rows"]) // 2
    logits, stream = ([row["patched"] for row in part] for part in (result["rows"][:half], result["rows"][half:]))
    assert half == 9
    assert logits == pytest.approx(stream, abs=1e-4)
    assert len(set(logits)) == 9  # each sender has an effect of its own
    start = result["pairs"][0]["clean_logit_diff"]
    assert all(abs(value - start) > 1e-6 for value in logits)  # type: ignore[operator]


def test_parallel_blocks_do_not_feed_their_own_mlp(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt_neox", use_parallel_residual=True)
    answer = gaining(model, tokenizer, (CLEAN, CORRUPTED))
    result = path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], [answer], "heads", ["m1"], **TINY)
    assert {row["sender"] for row in result["rows"]} == {"a0.h0", "a0.h1"}


def test_model_is_left_as_it_was_after_an_interrupt(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    answers = oriented(model, tokenizer, [(CLEAN, CORRUPTED)])
    path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, **TINY)
    runs = 0

    def stop(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 5:  # clean and corrupted baselines, two recorded runs, then the routes
            raise KeyboardInterrupt

    handle = model.transformer.h[2].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        path_patching(model, tokenizer, [(CLEAN, CORRUPTED)], answers, **TINY)
    handle.remove()
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both"}, 'direction is \'both\'; expected "denoise" or "noise"'),
        ({"senders": "neurons"}, 'components is \'neurons\'; expected "heads", "mlps" or'),
        ({"senders": ["a9.h0"]}, "The component 'a9.h0' is not known; expected a head from a0.h0 to a2.h1"),
        ({"senders": []}, "There are 0 senders"),
        ({"receivers": []}, r"receivers is \[\]; expected a list of each"),
        ({"receivers": "logits"}, "receivers is 'logits'; expected a list"),
        ({"receivers": ["a1.h0"]}, "The receiver 'a1.h0' is not known; expected an input of a head from a0.h0<q>"),
        ({"receivers": [("head", 1, 9, "q")]}, r"The receiver \('head', 1, 9, 'q'\) is not known"),
        ({"receivers": ["m3"]}, "The receiver 'm3' is not known; .* an MLP from m0 to m2"),
        ({"receivers": ["a0.h0<q>"]}, "No sender comes before the receiver 'a0.h0<q>'"),
        ({"senders": ["m1"], "receivers": [["m1", "a1.h0<v>"]]}, r"No sender comes before the receiver 'm1\+a1.h0<v>'"),
        ({"receivers": [["logits", "m2"]]}, "The receiver 'logits' stands in a group; expected it alone"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        path_patching(make_model("gpt2"), tokenizer, [(CLEAN, CORRUPTED)], [("to", "dog")], **{**TINY, **options})


def test_pairs_left_out_are_told(demo: tuple[Any, Any]) -> None:
    pairs, answers = fact_pairs(2)
    longer = (pairs[0][0], pairs[0][1].replace("The", "Guides at the"))
    result = path_patching(*demo, [longer, pairs[1]], answers)
    assert result["warnings"][0] == "1 pairs were left out; `excluded` says why."
    assert result["excluded"][0]["pair"] == 0
