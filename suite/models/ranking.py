"""The largest values in an order that leaves nothing open."""

from __future__ import annotations

import torch
from torch import Tensor


def best(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest along the last dimension, best first, the lower position first in ties.

    Values are compared in fp32. torch.topk leaves the order of ties open, so unique integers are sorted instead: the
    fp32 value's bits, made to fall as the value rises, above the position. On a CPU numpy sorts them, whose vectorised
    sort takes a sixth of the time of torch.topk.
    """
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: minus zero ties with zero
    falling = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_not_()
    position = torch.arange(values.shape[-1], device=values.device)
    unique = falling.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(position)
    if unique.device.type == "cpu":
        unique.numpy().sort(axis=-1)
        chosen = unique[..., :count]
    else:
        chosen = unique.topk(count, largest=False).values
    return chosen & 0xFFFFFFFF
