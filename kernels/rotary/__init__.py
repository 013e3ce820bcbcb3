"""Rotary positions (Su et al. 2021, arXiv 2104.09864, equation 34): one kernel for queries and keys together.

    rotated_BTC = rotate(x_BTC, cos_TI, sin_TI)

Each head of 2*I columns is rotated: the pair (i, i + I) by the angle of (position, i). Sums are in float32. The
gradient is the rotation by the opposite angle, and needs no saved input.

Shapes: B rows, T positions, C columns: heads x 2*I, I pairs of a head.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels import dispatch

__all__ = ["rotate"]


def rotate(x_BTC: Tensor, cos_TI: Tensor, sin_TI: Tensor, backend: str | None = None) -> Tensor:
    """Return the rotated heads, contiguous and in the dtype of `x_BTC`.

    Args:
        x_BTC: Heads side by side, any float dtype; the columns of a row lie side by side in memory.
        cos_TI: Cosines, float32, columns side by side in memory.
        sin_TI: Sines, laid out as the cosines.
        backend: Overrides kernels.dispatch.
    """
    ops = dispatch.implementation("rotary", x_BTC, backend, native_takes=False)
    rotated: Tensor = _Rotate.apply(x_BTC, cos_TI, sin_TI, ops)
    return rotated


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, cos_TI: Tensor, sin_TI: Tensor, ops: ModuleType) -> Tensor:
        ctx.cos, ctx.sin, ctx.ops = cos_TI, sin_TI, ops
        return ops.rotate(x_BTC, cos_TI, sin_TI, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ops.rotate(grad_BTC, ctx.cos, ctx.sin, -1), None, None, None
