"""Extract activations: what a model computes at chosen points of its layers, one vector per text.

All layers come from one forward pass, which ends after the last layer that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._activations import MAX_TOKENS, Layers, Position, ReadText, activations_at, points_of, read_at
from techniques._results import ArrayFile, Header, check_file, header, save_arrays


class Activations(Header):
    """Result of `extract`.

    Attributes:
        site: Where in a block, in TransformerLens' words.
        layers: The layers, in the order of the columns of the array.
        texts: Where each text was read, in the order of the rows.
        shape: [texts, layers, ...size of the site].
        activations: The array as a torch tensor, float32 on the CPU; None where it was saved. Alone among the results
            of techniques it is no JSON: give `save` where the result has to be.
        file: The array in a file, under the name "activations"; None where it was not saved.
    """

    site: str
    layers: list[int]
    texts: list[ReadText]
    shape: list[int]
    activations: Float[Tensor, "n layers *size"] | None
    file: ArrayFile | None


def extract(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    layers: Layers = "all",
    site: str = "resid_post",
    position: Position = "last",
    max_tokens: int = MAX_TOKENS,
    save: str | Path | None = None,
) -> Activations:
    """Extract the activations of texts at any site of any layers, all layers in one pass.

    Args:
        model: A decoder-only Hugging Face model in eval mode, on any devices, in any dtype, PEFT adapters included.
        tokenizer: Its tokenizer; it adds special tokens as it does by default.
        texts: The texts, of any lengths.
        layers: Layers from 0, in any order, or "all", which is the one layer of a `site` that has it in its full name.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, mlp_pre or mlp_post; or a full
            name, as blocks.3.attn.hook_z.
        position: Which token to read. "last"; "mean", over all tokens; an index, negative from the end; any other text
            is sought in each of the texts and read at its last token. A list gives one index, text or (start, stop) per
            text; a range is averaged.
        max_tokens: Most tokens of one batch; texts of like length share one.
        save: A safetensors file to write the array to, instead of returning it. Only with it is the result JSON-able.

    Returns:
        One row per text and one column per layer, in float32 on the CPU, whatever the model's dtype.

    Raises:
        UnsupportedModelError: The model is built in a way that is not known, or lacks the site.
        ValueError: The model is in train mode; a text is empty or too long; a position, span, layer or site does not
            exist; an activation is infinite or not a number; `save` is a folder.
        MemoryError: A text does not fit the memory even in a batch of its own.

    Misleads: The last token of two texts may differ, and then so do their activations, whatever the texts mean. A mean
    over all tokens includes a beginning-of-text token where the tokenizer adds one, and its norm can outweigh the rest.

    Cost: 1 forward per text up to the last layer asked for; about 0.1 s for 100 short texts on the demo model.

    Example:
        texts = ["The Eiffel Tower is located in", "The Tower Bridge is located in"]
        spans = ["Eiffel Tower", "Tower Bridge"]
        extract(model, tokenizer, texts, position=spans, save="activations.safetensors")
    """
    check_file(save)
    reading = read_at(model, tokenizer, texts, position)
    points = points_of(model, site, layers)
    found = activations_at(model, reading, points, max_tokens)
    file = save_arrays(save, {"activations": found}, {"site": site}) if save is not None else None
    return Activations(
        **header(model, "extract", n=len(reading.texts)),
        site=points[0].site,
        layers=[point.layer for point in points],
        texts=reading.rows(tokenizer),
        shape=list(found.shape),
        activations=found if file is None else None,
        file=file,
    )
