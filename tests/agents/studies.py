"""Whole studies as scripts: what an agent says and which tools it calls, turn by turn.

`$session` stands for the id of the session that was started, `$LABEL` for the id of the cell that the call of that
label made: a script can't know them, and an agent reads them in the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PLACEHOLDER = re.compile(r"\$([a-z_]+)")


@dataclass(frozen=True)
class Call:
    """One tool call; `raw` stands for arguments as a model wrote them that are no JSON."""

    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    raw: str | None = None


@dataclass(frozen=True)
class Turn:
    """One answer of an agent: words, calls, or both."""

    words: str = ""
    calls: tuple[Call, ...] = ()


def filled(arguments: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    """Arguments with ids in place of what stands for them; a `$` before anything else is left alone."""
    text = _PLACEHOLDER.sub(lambda match: ids.get(match[1], match[0]), json.dumps(arguments))
    return dict(json.loads(text))


def say(words: str, tool: str, label: str | None = None, **arguments: Any) -> Turn:
    """A turn with one call."""
    return Turn(words, (Call(tool, arguments, label),))


def step(words: str, code: str, label: str | None = None) -> Turn:
    """A turn that runs a cell."""
    return say(words, "execute_code", label, session_id="$session", code=code.strip("\n"))


def note(content: str) -> Turn:
    """A turn that writes Markdown."""
    return say("", "add_markdown", session_id="$session", content=content.strip("\n"))


HEADS_TASK = """\
The demo model completes "When Mary and John went to the store, John gave a drink to" with " Mary". Which attention
heads carry the name? Find the two that matter most, and test them on names that you did not choose them on.
"""

NAMES = '''
template = "When {a} and {b} went to the store, {c} gave a drink to"


def both_orders(names):
    """Clean prompts, corrupted prompts (the other name gives) and (right, wrong) answers."""
    pairs, answers = [], []
    for a, b in names:
        for right, wrong in ((a, b), (b, a)):
            clean, corrupted = (template.format(a=a, b=b, c=giver) for giver in (wrong, right))
            pairs.append((clean, corrupted))
            answers.append((f" {right}", f" {wrong}"))
    return pairs, answers


pairs, answers = both_orders([("Mary", "John"), ("Tom", "Anna"), ("James", "Lucy")])
held_pairs, held_answers = both_orders([("Paul", "Emma"), ("Sarah", "David"), ("Alice", "Bob"), ("Mark", "Julia")])
held_prompts = [clean for clean, _ in held_pairs]
len(pairs), len(held_pairs)
'''
ONE_TOKEN_NAMES = NAMES.replace(
    'pairs, answers = both_orders([("Mary"',
    "# Names are one token each, with their leading space: Lucy was three, and was refused.\n"
    'pairs, answers = both_orders([("Mary"',
).replace('"Lucy"', '"Laura"')

HEADS_STUDY = (
    say("I begin a notebook for this question.", "start_new_session", experiment_name="indirect-object"),
    say("", "init_session", session_id="$session"),
    note(
        """
# Which heads carry the indirect object?

**Question.** After "When Mary and John went to the store, John gave a drink to", which attention heads bring " Mary" to
the end?

**Hypotheses.** A few heads carry most of it (H1), or it is spread over many (H2).

**What would count against H1.** The two best heads, chosen on some names, hurt the answer on *other* names no more than
two random heads do. **What would make it uninteresting.** They hurt an unrelated task as much: then they are simply
important.
"""
    ),
    Turn(
        "Two techniques fit: patching to find, ablation to test. I read what misleads in each before I use it.",
        (
            Call("describe_technique", {"name": "activation_patching"}),
            Call("describe_technique", {"name": "ablate"}),
        ),
    ),
    note(
        "Names in pairs, both orders of each. The heads are chosen on the first set and tested on the second, which "
        "shares no name."
    ),
    step(
        "",
        NAMES,
        "names",
    ),
    step(
        "",
        """
%%remote
from techniques.patching import activation_patching

patching = activation_patching(model, tokenizer, pairs, answers, grain="head")
""",
        "patch",
    ),
    say(
        "The technique refuses: Lucy is three tokens, so her logit is not one number. Another name, in the same cell.",
        "edit_cell",
        session_id="$session",
        cell_id="$names",
        source=ONE_TOKEN_NAMES.strip("\n"),
    ),
    say(
        "",
        "edit_cell",
        session_id="$session",
        cell_id="$patch",
        source="""
%%remote
from techniques.patching import activation_patching

patching = activation_patching(model, tokenizer, pairs, answers, grain="head")
by_effect = sorted(patching["rows"], key=lambda row: -row["effect"])
for row in by_effect[:5]:
    print(f"layer {row['layer']} head {row['head']}: effect {row['effect']:.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
best = [f"a{row['layer']}.h{row['head']}" for row in by_effect[:2]]
""".strip("\n"),
    ),
    step(
        "The picture shows whether two heads stand out or the effect is spread.",
        "from techniques.plots import plot\n\nplot(patching)",
    ),
    note(
        """
One head stands out and a second follows; the rest falls off slowly. Patching says that these heads *can* bring the
answer back, not that the model needs them. So: take them away, on names that had no part in choosing them, beside
twenty random pairs of heads.
"""
    ),
    step(
        "",
        """
%%remote
import itertools
import random

from techniques.ablation import ablate

heads = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)]
others = [pair for pair in itertools.combinations(heads, 2) if not set(pair) & set(best)]
controls = random.Random(0).sample(others, 20)


def loss(components):
    result = ablate(model, tokenizer, held_prompts, held_answers, list(components), n_draws=8, seed=0)
    return result["rows"][0]["logit_diff"]


chosen = loss(best)
random_pairs = [loss(pair) for pair in controls]
chosen
""",
        "ablation",
    ),
    step(
        "A dictionary tells little; I want the loss beside its controls.",
        """
drop = -chosen["change"]
drops = sorted(-row["change"] for row in random_pairs)
interval = f"[{-chosen['high']:.2f}, {-chosen['low']:.2f}]"
print(f"the two best heads {best}: logit difference falls by {drop:.2f} nats {interval}")
print(f"random pairs of heads (n={len(drops)}): median {drops[len(drops) // 2]:.2f}, most {drops[-1]:.2f} nats")
""",
    ),
    note(
        "Are they simply important for everything? The same ablation on a task without names: the city of a landmark."
    ),
    step(
        "",
        """
%%remote
facts = {
    "Eiffel Tower": " Paris",
    "Prado Museum": " Madrid",
    "Brandenburg Gate": " Berlin",
    "Galata Tower": " Istanbul",
}
cities = list(facts.values())
fact_prompts = [f"The {landmark} is located in the city of" for landmark in facts]
fact_answers = [(city, cities[i - 1]) for i, city in enumerate(cities)]
fact_loss = ablate(model, tokenizer, fact_prompts, fact_answers, best, n_draws=3, seed=0)["rows"][0]["logit_diff"]
print(f"facts: logit difference falls by {-fact_loss['change']:.2f} nats")
""",
    ),
    step(
        "The findings, with numbers that the cell fills in, so that a re-run can't disagree with the text.",
        '''
from IPython.display import Markdown

beaten = sum(other < drop for other in drops)
Markdown(f"""
## Findings

1. **Heads {" and ".join(best)} carry the name in the demo model.** They were chosen on {len(pairs)} prompts. On
   {len(held_prompts)} prompts with other names, taking both away lowers the logit difference by {drop:.2f} nats
   {interval}, more than {beaten} of {len(drops)} random pairs of heads do (their median is
   {drops[len(drops) // 2]:.2f}). *Confidence: medium for this template: the names were held out, yet the
   interval is wide; low for others, which were not tried.*
2. **Facts need them less.** The same ablation costs the landmarks {-fact_loss["change"]:.2f} nats. *Confidence: medium;
   four facts, one wording.*

**Negative results.** Patching alone did not separate H1 from H2: several later heads have an effect above zero too.

**Limits.** One template and one seed of the model. Resampling takes names from the same prompts, so a part that all of
them share is not removed. Backup heads were not looked for.
""")
''',
        "findings",
    ),
    say("Does it hold from a fresh kernel?", "run_all", session_id="$session", wait_s=120),
    say("It reproduces. I close the session.", "shutdown_session", session_id="$session"),
    Turn("Done: two heads carry the name on held-out names, beside random heads and an unrelated task as controls."),
)


# What an agent must not get away with, and after which the session must still work; each with a piece of its answer.
HOSTILE_STUDY = (
    (Call("start_session_resume_notebook", {"notebook_path": "../outside.ipynb"}), "outside"),
    (Call("start_session_resume_notebook", {"notebook_path": "/etc/passwd"}), "of the workspace"),
    (Call("start_new_session", {"experiment_name": "../../x"}), "session"),
    (Call("execute_code", {"session_id": "00000000", "code": "1"}), "is not known"),
    (Call("edit_cell", {"session_id": "$session", "cell_id": "ffffffff", "source": "1"}), "ffffffff"),
    (Call("execute_code", {"session_id": "$session"}), "'code' is a required property"),
    (Call("execute_code", {"session_id": "$session", "code": "def f(:"}), "SyntaxError"),
    (Call("execute_code", {"session_id": "$session", "code": "input('password?')"}), "StdinNotImplementedError"),
    (Call("execute_code", {"session_id": "$session", "code": "print('x' * 3_000_000)"}), "read_output"),
    (Call("execute_code", {"session_id": "$session", "code": "import os\nos.environ.get('OPENAI_API_KEY')"}), "done"),
    (Call("execute_code", {"session_id": "$session", "code": "while True: pass", "timeout_s": 1}), "interrupted"),
    (Call("execute_code", {"session_id": "$session", "code": "import os\nos._exit(3)"}), "died"),
    (Call("execute_code", {"session_id": "$session", "code": "1"}), "restart_kernel"),
    (Call("restart_kernel", {"session_id": "$session"}), "kernel idle"),
    (Call("execute_code", {"session_id": "$session", "code": "6 * 7"}), "42"),
)
