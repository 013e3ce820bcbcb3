"""The dtype of operations that must not run in bf16."""

from __future__ import annotations

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if it is wider, so that a float64 model computes in float64 throughout."""
    return torch.promote_types(dtype, torch.float32)
