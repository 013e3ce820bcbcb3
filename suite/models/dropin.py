"""The memory layer as a replacement for a feed-forward in any other PyTorch model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suite.models.memory_table import MemoryTable
from suite.models.product_key import PAPER_K_DIM, Addressing, ProductKeyMemory


class MemoryFeedForward(nn.Module):
    """Memory+ as a stand-alone module: `forward(x_BTD) -> y_BTD`, with its own table or one of another module.

        llama.model.layers[4].mlp = first = MemoryFeedForward(dim, half_keys=1024)
        llama.model.layers[8].mlp = MemoryFeedForward(dim, half_keys=1024, table=first.table)

    Give `table.parameters()` to the optimizer as a group with its own learning rate (ten times that of the other
    parameters in the released template). A shared table belongs to the module that created it, and is saved and moved
    with that module. Without `swilu` it is the plain product-key memory. Initial weights are drawn with `seed`.

    Args:
        dim: Model width.
        half_keys: Side n of the table, which has n*n rows.
        top_k: Rows read per head.
        heads: Memory heads.
        k_dim: Width of a key, both halves; None: dim/2, and at most 256 without `swilu`.
        qk_norm: Whether half queries and half keys are RMS-normed.
        swilu: Whether the output is gated and projected as in Memory+.
        table: The table of another module; None: a new one.
        seed: Seed of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        half_keys: int,
        top_k: int = 32,
        heads: int = 4,
        k_dim: int | None = None,
        qk_norm: bool = False,
        swilu: bool = True,
        table: MemoryTable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if half_keys < top_k:
            raise ValueError(f"half_keys: got {half_keys}, allowed: at least top_k ({top_k})")
        shared = table is not None
        values = MemoryTable(half_keys**2, dim) if table is None else table
        if values.weight.shape[0] != half_keys**2:
            raise ValueError(f"table: got {values.weight.shape[0]} rows, allowed: half_keys squared ({half_keys**2})")
        if not shared:
            self.table = values
        width = k_dim or (dim // 2 if swilu else min(PAPER_K_DIM, dim // 2))
        self.memory = ProductKeyMemory(values, dim, Addressing(half_keys, heads, top_k, width, qk_norm), swilu=swilu)
        self._initialise(seed, own_table=not shared)

    @torch.no_grad()
    def _initialise(self, seed: int, own_table: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.memory.named_parameters():
            self.memory.initial_values(name, parameter.shape).fill_(parameter, generator)
        if own_table:
            self.table.initial_values("weight", self.table.weight.shape).fill_(self.table.weight, generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.memory(x_BTD)
