"""`hashed_ngram`: a feed-forward plus a table that is read by hashes of the last two and three token ids.

A short example in the manner of Engram (arXiv 2601.07372), which the built-in family `engram` implements in full. It
differs from Engram's published code in six ways:

- Every head has multipliers of its own; there, the heads of an order share one mix and differ in the modulus only.
- The gate is a plain sigmoid; there, of the signed square root of the score.
- The memory is added to the feed-forward; there, to the residual stream before attention.
- Token ids are hashed as they are; there, canonical ids, which ignore case, accents and spaces.
- There is no convolution; there, a causal depthwise one, which starts at zero.
- Projections have no biases; there, they have.

Tables have a prime number of rows for each n-gram order and hash head, as there.

Shapes: B rows, T tokens, D model width, W = 3 ids, H = orders * heads, E width of a row, N = B*T.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from suite.baselines import Cost, Family, MemoryLayer, MemoryTable, ModelConfig, SwiGLU, register

ORDERS = (2, 3)


class NgramMemory(MemoryLayer):
    """sigmoid(norm(x) . norm(W_K e) / sqrt(D)) * W_V e, where e is the concatenation of the hashed rows."""

    def __init__(self, table: MemoryTable, primes: list[int], dim: int) -> None:
        super().__init__([table])
        self.dim, self.primes = dim, primes
        width = len(primes) * table.weight.shape[1]
        self.key = nn.Linear(width, dim, bias=False)
        self.value = nn.Linear(width, dim, bias=False)
        self.x_norm, self.key_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def rows(self, ids_BTW: Tensor) -> Tensor:
        """Return the row of each order and head, [B, T, H]; missing ids (-1) hash as zero."""
        heads, first, rows = len(self.primes) // len(ORDERS), 0, []
        for index, prime in enumerate(self.primes):
            mixed = torch.zeros_like(ids_BTW[..., 0])
            for back in range(ORDERS[index // heads]):
                # Every head and position has its own odd multiplier (from the constant of splitmix64, below 2^31).
                multiplier = (0x9E3779B9 * (16 * index + back + 1)) % 2**31 | 1
                mixed = mixed ^ ((ids_BTW[..., -1 - back] + 1) * multiplier)
            rows.append(mixed % prime + first)
            first += prime
        return torch.stack(rows, -1)

    def addresses(self, ids_BTW: Tensor) -> Tensor:
        """Return the rows, one per bag: they follow from ids, so that a table in a file can be read ahead."""
        return self.rows(ids_BTW).reshape(-1, 1)

    def forward(self, x_BTD: Tensor, ids_BTW: Tensor) -> Tensor:
        rows_N1 = self.addresses(ids_BTW)
        e_BTE = self.tables[0](rows_N1, torch.ones_like(rows_N1, dtype=x_BTD.dtype)).view(*x_BTD.shape[:2], -1)
        match_BT1 = (self.x_norm(x_BTD) * self.key_norm(self.key(e_BTE))).sum(-1, keepdim=True)
        return (match_BT1 / math.sqrt(self.dim)).sigmoid() * self.value(e_BTE)

    def cost(self) -> Cost:
        """Count two projections; one row is read for each order and head."""
        matrices = self.key.weight.numel() + self.value.weight.numel()
        params = {"memory_projection": matrices, "norm": 2 * self.dim}
        return Cost(params, params | {"memory_values": self.key.in_features}, {"memory_projection": matrices})


class SwiGLUWithNgrams(SwiGLU):
    """The sum of a feed-forward and an n-gram memory; `window` requests the last three ids from the transformer."""

    window = max(ORDERS)

    def __init__(self, dim: int, hidden: int, memory: NgramMemory) -> None:
        super().__init__(dim, hidden)
        self.memory = memory

    def forward(self, x_BTD: Tensor, ids_BTW: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_BTD) + self.memory(x_BTD, ids_BTW)

    def cost(self) -> Cost:
        """Count both parts."""
        return super().cost() + self.memory.cost()


class NgramConfig(ModelConfig):
    """The options of `hashed_ngram`: by default two layers read n-grams, each from its own table."""

    ngram_rows: int = Field(default=4096, gt=100, description="approximate rows of each order and head")
    ngram_width: int = Field(default=8, gt=0, description="width of a row")
    ngram_heads: int = Field(default=4, gt=0, description="hashes of each order; Engram: 8")
    placement: tuple[int, ...] = Field(default=(1, 2), strict=False, description="layers; Engram: 2 and 15")


def primes_below(limit: int, count: int) -> list[int]:
    """Return the `count` largest primes below `limit`."""
    primes: list[int] = []
    for number in range(limit - 1, 2, -1):
        if len(primes) < count and all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            primes.append(number)
    return primes


def feed_forwards(config: NgramConfig) -> list[nn.Module]:
    """Return a SwiGLU for every layer, with an n-gram memory in those of the placement."""
    size, primes = config.size, primes_below(config.ngram_rows, len(ORDERS) * config.ngram_heads)

    def feed_forward(layer: int) -> nn.Module:
        if layer not in config.placement:
            return SwiGLU(size.dim, size.ffn_hidden)
        table = MemoryTable(sum(primes), config.ngram_width)
        return SwiGLUWithNgrams(size.dim, size.ffn_hidden, NgramMemory(table, primes, size.dim))

    return [feed_forward(layer) for layer in range(size.layers)]


register(Family("hashed_ngram", NgramConfig, feed_forwards, has_memory=True))
