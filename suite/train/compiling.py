"""torch.compile around the memories of a model.

Memory layers run kernels of their own, and the state of their optimizer changes between reads. Traced, they would break
the graph many times and compile anew every step. So they run outside, and the largest parts of the model without one
are compiled separately. No part breaks its graph. Passes in evaluation mode, whose shapes vary, are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from suite.models.feedforward import SwiGLUPlusMemory
from suite.models.memory_table import MemoryLayer
from suite.models.transformer import Transformer

ONE_KERNEL = (nn.Linear, nn.RMSNorm, nn.LayerNorm)
"""Modules that gain nothing if they are compiled alone."""


def compile_for_training(model: Transformer, distributed: bool) -> Callable[..., Tensor]:
    """Compile the model's training pass and return its `hidden` as training calls it.

    Args:
        model: The model, changed in place unless all of it is compiled at once.
        distributed: Whether FSDP shards the model; its work between the modules that it gathers is not compiled.
    """
    uncompiled: tuple[type, ...] = (MemoryLayer,)
    if distributed:
        from torch.distributed.fsdp import FSDPModule

        uncompiled = (MemoryLayer, FSDPModule)
    elif not model.memory_layers():
        return torch.compile(model.hidden)
    for block in model.layers:
        _compile_parts(block, uncompiled)
    return model.hidden


def _compile_parts(module: nn.Module, uncompiled: tuple[type, ...]) -> None:
    """Compile a module, or its parts if a module within it is not compiled."""
    if isinstance(module, (MemoryLayer, *ONE_KERNEL)):
        return
    if any(isinstance(part, uncompiled) for part in module.modules() if part is not module):
        if isinstance(module, SwiGLUPlusMemory) and not isinstance(module.w1, uncompiled):
            module.feed_forward = _compiled(module, module.feed_forward)  # type: ignore[method-assign]
        for child in module.children():
            _compile_parts(child, uncompiled)
        return
    module.forward = _compiled(module, module.forward)


def _compiled(module: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a method of a module that is compiled in training mode."""
    compiled = torch.compile(plain)

    def method(*args: Any, **options: Any) -> Tensor:
        return (compiled if module.training else plain)(*args, **options)

    return method
