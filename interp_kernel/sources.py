"""Local code that travels as source text: modules beside the notebook and technique files.

Everything here reads files and syntax trees; nothing is imported or executed, so a technique may import torch at its
top and the notebook's kernel still needs none.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from interp_kernel.convert import convert_technique_to_standalone, is_old_style, old_style_functions, takes_model_first
from interp_kernel.errors import TechniqueError
from interp_kernel.imports import imported_modules

__all__ = [
    "Module",
    "Parameter",
    "Technique",
    "collect_modules",
    "convert_technique_to_standalone",
    "read_raters",
    "read_technique",
    "read_techniques",
    "technique_modules",
]

# The folder that holds both packages, in a checkout as in site-packages.
_HOME = Path(__file__).resolve().parent.parent
_NEVER_LOCAL = frozenset(sys.stdlib_module_names) | {"interp_kernel", "__main__"}


@dataclass(frozen=True)
class Module:
    """A module's source text; a package without `__init__.py` has an empty one and its folder as the path."""

    name: str
    source: str
    path: Path
    is_package: bool
    digest: str

    def to_wire(self, *, with_source: bool) -> dict[str, object]:
        """Plain data for the worker; the source is left out where the worker has its digest."""
        source = self.source if with_source else None
        place = {"path": str(self.path), "is_package": self.is_package}
        return {"name": self.name, "source": source, **place, "digest": self.digest}


@dataclass(frozen=True)
class Parameter:
    """A technique's parameter as its file writes it; `kind` is positional, keyword, `*` or `**`."""

    name: str
    annotation: str | None
    default: str | None
    kind: str


@dataclass(frozen=True)
class Technique:
    """A technique in a file: known by its syntax tree, run on the worker by `client.run(technique, ...)`.

    Attributes:
        name: The function's name.
        path: Its file.
        module: Name under which the worker imports the file.
        signature: Text of the parameters and of what is returned.
        purpose: First line of the docstring, or "".
        docstring: The whole of it, or "".
        parameters: Those after model and tokenizer.
        is_old_style: The file has it with `self`; it travels converted to `f(model, tokenizer, ...)`.
        takes_model: False for a function that rates texts, needs no model and runs anywhere.
    """

    name: str
    path: Path
    module: str
    signature: str
    purpose: str
    docstring: str
    parameters: tuple[Parameter, ...]
    is_old_style: bool = False
    takes_model: bool = True

    def __call__(self, *_args: object, **_kwargs: object) -> object:
        """Refuse: the model is on the worker."""
        raise TechniqueError(
            f"Technique {self.name!r} of {self.path} runs where the model is. Call client.run({self.name}, ...) "
            "instead; it passes model and tokenizer."
        )


# Modules


@dataclass(frozen=True)
class _File:
    source: str
    digest: str
    tree: ast.Module


@dataclass(frozen=True)
class _Place:
    """Where a module was found; `folder` is set for packages, `file` for all but namespace packages."""

    file: Path | None
    folder: Path | None


_Stamp = tuple[int, int, int, int] | None
_files: dict[Path, tuple[_Stamp, _File]] = {}
_collected: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[dict[Path, _Stamp], dict[str, Module]]] = {}


def collect_modules(names: Iterable[str], *, search: Sequence[Path]) -> dict[str, Module]:
    """Find the local modules among imported names, with all that they import, as source text.

    Local are files and packages in the search folders, and the `techniques` package wherever it is installed. The
    standard library, site-packages and `interp_kernel` are never local. Names that are not found are left out.

    Args:
        names: Absolute module names, as `Cell.imports` has them.
        search: Folders in the order in which Python would search them.

    Returns:
        Modules by name, parent packages included. Unchanged files are not read again.

    Raises:
        TechniqueError: A file can't be read or is no Python.
    """
    key = tuple(names), tuple(map(os.fspath, search))
    known = _collected.get(key)
    if known is not None and all(_stamp(path) == stamp for path, stamp in known[0].items()):
        return dict(known[1])
    watched: dict[Path, _Stamp] = {}
    modules = _follow(key[0], [Path(os.path.abspath(folder)) for folder in search], watched)
    if len(_collected) >= 256:
        _collected.clear()
    _collected[key] = watched, modules
    return dict(modules)


def _follow(names: Iterable[str], search: Sequence[Path], watched: dict[Path, _Stamp]) -> dict[str, Module]:
    places: dict[str, _Place | None] = {}
    modules: dict[str, Module] = {}
    queue = list(names)
    while queue:
        name = queue.pop(0)
        place = _locate(name, search, places, watched)
        if place is None or name in modules:
            continue
        parent = name.rpartition(".")[0]
        queue += [parent] if parent else []
        if place.file is None:
            modules[name] = Module(name, "", place.folder or Path(), True, _digest(""))
            continue
        watched[place.file] = _stamp(place.file)
        file = _read(place.file)
        modules[name] = Module(name, file.source, place.file, place.folder is not None, file.digest)
        queue += imported_modules(file.tree, name if place.folder else parent)
    return modules


def _locate(
    name: str, search: Sequence[Path], places: dict[str, _Place | None], watched: dict[Path, _Stamp]
) -> _Place | None:
    if name not in places:
        parent, _, stem = name.rpartition(".")
        if not parent:
            places[name] = _locate_top(name, search, watched)
        else:
            package = _locate(parent, search, places, watched)
            places[name] = _look(package.folder, stem, watched) if package and package.folder else None
    return places[name]


def _locate_top(name: str, search: Sequence[Path], watched: dict[Path, _Stamp]) -> _Place | None:
    if name in _NEVER_LOCAL:
        return None
    namespace = None
    folders = [folder for folder in search if not {"site-packages", "dist-packages"} & set(folder.parts)]
    for folder in [*folders, _HOME] if name == "techniques" else folders:
        place = _look(folder, name, watched)
        if place is not None and place.file is not None:
            return place
        namespace = namespace or place
    # As in Python, a folder without __init__.py gives way to an installed package of its name.
    installed = namespace and PathFinder.find_spec(name)
    return None if installed and installed.origin is not None else namespace


def _look(folder: Path, stem: str, watched: dict[Path, _Stamp]) -> _Place | None:
    """What `import stem` finds in a folder; the folders that decided it are watched for new files."""
    package = folder / stem
    watched[folder] = _stamp(folder)
    if package.is_dir():
        watched[package] = _stamp(package)
        if (package / "__init__.py").is_file():
            return _Place(package / "__init__.py", package)
    if (folder / f"{stem}.py").is_file():
        return _Place(folder / f"{stem}.py", None)
    return _Place(None, package) if any(package.glob("*.py")) else None


def _stamp(path: Path) -> _Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    # The inode and ctime catch what an editor replaces within one tick of the clock.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: Path) -> _File:
    stamp = _stamp(path)
    known = _files.get(path)
    if known is not None and known[0] == stamp is not None:
        return known[1]
    try:
        source = importlib.util.decode_source(path.read_bytes())
    except FileNotFoundError as error:
        raise TechniqueError(
            f"{path} does not exist. Name a .py file; what comes along is imported, as in `from techniques.logit_lens "
            "import logit_lens`."
        ) from error
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise TechniqueError(f"{path} can't be read as Python source: {error}.") from error
    file = _File(source, _digest(source), _parse(source, path))
    _files[path] = stamp, file
    return file


def _parse(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        raise TechniqueError(
            f"{path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()!r}. Correct the file; it is read "
            "again at the next call."
        ) from error
    except ValueError as error:
        raise TechniqueError(f"{path} can't be read as Python source: {error}.") from error


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


# Techniques


def read_techniques(folder: Path) -> list[Technique]:
    """All techniques in a folder's files, by name; files whose name starts with an underscore hold none.

    A technique is a public function at the top of a file whose first parameters are model and tokenizer. A file
    without such functions may have old-style ones, with `self`.

    Raises:
        TechniqueError: There is no such folder, or a file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TechniqueError(f"{folder} is no folder; expected one that holds technique files.")
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return sorted((t for path in files for t in _techniques_in(path)), key=lambda technique: technique.name)


def read_raters(path: Path) -> list[Technique]:
    """The public functions of a file that take texts instead of a model.

    Raises:
        TechniqueError: The file is broken.
    """
    tree = _read(Path(os.path.abspath(path))).tree
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return [_technique(node, path) for node in functions if not node.name.startswith("_")]


def read_technique(path: Path, name: str | None = None) -> Technique:
    """One technique of a file.

    Args:
        path: The file.
        name: The function; by default the one named like the file, else the only one.

    Raises:
        TechniqueError: The file is broken or has no such technique; the message lists those that it has.
    """
    path = Path(path)
    found = {technique.name: technique for technique in _techniques_in(path)}
    wanted = name or (path.stem if path.stem in found or len(found) != 1 else next(iter(found)))
    if wanted in found:
        return found[wanted]
    if not found:
        raise TechniqueError(
            f"{path} holds no technique. Expected a public function at the top of the file whose first parameters "
            "are model and tokenizer."
        )
    hint = "" if name else " Pass the name of one."
    raise TechniqueError(f"{path} has no technique named {wanted!r}; it has {', '.join(sorted(found))}.{hint}")


def technique_modules(technique: Technique) -> dict[str, Module]:
    """The technique's own file, read anew if it changed, and the local modules that it imports.

    Raises:
        TechniqueError: A file is broken, or an old-style technique can't be converted.
    """
    _, root = _module_name(technique.path)
    modules = collect_modules((technique.module,), search=(root,))
    own = modules.get(technique.module)
    if own is None:
        raise TechniqueError(f"Technique {technique.name!r} was read from {technique.path}, which is gone.")
    if technique.is_old_style:
        source = _converted(own.source, technique.name, own.path)
        modules[own.name] = Module(own.name, source, own.path, own.is_package, _digest(source))
    return modules


def _techniques_in(path: Path) -> list[Technique]:
    file = _read(Path(os.path.abspath(path)))
    functions = [node for node in file.tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    current = [node for node in functions if not node.name.startswith("_") and takes_model_first(node)]
    if current:
        return [_technique(node, path) for node in current]
    names = [node.name for node in old_style_functions(file.tree) if not node.name.startswith("_")]
    return [_old_style_technique(file.source, name, path) for name in names]


def _old_style_technique(source: str, name: str, path: Path) -> Technique:
    tree = _parse(_converted(source, name, path), path)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    node = next(node for node in functions if node.name == name and not is_old_style(node))
    return _technique(node, path, is_old_style=True)


def _converted(source: str, name: str, path: Path) -> str:
    try:
        return convert_technique_to_standalone(source, name)
    except TechniqueError as error:
        raise TechniqueError(f"{path}: {error}") from error


def _technique(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path, *, is_old_style: bool = False) -> Technique:
    docstring = ast.get_docstring(node) or ""
    takes_model = takes_model_first(node)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return Technique(
        name=node.name,
        path=Path(os.path.abspath(path)),
        module=_module_name(path)[0],
        signature=f"({ast.unparse(node.args)}){returns}",
        purpose=docstring.partition("\n")[0],
        docstring=docstring,
        parameters=tuple(_parameters(node.args))[2 if takes_model else 0 :],
        is_old_style=is_old_style,
        takes_model=takes_model,
    )


def _parameters(args: ast.arguments) -> Iterable[Parameter]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(positional, defaults, strict=True):
        yield _parameter(arg, default, "positional")
    if args.vararg:
        yield _parameter(args.vararg, None, "*")
    for arg, keyword_default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _parameter(arg, keyword_default, "keyword")
    if args.kwarg:
        yield _parameter(args.kwarg, None, "**")


def _parameter(arg: ast.arg, default: ast.expr | None, kind: str) -> Parameter:
    annotation = ast.unparse(arg.annotation) if arg.annotation else None
    return Parameter(arg.arg, annotation, ast.unparse(default) if default else None, kind)


def _module_name(path: Path) -> tuple[str, Path]:
    """Name under which a file is imported, and the folder in which that name is searched."""
    path = Path(os.path.abspath(path))
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts, folder = [folder.name, *parts], folder.parent
    if parts[0] in _NEVER_LOCAL:
        raise TechniqueError(
            f"{path} would be imported as {parts[0]!r}, which is a module of Python or of interp-kernel. "
            "Rename the file."
        )
    return ".".join(parts), folder
