"""`token_table`: tables with a row for every token of the vocabulary, in three published forms.

- `stem` (arXiv 2601.10639): the row replaces the up-projection of a feed-forward, W2(silu(W1 h) * E[token]).
- `per_layer_embedding` (Gemma 3n and 4, as transformers computes it): at the end of a layer, h + norm(W_up(gelu(W_gate
  h) * p)), where p is (norm(W_p e) + E[token] sqrt(P)) / sqrt(2) and e the token's input embedding.
- `value_embedding` (nanochat): 3 sigmoid(W_g h[:12]) E[token] is added to the attention values, a gate per head.

Shapes: B rows, T tokens, N = B*T, D model width, F width of the feed-forward, P row width, G key-value heads.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.attachments import Attachments, Skip
from suite.models.cost import Cost
from suite.models.distributions import Constant, Distribution, Normal
from suite.models.feedforward import SwiGLU
from suite.models.lookup.controls import TableConfig
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.registry import Family, Problem, placement_problems, register

Form = Literal["stem", "per_layer_embedding", "value_embedding"]

NORM_EPS = 1e-5
GATED_CHANNELS = 12
"""Channels of the hidden state that the gate of a value embedding reads (nanochat)."""
GATE_SCALE = 3.0
"""Largest gate of a value embedding (nanochat)."""


class TokenRows(MemoryLayer):
    """The base of the forms: reads the row of each token, a bag of one row."""

    window = 1

    def addresses(self, ids_BTW: Tensor) -> Tensor:
        """Return the row of each token. Padding, whose id is -1 and which no token attends to, reads row 0."""
        return ids_BTW.reshape(-1, 1).clamp_min(0)

    def rows(self, ids_BT1: Tensor) -> Tensor:
        """Return the rows [B, T, P]."""
        rows_N1 = self.addresses(ids_BT1)
        (table,) = self.tables
        read_NP = table(rows_N1, torch.ones_like(rows_N1, dtype=table.wide))
        return read_NP.view(*ids_BT1.shape[:2], -1)


class Stem(TokenRows):
    """A feed-forward whose up-projection is the token's row."""

    matrices: ClassVar[tuple[str, ...]] = ("w1.weight", "w2.weight")

    def __init__(self, table: MemoryTable, dim: int) -> None:
        super().__init__([table])
        hidden = table.weight.shape[1]
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor, ids_BT1: Tensor) -> Tensor:
        h_BTF = F.silu(self.w1(x_BTD))
        return self.w2(h_BTF * self.rows(ids_BT1).to(h_BTF.dtype)).to(x_BTD.dtype)

    def cost(self) -> Cost:
        """Count the two matrices; a row as wide as the feed-forward is read."""
        weights = self.w1.weight.numel() + self.w2.weight.numel()
        return Cost({"ffn": weights}, {"ffn": weights, "memory_values": self.w1.out_features}, {"ffn": weights})


class PerLayerEmbedding(TokenRows):
    """What the tail of a layer adds to the residual stream, from the stream, the token's row and its input embedding.

    Our choices: the context part is normed with gains of its own layer, and the last norm starts at a gain of (2
    layers)^-1/2, as matrices that write to the residual stream do here.
    """

    reads_embedding = True
    matrices: ClassVar[tuple[str, ...]] = ("gate.weight", "context.weight", "up.weight")

    def __init__(self, table: MemoryTable, dim: int, layers: int) -> None:
        super().__init__([table])
        self.layers, self.width = layers, table.weight.shape[1]
        self.gate = nn.Linear(dim, self.width, bias=False)
        self.context = nn.Linear(dim, self.width, bias=False)
        self.context_norm = nn.RMSNorm(self.width, eps=NORM_EPS)
        self.up = nn.Linear(self.width, dim, bias=False)
        self.up_norm = nn.RMSNorm(dim, eps=NORM_EPS)

    def forward(self, x_BTD: Tensor, ids_BT1: Tensor, embedding_BTD: Tensor) -> Tensor:
        wide = self.tables[0].wide
        row_BTP = self.rows(ids_BT1) * math.sqrt(self.width)
        p_BTP = (self.context_norm(self.context(embedding_BTD).to(wide)) + row_BTP) / math.sqrt(2)
        h_BTP = F.gelu(self.gate(x_BTD), approximate="tanh")
        return self.up_norm(self.up(h_BTP * p_BTP.to(h_BTP.dtype)).to(wide)).to(x_BTD.dtype)

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return matrices normal with fan_in^-1/2, and the gains; arguments as for `initial_weights.initialise`."""
        if len(shape) == 2:
            return Normal(shape[1] ** -0.5)
        return Constant((2 * self.layers) ** -0.5 if name == "up_norm.weight" else 1.0)

    def cost(self) -> Cost:
        """Count the three projections and the norms; one row is read."""
        weights = 3 * self.gate.weight.numel()
        params = {"memory_projection": weights, "norm": self.width + self.up_norm.weight.numel()}
        return Cost(params, params | {"memory_values": self.width}, {"memory_projection": weights})


class ValueEmbedding(TokenRows):
    """What is added to the attention values of a layer: the token's row, gated for each key-value head."""

    def __init__(self, table: MemoryTable, dim: int, kv_heads: int) -> None:
        super().__init__([table])
        self.kv_heads, self.channels = kv_heads, min(GATED_CHANNELS, dim)
        self.gate = nn.Linear(self.channels, kv_heads, bias=False)

    def forward(self, x_BTD: Tensor, ids_BT1: Tensor) -> Tensor:
        gate_BTG1 = GATE_SCALE * self.gate(x_BTD[..., : self.channels]).sigmoid().unsqueeze(-1)
        rows_BTGK = self.rows(ids_BT1).unflatten(-1, (self.kv_heads, -1))
        return (gate_BTG1 * rows_BTGK).flatten(-2).to(x_BTD.dtype)

    def cost(self) -> Cost:
        """Count the gate; a row as wide as all key-value heads is read."""
        gate = self.gate.weight.numel()
        read = {"memory_projection": gate, "memory_values": self.tables[0].weight.shape[1]}
        return Cost({"memory_projection": gate}, read, {"memory_projection": gate})


class TokenTableConfig(TableConfig):
    """`token_table`: one table per layer of the placement, with a row per token."""

    form: Form = Field(default="stem", description="where the row of a token enters")
    row_width: int | None = Field(
        default=None, gt=0, description="per_layer_embedding: width of a row; None: dim/8 (Gemma: 256)"
    )
    placement: tuple[int, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="layers with a table; None: stem all but the first, per_layer_embedding all, value_embedding every "
        "other one up to the last",
    )

    @property
    def memory_placement(self) -> tuple[int, ...]:
        """Layers with a table: `placement`, or those of the published model."""
        layers = self.size.layers
        published = {
            "stem": range(1, layers),
            "per_layer_embedding": range(layers),
            "value_embedding": range((layers - 1) % 2, layers, 2),
        }
        return self.placement or tuple(published[self.form])

    @property
    def width(self) -> int:
        """Width of a row."""
        size = self.size
        widths = {
            "stem": size.ffn_hidden,
            "per_layer_embedding": self.row_width or max(1, size.dim // 8),
            "value_embedding": size.kv_heads * size.head_dim,
        }
        return widths[self.form]

    @property
    def value_lr_ratio(self) -> float:
        """Learning rate of the tables over the base rate: 1 for `stem` (released code), otherwise the default."""
        return 1.0 if self.form == "stem" else super().value_lr_ratio

    def family_problems(self) -> list[Problem]:
        problems = placement_problems(self.placement, self.memory_placement, self.size.layers)
        if self.row_width is not None and self.form != "per_layer_embedding":
            problems.append(
                ("row_width", self.row_width, f"None with form {self.form}, whose rows are {self.width} wide")
            )
        if self.control == "dense" and self.form == "value_embedding":
            problems.append(("control", "dense", "another control: a value embedding costs next to no multiply-adds"))
        return problems


def token_table_modules(config: TokenTableConfig, vocab_size: int) -> Attachments:
    """Return the modules of the form, and a SwiGLU for every layer whose feed-forward is not replaced."""
    size, placement = config.size, config.memory_placement
    # A row of `stem` starts with the spread of the up-projection that it replaces (our choice).
    tables = {
        layer: MemoryTable(vocab_size, config.width, 1.0 if config.form == "stem" else None) for layer in placement
    }
    dense = [SwiGLU(size.dim, size.ffn_hidden) for _ in range(size.layers)]
    if config.form == "stem":
        return Attachments([Stem(tables[at], size.dim) if at in tables else dense[at] for at in range(size.layers)])
    if config.form == "value_embedding":
        values = {layer: ValueEmbedding(table, size.dim, size.kv_heads) for layer, table in tables.items()}
        return Attachments(dense, attention_values=values)
    tails = {layer: PerLayerEmbedding(table, size.dim, size.layers) for layer, table in tables.items()}
    # The tail of a layer is computed before the attention of the next one. No layer follows the last: its module reads
    # the input of the feed-forward instead.
    last = size.layers - 1
    skips = {last: Skip(tails[last], last)} if last in tails else {}
    return Attachments(dense, before_attention={at + 1: tail for at, tail in tails.items() if at < last}, skips=skips)


register(Family("token_table", TokenTableConfig, token_table_modules, has_memory=True))
