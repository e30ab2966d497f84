"""Keeps secrets of the environment out of agents' kernels, and out of what agents read and notebooks keep.

A kernel that is started for an agent gets the environment without them. Their values, which its code might still find
in a file or in another process of the same user, are replaced in outputs by the name of the variable.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

WORDS = frozenset({"AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASSPHRASE", "PASSWORDS", "SECRETS", "TOKENS"})
ENDINGS = ("APIKEY", "PASSWD", "PASSWORD", "SECRET", "TOKEN")
"""A word of a name that is one of the first or ends like the second makes the variable a secret."""

PLACES = frozenset({"DIR", "FILE", "FOLDER", "HOME", "PATH", "SOCK"})
"""Last words of variables that say where something is, not what it is."""

KNOWN = re.compile(
    r"\b(?:hf_\w{20,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA\w{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
WITH_PASSWORD = re.compile(r"\w+://[^/\s:@]*:([^/\s@]+)@")
SHORTEST = 6
"""Shorter values, as `1` or `true`, are common text and not masked."""
LONG_LINE = 16
"""A line of a secret of many lines, such as a private key or a prompt, is masked alone too if it is no shorter."""


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable of the environment holds a secret, by its name or by the form of its value."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    by_name = words[-1] not in PLACES and any(word in WORDS or word.endswith(ENDINGS) for word in words)
    return by_name or bool(KNOWN.search(value) or WITH_PASSWORD.search(value))


def kernel_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What an agent's kernel may have of an environment."""
    return {name: value for name, value in environ.items() if not is_secret(name, value)}


def find_secrets(environ: Mapping[str, str], hidden_prompt: str = "") -> dict[str, str]:
    """Secrets by name: of an environment, the Hugging Face token on disk, and hidden prompts.

    Args:
        environ: The environment, with the folders that it names.
        hidden_prompt: Where a worker's hidden system prompt is: `secret:NAME` or `file:PATH`.
    """
    kind, _, source = hidden_prompt.partition(":")
    names = {name for name, value in environ.items() if is_secret(name, value)} | ({source} & environ.keys())
    found = {name: environ[name] for name in names if not _is_path(environ[name])}
    found |= {f"{name} password": m[1] for name, value in environ.items() if (m := WITH_PASSWORD.search(value))}
    home = Path(environ.get("HOME") or Path.home())
    hub = Path(environ.get("HF_HOME") or home / ".cache/huggingface")
    folder = Path(environ.get("INTERP_SECRETS_DIR") or home / ".config/interp-kernel/secrets")
    files = [Path(environ.get("HF_TOKEN_PATH") or hub / "token"), *_files(folder)]
    files += [Path(source).expanduser()] if kind == "file" else []
    return {**{path.name: text for path in files if (text := _read(path))}, **found}


class Mask:
    """Replaces known secrets in text by their names."""

    def __init__(self, environ: Mapping[str, str], hidden_prompt: str = "") -> None:
        """The secrets are those that `find_secrets` finds."""
        self._names: dict[str, str] = {}
        for name, value in find_secrets(environ, hidden_prompt).items():
            for form in _forms(value.strip()):
                self._names.setdefault(form, name)
        self._any = re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))))

    def text(self, text: str) -> str:
        """The text with `[secret NAME]` in place of each secret."""
        if not any(form in text for form in self._names):  # far quicker than the expression, and nearly always so
            return text
        return self._any.sub(lambda m: f"[secret {self._names[m[0]]}]", text)

    def output(self, value: Any) -> Any:
        """The same for every text in an output of a cell or in any other JSON value, its keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.output(key): self.output(item) for key, item in value.items()}
        return [self.output(item) for item in value] if isinstance(value, list | tuple) else value

    def ready(self, text: str) -> int:
        """How many characters of a text that still grows may be masked and shown: the rest may begin a secret."""
        starts = {start for form in self._names for start in _beginnings(form, text)}
        if not starts:
            return len(text)
        whole = [match.span() for match in self._any.finditer(text)]
        outside = [start for start in starts if not any(begin < start < end for begin, end in whole)]
        return min(outside, default=len(text))


def _beginnings(form: str, text: str) -> Iterator[int]:
    """Where the end of a text is the beginning of a form of a secret, but not all of it."""
    start = text.find(form[0], max(0, len(text) - len(form) + 1))
    while start >= 0:
        if form.startswith(text[start:]):
            yield start
        start = text.find(form[0], start + 1)


def _forms(value: str) -> set[str]:
    """A secret and its longer lines: as they are, and as they stand in a repr, in JSON and in a URL."""
    parts = {value} if len(value) >= SHORTEST else set()
    parts |= {line.strip() for line in value.splitlines() if len(line.strip()) >= LONG_LINE}
    return {form for part in parts for form in (part, repr(part)[1:-1], json.dumps(part)[1:-1], quote(part, safe=""))}


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
