"""The processes that train one cell together, and what they say to each other beside gradients.

How many there are, the environment says, as torchrun and submitit's TorchDistributedEnvironment set it: WORLD_SIZE,
RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without WORLD_SIZE there is one process, and no
process group. How they divide the model is a choice of the launch (`Parallel`), and no part of a cell: it changes
the order of sums, not what is computed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from suite.cells import Cell
from suite.errors import UserError
from suite.identity import Frozen
from suite.models.memory_table import MemoryLayer
from suite.models.transformer import Transformer


class Parallel(Frozen):
    """How a launch divides a cell among its processes; outside the cell's identity."""

    memory_parallel: int = Field(
        default=1, gt=0, description="processes that divide each table's columns: part of a node's, or whole nodes"
    )
    accumulate: int | None = Field(default=None, gt=0, description="micro-batches per step; None: as the cell says")
    checkpoint_activations: bool = Field(default=False, description="compute blocks without memory again in backward")


@dataclass(frozen=True)
class World:
    """This process among those that train together; `World()` is alone. `joined`: there is a process group."""

    rank: int = 0
    size: int = 1
    parallel: Parallel = field(default_factory=Parallel)
    joined: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes records."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64. They never touch the GPU: nobody waits for it."""
        if not self.joined:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        summed: list[float] = sums.tolist()
        return summed

    def any(self, flag: bool) -> bool:
        """Whether it is so for any process: the same answer for all."""
        return self.total(flag)[0] > 0

    def wait(self) -> None:
        """Go on when all are here."""
        self.total(0.0)

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes in place, on its own device."""
        if self.joined:
            dist.all_reduce(tensor)

    def micro_batches(self, cell: Cell) -> int:
        """Micro-batches of a step in each process: the launch's, where it says; their sum is the same."""
        return self.parallel.accumulate or cell.train.accumulate

    def check(self, cell: Cell) -> None:
        """UserError where the processes do not divide the cell's rows, or memory_parallel the processes or a node."""
        rows, micro, members = cell.train.batch_rows, self.micro_batches(cell), self.parallel.memory_parallel
        if rows % (micro * self.size):
            allowed = f"a multiple of accumulate x processes = {micro} x {self.size}"
            raise UserError(f"cell {cell.run_name}: train.batch_rows: got {rows}, allowed: {allowed}")
        if micro != cell.train.accumulate and getattr(cell.model, "query_batchnorm", False):
            allowed = f"the cell's own ({cell.train.accumulate}): its queries are normed over a micro-batch"
            raise UserError(f"launch: parallel.accumulate: got {micro}, allowed: {allowed}")
        if members > 1 and cell.train.value_second_moment == "row":
            allowed = "1 with train.value_second_moment row: its mean squares are of whole rows"
            raise UserError(f"launch: parallel.memory_parallel: got {members}, allowed: {allowed}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.joined else 1
        if self.size % members or (local % members and members % local):
            allowed = f"a divisor of the node's processes ({local}), or whole nodes' that divide all {self.size}"
            raise UserError(f"launch: parallel.memory_parallel: got {members}, allowed: {allowed}")


def recompute_blocks(model: Transformer) -> None:
    """Keep only the inputs of blocks without a memory, and compute the rest again in the backward pass.

    Memories are left out: reading one again would exchange rows between processes again, and count its tokens twice
    in batch statistics. (Loads of experts are counted twice too, of which only the order matters.)
    """
    for block in model.layers:
        if not any(isinstance(module, MemoryLayer) for module in block.modules()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def joined(parallel: Parallel | None = None) -> Iterator[World]:
    """The world the environment describes, its process group (gloo on CPU, NCCL on GPUs) open meanwhile.

    KeyError names what the environment lacks.
    """
    parallel = parallel or Parallel()
    if "WORLD_SIZE" not in os.environ:
        yield World(parallel=parallel)
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # A launcher may show each process its own GPU alone, or all of the node's.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), parallel, joined=True, device=device)
    finally:
        dist.destroy_process_group()
