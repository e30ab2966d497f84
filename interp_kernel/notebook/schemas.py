"""nbformat's schemas, without a second of work that no notebook needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

IRIS = "rfc3987_syntax"


@contextmanager
def without_iris() -> Iterator[None]:
    """In the block jsonschema is imported without its grammar of IRIs, which it compiles for a second.

    For processes of our own alone: in them its format checker doesn't know what an IRI is.
    """
    if "jsonschema" in sys.modules or IRIS in sys.modules:
        yield
        return
    sys.modules[IRIS] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[IRIS]


def import_nbformat() -> None:
    """Import nbformat, and jsonschema with it, without that grammar."""
    with without_iris():
        import nbformat  # noqa: F401
