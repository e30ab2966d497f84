"""nbformat's schemas, without a second of work that no notebook needs."""

from __future__ import annotations

import sys


def import_nbformat() -> None:
    """Import nbformat, and jsonschema with it, without the grammar of IRIs that that compiles for a second.

    For processes of our own alone: in them its format checker doesn't know what an IRI is.
    """
    if "jsonschema" in sys.modules or "rfc3987_syntax" in sys.modules:
        return
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    try:
        import nbformat  # noqa: F401
    finally:
        del sys.modules["rfc3987_syntax"]
