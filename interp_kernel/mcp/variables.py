"""What a kernel's variables are, asked by a piece of text that any Python kernel can run."""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any


def listing(shell: Any) -> str:
    """Name, type and a short description of each of the user's variables, as JSON."""
    import json
    import types

    def described(value: Any) -> str:
        kind = type(value)
        if kind in (bool, int, float, str, type(None)):
            text = repr(value)
            return text if len(text) <= 80 else text[:77] + "..."
        if kind in (list, tuple, dict, set, frozenset):
            return f"{len(value)} items"
        if kind.__name__ in ("RemoteValue", "LazyImport"):
            return repr(value)  # an attribute of what a remote cell has imported would import it here
        if kind.__module__.partition(".")[0] in ("torch", "numpy", "pandas"):
            facts = [(name, getattr(value, name, None)) for name in ("shape", "dtype", "device")]
            return ", ".join(f"{name} {fact}" for name, fact in facts if fact is not None)
        return ""

    hidden = set(shell.user_ns_hidden)
    rows = []
    for name, value in list(shell.user_ns.items()):
        if name.startswith("_") or name in hidden or isinstance(value, types.ModuleType):
            continue
        rows.append({"name": name, "type": type(value).__name__, "value": described(value)})
    return json.dumps(rows)


def expression() -> str:
    """An expression whose value in a kernel is the listing."""
    source = "from typing import Any\n" + inspect.getsource(listing)
    return f"(lambda ns: (exec({source!r}, ns), ns['listing'](get_ipython()))[1])({{}})"


def from_reply(reply: dict[str, Any]) -> list[dict[str, str]]:
    """The listing in what a kernel replied."""
    rows: list[dict[str, str]] = json.loads(ast.literal_eval(reply["data"]["text/plain"]))
    return sorted(rows, key=lambda row: row["name"])
