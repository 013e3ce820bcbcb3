"""Products of one input with several matrices at once, on a GPU under autocast.

Autocast casts every matrix, and the input anew for every product. Here the matrices are cast by one kernel into one
matrix, the input is cast once, and one product serves all; so do their gradients. Elsewhere the layers run as they are.

Shapes: D input width, C output columns of all matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def fuses(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Return whether `together` takes these layers: plain and without biases, on a GPU under autocast.

    A compiler fuses casts itself.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.is_autocast_enabled("cuda"):
        return False
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)


def together(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """Return the outputs of the layers side by side, [..., C], in autocast's dtype; `fuses` must hold."""
    outputs: Tensor = _Together.apply(x, *(cast(nn.Linear, linear).weight for linear in linears))
    return outputs


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        ctx.dtypes, ctx.columns = (x.dtype, [weight.dtype for weight in weights]), [len(weight) for weight in weights]
        matrix_CD = weights[0].new_empty(sum(ctx.columns), x.shape[-1], dtype=dtype)
        torch._foreach_copy_(list(matrix_CD.split(ctx.columns)), [weight.detach() for weight in weights])
        x = x.to(dtype)
        ctx.save_for_backward(x, matrix_CD)
        return F.linear(x, matrix_CD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix_CD = ctx.saved_tensors
        grad_NC, x_ND = grad.flatten(0, -2), x.flatten(0, -2)
        x_dtype, dtypes = ctx.dtypes
        grad_x = (grad_NC @ matrix_CD).view_as(x).to(x_dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return (grad_x, *(None for _ in dtypes))
        grads = (grad_NC.mT @ x_ND).split(ctx.columns)
        wide = [torch.empty_like(part, dtype=dtype) for part, dtype in zip(grads, dtypes, strict=True)]
        torch._foreach_copy_(wide, list(grads))
        return (grad_x, *wide)
