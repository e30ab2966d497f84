"""Completion and documentation inside `%%remote` cells: the magics' options and what lives on the worker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from interp_kernel.cell import REMOTE_CELL
from interp_kernel.session import RemoteValue

if TYPE_CHECKING:
    from interp_kernel.magics import RemoteMagics

MATCHER = "interp_kernel.remote"
ANSWER_S = 0.5
REMOTE_LINE = re.compile(r"\s*%%remote\b")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w*)*$")


def install(shell: Any, magics: RemoteMagics) -> None:
    """Add a matcher to the shell's completer, and let its inspection ask the worker; repeated calls replace."""
    from IPython.core.completer import context_matcher

    @context_matcher(identifier=MATCHER)  # type: ignore[untyped-decorator]
    def match(context: Any) -> Any:
        return completions(context, shell, magics)

    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != MATCHER] + [match]
    uninstall_inspection(shell)
    own = shell.object_inspect_mime

    def inspect_mime(oname: str, *args: Any, **kwargs: Any) -> Any:
        text = inspect_remote(oname, shell, magics)
        return {"text/plain": text} if text is not None else own(oname, *args, **kwargs)

    shell.object_inspect_mime = inspect_mime


def uninstall_inspection(shell: Any) -> None:
    """Give the shell its own inspection back."""
    vars(shell).pop("object_inspect_mime", None)


def completions(context: Any, shell: Any, magics: RemoteMagics) -> Any:
    """What completes the word at the cursor, beside what IPython finds itself."""
    from IPython.core.completer import SimpleCompletion

    text = context.full_text
    if not REMOTE_CELL.match(text):
        return {"completions": []}
    line = context.line_with_cursor[: context.cursor_position]
    found = magic_options(line) if REMOTE_LINE.match(line) else remote_names(line, shell, magics)
    word = DOTTED.search(line)
    skip = len(word.group()) - len(context.token) if word and len(word.group()) > len(context.token) else 0
    return {"completions": [SimpleCompletion(text=name[max(0, skip) :], type=kind) for name, kind in found]}


def magic_options(line: str) -> list[tuple[str, str]]:
    """Options of `%%remote` that begin with the last word of its line."""
    from interp_kernel.lines import cell_parser

    word = line.split(" ")[-1]
    options = [option for action in cell_parser()._actions for option in action.option_strings]
    return [(option, "param") for option in options if word and option.startswith(word)]


def remote_names(line: str, shell: Any, magics: RemoteMagics) -> list[tuple[str, str]]:
    """What the worker knows under the dotted name at the end of the line."""
    session = session_in_use(magics)
    if session is None:
        return []
    found = session.ask({"verb": "complete", "text": line, "names": handles(shell, session)}, ANSWER_S)
    return [(name, "remote") for name in found or ()]


def inspect_remote(name: str, shell: Any, magics: RemoteMagics) -> str | None:
    """The worker's documentation of a name, if the name is the model's, the tokenizer's or a remote value's."""
    session = session_in_use(magics)
    if session is None:
        return None
    names = handles(shell, session)
    root = name.partition(".")[0]
    if root not in names and (root not in ("model", "tokenizer") or root in shell.user_ns):
        return None
    answer: str | None = session.ask({"verb": "inspect", "name": name, "names": names}, ANSWER_S)
    return answer


def session_in_use(magics: RemoteMagics) -> Any:
    """The session of the worker in use, if there is one; completion never starts a worker."""
    client = magics.workers.get(magics.current or "")
    return client.session if client is not None and client.session.hello else None


def handles(shell: Any, session: Any) -> dict[str, int]:
    """The notebook's variables that name values on this worker."""
    return {
        name: value.info["id"]
        for name, value in list(shell.user_ns.items())
        if type(value) is RemoteValue and value.session is session and isinstance(value.info["id"], int)
    }
