"""Product-key memories: the exact search, the layer, and the `pkm` and `memory_plus` families.

A table of n*n rows is addressed by pairs of n half keys: row (i, j) scores q1.K1[i] + q2.K2[j] (Lample et al.
2019, arXiv 1907.05242, section 3; "Memory Layers at Scale", arXiv 2412.09764, equations 1 and 2).

Shapes: N tokens, D model width, M memory heads, W half of k_dim, n half keys, K best rows per head, R random
rows, S = M*K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.product_key import product_key
from suite.models.cost import Cost
from suite.models.distributions import Constant, Distribution, Normal, Uniform, xavier_uniform
from suite.models.feedforward import SwiGLU, SwiGLUPlusMemory
from suite.models.lookup.controls import TableConfig
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.precision import at_least_fp32
from suite.models.registry import Family, Problem, placement_problems, register

PAPER_K_DIM = 256
"""Key width of the paper's "Memory" rows, both halves together (table 4)."""


@dataclass(frozen=True)
class Addressing:
    """The settings that determine which rows a layer reads.

    Attributes:
        half_keys: Half keys per side (n).
        heads: Memory heads (M).
        top_k: Rows read per head (K).
        k_dim: Width of a key, both halves.
        qk_norm: Half queries and half keys are RMS-normed with a gain and their products divided by sqrt(k_dim / 2),
            as in attention (the paper states only the norms).
        query_batchnorm: Queries are batch-normed over the k_dim of all heads (Lample et al. 2019, section 3.1). In
            training the batch is every token of the call, padding included.
        random_rows: In training only, each head also reads this many rows drawn uniformly, with their true scores
            ("Memory Layers at Scale", section 5.4, which does not state their number).
    """

    half_keys: int
    heads: int
    top_k: int
    k_dim: int
    qk_norm: bool = False
    query_batchnorm: bool = False
    random_rows: int = 0


class ProductKeyLayer(MemoryLayer):
    """The base of layers addressed by product keys: each has its own query projection and half keys."""

    matrices: ClassVar[tuple[str, ...]] = ("query.weight",)

    def __init__(self, tables: list[MemoryTable], dim: int, addressing: Addressing) -> None:
        super().__init__(tables)
        self.dim, self.addressing = dim, addressing
        self.half_keys, self.heads, self.top_k, self.k_dim = (
            addressing.half_keys,
            addressing.heads,
            addressing.top_k,
            addressing.k_dim,
        )
        self.heads_per_read = addressing.heads
        self.query = nn.Linear(dim, addressing.heads * addressing.k_dim)
        self.keys = nn.Parameter(torch.empty(addressing.heads, 2, addressing.half_keys, addressing.k_dim // 2))
        self.query_norm = nn.RMSNorm(addressing.k_dim // 2, eps=1e-5) if addressing.qk_norm else None
        self.key_norm = nn.RMSNorm(addressing.k_dim // 2, eps=1e-5) if addressing.qk_norm else None
        self.query_batchnorm = (
            nn.BatchNorm1d(addressing.heads * addressing.k_dim) if addressing.query_batchnorm else None
        )

    def find(self, q_NM2W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the top-k rows for queries and their scores, both [M, N, K]; random rows, if any, come last."""
        keys_M2nW = self.keys if self.key_norm is None else self.key_norm(self.keys)
        rows_MNK, scores_MNK = product_key(q_NM2W, keys_M2nW, self.top_k)
        if self.training and self.addressing.random_rows:
            shape = (self.heads, q_NM2W.shape[0], self.addressing.random_rows)
            rows_MNR = torch.randint(self.half_keys**2, shape, device=rows_MNK.device)
            half_M2NR = torch.stack((rows_MNR // self.half_keys, rows_MNR % self.half_keys), 1)
            half_scores_M2Nn = q_NM2W.permute(1, 2, 0, 3) @ keys_M2nW.mT
            rows_MNK = torch.cat((rows_MNK, rows_MNR), -1)
            scores_MNK = torch.cat((scores_MNK, half_scores_M2Nn.gather(-1, half_M2NR).sum(1).to(scores_MNK)), -1)
        return rows_MNK, scores_MNK

    def queries(self, x_ND: Tensor) -> Tensor:
        """Return half queries [N, M, 2, W], normed if the layer is configured so."""
        q = self.query(x_ND)
        if self.query_batchnorm is not None:
            q = self.query_batchnorm(q)
        q_NM2W = q.view(-1, self.heads, 2, self.k_dim // 2)
        if self.query_norm is not None:
            q_NM2W = self.query_norm(q_NM2W.to(at_least_fp32(q_NM2W.dtype))) * (self.k_dim // 2) ** -0.5
        return q_NM2W

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return the distributions of initial values; see `initial_weights.initialise`.

        Keys are uniform within k_dim^-1/2, the query is Xavier-uniform, other matrices are normal with fan_in^-1/2.
        Biases are zero and gains one.
        """
        if name in ("keys", "sink_keys"):
            bound = self.k_dim**-0.5
            return Uniform(-bound, bound)
        if name == "query.weight":
            return xavier_uniform(shape[1], shape[0])
        if len(shape) == 2:
            return Normal(shape[1] ** -0.5)
        return Constant(0.0 if name.endswith("bias") else 1.0)

    def search_cost(self) -> Cost:
        """Count the products of the query projection and of scoring all half keys."""
        width = self.heads * self.k_dim
        query, keys = self.dim * width, self.half_keys * width
        params = {"memory_query": query + width, "memory_keys": keys}
        if self.query_norm is not None:
            params["norm"] = self.k_dim
        if self.query_batchnorm is not None:
            params["norm"] = 2 * width
        return Cost(params, dict(params), {"memory_query": query, "memory_scoring": keys})


class ProductKeyMemory(ProductKeyLayer):
    """The sum over heads and their rows of softmax(score) x row; Memory+ projects it: W2(y * silu(W1 x)).

    Each head's softmax is over its own rows, in fp32. Initial values are those of the released code, with zero biases.

    Args:
        table: The value table.
        dim: Model width.
        addressing: The settings that determine which rows are read.
        swilu: Whether the sum is gated and projected as in Memory+. Without it, rows of another width than the model
            are projected by `out` alone.
        scalar_gate: Whether the output is scaled by sigmoid(w.x + b).
        sink: Whether every head also reads one more pair, whose key belongs to the head and whose value is shared.
    """

    matrices = ("query.weight", "gate.weight", "out.weight")

    def __init__(
        self,
        table: MemoryTable,
        dim: int,
        addressing: Addressing,
        swilu: bool = False,
        scalar_gate: bool = False,
        sink: bool = False,
    ) -> None:
        super().__init__([table], dim, addressing)
        width = table.weight.shape[1]
        self.gate = nn.Linear(dim, width) if swilu else None
        self.out = nn.Linear(width, dim) if swilu or width != dim else None
        self.scalar_gate = nn.Linear(dim, 1) if scalar_gate else None
        self.sink_keys = nn.Parameter(torch.empty(addressing.heads, addressing.k_dim)) if sink else None
        self.sink_value = nn.Parameter(torch.empty(1, width)) if sink else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, self.dim)
        y_ND = self._read(self.queries(x_ND)).to(x_ND.dtype)
        if self.gate is not None:
            y_ND = y_ND * F.silu(self.gate(x_ND))
        if self.out is not None:
            y_ND = self.out(y_ND)
        if self.scalar_gate is not None:
            y_ND = y_ND * self.scalar_gate(x_ND).sigmoid()
        return y_ND.view_as(x_BTD)

    def _read(self, q_NM2W: Tensor) -> Tensor:
        """Return the weighted sum of rows, including the sink."""
        rows_MNK, scores_MNK = self.find(q_NM2W)
        if self.sink_keys is None or self.sink_value is None:
            weights_MNK = scores_MNK.softmax(dim=-1, dtype=at_least_fp32(scores_MNK.dtype))
            return self._sum(rows_MNK, weights_MNK)
        sink_MN1 = q_NM2W.flatten(2).transpose(0, 1) @ self.sink_keys.unsqueeze(-1)
        weights_MNK = torch.cat((scores_MNK, sink_MN1), -1).softmax(dim=-1, dtype=at_least_fp32(scores_MNK.dtype))
        sink_weights_N1 = weights_MNK[..., -1].sum(0).unsqueeze(-1)
        return self._sum(rows_MNK, weights_MNK[..., :-1]) + sink_weights_N1 * self.sink_value

    def _sum(self, rows_MNK: Tensor, weights_MNK: Tensor) -> Tensor:
        rows_NS, weights_NS = (part.transpose(0, 1).flatten(1) for part in (rows_MNK, weights_MNK))
        return self.tables[0](rows_NS, weights_NS)

    def cost(self) -> Cost:
        """Count the search, the projections that exist, and the rows that are read."""
        width = self.tables[0].weight.shape[1]
        linears = [linear for linear in (self.gate, self.out, self.scalar_gate) if linear is not None]
        params: dict[str, int] = {}
        macs: dict[str, float] = {}
        if linears:
            macs["memory_projection"] = sum(linear.weight.numel() for linear in linears)
            biases = sum(linear.bias.numel() for linear in linears)
            params["memory_projection"] = int(macs["memory_projection"]) + biases
        if self.sink_keys is not None:
            params["memory_sink"] = self.sink_keys.numel() + width
            macs["memory_scoring"] = self.sink_keys.numel()
        rows_read = {"memory_values": self.heads * self.top_k * width}
        return self.search_cost() + Cost(params, params | rows_read, macs)


class AddressedConfig(TableConfig):
    """The options of every family addressed by product keys."""

    half_keys: int = Field(gt=0, description="side n of the table, which has n*n rows")
    top_k: int = Field(default=32, gt=0, description="rows read per head")
    memory_heads: int = Field(default=4, gt=0, description="heads, each with its own query and keys")
    k_dim: int | None = Field(
        default=None, gt=0, description="width of a key; None: 256, at most dim/2 (memory_plus: dim/2)"
    )
    qk_norm: bool = Field(default=False, description="normalise queries and keys")
    query_batchnorm: bool = Field(default=False, description="batch-normed queries (Lample et al. 2019)")
    random_rows: int = Field(default=0, ge=0, description="random rows read per head in training (table 3)")
    placement: tuple[int, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="layers with a memory; None: the middle one (memory_plus: three)",
    )

    @property
    def key_dim(self) -> int:
        """Width of a key, both halves: `k_dim`, or the paper's 256 but at most dim/2."""
        return self.k_dim or min(PAPER_K_DIM, self.size.dim // 2)

    @property
    def memory_placement(self) -> tuple[int, ...]:
        """Layers with a memory: `placement`, or the middle one (layers // 2)."""
        return self.placement or (self.size.layers // 2,)

    @property
    def batch_statistics(self) -> bool:
        """Whether queries are normalised over the micro-batch."""
        return self.query_batchnorm

    @property
    def addressing(self) -> Addressing:
        """The addressing options as one object."""
        return Addressing(
            self.half_keys,
            self.memory_heads,
            self.top_k,
            self.key_dim,
            self.qk_norm,
            self.query_batchnorm,
            self.random_rows,
        )

    def family_problems(self) -> list[Problem]:
        problems: list[Problem] = []
        if self.half_keys < self.top_k:
            problems.append(("half_keys", self.half_keys, f"at least top_k ({self.top_k})"))
        if self.key_dim % 2:
            problems.append(("k_dim", self.key_dim, "an even number (two halves)"))
        if self.qk_norm and self.query_batchnorm:
            problems.append(("query_batchnorm", True, "one of qk_norm and query_batchnorm"))
        return problems + placement_problems(self.placement, self.memory_placement, self.size.layers)


class MemoryConfig(AddressedConfig):
    """`pkm`, the paper's "Memory" row: one layer, no projection."""

    value_dim: int | None = Field(
        default=None, gt=0, description="width of a row; None: dim; other widths are projected (table 4)"
    )
    scalar_gate: bool = Field(default=False, description="scale the output by a sigmoid of the input (table 3)")
    sink: bool = Field(default=False, description="one more learned pair in every softmax (table 3)")
    share: bool = Field(default=True, description="one table for all layers; false: one per layer")


class MemoryPlusConfig(MemoryConfig):
    """`memory_plus`: three layers that share one table, each with its own query, keys and projection."""

    keep_ffn: bool = Field(default=False, description="keep the feed-forward and add the memory to it")

    @property
    def key_dim(self) -> int:
        """Width of a key, both halves: `k_dim`, or the paper's dim/2."""
        return self.k_dim or self.size.dim // 2

    @property
    def memory_placement(self) -> tuple[int, ...]:
        """`placement`, or three layers around layers // 2 at the distance of the base (373m: 4, 12, 20)."""
        middle, stride = self.size.layers // 2, self.size.memory_stride
        return self.placement or (middle - stride, middle, middle + stride)


def memory_feed_forwards(config: MemoryConfig) -> list[nn.Module]:
    """Return a SwiGLU for every layer outside the placement, and a memory for those inside it."""
    size, plus = config.size, isinstance(config, MemoryPlusConfig)
    tables = [
        MemoryTable(config.half_keys**2, config.value_dim or size.dim)
        for _ in range(1 if config.share else len(config.memory_placement))
    ]

    def feed_forward(layer: int) -> nn.Module:
        if layer not in config.memory_placement:
            return SwiGLU(size.dim, size.ffn_hidden)
        table = tables[config.memory_placement.index(layer) % len(tables)]
        memory = ProductKeyMemory(
            table, size.dim, config.addressing, swilu=plus, scalar_gate=config.scalar_gate, sink=config.sink
        )
        keep_ffn = isinstance(config, MemoryPlusConfig) and config.keep_ffn
        return SwiGLUPlusMemory(size.dim, size.ffn_hidden, memory) if keep_ffn else memory

    return [feed_forward(layer) for layer in range(size.layers)]


register(Family("pkm", MemoryConfig, memory_feed_forwards, has_memory=True))
register(Family("memory_plus", MemoryPlusConfig, memory_feed_forwards, has_memory=True))
