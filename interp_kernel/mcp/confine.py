"""Where an agent may point: notebooks inside its workspace, and nothing else.

This confines what an agent *names* to the server. Code that it runs in a kernel may do what the kernel's user may.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from interp_kernel.errors import NotebookError

SUFFIX = ".ipynb"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def notebook_path(path: str, root: Path, *, exists: bool) -> Path:
    """The file of a notebook that an agent names.

    Args:
        path: As the agent gave it, relative to the workspace or absolute.
        root: The workspace.
        exists: Whether it must exist, or must not yet.

    Returns:
        The real path, without links.

    Raises:
        NotebookError: The path leads out of the workspace, also by a link; is no regular file named `*.ipynb`; or
            is missing or taken against what `exists` says.
    """
    found = _confined(root, path)
    return _existing(found, path) if exists else _free(found, path)


def _existing(found: Path, path: str) -> Path:
    try:
        kind = stat.S_IFMT(found.stat().st_mode)
    except FileNotFoundError:
        raise NotebookError(f"There is no notebook {path!r} in the workspace.{_nearby(found.parent)}") from None
    except OSError as error:
        raise NotebookError(f"The notebook {path!r} can't be looked at: {error.strerror}.") from None
    if kind != stat.S_IFREG:
        raise NotebookError(f"{path!r} is {KINDS.get(kind, 'no file')}; expected a notebook's file.")
    return found


def _free(found: Path, path: str) -> Path:
    if os.path.lexists(found):
        raise NotebookError(f"{path!r} exists already; choose another name, or resume or continue that notebook.")
    if not found.parent.is_dir():
        raise NotebookError(f"{path!r} can't be made: its folder {str(found.parent)!r} doesn't exist.")
    return found


def _confined(root: Path, named: str) -> Path:
    if not named or not named.isprintable():
        raise NotebookError(f"{named!r} is no path; expected one like `study.ipynb`, relative to the workspace.")
    root = root.resolve()
    lexical = Path(os.path.normpath(root / named))
    if not lexical.is_relative_to(root):
        raise NotebookError(f"{named!r} leads out of the workspace {root}; name a notebook inside of it.")
    try:
        path = (root / named).resolve()
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        raise NotebookError(f"{named!r} can't be followed: {error}.") from None
    if not path.is_relative_to(root):
        raise NotebookError(f"{named!r} goes through a link out of the workspace {root}; name a notebook inside of it.")
    if lexical.suffix != SUFFIX or path.suffix != SUFFIX:
        found = path if lexical.suffix == SUFFIX else lexical
        raise NotebookError(f"{named!r} is {found.suffix or 'without suffix'}; expected a notebook, {SUFFIX}.")
    return path


def _nearby(folder: Path) -> str:
    """The notebooks that do exist there, for whoever mistyped."""
    names = sorted(entry.name for entry in folder.glob(f"*{SUFFIX}"))[:10] if folder.is_dir() else []
    return f" In that folder are: {', '.join(names)}." if names else ""
