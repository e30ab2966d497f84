"""Values at some pairs of a token and a feature, and the products with them that training an SAE needs."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Active(Protocol):
    """Values at some of a batch's (token, feature) pairs, and the three products that training needs."""

    values: Tensor

    def times(self, weights: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """The values times a row of weights for each feature."""

    def dots(self, rows: Float[Tensor, "batch d_in"], weights: Float[Tensor, "d_sae d_in"]) -> Tensor:
        """Inner product of token's row and feature's weights at each pair, in the shape of `values`."""

    def gathered(self, values: Tensor, rows: Float[Tensor, "batch d_in"]) -> Float[Tensor, "d_sae d_in"]:
        """For each feature, the tokens' rows summed with these values as weights."""

    def feature_sums(self, values: Tensor) -> Float[Tensor, " d_sae"]:
        """Sum of these values over the tokens."""

    def token_sums(self, values: Tensor) -> Float[Tensor, " batch"]:
        """Sum of these values over the features."""

    def by_feature(self, vector: Float[Tensor, " d_sae"]) -> Tensor:
        """A feature's number at each of its pairs."""

    def by_token(self, vector: Float[Tensor, " batch"]) -> Tensor:
        """A token's number at each of its pairs."""


class Dense:
    """`Active` at all pairs."""

    def __init__(self, values: Float[Tensor, "batch d_sae"]) -> None:
        self.values = values

    def times(self, weights: Tensor) -> Tensor:
        return self.values @ weights

    def dots(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows @ weights.T

    def gathered(self, values: Tensor, rows: Tensor) -> Tensor:
        return values.T @ rows

    def feature_sums(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def token_sums(self, values: Tensor) -> Tensor:
        return values.sum(1)

    def by_feature(self, vector: Tensor) -> Tensor:
        return vector

    def by_token(self, vector: Tensor) -> Tensor:
        return vector[:, None]


class Sparse:
    """`Active` at listed pairs, in the order of the tokens."""

    def __init__(
        self, tokens: Int[Tensor, " pairs"], features: Int[Tensor, " pairs"], values: Tensor, shape: torch.Size
    ):
        self.tokens, self.features, self.values, self.shape = tokens, features, values, shape
        self._starts = _row_starts(tokens, shape[0])
        self._order = torch.argsort(features, stable=True)
        self._feature_starts = _row_starts(features, shape[1])

    def times(self, weights: Tensor) -> Tensor:
        return self._matrix(self.values) @ weights

    def dots(self, rows: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = torch.sparse.sampled_addmm(self._matrix(self.values), rows, weights.T, beta=0.0)
        return found.values()

    def gathered(self, values: Tensor, rows: Tensor) -> Tensor:
        size = (self.shape[1], self.shape[0])
        turned = _csr(self._feature_starts, self.tokens[self._order], values[self._order], size)
        return turned @ rows

    def feature_sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape[1]).index_add_(0, self.features, values)

    def token_sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape[0]).index_add_(0, self.tokens, values)

    def by_feature(self, vector: Tensor) -> Tensor:
        return vector[self.features]

    def by_token(self, vector: Tensor) -> Tensor:
        return vector[self.tokens]

    def _matrix(self, values: Tensor) -> Tensor:
        return _csr(self._starts, self.features, values, tuple(self.shape))


def _row_starts(rows: Int[Tensor, " pairs"], n_rows: int) -> Int[Tensor, " n_rows_and_one"]:
    starts = rows.new_zeros(n_rows + 1)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=starts[1:])
    return starts


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def warm_up() -> None:
    """Make the first sparse matrix, of which torch warns once per process that they are beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _csr(torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), (1, 1))
