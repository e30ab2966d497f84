"""Probes against scikit-learn on the same activations, and against what the demo model is known to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_kernel.demo_model import corpus
from techniques import extract as extraction
from techniques import probes
from techniques._folds import Scale, group_folds, group_labels, merged_groups, shuffled_labels
from techniques.plots.probes import plot_linear_probe, plot_probe_transfer

# `*demo` and results that may be None: typed as Any, since the values are what is tested.
extract: Any = extraction.extract
linear_probe: Any = probes.linear_probe
probe_transfer: Any = probes.probe_transfer

KINDS = ("expert", "novice")
QUESTIONS = corpus.QUESTIONS[:6]
SAID = [(kind, persona, q) for kind in KINDS for persona in corpus.PERSONAS[kind] for q in QUESTIONS]
TEXTS = [corpus.persona_prompt(persona, q) for _, persona, q in SAID]
LABELS = [kind for kind, _, _ in SAID]
PERSONAS = [persona for _, persona, _ in SAID]
ENDS = [q.text for _, _, q in SAID]  # the question's last token is the same in both classes


@pytest.fixture(scope="module")
def persona_probe(demo: Any) -> Any:
    return linear_probe(*demo, TEXTS, LABELS, PERSONAS, site="resid_pre", position=ENDS)


# ---------------------------------------------------------------------------------------------- known answers


def test_the_persona_is_read_where_the_model_knows_it_and_not_in_the_embedding(persona_probe: Any) -> None:
    rows = persona_probe["rows"]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["auroc"] < 0.65
    assert rows[0]["p"] > 0.05
    for row in rows[2:]:
        assert row["auroc"] > 0.97
        assert row["balanced_accuracy"] > 0.9
        assert row["p"] < 0.05
        assert row["auroc_low"] > 0.9
    assert persona_probe["p_any"] < 0.05
    assert (persona_probe["n"], persona_probe["n_groups"], persona_probe["n_folds"]) == (96, 16, 5)
    assert persona_probe["shuffled"] == "labels of groups"


def test_words_do_not_carry_to_new_personas_but_names_can_be_memorised(persona_probe: Any) -> None:
    """A probe learns a random label per persona where a persona is in train and test: the trap of a split by text."""
    assert persona_probe["bag_of_words"]["auroc"] < 0.65
    assert persona_probe["majority"] == 0.5
    last = persona_probe["rows"][3]
    assert last["control_auroc"] > 0.75
    assert 0.35 < last["null_auroc"] < 0.65
    assert last["selectivity"] == pytest.approx(last["row_split_auroc"] - last["control_auroc"], abs=1e-5)


def test_confusion_holds_every_text_once(persona_probe: Any) -> None:
    for row in persona_probe["rows"]:
        table = np.array(row["confusion"])
        assert table.sum(1).tolist() == persona_probe["class_counts"] == [48, 48]
        assert row["accuracy"] == pytest.approx(table.trace() / 96, abs=1e-5)
        assert row["balanced_accuracy"] == pytest.approx((table.diagonal() / table.sum(1)).mean(), abs=1e-5)


def test_an_attribute_is_read_in_frames_that_were_held_out(demo: Any) -> None:
    said = [(value, frame, topic) for value in ("female", "male") for frame in range(5) for topic in corpus.TOPICS]
    texts = [f"Assistant: {t}\nUser: {corpus.demographic_sentence('sex', v, f)}" for v, f, t in said]
    found = linear_probe(*demo, texts, [v for v, _, _ in said], [f for _, f, _ in said], n_permutations=50)
    assert found["bag_of_words"]["auroc"] < 0.65
    assert max(row["auroc"] for row in found["rows"]) > 0.9
    assert found["shuffled"] == "labels within groups"
    assert found["n_folds"] == 5


def test_labels_of_no_meaning_are_not_found(demo: Any) -> None:
    meaningless = [str(corpus.PERSONAS[kind].index(persona) % 2) for kind, persona, _ in SAID]
    found = linear_probe(*demo, TEXTS, meaningless, PERSONAS, position=ENDS, layers=[2])
    assert found["rows"][0]["p"] > 0.05
    assert found["rows"][0]["auroc"] < 0.85


def test_one_token_at_one_place_tells_nothing_in_the_embedding(demo: Any) -> None:
    texts = [f"The {word}." for word in corpus.WORDS[:40]]
    labels = [len(word) % 2 for word in corpus.WORDS[:40]]
    found = linear_probe(*demo, texts, labels, site="resid_pre", layers=[0, 1], n_permutations=0)
    assert found["rows"][0]["auroc"] == 0.5
    assert found["rows"][1]["auroc"] != 0.5  # block 0 has seen the word


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_rounding_varies_is_no_signal(dtype: Any) -> None:
    eps = torch.finfo(dtype).eps
    positive = torch.arange(20) % 2 == 0
    x = torch.stack([3 + positive * eps, 3 + positive * 0.1], 1)
    scaled = Scale(x, eps)(x)
    assert scaled[:, 0].abs().max() == 0
    assert scaled[:, 1].std(correction=0).item() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------- scikit-learn


def peer(method: str, n_classes: int) -> Any:
    one: Any = {"logistic": LogisticRegression(tol=1e-8, max_iter=10_000), "ridge": RidgeClassifier()}[method]
    return make_pipeline(StandardScaler(), OneVsRestClassifier(one) if n_classes > 2 else one)


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_two_classes_equal_scikit_learn(demo: Any, method: Any) -> None:
    found = linear_probe(
        *demo, TEXTS, LABELS, PERSONAS, layers=[0, 1], position=ENDS, method=method, n_permutations=0, seed=4
    )
    folds = folds_of(LABELS, PERSONAS, seed=4)
    acts = extract(*demo, TEXTS, layers=[0, 1], position=ENDS)["activations"]
    truth = np.array(LABELS) == "novice"
    for row, x in zip(found["rows"], acts.double().numpy().transpose(1, 0, 2), strict=True):
        right, wins, pairs = 0, 0.0, 0
        for fold in range(5):
            train, test = folds != fold, folds == fold
            fitted = peer(method, 2).fit(x[train], truth[train])
            right += int((fitted.predict(x[test]) == truth[test]).sum())
            weight = int(truth[test].sum()) * int((~truth[test]).sum())
            wins += weight * roc_auc_score(truth[test], fitted.decision_function(x[test]))
            pairs += weight
        assert row["auroc"] == pytest.approx(wins / pairs, abs=2e-3)
        assert row["accuracy"] == pytest.approx(right / len(TEXTS), abs=1.01 / len(TEXTS))
        assert (row["p"], row["null_auroc"], found["p_any"]) == (None, None, None)


def test_more_classes_equal_scikit_learns_one_against_the_rest(demo: Any) -> None:
    topics = [q.topic for _, _, q in SAID]
    extra = [(k, p, q) for k, p, _ in SAID[::6] for q in corpus.QUESTIONS[6:13]]
    texts = TEXTS + [corpus.persona_prompt(p, q) for _, p, q in extra]
    labels, groups = topics + [q.topic for _, _, q in extra], PERSONAS + [p for _, p, _ in extra]
    found = linear_probe(*demo, texts, labels, groups, layers=[0], n_permutations=0)
    assert found["classes"] == ["audit", "medicine", "physics"]
    folds = folds_of(labels, groups, seed=0)
    x = extract(*demo, texts, layers=[0])["activations"][:, 0].double().numpy()
    truth = np.array([found["classes"].index(label) for label in labels])
    chosen = np.empty_like(truth)
    for fold in range(5):
        chosen[folds == fold] = (
            peer("logistic", 3).fit(x[folds != fold], truth[folds != fold]).predict(x[folds == fold])
        )
    assert found["rows"][0]["accuracy"] == pytest.approx((chosen == truth).mean(), abs=2.01 / len(texts))
    assert np.array(found["rows"][0]["confusion"]).sum() == len(texts)


def folds_of(labels: list[str], groups: list[str], seed: int) -> Any:
    """The folds that the probe deals, whose properties have tests of their own."""
    classes = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    members = torch.tensor([list(dict.fromkeys(groups)).index(group) for group in groups])
    return group_folds(classes, members, 5, torch.Generator().manual_seed(seed)).numpy()


def test_mean_difference_is_the_difference_of_class_means(demo: Any) -> None:
    found = probe_transfer(
        *demo, TEXTS, LABELS, [q.text for _, _, q in SAID], layer=0, position=ENDS, method="mean_difference"
    )
    x = extract(*demo, TEXTS, layers=[0], position=ENDS)["activations"][:, 0].double().numpy()
    truth, groups = np.array(LABELS) == "novice", np.array([q.text for _, _, q in SAID])
    for row in found["rows"]:
        if row["train"] != row["test"]:
            train = groups != row["test"] if row["train"] is None else groups == row["train"]
            test = groups == row["test"]
            z = (x - x[train].mean(0)) / x[train].std(0)
            high, low = z[train & truth].mean(0), z[train & ~truth].mean(0)
            scores = (z - (high + low) / 2) @ (high - low)
            assert row["auroc"] == pytest.approx(roc_auc_score(truth[test], scores[test]), abs=1e-3)
            assert row["accuracy"] == pytest.approx(((scores > 0) == truth)[test].mean(), abs=1e-5)
            assert (row["n_train"], row["n_test"]) == (train.sum(), test.sum())


def test_transfer_within_a_group_is_cross_validated(demo: Any) -> None:
    """Random labels can't be told in texts that were held out, though a fit of 128 features to 16 texts is perfect."""
    noise = [str(v) for v in torch.randint(2, (len(TEXTS),), generator=torch.Generator().manual_seed(1)).tolist()]
    found = probe_transfer(*demo, TEXTS, noise, ENDS, layer=2, position=ENDS)
    within = [row["auroc"] for row in found["rows"] if row["train"] == row["test"]]
    assert len(within) == 6
    assert 0.25 < sum(within) / 6 < 0.75


# ---------------------------------------------------------------------------------------------- folds and shuffles


def test_folds_keep_groups_whole_and_classes_everywhere() -> None:
    groups = torch.arange(13).repeat_interleave(7)
    classes = (groups % 4 == 0).long()  # 4 of 13 groups
    folds = group_folds(classes, groups, 4, torch.Generator().manual_seed(0))
    assert all(len(folds[groups == group].unique()) == 1 for group in range(13))  # type: ignore[no-untyped-call]
    for fold in range(4):
        assert set(classes[folds == fold].tolist()) == {0, 1}
    assert (folds.bincount() / 7).tolist() == [4, 3, 3, 3]


def test_groups_that_share_a_text_are_one() -> None:
    numbers, merged = merged_groups(["a", "b", "c", "d", "b", "c"], [1, 2, 3, 4, 3, 5])
    assert numbers == [0, 1, 1, 2, 1, 1]
    assert merged == [{"b", "c"}]


def test_shuffles_move_labels_of_pure_groups_together() -> None:
    groups = torch.arange(8).repeat_interleave(3)
    classes = (groups < 3).long()
    sets = shuffled_labels(classes, groups, 50, torch.Generator().manual_seed(0))
    assert bool((sets.view(8, 3, 50) == sets.view(8, 3, 50)[:, :1]).all())
    assert sets.sum(0).tolist() == [9] * 50
    assert len({tuple(column) for column in sets.T.tolist()}) > 20


def test_shuffles_of_mixed_groups_keep_each_groups_counts() -> None:
    torch.manual_seed(0)
    groups, classes = torch.randint(5, (60,)), torch.randint(2, (60,))
    sets = shuffled_labels(classes, groups, 20, torch.Generator().manual_seed(0))
    for group in range(5):
        here = groups == group
        assert (sets[here].sum(0) == classes[here].sum()).all()
    assert not torch.equal(sets[:, 0], sets[:, 1])


def test_control_labels_are_one_per_group_also_where_groups_are_mixed() -> None:
    groups, classes = torch.arange(6).repeat(5), torch.arange(30) % 4 // 2
    sets = group_labels(classes, groups, 3, torch.Generator().manual_seed(0))
    assert bool((sets.view(5, 6, 3) == sets.view(5, 6, 3)[:1]).all())


# ---------------------------------------------------------------------------------------------- leaks and bad input


def test_a_padding_that_is_the_label_is_told(demo: Any) -> None:
    """One class made longer by a filler word, as a known experiment did: the filler is reported, and words suffice."""
    texts = [
        text.replace("\n", " ticket\n", 1) if kind == "expert" else text
        for text, kind in zip(TEXTS, LABELS, strict=True)
    ]
    found = linear_probe(*demo, texts, LABELS, PERSONAS, layers=[3], n_permutations=0)
    assert (found["tokens"][0]["token"], found["tokens"][0]["balanced_accuracy"]) == (" ticket", 1.0)
    assert "The token ' ticket' tells 'novice' by itself (balanced accuracy 1.00)." in found["warnings"]
    assert found["bag_of_words"]["auroc"] == 1.0


def test_words_after_the_position_do_not_count(demo: Any) -> None:
    """What the model had not read yet can't have leaked."""
    texts = [f"{text} {'Therefore' if kind == 'expert' else 'So'}" for text, kind in zip(TEXTS, LABELS, strict=True)]
    found = linear_probe(*demo, texts, LABELS, PERSONAS, layers=[0], position=ENDS, n_permutations=0)
    assert all(token["token"] not in (" Therefore", " So") for token in found["tokens"])
    assert found["bag_of_words"]["auroc"] < 0.65


def test_groups_that_share_texts_are_held_out_together(demo: Any) -> None:
    texts = [TEXTS[0] if i == 7 else text for i, text in enumerate(TEXTS)]
    found = linear_probe(*demo, texts, LABELS, PERSONAS, layers=[0], n_permutations=0)
    assert found["n_groups"] == 15
    assert found["warnings"] == ["The groups Medical Doctor, Physics Professor share texts and were held out together."]


def test_no_groups_means_each_text_by_itself(demo: Any) -> None:
    found = linear_probe(*demo, TEXTS + TEXTS[:5], LABELS + LABELS[:5], layers=[1], n_permutations=3)
    assert found["n_groups"] == 96
    again = linear_probe(*demo, TEXTS, LABELS, layers=[1], n_permutations=3)
    assert again["rows"][0]["control_auroc"] is None
    assert again["rows"][0]["selectivity"] is None


def test_the_untrained_model_is_another_one_and_leaves_this_one_alone(demo: Any) -> None:
    before = {name: value.clone() for name, value in demo[0].state_dict().items()}
    state = torch.random.get_rng_state()
    found = linear_probe(
        *demo, TEXTS, LABELS, PERSONAS, layers=[3], position=ENDS, untrained=True, n_permutations=0, n_boot=10
    )
    assert found["rows"][0]["untrained_auroc"] < found["rows"][0]["auroc"] - 0.05
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in demo[0].state_dict().items())


def test_the_seed_decides(demo: Any) -> None:
    first, again, other = (
        linear_probe(*demo, TEXTS, LABELS, PERSONAS, layers=[0], position=ENDS, n_permutations=5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first["rows"] != other["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["x"] * 96}, "All 96 labels are 'x'; expected at least two"),
        ({"labels": LABELS[1:]}, "labels has 95 entries for 96 texts"),
        ({"groups": PERSONAS[1:]}, "groups has 95 entries for 96 texts"),
        ({"groups": LABELS}, "The label 'expert' is in 1 group only; expected at least 2"),
        ({"groups": list(range(96)), "texts": [TEXTS[0]] * 96}, "The groups 0, 1, 10, 11, 12 and 91 more share texts"),
        ({"method": "svm"}, "The method 'svm' is not known; expected one of logistic, mean_difference, ridge"),
        ({"c": 0}, "c is 0; expected a positive number"),
        ({"n_folds": 1}, "n_folds is 1, n_permutations 100 and n_boot 1000; expected at least 2, 0 and 1"),
    ],
)
def test_wrong_input_is_refused(demo: Any, options: Any, message: str) -> None:
    given = {"texts": TEXTS, "labels": LABELS, "groups": PERSONAS, **options}
    with pytest.raises(ValueError, match=message):
        linear_probe(*demo, **given)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (PERSONAS, "The group 'Physics Professor' has 0 different texts of the label 'novice'; expected at least 2"),
        (["one"] * 96, "All texts are of the group 'one'; expected at least two groups"),
        (ENDS[1:], "groups has 95 entries for 96 texts"),
    ],
)
def test_transfer_refuses_groups_that_can_not_be_compared(demo: Any, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_transfer(*demo, TEXTS, LABELS, groups, layer=0)


def test_transfer_refuses_texts_in_two_groups(demo: Any) -> None:
    with pytest.raises(ValueError, match="The groups a, b share texts; expected at least two groups"):
        probe_transfer(*demo, [*TEXTS, *TEXTS], [*LABELS, *LABELS], ["a"] * 96 + ["b"] * 96, layer=0)


# ---------------------------------------------------------------------------------------------- figures


def test_the_curve_shows_the_rows(persona_probe: Any) -> None:
    lines = {trace.name: trace for trace in plot_linear_probe(persona_probe).data if trace.mode != "none"}
    assert list(lines["held-out groups"].y) == [row["auroc"] for row in persona_probe["rows"]]
    assert list(lines["held-out groups"].x) == [0, 1, 2, 3]
    assert list(lines["random label per group"].y) == [row["control_auroc"] for row in persona_probe["rows"]]
    assert set(lines["bag of words"].y) == {persona_probe["bag_of_words"]["auroc"]}


def test_the_transfer_matrix_has_train_in_rows(demo: Any) -> None:
    result = probe_transfer(*demo, TEXTS, LABELS, ENDS, layer=1, position=ENDS)
    (cells,) = plot_probe_transfer(result).data
    for row in result["rows"]:
        line = 6 if row["train"] is None else result["groups"].index(row["train"])
        assert cells.z[line][result["groups"].index(row["test"])] == row["auroc"]
