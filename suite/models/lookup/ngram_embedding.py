"""`ngram_embedding`: hashed n-grams at the input embedding.

Two published forms. Over-Encoding (arXiv 2501.16975, section 3) adds the rows of n-grams to the token's; LongCat
(arXiv 2601.21204, section 2) takes the mean of all terms and amplifies it, since the first attention output would
otherwise be about ten times as large. Where they are silent, the choice is ours, and the text states it.

The row of order n in a table of R rows is (x_0 + x_1 V + ... + x_(n-1) V^(n-1)) mod R, over the last n ids, the current
one first. R must be coprime with V: with a common factor g, n-grams that end in the same token share R / g rows.

Shapes: B rows, T tokens, D model width, N highest order, H = (N - 1) * tables per order, E = H * row width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from suite.models.attachments import Attachments
from suite.models.cost import Cost
from suite.models.distributions import Constant, Distribution, Normal
from suite.models.feedforward import SwiGLU
from suite.models.lookup.forms import NgramConfig
from suite.models.lookup.hashing import PolynomialHash
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.precision import at_least_fp32
from suite.models.registry import Family, Problem, register

NORM_EPS = 1e-5

Amplify = Literal["none", "scale", "norm"]

FORMS: dict[str, dict[str, Any]] = {
    "over_encoding": {"max_order": 3, "mean": False, "amplify": "none"},
    "longcat": {"max_order": 4, "mean": True, "amplify": "scale"},
}
"""Defaults of the options by form."""


class NgramEmbedding(MemoryLayer):
    """The token embedding and the projected rows of the n-grams that end at the token: their sum or mean, amplified.

    Args:
        table: The rows of all orders and tables.
        hashes: The addresses.
        dim: Model width.
        mean: Whether the sum is divided by the number of its terms, H + 1.
        amplify: "scale" multiplies by sqrt(D), "norm" is a LayerNorm.
    """

    matrices: ClassVar[tuple[str, ...]] = ("projection.weight",)

    def __init__(self, table: MemoryTable, hashes: PolynomialHash, dim: int, mean: bool, amplify: Amplify) -> None:
        super().__init__([table])
        self.hashes, self.dim, self.window = hashes, dim, hashes.orders
        terms = len(hashes.moduli) + 1
        self.factor = (1 / terms if mean else 1.0) * (math.sqrt(dim) if amplify == "scale" else 1.0)
        self.projection = nn.Linear(len(hashes.moduli) * table.weight.shape[1], dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS) if amplify == "norm" else None

    def forward(self, x_BTD: Tensor, ids_BTN: Tensor) -> Tensor:
        e_BTE = self.tables[0].concatenated(self.hashes(ids_BTN)).to(x_BTD.dtype)
        y_BTD = (x_BTD + self.projection(e_BTE)) * self.factor
        if self.norm is not None:
            y_BTD = self.norm(y_BTD.to(at_least_fp32(y_BTD.dtype)))
        return y_BTD.to(x_BTD.dtype)

    def addresses(self, ids_BTW: Tensor) -> Tensor:
        """Return the rows of the n-grams, one per bag, as `concatenated` reads them."""
        return self.hashes(ids_BTW).reshape(-1, 1)

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return a projection whose terms are each as large as the token embedding (our choice).

        Arguments as for `initial_weights.initialise`.
        """
        if name == "projection.weight":
            return Normal(self.dim**-0.5)
        return Constant(0.0 if name.endswith("bias") else 1.0)

    def extra_repr(self) -> str:
        """Return the settings that change no shape."""
        return f"factor={self.factor}"

    def cost(self) -> Cost:
        """Count the projection; one row is read from each table."""
        weights = self.projection.weight.numel()
        params = {"memory_projection": weights}
        if self.norm is not None:
            params["norm"] = 2 * self.dim
        rows_read = {"memory_values": self.projection.in_features}
        return Cost(params, params | rows_read, {"memory_projection": weights})


class NgramEmbeddingConfig(NgramConfig):
    """`ngram_embedding`: tables of n-grams at the input embedding."""

    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = FORMS

    form: Literal["over_encoding", "longcat"] = Field(
        default="over_encoding", description="published form that the options which are None take their values from"
    )
    table_rows: int = Field(
        default=4097,
        gt=1,
        description="rows of the first table, approximately; counts ascend in steps of two, without those that share a "
        "factor with the vocabulary",
    )
    order_tables: int = Field(default=4, gt=0, description="tables per order")
    mean: bool | None = Field(default=None, description="mean of all terms, not their sum; None: the form's")
    amplify: Amplify | None = Field(
        default=None, description="scale: times the root of the width; norm: a LayerNorm; None: the form's"
    )

    @property
    def rows_read(self) -> int:
        return (int(self.option("max_order")) - 1) * self.order_tables

    def moduli(self, vocab_size: int) -> list[int]:
        """Return the rows of every table: from `table_rows` in steps of two, coprime with the vocabulary."""
        counts = itertools.count(self.table_rows, 2)
        return list(itertools.islice((rows for rows in counts if math.gcd(rows, vocab_size) == 1), self.rows_read))

    def vocabulary_problems(self, vocab_size: int) -> list[Problem]:
        factor = math.gcd(self.table_rows, vocab_size)
        if factor % 2 and factor != vocab_size:  # else a count nearby is free of it
            return []
        nearest = next(rows for rows in itertools.count(self.table_rows + 1) if math.gcd(rows, vocab_size) == 1)
        reason = f"n-grams that end in the same token would share {self.table_rows // factor} of the rows"
        allowed = (
            f"a number without the factor {factor} of the vocabulary ({vocab_size}), e.g. {nearest}, since {reason}"
        )
        return [("table_rows", self.table_rows, allowed)]


def ngram_embedding_modules(config: NgramEmbeddingConfig, vocab_size: int) -> Attachments:
    """Return a SwiGLU for every layer, and the n-grams at the input embedding."""
    size, moduli = config.size, config.moduli(vocab_size)
    module = NgramEmbedding(
        MemoryTable(sum(moduli), config.width),
        PolynomialHash(vocab_size, moduli, int(config.option("max_order"))),
        size.dim,
        bool(config.option("mean")),
        config.option("amplify"),
    )
    return Attachments([SwiGLU(size.dim, size.ffn_hidden) for _ in range(size.layers)], input_embedding=module)


register(Family("ngram_embedding", NgramEmbeddingConfig, ngram_embedding_modules, has_memory=True))
