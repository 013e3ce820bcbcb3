"""Rotary positions in PyTorch: the reference on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BTC: Tensor, cos_TI: Tensor, sin_TI: Tensor, direction: int) -> Tensor:
    """Rotate by the angles (`direction` 1) or by the opposite ones (-1); see kernels.rotary.rotate."""
    first_BTHI, second_BTHI = x_BTC.unflatten(-1, (-1, 2, cos_TI.shape[1])).float().unbind(-2)
    cos_T1I, sin_T1I = cos_TI.unsqueeze(1), direction * sin_TI.unsqueeze(1)
    rotated = (first_BTHI * cos_T1I - second_BTHI * sin_T1I, second_BTHI * cos_T1I + first_BTHI * sin_T1I)
    return torch.stack(rotated, -2).flatten(-3).to(x_BTC.dtype)
