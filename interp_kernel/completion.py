"""Tab, Shift-Tab and `--help`: on the magics' own lines, and what lives on the worker inside `%%remote` cells."""

from __future__ import annotations

import glob
import html
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_kernel.lines import LineParser
    from interp_kernel.magics import RemoteMagics

MATCHER = "interp_kernel.remote"
ANSWER_S = 0.5
OWN_LINE = re.compile(r"\s*%(?P<cell>%?)remote\s+(?P<rest>.*)")
HELP_ALONE = re.compile(r"\s*%%remote\s(.*\s)?--help\s")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w*)*$")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def install(shell: Any, magics: RemoteMagics | None = None) -> None:
    """Add a matcher to the shell's completer, and let its inspection ask the worker; repeated calls replace.

    Without `magics`, which no cell has used yet, there is no worker to ask.
    """
    from IPython.core.completer import context_matcher

    @context_matcher(identifier=MATCHER)  # type: ignore[untyped-decorator]
    def match(context: Any) -> Any:
        return completions(context, shell, magics)

    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != MATCHER] + [match]
    uninstall(shell)
    shell.input_transformers_cleanup.append(give_help_a_body)
    own = shell.object_inspect_mime

    def inspect_mime(oname: str, *args: Any, **kwargs: Any) -> Any:
        text = inspect_remote(oname, shell, magics)
        return as_bundle(text) if text is not None else own(oname, *args, **kwargs)

    shell.object_inspect_mime = inspect_mime


def uninstall(shell: Any) -> None:
    """Give the shell its own inspection and its own reading of cells back."""
    vars(shell).pop("object_inspect_mime", None)
    transformers = shell.input_transformers_cleanup
    transformers[:] = [t for t in transformers if t is not give_help_a_body]


def as_bundle(text: str) -> dict[str, str]:
    """Both forms of a documentation: where there is no HTML to leave out, ipykernel takes it for not found."""
    return {"text/plain": text, "text/html": f"<pre>{html.escape(COLOUR.sub('', text))}</pre>"}


def give_help_a_body(lines: list[str]) -> list[str]:
    """`%%remote --help` alone in a cell, with an empty line: IPython refuses a cell magic that has no body."""
    return [*lines, "\n"] if len(lines) == 1 and HELP_ALONE.match(lines[0]) else lines


def completions(context: Any, shell: Any, magics: RemoteMagics | None) -> Any:
    """What completes the word at the cursor: alone on a magic's own line, else beside what IPython finds itself."""
    from IPython.core.completer import SimpleCompletion

    from interp_kernel.cell import REMOTE_CELL

    line = context.line_with_cursor[: context.cursor_position]
    own_line, is_remote_cell = OWN_LINE.match(line), REMOTE_CELL.match(context.full_text)
    if own_line and (is_remote_cell or not own_line["cell"]):
        return completions_of_line(own_line, shell, magics)
    if not is_remote_cell:
        return {"completions": []}
    word = DOTTED.search(line)
    skip = len(word.group()) - len(context.token) if word and len(word.group()) > len(context.token) else 0
    found = remote_names(line, shell, magics)
    return {"completions": [SimpleCompletion(text=name[max(0, skip) :], type=kind) for name, kind in found]}


def completions_of_line(line: re.Match[str], shell: Any, magics: RemoteMagics | None) -> Any:
    """What completes the last word of a magic's line; IPython, which takes it for Python, is silenced."""
    from IPython.core.completer import SimpleCompletion

    *words, last = re.split(r"\s+", line["rest"])
    offered = cell_words(words, last, shell, magics) if line["cell"] else line_words(words, last, magics)
    found = [SimpleCompletion(text=word, type="param") for word in offered if word.startswith(last)]
    return {"completions": found or Silence(), "ordered": True, "matched_fragment": last, "suppress": True}


class Silence:
    """No completions that count as one: IPython lets only a matcher that has some silence the others."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def cell_words(words: list[str], last: str, shell: Any, magics: RemoteMagics | None) -> Iterable[str]:
    """What may come after these words of a `%%remote` line; the last word is begun so far."""
    from interp_kernel.lines import cell_parser

    before = words[-1] if words else ""
    if before == "--worker":
        return workers(magics)
    if before in ("-i", "-o", "--keep"):
        named = last[: last.rfind(",") + 1]
        own = [name for name in shell.user_ns if name not in shell.user_ns_hidden and not name.startswith("_")]
        return [named + name for name in own]
    return options_after(before, cell_parser())


def line_words(words: list[str], last: str, magics: RemoteMagics | None) -> Iterable[str]:
    """What may come after these words of a `%remote` line; the last word is begun so far."""
    from interp_kernel.lines import USAGE, start_parser

    if not words:
        return USAGE
    if words[0] == "start":
        options = options_after(words[-1], start_parser())
        return ["demo", *folders(last), "--help", *options] if options else []
    kind = USAGE.get(words[0], "").strip("[]") if len(words) == 1 else ""
    return {"NAME": workers(magics), "FOLDER": folders(last)}.get(kind, [])


def options_after(word: str, parser: LineParser) -> list[str]:
    """A parser's options; none after an option that waits for its value."""
    options = {option: action for action in parser._actions for option in action.option_strings}
    return [] if word in options and options[word].nargs is None else list(options)


def folders(start: str) -> list[str]:
    """The folders whose path begins so."""
    return glob.glob(glob.escape(start) + "*/")


def workers(magics: RemoteMagics | None) -> list[str]:
    """Names of the notebook's workers."""
    return list(magics.workers) if magics is not None else []


def remote_names(line: str, shell: Any, magics: RemoteMagics | None) -> list[tuple[str, str]]:
    """What the worker knows under the dotted name at the end of the line."""
    session = session_in_use(magics)
    if session is None:
        return []
    found = session.ask({"verb": "complete", "text": line, "names": handles(shell, session)}, ANSWER_S)
    return [(name, "remote") for name in found or ()]


def inspect_remote(name: str, shell: Any, magics: RemoteMagics | None) -> str | None:
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


def session_in_use(magics: RemoteMagics | None) -> Any:
    """The session of the worker in use, if there is one; completion never starts a worker."""
    client = magics.workers.get(magics.current or "") if magics is not None else None
    return client.session if client is not None and client.session.hello else None


def handles(shell: Any, session: Any) -> dict[str, int]:
    """The notebook's variables that name values on this worker."""
    from interp_kernel.session import RemoteValue

    return {
        name: value.info["id"]
        for name, value in list(shell.user_ns.items())
        if type(value) is RemoteValue and value.session is session and isinstance(value.info["id"], int)
    }
