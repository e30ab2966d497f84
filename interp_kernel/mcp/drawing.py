"""Pictures of Plotly figures, drawn by Kaleido's browser in a process that ends with them.

`python -m interp_kernel.mcp.drawing` is that process: a JSON list of figures in, a JSON list of base64 PNGs out.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Figure = Mapping[str, Any]

LIMIT_S = 15.0
KEPT = 50
_kept: dict[str, bytes] = {}


def draw(figures: Sequence[Figure]) -> list[bytes | None]:
    """Draw figures; some 2 s for the first that is new, and far less for more of them.

    Args:
        figures: As in the MIME type of Plotly.

    Returns:
        A PNG for each; None where Kaleido or its browser is missing, fails or takes more than `LIMIT_S`.
    """
    texts = [json.dumps(figure, sort_keys=True) for figure in figures]
    new = [text for text in dict.fromkeys(texts) if text not in _kept]
    if new and importlib.util.find_spec("kaleido"):
        _kept.update((text, png) for text, png in zip(new, _drawn(new), strict=True) if png)
    found = [_kept.get(text) for text in texts]
    for text in list(_kept)[:-KEPT]:
        del _kept[text]
    return found


def _drawn(figures: list[str]) -> list[bytes]:
    """Let the process draw; what it could not is empty."""
    command = [sys.executable, "-m", __name__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        try:
            answer, _ = process.communicate(f"[{','.join(figures)}]", timeout=LIMIT_S)
            return [base64.b64decode(png) for png in json.loads(answer)]
        except (subprocess.TimeoutExpired, ValueError):
            return [b""] * len(figures)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the browser too


async def main() -> None:
    """Draw what stands on the standard input."""
    kaleido: Any = importlib.import_module("kaleido")  # which has no types

    figures = json.load(sys.stdin)
    async with kaleido.Kaleido(n=1) as browser:
        pictures = [await _png(browser, figure) for figure in figures]
        print(json.dumps(pictures), flush=True)


async def _png(browser: Any, figure: Figure) -> str:
    try:
        return base64.b64encode(await browser.calc_fig(figure, opts={"format": "png"})).decode()
    except Exception as error:  # noqa: BLE001 - a browser fails in many ways, and a missing picture is no error
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ""


if __name__ == "__main__":
    asyncio.run(main())
