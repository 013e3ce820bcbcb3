"""Rotary positions: the Triton kernel equals the reference and the model's own formula, with gradients."""

from __future__ import annotations

import pytest
import torch

from kernels.rotary import rotate
from suite.models.transformer import rotate as rotate_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "half"), [(1, 8), (3, 4), (5, 6)])
def test_triton_equals_the_reference_and_the_model(heads: int, half: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width = heads * 2 * half
    packed, angle = torch.randn(2, 3, width + 5).to(dtype), torch.randn(3, half)
    grad = torch.randn(2, 3, width).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        leaf = packed.clone().requires_grad_()
        rotated = rotate(leaf[..., :width], angle.cos(), angle.sin(), backend)
        rotated.backward(grad)
        results.append((rotated.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    # The model rounds its gradient of the two terms of a sum before it adds them.
    rounding = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    cos, sin = (torch.cat(parts, 1).repeat(1, heads) for parts in ((angle.cos(),) * 2, (-angle.sin(), angle.sin())))
    leaf = packed.clone().requires_grad_()
    whole = rotate_heads(leaf[..., :width], heads, (cos, sin))
    whole.backward(grad)
    torch.testing.assert_close(results[1][0], whole.detach())
    torch.testing.assert_close(results[1][1], leaf.grad, **rounding)
