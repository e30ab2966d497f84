"""What a cell's body reads from the notebook, assigns in it and changes in place; by syntax tree alone.

One pass in evaluation order keeps `settled`: the module-level names whose notebook value can no longer be seen,
because every path to this point assigned or deleted them. A name that is loaded before it is settled is a read.
A function's body runs later, so its reads wait until the function is first mentioned: helpers may be defined below
the function that calls them. Where the truth depends on values, the answer leans towards one read too many, with one
exception: a `with` block is taken to run to its end, unless the manager's name says that it swallows errors.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from interp_kernel.embedded import embedded_code
from interp_kernel.scopes import COMPREHENSIONS, Scope, arguments, bindings

# None stands for code that can't be reached: there everything is settled.
_Settled = frozenset[str] | None

_MUTATORS = (
    {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"}  # list
    | {"add", "difference_update", "discard", "intersection_update", "symmetric_difference_update", "update"}  # set
    | {"popitem", "setdefault", "appendleft", "extendleft", "popleft", "rotate"}  # dict, deque
    | {"fill", "partition", "put", "resize", "setflags"}  # numpy
)
_SWALLOWING = frozenset({"suppress", "raises", "assertRaises", "assertRaisesRegex", "ExitStack", "AsyncExitStack"})
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Names:
    """What a body does with module-level names, each in order of first appearance.

    Attributes:
        reads: Names whose value may have to come from the notebook; builtins are among them.
        writes: Names that may be bound by the body when it ends; `*` if it has a star import.
        mutations: (name, line in the source) of changes in place of a read value that is not assigned.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    mutations: tuple[tuple[str, int], ...]


def analyse(tree: ast.Module) -> Names:
    """Find the names that a module body reads, binds and mutates; the body must compile."""
    walk = _Walk()
    for statement in tree.body:
        walk.statement(statement)
        if isinstance(statement, ast.Delete):
            for name in _deleted(statement):
                walk.writes.pop(name, None)
    walk.release_all()
    mutations = dict.fromkeys(m for m in walk.mutations if m[0] in walk.reads and m[0] not in walk.writes)
    return Names(tuple(walk.reads), tuple(walk.writes), tuple(mutations))


@dataclass
class _Deferred:
    """Module-level names that a function uses when it is called."""

    loads: list[str] = field(default_factory=list)
    mutations: list[tuple[str, int]] = field(default_factory=list)


class _Walk:
    def __init__(self) -> None:
        self.reads: dict[str, None] = {}
        self.writes: dict[str, None] = {}
        self.mutations: list[tuple[str, int]] = []
        self._scope = Scope("module")
        self._settled: _Settled = frozenset()
        self._breaks: list[list[_Settled]] = []
        self._pending: dict[str, list[_Deferred]] = {}
        self._deferred: _Deferred | None = None
        self._classes = 0

    # Names

    def _load(self, name: str) -> None:
        owner = self._scope.owner(name)
        if owner.kind == "class":
            key = owner.prefix + name
            if self._settled is None or key in self._settled:
                self._release(key)
                return
            # Python looks a class body's own name up in the module while the body hasn't bound it.
        elif owner.kind != "module":
            return
        self._load_global(name)

    def _load_global(self, name: str) -> None:
        if self._deferred is not None:
            self._deferred.loads.append(name)
        elif self._settled is not None:
            if name not in self._settled:
                self.reads.setdefault(name)
            self._release(name)

    def _store(self, name: str, *, kept: bool = True) -> None:
        scope = self._scope
        while scope.kind == "comprehension" and name not in scope.local and scope.parent is not None:
            scope = scope.parent
        owner = scope.owner(name)
        if owner.kind == "module" and kept:
            self.writes.setdefault(name)
        if self._settled is not None and owner.kind in ("module", "class"):
            self._settled |= {owner.prefix + name}

    def _mutate(self, target: ast.AST, line: int) -> None:
        while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            target = target.value
        if not isinstance(target, ast.Name) or self._scope.owner(target.id).kind != "module":
            return
        if self._deferred is not None:
            self._deferred.mutations.append((target.id, line))
        elif self._settled is not None and target.id not in self._settled:
            self.mutations.append((target.id, line))

    def _release(self, key: str) -> None:
        for deferred in self._pending.pop(key, ()):
            self._run(deferred)

    def _run(self, deferred: _Deferred) -> None:
        for name in deferred.loads:
            self._load_global(name)
        if self._settled is not None:
            self.mutations.extend(m for m in deferred.mutations if m[0] not in self._settled)

    def release_all(self) -> None:
        """The cell ends: its functions go back to the notebook with what they refer to."""
        if self._settled is None:
            self._settled = frozenset()  # functions defined before a final `raise` are kept all the same
        while self._pending:
            self._release(next(iter(self._pending)))

    # Blocks and branches

    def _block(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def _after(self, run: Callable[[], None]) -> _Settled:
        """What is settled at the end of a branch; the state itself stays as before it."""
        start = self._settled
        run()
        end, self._settled = self._settled, start
        return end

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        outer, self._scope = self._scope, scope
        yield
        self._scope = outer

    def statement(self, node: ast.stmt) -> None:
        """Follow one statement."""
        handler = _HANDLERS.get(type(node))
        if handler is not None:
            handler(self, node)
        else:
            self.expression(*ast.iter_child_nodes(node))

    def expression(self, *nodes: ast.AST | None) -> None:
        """Follow expressions in evaluation order; a stack, because sums of a thousand terms nest as deep."""
        stack = [node for node in reversed(nodes) if node is not None]
        while stack:
            node = stack.pop()
            handler = _HANDLERS.get(type(node))
            if handler is not None:
                handler(self, node)
            else:
                stack.extend(reversed(list(ast.iter_child_nodes(node))))

    # Statements

    def _assign(self, node: ast.Assign) -> None:
        self.expression(node.value, *node.targets)

    def _aug_assign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._load(node.target.id)
        self.expression(node.value, node.target)

    def _ann_assign(self, node: ast.AnnAssign) -> None:
        self.expression(node.value)
        if node.value is not None or not isinstance(node.target, ast.Name):
            self.expression(node.target)
        if self._scope.kind != "function":  # a local variable's annotation is never evaluated
            self.expression(node.annotation)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or (alias.name.split(".")[0] if isinstance(node, ast.Import) else alias.name)
            self._store(name)

    def _if(self, node: ast.If) -> None:
        self.expression(node.test)
        ends = [self._after(lambda: self._block(node.body)), self._after(lambda: self._block(node.orelse))]
        self._settled = _join(ends)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        self.expression(node.test if isinstance(node, ast.While) else node.iter)
        endless = isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and bool(node.test.value)
        start = self._settled
        self._breaks.append([])
        if not isinstance(node, ast.While):
            self.expression(node.target)
        self._block(node.body)
        breaks = self._breaks.pop()
        self._settled = None if endless else start
        self._block(node.orelse)
        self._settled = _join([self._settled, *breaks])

    def _jump(self, node: ast.stmt) -> None:
        self.expression(*ast.iter_child_nodes(node))
        if isinstance(node, ast.Break):
            self._breaks[-1].append(self._settled)
        self._settled = None

    def _try(self, node: ast.Try) -> None:
        start = self._settled
        self._block(node.body)
        self._block(node.orelse)
        ends = [self._settled]
        for handler in node.handlers:
            self._settled = start
            self.expression(handler.type)
            if handler.name:
                self._store(handler.name, kept=False)
            self._block(handler.body)
            ends.append(self._settled)
        self._settled = start  # the final block may run after any of the statements above
        self._block(node.finalbody)
        self._settled = _both(_join(ends), self._settled)

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.expression(item.context_expr, item.optional_vars)
        start = self._settled
        self._block(node.body)
        if any(_may_swallow(item.context_expr) for item in node.items):
            self._settled = _join([start, self._settled])

    def _match(self, node: ast.Match) -> None:
        self.expression(node.subject)
        ends = []
        for case in node.cases:
            ends.append(self._after(lambda case=case: self._case(case)))  # type: ignore[misc]
        last = node.cases[-1]
        if not (isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None and last.guard is None):
            ends.append(self._settled)
        self._settled = _join(ends)

    def _case(self, case: ast.match_case) -> None:
        self.expression(case.pattern, case.guard)
        self._block(case.body)

    def _capture(self, node: ast.MatchAs | ast.MatchStar | ast.MatchMapping) -> None:
        self.expression(*ast.iter_child_nodes(node))
        name = node.rest if isinstance(node, ast.MatchMapping) else node.name
        if name:
            self._store(name)

    # Scopes

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.expression(*node.decorator_list, *node.args.defaults, *node.args.kw_defaults)
        with self._inside(self._with_type_parameters(node)):
            self.expression(*(a.annotation for a in arguments(node.args)), node.returns)
            deferred = self._later(node.args, node.body)
        self._defer(deferred, node.name, at_once=bool(node.decorator_list))
        self._store(node.name)

    def _lambda(self, node: ast.Lambda) -> None:
        self.expression(*node.args.defaults, *node.args.kw_defaults)
        self._defer(self._later(node.args, [node.body]), "", at_once=True)

    def _later(self, args: ast.arguments, body: Sequence[ast.AST]) -> _Deferred:
        """Collect what a function's body uses; inside another function that collects already, all goes there."""
        local, declared_global = bindings(body)
        local |= {a.arg for a in arguments(args)}
        scope = Scope("function", self._scope, local, declared_global)
        collecting, settled, breaks = self._deferred, self._settled, self._breaks
        self._deferred, self._settled, self._breaks = _Deferred(), frozenset(), []
        with self._inside(scope):
            for node in body:
                self.statement(node) if isinstance(node, ast.stmt) else self.expression(node)
        found = self._deferred
        self._deferred, self._settled, self._breaks = collecting, settled, breaks
        return found

    def _defer(self, deferred: _Deferred, name: str, *, at_once: bool) -> None:
        if self._deferred is not None:
            self._deferred.loads.extend(deferred.loads)
            self._deferred.mutations.extend(deferred.mutations)
        elif at_once or self._breaks:  # in a loop the call may stand above the definition
            self._run(deferred)
        else:
            owner = self._scope.owner(name)
            self._pending.setdefault(owner.prefix + name, []).append(deferred)

    def _class(self, node: ast.ClassDef) -> None:
        self.expression(*node.decorator_list)
        self._classes += 1
        prefix = f"{self._classes}."
        with self._inside(self._with_type_parameters(node)):
            self.expression(*node.bases, *node.keywords)
            local, declared_global = bindings(node.body)
            with self._inside(Scope("class", self._scope, local, declared_global, prefix)):
                self._block(node.body)
        methods = [d for key in list(self._pending) if key.startswith(prefix) for d in self._pending.pop(key)]
        # A base class, a metaclass or a decorator may call methods while the class is made.
        at_once = bool(node.decorator_list or node.bases or node.keywords)
        for method in methods:
            self._defer(method, node.name, at_once=at_once)
        self._store(node.name)

    def _with_type_parameters(self, node: ast.AST) -> Scope:
        """The scope of `def f[T]` and `class C[T]` (Python 3.12), which holds T; else the current one."""
        parameters = getattr(node, "type_params", [])
        if not parameters:
            return self._scope
        scope = Scope("function", self._scope, frozenset(p.name for p in parameters))
        with self._inside(scope):
            self.expression(*parameters)
        return scope

    def _type_alias(self, node: ast.AST) -> None:
        name, value = node.name, node.value  # type: ignore[attr-defined]
        with self._inside(self._with_type_parameters(node)):
            self.expression(value)
        self._store(name.id)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.expression(node.generators[0].iter)  # evaluated outside, and always
        targets = frozenset(n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name))
        with self._inside(Scope("comprehension", self._scope, targets)):
            self._after(lambda: self._comprehension_body(node))

    def _comprehension_body(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        for index, generator in enumerate(node.generators):
            self.expression(generator.iter if index else None, generator.target, *generator.ifs)
        self.expression(*((node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)))

    # Expressions

    def _name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._load(node.id)
        elif isinstance(node.ctx, ast.Store):
            self._store(node.id)
        else:  # the value must be there to be deleted, and is gone afterwards
            self._load(node.id)
            self._store(node.id, kept=False)

    def _place(self, node: ast.Attribute | ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._mutate(node.value, node.lineno)
        self.expression(*ast.iter_child_nodes(node))

    def _call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Attribute(value=target, attr=method)) if _changes(method, node.keywords):
                self._mutate(target, node.lineno)
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[target, *_]):
                self._mutate(target, node.lineno)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self._mutate(keyword.value, node.lineno)
        self.expression(*ast.iter_child_nodes(node))
        self._block(embedded_code(node))

    def _walrus(self, node: ast.NamedExpr) -> None:
        self.expression(node.value)
        self._store(node.target.id)

    def _bool_op(self, node: ast.BoolOp) -> None:
        self.expression(node.values[0])
        self._after(lambda: self.expression(*node.values[1:]))

    def _compare(self, node: ast.Compare) -> None:
        self.expression(node.left, node.comparators[0])
        self._after(lambda: self.expression(*node.comparators[1:]))

    def _if_expression(self, node: ast.IfExp) -> None:
        self.expression(node.test)
        ends = [self._after(lambda: self.expression(node.body)), self._after(lambda: self.expression(node.orelse))]
        self._settled = _join(ends)

    def _dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            self.expression(key, value)

    def _assert(self, node: ast.Assert) -> None:
        self._after(lambda: self.expression(node.test, node.msg))


_HANDLERS: dict[type, Callable[..., None]] = {
    ast.Assign: _Walk._assign,
    ast.AugAssign: _Walk._aug_assign,
    ast.AnnAssign: _Walk._ann_assign,
    ast.Import: _Walk._import,
    ast.ImportFrom: _Walk._import,
    ast.If: _Walk._if,
    ast.For: _Walk._loop,
    ast.AsyncFor: _Walk._loop,
    ast.While: _Walk._loop,
    ast.Break: _Walk._jump,
    ast.Continue: _Walk._jump,
    ast.Return: _Walk._jump,
    ast.Raise: _Walk._jump,
    ast.Try: _Walk._try,
    ast.TryStar: _Walk._try,
    ast.With: _Walk._with,
    ast.AsyncWith: _Walk._with,
    ast.Match: _Walk._match,
    ast.MatchAs: _Walk._capture,
    ast.MatchStar: _Walk._capture,
    ast.MatchMapping: _Walk._capture,
    ast.Assert: _Walk._assert,
    ast.Lambda: _Walk._lambda,
    ast.ClassDef: _Walk._class,
    ast.Name: _Walk._name,
    ast.Attribute: _Walk._place,
    ast.Subscript: _Walk._place,
    ast.Call: _Walk._call,
    ast.NamedExpr: _Walk._walrus,
    ast.BoolOp: _Walk._bool_op,
    ast.Compare: _Walk._compare,
    ast.IfExp: _Walk._if_expression,
    ast.Dict: _Walk._dict,
    **dict.fromkeys(_FUNCTIONS, _Walk._function),
    **dict.fromkeys(COMPREHENSIONS, _Walk._comprehension),
}
if hasattr(ast, "TypeAlias"):
    _HANDLERS[ast.TypeAlias] = _Walk._type_alias


def _join(ends: Sequence[_Settled]) -> _Settled:
    """What is settled where paths meet: what all of those that arrive have settled."""
    arriving = [end for end in ends if end is not None]
    return frozenset.intersection(*arriving) if arriving else None


def _both(first: _Settled, second: _Settled) -> _Settled:
    return None if first is None or second is None else first | second


def _deleted(statement: ast.Delete) -> list[str]:
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Del)]


def _may_swallow(manager: ast.expr) -> bool:
    function = manager.func if isinstance(manager, ast.Call) else manager
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _SWALLOWING


def _changes(method: str, keywords: Sequence[ast.keyword]) -> bool:
    """Whether a method of this name changes its object: Python's own, torch's `add_`, pandas' `inplace=True`."""
    if method in _MUTATORS or (method.endswith("_") and not method.endswith("__") and not method.startswith("_")):
        return True
    return any(k.arg == "inplace" and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords)
