"""Plotly figures of technique results; no model is needed, so a stored result can be drawn again anywhere.

`plot(result)` chooses the figure by the technique that made the result. Text fits the width of a notebook, and colours
work on light and dark pages. `figure.write_image("figure.png")` saves one as a picture (extra `png`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from techniques.plots.attention import plot_attention_knockout, plot_attention_patterns, plot_head_scores
from techniques.plots.attribution import plot_attribution_patching, plot_direct_logit_attribution, plot_eap
from techniques.plots.circuits import plot_circuit_graph, plot_evaluate_circuit, plot_iterative_pruning
from techniques.plots.lens import plot_logit_diff_lens, plot_logit_lens, plot_token_probs
from techniques.plots.patching import (
    plot_ablation,
    plot_activation_patching,
    plot_causal_tracing,
    plot_causal_tracing_curves,
    plot_path_patching,
)
from techniques.plots.probes import (
    plot_concept_direction,
    plot_linear_probe,
    plot_persona_vector,
    plot_probe_transfer,
    plot_project,
)
from techniques.plots.sae import (
    plot_evaluate_sae,
    plot_feature_report,
    plot_sae_frontier,
    plot_steer_feature,
    plot_train_sae,
)
from techniques.plots.steering import plot_steering_sweep

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = [
    "plot",
    "plot_ablation",
    "plot_activation_patching",
    "plot_attention_knockout",
    "plot_attention_patterns",
    "plot_attribution_patching",
    "plot_causal_tracing",
    "plot_causal_tracing_curves",
    "plot_circuit_graph",
    "plot_concept_direction",
    "plot_direct_logit_attribution",
    "plot_eap",
    "plot_evaluate_circuit",
    "plot_evaluate_sae",
    "plot_feature_report",
    "plot_head_scores",
    "plot_iterative_pruning",
    "plot_linear_probe",
    "plot_logit_diff_lens",
    "plot_logit_lens",
    "plot_path_patching",
    "plot_persona_vector",
    "plot_probe_transfer",
    "plot_project",
    "plot_sae_frontier",
    "plot_steer_feature",
    "plot_steering_sweep",
    "plot_token_probs",
    "plot_train_sae",
]

FIGURES: Mapping[str, Callable[[Any], Figure]] = {
    "ablate": plot_ablation,
    "ablate_sweep": plot_ablation,
    "activation_patching": plot_activation_patching,
    "analyze_token_probs": plot_token_probs,
    "attention_knockout": plot_attention_knockout,
    "attention_patterns": plot_attention_patterns,
    "attribution_patching": plot_attribution_patching,
    "causal_tracing": plot_causal_tracing,
    "circuit_graph": plot_circuit_graph,
    "concept_direction": plot_concept_direction,
    "direct_logit_attribution": plot_direct_logit_attribution,
    "eap": plot_eap,
    "evaluate_circuit": plot_evaluate_circuit,
    "evaluate_sae": plot_evaluate_sae,
    "feature_report": plot_feature_report,
    "head_scores": plot_head_scores,
    "iterative_pruning": plot_iterative_pruning,
    "linear_probe": plot_linear_probe,
    "logit_diff_lens": plot_logit_diff_lens,
    "logit_lens": plot_logit_lens,
    "path_patching": plot_path_patching,
    "persona_vector": plot_persona_vector,
    "probe_transfer": plot_probe_transfer,
    "project": plot_project,
    "steer_feature": plot_steer_feature,
    "steering_sweep": plot_steering_sweep,
    "train_sae": plot_train_sae,
}


def plot(result: Mapping[str, Any]) -> Figure:
    """Draw a technique's result.

    Args:
        result: What the technique returned, or the same read back from JSON.

    Raises:
        TypeError: It is no result.
        ValueError: Its technique has no figure.
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"plot() was given {result!r:.80}; expected what a technique returned, a dict.")
    name = str(result.get("technique"))
    if name not in FIGURES:
        raise ValueError(f"The result is of {name!r}, which has no figure; those with one: {', '.join(FIGURES)}.")
    return FIGURES[name](result)
