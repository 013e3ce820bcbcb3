"""What a grid would cost before anything runs: parameters, FLOPs, memory per GPU, GPU-hours, partners.

Everything is counted on the meta device: no data, no GPU and no memory for tables is needed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from suite.cells import Cell, variants
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.grids import Grid
from suite.models.accounting import Account, account_of, cost_of, meta_model, needs_values
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer
from suite.plan.activation_memory import Seen
from suite.plan.gpus import GPUS, USABLE, UTILISATION, Gpu
from suite.plan.mesh import MICRO_ROWS, Mesh, Unfit, divided, smallest_mesh
from suite.plan.step_memory import STATE_BYTES
from suite.plan.table_state import table_state
from suite.train.loop import total_steps

EQUAL = 0.05
"""Largest deviation of a ratio from 1 that is still called equal."""
MEASURES = {"flops": "macs_total", "params": "params_total", "bytes": "bytes_per_token"}
"""What cells are matched in -> the account's name of it."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted: the GPU, how many nodes there are (None: any), utilisation, dollars an hour."""

    gpu: Gpu
    nodes: int | None = None
    utilisation: float = UTILISATION
    price: float = 0.0


@dataclass(frozen=True)
class CellPlan:
    """The plan of one cell. Bytes, FLOPs, GPU-hours; `mesh` None: it fits nowhere, `why` and `would_fit` say more.

    `dense` is the account of the dense model of the base's feed-forward width, be it in the grid or not. `variant`:
    what tells the cell from others of its family and base.
    """

    cell: Cell
    account: Account
    dense: Account
    tokens: int
    steps: int
    total_flops: float
    gpu_hours: float
    mesh: Mesh | None
    why: str | None
    would_fit: str | None
    table_bytes_per_step: float
    link_bytes_per_step: float
    table_hours: float
    variant: dict[str, Any] = field(default_factory=dict)
    partners: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratio(self, measure: str, other: Account) -> float:
        """Of a measure of this cell's account to another's."""
        return float(getattr(self.account, measure) / getattr(other, measure))

    @property
    def days(self) -> float | None:
        """How long the cell takes on its mesh; None where it fits nowhere."""
        return None if self.mesh is None else self.gpu_hours / self.mesh.gpus / 24

    def to_json(self, price: float) -> dict[str, Any]:
        """The cell's entry of `suite plan --json`."""
        counted, mesh = self.account, self.mesh
        return {
            "cell": self.cell.hash8,
            "run": self.cell.run_name,
            "family": self.cell.model.family,
            "base": self.cell.model.base,
            "half_keys": getattr(self.cell.model, "half_keys", None),
            "variant": self.variant,
            "params": {
                "total": counted.params_total,
                "active": counted.params_active,
                "memory": counted.params_memory,
                "embedding": counted.params_embedding,
            },
            "flops_per_token": {"train": counted.flops_per_token, "forward": counted.flops_per_token_forward},
            "bytes_per_token": counted.bytes_per_token,
            "tokens": self.tokens,
            "memory_per_gpu": None if mesh is None else round(mesh.memory.peak),
            "gpus": None if mesh is None else mesh.gpus,
            "gpu_hours": self.gpu_hours,
            "days": self.days,
            "steps": self.steps,
            "total_flops": self.total_flops,
            "cost": self.gpu_hours * price,
            "memory": None if mesh is None else asdict(mesh.memory) | {"activations": mesh.memory.activations},
            "mesh": None if mesh is None else {k: v for k, v in asdict(mesh).items() if k != "memory"},
            "fits": mesh is not None,
            "why": self.why,
            "would_fit": self.would_fit,
            "table_bytes_per_step": self.table_bytes_per_step,
            "link_bytes_per_step": self.link_bytes_per_step,
            "table_hours": self.table_hours,
            "ratio_to_dense": {name: self.ratio(measure, self.dense) for name, measure in MEASURES.items()},
            "partners": self.partners,
        }


def plan(grid: Grid, assumed: Assumptions, cache: Path) -> list[CellPlan]:
    """The plans of a grid's cells, in its order; `cache` is where corpora are prepared, should one be needed.

    Raises UserError for a corpus that is needed and cannot be read.
    """
    seen = Seen()
    read: dict[tuple[object, ...], Reading] = {}
    models: dict[tuple[str, int, int], tuple[Transformer, Account]] = {}

    def model_of(cell: Cell, config: ModelConfig, vocabulary: int) -> tuple[Transformer, Account]:
        key = config.model_dump_json(), vocabulary, cell.data.seq_len
        if key not in models:
            model = _model(cell, config, vocabulary)
            models[key] = model, account_of(model, cell.data.seq_len)
        return models[key]

    plans = []
    for cell in grid.cells:
        key = cell.data.model_dump_json(), cell.train.model_dump_json(), cell.seed, cell.model.size.vocab_size
        if key not in read:
            read[key] = reading(cell, cache)
        model, counted = model_of(cell, cell.model, read[key].vocabulary)
        _, dense = model_of(cell, cell.model.dense(), read[key].vocabulary)
        plans.append(_plan(cell, read[key].tokens, model, counted, dense, assumed, seen))
    apart = variants(grid.cells)
    return [replace(one, variant=apart[one.cell.run_name], partners=partners(one, plans)) for one in plans]


def document(grid: Grid, plans: list[CellPlan], assumed: Assumptions) -> dict[str, Any]:
    """What `suite plan --json` prints and results/plans/ keeps."""
    return {
        "grid": grid.name,
        "assumed": asdict(assumed) | {"usable_memory": USABLE, "micro_rows": list(MICRO_ROWS)},
        "totals": {
            "cells": len(plans),
            "fit": sum(one.mesh is not None for one in plans),
            "total_flops": sum(one.total_flops for one in plans),
            "gpu_hours": sum(one.gpu_hours for one in plans),
            "cost": sum(one.gpu_hours for one in plans) * assumed.price,
        },
        "cells": [one.to_json(assumed.price) for one in plans],
    }


def assumptions(gpu: str, nodes: int | None, utilisation: float, price: float | None) -> Assumptions:
    """The assumptions a command line asks for. Raises UserError for an unknown GPU or a price that is no number."""
    if gpu not in GPUS:
        raise UserError(f"--gpu: got {gpu!r}, allowed: {', '.join(GPUS)}")
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise UserError(f"--price: got {price}, allowed: dollars an hour, 0 or more")
    return Assumptions(GPUS[gpu], nodes, utilisation, GPUS[gpu].price if price is None else price)


@dataclass(frozen=True)
class Reading:
    """What a plan must know of a cell's data: entries of the vocabulary and training tokens, padding included."""

    vocabulary: int
    tokens: int


def reading(cell: Cell, cache: Path) -> Reading:
    """From the configuration where it says enough, else from the prepared corpus (a world takes seconds).

    A tokenizer's file is not opened: its vocabulary is taken to be the base's own. Raises UserError where a corpus
    is needed and is not there.
    """
    tokenizer = cell.data.tokenizer
    entries = {"bpe": tokenizer.vocab_size, "file": cell.model.size.vocab_size or None}.get(tokenizer.kind)
    if entries is not None and cell.train.tokens is not None:
        return Reading(entries, cell.train.tokens)
    corpus = prepare(cell.data, cache)
    steps = total_steps(cell.train, corpus.loader(cell.seed, cell.train.batch_rows), cell.data.seq_len)
    return Reading(corpus.vocab_size, steps * cell.train.batch_rows * cell.data.seq_len)


def _plan(
    cell: Cell, tokens: int, model: Transformer, counted: Account, dense: Account, assumed: Assumptions, seen: Seen
) -> CellPlan:
    gpu = assumed.gpu
    steps = max(1, tokens // (cell.train.batch_rows * cell.data.seq_len))
    total = tokens * counted.flops_per_token
    try:
        found = smallest_mesh(cell, model, counted, gpu, assumed.nodes, seen)
    except RuntimeError as error:
        if not needs_values(error):
            raise
        found = Unfit(f"what it needs cannot be counted without values ({error})"[:200], "unknown")
    mesh, unfit = (None, found) if isinstance(found, Unfit) else (found, None)
    traffic = table_bytes(model, cell)
    return CellPlan(
        cell=cell,
        account=counted,
        dense=dense,
        tokens=tokens,
        steps=steps,
        total_flops=total,
        gpu_hours=total / (gpu.flops * assumed.utilisation) / 3600,
        mesh=mesh,
        why=None if unfit is None else unfit.why,
        would_fit=None if unfit is None else unfit.would_fit,
        table_bytes_per_step=traffic,
        link_bytes_per_step=0.0 if mesh is None else link_bytes(model, counted, cell, mesh),
        table_hours=steps * traffic / gpu.bandwidth / 3600,
    )


def _model(cell: Cell, config: ModelConfig, vocabulary: int) -> Transformer:
    """A cell's model, or its dense one, on the meta device. Raises UserError for sizes that no tensor can have."""
    try:
        return meta_model(config, vocabulary)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise UserError(f"cell {cell.run_name}: model: got a tensor of 2^63 bytes or more, allowed: fewer") from None


def table_bytes(model: Transformer, cell: Cell) -> float:
    """Bytes of tables that a step moves in the memory of all GPUs together.

    Forward: every row read. Backward: rows read again for the gradients of scores, gradient rows (fp32) read and
    written. Optimizer, on the rows that have gradients: weights, moments and fp32 copies read and written, gradients
    read and cleared.
    """
    tokens, state = cell.train.batch_rows * cell.data.seq_len, table_state(cell.train)
    lookup = 2 * state.value + 2 * STATE_BYTES
    update = 2 * (state.value + state.moments) + 2 * STATE_BYTES
    moved = 0.0
    for table, reads in _reads_per_token(model):
        rows, width = table.weight.shape
        moved += width * (lookup * tokens * reads + update * _touched(cell, rows, tokens * reads))
    return moved


def link_bytes(model: Transformer, counted: Account, cell: Cell, mesh: Mesh) -> float:
    """Bytes a GPU sends in a step.

    Divided weights: gathered in every forward and backward, gradients reduced once per micro-batch (bf16 weights
    where products are bf16, fp32 gradients). Tables: each read gathers its group's indices and weights (8 bytes a
    row) and sends back columns, forward and backward; replicas of a shard exchange the rows that have gradients.
    """
    gpus, shards = mesh.gpus, mesh.table_shards
    if gpus == 1:
        return 0.0
    weight_bytes = 2 if cell.train.precision == "bf16" else 4
    sent = mesh.accumulate * (gpus - 1) / gpus * divided(model, counted)[0] * (2 * weight_bytes + 4)
    tokens, replicas = mesh.micro_rows * mesh.accumulate * cell.data.seq_len, gpus // shards
    for layer in model.memory_layers().values():
        columns = sum(table.weight.shape[1] for table in layer.tables)
        rows = _rows_read(layer) * len(layer.tables)
        sent += tokens * (shards - 1) * (rows * 8 + 2 * columns * 4 / shards)
    for table, reads in _reads_per_token(model):
        rows, width = table.weight.shape
        touched = _touched(cell, rows, tokens * shards * reads)
        sent += (replicas - 1) * 4 * touched * width / shards
    return sent


def _reads_per_token(model: Transformer) -> list[tuple[MemoryTable, float]]:
    """Each table with the rows a token reads of it, in all layers together."""
    layers = model.memory_layers().values()
    return [
        (table, sum(_rows_read(layer) for layer in layers for read in layer.tables if read is table))
        for table in model.memory_tables()
    ]


def _rows_read(layer: MemoryLayer) -> float:
    """Rows a token reads of each of the layer's tables."""
    widths = sum(table.weight.shape[1] for table in layer.tables)
    return cost_of("memory", layer).read.get("memory_values", 0) / widths


def _touched(cell: Cell, rows: int, lookups: float) -> float:
    """Rows with a gradient: those that lookups spread evenly reach, or all of them where gradients are dense."""
    return rows * -math.expm1(-lookups / rows) if cell.train.table_optimizer != "dense" else rows


def partners(one: CellPlan, plans: list[CellPlan]) -> dict[str, dict[str, Any]]:
    """The other cell nearest in FLOPs, in parameters and in bytes per token, and the ratio of this cell to it.

    Among cells of the same base and budget; dense ones where there are any, for parameters all families.
    """
    others = [
        other
        for other in plans
        if other is not one
        and other.cell.model.base == one.cell.model.base
        and other.tokens == one.tokens
        and other.cell.model.family != one.cell.model.family
    ]
    found: dict[str, dict[str, Any]] = {}
    for name, measure in MEASURES.items():
        dense = [other for other in others if other.cell.model.family == "dense"]
        candidates = others if name == "params" or not dense else dense
        ratios = [one.ratio(measure, other.account) for other in candidates]
        if ratios:
            index = min(range(len(ratios)), key=lambda i: max(ratios[i], 1 / ratios[i]))
            found[name] = {
                "run": candidates[index].cell.run_name,
                "ratio": ratios[index],
                "equal": abs(ratios[index] - 1) <= EQUAL,
            }
    return found
