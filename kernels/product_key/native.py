"""The product-key search in float32 on a CPU in C (native.c), on one thread; results as in reference.py.

Half scores are torch's products, as in reference.py: rows and scores are equal bit for bit, ties included. Gradients
are summed token by token, in another order.

Shapes: N tokens, M heads, W half of a key's width, n half keys, K rows selected per head, P candidate pairs, C tokens
of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native import call
from kernels.product_key.reference import best, chunks, pairs

__all__ = ["best", "search", "search_backward"]

LANES = 8
"""As in native.c."""


def search(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See reference.search; laid out token by token, as the rows are read."""
    (tokens, heads), half_keys = q_NM2W.shape[:2], keys_M2nW.shape[2]
    keys_M2Wn = keys_M2nW.float().mT
    first_P, second_P = pairs(top_k).int().contiguous()
    rows_NMK = q_NM2W.new_empty(tokens, heads, top_k, dtype=torch.int64)
    scores_NMK = q_NM2W.new_empty(tokens, heads, top_k)
    room = 7 * (max(half_keys, len(first_P)) + LANES) + 2 * top_k + LANES
    scratch = q_NM2W.new_empty(room, dtype=torch.int32)
    for part in chunks(q_NM2W, keys_M2nW):
        scores_M2Cn = (q_NM2W[part].permute(1, 2, 0, 3) @ keys_M2Wn).contiguous()
        call(
            "combine",
            scores_M2Cn,
            first_P,
            second_P,
            rows_NMK[part],
            scores_NMK[part],
            heads,
            scores_M2Cn.shape[2],
            half_keys,
            top_k,
            len(first_P),
            scratch,
        )
    return rows_NMK.transpose(0, 1), scores_NMK.transpose(0, 1)


def search_backward(grad_MNK: Tensor, rows_MNK: Tensor, q_NM2W: Tensor, keys_M2nW: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.search_backward; deterministic."""
    (tokens, heads, _, width), half_keys = q_NM2W.shape, keys_M2nW.shape[2]
    grad_q_NM2W, grad_keys_M2nW = q_NM2W.new_zeros(q_NM2W.shape), q_NM2W.new_zeros(keys_M2nW.shape)
    call(
        "search_backward",
        grad_MNK.transpose(0, 1).contiguous(),
        rows_MNK.transpose(0, 1).contiguous(),
        q_NM2W.contiguous(),
        keys_M2nW.float().contiguous(),
        grad_q_NM2W,
        grad_keys_M2nW,
        tokens,
        heads,
        half_keys,
        rows_MNK.shape[2],
        width,
    )
    return grad_q_NM2W, grad_keys_M2nW
