"""Makes techniques.md from the docstrings of `techniques/`, and the pictures in it from their examples.

    python -m docs.technique_pages

Every example runs on the demo model; where its result has a figure, the figure is the picture.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kernel import demo_model
from interp_kernel.catalogue import call, package_techniques, sections
from interp_kernel.sources import Technique
from techniques.plots import FIGURES, plot

HERE = Path(__file__).resolve().parent
PAGE = HERE / "techniques.md"
PICTURES = HERE / "techniques"
WIDTH, SCALE = 800, 2
COLOURS = 128
INTRODUCTION = """# Techniques

Plain functions of `(model, tokenizer, ...)` on plain Hugging Face models. Each runs in a script, in a `%%remote` cell,
or by `client.run(technique, ...)`, leaves the model as it found it, and returns JSON-able data (`extract` only with
`save=`) that `techniques.plots` draws without a model. Every result carries `technique, version, model, dtype, n, seed,
warnings`. The examples run on the demo model (`interp_kernel.demo_model.path()`) as they stand; the pictures are
theirs.

Made from the docstrings by `python -m docs.technique_pages`.
"""


def main() -> None:
    """Write the page and its pictures beside this file."""
    techniques = package_techniques()
    model, tokenizer = load_demo()
    PICTURES.mkdir(exist_ok=True)
    for technique in techniques:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            figure = figure_of(run_example(technique, model=model, tokenizer=tokenizer))
        if figure is not None:
            write_picture(figure, PICTURES / f"{technique.name}.png")
        print(technique.name, "" if figure is not None else "(no figure)", file=sys.stderr)
    PAGE.write_text(page(techniques))


def write_picture(figure: Any, path: Path) -> None:
    """Draw a figure on white, with a palette of few colours, which a third of the bytes suffice for."""
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    drawn = Image.open(BytesIO(figure.to_image("png", width=WIDTH, scale=SCALE)))
    drawn.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def page(techniques: Sequence[Technique]) -> str:
    """The whole text; a chapter for each file."""
    by_file = [(path, list(of)) for path, of in groupby(sorted(techniques, key=lambda t: t.path), lambda t: t.path)]
    return "\n".join(
        [INTRODUCTION, *_contents(by_file), *(part for path, of in by_file for part in _chapter(path, of))]
    )


def example(technique: Technique) -> str:
    """The example's code, as a program that has `model` and `tokenizer`."""
    code = inspect.cleandoc("\n" + sections(technique.docstring)["Example"])
    code = re.sub(r"^```\w*\n|\n?```$", "", code)
    if code.startswith(">>>"):
        code = "\n".join(line[4:] for line in code.splitlines() if line.startswith((">>>", "...")))
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    is_imported = f"import {technique.name}" in code or technique.name not in names
    return code if is_imported else f"from {technique.module} import {technique.name}\n\n{code}"


def run_example(technique: Technique, **names: Any) -> Any:
    """Run the example and give what the technique returned in it, the last time if it is called more than once."""
    exec(compile(with_result(technique), f"<example of {technique.name}>", "exec"), names)
    return names["result"]


def with_result(technique: Technique) -> str:
    """The example's code, with what the technique returns bound to `result`."""
    return ast.unparse(ast.fix_missing_locations(_ToResult(technique.name).visit(ast.parse(example(technique)))))


class _ToResult(ast.NodeTransformer):
    """Writes `technique(...)` as `(result := technique(...))`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_it = isinstance(node.func, ast.Name) and node.func.id == self.name
        return ast.NamedExpr(ast.Name("result", ast.Store()), node) if is_it else node


def figure_of(result: Any) -> Any:
    """The figure of a result, or None if its technique has none."""
    return plot(result) if result["technique"] in FIGURES else None


def load_demo() -> tuple[Any, Any]:
    """The demo model and its tokenizer, in float32."""
    loader: Any = AutoModelForCausalLM
    tokenizers: Any = AutoTokenizer
    return loader.from_pretrained(demo_model.path()).float().eval(), tokenizers.from_pretrained(demo_model.path())


def _contents(by_file: list[tuple[Path, list[Technique]]]) -> Iterator[str]:
    for path, techniques in by_file:
        links = ", ".join(f"[{t.name}](#{t.name})" for t in techniques)
        yield f"- {path.stem.replace('_', ' ')}: {links}"
    yield ""


def _chapter(path: Path, techniques: list[Technique]) -> Iterator[str]:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    yield f"## {path.stem.replace('_', ' ').capitalize()}\n\n{docstring}\n"
    for technique in techniques:
        yield from _entry(technique)


def _entry(technique: Technique) -> Iterator[str]:
    found = sections(technique.docstring)
    yield f"### {technique.name}\n\n{found.pop('')}\n\n```python\n{call(technique)}\n```\n"
    code = example(technique)
    found.pop("Example")
    if (PICTURES / f"{technique.name}.png").is_file():
        yield f"![{technique.name} on the demo model](techniques/{technique.name}.png)\n"
    for heading, text in found.items():
        body = _items(text) if heading in ("Args", "Raises") else text
        yield f"**{heading}.** {body}\n" if body == text else f"**{heading}**\n\n{body}\n"
    yield f"```python\n{code}\n```\n"


def _items(text: str) -> str:
    """A docstring's `name: meaning` lines as a list."""
    return re.sub(r"^(\w+|\*+\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
