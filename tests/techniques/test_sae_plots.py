"""Figures show the numbers of the result, and need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from techniques._sae import SAE
from techniques.evaluate_sae import evaluate_sae
from techniques.plots import sae as plots
from techniques.sae import train_sae
from techniques.sae_features import feature_report
from techniques.steer_feature import steer_feature

TEXTS = ["the cat sat on a mat", "a dog ran to the mat", "the cat ran", "a cat sat on the dog"]


@pytest.fixture
def sae() -> SAE:
    rows = torch.nn.functional.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    bias = torch.zeros(24)
    bias[5] = -1e6  # never active
    return SAE(
        "standard", rows.T.contiguous(), bias, rows, torch.zeros(16), metadata={"hook_name": "blocks.1.hook_resid_post"}
    )


def test_training(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 1, "d_sae": 32, "k": 3, "steps": 8, "batch_size": 8, "kind": "topk"}
    result = train_sae(make_model("gpt2"), tokenizer, TEXTS, tmp_path, **options)
    figure = plots.plot_train_sae(result)
    assert [list(trace.y) for trace in figure.data] == [
        [point[name] for point in result["curve"]] for name in ("explained_variance", "l0", "dead")
    ]


def test_frontier_and_density(make_model: Any, tokenizer: Any, sae: SAE) -> None:
    results = [evaluate_sae(make_model("gpt2"), tokenizer, sae, texts) for texts in (TEXTS, TEXTS[:2])]
    figure = plots.plot_sae_frontier(results, ["a", "b"])
    assert [trace.name for trace in figure.data] == ["a", "b", "principal components"] * 2
    assert figure.data[0].x[0] == results[0]["l0"]
    assert figure.data[1].y[0] == results[1]["explained_variance"]
    assert "of 24 features never active" in plots.plot_evaluate_sae(results[0]).layout.title.text
    with pytest.raises(ValueError, match="There are 2 results and 1 names"):
        plots.plot_sae_frontier(results, ["a"])
    with pytest.raises(ValueError, match="There are 0 results"):
        plots.plot_sae_frontier([])


def test_a_feature(make_model: Any, tokenizer: Any, sae: SAE) -> None:
    report = feature_report(make_model("gpt2"), tokenizer, sae, TEXTS, [2, 5], top_k=3)
    row = report["features"][0]
    cells, logits, histogram = plots.plot_feature_report(report).data
    peaks = [example["activations"][example["peak"]] for example in row["examples"]]
    assert [max(value for value in line if value is not None) for line in cells.z] == pytest.approx(peaks)
    assert row["top_logits"] is not None
    assert logits.x[0] == row["top_logits"][0]["weight"]
    assert row["histogram"] is not None
    assert list(histogram.y) == row["histogram"]["counts"]
    with pytest.raises(ValueError, match=r"feature is 7; expected one of \[2, 5\]"):
        plots.plot_feature_report(report, 7)
    with pytest.raises(ValueError, match="Feature 5 was never active"):
        plots.plot_feature_report(report, 5)


def test_steering(make_model: Any, tokenizer: Any, sae: SAE) -> None:
    result = steer_feature(make_model("gpt2"), tokenizer, sae, 2, ["the cat", "a dog"], TEXTS, max_new_tokens=2)
    dots, line, *_ = plots.plot_steer_feature(result).data
    own = [row["kl_to_clean"] for row in result["rows"] if not row["control"]]
    assert list(dots.y) == own
    assert line.y[0] == pytest.approx(sum(kl or 0 for kl in own[:2]) / 2)
