"""Attribution patching of all heads beside TransformerLens, at the shape of gpt2-small with random weights.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.techniques.attribution [--layers 12] [--rounds 7]

With transformer-lens 3.9 the peer is the recipe that its demo notebook made known, without the head results that heads'
z do not need; with 4.3 it is its `attribution_patch`. The two need environments of their own, so run this in each.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Figure, Section, interleaved, median, scaled

OURS, FLOOR = "ours", "two forwards and one backward"
ANSWER, WRONG, LENGTH = 262, 290, 16


def main() -> None:
    """Measure and print; exit with 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    section = measure(options.layers, options.rounds)
    print(section.text())
    raise SystemExit(not all(figure.holds for figure in section.figures))


def measure(n_layers: int, rounds: int) -> Section:
    """Time ours, the floor and the peer in turn, once all scores agree."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=n_layers))
    model.eval()
    clean, corrupted = torch.randint(0, model.config.vocab_size, (2, 1, LENGTH))
    is_old = version("transformer-lens").startswith("3.")
    peer = f"TransformerLens {version('transformer-lens')}, {'recipe' if is_old else 'attribution_patch'}"
    run_peer = hooked_recipe(model, clean, corrupted) if is_old else bridge_call(model, clean, corrupted)
    contenders: dict[str, Callable[[], Any]] = {
        OURS: ours(model, clean, corrupted),
        FLOOR: lambda: floor(model, clean, corrupted),
        peer: run_peer,
    }
    gap = (contenders[OURS]() - run_peer()).abs().max().item()
    if gap > 1e-5:
        raise RuntimeError(f"The peer's scores differ from ours by up to {gap:.3g} nats.")
    samples = interleaved(contenders, rounds)
    own = median(samples[OURS])
    return Section(
        f"Attribution patching, {n_layers * model.config.n_head} heads",
        f"One pair of {LENGTH} tokens. Ours is the whole call, from text to rows with intervals. The floor is plain "
        "transformers with frozen weights and nothing recorded. Scores agree to 1e-5 nats before anything is timed.",
        "ms",
        scaled(samples, 1e3),
        [
            Figure(f"{peer} / ours", median(samples[peer]) / own, 5 if is_old else 1, "times", at_least=True),
            Figure("ours / floor", own / median(samples[FLOOR]), 1.25, "times"),
        ],
    )


def ours(model: Any, clean: Tensor, corrupted: Tensor) -> Callable[[], Tensor]:
    """The public function on text."""
    from techniques.attribution import attribution_patching

    tokenizer = words(model.config.vocab_size)
    texts = [" ".join(f"t{i}" for i in ids[0].tolist()) for ids in (clean, corrupted)]
    pairs, answers = [(texts[0], texts[1])], [(f"t{ANSWER}", f"t{WRONG}")]

    def run() -> Tensor:
        found = attribution_patching(model, tokenizer, pairs, answers, sites=["z"], verify=0, min_gap=-1e9)
        return torch.tensor([row["score"] for row in found["rows"]])

    return run


def words(n: int) -> Any:
    """A tokenizer of n words, t0 to the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer)


def logit_diff(logits: Tensor) -> Tensor:
    """The metric, of one run."""
    return logits[0, -1, ANSWER] - logits[0, -1, WRONG]


def floor(model: Any, clean: Tensor, corrupted: Tensor) -> None:
    """What no method of this kind can do without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    with torch.no_grad():
        model(clean, use_cache=False, logits_to_keep=1)
        start = model.get_input_embeddings()(corrupted)
    start.requires_grad_(True)
    logits = model(inputs_embeds=start, use_cache=False, logits_to_keep=1).logits
    torch.autograd.grad(logit_diff(logits), start)
    for parameter in trainable:
        parameter.requires_grad_(True)


def hooked_recipe(model: Any, clean: Tensor, corrupted: Tensor) -> Callable[[], Tensor]:
    """Cache the clean run; cache the corrupted run and its gradients, at every hook; multiply the heads' values."""
    from tests.techniques.oracles.record_attribution import hooked

    lens: Any = hooked(model, fold_ln=False)
    n_layers = model.config.n_layer

    def run() -> Tensor:
        lens.reset_hooks()
        values: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}

        def keep(into: dict[str, Tensor]) -> Callable[[Tensor, Any], None]:
            def hook_fn(value: Tensor, hook: Any) -> None:
                into[hook.name] = value.detach()

            return hook_fn

        def wanted(name: str) -> bool:
            return not name.endswith(("_input", "hook_attn_in", "hook_mlp_in", "hook_result"))

        _, cache = lens.run_with_cache(clean)
        lens.add_hook(wanted, keep(values), "fwd")
        lens.add_hook(wanted, keep(gradients), "bwd")
        torch.autograd.backward(logit_diff(lens(corrupted)))
        lens.reset_hooks()
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
        return torch.cat([((cache[name] - values[name]) * gradients[name]).sum((0, 1, 3)) for name in names])

    return run


def bridge_call(model: Any, clean: Tensor, corrupted: Tensor) -> Callable[[], Tensor]:
    """TransformerLens 4.3's function, which scores MLPs and the embedding as well."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import (
        attribution_patch,
    )

    from benchmarks.techniques.sweeps import stand_in

    model = copy.deepcopy(model)
    model.config.architectures = ["GPT2LMHeadModel"]
    bridge: Any = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=stand_in(model))

    def run() -> Tensor:
        result = attribution_patch(bridge, clean, corrupted, logit_diff)
        heads: dict[tuple[int, int], float] = {}
        for node, score in result.node_scores.items():
            if node.head is not None:
                heads[node.layer, node.head] = heads.get((node.layer, node.head), 0.0) + float(score)
        return torch.tensor([heads[at] for at in sorted(heads)])

    return run


if __name__ == "__main__":
    main()
