"""The memory behaviour of training's GPU kernels, on any device: fused attention, and bf16 products under autocast.

Shapes: B rows, T tokens per row, H heads, G key-value heads, K head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Precision = Literal["fp32", "bf16"]


class Kernels(TorchFunctionMode):
    """A context in which attention saves what fused kernels save and, for bf16, products run as under autocast.

    Args:
        precision: The dtype of matrix products.
        copies: The bf16 copies of parameters, by the id of the parameter.
    """

    PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)

    def __init__(self, precision: Precision, copies: dict[int, Tensor]) -> None:
        super().__init__()
        self.is_bf16, self.copies = precision == "bf16", copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*(self._cast(x) for x in args), kwargs.get("attn_mask"))
        if self.is_bf16 and func in self.PRODUCTS:
            args, kwargs = tuple(self._cast(x) for x in args), {key: self._cast(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        """Return a floating-point tensor in the dtype of products; in bf16, of a parameter or its view, the existing
        copy."""
        if not self.is_bf16 or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        whole = x if x._base is None else x._base
        copy = self.copies.get(id(whole))
        return x.bfloat16() if copy is None else copy.as_strided(x.shape, x.stride(), x.storage_offset())


class _FusedAttention(torch.autograd.Function):
    """Allocates and saves the tensors of fused attention, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, bias: Tensor | None) -> Tensor:
        # The output has the queries' layout, token by token, so that joining the heads needs no copy.
        y_BHTK = torch.empty_like(q_BHTK.transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, y_BHTK, q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32))
        return y_BHTK

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BGTK, v_BGTK, *_ = ctx.saved_tensors
        return torch.empty_like(q_BHTK), torch.empty_like(k_BGTK), torch.empty_like(v_BGTK), None
