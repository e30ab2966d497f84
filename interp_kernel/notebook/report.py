"""An executed notebook as one HTML file that shows its figures without a server or a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interp_kernel.cell import REMOTE_CELL
from interp_kernel.notebook.files import replace

PLOTLY = "application/vnd.plotly.v1+json"
# nbconvert's own page waits for two scripts of a CDN before it shows anything. Only formulas need one of them.
PAGE = """{% extends "lab/index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% if "$" in nb.cells | selectattr("cell_type", "eq", "markdown") |
map(attribute="source") | join %}{{ super() }}{% endif %}{% endblock %}"""


def write_html(notebook: Path) -> Path:
    """Write the HTML beside the notebook, under the same name.

    plotly's figures are stored as data; the page gets plotly's code (4.8 MB) once, and only if there is a figure.
    """
    import nbformat
    from nbconvert import HTMLExporter

    nb = nbformat.read(notebook, as_version=4)
    figures = [
        output.data for cell in nb.cells for output in cell.get("outputs", []) if PLOTLY in output.get("data", {})
    ]
    for index, data in enumerate(figures):
        data["text/html"] = _figure_html(data.pop(PLOTLY), with_code=index == 0)
    for cell in nb.cells:
        if REMOTE_CELL.match(cell.source):
            cell.metadata["magics_language"] = "python"  # else pygments leaves the body of an unknown magic uncoloured
    exporter = HTMLExporter(template_name="lab", raw_template=PAGE)
    page, _ = exporter.from_notebook_node(nb, resources={"metadata": {"name": notebook.stem}})
    return replace(notebook.with_suffix(".html"), page)


def _figure_html(figure: dict[str, Any], *, with_code: bool) -> str:
    import plotly.io

    return str(
        plotly.io.to_html(
            {"data": figure.get("data", []), "layout": figure.get("layout", {})},
            config=figure.get("config"),
            include_plotlyjs=with_code,
            full_html=False,
            validate=False,
        )
    )
