"""The magics' own lines: their options, what each verb takes, and what is said of a line that is wrong."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NoReturn

from interp_kernel.backends.modal.arguments import add_options
from interp_kernel.errors import InterpError, SpecError, did_you_mean

# What stands behind a verb of `%remote`.
USAGE = {
    "start": "[MODEL] [options]",
    "use": "NAME",
    "status": "",
    "interrupt": "",
    "restart": "[NAME]",
    "stop": "[NAME]",
    "logs": "[NAME]",
    "techniques": "[FOLDER]",
    "help": "",
}


class MagicError(InterpError):
    """A magic's own line is wrong. Not IPython's UsageError, of which run reports show neither name nor text."""


class LineParser(argparse.ArgumentParser):
    """Reads a magic's line; what is wrong in it becomes one sentence instead of an exit."""

    def read(self, words: list[str]) -> argparse.Namespace:
        """The options in a line's words.

        Raises:
            MagicError: A word is no option, or its value is wrong.
        """
        options, rest = self.parse_known_args(words)
        word = rest[0].partition("=")[0] if rest else ""
        if word.startswith("-"):
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"there is no option {word!r}.{did_you_mean(word, known)}".removesuffix("."))
        if word:
            self.error(f"{word!r} is one word too many")
        return options

    def error(self, message: str) -> NoReturn:
        """Refuse the line and say where its options stand."""
        end = "" if message.endswith("?") else "."
        raise MagicError(f"{self.prog}: {message}{end} `{self.prog} --help` shows what it takes.")


def cell_parser() -> LineParser:
    """Options of `%%remote`."""
    parser = LineParser("%%remote", add_help=False, allow_abbrev=False)
    names: dict[str, Any] = {"action": "extend", "type": lambda text: text.split(","), "default": [], "metavar": "NAME"}
    parser.add_argument("--worker", metavar="NAME", help="worker to run on; by default the one in use")
    parser.add_argument("-i", dest="inputs", **names, help="send this name too; several with commas, or -i for each")
    parser.add_argument("-o", dest="outputs", **names, help="bring its value, of any size")
    parser.add_argument("--keep", **names, help="leave its value on the worker")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="stop the cell after so many seconds")
    parser.add_argument("--background", action="store_true", help="return a job at once")
    parser.add_argument("--quiet", action="store_true", help="show nothing but errors and this project's own warnings")
    parser.add_argument("--help", action="store_true", help="show this and do not run the cell")
    return parser


def start_parser() -> LineParser:
    """Options of `%remote start`: those of WorkerSpec and of InterpClient."""
    parser = LineParser("%remote start", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("model_name", nargs="?", metavar="MODEL", help="demo, a hub name or a local folder")
    add("--name", help="name for --worker and %%remote use; by default the model's")
    add("--backend", dest="mode", metavar="NAME", help="local or modal")
    add("--revision", metavar="REV", help="branch, tag or commit on the hub")
    add("--dtype", help="auto (the checkpoint's), float32, float16, bfloat16 or float64")
    add("--device-map", type=option_value, metavar="MAP", help="auto, a device, or JSON in single quotes")
    add("--quantization", type=option_value, metavar="Q", help="bnb-4bit, bnb-8bit, or JSON in single quotes")
    add("--attn-implementation", metavar="NAME", help="transformers' own name, as eager or sdpa")
    add("--peft", dest="is_peft", action="store_true", help="MODEL is a LoRA adapter")
    add("--base-model", metavar="MODEL", help="model under the adapter, if not the one that its config names")
    add("--tokenizer-name", metavar="NAME", help="tokenizer, where it is not the model's own")
    add("--loader", metavar="NAME", help="transformers, transformer_lens or nnsight: what cells get as `model`")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    add("--hidden-system-prompt", metavar="WHERE", help="file:PATH or secret:NAME")
    add("--scaledown-window", type=float, metavar="S", help="end after so many idle seconds (300)")
    add("--min-containers", type=int, metavar="N", help="1 keeps the worker for good")
    add("--hold", action="store_true", help="keep it as long as this notebook's kernel lives")
    add_options(parser)
    return parser


def seconds(text: str) -> float:
    """A time limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def json_or_text(text: str) -> Any:
    """An option's value: JSON if it looks like an object.

    Raises:
        SpecError: It begins like an object and is none.
    """
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as error:
        raise SpecError(
            f"{text!r} begins like a JSON object and is none ({error}). Write a name or a whole object."
        ) from None


def option_value(text: str) -> Any:
    """`json_or_text` of a word of a line, which loses its quotes there."""
    try:
        return json_or_text(text)
    except SpecError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole JSON object; put it in single quotes") from None


def split_line(line: str) -> list[str]:
    """Words of a magic's line, quotes respected, up to a comment."""
    try:
        return list(takewhile(lambda word: not word.startswith("#"), shlex.split(line)))
    except ValueError as error:
        raise MagicError(f"The magic's line {line!r} can't be read: {error}. Quote as in a shell.") from None


def check_words(verb: str, words: list[str]) -> None:
    """Refuse more or fewer words behind a verb than it takes.

    Raises:
        MagicError: There is no such verb, or its words are too many or too few.
    """
    if verb not in USAGE:
        hint = did_you_mean(verb, USAGE)
        raise MagicError(f"%remote {verb} is not known; expected one of {', '.join(sorted(USAGE))}.{hint}")
    most = len(USAGE[verb].split())
    least = most - USAGE[verb].count("[")
    if verb != "start" and not least <= len(words) <= most:
        got = " ".join(map(repr, words)) or "nothing"
        raise MagicError(f"%remote {verb} got {got}; usage: {f'%remote {verb} {USAGE[verb]}'.strip()}.")


def help_text(purposes: Iterable[tuple[str, str]]) -> str:
    """All of `%remote help`; `purposes` says of each verb what it is for."""
    parts = ["%%remote [options]      run the cell on the worker, with `model` and `tokenizer` and what it reads\n"]
    parts.append(cell_parser().format_help().partition("\n\n")[2])
    parts += [f"{f'%remote {verb} {USAGE[verb]}':<34}{purpose}" for verb, purpose in purposes]
    return "\n".join([*parts, "", start_help()])


def start_help() -> str:
    """Options of `%remote start`, one below the other."""
    return "%remote start [MODEL] [options]\n\n" + start_parser().format_help().partition("\n\n")[2]
