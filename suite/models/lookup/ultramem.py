"""`ultramem_v2`: product keys scored by a Tucker decomposition, and one pool of rows for all layers.

UltraMemV2 (arXiv 2508.18756) next to every feed-forward. A layer scores row (i, j) with each of two cores C_c by
s_c(i, j) = S1[i] C_c S2[j], where S1[i] and S2[j] are the products of the query with the half keys, one per rank. The
best rows by s_0 + s_1 are read: row r has a factor <W_p x, P[r]>, and core c weights part c of its value. Nothing is
normalised by a softmax. The pool holds n0 * n0 rows for every layer; layer l reads n * n consecutive rows of it, from
row l * n0 * n0 on, in a fixed random order. Sources: the paper and its released code.

Shapes: N tokens, D model width, M heads, A = 2 sides, R = 2 ranks, W key width of a side, n half keys, K best rows per
head, C = 2 cores, P width of a factor row, S = M*K rows read per token.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.product_key import best
from suite.models.cost import Cost
from suite.models.distributions import Constant, Distribution, Normal, Uniform
from suite.models.feedforward import SwiGLU, SwiGLUPlusMemory
from suite.models.lookup.controls import TableConfig
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.precision import at_least_fp32
from suite.models.registry import Family, Problem, placement_problems, register

RANK = CORES = 2
VALUE_STD = 0.02
"""Standard deviation of the initial values of both kinds of rows (released code)."""
GAIN_EXPONENT = 0.4
"""Queries and keys of width W start with a gain of W to the power of minus this (released code)."""


class TuckerMemory(MemoryLayer):
    """One layer's memory; table 0 holds the factors, the others hold the parts of the values.

    Projections have no biases, and layer norms have gains only (our choice). Each rank has its own query (paper).

    Args:
        tables: The shared pool: a table of factors, and one table per core with its part of the values.
        dim: Model width (D).
        half_keys: Half keys per side (n).
        heads: Heads, each with its own queries, keys and cores (M).
        top_k: Rows read per head (K).
        k_dim: Width of a key, both sides.
        first: The row of the pool at which the layer's rows start.
        seed: Seed of the order of the layer's rows.
    """

    order_R: Tensor
    matrices: ClassVar[tuple[str, ...]] = ("query.weight", "factor.weight", "out.weight")

    def __init__(
        self,
        tables: list[MemoryTable],
        dim: int,
        half_keys: int,
        heads: int,
        top_k: int,
        k_dim: int,
        first: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tables)
        self.dim, self.half_keys, self.heads, self.top_k = dim, half_keys, heads, top_k
        self.width, self.first, self.seed = k_dim // 2, first, seed
        self.heads_per_read = heads
        self.query = nn.Linear(dim, heads * 2 * RANK * self.width, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, RANK, half_keys, self.width))
        self.cores = nn.Parameter(torch.empty(heads, CORES, RANK, RANK))
        self.query_norm = nn.LayerNorm(self.width, bias=False)
        self.key_norm = nn.LayerNorm(self.width, bias=False)
        self.factor = nn.Linear(dim, tables[0].weight.shape[1], bias=False)
        self.out = nn.Linear(sum(table.weight.shape[1] for table in tables[1:]), dim, bias=False)
        self.register_buffer("order_R", torch.empty(half_keys**2, dtype=torch.int32))
        self.reset_buffers()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, self.dim)
        rows_NS, scores_CNS = self.find(x_ND)
        factors, *values = self.tables
        factor_NS = factors.products(rows_NS, self.factor(x_ND))
        parts = [table(rows_NS, factor_NS * score_NS) for table, score_NS in zip(values, scores_CNS, strict=True)]
        return self.out(torch.cat(parts, -1).to(x_BTD.dtype)).view_as(x_BTD)

    def find(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows to read, int64 [N, S], and their scores by core [C, N, S]."""
        q_NMARW = self.query_norm(self.query(x_ND).view(-1, self.heads, 2, RANK, self.width))
        half_MARNn = q_NMARW.permute(1, 2, 3, 0, 4) @ self.key_norm(self.keys).mT
        half_MARNn = half_MARNn.to(at_least_fp32(half_MARNn.dtype))
        with torch.no_grad():
            directions_MAR = leading_directions(self.cores.sum(1))
            half_MANK = best((half_MARNn * directions_MAR[..., None, None]).sum(2), self.top_k)
        scores_MCNKK = self._rescored(half_MARNn, half_MANK)
        with torch.no_grad():
            pair_MNK = best(scores_MCNKK.sum(1).flatten(-2), self.top_k)
            first_MNK = half_MANK[:, 0].gather(-1, pair_MNK // self.top_k)
            second_MNK = half_MANK[:, 1].gather(-1, pair_MNK % self.top_k)
            rows_MNK = self.rows_of(first_MNK * self.half_keys + second_MNK)
        scores_MCNK = scores_MCNKK.flatten(-2).gather(-1, pair_MNK.unsqueeze(1).expand(-1, CORES, -1, -1))
        return rows_MNK.transpose(0, 1).flatten(1), scores_MCNK.permute(1, 2, 0, 3).flatten(2)

    def _rescored(self, half_MARNn: Tensor, half_MANK: Tensor) -> Tensor:
        """Return the exact scores of all pairs of the best half keys, [M, C, N, K, K]."""
        chosen_MARNK = half_MARNn.gather(-1, half_MANK.unsqueeze(2).expand(-1, -1, RANK, -1, -1))
        first_MNKR, second_MNRK = chosen_MARNK[:, 0].permute(0, 2, 3, 1), chosen_MARNK[:, 1].permute(0, 2, 1, 3)
        cores_MRX = self.cores.permute(0, 2, 1, 3).flatten(2).to(first_MNKR.dtype)  # X = C*R
        with torch.autocast("cpu" if first_MNKR.is_meta else first_MNKR.device.type, enabled=False):
            left_MNKCR = (first_MNKR @ cores_MRX.unsqueeze(1)).unflatten(-1, (CORES, RANK))
            scores_MNYK = left_MNKCR.flatten(2, 3) @ second_MNRK  # Y = K*C
        return scores_MNYK.unflatten(2, (self.top_k, CORES)).permute(0, 3, 1, 2, 4)

    def rows_of(self, addresses: Tensor) -> Tensor:
        """Return the rows of the pool at addresses i * n + j."""
        return (self.first + self.order_R[addresses].long()) % len(self.tables[0].weight)

    def reset_buffers(self) -> None:
        """Draw the order of the layer's rows."""
        if not self.order_R.is_meta:
            generator = torch.Generator().manual_seed(self.seed)
            self.order_R.copy_(torch.randperm(len(self.order_R), generator=generator))

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return the distributions of the released code; see `initial_weights.initialise`."""
        if name in ("query_norm.weight", "key_norm.weight"):
            return Constant(self.width**-GAIN_EXPONENT)
        if name == "cores":
            return Uniform(0.0, 1.0)
        return Normal((self.width if name in ("query.weight", "keys") else shape[1]) ** -0.5)

    def cost(self) -> Cost:
        """Count the search, the exact scores of K * K pairs, the projections, and the products with factor rows."""
        query, keys, cores = self.query.weight.numel(), self.keys.numel(), self.cores.numel()
        projections = self.factor.weight.numel() + self.out.weight.numel()
        params = {
            "memory_query": query,
            "memory_keys": keys + cores,
            "memory_projection": projections,
            "norm": 2 * self.width,
        }
        reads = self.heads * self.top_k
        row = sum(table.weight.shape[1] for table in self.tables)
        macs: dict[str, float] = {
            "memory_query": query,
            "memory_scoring": keys + reads * CORES * RANK * (RANK + self.top_k),
            "memory_projection": projections,
            "memory_products": reads * self.tables[0].weight.shape[1],
        }
        return Cost(params, params | {"memory_values": reads * row}, macs)


def leading_directions(core_MRR: Tensor) -> Tensor:
    """Return the first left and right singular vectors of 2 x 2 matrices, [M, 2, R], in closed form.

    Their joint sign, which is free, is the one with which the left vector sums to a positive number (our choice; the
    released code follows the signs of the step before).
    """
    gram_MRR = (core_MRR.unsqueeze(2) * core_MRR.unsqueeze(1)).sum(-1)
    angle_M = torch.atan2(2 * gram_MRR[:, 0, 1], gram_MRR[:, 0, 0] - gram_MRR[:, 1, 1]) / 2
    left_MR = torch.stack((angle_M.cos(), angle_M.sin()), -1)
    left_MR = torch.where(left_MR.sum(-1, keepdim=True) < 0, -left_MR, left_MR)
    right_MR = (left_MR.unsqueeze(-1) * core_MRR).sum(1)
    return torch.stack((left_MR, nn.functional.normalize(right_MR, dim=-1)), 1)


class UltraMemConfig(TableConfig):
    """`ultramem_v2`: a memory next to every feed-forward; widths default to those of the released 227M model."""

    half_keys: int = Field(gt=0, description="side n0: the pool has n0*n0 rows per layer with a memory")
    share_ratio: float = Field(
        default=0.5, gt=0, le=1, description="share of the pool that one layer can read, in rows"
    )
    top_k: int = Field(default=32, gt=0, description="rows read per head")
    memory_heads: int = Field(default=1, gt=0, description="heads, each with its own queries, keys and cores")
    k_dim: int | None = Field(default=None, gt=0, description="width of a key, both halves; None: dim/2")
    factor_dim: int | None = Field(default=None, gt=0, description="width of a row's factor part; None: dim/4")
    value_dim: int | None = Field(default=None, gt=0, description="width of a row's value part; None: dim/4")
    placement: tuple[int, ...] | None = Field(
        default=None, strict=False, min_length=1, description="layers with a memory; None: all"
    )

    @property
    def memory_placement(self) -> tuple[int, ...]:
        """Layers with a memory."""
        return tuple(range(self.size.layers)) if self.placement is None else self.placement

    @property
    def widths(self) -> tuple[int, int, int]:
        """Widths of a key (both halves), of a factor row and of a value row."""
        dim = self.size.dim
        return self.k_dim or dim // 2, self.factor_dim or dim // 4, self.value_dim or dim // 4

    @property
    def pool_rows(self) -> int:
        """Rows of the pool."""
        return self.half_keys**2 * len(self.memory_placement)

    @property
    def layer_keys(self) -> int:
        """Half keys of a layer per side: the largest whose square is at most `share_ratio` of the pool."""
        return math.isqrt(int(self.pool_rows * self.share_ratio))

    @property
    def value_lr_ratio(self) -> float:
        """Learning rate of the pool over the base rate at the start (released code)."""
        return 4.0

    @property
    def value_lr_end(self) -> float:
        """The pool ends at the base rate (released code)."""
        return 1 / self.value_lr_ratio

    def family_problems(self) -> list[Problem]:
        problems = placement_problems(self.placement, self.memory_placement, self.size.layers)
        key, _, value = self.widths
        if self.layer_keys < self.top_k:
            allowed = f"more, so that a layer has top_k ({self.top_k}) half keys per side; it has {self.layer_keys}"
            problems.append(("half_keys", self.half_keys, allowed))
        if key % 2:
            problems.append(("k_dim", key, "an even number (two halves)"))
        if value % CORES:
            problems.append(("value_dim", value, "an even number (one half per core)"))
        return problems


def ultramem_feed_forwards(config: UltraMemConfig) -> list[nn.Module]:
    """Return a SwiGLU for every layer, with a memory next to those of the placement; all read one pool."""
    size, (k_dim, factor_dim, value_dim) = config.size, config.widths
    widths = [factor_dim] + [value_dim // CORES] * CORES
    tables = [MemoryTable(config.pool_rows, width, VALUE_STD) for width in widths]

    def feed_forward(layer: int) -> nn.Module:
        if layer not in config.memory_placement:
            return SwiGLU(size.dim, size.ffn_hidden)
        number = config.memory_placement.index(layer)
        memory = TuckerMemory(
            tables,
            size.dim,
            config.layer_keys,
            config.memory_heads,
            config.top_k,
            k_dim,
            first=number * config.half_keys**2,
            seed=number,
        )
        return SwiGLUPlusMemory(size.dim, size.ffn_hidden, memory)

    return [feed_forward(layer) for layer in range(size.layers)]


register(Family("ultramem_v2", UltraMemConfig, ultramem_feed_forwards, has_memory=True))
