"""Oracles: scikit-learn's AUROC, finite differences, a bias shifted by hand, dictionaries whose features are known."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from interp_kernel.demo_model import corpus
from techniques._sae import SAE
from techniques.sae_features import feature_report
from techniques.steer_feature import _push, steer_feature

LAYER, D_MODEL = 1, 128


def documents(seed: int, n: int) -> list[tuple[str, str]]:
    return list(itertools.islice(corpus.documents(seed), n))


def hidden(model: Any, tokenizer: Any, text: str) -> Tensor:
    """resid_post of LAYER, [pos d_model]."""
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        found: Tensor = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in documents(5, 80)]


@pytest.fixture(scope="module")
def sae(demo: tuple[Any, Any], texts: list[str]) -> SAE:
    """64 random features of the demo model's residual stream around its mean, each active on a few tokens of a hundred,
    and one, the first, along what "PERSONA" at the start of a text is.
    """
    model, tokenizer = demo
    stream = torch.cat([hidden(model, tokenizer, text) for text in texts])
    mean = stream.mean(0)
    rows = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(0))
    persona = torch.stack([hidden(model, tokenizer, text)[0] for text in texts if text.startswith("PERSONA")])
    rows[0] = persona.mean(0) - mean
    rows = torch.nn.functional.normalize(rows, dim=1)
    threshold = ((stream - mean) @ rows.T).quantile(0.95, dim=0).clamp(min=0)
    metadata = {"hook_name": f"blocks.{LAYER}.hook_resid_post"}
    return SAE("jumprelu", rows.T.contiguous(), torch.zeros(64), rows, mean, threshold, metadata=metadata)


def test_auroc_equals_scikit_learn(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    is_ioi = [kind == "ioi" for kind, _ in documents(5, 80)]
    report = feature_report(*demo, sae, texts, range(0, 64, 7), labels={"ioi": is_ioi, "the": " the"})
    model, tokenizer = demo
    by_text = [sae.encode(hidden(model, tokenizer, text)) for text in texts]
    tokens = [i for text in texts for i in tokenizer(text)["input_ids"]]
    the = [i == tokenizer.convert_tokens_to_ids("Ġthe") for i in tokens]
    assert [row["feature"] for row in report["features"]] == list(range(0, 64, 7))
    for row in report["features"]:
        strongest = [features[:, row["feature"]].max().item() for features in by_text]
        everywhere = torch.cat(by_text)[:, row["feature"]].tolist()
        assert row["auroc"]["ioi"] == pytest.approx(roc_auc_score(is_ioi, strongest), abs=1e-5)
        assert row["auroc"]["the"] == pytest.approx(roc_auc_score(the, everywhere), abs=1e-5)
        assert row["density"] == pytest.approx(sum(value > 0 for value in everywhere) / len(everywhere), rel=1e-5)
        assert row["max_activation"] == pytest.approx(max(everywhere), rel=1e-5)
        assert row["histogram"] is not None
        assert sum(row["histogram"]["counts"]) == sum(value > 0 for value in everywhere)
    json.dumps(report, allow_nan=False)


def test_the_best_feature_of_a_label_is_measured_on_other_texts(demo: tuple[Any, Any], sae: SAE) -> None:
    texts = [text for _, text in documents(6, 150)]
    found = feature_report(*demo, sae, texts, labels={"persona": "PERSONA"})
    label = found["labels"][0]
    assert label["feature"] == 0
    assert label["level"] == "token"
    assert label["auroc"] is not None
    assert label["auroc"] > 0.99
    assert [row["feature"] for row in found["features"]] == [0]
    # The half that did not choose is the second, fourth, ... text with the token, and likewise of those without it.
    model, tokenizer = demo
    persona = tokenizer.convert_tokens_to_ids("PERSONA")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    groups = [[i for i, row in enumerate(ids) if (persona in row) is has] for has in (True, False)]
    for name, start in (("auroc_chosen", 0), ("auroc", 1)):
        half = [i for group in groups for i in group[start::2]]
        scores = torch.cat([sae.encode(hidden(model, tokenizer, texts[i]))[:, 0] for i in half])
        truth = [token == persona for i in half for token in ids[i]]
        assert label[name] == pytest.approx(roc_auc_score(truth, scores), abs=1e-5)  # type: ignore[literal-required]


def test_examples_are_the_strongest_tokens(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    model, tokenizer = demo
    row = feature_report(*demo, sae, texts, [3], top_k=4)["features"][0]
    strongest = [sae.encode(hidden(model, tokenizer, text))[:, 3] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -strongest[i].max().item())[:4]
    assert [example["text"] for example in row["examples"]] == order
    for example in row["examples"]:
        values = strongest[example["text"]]
        assert example["position"] == values.argmax()
        start = example["position"] - example["peak"]
        assert example["activations"] == pytest.approx(
            values[start : start + len(example["tokens"])].tolist(), rel=1e-4
        )
        assert "".join(example["tokens"]) in texts[example["text"]]


def test_logit_weights_equal_finite_differences(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    model, tokenizer = demo
    row = feature_report(*demo, sae, texts, [5], top_k=1964)["features"][0]
    strongest = row["examples"][0]
    ids = torch.tensor([tokenizer(texts[strongest["text"]])["input_ids"]])
    double = copy.deepcopy(model).double()
    last: list[Tensor] = []
    hook = double.transformer.ln_f.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        double(ids)
        hook.remove()
        resid, step = last[0][0, strongest["position"]], 1e-4 * sae.w_dec[5].double()
        up, down = (double.lm_head(double.transformer.ln_f(resid + sign * step)) for sign in (1, -1))
    slope = (up - down) / 2e-4
    slope = slope - slope.mean()
    assert row["top_logits"] is not None
    assert row["bottom_logits"] is not None
    for listed in (row["top_logits"], row["bottom_logits"][::-1]):
        weights = [weight["weight"] for weight in listed]
        assert [weight["id"] for weight in listed][:5] == slope.topk(5).indices.tolist()
        assert weights == pytest.approx(slope.sort(descending=True).values.tolist(), abs=1e-5)


def test_a_feature_that_is_never_active_and_a_site_without_logits(demo: tuple[Any, Any], sae: SAE) -> None:
    silent = SAE("standard", sae.w_enc, torch.full((64,), -1e6), sae.w_dec, sae.b_dec, metadata=sae.metadata)
    row = feature_report(*demo, silent, ["The cat"], [2])["features"][0]
    assert (row["max_activation"], row["mean_activation"], row["histogram"], row["top_logits"]) == (
        0.0,
        None,
        None,
        None,
    )
    z = SAE("standard", sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec * 0, metadata={"hook_name": "blocks.1.attn.hook_z"})
    row = feature_report(*demo, z, ["The Eiffel Tower is in Paris."], [2])["features"][0]
    assert row["examples"]
    assert row["top_logits"] is None


def test_what_feature_report_refuses(demo: tuple[Any, Any], sae: SAE) -> None:
    texts = ["The Eiffel Tower is in Paris.", "The cat"]
    for options, message in (
        ({}, "Neither features nor labels are given"),
        ({"features": [64]}, "Feature 64 does not exist; the SAE has 64"),
        ({"features": [1], "top_k": 0}, "top_k is 0; expected at least 1"),
        ({"labels": {"x": [True]}}, "'x' has 1 values for 2 texts"),
        ({"labels": {"x": [True, True]}}, "'x' is true of 2 of 2 texts, in 2 of 2 texts; expected positives and negat"),
        ({"labels": {"x": " Paris"}}, "'x' is true of 1 of .* tokens, in 1 of 2 texts"),
        ({"labels": {"x": "Zanzibar"}}, "'Zanzibar' is . tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_report(*demo, sae, texts, **options)


@pytest.mark.parametrize("prompts", [["The city of"], ["The Eiffel Tower is located in", "The cat"]])
def test_adding_equals_a_shifted_bias(prompts: list[str], demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    """Adding a vector to resid_post at all tokens is adding it to the bias of the block's last projection."""
    model, tokenizer = demo
    found = steer_feature(*demo, sae, 0, prompts, texts, coefficients=[1.5], max_new_tokens=6)
    unit = max(sae.encode(hidden(model, tokenizer, text))[:, 0].max().item() for text in texts)
    assert found["max_activation"] == pytest.approx(unit, rel=1e-5)
    random = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    directions = {False: sae.w_dec[0], True: random / random.norm()}  # both of norm 1
    for (i, prompt), control in itertools.product(enumerate(prompts), (False, True)):
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            shifted.transformer.h[LAYER].mlp.c_proj.bias += 1.5 * unit * directions[control]
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            rows = [row for row in found["rows"] if row["prompt"] == i and row["control"] is control]
            clean, steered = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (model, shifted))
            kl = (clean.exp() * (clean - steered)).sum().item()
            new = shifted.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert rows[0]["kl_to_clean"] == pytest.approx(kl, rel=1e-3)
            assert rows[0]["text"] == tokenizer.decode(new, skip_special_tokens=True)
            assert rows[0]["changed"] is (rows[0]["text"] != found["clean"][i])


def test_the_control_is_as_long_and_another_direction(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    runs = [steer_feature(*demo, sae, 0, "The city of", texts, max_new_tokens=3, seed=seed) for seed in (0, 0, 1)]
    controls = [[row["kl_to_clean"] for row in run["rows"] if row["control"]] for run in runs]
    assert controls[0] == controls[1] != controls[2]
    assert all(kl is not None and kl > 0 for kl in controls[0])
    assert [row["control"] for row in runs[0]["rows"]] == [False, True] * 3
    assert [row["coefficient"] for row in runs[0]["rows"]] == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_clamp_sets_the_feature() -> None:
    """With orthogonal rows a feature can be set without moving the others."""
    eye = torch.eye(8)
    sae = SAE("standard", eye, torch.zeros(8), eye, torch.zeros(8))
    x = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for target in (0.0, 3.0):
        after = sae.encode(_push(sae, 2, eye[2], target, "clamp")(x))
        assert torch.allclose(after[..., 2], torch.tensor(target))
        others = [i for i in range(8) if i != 2]
        assert torch.equal(after[..., others], sae.encode(x)[..., others])


def test_adding_nothing_changes_nothing_and_clamping_does(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    prompt = "The Eiffel Tower is located in the city of Paris"
    for mode, is_zero in (("add", True), ("clamp", False)):
        found = steer_feature(*demo, sae, 0, prompt, texts, coefficients=[0.0], mode=mode, max_new_tokens=2)  # type: ignore[arg-type]
        kl = found["rows"][0]["kl_to_clean"]
        assert kl is not None
        assert (kl < 1e-9) is is_zero


def test_what_steer_feature_refuses(demo: tuple[Any, Any], sae: SAE, texts: list[str]) -> None:
    silent = SAE("standard", sae.w_enc, torch.full((64,), -1e6), sae.w_dec, sae.b_dec, metadata=sae.metadata)
    for which, feature, options, message in (
        (sae, -1, {}, "Feature -1 does not exist; the SAE has 64"),
        (sae, 0, {"coefficients": []}, r"coefficients is \[\]; expected at least one"),
        (sae, 0, {"coefficients": [math.nan]}, r"coefficients is \[nan\]"),
        (sae, 0, {"mode": "set"}, "mode is 'set'; expected 'add' or 'clamp'"),
        (silent, 0, {}, "Feature 0 is never active on the 80 reference texts"),
    ):
        with pytest.raises(ValueError, match=message):
            steer_feature(*demo, which, feature, "The cat", texts, **options)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_steering_leaves_no_trace(
    error: type[BaseException], demo: tuple[Any, Any], sae: SAE, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = copy.deepcopy(demo[0])
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(error):
        steer_feature(model, demo[1], sae, 0, "The cat", texts)
    assert not any("forward" in vars(part) for part in model.modules())
