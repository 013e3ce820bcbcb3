"""Shards the model of a cell over the processes of a world, without changes to model code or to what is computed.

- Weights outside the tables, experts included: FSDP2, one unit per block and one for a module at the input embedding.
  Gradients are summed, since the loss is divided by the number of targets in all processes.
- Value tables: sharded by columns within groups of `memory_parallel` processes and replicated across groups
  (memory_parallel.py).
- With bf16, modules that hold only weight matrices (attention, feed-forward layers, experts) are gathered in bf16, to
  which autocast would cast them anyway, and their gradients are summed in fp32. Norms, routers and keys stay in fp32.
- Statistics over the tokens of a batch (batch norms, expert loads) are summed over all processes.

Shapes: N tokens of a process, C channels or own columns, R rows of a table, D row width.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from suite.errors import UserError
from suite.models.initial_weights import CanonicalIds, Part, fill, reset_statistics, set_canonical_ids
from suite.models.moe import LossBalanced, TokenChoice
from suite.models.precision import at_least_fp32, holds_matrices_only
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer
from suite.train.memory_parallel import ColumnTable
from suite.train.parallel import World

PADDING = 0.01
"""Largest share of padding with which a parameter is sharded by its first dimension where another one needs none."""


def build_sharded(
    config: ModelConfig,
    vocab_size: int,
    seed: int,
    world: World,
    precision: str,
    canonical_ids: CanonicalIds | None = None,
    fresh: Collection[str] | None = None,
) -> Transformer:
    """Build this process's shard of a model, with the initial weights that a single process would draw.

    Args:
        config: The model.
        vocab_size: Number of token ids.
        seed: Seed of the initial weights.
        world: The processes that share the model.
        precision: `train.precision`; with "bf16", weight matrices are gathered in bf16.
        canonical_ids: As for `initial_weights.build`.
        fresh: The parameters to draw; None: all. Others are for the caller to load.

    Returns:
        The model; parameters outside tables are DTensors.

    Raises:
        UserError: `memory_parallel` does not divide the row width.
    """
    kind, members = world.device.type, world.parallel.memory_parallel
    data = init_device_mesh(kind, (world.size,), mesh_dim_names=("data",))
    memory = init_device_mesh(kind, (world.size // members, members), mesh_dim_names=("replica", "memory"))
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
        _shard_tables(model, memory)
        _make_batchnorms_global(model)
    _share_counts(model, world)
    _fully_shard(model, data, precision)
    model.to_empty(device=world.device)
    reset_statistics(model)
    set_canonical_ids(model, canonical_ids)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in as_dtensors(model, {"model": own, "optimizer": {}})["model"].items():
        if fresh is None or name in fresh:
            fill(model, name, seed, parameter.to_local(), parameter.shape, own_part(parameter))
    return model


def sum_statistics(model: Transformer, world: World) -> None:
    """Sum the expert loads over all processes, before `after_step` uses them."""
    for module in model.modules():
        if isinstance(module, TokenChoice):
            world.sum_(module.load_E)


def _share_counts(model: Transformer, world: World) -> None:
    """Count the choices of a balance loss over all processes."""

    def summed(counts_E: Tensor) -> Tensor:
        world.sum_(counts_E)
        return counts_E

    for module in model.modules():
        if isinstance(module, LossBalanced):
            module.share_counts = summed  # type: ignore[method-assign]


def as_dtensors(model: Transformer, state: dict[str, Any]) -> dict[str, Any]:
    """Convert {"model": ..., "optimizer": ...}: every tensor of which this process holds columns becomes a DTensor.

    All other tensors are DTensors already, or equal in every process.
    """
    weights, moments = dict(state["model"]), dict(state["optimizer"])
    for number, table in enumerate(model.memory_tables()):
        assert isinstance(table, ColumnTable)
        name = f"tables.{number}.weight"
        weights[name] = table.as_dtensor(weights[name])
        if name in moments:
            moments[name] = {kind: table.as_dtensor(x) if x.dim() == 2 else x for kind, x in moments[name].items()}
    return {"model": weights, "optimizer": moments}


def _shard_tables(model: Transformer, memory: DeviceMesh) -> None:
    """Replace every table by a ColumnTable."""
    shards = {}
    for table in model.memory_tables():
        width = table.weight.shape[1]
        members = memory["memory"].size()
        if width % members:
            allowed = f"a divisor of the row width ({width})"
            raise UserError(f"launch: parallel.memory_parallel: got {members}, allowed: {allowed}")
        shards[id(table)] = ColumnTable(table, memory)
    model.tables = nn.ModuleList(shards.values())
    for layer in model.memory_layers().values():
        layer.tables = [shards[id(table)] for table in layer.tables]


def _fully_shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    tables = {parameter for table in model.memory_tables() for parameter in table.parameters()}
    place = functools.partial(placement, mesh.size())
    narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [*model.layers] if model.input_embedding is None else [model.input_embedding, *model.layers]
    for unit in units:
        if precision == "bf16":
            for module in unit.modules():
                if holds_matrices_only(module):
                    fully_shard(module, mesh=mesh, mp_policy=narrow, shard_placement_fn=place)
        if not isinstance(unit, FSDPModule):  # a unit of weight matrices only is sharded already
            fully_shard(unit, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, ignored_params=tables, shard_placement_fn=place)
    # Evaluation calls `hidden` and `head` instead of `forward`; the weights of `head` stay gathered after `hidden`.
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # otherwise the divide factor needs an op that gloo lacks


def placement(processes: int, parameter: Tensor) -> Shard:
    """Return the dimension by which a parameter is sharded.

    It is the first one, which FSDP pads to a multiple of the processes, unless the padding is noticeable and another
    dimension is divisible. Stacks of few experts or heads would be padded to many times their size.
    """
    first = parameter.shape[0]
    if -first % processes <= PADDING * first:
        return Shard(0)
    return Shard(next((dim for dim, size in enumerate(parameter.shape) if size % processes == 0), 0))


def own_part(tensor: DTensor) -> Part:
    """Return the part of a tensor, sharded by one dimension or none, that this process holds."""
    part = Part(0, 0, tensor.shape[0])
    for mesh_dim, placed in enumerate(tensor.placements):
        if isinstance(placed, Shard):
            size, processes = tensor.shape[placed.dim], tensor.device_mesh.size(mesh_dim)
            chunk, rank = -(-size // processes), tensor.device_mesh.get_local_rank(mesh_dim)
            part = Part(placed.dim, min(rank * chunk, size), min((rank + 1) * chunk, size))
    return part


@torch.no_grad()
def copy_shard(target: DTensor, whole: Tensor) -> None:
    """Copy this process's shard of a tensor that every process can read whole into `target`."""
    target.to_local().copy_(own_part(target).of(whole))


class GlobalBatchNorm(nn.BatchNorm1d):
    """A batch norm over the training batch of all processes, which have equally many tokens.

    torch's SyncBatchNorm supports GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, [N, C]."""
        if not self.training:
            return super().forward(input)
        x_NC = input.to(at_least_fp32(input.dtype))
        count = len(x_NC) * dist.get_world_size()
        mean_C = _Sum.apply(x_NC.sum(0)) / count
        variance_C = _Sum.apply((x_NC - mean_C).square().sum(0)) / count
        self._update_statistics(mean_C.detach(), variance_C.detach() * count / (count - 1))
        normed_NC = (x_NC - mean_C) * (variance_C + self.eps).rsqrt()
        return (normed_NC * self.weight + self.bias).to(input.dtype)

    def _update_statistics(self, mean_C: Tensor, variance_C: Tensor) -> None:
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
    """The sum over all processes; its gradient is summed as well."""

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
