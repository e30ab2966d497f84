"""Modules that clients ship as source text, imported on the worker under their own names.

Each call installs the set of modules that its client sent. A module is one version: its own digest and those of all
shipped modules that it imports, in turn. While a version stays the same its module object stays, with whatever it
has cached. Another version of a name, from an edited file or from another client, takes its place in `sys.modules`;
the earlier one is set aside and comes back, not imported again, when a call asks for it.

Protected: the names of modules that were loaded before the first call, so that a file called `torch.py` can't take
the worker's own torch away. Not protected: what the imported code does when it is imported.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from interp_kernel.errors import ShipError
from interp_kernel.imports import imported_modules

_VERSIONS_KEPT = 8  # per name: enough for a few clients at once, few enough for a day of edits

_Version = frozenset[tuple[str, str]]  # (name, digest) of a module and of all shipped modules that it imports

# All that follows belongs to the process, as sys.modules does.
_lock = threading.RLock()
_sources: dict[str, str] = {}
_imports: dict[tuple[str, str, bool], tuple[str, ...]] = {}
_current: dict[str, tuple[ShippedModule, _Version]] = {}
_aside: dict[tuple[str, _Version], ModuleType] = {}
_displaced: dict[str, ModuleType] = {}
_own: set[str] = set()


@dataclass(frozen=True)
class ShippedModule:
    """One module of a client; `source` is None if the client was told that the worker has it."""

    name: str
    source: str | None
    path: str
    is_package: bool
    digest: str

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> ShippedModule:
        """Build it from the fields that `sources.Module.to_wire` gives."""
        return cls(fields["name"], fields["source"], fields["path"], fields["is_package"], fields["digest"])


def missing(digests: Iterable[str]) -> list[str]:
    """Those digests whose source text the client has to send, each once."""
    return [digest for digest in dict.fromkeys(digests) if digest not in _sources]


def install(modules: Mapping[str, ShippedModule]) -> None:
    """Make exactly these shipped modules importable; to be called before each call's code runs.

    Args:
        modules: By name, with the parent packages of each. Empty for a call that ships none: then nothing shipped
            is importable, and installed packages of the same names are.

    Raises:
        ShipError: A source is missing or doesn't match its digest, or a name is one of the worker's own modules.
    """
    with _lock:
        if not _own:
            _own.update(map(_top, sys.modules))
            _own.discard("techniques")  # installed with the worker, yet the client's copy comes first
        _check(modules)
        _keep_sources(modules)
        if not _same(modules):
            _switch({name: (module, _version(name, modules)) for name, module in modules.items()})
        if not sys.meta_path or sys.meta_path[0] is not _finder:
            sys.meta_path[:] = [_finder, *(finder for finder in sys.meta_path if finder is not _finder)]


def _check(modules: Mapping[str, ShippedModule]) -> None:
    for name, module in modules.items():
        if _top(name) in _own:
            raise ShipError(
                f"Module {name!r} ({module.path}) has the name of a module that the worker itself uses. "
                "Rename the file."
            )
        if module.source is None and module.digest not in _sources:
            raise ShipError(
                f"Module {name!r} came without its source, and the worker has none with digest {module.digest[:12]}. "
                "Send it with the source."
            )
        if module.source is not None and _digest(module.source) != module.digest:
            raise ShipError(f"The source of module {name!r} does not match its digest {module.digest[:12]}.")


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _keep_sources(modules: Mapping[str, ShippedModule]) -> None:
    _sources.update((m.digest, m.source) for m in modules.values() if m.source is not None)


def _same(modules: Mapping[str, ShippedModule]) -> bool:
    if modules.keys() != _current.keys():
        return False
    return all((m.digest, m.path) == (_current[n][0].digest, _current[n][0].path) for n, m in modules.items())


# Versions


def _version(name: str, modules: Mapping[str, ShippedModule]) -> _Version:
    found: dict[str, str] = {}
    queue = [name]
    while queue:
        module = modules.get(queue.pop())
        if module is None or module.name in found:
            continue
        found[module.name] = module.digest
        parent = module.name.rpartition(".")[0]
        queue += [parent, *_imports_of(module)]
    return frozenset(found.items())


def _imports_of(module: ShippedModule) -> Sequence[str]:
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    key = module.digest, package, module.is_package
    if key not in _imports:
        try:
            _imports[key] = imported_modules(ast.parse(_sources[module.digest]), package)
        except (SyntaxError, ValueError):
            _imports[key] = ()  # it can't be imported either, and says why when it is
    return _imports[key]


# sys.modules


def _switch(wanted: dict[str, tuple[ShippedModule, _Version]]) -> None:
    tops = {_top(name) for name in wanted}
    for name, module in list(sys.modules.items()):
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if isinstance(loader, _ShippedLoader):
            if name not in wanted or wanted[name][1] != loader.version:
                _set_aside(name, module, loader.version)
        elif _top(name) in tops:
            _displaced[name] = sys.modules.pop(name)
    _current.clear()
    _current.update(wanted)
    for name, (shipped, version) in sorted(wanted.items()):
        kept = _aside.pop((name, version), None)
        if kept is not None:
            _put_back(name, kept)
        _show_lines(shipped)
    for name in [name for name in _displaced if _top(name) not in tops]:
        _put_back(name, _displaced.pop(name))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _set_aside(name: str, module: ModuleType, version: _Version) -> None:
    del sys.modules[name]
    parent, _, child = name.rpartition(".")
    if parent in sys.modules and getattr(sys.modules[parent], child, None) is module:
        delattr(sys.modules[parent], child)  # `import a.b as c` takes the attribute before sys.modules
    _aside[name, version] = module
    versions = [key for key in _aside if key[0] == name]
    if len(versions) > _VERSIONS_KEPT:
        oldest = versions[0][1]
        # Whatever was imported with it goes too, or it would meet a second copy of the module when it comes back.
        for key in [key for key in _aside if oldest <= key[1]]:
            del _aside[key]


def _put_back(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    # A package may have given the name to something else, as `from .one import one` in its `__init__` does.
    if parent in sys.modules and isinstance(getattr(sys.modules[parent], child, module), ModuleType):
        setattr(sys.modules[parent], child, module)


def _show_lines(module: ShippedModule) -> None:
    """Let tracebacks and `inspect` quote the shipped text, even where a file of that path has changed since."""
    source = _sources[module.digest]
    linecache.cache[module.path] = len(source), None, source.splitlines(keepends=True), module.path


class _ShippedLoader(ExecutionLoader):  # its exec_module leaves no frame of ours in tracebacks
    def __init__(self, module: ShippedModule, version: _Version) -> None:
        self._module, self.version = module, version

    def get_filename(self, fullname: str) -> str:
        return self._module.path

    def get_source(self, fullname: str) -> str:
        return _sources[self._module.digest]

    def is_package(self, fullname: str) -> bool:
        return self._module.is_package


class _ShippedFinder(MetaPathFinder):
    """Finds the current call's modules; a shipped package holds shipped modules only, never files of this machine."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = _current.get(fullname)
        if found is None:
            return None
        module, version = found
        spec = ModuleSpec(fullname, _ShippedLoader(module, version), origin=module.path, is_package=module.is_package)
        # A namespace package's path is its folder, and it has no `__file__`.
        spec.has_location = Path(module.path).suffix == ".py"
        return spec


_finder = _ShippedFinder()
