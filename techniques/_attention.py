"""What the attention techniques share: intervals, choices of heads, and cutting edges in a running model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from techniques._model import UnsupportedModelError, find_decoder
from techniques._results import number
from techniques._stats import mean_interval
from techniques._tokens import whole_numbers

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Score(TypedDict):
    """A mean over the sample with its 95 % bootstrap interval."""

    mean: float | None
    low: float | None
    high: float | None


def score(values: Float[Tensor, " n"], seed: int) -> Score:
    """The mean of values and its interval."""
    mean, low, high = (number(value) for value in mean_interval(values, seed))
    return Score(mean=mean, low=low, high=high)


def choose(name: str, given: int | Sequence[int] | None, n: int) -> list[int]:
    """The layers or heads that were asked for; None asks for all.

    Raises:
        ValueError: One does not exist, or none is left.
    """
    if given is None:
        return list(range(n))
    chosen = whole_numbers(f"{name}s", given)
    unknown = [i for i in chosen if not 0 <= i < n]
    if unknown or not chosen:
        raise ValueError(
            f"{name}s is {chosen}; expected some of 0 to {n - 1}, as the model has {n} {name}s"
            f"{' in each layer' if name == 'head' else ''}. Leave it out to take all."
        )
    return chosen


@contextmanager
def knocked_out(
    model: PreTrainedModel,
    cuts: Mapping[int, Bool[Tensor, "batch heads query key"]],
    prompts: Sequence[int] | None = None,
) -> Iterator[None]:
    """Let queries not see keys, in every forward pass of whole sequences inside.

    The other keys share what the cut ones had, as the softmax runs over them alone. Any attention that takes a mask
    obeys: the kernel is not changed.

    Args:
        model: A decoder-only Hugging Face model.
        cuts: By layer, where a score is masked; one head stands for all of them.
        prompts: What an error message calls the rows of the batch; their own numbers if None.

    Raises:
        ValueError: A query has no key left.
        UnsupportedModelError: A layer's attention takes no mask of [batch heads query key].
        RuntimeError: No pass ran through a layer, although the block ended without an error.
    """
    kernel = str(getattr(model.config, "_attn_implementation", ""))
    if "flash" in kernel:
        raise UnsupportedModelError(
            f"The model runs {kernel}, which takes no mask by query and key; expected sdpa or eager attention. "
            "Load the model with attn_implementation='sdpa'."
        )
    layers = find_decoder(model).layers
    fired: set[int] = set()
    with ExitStack() as hooks:
        for layer, cut in cuts.items():
            attn = layers[layer].attn
            if attn is None:
                raise UnsupportedModelError(f"Layer {layer} of {type(model).__name__} has no attention to cut.")
            cutter = _cutter(layer, cut, range(len(cut)) if prompts is None else prompts, fired)
            hooks.callback(attn.register_forward_pre_hook(cutter, with_kwargs=True).remove)
        yield
    if missed := sorted(cuts.keys() - fired):
        raise RuntimeError(f"Layer {missed[0]} never ran; expected a forward pass. Run the model inside the block.")


def _cutter(layer: int, cut: Bool[Tensor, "batch heads query key"], prompts: Sequence[int], fired: set[int]) -> Hook:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" not in kwargs:
            raise UnsupportedModelError(
                f"{type(module).__name__} takes no attention mask by name; expected it as transformers builds it."
            )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        fired.add(layer)
        return args, {**kwargs, "attention_mask": _masked(kwargs["attention_mask"], cut, layer, prompts, hidden)}

    return hook


def _masked(
    mask: Any, cut: Bool[Tensor, "batch heads query key"], layer: int, prompts: Sequence[int], hidden: Tensor
) -> Tensor:
    """The mask with the cut scores masked too, in the mask's own convention."""
    floor = torch.finfo(hidden.dtype).min
    if mask is None:  # causal, by the kernel's own doing; a sum works for every kernel
        size = cut.shape[-1]
        mask = torch.full((size, size), floor, dtype=hidden.dtype, device=hidden.device).triu(1)[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != cut.shape[-2:]:
        found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        raise UnsupportedModelError(
            f"Attention of layer {layer} has a mask {found}; expected [batch heads query key] with {cut.shape[-1]} "
            "positions. Load the model with attn_implementation='sdpa' and run it without a cache."
        )
    cut = cut.to(mask.device)
    # The first query always sees itself, which tells whether True means "sees" or "is masked" (as in MPT).
    sees = mask == mask[..., :1, :1] if mask.dtype == torch.bool else mask > floor / 2
    left = sees & ~cut
    empty = (sees.any(-1) & ~left.any(-1)).nonzero()
    if len(empty):
        row, _, query = empty[0].tolist()
        raise ValueError(
            f"All keys that position {query} of prompt {prompts[row]} sees in layer {layer} would be cut; expected at "
            "least one to be left. Leave the position itself, or the first token, as a key."
        )
    if mask.dtype == torch.bool:
        return torch.where(cut, ~mask[..., :1, :1], mask)
    return mask.masked_fill(cut, torch.finfo(mask.dtype).min)
