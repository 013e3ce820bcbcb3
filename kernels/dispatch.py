"""Which implementation of an operator runs: by device, unless overridden."""

from __future__ import annotations

import os

import torch

BACKENDS = ("torch", "triton")
VARIABLE = "KERNELS_BACKEND"


def choose(device: torch.device, override: str | None = None) -> str:
    """`torch` on CPU, `triton` on CUDA; `override`, else the variable KERNELS_BACKEND, decides when given.

    Raises ValueError for a name that is not in BACKENDS. The Triton kernels run on CPU tensors under
    TRITON_INTERPRET=1, which must be set before triton is imported.
    """
    name = override or os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else "torch")
    if name not in BACKENDS:
        raise ValueError(f"kernel backend: got {name!r}, allowed: {', '.join(BACKENDS)}")
    return name
