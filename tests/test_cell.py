"""A cell's analysis, told right or wrong by running the cell."""

from __future__ import annotations

import ast
import contextlib
import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from interp_kernel.cell import Cell, parse_cell

transform: Callable[[str], str] = TransformerManager().transform_cell


def cell(body: str, raw: str | None = None, defined: tuple[str, ...] = ()) -> Cell:
    raw = "%%remote\n" + body if raw is None else raw
    return parse_cell(body, raw=raw, filename="<cell 1>", execution_count=1, transform=transform, defined=defined)


# Generated programs: the cell run with the whole notebook is the oracle for the cell run with its reads alone.

NAMES = ("a", "b", "c", "d", "e", "g", "h", "fn0", "fn1", "Klass", "xs")
NUMBERS = ("a", "b", "c", "d", "e", "g", "h")


class Programs:
    """Random programs that use every way to read, bind and delete a name."""

    def __init__(self, seed: int, *, straight: bool) -> None:
        self.random = random.Random(seed)
        self.straight = straight

    def number(self) -> str:
        return self.random.choice(NUMBERS)

    def value(self, depth: int = 2) -> str:
        n, m = self.number(), self.number()
        kinds = [
            n,
            f"{n} + {m}",
            f"({n} := {m} + 1000)",
            f"sum([{n} + i for i in range(3)])",
            f"len(f'{{{n}}}{{{m}!r}}')",
        ]
        if not self.straight and depth:
            inner = self.value(depth - 1)
            kinds += [
                f"({n} if {m} % 2 else {inner})",
                f"({m} % 2 and {inner} or {n})",
                f"(lambda p, q={m}: p + q + {inner})({n})",
                f"sum([{n} := i + {m} for i in range({n} % 3) if {inner} > i])",
                f"sum({n} + {m} for {n} in [i for i in range({m} % 3)])",
                f"fn0({inner})",
                f"Klass({inner}).method()",
                f"len({{{n}: {inner}, ({m} := 7000): {m}}})",
                f"int({n} < {m} < ({m} := 6000))",
            ]
        return self.random.choice(kinds)

    def simple(self) -> list[str]:
        n, m = self.number(), self.number()
        kinds = [
            f"{n} = {self.value()} + 3000",
            f"{n}, {m} = {self.value()} + 4000, {self.value()} + 5000",
            f"{n} += {self.value()} + 2000",
            f"{n}: int = {self.value()} + 8000",
            f"show({self.value()})",
            f"show({self.value()})",
            f"import math as {n}; {n} = {n}.floor({m} + 0.5) + 9000",
            f"del {n}",
            f"xs.append({n})",
            f"xs[0] = {n}",
        ]
        return [self.random.choice(kinds)]

    def block(self, depth: int, size: int = 3) -> list[str]:
        return [line for _ in range(self.random.randint(1, size)) for line in self.statement(depth)]

    def statement(self, depth: int) -> list[str]:
        if self.straight or depth == 0 or self.random.random() < 0.45:
            return self.simple()
        kind = self.random.choice(
            [self.branch, self.loop, self.attempt, self.manager, self.function, self.klass, self.match]
        )
        return kind(depth - 1)

    def nested(self, depth: int, *last: str) -> list[str]:
        return ["    " + line for line in [*self.block(depth), *last]]

    def branch(self, depth: int) -> list[str]:
        lines = [f"if {self.value()} % 2:", *self.nested(depth)]
        return [*lines, "else:", *self.nested(depth)] if self.random.random() < 0.6 else lines

    def loop(self, depth: int) -> list[str]:
        head = self.random.choice(
            [f"for {self.number()} in range({self.value()} % 4):", "while tick() % 7:", "while True:"]
        )
        last = (
            ["break"]
            if head == "while True:"
            else self.random.choice([[], ["continue"], [f"if {self.number()} % 2: break"]])
        )
        lines = [head, *self.nested(depth, *last)]
        return [*lines, "else:", *self.nested(depth)] if self.random.random() < 0.4 else lines

    def attempt(self, depth: int) -> list[str]:
        raising = self.random.choice([[], ["raise ValueError"], [f"if {self.number()} % 2: raise KeyError"]])
        name = self.random.choice(["", f" as {self.number()}"])
        lines = ["try:", *self.nested(depth, *raising), f"except (ValueError, NameError){name}:", *self.nested(depth)]
        lines += ["else:", *self.nested(depth)] if self.random.random() < 0.3 else []
        return [*lines, "finally:", *self.nested(depth)] if self.random.random() < 0.4 else lines

    def manager(self, depth: int) -> list[str]:
        head = self.random.choice(
            [f"nullcontext({self.value()}) as {self.number()}", "suppress(NameError, ValueError)"]
        )
        return [f"with {head}:", *self.nested(depth)]

    def function(self, depth: int) -> list[str]:
        name, parameter = self.random.choice(["fn0", "fn1"]), self.number()
        head = [f"def {name}({parameter}, *rest, k={self.value()}):", "    tick()"]
        other = self.random.choice([n for n in NUMBERS if n != parameter])
        head += [f"    global {other}"] if self.random.random() < 0.3 else []
        decorated = ["@decorate"] if self.random.random() < 0.2 else []
        return [*decorated, *head, *self.nested(depth, f"return {self.value()}")]

    def klass(self, depth: int) -> list[str]:
        body = self.nested(depth) if self.random.random() < 0.6 else []
        method = ["    def method(self):", "        tick()", f"        return {self.value()}"]
        init = ["    def __init__(self, *args): pass"]
        return [self.random.choice(["class Klass:", "class Klass(Base):"]), *init, *body, *method]

    def match(self, depth: int) -> list[str]:
        n, m = self.number(), self.number()
        first = self.random.choice(
            [f"case [{n}]", f"case {{'k': {n}, **{m}}}", f"case int({n}) if {m} % 2", f"case [{n}, *{'rest'}]"]
        )
        subject = self.random.choice([f"[{self.value()}]", f"{{'k': {self.value()}}}", self.value()])
        lines = [f"match {subject}:", f"    {first}:", *("    " + line for line in self.nested(depth))]
        return (
            [*lines, "    case _:", *("    " + line for line in self.nested(depth))]
            if self.random.random() < 0.5
            else lines
        )


class Stop(BaseException):
    """The program has run long enough."""


def notebook(shown: list[Any]) -> dict[str, Any]:
    ticks = iter(range(40))

    def tick() -> int:
        for number in ticks:
            return number + 1
        raise Stop

    def fn0(value: int) -> int:
        return value + 1

    class Base:
        pass

    class Klass:
        def __init__(self, *args: int) -> None:
            self.args = args

        def method(self) -> int:
            return 1234

    helpers = {"nullcontext": contextlib.nullcontext, "suppress": contextlib.suppress, "decorate": functools.lru_cache}
    numbers = {"a": 1001, "b": 1002, "c": 1003, "d": 1004, "e": 1005, "g": 1006}
    return {
        **numbers,
        **helpers,
        "tick": tick,
        "show": shown.append,
        "fn0": fn0,
        "Klass": Klass,
        "Base": Base,
        "xs": [5],
    }


def outcome(source: str, keep: Callable[[str], bool]) -> tuple[str, list[Any], dict[str, Any], dict[str, Any]]:
    shown: list[Any] = []
    before = {name: value for name, value in notebook(shown).items() if keep(name)}
    after = dict(before)
    ended = "ok"
    try:
        exec(compile(source, "<program>", "exec"), after)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NameError,
        RuntimeError,
        TypeError,
        ValueError,
        Stop,
    ) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, list(map(repr, shown)), before, after


def plain(namespace: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in namespace.items() if isinstance(value, int | list)}


def program(seed: int, *, straight: bool) -> str:
    made = Programs(seed, straight=straight)
    while True:
        source = "\n".join(made.block(3, 6))
        with contextlib.suppress(SyntaxError):
            compile(source, "<program>", "exec")
            return source


@pytest.mark.parametrize("block", range(4))
def test_a_cell_with_its_reads_alone_runs_as_with_the_whole_notebook(block: int) -> None:
    finished = 0
    for seed in range(block * 150, block * 150 + 150):
        source = program(seed, straight=False)
        found = cell(source)
        whole = outcome(source, lambda name: True)
        alone = outcome(source, set(found.reads).__contains__)
        assert alone[:2] == whole[:2], f"seed {seed}\n{source}\nreads {found.reads}"
        _, _, before, after = whole
        returned = {name: alone[3][name] for name in found.writes if name in alone[3]}
        if whole[0] == "ok":
            assert plain(after).items() <= plain({**before, **returned}).items(), source
            bound = {name for name in NAMES if name in after and after[name] is not before.get(name)}
            assert bound <= set(found.writes), f"seed {seed}\n{source}\nwrites {found.writes}"
        if before["xs"] != [5]:
            assert "xs" in {name for name, _ in found.mutations} or "xs" in found.writes, source
        finished += whole[0] == "ok"
    assert finished > 15, "most programs failed early and tell little"


def test_straight_line_programs_read_and_write_exactly_what_running_shows() -> None:
    checked = 0
    for seed in range(600):
        source = program(seed, straight=True)
        ended, _, before, after = outcome(source, lambda name: True)
        if ended != "ok":
            continue
        found = cell(source)
        needed = {name for name in before if outcome(source, lambda n, name=name: n != name)[0] != "ok"}  # type: ignore[misc]
        assert set(found.reads) == needed, source
        assert set(found.writes) == {n for n in NAMES if n in after and after[n] is not before.get(n)}, source
        checked += 1
    assert checked > 100


# Named cases, each with the answer that running it gives


@pytest.mark.parametrize(
    ("body", "reads", "writes"),
    [
        ("x += 1", "x", "x"),
        ("x: int", "", ""),
        ("x: T = y", "y T", "x"),
        ("if c:\n    x = 1\nprint(x)", "c x", "x"),
        ("if c:\n    x = 1\nelse:\n    raise E\nprint(x)", "c E", "x"),
        ("for i in r:\n    if i: x = 1; break\nelse:\n    x = 2\nprint(x)", "r", "i x"),
        ("while True:\n    x = f()\n    if x: break\nprint(x)", "f", "x"),
        ("try:\n    x = f()\nexcept E as e:\n    print(e)\nprint(x)", "f E x", "x"),
        ("try:\n    x = 1\nfinally:\n    y = 2\nprint(x, y)", "", "x y"),
        ("with m as (p, q):\n    x = p\nprint(x, q)", "m", "p q x"),
        ("import contextlib\nwith contextlib.suppress(E):\n    x = f()\nprint(x)", "E f x", "contextlib x"),
        ("def main(): return helper(k)\ndef helper(j): return j + off\nmain()\nk = 1", "k off", "main helper k"),
        ("def f():\n    global g, n\n    g = n\n    n += 1", "n", "f g n"),
        ("def f(a=d, *, b: B = e) -> R:\n    x: Skipped = a\n    return x", "d e B R", "f"),
        ("def f():\n    v = 1\n    def inner():\n        nonlocal v\n        v += w\n    return inner", "w", "f"),
        ("@deco\nclass A(base, metaclass=M):\n    x = x\n    y = x\n    def m(self): return y", "deco base M x y", "A"),
        ("[y := f(i) for i in z if i > t]\nprint(y)", "z t f y", "y"),
        ("total = sum(v * w for v in vs for w in ws(v))", "vs ws", "total"),
        ("match p:\n    case Point(x=0, y=yy) | [yy, 0]: pass\n    case {**rest}: pass", "p Point", "yy rest"),
        ("f'{a!r:>{width}} {{b}}'", "a width", ""),
        ("del x\nx = 1", "x", "x"),
        ("x = 1\ndel x", "", ""),
        ("from math import *\nsqrt(v)", "sqrt v", "*"),
        ("import a.b, c as d\nfrom . import rel", "", "a d rel"),
        ("x = lambda p, *q, r=s: p + q + r + t", "s t", "x"),
        ("async with m() as n:\n    async for i in n: await i", "m", "n i"),
        ("model(tokenizer(prompt))", "model tokenizer prompt", ""),
        ("a = b = a", "a", "a b"),
        ("for i in r:\n    if i: f()\n    def f(): return late\nlate = 1", "r f late", "i f late"),
        ("@call\ndef f(): return late\nlate = 1", "call late", "f late"),
        ("class A(B):\n    def m(): return late\nlate = 1", "B late", "A late"),
        ("class A:\n    def m(): return late\nlate = 1\nA.m()", "", "A late"),
        ("a < b < (x := 1)\nx", "a b x", "x"),
        ("def f():\n    global g\n    g = 1\ng", "g", "f g"),
        ("x[i], y.z, *w = v", "v x i y", "w"),
        ("!echo {a['k']!r} $b {c + 1:>3} '{print $1}' {", "a b c", ""),
        ("!awk '{print $1}' $b {", "b", ""),
        ("x = !ls {y}", "y", "x"),
        ("y = 2\n!echo $y", "", "y"),
        ("%cd $folder", "folder", ""),
        ("%time x = f(y)", "f y", "x"),
        ("%timeit -n 10 -r3 f(y)", "f y", ""),
        ("x.y?", "x", ""),
        ("%time x = = y", "", ""),
    ],
)
def test_reads_and_writes(body: str, reads: str, writes: str) -> None:
    found = cell(body)
    assert set(found.reads) == set(reads.split())
    assert set(found.writes) == set(writes.split())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="this Python has no type parameters")
def test_type_parameters_and_aliases_are_names_of_their_own() -> None:
    found = cell("def f[T: B](x: T) -> T: return y\nclass C[U](D[U]):\n    z: U = w\ntype L[V] = list[V] | W\n")
    assert set(found.reads) == set("ByDwW")
    assert set(found.writes) == {"f", "C", "L"}


def test_builtins_are_read_only_where_the_notebook_defines_them() -> None:
    body = "print(list(range(3)), __name__)"
    assert cell(body).reads == ()
    assert cell(body, defined=("list", "__name__", "x")).reads == ("list",)


def test_very_long_sums_are_analysed() -> None:
    assert cell(" + ".join(["x"] * 900)).reads == ("x",)


def test_mutations_name_the_value_and_the_line_of_the_whole_cell() -> None:
    body = "\nx.append(1)\nd['k'][0].add(2)\ncfg.lr *= 2\nt.data.zero_()\ndf.drop(inplace=True)\nadd(1, 2, out=buf)\n"
    body += "del m[0]\ndef f():\n    late.update(a=1)\nsetattr(o, 'a', 1)\n"
    expected = [("x", 3), ("d", 4), ("cfg", 5), ("t", 6), ("df", 7), ("buf", 8), ("m", 9), ("o", 12), ("late", 11)]
    assert list(cell(body).mutations) == expected


@pytest.mark.parametrize(
    "body",
    ["x = []\nx.append(1)", "x.append(1)\nx = x", "x.copy()", "y = x.append_to", "x.__len__()", "len(x)", "x == 1",
     "def f(x): x.append(1)", "[x.pop() for x in y]", "df.drop(inplace=False)"],
)  # fmt: skip
def test_what_comes_back_or_does_not_change_is_no_mutation(body: str) -> None:
    assert cell(body).mutations == ()


def test_imports_are_absolute_and_found_anywhere() -> None:
    body = (
        "import os.path, helpers\ndef f():\n    from techniques.logit_lens import logit_lens\n    from pkg import sub\n"
    )
    body += "import importlib\nimportlib.import_module('late')\nfrom star import *\nfrom . import rel"
    found = set(cell(body).imports)
    expected = {"os.path", "helpers", "techniques.logit_lens", "techniques.logit_lens.logit_lens", "pkg", "pkg.sub"}
    assert found == expected | {"importlib", "late", "star"}


@pytest.mark.parametrize(
    ("body", "silenced"),
    [("x;", True), ("x ; # shown not", True), ("(x\n);", True), ("'é';", True), ("x", False), ("x # a;", False),
     ("';'", False), ("x = 1;", False), ("x; y", False), ("", False), ("f(\n  1)  ;  \n\n# end", True)],
)  # fmt: skip
def test_trailing_semicolon(body: str, silenced: bool) -> None:
    assert cell(body).silenced is silenced


def test_await_at_the_top_makes_the_cell_async() -> None:
    assert cell("await f()").is_async
    assert cell("[i async for i in f()]").is_async
    assert not cell("async def f(): await g()").is_async


# Line numbers


@pytest.mark.parametrize(
    ("above", "body"),
    [
        ("%%remote\n", "x = 1\nMARK\n"),
        ("%%remote\n", "\n\n  \nx = 1\n\nMARK"),
        ("%%time\n%%capture out\n%%remote --quiet\n", "\n# comment\nMARK\n\n\n"),
        ("\n\n%%remote\n", "if 1:\n    MARK"),
        ("%%remote\n", "    x = 1\n    MARK\n"),
        ("%%remote\n", "!echo a \\\n  b \\\n  c\nx = 1\nMARK\n"),
        ("%%remote\n", "\nfiles = !ls \\\n  .\n%timeit \\\n  f()\n\nMARK"),
        ("%%remote\n", "s = '''\n!no \\\n'''\nMARK"),
        ("%%remote\n", ">>> x = 1\n>>> MARK"),
    ],
)
def test_line_numbers_are_those_of_the_whole_cell(above: str, body: str) -> None:
    raw = above + body
    found = cell(body, raw)
    line = next(n.lineno for n in ast.walk(ast.parse(found.source)) if isinstance(n, ast.Name) and n.id == "MARK")
    assert "MARK" in raw.split("\n")[line + found.line_offset - 1]


def test_ipython_takes_a_common_indentation_off_and_lines_still_match() -> None:
    raw = "  %%remote\n  x = 1\n  boom()\n"
    found = cell("x = 1\nboom()\n", raw)
    assert (found.raw, found.line_offset) == (raw, 1)


def test_a_body_that_is_not_the_cells_tail_stands_for_the_cell() -> None:
    found = cell("x = 1\ny", "ip.run_cell_magic('remote', '', code)")
    assert (found.raw, found.line_offset) == ("x = 1\ny", 0)


@pytest.mark.parametrize(
    ("body", "text", "message"),
    [
        ("\nx = 1\nx = (1,\n", "x = (1,", "never closed"),
        ("ok = 1\nreturn 5", "return 5", "outside function"),
        ("ok = 1\n\n    y = 2", "    y = 2", "unexpected indent"),
        ("!ls \\\n  .\nbreak", "break", "outside loop"),
        ("for i in r:\n  def f():\n    nonlocal zz\n", "    nonlocal zz", "nonlocal"),
        ("x = 1\n\n\x00", "", "null"),
    ],
)
def test_a_syntax_error_speaks_of_the_whole_cell(body: str, text: str, message: str) -> None:
    raw = "%%time\n%%remote\n" + body
    with pytest.raises(SyntaxError, match=message) as caught:
        cell(body, raw)
    error = caught.value
    assert error.filename == "<cell 1>"
    if text:
        assert error.text == text
        assert error.lineno is not None
        assert raw.split("\n")[error.lineno - 1] == text


def test_the_column_of_a_syntax_error_in_an_indented_cell() -> None:
    with pytest.raises(SyntaxError) as caught:
        cell("    x = 1\n    y = = 2\n")
    assert caught.value.text is not None
    assert caught.value.offset is not None
    assert caught.value.text[caught.value.offset - 1 :].startswith("= 2")


def test_a_cell_magic_below_remote_is_refused_with_its_line() -> None:
    with pytest.raises(SyntaxError, match=r"%%time stands below %%remote.*Put it above") as caught:
        cell("\n%%time\nx = 1")
    assert caught.value.lineno == 3


def test_an_empty_body_is_a_cell_that_does_nothing() -> None:
    for body in ("", "\n\n", "# nothing\n"):
        found = cell(body)
        assert (found.reads, found.writes, found.silenced) == ((), (), False)


def test_compiling_warns_on_the_worker_only(recwarn: pytest.WarningsRecorder) -> None:
    cell("x = '\\d'\nx is 'a'")
    assert not recwarn.list
