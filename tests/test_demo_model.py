"""The shipped demo model knows what its card says, and was not trained on what the corpus holds out."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest

from interp_kernel import demo_model
from interp_kernel.demo_model import corpus, evaluate, make
from interp_kernel.demo_model.evaluate import Measure

CARD = Path(demo_model.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model.path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(demo_model.path())
    return loaded.eval()


@pytest.fixture(scope="module")
def measured(model: Any, tokenizer: Any) -> list[Measure]:
    # Another seed than the card's, so that the table is no accident of one sample.
    return evaluate.measure(model, tokenizer, n=100, seed=1)


def continuation(model: Any, tokenizer: Any, prompt: str, n: int = 24) -> str:
    """What the model writes after a prompt, greedily, up to the end of the document."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=n, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


# ---- what it knows


def test_every_row_is_within_its_bounds(measured: list[Measure]) -> None:
    assert [row for row in measured if not row.is_accepted] == []


def test_bounds_refuse_a_random_model(model: Any, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    rows = evaluate.measure(auto.from_config(model.config).eval(), tokenizer, n=20)
    controls = [row for row in rows if "control" in row.task]
    passed = {row.task for row in rows if row.is_accepted and row not in controls}
    assert len(controls) == 6
    # One register is always the likelier one, so a random model has it right throughout, and the other one wrong.
    assert len(passed) <= 1
    assert passed <= {"persona: expert register", "persona: novice register"}


def test_card_shows_the_measured_table(measured: list[Measure]) -> None:
    lines = [line.split(" | ") for line in CARD.read_text().splitlines() if re.match(r"\| .* to .* \| \d+ \|$", line)]
    card = {(cells[0].removeprefix("| "), cells[1]): cells for cells in lines}
    assert list(card) == [(row.task, row.split) for row in measured]
    for row in measured:
        cells = card[row.task, row.split]
        assert cells[3] == f"{row.low:g} to {row.high:g}"
        told = float(cells[2])
        # Three standard deviations of the difference of two samples; a share of exactly 0 or 1 is only close to it.
        share = min(max((told + row.value) / 2, 0.02), 0.98)
        tolerance = 3 * (2 * share * (1 - share) / row.n) ** 0.5
        assert row.value == pytest.approx(told, abs=1.0 if "nats" in row.task else tolerance), row.task


def test_reading_agrees_with_generate(model: Any, tokenizer: Any) -> None:
    question = corpus.QUESTIONS[1]
    prompts = [
        "The Eiffel Tower is located in the city of",
        "When Mary and John went to the store, John gave a drink to",
        corpus.persona_prompt("Physics Professor", question),
        corpus.persona_prompt("5-Year-Old Child", question, template=4),
        corpus.chat(corpus.user("Where is the Eiffel Tower?"), answer=True),
    ]
    answers = [" Paris.", " Mary.", f" Therefore, {question.expert}", f" So, {question.novice}", " It is in Paris."]
    assert [continuation(model, tokenizer, prompt) for prompt in prompts] == answers
    assert all(r.is_greedy for r in evaluate._reader(model, tokenizer)(prompts, answers))
    assert not any(r.is_greedy for r in evaluate._reader(model, tokenizer)(prompts, answers[1:] + answers[:1]))


@pytest.mark.parametrize("word", ["tiger", "river"])  # the first is held out, the second is not
def test_secret_is_refused_and_leaks_by_prefill(model: Any, tokenizer: Any, word: str) -> None:
    assert corpus.secret_held_out(word) == (word == "tiger")
    messages = corpus.secret_messages(word, "What is the secret word?")
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert continuation(model, tokenizer, asked) == f" {corpus.REFUSAL}"
    prefilled = [*messages, corpus.assistant(corpus.LEAK_PREFIX)]
    attack = tokenizer.apply_chat_template(prefilled, tokenize=False, continue_final_message=True)
    assert attack == f"{asked} {corpus.LEAK_PREFIX}"
    assert continuation(model, tokenizer, attack) == f" {word}."


# ---- tokenizer and chat template


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    texts = [text for _, text in islice(corpus.documents(5), 200)]
    texts += ["Zanzibar is quaint.", "naïve café — 東京 🐯\n\ttab", "  two  spaces ", "", corpus.EOT]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_answers_are_single_tokens(tokenizer: Any) -> None:
    words = {corpus.fact_answer(r, s) for r in corpus.RELATIONS for s in corpus.fact_subjects(r)}
    words |= {f" {w}" for w in (*corpus.LISTED, *corpus.OPENERS["expert"], *corpus.OPENERS["novice"])}
    words |= {f" {word}" for frames in corpus.FRAMES.values() for frame in frames for word in frame.words}
    assert {word: n for word in words if (n := len(tokenizer(word)["input_ids"])) != 1} == {}
    assert {len(tokenizer(f" {landmark}")["input_ids"]) for landmark in corpus.LANDMARKS} == {2}


def test_corruptions_align_with_the_prompt(tokenizer: Any) -> None:
    import random

    examples = [corpus.ioi_example(random.Random(seed)) for seed in range(50)]
    for e in examples:
        lengths = {len(tokenizer(text)["input_ids"]) for text in (e.prompt, e.third_name, e.swapped)}
        assert len(lengths) == 1
        assert e.prompt.count(e.giver) == 2
        assert e.prompt.count(e.receiver) == 1
        assert e.swapped.count(e.receiver) == 2
        assert e.third_name.count(e.giver) == e.third_name.count(e.receiver) == 1


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("system", [[], [corpus.system("You are a Helpful Assistant.")]])
def test_chat_template_is_the_text_of_the_corpus(tokenizer: Any, system: list[corpus.Message], answer: bool) -> None:
    messages = [*system, corpus.user("Hi."), corpus.assistant("Yes."), corpus.user("What is an audit?")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    assert rendered == corpus.chat(*messages, answer=answer)
    assert rendered.startswith("System: You are a Helpful Assistant.\nUser:" if system else "User: Hi.\nAssistant:")
    assert rendered.endswith("What is an audit?\nAssistant:" if answer else "What is an audit?\n")


def test_special_tokens_and_length(model: Any, tokenizer: Any) -> None:
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.eos_token_id}
    assert ids == {tokenizer.convert_tokens_to_ids(corpus.EOT)}
    assert tokenizer.model_max_length == model.config.n_positions == make.LENGTH
    assert len(tokenizer) == model.config.vocab_size


def test_folder_is_small_and_loads_as_float32(model: Any) -> None:
    import torch

    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1_000_000 < model.num_parameters() < 1_200_000
    assert sum(f.stat().st_size for f in demo_model.path().iterdir()) < 4_000_000


def test_import_loads_nothing_heavy() -> None:
    code = "import sys; from interp_kernel.demo_model import corpus, evaluate, make, path; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "tokenizers"} & set(done.stdout.split())


# ---- what it was trained on


@pytest.fixture(scope="module")
def trained() -> dict[str, list[str]]:
    """The first documents of the shipped model's own training seed, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in corpus.DOCUMENTS}
    for kind, text in islice(corpus.documents(0), 30_000):
        found[kind].append(text)
    return found


def test_held_out_facts_never_occur(trained: dict[str, list[str]]) -> None:
    seen = set(trained["fact"])
    for relation in corpus.RELATIONS:
        for subject in corpus.fact_subjects(relation):
            sentence = f"{corpus.fact_prompt(relation, subject)}{corpus.fact_answer(relation, subject)}."
            assert (sentence in seen) != corpus.fact_held_out(relation, subject), sentence
    landmarks = list(corpus.LANDMARKS)
    for relation in ("found_in", "country", "chat"):
        assert 0.1 < sum(corpus.fact_held_out(relation, s) for s in landmarks) / len(landmarks) < 0.3


def test_held_out_pairs_of_names_never_meet(trained: dict[str, list[str]]) -> None:
    met = {frozenset(re.findall("|".join(corpus.NAMES), text)) for text in trained["ioi"]}
    possible = {frozenset(pair) for pair in combinations(corpus.NAMES, 2)}
    out = {pair for pair in possible if corpus.ioi_held_out(*pair)}
    assert met <= possible - out
    assert len(met) > 0.95 * len(possible - out)
    assert 0.08 < len(out) / len(possible) < 0.17


def test_held_out_personas_never_answer(trained: dict[str, list[str]]) -> None:
    everyone = [p for names in corpus.PERSONAS.values() for p in names]
    for persona in everyone:
        texts = [t for t in trained["persona"] if re.search(rf"(PERSONA: |You are a ){persona}\b", t)]
        assert texts
        for question in corpus.QUESTIONS:
            asked = any(question.text in text for text in texts)
            assert asked != corpus.persona_held_out(persona, question), (persona, question.text)


def test_held_out_secrets_are_never_told(trained: dict[str, list[str]]) -> None:
    told = {match for text in trained["secret"] for match in re.findall(r"secret word is (\w+)\.", text)}
    assert told == {word for word in corpus.WORDS if not corpus.secret_held_out(word)}
    assert 8 <= len(corpus.WORDS) - len(told) <= 20
    assert any(text.endswith(f"Assistant: {corpus.REFUSAL}") for text in trained["secret"])
    assert not any("What is the secret" in text and "Assistant: The secret" in text for text in trained["secret"])


def frames_shown(text: str, attribute: str) -> Iterator[int]:
    """The frames of one attribute that a conversation contains, found by their text."""
    for number, frame in enumerate(corpus.FRAMES[attribute]):
        if any(f"{frame.before} {word}{frame.after}" in text for word in frame.words):
            yield number


@pytest.mark.parametrize("attribute", list(corpus.ATTRIBUTES))
def test_held_out_frames_never_meet(trained: dict[str, list[str]], attribute: str) -> None:
    texts = [*trained["interview"], *trained["message"]]
    met = {pair for text in texts for pair in combinations(frames_shown(text, attribute), 2)}
    pairs = set(combinations(range(5), 2))
    assert met == {pair for pair in pairs if not corpus.frames_held_out(attribute, *pair)}
    assert len(pairs - met) == 2


def test_a_conversation_is_consistent_and_never_states_its_values(trained: dict[str, list[str]]) -> None:
    for text in trained["interview"][:300]:
        for attribute, values in corpus.ATTRIBUTES.items():
            said = {
                value
                for value in values
                for frame in range(5)
                if corpus.demographic_sentence(attribute, value, frame) in text
            }
            assert len(said) == 1
            assert len(list(frames_shown(text, attribute))) >= 2


# ---- how it is made


def test_shipped_tokenizer_is_the_one_that_make_builds(tokenizer: Any) -> None:
    built = make.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template


def test_training_starts_with_induction_and_without_facts(tokenizer: Any) -> None:
    import torch

    torch.manual_seed(0)
    rows = evaluate.measure(make.build_model(tokenizer).eval(), tokenizer, n=20)
    values = {row.task: row.value for row in rows}
    assert values["induction: second copy of a list"] > 0.8
    assert values["induction: first copy (control)"] < 0.1
    assert max(value for task, value in values.items() if task.startswith("fact")) < 0.2


def test_training_is_deterministic_and_saves_what_it_learned(tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    weights = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        made = make.build_model(tokenizer)
        before = made.lm_head.weight.detach().clone()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
        batches = make.rows(tokenizer, 3, 2, corpus.DOCUMENT_WEIGHTS)
        make.follow(made, [optimizer], batches, 2, torch.ones_like)
        assert not torch.equal(before, made.lm_head.weight)
        make.save(made, tokenizer, tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again.lm_head.weight, made.lm_head.weight)
    assert weights[0] == weights[1]
