"""Activations for sparse autoencoders: read from a model or a file, token by token, shuffled within a memory budget."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from techniques._batches import in_batches, length_batches
from techniques._hooks import HookPoint, check_sites, hook_point, record, run
from techniques._results import ArrayFile
from techniques._sae import SAE, load_sae
from techniques._tokens import check_context, encode, pad

MAX_TOKENS = 4096  # of one forward pass, padding included
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Corpus:
    """Encoded texts, and which of their tokens count: those that the tokenizer does not call special."""

    texts: list[str]
    ids: list[list[int]]
    kept: list[list[int]]

    @property
    def n_tokens(self) -> int:
        """Number of tokens that count."""
        return sum(len(row) for row in self.kept)


def read_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Corpus:
    """Encode texts for a model in eval mode.

    Raises:
        ValueError: The model is in train mode, there is no text, one is empty or too long, or no token is left once
            the special ones are taken out.
    """
    check_sites(model)
    ids = encode(tokenizer, texts)
    check_context(model, ids)
    special = set(tokenizer.all_special_ids)
    kept = [[i for i, token in enumerate(row) if token not in special] for row in ids]
    if not any(kept):
        raise ValueError(
            f"All tokens of the {len(ids)} texts are special tokens, which are left out; expected others. "
            "Give texts with words in them."
        )
    return Corpus(list(texts), ids, kept)


def activations(
    model: PreTrainedModel, corpus: Corpus, point: HookPoint, which: Sequence[int]
) -> list[Float[Tensor, "kept d_in"]]:
    """What the model computes at a point, at each of the chosen texts' tokens that count; heads lie side by side.

    Raises:
        MemoryError: A single text does not fit in memory.
        ValueError: An activation is infinite or not a number.
    """
    lengths = [len(corpus.ids[i]) for i in which]
    return in_batches(lengths, MAX_TOKENS, lambda batch: _read(model, corpus, point, [which[i] for i in batch]))


def locate(model: PreTrainedModel, sae: SAE | str | Path) -> tuple[SAE, HookPoint]:
    """An SAE, loaded if it is given as a folder, on the device where its activations are; and where that is.

    Raises:
        FileNotFoundError: The folder holds no SAE.
        ValueError: The model is in train mode, the SAE does not say where it belongs, or the model's activations there
            have another width.
    """
    check_sites(model)
    sae = sae if isinstance(sae, SAE) else load_sae(sae)
    name = sae.metadata.get("hook_name")
    if not name:
        raise ValueError(
            "The SAE's metadata has no hook_name; expected where it belongs, such as 'blocks.5.hook_resid_post'. "
            "Write it into cfg.json under metadata."
        )
    point = hook_point(str(name))
    with torch.no_grad(), record(model, [point]) as seen:
        run(model, pad([[0]], "right", 0, model.device), stop_after=point.layer)
    value = seen[point].flatten(2)
    if value.shape[-1] != sae.d_in:
        raise ValueError(
            f"The SAE takes {sae.d_in} numbers per token, but {point} of this model has {value.shape[-1]}; expected "
            "the same. Give the model that the SAE was trained on."
        )
    return sae.to(value.device), point


@torch.no_grad()
def _read(model: PreTrainedModel, corpus: Corpus, point: HookPoint, which: list[int]) -> list[Tensor]:
    batch = pad([corpus.ids[i] for i in which], "right", 0, model.device)
    with record(model, [point]) as seen:
        run(model, batch, stop_after=point.layer)
    found = seen[point].flatten(2)
    rows = [found[row, corpus.kept[i]] for row, i in enumerate(which)]
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ValueError(
            f"The activations at {point} are not all finite in {found.dtype}; expected numbers. "
            "Load the model in bfloat16 or float32, or check its weights."
        )
    return rows


def model_pass(
    model: PreTrainedModel, corpus: Corpus, point: HookPoint, generator: torch.Generator
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """All activations of the corpus once, in batches of texts of like length, the batches in random order."""
    batches = list(length_batches([len(row) for row in corpus.ids], MAX_TOKENS))
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield torch.cat(activations(model, corpus, point, batches[i]))


def file_pass(path: str | Path, generator: torch.Generator) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """All activations of a file once, in stretches of MAX_TOKENS tokens, the stretches in random order."""
    with safe_open(path, framework="pt") as file:
        rows = file.get_slice("activations")
        starts = list(range(0, rows.get_shape()[0], MAX_TOKENS))
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield rows[starts[i] : starts[i] + MAX_TOKENS]


def shuffled(
    one_pass: Callable[[], Iterator[Float[Tensor, "tokens d_in"]]],
    batch_size: int,
    buffer_bytes: int,
    generator: torch.Generator,
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Batches of tokens in random order, in float32, without end.

    About `buffer_bytes` of activations are held, at least two batches. Data that fit are read once. Of larger data a
    full, shuffled store is served by half and filled up again, so that tokens of one text are spread over many batches.
    """
    source = one_pass()
    first = next(source).float()
    capacity = max(buffer_bytes // (4 * first.shape[1]), 2 * batch_size)
    store, is_whole = _filled(source, [first], capacity)
    while True:
        order = torch.randperm(len(store), generator=generator).to(store.device)
        served = len(store) if is_whole else len(store) // 2 // batch_size * batch_size
        for start in range(0, max(served - batch_size, 0) + 1, batch_size):
            yield store[order[start : start + batch_size]]
        while not is_whole and len(store) - served < capacity:
            store, ended = _filled(source, [store[order[served:]]], capacity)
            order, served = torch.arange(len(store), device=store.device), 0
            if ended:
                source = one_pass()


def _filled(source: Iterator[Tensor], parts: list[Tensor], capacity: int) -> tuple[Tensor, bool]:
    """The parts with what follows up to `capacity` tokens, and whether the source ended before that."""
    held = sum(len(part) for part in parts)
    while held < capacity:
        part = next(source, None)
        if part is None:
            return torch.cat(parts), True
        parts.append(part.float())
        held += len(part)
    return torch.cat(parts), False


def write_activations(path: str | Path, model: PreTrainedModel, corpus: Corpus, point: HookPoint) -> ArrayFile:
    """Write all activations to a safetensors file batch by batch, so that they never lie in memory together.

    It holds `activations` [tokens, d_in] in the model's dtype, and `text` and `position` [tokens], the index of the
    text and of the token in it; rows are in the order of the texts.
    """
    batches = list(length_batches([len(row) for row in corpus.ids], MAX_TOKENS))
    first = activations(model, corpus, point, batches[-1])  # the widest: what does not fit shows before a file exists
    dtype, d_in, width = first[0].dtype, first[0].shape[1], first[0].element_size() * first[0].shape[1]
    shapes = {"activations": [corpus.n_tokens, d_in], "text": [corpus.n_tokens], "position": [corpus.n_tokens]}
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        head = _safetensors_head(shapes, DTYPES[dtype], corpus.n_tokens * width)
        stream.write(head)
        starts = [0]
        for kept in corpus.kept:
            starts.append(starts[-1] + len(kept))
        for batch in batches:
            for i, rows in zip(batch, activations(model, corpus, point, batch), strict=True):
                stream.seek(len(head) + starts[i] * width)
                stream.write(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        stream.seek(len(head) + corpus.n_tokens * width)
        stream.write(struct.pack(f"<{corpus.n_tokens}i", *(i for i, kept in enumerate(corpus.kept) for _ in kept)))
        stream.write(struct.pack(f"<{corpus.n_tokens}i", *(position for kept in corpus.kept for position in kept)))
    with file.open("rb") as done:
        digest = hashlib.file_digest(done, "sha256").hexdigest()
    return ArrayFile(path=str(file), sha256=digest, shapes=shapes)


def _safetensors_head(shapes: dict[str, list[int]], dtype: str, n_bytes: int) -> bytes:
    """Length and JSON table of a file that holds the three arrays one after the other."""
    more = 4 * shapes["text"][0]
    ends = {
        "activations": (0, n_bytes),
        "text": (n_bytes, n_bytes + more),
        "position": (n_bytes + more, n_bytes + 2 * more),
    }
    table = {
        name: {"dtype": dtype if name == "activations" else "I32", "shape": shape, "data_offsets": list(ends[name])}
        for name, shape in shapes.items()
    }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
