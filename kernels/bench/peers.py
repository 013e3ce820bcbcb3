"""Memory layers of installed packages from PyPI next to ours, with the same weights.

`product-key-memory` (lucidrains): torch.topk of all half scores and of all pairs, nn.EmbeddingBag, dense gradients.

Shapes: N tokens, M heads, W half of a key's width, n half keys, K rows selected per head, S = M*K, D width.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.bench.cases import Case, Contender, Inputs
from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.product_key import product_key

HEAD_ROWS = 32
"""Rows read by a head; cases with larger bags have several heads."""


class Layer(Contender):
    """Forward and backward of a layer without dropout; two tokens are checked against float64 over all rows."""

    def __init__(self, name: str, case: Case, peer: Any, read: Callable[[Tensor], Tensor]) -> None:
        # A row is read going forward and again for its weight's gradient.
        super().__init__(name, 2 * case.lookups * case.width * case.dtype.itemsize, case.device)
        self.peer, self.read = peer, read
        generator = torch.Generator(case.device).manual_seed(3)
        self.x_ND = torch.randn(case.lookups // case.bag, case.width, generator=generator, device=case.device)

    def turn(self, inputs: Inputs) -> float:
        seconds = self.lap("forward", self._forward)
        seconds += self.lap("backward", lambda: self.out_ND.backward(inputs.grad_ND))
        self.peer.zero_grad(set_to_none=True)
        return seconds

    def _forward(self) -> None:
        self.out_ND = self.read(self.x_ND)

    def correct(self) -> bool:
        with torch.no_grad():
            q_NM2W, keys_M2nW = _queries(self.peer, self.x_ND[:2]).double(), _keys(self.peer).double()
            halves_NM2n = torch.einsum("nmhw,mhkw->nmhk", q_NM2W, keys_M2nW)
            every_NMR = (halves_NM2n[:, :, 0].unsqueeze(-1) + halves_NM2n[:, :, 1].unsqueeze(-2)).flatten(2)
            scores_NMK, rows_NMK = every_NMR.topk(self.peer.topk)
            values_NMKD = self.peer.values.weight[rows_NMK].double()
            expected_ND = torch.einsum("nmk,nmkd->nd", scores_NMK.softmax(-1), values_NMKD)
            return torch.allclose(self.out_ND[:2].double(), expected_ND, rtol=1e-3, atol=1e-4)


def layers(case: Case) -> list[Contender]:
    """Return our contender and product-key-memory's, if it is installed and the table is float32."""
    try:
        package = importlib.import_module("product_key_memory")
    except ImportError:
        return []
    if case.dtype != torch.float32:
        return []
    top_k = min(HEAD_ROWS, case.bag)
    torch.manual_seed(0)
    peer: Any = package.PKM(
        case.width,
        heads=case.bag // top_k,
        num_keys=math.isqrt(case.rows),
        topk=top_k,
        dim_head=case.width // 4,
        use_layernorm=True,
        pre_layernorm=False,
    )
    peer = peer.eval().to(case.device)
    sink = RowGradients(peer.values.weight)

    def ours(x_ND: Tensor) -> Tensor:
        sink.clear()
        rows_MNK, scores_MNK = product_key(_queries(peer, x_ND), _keys(peer), peer.topk)
        rows_NS, weights_NS = (x.transpose(0, 1).flatten(1) for x in (rows_MNK, scores_MNK.softmax(-1)))
        return embedding_bag(peer.values.weight, rows_NS, weights_NS, sink)

    return [
        Layer("ours", case, peer, ours),
        Layer("product-key-memory", case, peer, lambda x_ND: peer(x_ND.unsqueeze(0)).squeeze(0)),
    ]


def _queries(peer: Any, x_ND: Tensor) -> Tensor:
    """Return the peer's normed half queries, [N, M, 2, W]."""
    q_N2MW = peer.to_queries(x_ND).unflatten(1, (2, peer.heads, -1))
    q_NM2W: Tensor = peer.norm(q_N2MW).transpose(1, 2)
    return q_NM2W


def _keys(peer: Any) -> Tensor:
    """Return the peer's half keys, [M, 2, n, W]."""
    keys_M2nW: Tensor = peer.keys.permute(0, 2, 1, 3)
    return keys_M2nW
