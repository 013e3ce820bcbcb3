"""The SwiGLU feed-forward and the `dense` family.

Shapes: B rows, T tokens, D model width, F hidden width.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from suite.models import fused
from suite.models.cost import Cost, dense_cost
from suite.models.registry import Family, ModelConfig, register


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (Shazeer 2020, GLU Variants, section 2)."""

    matrices: ClassVar[tuple[str, ...]] = ("w1.weight", "w2.weight", "w3.weight")

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if fused.fuses(x_BTD, (self.w1, self.w3)):
            gate_BTF, up_BTF = fused.together(x_BTD, (self.w1, self.w3)).chunk(2, -1)
            return self.w2(F.silu(gate_BTF) * up_BTF)
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))

    def cost(self) -> Cost:
        """Count three matrices, each applied once per token."""
        weights = 3 * self.dim * self.hidden
        return dense_cost("ffn", weights, weights)


class SwiGLUPlusMemory(SwiGLU):
    """The sum of a feed-forward and a memory. The feed-forward's weights are named as in a dense layer."""

    def __init__(self, dim: int, hidden: int, memory: nn.Module) -> None:
        super().__init__(dim, hidden)
        self.memory = memory

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.feed_forward(x_BTD) + self.memory(x_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """Return the output of the feed-forward alone."""
        return super().forward(x_BTD)

    def cost(self) -> Cost:
        """Count both parts."""
        return super().cost() + cast(Any, self.memory).cost()


def dense_feed_forwards(config: ModelConfig) -> list[nn.Module]:
    """Return a SwiGLU for every layer."""
    size = config.size
    return [SwiGLU(size.dim, size.ffn_hidden) for _ in range(size.layers)]


register(Family("dense", ModelConfig, dense_feed_forwards))
