"""Where the parts of a Hugging Face decoder are: the only file in `techniques` that knows how models are built.

Parts are found by structure, not by a table of architectures, and every technique that relies on them checks the
outcome against the model at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._tokens import Batch, check_finite


class UnsupportedModelError(ValueError):
    """The model lacks a part that a technique needs, or does more with it than the technique knows."""


@dataclass(frozen=True)
class Decoder:
    """The modules that the residual stream passes through, in order.

    Attributes:
        blocks: n_layers of them; the input of `blocks[layer]` is resid_pre of that layer.
        ln_final: The final norm; its input is resid_post of the last layer.
        unembed: [..., d_model] -> [..., d_vocab].
        soft_cap: The model squashes its logits into (-soft_cap, soft_cap), as Gemma 2 does; None if it does not.
    """

    blocks: nn.ModuleList
    ln_final: nn.Module
    unembed: nn.Module
    soft_cap: float | None

    def logits(self, resid: Float[Tensor, "*points d_model"]) -> Float[Tensor, "*points d_vocab"]:
        """Decode a point of the residual stream as the model decodes its last one; keeps the dtype."""
        logits: Tensor = self.unembed(self.ln_final(resid))
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the blocks, the final norm and the unembedding of a decoder-only model, also under a PEFT adapter.

    The residual stream starts at the token embedding, so the blocks are the list of `num_hidden_layers` modules that
    lies beside it, and the final norm is the last norm beside them: the embedding may have one of its own before.

    Raises:
        UnsupportedModelError: The model is no decoder with a language-model head, or is built in another way.
    """
    config = model.config.get_text_config(decoder=True)
    embedding, unembed = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if unembed is not None:
        for parent in model.modules():
            children = dict(parent.named_children())
            if any(child is embedding for child in children.values()):
                blocks = _blocks(children, config.num_hidden_layers)
                ln_final = _final_norm(children)
                if blocks is not None and ln_final is not None:
                    return Decoder(blocks, ln_final, unembed, getattr(config, "final_logit_softcapping", None))
    raise UnsupportedModelError(
        f"{type(model).__name__} has no token embedding beside a list of {config.num_hidden_layers} blocks and a final "
        "norm, with an unembedding. A decoder-only language model was expected; load one with AutoModelForCausalLM."
    )


def _blocks(children: dict[str, nn.Module], n_layers: int) -> nn.ModuleList | None:
    lists = (child for child in children.values() if isinstance(child, nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == n_layers), None)


def _final_norm(children: dict[str, nn.Module]) -> nn.Module | None:
    # The attribute's name counts too: PEFT may have wrapped the norm in a class that is not called one.
    named = {name: f"{name} {type(child).__name__}".lower() for name, child in children.items()}
    norms = [name for name, text in named.items() if "norm" in text or "ln_" in text]
    return children[norms[-1]] if norms else None


@contextmanager
def record_inputs(modules: Iterable[nn.Module], keep: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Record `keep(hidden states)` at each call of `modules`, in the order in which they run, until the block ends."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(keep(args[0] if args else kwargs["hidden_states"]))

    with ExitStack() as hooks:  # removes the hooks already placed even if placing a later one fails
        for module in dict.fromkeys(modules):  # a block that stands at two depths needs one hook, as it runs twice
            hooks.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield seen


def logits_at(
    model: PreTrainedModel, batch: Batch, rows: Int[Tensor, " points"], positions: Int[Tensor, " points"]
) -> Float[Tensor, "points d_vocab"]:
    """Run the model once and return its own logits at `(rows[i], positions[i])`, in its dtype and on its device.

    The unembedding runs at those positions alone where the model allows it, since logits at all positions of a long
    prompt can need more memory than the model.

    Raises:
        ValueError: A logit is infinite or not a number.
    """
    kept, columns = torch.unique(positions, return_inverse=True)  # kept is sorted; positions == kept[columns]
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model  # below PEFT's wrapper
    can_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
    limit = {"logits_to_keep": kept.to(batch.input_ids.device)} if can_keep else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **limit)
    logits: Tensor = output.logits[rows, columns if can_keep else positions]
    check_finite(logits)
    return logits
