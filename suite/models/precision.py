"""The dtype of operations that must not run in bf16, and whether values are finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 1 << 26
"""Elements that `is_finite` looks at together."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if it is wider, so that a float64 model computes in float64 throughout."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensor_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products of such tensors on a device: autocast may choose it."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return tensor_dtype


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element (of this process' part of a DTensor) is NaN or infinite; memory: one chunk."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return all(bool(chunk.isfinite().all()) for chunk in local.detach().flatten().split(CHUNK))


def holds_matrices_only(module: nn.Module) -> bool:
    """Return whether all parameters of the module are weight matrices, which autocast casts to bf16."""
    names = {name for name, _ in module.named_parameters()}
    return bool(names) and names == set(getattr(module, "matrices", ()))
