"""Products of one input with several matrices at once, on a GPU under autocast.

Autocast casts every matrix, and the input anew for every product. Here the matrices are cast by one kernel into one
matrix, the input is cast once, and one product serves all; so do their gradients. Elsewhere the layers run as they are.

Shapes: D input width, C output columns, E matrices of a stack, S inputs grouped by matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def casts(x: Tensor, *weights: Tensor) -> bool:
    """Return whether autocast would cast these weights on a GPU; a compiler fuses casts itself.

    FSDP gathers weights in autocast's dtype and frees them after the forward pass, and a copy would be retained.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.is_autocast_enabled("cuda"):
        return False
    return all(weight.dtype != torch.get_autocast_dtype("cuda") for weight in weights)


def fuses(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Return whether `together` takes the weights of these layers: plain ones without biases that would be cast."""
    if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
        return False
    return casts(x, *(cast(nn.Linear, linear).weight for linear in linears))


def together(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """Return the outputs of the layers side by side, [..., C], in autocast's dtype; `fuses` must hold."""
    return products(x, *(cast(nn.Linear, linear).weight for linear in linears))


def products(x: Tensor, *weights: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """Return x @ weight.mT for all weights side by side, in autocast's dtype; `casts` must hold.

    Args:
        x: Input [..., D], or [E, L, D] for stacks of E matrices; [S, D] with `ends_E`.
        weights: Matrices [C, D], or stacks of them [E, C, D].
        ends_E: Where the inputs of each matrix of a stack end, int32; None: x has an axis for the stack.

    Returns:
        [..., sum of all C].
    """
    outputs: Tensor = _Products.apply(x, ends_E, *weights)
    return outputs


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends_E: Tensor | None, *weights: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        ctx.dtypes, ctx.columns = (x.dtype, [weight.dtype for weight in weights]), [w.shape[-2] for w in weights]
        shape = (*weights[0].shape[:-2], sum(ctx.columns), x.shape[-1])
        matrix = weights[0].new_empty(shape, dtype=dtype)
        torch._foreach_copy_(list(matrix.split(ctx.columns, -2)), [weight.detach() for weight in weights])
        x = x.to(dtype)
        ctx.save_for_backward(x, matrix, ends_E)
        return _product(x, matrix.mT, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, ends_E = ctx.saved_tensors
        x_dtype, dtypes = ctx.dtypes
        grad_x = _product(grad, matrix, ends_E).to(x_dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return (grad_x, None, *(None for _ in dtypes))
        if matrix.dim() == 2:
            grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        grads = _product(grad.mT, x, ends_E).split(ctx.columns, -2)
        wide = [torch.empty_like(part, dtype=dtype) for part, dtype in zip(grads, dtypes, strict=True)]
        torch._foreach_copy_(wide, list(grads))
        return (grad_x, None, *wide)


def _product(one: Tensor, other: Tensor, ends_E: Tensor | None) -> Tensor:
    """Return the product; the groups that end at `ends_E` each have a matrix, or yield one."""
    return one @ other if ends_E is None else F.grouped_mm(one, other, offs=ends_E)
