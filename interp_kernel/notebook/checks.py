"""What is looked at before a notebook runs: a fault found now costs nothing, one found later costs the run.

papermill and nbformat let most of these pass: a cell of type `python` is silently skipped, source lines without line
ends are joined to `a = 1print(a)`, an unknown parameter is set where no cell reads it. What can mean only one thing is
made good; what could run otherwise than it reads is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_kernel.errors import InterpError, NotebookError, did_you_mean
from interp_kernel.notebook.files import replace
from interp_kernel.notebook.parameters import Parameter, check_parameters, declared_parameters

CELL_TYPES = ("code", "markdown", "raw")
KINDS_MEANT = {"python": "code", "py": "code", "cell": "code", "md": "markdown", "text": "markdown"}
CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
HEAD_KEYS = {"cells", "metadata", "nbformat", "nbformat_minor"}
CELL_KEYS = {"cell_type", "id", "metadata", "source"}
OWN_KEYS = {"code": {"outputs", "execution_count"}, "markdown": {"attachments"}, "raw": {"attachments"}}


@dataclass(frozen=True)
class Fault:
    """Something wrong with a notebook.

    Attributes:
        cell: Index of the cell, from 0; None if it is no cell's.
        text: One or two sentences that name the place, what was found and what was expected or done.
        is_mended: Whether it was made good in what `examine` returns; else the notebook is refused.
    """

    cell: int | None
    text: str
    is_mended: bool = False


@dataclass
class Examined:
    """A notebook with its faults; `notebook` has those that are mended made good, and is None if it can't be read."""

    path: Path
    notebook: dict[str, Any] | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def refused(self) -> list[Fault]:
        """Faults for which it may not run."""
        return [fault for fault in self.faults if not fault.is_mended]


def read_notebook(path: Path) -> dict[str, Any]:
    """Read a notebook of format 4, made good where that can mean only one thing; so it must run as it is returned.

    Raises:
        NotebookError: The file is no notebook, or a cell wouldn't run as it reads. The message names the first such
            cell, counted from 0.
    """
    found = examine(path)
    if found.refused or found.notebook is None:
        raise NotebookError(found.refused[0].text)
    return found.notebook


def examine(path: Path) -> Examined:
    """Read a notebook and list every fault of its format; nothing is written and nothing raised."""
    found = Examined(path)
    try:
        notebook, constants = _parse(path)
    except NotebookError as error:
        found.faults.append(Fault(None, str(error)))
        return found
    found.notebook = notebook
    found.faults += [
        Fault(None, f"{path} holds {name}, which JSON doesn't have; null took its place {_times(count)}.", True)
        for name, count in constants.items()
    ]
    found.faults += _mend_head(path, notebook)
    for index, cell in enumerate(notebook["cells"]):
        found.faults += _examine_cell(path, index, cell)
    if not found.refused:
        found.faults += _mend_ids(path, notebook)
        found.faults += _check_schema(path, notebook)
    return found


def mend(found: Examined) -> None:
    """Write the notebook back with what was made good; nothing else in the file changes its value.

    Raises:
        OSError: It can't be written.
    """
    replace(found.path, json.dumps(found.notebook, indent=1, ensure_ascii=False) + "\n")


def typed(path: Path, texts: Mapping[str, str], parse: Callable[[str], Any]) -> dict[str, Any]:
    """Values from a command line: what `parse` makes of each, but text where the notebook takes that and not the value.

    A notebook or a name that is wrong is left for `check_parameters` to tell.
    """
    values = {name: parse(text) for name, text in texts.items()}
    found = examine(path) if texts else Examined(path)
    known: Mapping[str, Parameter] = {}
    if found.notebook is not None and not found.refused:
        with contextlib.suppress(NotebookError):
            known = declared_parameters(path, found.notebook) or {}
    as_text = [name for name in texts if name in known and not known[name].takes(values[name])]
    return values | {name: texts[name] for name in as_text if known[name].takes(texts[name])}


def report(path: Path, parameters: Mapping[str, Any], *, fix: bool) -> bool:
    """Print what is wrong with a notebook, also with its kernel, model and parameters; whether it may run.

    Args:
        path: The notebook.
        parameters: Values that it is to run with; with none, those that it needs are only named.
        fix: Whether it is written back with what can be made good.
    """
    found = examine(path)
    if found.notebook is not None and not found.refused:
        found.faults += _surroundings(found.path, found.notebook, parameters)
    written = fix and bool(found.faults) and found.notebook is not None and not found.refused
    if written:
        mend(found)
    for fault in sorted(found.faults, key=lambda fault: (fault.is_mended, -1 if fault.cell is None else fault.cell)):
        print(f"{'refused' if not fault.is_mended else 'mended' if written else 'mendable'}: {fault.text}")
    if found.notebook is None or found.refused:
        return False
    known = (declared_parameters(path, found.notebook) or {}).values()
    takes = f"takes {', '.join(parameter.text for parameter in known)}" if known else "takes no parameters"
    print(f"ok: {path} runs on {kernel_of(path, found.notebook, None)[0]} and {takes}.")
    return True


def kernel_of(path: Path, notebook: Mapping[str, Any], kernel_name: str | None) -> tuple[str, str]:
    """Name and language of the kernel that the notebook runs on.

    Raises:
        NotebookError: None is named, or it is not installed here.
    """
    from jupyter_client.kernelspec import NoSuchKernel

    from interp_kernel.notebook.runner import SpecManager

    name = kernel_name or notebook["metadata"].get("kernelspec", {}).get("name")
    manager = SpecManager()
    if name:
        try:
            return name, str(manager.get_kernel_spec(name).language)
        except NoSuchKernel:
            pass
    installed = sorted({*manager.find_kernel_specs(), "interp"})
    if name:
        raise NotebookError(
            f"{path} asks for the kernel {name!r}, which is not installed; installed are {', '.join(installed)}."
            f"{did_you_mean(name, installed)}"
        )
    raise NotebookError(
        f"{path} names no kernel: metadata.kernelspec.name is missing. Write one into it or pass kernel_name; "
        f"installed are {', '.join(installed)}."
    )


def _surroundings(path: Path, notebook: dict[str, Any], parameters: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of the kernel, the model's options and the parameters."""
    import nbformat

    from interp_kernel.notebook.runner import kernel_environment

    for examined in (
        lambda: kernel_of(path, notebook, None),
        lambda: kernel_environment(nbformat.from_dict(notebook), None),
        lambda: check_parameters(path, notebook, parameters) if parameters else declared_parameters(path, notebook),
    ):
        try:
            examined()
        except InterpError as error:
            yield Fault(None, str(error))


def _parse(path: Path) -> tuple[dict[str, Any], Counter[str]]:
    """The notebook as stored and how often it holds NaN and the like."""
    constants: Counter[str] = Counter()
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: constants.update([name]))
    except FileNotFoundError:
        hint = did_you_mean(path.name, [near.name for near in path.parent.glob("*.ipynb")])
        raise NotebookError(f"{path} doesn't exist; expected a notebook.{hint}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise NotebookError(f"{path} can't be read as a notebook: {error}.") from None
    if isinstance(notebook, dict) and notebook.get("nbformat") in (1, 2, 3):
        raise NotebookError(
            f"{path} has notebook format {notebook['nbformat']}; expected 4. Convert it with "
            f"`jupyter nbconvert --to notebook --nbformat 4 {path}`."
        )
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise NotebookError(f"{path} is JSON but no notebook of format 4: it has no list `cells`.")
    minor = notebook.get("nbformat_minor")
    if notebook.get("nbformat") != 4 or not isinstance(minor, int | None):
        found = f"{notebook.get('nbformat')!r}.{minor!r}"
        raise NotebookError(f"{path} has notebook format {found}; expected 4.0 to 4.5.")
    return notebook, constants


def _mend_head(path: Path, notebook: dict[str, Any]) -> Iterator[Fault]:
    if notebook.get("nbformat_minor") is None:
        notebook["nbformat_minor"] = 5
        yield Fault(None, f"{path} has no `nbformat_minor`; it becomes 5.", True)
    if notebook.get("metadata") is None:
        notebook["metadata"] = {}
        yield Fault(None, f"{path} has no `metadata`; it becomes empty.", True)
    for name in sorted(notebook.keys() - HEAD_KEYS):
        del notebook[name]
        yield Fault(None, f"{path} has `{name}`, which notebooks don't have; it is left out.", True)
    spec = notebook["metadata"].get("kernelspec") if isinstance(notebook["metadata"], dict) else None
    if isinstance(spec, dict) and isinstance(spec.get("name"), str) and "display_name" not in spec:
        spec["display_name"] = spec["name"]
        yield Fault(None, f"{path} has a kernelspec without `display_name`; it becomes {spec['name']!r}.", True)


def _examine_cell(path: Path, index: int, cell: Any) -> Iterator[Fault]:
    where = f"Cell {index} of {path}"
    kind = cell.get("cell_type") if isinstance(cell, dict) else None
    if kind not in CELL_TYPES:
        expected = f"has cell_type {kind!r}; expected one of {', '.join(CELL_TYPES)}."
        yield Fault(index, f"{where} {expected}{_meant(kind)}")
        return
    if (fault := _source_fault(where, cell.get("source"))) is not None:
        yield Fault(index, fault)
    yield from (Fault(index, f"{where} {text}", True) for text in _mend_cell(cell))


def _source_fault(where: str, source: Any) -> str | None:
    lines = [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return f"{where} has a source of type {type(source).__name__}; expected text or a list of lines."
    joined = next((line for line in lines[:-1] if not line.endswith("\n")), None)
    if joined is not None:
        return (
            f"{where} has the source line {joined[:200]!r} without a line end; it would join the next line. "
            "End every line but the last with \\n."
        )
    try:
        "".join(lines).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        return f"{where} holds {found!a}, half of a character, which no file can store."
    return None


def _mend_cell(cell: dict[str, Any]) -> Iterator[str]:
    """Make good what tools and agents leave out or put in the wrong place; says what it did."""
    if cell.get("metadata") is None:
        cell["metadata"] = {}
        yield "has no `metadata`; it becomes empty."
    tags = cell["metadata"].get("tags") if isinstance(cell["metadata"], dict) else None
    if isinstance(tags, str):
        cell["metadata"]["tags"] = [tag.strip() for tag in tags.split(",") if tag.strip()]
        yield f"has the text {tags!r} as its tags; they become {cell['metadata']['tags']}."
    kind = cell["cell_type"]
    for name in sorted(cell.keys() - CELL_KEYS - OWN_KEYS[kind]):
        del cell[name]
        yield f"has `{name}`, which {kind} cells don't have; it is left out."
    empty: dict[str, Any] = {"outputs": [], "execution_count": None} if kind == "code" else {}
    if missing := [name for name in empty if name not in cell]:
        cell |= {name: empty[name] for name in missing}
        yield f"has no {' and no '.join(f'`{name}`' for name in missing)}; it gets what a cell has before it runs."


def _mend_ids(path: Path, notebook: dict[str, Any]) -> Iterator[Fault]:
    """Give every cell a valid id of its own; the same notebook always gets the same ones."""
    cells = notebook["cells"]
    first = next((index for index, cell in enumerate(cells) if "id" in cell), None)
    if notebook["nbformat_minor"] < 5:
        if first is None:
            return
        found = f"Cell {first} of {path} has an id, which format 4.{notebook['nbformat_minor']} doesn't have"
        yield Fault(first, f"{found}; the format becomes 4.5.", True)
        notebook["nbformat_minor"] = 5
    stored = {cell.get("id") for cell in cells if isinstance(cell.get("id"), str)}
    taken: set[str] = set()
    for index, cell in enumerate(cells):
        found = cell.get("id")
        if not isinstance(found, str) or not CELL_ID.fullmatch(found) or found in taken:
            cell["id"] = next(name for name in _names(index) if name not in stored)
            problem = "no id of its own" if found in (None, *taken) else "an id that is not valid"
            shown = "" if found is None else f", {found!r}"
            yield Fault(index, f"Cell {index} of {path} has {problem}{shown}; it becomes {cell['id']!r}.", True)
        taken.add(cell["id"])


def _names(index: int) -> Iterator[str]:
    return (f"cell-{index}" + "-x" * count for count in itertools.count())


def _check_schema(path: Path, notebook: dict[str, Any]) -> Iterator[Fault]:
    """Drop outputs that don't fit the format, since a run makes new ones, and refuse whatever else doesn't."""
    while (error := _schema_error(notebook)) is not None:
        steps = list(error.absolute_path)
        index = steps[1] if steps[:1] == ["cells"] and len(steps) > 1 else None
        place = str(path) if index is None else f"Cell {index} of {path}"
        if index is None or steps[2:3] != ["outputs"]:
            yield Fault(index, f"{place} is not valid: {error.message[:300]}.")
            return
        notebook["cells"][index]["outputs"] = []
        yield Fault(index, f"{place} has outputs that are not valid ({error.message[:100]}); they are left out.", True)


def _schema_error(notebook: dict[str, Any]) -> Any:
    import nbformat

    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return error
    return None


def _meant(kind: Any) -> str:
    meant = KINDS_MEANT.get(kind.lower()) if isinstance(kind, str) else None
    return f" Did you mean {meant!r}?" if meant else did_you_mean(str(kind).lower(), CELL_TYPES)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
