"""Plotly figures of technique results; no model is needed, so a stored result can be drawn again anywhere.

Text fits the width of a notebook. `figure.write_image("figure.png")` saves one as a picture (extra `png`).
"""

from techniques.plots.lens import plot_logit_lens, plot_token_probs

__all__ = ["plot_logit_lens", "plot_token_probs"]
