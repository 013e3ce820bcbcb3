"""Which implementation of an operator runs: by device and dtype, unless overridden."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from kernels import native

BACKENDS = ("native", "torch", "triton")
VARIABLE = "KERNELS_BACKEND"


def choose(tensor: Tensor, override: str | None = None, native_takes: bool = True) -> str:
    """Return the backend: `native` (C) for float32 on a CPU if there is a C compiler, `triton` on CUDA, else `torch`.

    The Triton kernels run on CPU tensors only under TRITON_INTERPRET=1, set before triton is imported.

    Args:
        tensor: Its device and dtype decide.
        override: A name in BACKENDS; if None, the variable KERNELS_BACKEND.
        native_takes: Whether the operator's C code supports the other arguments.

    Raises:
        ValueError: The name is not in BACKENDS, or is `native` and the C code does not support the arguments.
        native.Unavailable: The name is `native` and the C code cannot be compiled.
    """
    name = override or os.environ.get(VARIABLE)
    native_takes = native_takes and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    if not name:
        if tensor.device.type == "cuda":
            return "triton"
        return "native" if native_takes and native.available() else "torch"
    if name not in BACKENDS:
        raise ValueError(f"kernel backend: got {name!r}, allowed: {', '.join(BACKENDS)}")
    if name == "native":
        if not native_takes:
            allowed = "contiguous torch.float32 on cpu without row_second_moment"
            raise ValueError(f"kernel backend native: got {tensor.dtype} on {tensor.device}, allowed: {allowed}")
        native.library()
    return name


def implementation(operator: str, tensor: Tensor, override: str | None = None, native_takes: bool = True) -> ModuleType:
    """Return the module of an operator for the backend that `choose` returns.

    Args:
        operator: The name of the operator's folder.
        tensor: As for `choose`.
        override: As for `choose`.
        native_takes: As for `choose`.

    Returns:
        kernels.<operator>.reference (for torch), .native or .triton.
    """
    return module(operator, choose(tensor, override, native_takes))


def module(operator: str, backend: str) -> ModuleType:
    """Return the operator's module of that backend."""
    return importlib.import_module(f"kernels.{operator}.{'reference' if backend == 'torch' else backend}")
