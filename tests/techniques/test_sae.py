"""Oracles: SAELens' files and metrics (recorded), the model's own hidden states, the demo model's corpus."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from interp_kernel.demo_model import corpus
from techniques import _sae_data, _sae_training
from techniques._sae import SAE
from techniques._sae_data import shuffled
from techniques.evaluate_sae import evaluate_sae
from techniques.sae import TrainedSAE, collect_activations, load_sae, save_sae, train_sae

ORACLES = Path(__file__).parent / "oracles"
TEXTS = ["the cat sat on a mat", "a dog ran", "the dog ran to the mat on a mat"]
HOOK = {"hook_name": "blocks.1.hook_resid_post"}


def documents(seed: int, n: int) -> list[str]:
    return [text for _, text in itertools.islice(corpus.documents(seed), n)]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    with np.load(ORACLES / "sae.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def trained(demo: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedSAE:
    folder = tmp_path_factory.mktemp("sae")
    data = collect_activations(*demo, documents(1, 800), folder / "activations.safetensors", layer=1)
    return train_sae(*demo, data, folder / "sae", d_sae=512, k=8, steps=400, batch_size=512, learning_rate=3e-3)


def random_sae(architecture: str = "jumprelu", d_in: int = 16, d_sae: int = 40) -> SAE:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    bias = torch.randn(d_in, generator=generator) * 0.1
    threshold = torch.full((d_sae,), 0.4) if architecture == "jumprelu" else None
    k = 5 if architecture == "topk" else None
    return SAE(architecture, rows.T.contiguous(), torch.zeros(d_sae), rows, bias, threshold, k, metadata=HOOK)


def recorded_sae(recorded: dict[str, Any]) -> SAE:
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
    w_enc, b_enc, w_dec, b_dec, threshold = (torch.from_numpy(recorded[f"sae/{name}"]) for name in names)
    return SAE("jumprelu", w_enc, b_enc, w_dec, b_dec, threshold, metadata=HOOK)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_folder_of_saelens_is_the_same_function(kind: str, recorded: dict[str, Any]) -> None:
    sae = load_sae(ORACLES / f"sae_lens_{kind}")
    x = torch.from_numpy(recorded["batches"][0])
    features = sae.encode(x)
    torch.testing.assert_close(features, torch.from_numpy(recorded[f"{kind}/encoded"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sae.decode(features), torch.from_numpy(recorded[f"{kind}/decoded"]), rtol=1e-4, atol=1e-4
    )
    assert sae.metadata["training_architecture"] == kind


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_save_and_load(architecture: str, tmp_path: Path) -> None:
    sae, x = random_sae(architecture), torch.randn(7, 16)
    again = load_sae(save_sae(sae, tmp_path / "new" / "sae"))
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)), rtol=0, atol=0)
    assert (again.architecture, again.k, again.metadata["hook_name"]) == (architecture, sae.k, HOOK["hook_name"])


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_written_folders_have_the_keys_of_saelens(kind: str, tmp_path: Path) -> None:
    theirs = ORACLES / f"sae_lens_{kind}"
    ours = save_sae(load_sae(theirs), tmp_path)
    configs = [json.loads((folder / "cfg.json").read_text()) for folder in (ours, theirs)]
    assert configs[0].keys() == configs[1].keys()
    assert configs[0]["architecture"] == configs[1]["architecture"]
    assert configs[0]["metadata"] == configs[1]["metadata"]
    shapes = [
        {name: tuple(value.shape) for name, value in load_file(folder / "sae_weights.safetensors").items()}
        for folder in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_heads_are_marked_for_saelens(tmp_path: Path) -> None:
    sae = replace(random_sae(), metadata={"hook_name": "blocks.0.attn.hook_z"})
    assert json.loads((save_sae(sae, tmp_path) / "cfg.json").read_text())["reshape_activations"] == "hook_z"


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_unit_rows_are_the_same_function(architecture: str) -> None:
    sae, x = random_sae(architecture), torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    stretched = replace(sae, w_dec=sae.w_dec * torch.arange(40)[:, None], w_enc=sae.w_enc * 2)
    unit = stretched.unit_rows()
    torch.testing.assert_close(unit.decode(unit.encode(x)), stretched.decode(stretched.encode(x)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unit.w_dec.norm(dim=1)[1:], torch.ones(39))


def rewrite(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "architecture is 'gated'; expected one of standard, topk, jumprelu"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'; expected 'none'"),
        ({"metadata": None}, "has no metadata; expected the format of SAELens 6 or later"),
        ({"d_sae": 41}, r"W_enc is \(16, 40\); expected the shape \(16, 41\)"),
    ],
)
def test_folders_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = rewrite(save_sae(random_sae(), tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


def test_missing_tensor_file_or_number(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no sae_weights.safetensors and no cfg.json"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="threshold is missing"):
        load_sae(rewrite(save_sae(random_sae("standard"), tmp_path), architecture="jumprelu"))
    broken = random_sae()
    broken.b_enc[3] = torch.nan
    with pytest.raises(ValueError, match="b_enc has numbers that are not finite"):
        load_sae(save_sae(broken, tmp_path))


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(("site", "d_in"), [("resid_post", 16), ("z", 16), ("mlp_post", 32)])
def test_collected_activations(site: str, d_in: int, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2", n_inner=32)
    tokenizer.add_special_tokens({"bos_token": "cat"})  # so that " cat" is left out
    result = collect_activations(model, tokenizer, TEXTS, tmp_path / "x.safetensors", layer=1, site=site)
    arrays = load_file(result["file"]["path"])
    assert result["d_in"] == d_in
    assert {name: list(value.shape) for name, value in arrays.items()} == result["file"]["shapes"]
    seen: list[tuple[int, int]] = list(zip(arrays["text"].tolist(), arrays["position"].tolist(), strict=True))
    words = [text.split() for text in TEXTS]
    assert seen == [(i, j) for i, row in enumerate(words) for j, word in enumerate(row) if word != "cat"]
    if site == "resid_post":
        for row, (i, j) in zip(arrays["activations"], seen, strict=True):
            inputs = torch.tensor([tokenizer(TEXTS[i])["input_ids"]])
            torch.testing.assert_close(row, model(inputs, output_hidden_states=True).hidden_states[2][0, j])
    json.dumps(result)


def test_activations_keep_the_model_s_dtype(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    result = collect_activations(make_model("llama").bfloat16(), tokenizer, TEXTS, tmp_path / "x", layer=0)
    assert load_file(result["file"]["path"])["activations"].dtype == torch.bfloat16


@pytest.mark.parametrize("n_held", [10_000, 256])  # all data fit; a quarter of them
def test_every_token_is_served_equally_often(n_held: int) -> None:
    def one_pass() -> Any:
        return iter([torch.arange(start, start + 100.0)[:, None] for start in range(0, 1000, 100)])

    batches = shuffled(one_pass, 32, 4 * n_held, torch.Generator().manual_seed(0))
    served = torch.cat(list(itertools.islice(batches, 2000))).flatten().long()
    counts = torch.bincount(served, minlength=1000)
    assert counts.sum() == 64_000
    assert counts.min() >= 55
    assert counts.max() <= 72
    neighbours = (served[1:] - served[:-1] == 1).double().mean()
    assert neighbours < 0.03


def test_two_runs_of_one_seed_are_equal(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    options: dict[str, Any] = {"layer": 1, "d_sae": 32, "k": 3, "steps": 12, "batch_size": 8, "kind": "topk"}
    runs = [train_sae(model, tokenizer, TEXTS, tmp_path / str(i), **options) for i in range(2)]
    other = train_sae(model, tokenizer, TEXTS, tmp_path / "2", seed=1, **options)
    assert runs[0]["curve"] == runs[1]["curve"]
    assert runs[0]["curve"] != other["curve"]


def test_data_beyond_the_buffer_are_read_again(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 1, "d_sae": 32, "k": 3, "steps": 40, "batch_size": 4, "kind": "topk"}
    result = train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, buffer_bytes=1, **options)
    assert result["n"] == 160
    first, last = result["curve"][0]["mse"], result["curve"][-1]["mse"]
    assert first is not None
    assert last is not None
    assert last < first


# ------------------------------------------------------------------------------------------------ training


def test_the_demo_model_s_residual_stream(demo: tuple[Any, Any], trained: TrainedSAE) -> None:
    last = trained["curve"][-1]
    assert last["explained_variance"] is not None
    assert last["explained_variance"] > 0.9
    assert last["l0"] == 8
    metrics = evaluate_sae(*demo, trained["path"], documents(2, 60))
    assert metrics["explained_variance"] is not None
    assert metrics["explained_variance"] > 0.88
    assert metrics["ce_loss_score"] is not None
    assert metrics["ce_loss_score"] > 0.98
    assert metrics["pca"]["ce_loss_score"] is not None
    assert metrics["pca"]["ce_loss_score"] < 0.7
    assert metrics["l0"] == pytest.approx(8, rel=0.15)  # the one threshold that is saved stands for batches of training
    assert last["dead"] < 0.1 * 512
    low, high = metrics["intervals"]["ce_loss_score"]
    assert low is not None
    assert high is not None
    assert low < metrics["ce_loss_score"] < high
    assert json.loads((Path(trained["path"]) / "training.json").read_text()) == trained


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
def test_other_kinds_learn(kind: Any, demo: tuple[Any, Any], trained: TrainedSAE, tmp_path: Path) -> None:
    file = Path(trained["path"]).parent / "activations.safetensors"
    data: Any = {"hook_name": "blocks.1.hook_resid_post", "file": {"path": str(file)}}
    steps = 500 if kind == "jumprelu" else 350  # thresholds move slowly
    options: dict[str, Any] = {"d_sae": 256, "k": 8, "steps": steps, "batch_size": 256, "learning_rate": 3e-3}
    found = train_sae(*demo, data, tmp_path, kind=kind, **options)
    sae, x = load_sae(tmp_path), load_file(file)["activations"]
    features = sae.encode(x)
    error = (sae.decode(features) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert 1 - error > 0.75
    assert (features > 0).sum(1).double().mean() == pytest.approx(
        8, rel={"topk": 1e-6, "jumprelu": 0.5, "relu": 1.5}[kind]
    )
    ours = found["curve"][-1]["explained_variance"]
    assert ours is not None
    assert ours == pytest.approx(1 - error.item(), abs=0.05)
    assert sae.architecture == {"relu": "standard"}.get(kind, kind)


def test_interrupted_training_is_saved(
    make_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _sae_training.Trainer.step

    def stopping(trainer: Any, *args: Any) -> Any:
        if trainer._steps == 7:
            raise KeyboardInterrupt
        return step(trainer, *args)

    monkeypatch.setattr(_sae_training.Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, layer=0, d_sae=32, k=3, steps=50, batch_size=8)
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["steps"] == 7
    assert result["warnings"] == ["Training was stopped after 7 of 50 steps."]
    assert load_sae(tmp_path).d_sae == 32


def test_what_train_sae_refuses(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")

    def train(data: Any = TEXTS, **options: Any) -> None:
        train_sae(model, tokenizer, data, tmp_path, **{"layer": 1, "d_sae": 32, "k": 3, "steps": 2} | options)

    file: Any = collect_activations(model, tokenizer, TEXTS, tmp_path / "x", layer=1)
    for options, message in (
        ({"kind": "gated"}, "kind is 'gated'; expected one of topk, batchtopk, jumprelu, relu"),
        ({"k": 33}, "k is 33; expected 1 to 32"),
        ({"steps": 0}, "steps is 0 and batch_size is 4096"),
        ({"layer": None}, "has no layer; expected one"),
        ({"layer": 9}, "Layer 9 does not exist"),
        ({"site": "resid"}, "site 'resid' is not known"),
        ({"site": "pattern"}, "'pattern' has no vector per token"),
        ({"data": file}, "layer is 1, but the data are a file of blocks.1.hook_resid_post"),
        ({"data": []}, "list of texts is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**options)
    tokenizer.add_special_tokens({"bos_token": "cat", "eos_token": "the"})
    with pytest.raises(ValueError, match="All tokens of the 1 texts are special tokens"):
        train(["the cat"])
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        train()


def test_activations_that_are_not_finite(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    collect_activations(model, tokenizer, TEXTS, tmp_path / "x", layer=1)  # the model is proven sound before
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"activations at blocks.1.hook_resid_post are not all finite"):
        collect_activations(model, tokenizer, TEXTS, tmp_path / "x", layer=1)


# ------------------------------------------------------------------------------------------------ evaluation


def test_metrics_equal_saelens(demo: tuple[Any, Any], recorded: dict[str, Any]) -> None:
    result: Any = evaluate_sae(*demo, recorded_sae(recorded), recorded["texts"].tolist())
    names = [name.removeprefix("metrics/") for name in recorded if name.startswith("metrics/")]
    compared = [name for name in names if name not in ("explained_variance_legacy", "feature_density")]
    assert len(compared) == 16
    for name in compared:
        assert result[name] == pytest.approx(float(recorded[f"metrics/{name}"]), rel=2e-4), name
    assert result["feature_density"] == pytest.approx(recorded["metrics/feature_density"].tolist(), abs=1e-6)


def test_a_batch_equals_its_texts_alone(
    demo: tuple[Any, Any], recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, texts = recorded_sae(recorded), documents(3, 12)
    together: Any = evaluate_sae(*demo, sae, texts)
    monkeypatch.setattr(_sae_data, "MAX_TOKENS", 1)
    monkeypatch.setattr("techniques.evaluate_sae.LOGIT_BYTES", {"cpu": 1})
    alone: Any = evaluate_sae(*demo, sae, texts)
    for name in ("l0", "explained_variance", "ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_with_sae"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name


def test_the_baseline_is_a_projection_on_principal_components(demo: tuple[Any, Any], recorded: dict[str, Any]) -> None:
    model, tokenizer = demo
    texts = documents(5, 20)
    result = evaluate_sae(*demo, recorded_sae(recorded), texts)
    assert result["l0"] is not None
    assert result["pca"]["n_components"] == round(result["l0"])
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        x = torch.cat([model(row, output_hidden_states=True).hidden_states[2][0] for row in ids]).double()
    variance = torch.linalg.svdvals(x - x.mean(0)) ** 2
    expected = variance[: result["pca"]["n_components"]].sum() / variance.sum()
    assert result["pca"]["explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert result["pca"]["ce_loss_score"] is not None
    assert 0 < result["pca"]["ce_loss_score"] < 1


def test_a_perfect_sae_costs_nothing(demo: tuple[Any, Any]) -> None:
    """One feature per sign of each axis: what goes in comes out."""
    eye = torch.eye(128)
    rows = torch.cat([eye, -eye])
    sae = SAE("standard", rows.T.contiguous(), torch.zeros(256), rows, torch.zeros(128), metadata=HOOK)
    result = evaluate_sae(*demo, sae, documents(4, 6))
    assert result["explained_variance"] == pytest.approx(1)
    assert result["ce_loss_score"] == pytest.approx(1)
    assert result["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert result["l2_ratio"] == pytest.approx(1)
    assert result["l0"] == pytest.approx(128)


def test_what_evaluate_sae_refuses(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2")
    for sae, message in (
        (replace(random_sae(), metadata={}), "metadata has no hook_name"),
        (random_sae(d_in=8), "takes 8 numbers per token, but blocks.1.hook_resid_post of this model has 16"),
        (replace(random_sae(), metadata={"hook_name": "blocks.7.hook_resid_post"}), "Layer 7 does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_sae(model, tokenizer, sae, TEXTS)


@pytest.mark.parametrize("texts", [["cat"], TEXTS])  # no next token; a random model, which zeros do not hurt
def test_a_score_of_nothing_is_not_given(texts: list[str], make_model: Any, tokenizer: Any) -> None:
    result = evaluate_sae(make_model("llama"), tokenizer, random_sae(), texts)
    assert "costs" in result["warnings"][0]
    assert result["ce_loss_score"] is result["kl_div_score"] is result["pca"]["ce_loss_score"] is None
    assert result["intervals"]["ce_loss_score"] == [None, None]
    assert result["explained_variance"] is not None
    json.dumps(result, allow_nan=False)


def test_evaluation_leaves_no_trace(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama")
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate_sae(model, tokenizer, random_sae(), TEXTS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for part in model.modules():
        assert "forward" not in vars(part)
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu"])
def test_weights_that_are_no_numbers_are_not_saved(kind: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 1, "d_sae": 32, "k": 4, "batch_size": 16, "kind": kind}
    train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, steps=2, **options)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"not (all )?finite.*; expected numbers"):
        train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, steps=20, learning_rate=1e30, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_sae_worse_than_the_mean_is_warned_of(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 1, "d_sae": 32, "k": 4, "batch_size": 16, "steps": 20, "kind": "relu"}
    result = train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, learning_rate=1.0, **options)
    assert "less than the mean activation does" in result["warnings"][0]


def test_a_string_for_the_texts_is_refused(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is the string 'the cat'; expected a list"):
        train_sae(make_model("gpt2"), tokenizer, "the cat", tmp_path, layer=1, d_sae=32)
