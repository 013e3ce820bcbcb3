"""The distributed process context, and collectives other than those of gradients.

The world is read from the environment, as set by torchrun and submitit's TorchDistributedEnvironment: WORLD_SIZE, RANK,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without WORLD_SIZE there is one process and no process group.
How the processes shard the model is an option of the launch (`Parallel`), not of a cell: it changes the order of sums,
not what is computed.
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
    """How a launch distributes a cell over its processes; outside the cell's identity."""

    memory_parallel: int = Field(
        default=1, gt=0, description="processes that share the columns of each table: part of a node, or whole nodes"
    )
    accumulate: int | None = Field(default=None, gt=0, description="micro-batches per step; None: train.accumulate")
    checkpoint_activations: bool = Field(
        default=False, description="recompute blocks without a memory in the backward pass"
    )


@dataclass(frozen=True)
class World:
    """This process and those that train with it. `World()` is one process; `distributed`: a process group exists."""

    rank: int = 0
    size: int = 1
    parallel: Parallel = field(default_factory=Parallel)
    distributed: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the records (rank 0)."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Return each value summed over all processes in float64, on the CPU, so that no device synchronises."""
        if not self.distributed:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        summed: list[float] = sums.tolist()
        return summed

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process; all processes get the same answer."""
        return self.total(flag)[0] > 0

    def wait(self) -> None:
        """Wait for all processes."""
        self.total(0.0)

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes in place, on its own device."""
        if self.distributed:
            dist.all_reduce(tensor)

    def micro_batches(self, cell: Cell) -> int:
        """Return the micro-batches per step: the launch's if set, else the cell's. The summed gradient is the same."""
        return self.parallel.accumulate or cell.train.accumulate

    def check(self, cell: Cell) -> None:
        """Raise UserError if the cell cannot be trained by this many processes, distributed this way."""
        rows, micro, members = cell.train.batch_rows, self.micro_batches(cell), self.parallel.memory_parallel
        if rows % (micro * self.size):
            allowed = f"a multiple of accumulate x processes = {micro} x {self.size}"
            raise UserError(f"cell {cell.run_name}: train.batch_rows: got {rows}, allowed: {allowed}")
        if micro != cell.train.accumulate and cell.model.batch_statistics:
            allowed = f"{cell.train.accumulate} as in the cell, whose batch statistics depend on it"
            raise UserError(f"launch: parallel.accumulate: got {micro}, allowed: {allowed}")
        if self.distributed and cell.train.table_device == "host":
            raise UserError(
                f"cell {cell.run_name}: train.table_device: got 'host', allowed: model where several processes train"
                " together"
            )
        if self.distributed and cell.train.probe_average is not None:
            raise UserError(
                f"cell {cell.run_name}: train.probe_average: got {cell.train.probe_average}, allowed: None where"
                " several processes train together"
            )
        if members > 1 and cell.train.value_second_moment == "row":
            allowed = "1 with train.value_second_moment row, which needs whole rows"
            raise UserError(f"launch: parallel.memory_parallel: got {members}, allowed: {allowed}")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.distributed else 1
        if self.size % members or (local % members and members % local):
            allowed = f"a divisor of the node's processes ({local}), or whole nodes that divide all {self.size}"
            raise UserError(f"launch: parallel.memory_parallel: got {members}, allowed: {allowed}")


def recompute_blocks(model: Transformer) -> None:
    """Recompute the activations of blocks without a memory in the backward pass.

    Blocks with a memory are excluded: recomputing one would exchange rows between processes again and count its tokens
    twice in batch statistics. (Expert loads are counted twice as well, but only their order matters.)
    """
    for block in model.layers:
        if not any(isinstance(module, MemoryLayer) for module in block.modules()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def process_group(parallel: Parallel | None = None) -> Iterator[World]:
    """Yield the world of the environment, with its process group (gloo on CPUs, NCCL on GPUs) open inside the context.

    Raises:
        KeyError: The environment sets WORLD_SIZE but lacks the named variable.
    """
    parallel = parallel or Parallel()
    if "WORLD_SIZE" not in os.environ:
        yield World(parallel=parallel)
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # A launcher may expose all GPUs of the node to each process, or only its own.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), parallel, distributed=True, device=device)
    finally:
        dist.destroy_process_group()
