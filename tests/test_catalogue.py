"""The list of techniques is read from their files, and says how each is called, what for and at what cost."""

from __future__ import annotations

from pathlib import Path

from interp_kernel.catalogue import call, listing, package_techniques, sections
from interp_kernel.sources import read_techniques

SOURCE = '''
def scan(model, tokenizer, prompts, *more, layer: int = 3, **options):
    """Scan the prompts.

    What it answers: nothing here.

    Args:
        prompts: Some texts.
            More of it: not a heading.

    Cost: One forward
        per prompt.
    """


def free(model, tokenizer, *, seed=0):
    """Take nothing."""
'''


def test_a_call_is_written_as_users_write_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    calls = {technique.name: call(technique) for technique in read_techniques(tmp_path)}
    assert calls == {
        "scan": "scan(model, tokenizer, prompts, *more, layer=3, **options)",
        "free": "free(model, tokenizer, *, seed=0)",
    }


def test_listing_has_purpose_and_cost(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    assert "\n    Scan the prompts.\n    Cost: One forward per prompt." in listing(read_techniques(tmp_path))


def test_sections_end_where_the_next_heading_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    (scan,) = (t for t in read_techniques(tmp_path) if t.name == "scan")
    found = sections(scan.docstring)
    assert list(found) == ["", "Args", "Cost"]
    assert found[""] == "Scan the prompts.\n\nWhat it answers: nothing here."
    assert found["Args"].endswith("More of it: not a heading.")


def test_every_technique_of_the_package_says_what_it_costs_and_when_it_misleads() -> None:
    for technique in package_techniques():
        found = sections(technique.docstring)
        assert {"Args", "Returns", "Raises", "Misleads", "Cost", "Example"} <= found.keys(), technique.name
        assert all(text for text in found.values()), technique.name
