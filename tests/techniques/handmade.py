"""GPT-2s whose weights are set by hand, so that the circuit behind every answer is known.

Features are coordinates: a feature is +1 in the first half of the residual stream and -1 at its twin in the second
half. So every vector has mean 0, and with a huge epsilon the layer norms are the identity: the residual stream is
read as it was written, and what isn't softmax or ReLU is exactly linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "plum")
N_POSITIONS = 12
EPSILON = 1e12
SHARPNESS = 30.0  # attention scores of a match; of anything else they are 0


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerBase:
    """Each word is the token of its index; no special tokens."""
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return cast(PreTrainedTokenizerBase, cast(Any, PreTrainedTokenizerFast)(tokenizer_object=vocabulary))


class Circuit:
    """A GPT-2 of zeros to which heads and MLP neurons are added one by one.

    Features of the residual stream, by name: `token` and `position` (what the embeddings write), `note` (a register for
    one token), `out` (what the unembedding reads). The logits are the coordinates of `out`.
    """

    def __init__(self, n_layers: int, n_heads: int = 2, n_words: int = len(WORDS)) -> None:
        names = {"token": n_words, "position": N_POSITIONS, "note": n_words, "out": n_words}
        half = sum(names.values())
        starts = [sum(list(names.values())[:i]) for i in range(len(names))]
        self.where = {name: slice(s, s + n) for (name, n), s in zip(names.items(), starts, strict=True)}
        self.half, self.n_words = half, n_words
        self.d_head = 2 * half // n_heads
        config = GPT2Config(
            vocab_size=n_words,
            n_positions=N_POSITIONS,
            n_layer=n_layers,
            n_head=n_heads,
            n_embd=2 * half,
            n_inner=n_words,
            activation_function="relu",
            layer_norm_epsilon=EPSILON,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model: GPT2LMHeadModel = cast(Any, GPT2LMHeadModel(config)).eval()
        self._clear()

    def _clear(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(EPSILON**0.5 if "ln_" in name and name.endswith("weight") else 0.0)
            body, head = self.model.transformer, self.model.lm_head
            self._write(body.wte.weight, torch.eye(self.n_words), "token")
            self._write(body.wpe.weight, torch.eye(N_POSITIONS), "position")
            head.weight[:, self.where["out"]] = torch.eye(self.n_words)

    def _write(self, rows: torch.Tensor, values: torch.Tensor, feature: str) -> None:
        """Let row i of a matrix that adds to the stream write `values[i]` to a feature and its twin."""
        at = self.where[feature]
        rows[:, at] += values
        rows[:, at.start + self.half : at.stop + self.half] -= values

    def head(
        self, layer: int, head: int, query: str, key: str, match: torch.Tensor, read: str, write: str, gain: float = 1.0
    ) -> Circuit:
        """Add a head: position q attends to k where query(q) @ match @ key(k) is 1, and copies read(k) to write.

        Args:
            layer: Its layer.
            head: Its index.
            query: Feature that the attending position shows.
            key: Feature that the attended position shows.
            match: [query, key], 1 where they match.
            read: Feature that is copied.
            write: Feature that it is added to.
            gain: Factor of what is written.
        """
        attn = cast(Any, self.model.transformer.h[layer]).attn
        d_model, start = 2 * self.half, head * self.d_head
        n_query, n_read = match.shape[0], self.where[read].stop - self.where[read].start
        with torch.no_grad():
            weight = attn.c_attn.weight  # [d_model, q | k | v], each of n_heads * d_head
            sharp = SHARPNESS * self.d_head**0.5
            weight[self.where[query], start : start + n_query] = torch.eye(n_query) * sharp
            weight[self.where[key], d_model + start : d_model + start + n_query] = match.T
            weight[self.where[read], 2 * d_model + start : 2 * d_model + start + n_read] = torch.eye(n_read)
            self._write(attn.c_proj.weight[start : start + n_read], gain * torch.eye(n_read), write)
        return self

    def facts(self, layer: int, read: str, answers: Sequence[int], gain: float = 1.0) -> Circuit:
        """Add an MLP whose neuron i fires on word i in feature `read` and writes word `answers[i]` to `out`."""
        mlp = cast(Any, self.model.transformer.h[layer]).mlp
        with torch.no_grad():
            mlp.c_fc.weight[self.where[read]] = 2 * torch.eye(self.n_words)
            mlp.c_fc.bias.fill_(-1.0)  # ReLU(2 x - 1): 1 where the word is there, else 0
            facts = torch.zeros(self.n_words, self.n_words)
            facts[torch.arange(self.n_words), torch.tensor(answers)] = gain
            self._write(mlp.c_proj.weight, facts, "out")
        return self


def look_at(position: int) -> torch.Tensor:
    """Match for a head that looks at one position from everywhere: [query position, key position]."""
    match = torch.zeros(N_POSITIONS, N_POSITIONS)
    match[:, position] = 1
    return match


def look_back() -> torch.Tensor:
    """Match for a previous-token head; position 0 has only itself to look at."""
    return torch.diag(torch.ones(N_POSITIONS - 1), -1)


def induction() -> GPT2LMHeadModel:
    """Head 0.0 notes the previous token; head 1.0 looks for a position whose note is the present token and copies it.

    So after `a b ... a` the answer is b; not for a word at position 0, which is noted as its own predecessor. Heads 0.1
    and 1.1 and both MLPs write nothing.
    """
    circuit = Circuit(n_layers=2)
    circuit.head(0, 0, "position", "position", look_back(), read="token", write="note")
    circuit.head(1, 0, "token", "note", torch.eye(circuit.n_words), read="token", write="out", gain=5.0)
    return circuit.model


def copies(shares: Sequence[tuple[int, int, float]], position: int = 1, n_layers: int = 2) -> GPT2LMHeadModel:
    """Heads (layer, head, gain) that each copy the token at `position` to the output: the answer is that token.

    The model is linear in what its heads write, so each head's effect is its gain's share.
    """
    circuit = Circuit(n_layers)
    for layer, head, gain in shares:
        circuit.head(layer, head, "position", "position", look_at(position), read="token", write="out", gain=gain)
    return circuit.model


def looked_up_facts(answers: Sequence[int], position: int = 1) -> GPT2LMHeadModel:
    """Head 0.0 fetches the token at `position` into the note, and the MLP of layer 1 writes the fact about it."""
    circuit = Circuit(n_layers=2)
    circuit.head(0, 0, "position", "position", look_at(position), read="token", write="note")
    circuit.facts(1, "note", answers, gain=5.0)
    return circuit.model
