"""Which texts a probe is fitted and tested on: groups that stay whole, folds of them, and labels that mean nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from techniques._activations import Reading
from techniques._folds import group_folds, group_labels, held_classes, merged_groups, shuffled_labels
from techniques._probing import Labels, Options, listed
from techniques._stats import resamples

N_CONTROLS = 5  # random labellings of the control task


@dataclass(frozen=True)
class Split:
    """Groups, folds and random labels: what is the same for all layers."""

    groups: Int[Tensor, " n"]
    folds: Int[Tensor, " n"]
    row_folds: Int[Tensor, " n"]
    shuffles: Int[Tensor, "n sets"]
    controls: Int[Tensor, "n sets"]
    draws: Float[Tensor, "boot n_groups"]

    def is_pure(self, labels: Labels) -> bool:
        """Whether every group has one label."""
        return bool((held_classes(labels.classes, self.groups).sum(1) == 1).all())


def split_of(
    reading: Reading, labels: Labels, groups: Sequence[Hashable] | None, options: Options
) -> tuple[Split, list[str]]:
    """The split, and notes on groups that had to be merged.

    Raises:
        ValueError: Lists differ in length, or a class is in one group only.
    """
    inputs, classes = reading.inputs(), labels.classes
    given = inputs if groups is None else list(groups)
    if len(given) != len(inputs):
        raise ValueError(f"groups has {len(given)} entries for {len(inputs)} texts; expected one for each.")
    numbered, merged = merged_groups(given, inputs)
    members = torch.tensor(numbered)
    in_class = held_classes(classes, members).sum(0).tolist()
    notes = [f"The groups {listed(found)} share texts and were held out together." for found in merged]
    if min(in_class) < 2:
        rare = labels.names[in_class.index(min(in_class))]
        raise ValueError(
            f"The label {rare!r} is in 1 group only; expected at least 2, one to fit and one to test. "
            f"{' '.join(notes) or 'Give it more groups, or fewer texts to each.'}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    n_groups = int(members.max()) + 1
    split = Split(
        groups=members,
        folds=group_folds(classes, members, min(options.n_folds, *in_class), generator),
        row_folds=group_folds(classes, torch.arange(len(inputs)), min(options.n_folds, *labels.counts()), generator),
        shuffles=shuffled_labels(classes, members, options.n_permutations, generator),
        controls=group_labels(classes, members, N_CONTROLS if n_groups < len(inputs) else 0, generator),
        draws=resamples(n_groups, options.seed, options.n_boot),
    )
    return split, notes


def domains_of(reading: Reading, groups: Sequence[Hashable], labels: Labels) -> tuple[list[str], Int[Tensor, " n"]]:
    """Names of the groups in order of appearance, and the number of each text's.

    Raises:
        ValueError: Groups differ from texts in number, share texts, or lack a class.
    """
    inputs = reading.inputs()
    if len(groups) != len(inputs):
        raise ValueError(f"groups has {len(groups)} entries for {len(inputs)} texts; expected one for each.")
    domains = list(dict.fromkeys(groups))
    members = torch.tensor([domains.index(group) for group in groups])
    _, merged = merged_groups(groups, inputs)
    if merged or len(domains) < 2:
        found = (
            f"The groups {listed(merged[0])} share texts" if merged else f"All texts are of the group {domains[0]!r}"
        )
        raise ValueError(f"{found}; expected at least two groups that have no text in common.")
    for number_, domain in enumerate(domains):
        here = [text for text, member in zip(inputs, members.tolist(), strict=True) if member == number_]
        classes = labels.classes[members == number_].tolist()
        distinct = [len({t for t, c in zip(here, classes, strict=True) if c == k}) for k in range(len(labels.names))]
        if min(distinct) < 2:
            rare = labels.names[distinct.index(min(distinct))]
            raise ValueError(
                f"The group {domain!r} has {min(distinct)} different texts of the label {rare!r}; expected at least 2."
            )
    return [str(domain) for domain in domains], members
