"""Rotary positions in PyTorch: the reference on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BTC: Tensor, cos_TI: Tensor, sin_TI: Tensor, direction: int) -> Tensor:
    """Return the rotated heads in the dtype of `x_BTC`.

    Args:
        x_BTC: Heads side by side, any float dtype.
        cos_TI: Cosines, float32.
        sin_TI: Sines, float32.
        direction: 1 rotates by the angles, -1 by the opposite ones (the gradient).
    """
    first_BTHI, second_BTHI = x_BTC.unflatten(-1, (-1, 2, cos_TI.shape[1])).float().unbind(-2)
    cos_T1I, sin_T1I = cos_TI.unsqueeze(1), direction * sin_TI.unsqueeze(1)
    rotated = (first_BTHI * cos_T1I - second_BTHI * sin_T1I, second_BTHI * cos_T1I + first_BTHI * sin_T1I)
    return torch.stack(rotated, -2).flatten(-3).to(x_BTC.dtype)
