"""`peer`: a layer of single-neuron experts found by product keys (He 2024, arXiv 2407.04153, section 2).

Expert i is a pair of rows (u_i, v_i): the layer gives the sum over heads and their best experts of
softmax(score) x GELU(u_i . x) x v_i. One layer replaces the middle feed-forward. Experts are searched for as in
`pkm` ("Memory Layers at Scale": the same configuration, 768 half keys, softmax score).

Shapes: N tokens, D model width, K best rows per head, S = heads * K rows read per token.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.cost import Cost
from suite.models.feedforward import SwiGLU
from suite.models.memory_table import MemoryTable
from suite.models.precision import at_least_fp32
from suite.models.product_key import AddressedConfig, Addressing, ProductKeyLayer
from suite.models.registry import Family, register

PAPER_HALF_KEYS = 768
"""Half keys of the paper's PEER: 589,824 experts, about the parameters of 2^20 memory rows."""


class Peer(ProductKeyLayer):
    """Experts u (table 0) and v (table 1); the activation is the exact GELU."""

    def __init__(self, down: MemoryTable, up: MemoryTable, addressing: Addressing) -> None:
        super().__init__([down, up], down.weight.shape[1], addressing)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, self.dim)
        rows_MNK, scores_MNK = self.find(self.queries(x_ND))
        weights_MNK = scores_MNK.softmax(dim=-1, dtype=at_least_fp32(scores_MNK.dtype))
        rows_NS, weights_NS = (part.transpose(0, 1).flatten(1) for part in (rows_MNK, weights_MNK))
        down, up = self.tables
        hidden_NS = F.gelu(down.products(rows_NS, x_ND)) * weights_NS
        return up(rows_NS, hidden_NS).to(x_BTD.dtype).view_as(x_BTD)

    def cost(self) -> Cost:
        """Count the search and the products u.x; rows v are read and summed without a matrix product."""
        read = self.heads * self.top_k * self.dim
        return self.search_cost() + Cost({}, {"memory_values": 2 * read}, {"experts": read})


class PeerConfig(AddressedConfig):
    """`peer`: the options of `pkm`'s addressing; each expert has two rows."""

    half_keys: int = Field(default=PAPER_HALF_KEYS, gt=0, description="side n of the tables; there are n*n experts")


def peer_feed_forwards(config: PeerConfig) -> list[nn.Module]:
    """Return a SwiGLU for every layer outside the placement, and experts with tables of their own inside it."""
    size, rows = config.size, config.half_keys**2

    def feed_forward(layer: int) -> nn.Module:
        if layer not in config.memory_placement:
            return SwiGLU(size.dim, size.ffn_hidden)
        return Peer(MemoryTable(rows, size.dim), MemoryTable(rows, size.dim), config.addressing)

    return [feed_forward(layer) for layer in range(size.layers)]


register(Family("peer", PeerConfig, peer_feed_forwards, has_memory=True))
