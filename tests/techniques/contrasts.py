"""The pairs that attributions and circuits are tested on, beside what was recorded of them."""

from __future__ import annotations

import random

from interp_kernel.demo_model.corpus import ioi_example

STEPS = 3  # of the recorded integrated gradients


def ioi_pairs(
    n: int, seed: int = 0, *, unseen: bool = False, template: int | None = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(clean, corrupted) and (right, wrong): the corrupted prompt names a third person as the giver."""
    rng = random.Random(seed)
    examples = [ioi_example(rng, unseen=unseen, template=template) for _ in range(n)]
    return [(e.prompt, e.third_name) for e in examples], [(e.receiver, e.giver) for e in examples]


PAIRS, ANSWERS = ioi_pairs(4)
