"""Cross entropy of the output head, whose logits exist for some tokens at a time if there are many.

`torch.nn.functional.linear_cross_entropy` also does this, but the oldest supported torch lacks it, and it returns the
gradient of the matrix in the dtype of the products. Here that gradient is summed over chunks in fp32.

Shapes: N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from suite.models.precision import at_least_fp32, product_dtype

LOGITS_AT_ONCE = 1 << 28
"""Logits that exist at the same time: 1 GiB in fp32. With a vocabulary of 128k words, a chunk has 2,000 tokens."""
IGNORED = -100
"""The target of a token without a loss, as in torch."""


def cross_entropy(x_ND: Tensor, matrix_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed cross entropy of the logits x @ matrix.T, in nats.

    At most LOGITS_AT_ONCE logits are computed together, and autograd differentiates them. If there are more, the
    forward pass also computes the gradients, one chunk of tokens after the other; the backward pass, which can run
    once, scales them.

    Args:
        x_ND: Hidden states. Under autocast, products are in its dtype.
        matrix_VD: The output matrix.
        targets_N: Token ids, int64; IGNORED adds nothing.

    Returns:
        The sum over tokens, [] in fp32, or in float64 if the logits are.
    """
    chunks = _chunks(len(x_ND), len(matrix_VD))
    if len(chunks) == 1:
        return _whole(x_ND, matrix_VD, targets_N)
    if not torch.is_grad_enabled():
        return torch.stack([_whole(x_ND[chunk], matrix_VD, targets_N[chunk]) for chunk in chunks]).sum()
    chunked: Tensor = _Chunked.apply(x_ND, matrix_VD, targets_N)
    return chunked


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    """Return chunks of tokens with at most LOGITS_AT_ONCE logits, or of one token; at least one chunk."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, max(1, tokens), size)]


def _whole(x_ND: Tensor, matrix_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(x_ND, matrix_VD)
    return F.cross_entropy(logits_NV.to(at_least_fp32(logits_NV.dtype)), targets_N, reduction="sum")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, matrix_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype = product_dtype(x_ND.dtype, x_ND.device)
        sums = at_least_fp32(dtype)
        ignored_N1 = (targets_N == IGNORED)[:, None]
        target_N1 = targets_N[:, None].clamp(min=0)
        # The zeros of ignored tokens add nothing to the gradient of the matrix.
        in_ND, by_VD = x_ND.to(dtype).masked_fill(ignored_N1, 0), matrix_VD.to(dtype)
        grad_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(matrix_VD, dtype=sums) if ctx.needs_input_grad[1] else None
        losses_N1 = torch.empty_like(target_N1, dtype=sums)
        for chunk in _chunks(len(x_ND), len(matrix_VD)):
            target_C1 = target_N1[chunk]
            log_p_CV = F.log_softmax(F.linear(in_ND[chunk], by_VD).to(sums), -1)
            losses_N1[chunk] = -log_p_CV.gather(1, target_C1)
            p_CV = log_p_CV.exp_()
            grad_CV = p_CV.scatter_(1, target_C1, p_CV.gather(1, target_C1) - 1).to(dtype)
            if grad_ND is not None:
                grad_ND[chunk] = grad_CV @ by_VD
            if grad_VD is not None:
                grad_VD += grad_CV.mT @ in_ND[chunk]
            del log_p_CV, p_CV, grad_CV  # before the next chunk has its own
        if grad_ND is not None:
            grad_ND.masked_fill_(ignored_N1, 0)
        ctx.save_for_backward(grad_ND, grad_VD)
        return losses_N1.masked_fill_(ignored_N1, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the gradient of the matrix is large. A second backward pass would find its version changed.
        return (*(part if part is None else part.mul_(grad) for part in ctx.saved_tensors), None)
