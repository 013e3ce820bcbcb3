"""The resources of a cell's jobs: the smallest mesh of its plan, or those of the profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.identity import Frozen
from suite.launch.checks.memory import Launch, MemoryCheck
from suite.launch.slurm.profile import Profile
from suite.models.accounting import account_of, meta_model
from suite.plan import plan as planning
from suite.plan.gpus import USABLE, gpu_named
from suite.train.parallel import Parallel

WEIGHTS = 0.9
"""The fraction of a GPU's usable memory that the weights of a model scored on it may take."""


class Shape(Frozen):
    """The resources of one job: equal nodes, each with one process per GPU, or `tasks` processes without GPUs."""

    nodes: int = 1
    tasks: int = Field(default=1, description="processes on each node")
    gpus: int = Field(default=0, description="GPUs on each node")
    cpus: int = Field(default=1, description="cores of each process")
    mem_gb: float | None = Field(default=None, description="memory of each node")
    parallel: Parallel = Field(default_factory=Parallel)


def shapes(grid: Grid, cells: Sequence[Cell], profile: Profile, cache: Path) -> list[Shape]:
    """Return the resources of the training of each cell.

    Args:
        grid: The grid.
        cells: Cells of the grid.
        profile: The cluster's profile.
        cache: The folder of prepared corpora, for the plan.

    Raises:
        UserError: A cell does not fit on any mesh of the cluster.
    """
    per_node = profile.gpus_per_node
    if per_node:
        gpu_named(profile.gpu, "profile: gpu")
    if not per_node:
        return [_of_cpus(profile, cell, _parallel(profile, 1)) for cell in cells]
    if profile.gpus is not None:
        return [_of_gpus(profile, cell, profile.gpus, _parallel(profile, 1)) for cell in cells]
    assumptions = planning.Assumptions(replace(gpu_named(profile.gpu), per_node=per_node))
    plans = planning.plan(replace(grid, cells=tuple(cells)), assumptions, cache)
    return [_planned(profile, plan) for plan in plans]


def memory_check(profile: Profile) -> MemoryCheck | None:
    """Return the check of cells that are trained on CPUs in the memory that the profile requests, if it does."""
    if profile.gpus_per_node or profile.mem_gb is None:
        return None
    shared_by = Launch(profile.processes, _parallel(profile, 1))
    return MemoryCheck(profile.mem_gb * 2**30, "a job of the profile (mem_gb)", shared_by=shared_by)


def scoring_shape(profile: Profile, cell: Cell, training: Shape, cache: Path) -> Shape:
    """Return the resources of an evaluation: one process, with one GPU if nodes have any, and its share of a node's
    memory.

    A model whose weights do not fit on one GPU is scored with the resources of its training; `score_together` of the
    profile overrides this.

    Args:
        profile: The cluster's profile.
        cell: The cell.
        training: The resources of its training.
        cache: The folder of prepared corpora, for the size of the vocabulary.
    """
    as_trained = profile.score_together
    if as_trained is None:
        as_trained = training.gpus * training.nodes > 1 and not _fits_one(profile, cell, cache)
    if as_trained:
        return training
    gpus = min(1, profile.gpus_per_node)
    return Shape(gpus=gpus, cpus=_cpus(profile, cell), mem_gb=_memory(profile, gpus))


def _fits_one(profile: Profile, cell: Cell, cache: Path) -> bool:
    """Return whether the weights, in fp32, leave enough memory of a GPU for scoring."""
    vocabulary = planning.data_size(cell, cache).vocabulary
    weights = 4 * account_of(meta_model(cell.model, vocabulary), cell.data.seq_len).params_total
    return weights <= WEIGHTS * USABLE * gpu_named(profile.gpu).memory


def _parallel(profile: Profile, table_shards: int, accumulate: int | None = None) -> Parallel:
    return Parallel(
        memory_parallel=profile.memory_parallel or table_shards,
        accumulate=accumulate,
        checkpoint_activations=profile.checkpoint_activations,
    )


def _planned(profile: Profile, plan: planning.CellPlan) -> Shape:
    mesh = plan.mesh
    if mesh is None:
        raise UserError(f"cell {plan.cell.run_name}: does not fit: {plan.why}, allowed: {plan.would_fit}")
    return _of_gpus(profile, plan.cell, mesh.gpus, _parallel(profile, mesh.table_shards, mesh.accumulate))


def _of_gpus(profile: Profile, cell: Cell, gpus: int, parallel: Parallel) -> Shape:
    per_node = min(gpus, profile.gpus_per_node)
    if gpus % per_node:
        raise UserError(f"profile: gpus: got {gpus}, allowed: up to {per_node}, or a multiple of it")
    return Shape(
        nodes=gpus // per_node,
        tasks=per_node,
        gpus=per_node,
        cpus=_cpus(profile, cell),
        mem_gb=_memory(profile, per_node),
        parallel=parallel,
    )


def _memory(profile: Profile, gpus: int) -> float | None:
    """Return the memory of a job on a node, in proportion to its GPUs."""
    if profile.mem_gb is None or not profile.gpus_per_node:
        return profile.mem_gb
    return profile.mem_gb * gpus / profile.gpus_per_node


def _of_cpus(profile: Profile, cell: Cell, parallel: Parallel) -> Shape:
    return Shape(tasks=profile.processes, cpus=_cpus(profile, cell), mem_gb=profile.mem_gb, parallel=parallel)


def _cpus(profile: Profile, cell: Cell) -> int:
    return profile.cpus_per_task or cell.threads
