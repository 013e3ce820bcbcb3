"""Whether tensors are finite."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK = 1 << 26  # elements


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element (of this process' part of a DTensor) is NaN or infinite; memory: one chunk."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return all(bool(chunk.isfinite().all()) for chunk in local.detach().flatten().split(CHUNK))
