"""The exact search of a product-key memory: the highest-scoring of n*n rows, without scoring all of them.

    rows_MNK, scores_MNK = product_key(q_NM2W, keys_M2nW, top_k=32)
    weights_MNK = scores_MNK.softmax(-1)

`best` is the selection alone: the positions of the largest values of every row, ties by position.

Row (i, j), with index i*n + j, scores q1.K1[i] + q2.K2[j]. Each head takes the top_k half keys of each side. Of their
top_k * top_k pairs it considers only those that can be among the best: with ranks (i+1)(j+1) <= top_k.

Shapes: N tokens, M heads, W half of a key's width, n half keys, K = top_k.
Source: Lample et al. 2019 (arXiv 1907.05242), section 3; "Memory Layers at Scale" (arXiv 2412.09764), eq. 1 and 2.
The pruning of pairs is exact (see reference.pairs).
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.product_key import reference

__all__ = ["best", "product_key"]


def product_key(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (rows_MNK int64, scores_MNK), best first, n >= top_k; gradients of queries and keys by autograd.

    Products are summed in float32 (float64 for float64 queries), which is also the dtype of the scores, and ranked in
    float32. Equal half scores rank by index, equal sums by the rank of their first, then of their second half. Only the
    K selected scores are saved for the backward pass. Forward and backward are deterministic, except for the
    reference's backward on CUDA (scatter_add).

    Args:
        q_NM2W: Half queries of any float dtype.
        keys_M2nW: Half keys of any float dtype.
        top_k: Rows per head.
        backend: Overrides kernels.dispatch.

    Raises:
        ValueError: `top_k` is not in 1..n.
    """
    if not 1 <= top_k <= keys_M2nW.shape[2]:
        raise ValueError(f"top_k: got {top_k}, allowed: 1 to the half keys ({keys_M2nW.shape[2]})")
    kind = q_NM2W.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        rows, scores = _Search.apply(q_NM2W, keys_M2nW, top_k, dispatch.implementation("product_key", q_NM2W, backend))
    return rows, scores


@torch.no_grad()
def best(values: Tensor, count: int, backend: str | None = None) -> Tensor:
    """Return the positions of the `count` largest values in the last dimension, int64: largest first, ties by position.

    Values are compared in float32, and minus zero equals zero. torch.topk does not define the order of ties.

    Args:
        values: Values of any float dtype.
        count: Number of positions.
        backend: Overrides kernels.dispatch.

    Raises:
        ValueError: `count` is not in 1..the size of the last dimension.
    """
    if not 1 <= count <= values.shape[-1]:
        raise ValueError(f"count: got {count}, allowed: 1 to the values of a row ({values.shape[-1]})")
    if torch.compiler.is_compiling():  # the other ways would break the graph
        return reference.best_by_sort(values, count)
    positions: Tensor = dispatch.implementation("product_key", values, backend).best(values, count)
    return positions


class _Search(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int, ops: ModuleType) -> tuple[Tensor, Tensor]:
        rows_MNK, scores_MNK = ops.search(q_NM2W, keys_M2nW, top_k)
        ctx.ops = ops
        ctx.save_for_backward(q_NM2W, keys_M2nW, rows_MNK)
        ctx.mark_non_differentiable(rows_MNK)
        return rows_MNK, scores_MNK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_MNK: Tensor) -> tuple[Tensor | None, ...]:
        q_NM2W, keys_M2nW, rows_MNK = ctx.saved_tensors
        grad_q, grad_keys = ctx.ops.search_backward(grad_MNK, rows_MNK, q_NM2W, keys_M2nW)
        return grad_q.to(q_NM2W.dtype), grad_keys.to(keys_M2nW.dtype), None, None
