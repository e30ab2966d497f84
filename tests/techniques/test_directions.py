"""Directions are what their definitions say, computed anew from transformers' own hidden states."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from interp_kernel.demo_model import corpus
from techniques import directions
from techniques import extract as extraction
from techniques import persona_vector as persona_vectors
from techniques._directions import oriented
from techniques.directions import vector_direction
from techniques.plots.probes import plot_concept_direction, plot_persona_vector, plot_project

# `*demo` and results that may be None: typed as Any, since the values are what is tested.
concept_direction: Any = directions.concept_direction
project: Any = directions.project
extract: Any = extraction.extract
persona_vector: Any = persona_vectors.persona_vector

KINDS = ("expert", "novice")
EXPERTS, NOVICES = (
    [corpus.persona_prompt(persona, q) for persona in corpus.PERSONAS[kind] for q in corpus.QUESTIONS[:5]]
    for kind in KINDS
)
PERSONAS = [persona for kind in KINDS for persona in corpus.PERSONAS[kind] for _ in range(5)]
SYSTEMS = tuple([f"You are a {persona}." for persona in corpus.PERSONAS[kind][:2]] for kind in KINDS)
QUESTIONS = [q.text for q in corpus.QUESTIONS[:6]]


@pytest.fixture(scope="module")
def found(demo: Any) -> Any:
    return concept_direction(*demo, EXPERTS, NOVICES, 2, groups=PERSONAS, classes=KINDS)


@pytest.fixture(scope="module")
def persona(demo: Any) -> Any:
    return persona_vector(*demo, *SYSTEMS, QUESTIONS, max_new_tokens=9, classes=KINDS)


def split(demo: Any, found: Any) -> tuple[Any, Any, Any]:
    """Activations of all texts, whether each is positive, and which were held out."""
    x = extract(*demo, [*EXPERTS, *NOVICES], layers=[2])["activations"][:, 0]
    positive = torch.tensor([True] * len(EXPERTS) + [False] * len(NOVICES))
    held_out = torch.zeros_like(positive)
    held_out[[text["text"] for text in found["held_out"]]] = True
    return x, positive, held_out


def test_mean_is_the_difference_of_the_means_of_what_was_not_held_out(demo: Any, found: Any) -> None:
    x, positive, held_out = split(demo, found)
    assert int(held_out.sum()) == found["n_held_out"] == 40
    high, low = x[positive & ~held_out].mean(0), x[~positive & ~held_out].mean(0)
    unit = (high - low) / (high - low).norm()
    assert torch.allclose(torch.tensor(found["direction"]), unit, atol=1e-4)
    assert found["separation"] == pytest.approx(float((high - low).norm()), rel=1e-4)
    assert found["positive_mean"] == pytest.approx(float(high @ unit), rel=1e-3)
    assert found["norm"] == pytest.approx(float(x[~held_out].norm(dim=1).mean()), rel=1e-4)
    assert found["norm_ratio"] == pytest.approx(found["separation"] / found["norm"], rel=1e-4)
    assert (found["cosine_to_mean"], found["positive_class"]) == (pytest.approx(1, abs=1e-5), "expert")


def test_whole_groups_are_held_out_and_told_apart(demo: Any, found: Any) -> None:
    x, positive, held_out = split(demo, found)
    for text in found["held_out"]:
        assert text["positive"] == bool(positive[text["text"]])
        projection = float(x[text["text"]] @ torch.tensor(found["direction"]))
        assert text["projection"] == pytest.approx(projection, rel=1e-3, abs=1e-3)
    by_persona = held_out.view(16, 5)
    assert bool((by_persona == by_persona[:, :1]).all())
    assert by_persona[:8, 0].sum() == by_persona[8:, 0].sum() == 4
    assert found["held_out_auroc"] > 0.95
    assert found["held_out_low"] <= found["held_out_auroc"] <= found["held_out_high"]


@pytest.mark.parametrize("method", ["mean", "probe", "pca"])
def test_every_method_points_to_the_positive_class(demo: Any, method: Any) -> None:
    forth = concept_direction(*demo, EXPERTS, NOVICES, 2, groups=PERSONAS, method=method)
    back = concept_direction(*demo, NOVICES, EXPERTS, 2, groups=[*PERSONAS[40:], *PERSONAS[:40]], method=method)
    for one in (forth, back):
        assert one["positive_mean"] > one["negative_mean"]
        assert one["held_out_auroc"] > 0.95
        assert one["cosine_to_mean"] > 0.3
        assert torch.tensor(one["direction"]).norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.tensor(forth["direction"]) @ torch.tensor(back["direction"]) < -0.3


def test_an_axis_is_turned_to_the_positive_class() -> None:
    found, positive = torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([True, False])
    for axis in (torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])):
        assert oriented(axis, found, positive).tolist() == [1.0, 0.0]


def test_probe_is_the_gradient_of_scikit_learns_classifier(demo: Any) -> None:
    found = concept_direction(*demo, EXPERTS, NOVICES, 2, method="probe")
    x, positive, held_out = split(demo, found)
    scaler = StandardScaler().fit(x[~held_out].double())
    fitted = LogisticRegression(tol=1e-10, max_iter=10_000).fit(
        scaler.transform(x[~held_out].double()), positive[~held_out]
    )
    gradient = torch.tensor(fitted.coef_[0] / scaler.scale_).float()
    assert torch.cosine_similarity(gradient, torch.tensor(found["direction"]), dim=0).item() > 0.9999


def test_pca_is_the_axis_of_largest_variance(demo: Any) -> None:
    found = concept_direction(*demo, EXPERTS, NOVICES, 2, method="pca")
    x, _, held_out = split(demo, found)
    covariance = torch.cov(x[~held_out].double().T)
    axis = torch.linalg.eigh(covariance).eigenvectors[:, -1].float()
    assert (axis @ torch.tensor(found["direction"])).abs().item() == pytest.approx(1, abs=1e-4)


def test_projection_is_the_inner_product(demo: Any, found: Any) -> None:
    texts = [EXPERTS[0], NOVICES[0], "The Eiffel Tower is located in"]
    rows = project(*demo, texts, found)["rows"]
    x = extract(*demo, texts, layers=[2])["activations"][:, 0]
    for row, vector in zip(rows, x, strict=True):
        projection = float(vector @ torch.tensor(found["direction"]))
        assert row["projection"] == pytest.approx(projection, rel=1e-4)
        assert row["cosine"] == pytest.approx(projection / float(vector.norm()), rel=1e-4)
        relative = (projection - found["negative_mean"]) / found["separation"]
        assert row["relative"] == pytest.approx(relative, abs=1e-3)
    assert rows[0]["relative"] > 0.7
    assert rows[1]["relative"] < 0.3


def test_persona_vector_is_the_mean_over_response_tokens(demo: Any, persona: Any) -> None:
    """Each response is tokenized anew behind its prompt and run by itself."""
    model, tokenizer = demo
    means: dict[bool, list[Any]] = {True: [], False: []}
    for answer in persona["responses"]:
        if answer["held_out"]:
            continue
        prompt = f"System: {answer['system']}\nUser: {answer['question']}\nAssistant:"
        length = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            states = model(**tokenizer(prompt + answer["response"], return_tensors="pt"), output_hidden_states=True)
        means[answer["positive"]].append(states.hidden_states[2][0, length:].mean(0))
    gap = torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)
    row = persona["rows"][1]  # resid_post of block 1 is the third state
    assert (row["layer"], row["site"]) == (1, "resid_post")
    assert torch.cosine_similarity(gap, torch.tensor(row["direction"]), dim=0).item() > 0.999
    assert row["separation"] == pytest.approx(float(gap.norm()), rel=1e-2)


def test_persona_answers_are_in_the_register_and_tested_on_other_questions(persona: Any) -> None:
    assert len(persona["responses"]) == 4 * 6
    for answer in persona["responses"]:
        opener = answer["response"].split(",")[0].strip()
        assert opener in corpus.OPENERS[KINDS[0 if answer["positive"] else 1]]
    tested = {answer["question"] for answer in persona["responses"] if answer["held_out"]}
    assert len(tested) == 3
    assert persona["n_fit"] == persona["n_held_out"] == 12
    assert max(row["held_out_auroc"] for row in persona["rows"]) > 0.7


def test_only_answers_that_show_the_trait_are_kept(demo: Any) -> None:
    def formal(text: str) -> float:
        return 100.0 if text.startswith((" Therefore", " Precisely", " So")) else 0.0

    found = persona_vector(*demo, *SYSTEMS, QUESTIONS, max_new_tokens=4, rollouts=3, score=formal, seed=1)
    for answer in found["responses"]:
        starts = answer["response"].startswith((" Therefore", " Precisely", " So"))
        assert answer["kept"] is (starts if answer["positive"] else not starts)
        assert answer["score"] == formal(answer["response"])
    assert 0 < found["n"] < len(found["responses"]) == 72


def test_own_vectors_keep_their_length(demo: Any) -> None:
    own = vector_direction(torch.arange(128.0), layer=1, classes=("up", "down"))
    assert own["separation"] == pytest.approx(float(torch.arange(128.0).norm()), rel=1e-5)
    (row,) = project(*demo, ["The"], own)["rows"]
    assert row["relative"] is None
    assert row["projection"] is not None


def test_results_are_json(found: Any, persona: Any) -> None:
    assert json.loads(json.dumps([found, persona], allow_nan=False)) == [found, persona]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lda"}, "The method 'lda' is not known; expected one of mean, probe, pca"),
        ({"holdout": 0.8}, "holdout is 0.8; expected a share above 0 and at most 0.5"),
        ({"positive": EXPERTS[:1]}, "The positive texts are in 1 groups and the negative ones in 40"),
        ({"negative": EXPERTS}, "is in both classes up to the position that is read"),
        ({"groups": PERSONAS[1:]}, "groups has 79 entries for 80 texts"),
        ({"layer": 4}, r"layers is \[4\]"),
    ],
)
def test_wrong_input_is_refused(demo: Any, options: Any, message: str) -> None:
    given = {"positive": EXPERTS, "negative": NOVICES, "layer": 2, **options}
    with pytest.raises(ValueError, match=message):
        concept_direction(*demo, **given)


def test_classes_that_do_not_differ_are_refused(demo: Any) -> None:
    """The embedding of one token at one place is the same in all texts."""
    texts = [f"The {word}." for word in corpus.WORDS[:8]]
    with pytest.raises(ValueError, match="Both classes have the same mean activation"):
        concept_direction(*demo, texts[:4], texts[4:], 0, site="resid_pre")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 0}, "rollouts is 0 at temperature 1.0"),
        ({"rollouts": 2, "temperature": 0.0}, "rollouts is 2 at temperature 0.0; expected at least 1, and 1 at"),
        ({"questions": QUESTIONS[:1] * 2}, "There are 2 positive and 2 negative system messages and 1 different"),
        ({"positive_systems": []}, "There are 0 positive"),
        ({"score": lambda _: 50.0}, "None of 6 positive answers to half of the questions was kept; the first is ' "),
    ],
)
def test_persona_vector_refuses_what_can_not_work(demo: Any, options: Any, message: str) -> None:
    given = {"positive_systems": SYSTEMS[0], "negative_systems": SYSTEMS[1], "questions": QUESTIONS, **options}
    with pytest.raises(ValueError, match=message):
        persona_vector(*demo, max_new_tokens=2, **given)


def test_vectors_that_are_none_are_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match=r"The vector has shape \[3\] and norm 0"):
        vector_direction([0.0, 0.0, 0.0], layer=0)
    with pytest.raises(ValueError, match=r"shape \[1, 2\]"):
        vector_direction(torch.ones(1, 2), layer=0)
    with pytest.raises(ValueError, match="The direction has 3 entries, but resid_post of this model has 128"):
        project(*demo, ["The"], vector_direction([1.0, 0.0, 0.0], layer=0))


def test_figures_show_the_numbers(demo: Any, found: Any, persona: Any) -> None:
    high, low = plot_concept_direction(found).data
    assert sorted([*high.x, *low.x]) == sorted(text["projection"] for text in found["held_out"])
    assert (high.name, len(high.x)) == ("expert", 20)
    curve = [trace for trace in plot_persona_vector(persona).data if trace.name == "held-out AUROC"]
    assert list(curve[0].y) == [row["held_out_auroc"] for row in persona["rows"]]
    result = project(*demo, [EXPERTS[0], NOVICES[0]], found)
    assert list(plot_project(result).data[0].x) == [row["relative"] for row in result["rows"]]
    own = project(*demo, ["The"], vector_direction(torch.ones(128), layer=1))
    assert list(plot_project(own).data[0].x) == [own["rows"][0]["projection"]]


def test_a_string_for_the_texts_is_refused(make_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="positive is the string 'cat'; expected a list"):
        concept_direction(make_model("gpt2"), tokenizer, "cat", "dog", layer=1)
