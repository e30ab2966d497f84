"""Local modules and technique files as source text; shipped modules on the far side, in processes of their own."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from interp_kernel.errors import TechniqueError
from interp_kernel.sources import (
    collect_modules,
    convert_technique_to_standalone,
    read_technique,
    read_techniques,
    technique_modules,
)

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


# collect_modules


def test_local_modules_are_followed_through_all_kinds_of_imports(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "helpers.py": "import json, torch\nfrom pkg.sub import deep\ndef f():\n    import lazy_one\n",
            "lazy_one.py": "",
            "pkg/__init__.py": "from . import sibling",
            "pkg/sibling.py": "from .sub.deep import x",
            "pkg/unused.py": "raise SystemExit",
            "pkg/sub/__init__.py": "",
            "pkg/sub/deep.py": "from ..other import *\nx = 1",
            "pkg/other.py": "import helpers  # a cycle",
            "space/part.py": "import lazy_one",
        },
    )
    found = collect_modules(["helpers", "helpers.f", "space.part", "os.path", "nowhere"], search=[tmp_path])
    assert set(found) == {
        *("helpers", "lazy_one", "space", "space.part"),
        *("pkg", "pkg.sibling", "pkg.sub", "pkg.sub.deep", "pkg.other"),
    }
    assert {name for name, module in found.items() if module.is_package} == {"pkg", "pkg.sub", "space"}
    assert found["helpers"].source == (tmp_path / "helpers.py").read_text()
    assert found["helpers"].path == tmp_path / "helpers.py"
    assert found["lazy_one"].digest == found["pkg.sub"].digest != found["helpers"].digest


def test_python_finds_the_same_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, {"both.py": "", "pkg.py": "", "pkg/__init__.py": "", "space/a.py": "", "pytest/a.py": ""})
    write(second, {"both.py": "", "only.py": "", "space/__init__.py": "", "json.py": "", "numpy/__init__.py": ""})
    names = ["both", "pkg", "only", "space", "numpy"]
    found = collect_modules([*names, "pytest", "pytest.a", "json"], search=[first, second])
    program = "import sys, importlib.util as u; print(*(u.find_spec(n).origin for n in sys.argv[1:]), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": f"{first}{os.pathsep}{second}"}
    command = [sys.executable, "-c", program, *names]
    origins = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert [str(found[name].path) for name in names] == origins
    assert set(found) == set(names), "an installed package comes before a folder; the standard library always"


def test_the_techniques_package_is_found_without_a_search_folder(tmp_path: Path) -> None:
    found = collect_modules(["techniques"], search=[])
    assert found["techniques"].path == ROOT / "techniques" / "__init__.py"
    write(tmp_path, {"techniques/__init__.py": "mine = 1"})
    assert collect_modules(["techniques"], search=[tmp_path])["techniques"].source == "mine = 1"


def test_neither_this_package_nor_installed_ones_travel(tmp_path: Path) -> None:
    installed = write(tmp_path / "site-packages", {"thing.py": ""})
    assert collect_modules(["interp_kernel.sources", "pytest", "thing"], search=[ROOT, installed]) == {}


def test_edits_new_files_and_removed_files_are_seen(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "import b", "pkg/__init__.py": "from pkg import c"})
    names = ["a", "pkg"]
    assert set(collect_modules(names, search=[tmp_path])) == {"a", "pkg"}
    write(tmp_path, {"b.py": "x = 1"})
    before = collect_modules(names, search=[tmp_path])
    assert set(before) == {"a", "b", "pkg"}
    write(tmp_path, {"b.py": "x = 2", "pkg/c.py": ""})
    after = collect_modules(names, search=[tmp_path])
    assert set(after) == {"a", "b", "pkg", "pkg.c"}
    assert after["b"].source == "x = 2"
    assert after["a"] == before["a"]
    (tmp_path / "b.py").unlink()
    assert set(collect_modules(names, search=[tmp_path])) == {"a", "pkg", "pkg.c"}


def test_a_folder_that_becomes_a_package_is_seen(tmp_path: Path) -> None:
    write(tmp_path, {"pkg/data.txt": ""})
    assert collect_modules(["pkg"], search=[tmp_path]) == {}
    write(tmp_path, {"pkg/__init__.py": ""})
    assert set(collect_modules(["pkg"], search=[tmp_path])) == {"pkg"}


def test_a_repeated_call_is_quick(tmp_path: Path) -> None:
    write(tmp_path, {f"m{i}.py": f"import m{i + 1}, torch\n" + "x = 1\n" * 300 for i in range(5)})
    assert len(collect_modules(["m0"], search=[tmp_path])) == 5
    times = []
    for _ in range(50):
        start = time.perf_counter()
        collect_modules(["m0"], search=[tmp_path])
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 0.0005


def test_source_in_another_encoding_travels_as_text(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\r\nname = 'é'\r\n".encode("latin-1"))
    assert "name = 'é'\n" in collect_modules(["latin"], search=[tmp_path])["latin"].source


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"x = 1\ndef f(:\n", r"broken\.py, line 2: .*'def f\(:'"), (b"x = '\xff'", "broken.py can't be read"),
     (b"x = 1\0", "broken.py")],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, {"a.py": "import broken"})
    (tmp_path / "broken.py").write_bytes(content)
    with pytest.raises(TechniqueError, match=message):
        collect_modules(["a"], search=[tmp_path])
    (tmp_path / "broken.py").write_text("x = 1")
    assert "broken" in collect_modules(["a"], search=[tmp_path])


# Techniques

TECHNIQUE = '''
import torch
from typing import List
from os.path import join
raise SystemExit("a technique file is read, never run")

def helper(x): ...
def _private(model, tokenizer): ...

@torch.inference_mode()
def lens(
    model: "Model", tokenizer, prompt: str, /, top: int = 5, *texts: str, scale: float = 1e-3, flag=None, **rest
) -> dict[str, list[float]]:
    """Decode each layer.

    More text.
    """

async def other(model, tokenizer): ...
def wrong_order(tokenizer, model): ...
class Method:
    def method(self, model): self.model = model
'''


def test_techniques_are_read_from_the_syntax_tree_alone(tmp_path: Path) -> None:
    write(tmp_path, {"one.py": TECHNIQUE, "_hidden.py": "def no(model, tokenizer): ...", "notes.txt": "no Python"})
    lens, other = read_techniques(tmp_path)
    assert (lens.name, other.name, lens.module, lens.path) == ("lens", "other", "one", tmp_path / "one.py")
    assert lens.purpose == "Decode each layer."
    assert lens.docstring == "Decode each layer.\n\nMore text."
    assert other.docstring == ""
    assert "torch" not in lens.signature
    with pytest.raises(TechniqueError, match=r"client\.run\(lens"):
        lens("prompt")


def test_the_signature_is_what_inspect_says_of_the_imported_function(tmp_path: Path) -> None:
    text = TECHNIQUE.replace('raise SystemExit("a technique file is read, never run")', "")
    write(tmp_path, {"one.py": text.replace("import torch", "").replace("@torch.inference_mode()", "")})
    spec = importlib.util.spec_from_file_location("one", tmp_path / "one.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = inspect.signature(module.lens)
    technique = read_technique(tmp_path / "one.py", "lens")
    exec(compile(f"def again{technique.signature}: ...", "again", "exec", dont_inherit=True), vars(module))
    assert inspect.signature(module.again) == real
    names = list(real.parameters)[2:]
    assert [p.name for p in technique.parameters] == names
    kinds = {"positional": (0, 1), "*": (2,), "keyword": (3,), "**": (4,)}
    for read, name in zip(technique.parameters, names, strict=True):
        expected = real.parameters[name]
        assert expected.kind in kinds[read.kind]
        assert (read.default is None) == (expected.default is inspect.Parameter.empty)
        assert read.default is None or eval(read.default) == expected.default
        assert read.annotation is None or eval(read.annotation) == expected.annotation


def test_one_technique_by_name_by_file_or_because_it_is_the_only_one(tmp_path: Path) -> None:
    write(tmp_path, {"lens.py": TECHNIQUE, "two.py": TECHNIQUE, "solo.py": "def f(model, tokenizer): ..."})
    assert read_technique(tmp_path / "lens.py").name == "lens"
    assert read_technique(tmp_path / "lens.py", "other").name == "other"
    assert read_technique(tmp_path / "solo.py").name == "f"
    with pytest.raises(TechniqueError, match=r"no technique named 'two'; it has lens, other\. Pass the name"):
        read_technique(tmp_path / "two.py")
    with pytest.raises(TechniqueError, match=r"no technique named 'List'; it has lens, other\.$"):
        read_technique(tmp_path / "two.py", "List")


def test_what_is_no_technique_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"none.py": "from typing import List", "random.py": "def random(model, tokenizer): ..."})
    with pytest.raises(TechniqueError, match="holds no technique"):
        read_technique(tmp_path / "none.py")
    with pytest.raises(TechniqueError, match=r"imported as 'random'.*Rename the file"):
        read_technique(tmp_path / "random.py")
    with pytest.raises(TechniqueError, match="is no folder"):
        read_techniques(tmp_path / "absent")
    with pytest.raises(TechniqueError, match="does not exist"):
        read_technique(tmp_path / "absent.py")


def test_a_technique_travels_with_its_package_and_as_last_saved(tmp_path: Path) -> None:
    write(tmp_path, {"mine/__init__.py": "", "mine/_model.py": "x = 1"})
    write(tmp_path, {"mine/lens.py": "from mine._model import x\ndef lens(model, tokenizer): return x"})
    technique = read_technique(tmp_path / "mine" / "lens.py")
    assert technique.module == "mine.lens"
    assert set(technique_modules(technique)) == {"mine", "mine._model", "mine.lens"}
    write(tmp_path, {"mine/_model.py": "x = 22"})
    assert technique_modules(technique)["mine._model"].source == "x = 22"
    (tmp_path / "mine" / "lens.py").unlink()
    with pytest.raises(TechniqueError, match="is gone"):
        technique_modules(technique)


def test_an_old_style_file_is_read_and_travels_converted(tmp_path: Path) -> None:
    write(tmp_path, {"old.py": "def old(self, k: int = 3):\n    '''Count.'''\n    return self.model + k"})
    technique = read_technique(tmp_path / "old.py")
    assert (technique.signature, technique.purpose, technique.is_old_style) == (
        "(model, tokenizer, k: int=3)",
        "Count.",
        True,
    )
    shipped = technique_modules(technique)["old"]
    namespace: dict[str, Any] = {}
    exec(shipped.source, namespace)
    assert namespace["old"](10, None) == 13
    write(tmp_path, {"bad.py": "def bad(self):\n    return self.model, self.cache"})
    with pytest.raises(TechniqueError, match=r"bad\.py: Line 2: bad uses self\.cache"):
        read_technique(tmp_path / "bad.py")


def test_the_projects_own_techniques_are_found() -> None:
    assert all(t.module.startswith("techniques.") for t in read_techniques(ROOT / "techniques"))


# convert_technique_to_standalone: the old function, called on an object, is the oracle for the new one


class Model:
    n = 7

    def run(self, x: int) -> int:
        return x * 2


class Tokenizer:
    def encode(self, text: str) -> int:
        return len(text)


MODEL, TOKENIZER = Model(), Tokenizer()

OLD = {
    "plain": """
        def f(self, text: str = "self.model"):  # self.model stays in a comment
            '''Docs on self.model.'''
            return self.model.n, self.tokenizer.encode(text), "self.tokenizer", text
    """,
    "multi-line signature": """
        def f(
            self,  # the object
            text: "dict[str, int] | str" = "ab",
            *,
            k: int = 2,  # self.model
        ) -> tuple[int, ...]:
            return (
                self
                .model.run(k),
                text,
            )
    """,
    "annotated self, positional only": "def f(self: 'Any', /, k=1): return self.model.n + k",
    "only self": "def f(self): return [self.model.n for _ in range(2)] + [(lambda: self.tokenizer.encode('x'))()]",
    "decorated": """
        import functools
        @functools.lru_cache(maxsize=None)
        @functools.wraps(len)
        def f(self, k=1):
            return self.model.run(k)
    """,
    "f-strings": '''
        def f(self, k=1):
            a = f"{self.model.n!r:>{self.model.n}} {{self.model.n}} {'self.model'} é {self.tokenizer.encode('self.a')}"
            b = f"""
              self.model {self.model.n}
                {k + self.model.n} é{self.model.n:{k}}
            """
            c = ("x" f"{self.model.n}"
                 f'{self.model.run(self.model.n)} {"nested " + f"{self.model.n}"}')
            return a, b, c
    ''',
    "f-string that quotes itself": "def f(self): return f'{self.model.n=}'",
    "f-strings nested over lines": (
        "def f(self):\n    return f\"\"\"{f'''{self.model.n}\n{self.model.n}'''}\n{self.model.n}\"\"\""
    ),
    "unicode before it": "def f(self): return 'éü漢', self.model.n, 'é', self.tokenizer.encode('漢')",
    "clash with a parameter": "def f(self, model='gpt', tokenizer_name='t'): return self.model.n, model",
    "clash with a nested name": """
        def f(self):
            def inner(model):
                return self.model.run(model)
            return inner(4), [tokenizer for tokenizer in "ab"], self.tokenizer.encode("abc")
    """,
    "clash with a global": "model = 'outer'\ndef f(self): return model, self.model.n",
    "alias": """
        def f(self):
            model, tokenizer = self.model, self.tokenizer
            return model.n, tokenizer.encode("ab"), self.model.n
    """,
    "alias in a nested function": """
        def f(self):
            def inner():
                model = self.model
                return model.n
            return inner()
    """,
    "nested functions and another self": """
        def f(self, k=1):
            class Hook:
                def __init__(self): self.model = "mine"
                def get(self): return self.model
            def inner(x):
                return self.model.run(x) + k
            return inner(3), Hook().get(), (lambda self: self.model)(Hook())
    """,
}
METHODS = {
    "method": '''
        import math
        TOP = 5

        class Techniques:
            """All of them."""

            def __init__(self, model, tokenizer):
                self.model, self.tokenizer = model, tokenizer

            # How many, é
            # in two lines.
            @staticmethod
            def unrelated(x): return x

            # Right above.
            def f(
                self, text="""
            self.model
              é""", k: int = TOP,
            ):
                # at the margin
                s = """
            keep this
              {self.model}
                """
                if True:
                    return self.model.n + math.floor(k), s, text, ("a"
                        "b")  # the end

        AFTER = 1
    ''',
}


def call(source: str, *, bound: bool) -> Any:
    namespace: dict[str, Any] = {"__name__": "converted"}
    exec(source, namespace)
    if not bound:
        return namespace["f"](MODEL, TOKENIZER)
    owner = namespace.get("Techniques")
    holder = type("Holder", (), {"model": MODEL, "tokenizer": TOKENIZER})
    return owner(MODEL, TOKENIZER).f() if owner else namespace["f"](holder())


@pytest.mark.parametrize("case", [*OLD, *METHODS])
def test_a_converted_technique_does_what_the_old_one_did(case: str) -> None:
    source = textwrap.dedent({**OLD, **METHODS}[case])
    converted = convert_technique_to_standalone(source)
    assert call(converted, bound=False) == call(source, bound=True)
    function = next(
        node for node in ast.parse(converted).body if isinstance(node, ast.FunctionDef) and node.name == "f"
    )
    names = [a.arg for a in [*function.args.posonlyargs, *function.args.args]]
    assert names[0] in ("model", "the_model")
    assert names[1] in ("tokenizer", "the_tokenizer")
    assert convert_technique_to_standalone(converted, "f") == converted, "what is standalone already stays"


def test_only_the_exact_places_change() -> None:
    source = textwrap.dedent(OLD["multi-line signature"])
    expected = source.replace("    self,", "    model, tokenizer,").replace("self\n        .model", "model")
    assert convert_technique_to_standalone(source) == expected
    source = textwrap.dedent(OLD["plain"])
    expected = source.replace("(self,", "(model, tokenizer,").replace("return self.model", "return model")
    assert convert_technique_to_standalone(source) == expected.replace("self.tokenizer.encode", "tokenizer.encode")


def test_comments_of_a_method_and_code_around_the_class_survive() -> None:
    converted = convert_technique_to_standalone(textwrap.dedent(METHODS["method"]))
    for text in (
        "import math\nTOP = 5\n",
        "\n# Right above.\ndef f(\n",
        "    # at the margin\n",
        "  # the end\n",
        "AFTER = 1",
    ):
        assert text in converted
    assert "class" not in converted


def test_async_methods_survive() -> None:
    source = "class T:\n    async def f(self, k=1):\n        return self.model.n + k\n"
    source += "    async def g(self): await self.model\n"
    converted = convert_technique_to_standalone(source)
    assert [type(n).__name__ for n in ast.parse(converted).body] == ["AsyncFunctionDef", "AsyncFunctionDef"]
    namespace: dict[str, Any] = {}
    exec(converted, namespace)
    with pytest.raises(StopIteration) as ended:
        namespace["f"](MODEL, TOKENIZER).send(None)
    assert ended.value.value == 8
    assert "async def g(model, tokenizer)" not in convert_technique_to_standalone(source, "f")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(self):\n    x = self.model\n    return self.layers", r"Line 3: f uses self\.layers"),
        ("def f(self):\n    return helper(self)", "Line 2: f uses `self` itself"),
        ("def f(self):\n    self.model = 1", r"Line 2: f assigns or deletes self\.model"),
        ("class T(B):\n    def f(self):\n        return super().f(self.model)", r"Line 3: f uses super\(\)"),
        (
            "class T:\n    K = 3\n    def f(self, k=K):\n        return self.model",
            "Line 3: f uses K, which is defined in class T",
        ),
        ("def f(self: int:\n    pass", "Line 1: "),
        ("from typing import List\ndef g(x): ...", "no old-style technique in the source.*Techniques in it: none"),
    ],
)
def test_what_cannot_stand_alone_is_refused_with_its_line(source: str, message: str) -> None:
    with pytest.raises(TechniqueError, match=message):
        convert_technique_to_standalone(source)


def test_an_unknown_name_is_answered_with_those_that_exist() -> None:
    source = "def f(self): return self.model\ndef g(model, tokenizer): ...\n"
    with pytest.raises(TechniqueError, match=r"named 'h' .*Techniques in it: f, g"):
        convert_technique_to_standalone(source, "h")


# worker/modules.py, in a process of its own: it changes sys.modules and sys.meta_path

FAR = """
import hashlib, json, sys, traceback
from interp_kernel.worker.modules import ShippedModule, install, missing

def ship(**sources):
    modules = {}
    for name, source in sources.items():
        name = name.replace("__", ".")
        package = any(other.replace("__", ".").startswith(name + ".") for other in sources)
        path = "/near/" + name.replace(".", "/") + ("/__init__.py" if package else ".py")
        digest = hashlib.sha256(source.encode()).hexdigest()
        fields = {"name": name, "source": source if missing([digest]) else None, "path": path}
        modules[name] = ShippedModule.from_wire({**fields, "is_package": package, "digest": digest})
    install(modules)
    return modules
install({})
result = None
"""


def far(program: str) -> Any:
    code = FAR + textwrap.dedent(program) + "\nprint(json.dumps(result))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_shipped_modules_are_imported_by_name_and_packages_too() -> None:
    result = far("""
        sub = "from .deep import y\\nx = y + 1"
        ship(pkg="from . import sub", pkg__sub=sub, pkg__deep="y = 1", solo="import pkg.sub as s")
        import solo, pkg.sub
        result = [solo.s.x, pkg.sub.__file__, pkg.__path__, pkg.sub is solo.s, pkg.sub.__spec__.origin]
    """)
    assert result == [2, "/near/pkg/sub.py", [], True, "/near/pkg/sub.py"]


def test_an_edited_module_and_what_imports_it_run_anew_and_the_rest_stays_warm() -> None:
    result = far("""
        first = {"base": "x = 1", "user": "from base import x", "apart": "import itertools\\nc = itertools.count()"}
        ship(**first)
        import base, user, apart
        old = base, user, apart
        ship(**first)
        import base, user, apart
        result = [(base, user, apart) == old]
        ship(**{**first, "base": "x = 2"})
        import base, user, apart
        result += [user.x, base is old[0], user is old[1], apart is old[2]]
        ship(**first)
        import base, user, apart
        result += [user.x, (base, user, apart) == old]
    """)
    assert result == [True, 2, False, False, True, 1, True]


def test_two_clients_with_their_own_versions_take_turns() -> None:
    result = far("""
        result = []
        for turn in range(3):
            for client in (1, 2):
                b = "import pkg.a as a\\nfrom pkg import a as again"
                ship(pkg="", pkg__a=f"loads = []\\nwho = {client}", pkg__b=b)
                import pkg.b, pkg.a as alias
                alias.loads.append(turn)
                result.append([pkg.b.a.who, pkg.b.again.who, alias.who, len(alias.loads)])
    """)
    assert result == [[client] * 3 + [turn + 1] for turn in range(3) for client in (1, 2)]


def test_a_call_sees_only_what_it_ships() -> None:
    result = far("""
        ship(one="x = 1", pkg="", pkg__a="")
        import one, pkg.a
        ship(two="x = 2", pkg="", pkg__b="")
        result = []
        for name in ("one", "pkg.a", "pkg.b", "two"):
            try: __import__(name); result.append("found")
            except ModuleNotFoundError as error: result.append(str(error))
        import pkg
        result.append(hasattr(pkg, "a"))
    """)
    assert result == ["No module named 'one'", "No module named 'pkg.a'", "found", "found", False]


def test_an_installed_copy_gives_way_and_comes_back(tmp_path: Path) -> None:
    write(tmp_path, {"lib/__init__.py": "x = 'installed'", "lib/sub.py": ""})
    result = far(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import lib.sub
        installed = lib
        ship(lib="x = 'shipped'", lib__new="")
        import lib.new
        result = [lib.x, "lib.sub" in sys.modules]
        install({{}})
        import lib.sub
        result += [lib.x, lib is installed]
    """)
    assert result == ["shipped", False, "installed", True]


def test_the_installed_techniques_package_gives_way_to_the_clients() -> None:
    result = far("""
        ship(techniques="", techniques__lens="x = 'edited'")
        import techniques.lens
        result = techniques.lens.x
    """)
    assert result == "edited"


def test_the_workers_own_modules_cannot_be_taken_away() -> None:
    result = far("""
        try: ship(json="x = 1")
        except Exception as error: result = [type(error).__name__, str(error), json.dumps(1)]
    """)
    assert result[0] == "ShipError"
    assert "the worker itself uses. Rename the file." in result[1]


def test_sources_are_sent_once_and_checked() -> None:
    result = far("""
        module = ship(a="x = 1")["a"]
        result = [missing([module.digest, "0" * 64, "0" * 64]), ship(a="x = 1")["a"].source]
        for source, digest in ((None, "1" * 64), ("x = 2", "2" * 64)):
            try: install({"a": ShippedModule("a", source, "/a.py", False, digest)})
            except Exception as error: result.append(str(error))
        import a
        result.append(a.x)
    """)
    assert result[:2] == [["0" * 64], None]
    assert "came without its source" in result[2]
    assert "does not match its digest" in result[3]
    assert result[4] == 1, "a refused set leaves the one before it"


def test_tracebacks_and_inspect_quote_the_shipped_version() -> None:
    result = far("""
        import inspect
        result = []
        for word in ("first", "second"):
            ship(tool=f"def f():\\n    raise ValueError('{word}')  # line two")
            import tool
            try: tool.f()
            except ValueError: result.append([traceback.format_exc(), inspect.getsource(tool.f)])
        ship(tool="x = 1\\nx = = 2")
        try: import tool
        except SyntaxError as error: result.append([error.filename, error.lineno])
    """)
    for word, (text, source) in zip(("first", "second"), result, strict=False):
        assert f"File \"/near/tool.py\", line 2, in f\n    raise ValueError('{word}')  # line two" in text
        assert f"raise ValueError('{word}')" in source
    assert result[2] == ["/near/tool.py", 2]


def test_a_module_that_fails_to_import_is_tried_again_and_may_be_corrected() -> None:
    result = far("""
        result = []
        for source in ("raise RuntimeError('no')", "raise RuntimeError('no')", "x = 1"):
            ship(a="import b", b=source)
            try: import a; result.append(a.b.x)
            except RuntimeError as error: result.append(str(error))
    """)
    assert result == ["no", "no", 1]


def test_many_edits_keep_few_versions() -> None:
    result = far("""
        import gc, weakref
        alive = []
        for number in range(40):
            ship(a="import b", b=f"x = {number}")
            import a
            alive += [weakref.ref(a), weakref.ref(a.b)]
        del a
        gc.collect()
        result = sum(ref() is not None for ref in alive)
    """)
    assert 2 <= result <= 2 * 10


def test_collected_modules_run_on_the_far_side(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"helpers.py": "from pkg.sub import x", "pkg/__init__.py": "", "pkg/sub.py": "x = 5", "space/p.py": "y = 6"},
    )
    found = collect_modules(["helpers", "space.p"], search=[tmp_path])
    wire = [module.to_wire(with_source=True) for module in found.values()]
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    result = far(f"""
        fields = json.loads({json.dumps(wire)!r})
        install({{f["name"]: ShippedModule.from_wire(f) for f in fields}})
        import helpers, space.p
        result = [helpers.x, space.p.y, helpers.__file__]
    """)
    assert result == [5, 6, str(tmp_path / "helpers.py")]
    assert all(module.to_wire(with_source=False)["source"] is None for module in found.values())
