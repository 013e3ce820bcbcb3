"""A learned factor on what a table adds to a model, which may start near zero.

A memory that is put next to the feed-forward of a trained model (a retrofit) then disturbs it little at first; 0.01 is
the start of arXiv 2605.03229. The factor is the start times a gain that is trained from one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from suite.models.attachments import Attachments
from suite.models.cost import Cost, dense_cost
from suite.models.lookup.controls import DenseStandIn
from suite.models.memory_table import MemoryLayer
from suite.models.registry import ModelConfig

OUTPUT_GAIN = "output_gain"
"""Name of the gain in its module; it starts at one in every family."""


def with_output_scale(modules: Attachments, config: ModelConfig) -> Attachments:
    """Scale the outputs of all modules that read tables, and of dense controls in their place.

    Args:
        modules: The modules of a family.
        config: The configuration, whose `output_scale` is the start; None: no factor.

    Returns:
        The same modules.
    """
    start: float | None = getattr(config, "output_scale", None)
    if start is not None:
        for _, module in modules.named():
            for part in module.modules():
                if isinstance(part, MemoryLayer | DenseStandIn):
                    _scale(part, start)
    return modules


def _scale(module: nn.Module, start: float) -> None:
    """Give a module a gain, multiply its output by start * gain, and count the gain."""
    setattr(module, OUTPUT_GAIN, nn.Parameter(torch.empty(1)))
    unscaled: Any = module.cost

    def scaled(_module: nn.Module, _inputs: object, y_BTD: Tensor) -> Tensor:
        assert isinstance(_module.output_gain, Tensor)
        return y_BTD * (start * _module.output_gain).to(y_BTD.dtype)

    def cost() -> Cost:
        return unscaled() + dense_cost("memory_projection", 1, 0)

    module.register_forward_hook(scaled)
    module.cost = cost  # type: ignore[assignment]
