"""What must not be computed in bf16."""

from __future__ import annotations

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32, or `dtype` where that is wider: a model in float64 is one throughout."""
    return torch.promote_types(dtype, torch.float32)
