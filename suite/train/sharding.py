"""The model of a cell divided among the processes of a world: the same computation, from outside the model's code.

- Weights outside the tables, experts too: FSDP2, one unit per block; gradients are summed (the loss is divided by the
  targets of all processes), so they are one process's.
- Value tables: by columns inside groups of `memory_parallel` processes, replicated across groups (memory_parallel.py).
- Under bf16, the matrices of attention, feed-forwards and experts are gathered in bf16, which is what autocast makes
  of them anyway, and their gradients are summed in fp32; norms, routers and keys stay fp32, as in one process.
- Statistics over the tokens of a step (batch norms, loads of experts) are those of all processes.

Shapes: N tokens of a process, C channels, R rows of a table, D row width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from suite.errors import UserError
from suite.models.moe import TokenChoice
from suite.models.precision import at_least_fp32
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer, fill, generator_of, reset_statistics
from suite.train.memory_parallel import ColumnTable
from suite.train.parallel import World

ROWS_AT_ONCE = 1 << 16
"""Rows of a table whose initial values are drawn together; a multiple of 16, which the CPU's generator needs to
draw in pieces what it draws at once."""


def build_sharded(config: ModelConfig, vocab_size: int, seed: int, world: World, precision: str) -> Transformer:
    """This process's part of the model with the initial weights that one process would give it.

    Nothing whole is ever held but one parameter outside the tables at a time.
    """
    kind, members = world.device.type, world.parallel.memory_parallel
    every = init_device_mesh(kind, (world.size,), mesh_dim_names=("data",))
    memory = init_device_mesh(kind, (world.size // members, members), mesh_dim_names=("replica", "memory"))
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
        widths = [table.weight.shape[1] for table in model.memory_tables()]
        _divide_tables(model, memory)
        _make_batchnorms_global(model)
    _fully_shard(model, every, precision)
    model.to_empty(device=world.device)
    reset_statistics(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _fill_shard(model, name, parameter, seed)
    for number, (table, width) in enumerate(zip(model.memory_tables(), widths, strict=True)):
        assert isinstance(table, ColumnTable)
        _fill_columns(model, f"tables.{number}.weight", table, width, seed)
    return model


def sum_statistics(model: Transformer, world: World) -> None:
    """Make the loads of experts those of all processes, before `after_step` acts on them."""
    for module in model.modules():
        if isinstance(module, TokenChoice):
            world.sum_(module.load_E)


def as_parts(model: Transformer, state: dict[str, Any]) -> dict[str, Any]:
    """{"model": ..., "optimizer": ...} with a DTensor for every tensor of which this process holds columns only.

    The rest of the model's and the optimizer's tensors are DTensors already, or the same in every process.
    """
    weights, moments = dict(state["model"]), dict(state["optimizer"])
    for number, table in enumerate(model.memory_tables()):
        assert isinstance(table, ColumnTable)
        name = f"tables.{number}.weight"
        weights[name] = table.whole(weights[name])
        if name in moments:
            moments[name] = {kind: table.whole(x) if x.dim() == 2 else x for kind, x in moments[name].items()}
    return {"model": weights, "optimizer": moments}


def _divide_tables(model: Transformer, memory: DeviceMesh) -> None:
    """Put a ColumnTable in the place of every table."""
    parts = {}
    for table in model.memory_tables():
        rows, width = table.weight.shape
        members = memory["memory"].size()
        if width % members:
            given = f"launch: parallel.memory_parallel: got {members}"
            raise UserError(f"{given}, allowed: a divisor of the rows' width ({width})")
        parts[id(table)] = ColumnTable(rows, width, memory)
    model.tables = nn.ModuleList(parts.values())
    for layer in model.memory_layers().values():
        layer.tables = [parts[id(table)] for table in layer.tables]


def _fully_shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    tables = {parameter for table in model.memory_tables() for parameter in table.parameters()}
    narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        if precision == "bf16":
            for module in block.modules():
                if holds_matrices_only(module):
                    fully_shard(module, mesh=mesh, mp_policy=narrow)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=tables)
    # Evaluation calls `hidden` and `head` instead of `forward`; what `head` reads stays gathered after `hidden`.
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # without it a factor of one becomes an op gloo lacks


def holds_matrices_only(module: nn.Module) -> bool:
    """Whether all parameters of the module are weight matrices, which autocast casts to bf16."""
    names = {name for name, _ in module.named_parameters()}
    return bool(names) and names == set(getattr(module, "matrices", ()))


def _fill_shard(model: Transformer, name: str, parameter: DTensor, seed: int) -> None:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    fill(model, name, whole, generator_of(seed, name, whole.device))
    copy_part(parameter, whole)


def _fill_columns(model: Transformer, name: str, table: ColumnTable, width: int, seed: int) -> None:
    generator = generator_of(seed, name, torch.device("cpu"))
    columns = table.columns()
    for part_RD in table.weight.detach().split(ROWS_AT_ONCE):
        whole_RD = torch.empty(len(part_RD), width, dtype=part_RD.dtype)
        fill(model, name, whole_RD, generator)
        part_RD.copy_(whole_RD[:, columns])


@torch.no_grad()
def copy_part(target: DTensor, whole: Tensor) -> None:
    """Copy this process's part of a tensor, which every process has whole, into `target`."""
    whole = whole.to(target.device, target.dtype)
    placed = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(placed.to_local())


class GlobalBatchNorm(nn.BatchNorm1d):
    """A batch norm whose batch in training is that of all processes, which have equally many tokens.

    torch's SyncBatchNorm does the same on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C]."""
        if not self.training:
            return super().forward(input)
        x_NC = input.to(at_least_fp32(input.dtype))
        count = len(x_NC) * dist.get_world_size()
        mean_C = _Sum.apply(x_NC.sum(0)) / count
        variance_C = _Sum.apply((x_NC - mean_C).square().sum(0)) / count
        self._follow(mean_C.detach(), variance_C.detach() * count / (count - 1))
        normed_NC = (x_NC - mean_C) * (variance_C + self.eps).rsqrt()
        return (normed_NC * self.weight + self.bias).to(input.dtype)

    def _follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), self.momentum)


def _make_batchnorms_global(model: Transformer) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm1d:
                setattr(module, name, GlobalBatchNorm(child.num_features, child.eps, child.momentum))


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
