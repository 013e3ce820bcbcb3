"""The resources a grid needs, computed before anything runs: parameters, FLOPs, memory, GPU-hours, nearest cells.

Models are built on the meta device, so planning needs no GPU and no memory for tables. It reads data only if the
number of tokens or the vocabulary size depends on the corpus.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from suite.baselines.loading import reported
from suite.cells import Cell, variants
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.grids import Grid
from suite.inference.tables.costs import account_of_cell, bytes_by_source
from suite.models.accounting import Account, account_of, meta_model, needs_values
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer
from suite.plan.activation_memory import PartCache, experts_in_blocks
from suite.plan.gpus import USABLE, UTILISATION, Gpu, gpu_named
from suite.plan.mesh import MICRO_ROWS, DoesNotFit, Mesh, smallest_mesh
from suite.plan.traffic import Sent, sent_bytes, table_bytes
from suite.train.loop import total_steps

EQUAL = 0.05
"""Largest deviation of a ratio from 1 that still counts as equal."""
MEASURES = {"flops": "macs_total", "params": "params_total", "bytes": "bytes_per_token"}
"""The measures in which cells are compared, and the field of the account that holds each."""


@dataclass(frozen=True)
class Assumptions:
    """The GPU, the number of nodes (None: any), the share of peak FLOPs reached, dollars per GPU-hour, and the place of
    tables in decoding (`host` or `file`; None: the device)."""

    gpu: Gpu
    nodes: int | None = None
    utilisation: float = UTILISATION
    price: float = 0.0
    table: str | None = None


@dataclass(frozen=True)
class CellPlan:
    """The plan of one cell, in bytes, FLOPs and GPU-hours. One that `suite quantise` makes is not trained: its steps,
    FLOPs, hours and traffic are 0.

    Attributes:
        cell: The cell.
        account: The account of its model.
        dense: The account of the dense model with the base's feed-forward width, even if the grid does not contain it.
        bytes_by_source: Bytes that decoding one token reads, by source: device, host, file.
        tokens: Training tokens, padding included.
        steps: Optimizer steps.
        total_flops: FLOPs of the whole training.
        gpu_hours: Hours of one GPU, at the assumed utilisation and link speeds.
        compute_hours: The part of them that a GPU computes, padding of experts in blocks included.
        mesh: The smallest mesh that the cell fits on; None if it fits on none.
        why: Why it fits on none.
        would_fit: What would make it fit.
        table_bytes_per_step: Bytes of tables that a step moves in the memory of all GPUs together.
        sent: Bytes that one GPU sends in a step.
        table_hours: Hours of one GPU for the table traffic at full memory bandwidth; not part of `gpu_hours`.
        variant: The settings that distinguish the cell from others of its family and base.
        partners: The nearest cell of another family in each measure.
        vocabulary: Entries of its vocabulary.
        vocabulary_is_assumed: Whether they are those of the base, because the tokenizer's file does not exist.
    """

    cell: Cell
    account: Account
    dense: Account
    bytes_by_source: dict[str, float]
    tokens: int
    steps: int
    total_flops: float
    gpu_hours: float
    compute_hours: float
    mesh: Mesh | None
    why: str | None
    would_fit: str | None
    table_bytes_per_step: float
    sent: Sent
    table_hours: float
    variant: dict[str, Any] = field(default_factory=dict)
    partners: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocabulary: int = 0
    vocabulary_is_assumed: bool = False

    def ratio(self, measure: str, other: Account) -> float:
        """Return the ratio of this cell's account to another, in one field of the account."""
        return float(getattr(self.account, measure) / getattr(other, measure))

    @property
    def days(self) -> float | None:
        """Days of training on the smallest mesh; None if the cell fits on none."""
        return None if self.mesh is None else self.gpu_hours / self.mesh.gpus / 24

    def to_json(self, price: float) -> dict[str, Any]:
        """Return the cell's entry of `suite plan --json`; `price` is in dollars per GPU-hour."""
        counted, mesh = self.account, self.mesh
        return {
            "cell": self.cell.hash8,
            "run": self.cell.run_name,
            "family": self.cell.model.family,
            "base": self.cell.model.base,
            "half_keys": self.cell.model.table_side,
            "variant": self.variant,
            "params": {
                "total": counted.params_total,
                "active": counted.params_active,
                "memory": counted.params_memory,
                "embedding": counted.params_embedding,
            },
            "flops_per_token": {"train": counted.flops_per_token, "forward": counted.flops_per_token_forward},
            "bytes_per_token": counted.bytes_per_token,
            "bytes_per_token_by_source": self.bytes_by_source,
            "tokens": self.tokens,
            "memory_per_gpu": None if mesh is None else round(mesh.memory.peak),
            "gpus": None if mesh is None else mesh.gpus,
            "gpu_hours": self.gpu_hours,
            "compute_hours": self.compute_hours,
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
            "link_bytes_per_step": self.sent.total,
            "sent_bytes_per_step": asdict(self.sent),
            "table_hours": self.table_hours,
            "ratio_to_dense": {name: self.ratio(measure, self.dense) for name, measure in MEASURES.items()},
            "partners": self.partners,
            "vocabulary": self.vocabulary,
            "vocabulary_is_assumed": self.vocabulary_is_assumed,
        }


def plan(grid: Grid, assumptions: Assumptions, cache: Path) -> list[CellPlan]:
    """Plan the cells of a grid; equal models are built once.

    Args:
        grid: The grid.
        assumptions: The GPU, its speed and its price.
        cache: Folder in which a corpus is prepared if one is needed.

    Returns:
        The plans, in the order of the grid's cells.

    Raises:
        UserError: A corpus is needed and cannot be read, or a tensor is too large to exist.
    """
    sizes: dict[tuple[object, ...], DataSize] = {}
    groups: dict[tuple[str, int, int], list[tuple[Cell, DataSize]]] = {}
    for cell in grid.cells:
        key = cell.data.model_dump_json(), cell.train.model_dump_json(), cell.seed, cell.model.size.vocab_size
        if key not in sizes:
            sizes[key] = data_size(cell, cache)
        model_key = cell.model.model_dump_json(), sizes[key].vocabulary, cell.data.seq_len
        groups.setdefault(model_key, []).append((cell, sizes[key]))

    parts: PartCache = {}
    dense_accounts: dict[tuple[str, int, int], Account] = {}
    by_run: dict[str, CellPlan] = {}
    for (_, vocabulary, seq_len), members in groups.items():
        config = members[0][0].model
        model = _meta_model(members[0][0], config, vocabulary)
        dense_key = config.dense().model_dump_json(), vocabulary, seq_len
        if dense_key not in dense_accounts:
            dense_accounts[dense_key] = account_of(_meta_model(members[0][0], config.dense(), vocabulary), seq_len)
        for cell, size in members:
            accounts = account_of_cell(cell, model), dense_accounts[dense_key]
            planned = _plan(cell, size.tokens, model, accounts, assumptions, parts)
            by_run[cell.run_name] = replace(planned, vocabulary=vocabulary, vocabulary_is_assumed=size.is_assumed)

    plans = [by_run[cell.run_name] for cell in grid.cells]
    settings = variants(grid.cells)
    return [
        replace(cell_plan, variant=settings[cell_plan.cell.run_name], partners=partners(cell_plan, plans))
        for cell_plan in plans
    ]


def document(grid: Grid, plans: list[CellPlan], assumptions: Assumptions) -> dict[str, Any]:
    """Build the document that `suite plan --json` prints and results/plans/ stores.

    Args:
        grid: The grid.
        plans: The plans of its cells.
        assumptions: The assumptions of the plans.

    Returns:
        The document, of plain JSON values.
    """
    return {
        "grid": grid.name,
        "assumed": asdict(assumptions) | {"usable_memory": USABLE, "micro_rows": list(MICRO_ROWS)},
        "totals": {
            "cells": len(plans),
            "fit": sum(cell_plan.mesh is not None for cell_plan in plans),
            "total_flops": sum(cell_plan.total_flops for cell_plan in plans),
            "gpu_hours": sum(cell_plan.gpu_hours for cell_plan in plans),
            "cost": sum(cell_plan.gpu_hours for cell_plan in plans) * assumptions.price,
        },
        "cells": [cell_plan.to_json(assumptions.price) for cell_plan in plans],
    }


def assumptions(
    gpu: str, nodes: int | None, utilisation: float, price: float | None, table: str | None = None
) -> Assumptions:
    """Build the assumptions from the options of the command line.

    Args:
        gpu: A name in `GPUS`, or the path of a YAML file with the fields of `Gpu`.
        nodes: Largest number of nodes; None: any.
        utilisation: Share of the GPU's peak FLOPs that training reaches.
        price: Dollars per GPU-hour; None: the price assumed for the GPU.
        table: The place of tables in decoding, `host` or `file`; None: the device.

    Returns:
        The assumptions.

    Raises:
        UserError: The GPU is unknown, or the price is negative or not finite.
    """
    device = gpu_named(gpu)
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise UserError(f"--price: got {price}, allowed: dollars per hour, 0 or more")
    return Assumptions(device, nodes, utilisation, device.price if price is None else price, table)


@dataclass(frozen=True)
class DataSize:
    """Entries of the vocabulary, training tokens with padding included, and whether the entries are assumed."""

    vocabulary: int
    tokens: int
    is_assumed: bool = False


def data_size(cell: Cell, cache: Path) -> DataSize:
    """Return the size of a cell's data, from its configuration if that is enough, else from the prepared corpus.

    If a tokenizer's file does not exist, its entries are assumed to be those of the base. Raises UserError if a corpus
    is needed and cannot be prepared in `cache`.
    """
    path, entries = cell.data.tokenizer.path, cell.model.size.vocab_size
    is_assumed = bool(entries) and path is not None and not Path(path).exists()
    if cell.train.tokens is not None:
        return DataSize(entries if is_assumed else cell.data.vocabulary(), cell.train.tokens, is_assumed)
    corpus = prepare(cell.data, cache)
    steps = total_steps(cell.train, corpus.loader(cell.seed, cell.train.batch_rows), cell.data.seq_len)
    return DataSize(corpus.vocab_size, steps * cell.train.batch_rows * cell.data.seq_len)


def _plan(
    cell: Cell,
    tokens: int,
    model: Transformer,
    accounts: tuple[Account, Account],
    assumptions: Assumptions,
    parts: PartCache,
) -> CellPlan:
    """Plan one cell; `accounts` are those of its model and of the dense one."""
    gpu, (counted, dense) = assumptions.gpu, accounts
    is_trained = cell.source is None
    steps = max(1, tokens // (cell.train.batch_rows * cell.data.seq_len)) if is_trained else 0
    total_flops = tokens * counted.flops_per_token if is_trained else 0.0
    with reported(cell.model.family):
        try:
            fit = smallest_mesh(cell, model, counted, gpu, assumptions.nodes, parts)
        except RuntimeError as error:
            if not needs_values(error):
                raise
            fit = DoesNotFit(f"its memory cannot be predicted without values ({error})"[:200], "unknown")
    mesh, unfit = (None, fit) if isinstance(fit, DoesNotFit) else (fit, None)
    traffic = table_bytes(model, cell) if is_trained else 0.0
    padding = tokens * _padding_flops(model, cell, gpu) if is_trained else 0.0
    compute_hours = (total_flops + padding) / (gpu.flops * assumptions.utilisation) / 3600
    sent = Sent() if mesh is None or not is_trained else sent_bytes(model, counted, cell, mesh)
    gpu_hours = compute_hours
    if mesh is not None and is_trained:
        step_s = sent.seconds(3600 * compute_hours / steps / mesh.gpus, mesh, gpu)
        gpu_hours = step_s * steps * mesh.gpus / 3600
    return CellPlan(
        cell=cell,
        account=counted,
        dense=dense,
        bytes_by_source=bytes_by_source(cell, model, assumptions.table),
        tokens=tokens,
        steps=steps,
        total_flops=total_flops,
        gpu_hours=gpu_hours,
        compute_hours=compute_hours,
        mesh=mesh,
        why=None if unfit is None else unfit.why,
        would_fit=None if unfit is None else unfit.would_fit,
        table_bytes_per_step=traffic,
        sent=sent,
        table_hours=steps * traffic / gpu.bandwidth / 3600,
    )


def _padding_flops(model: Transformer, cell: Cell, gpu: Gpu) -> float:
    """Return the FLOPs per training token that experts in blocks spend on padding: E experts fill 2 E - 1 blocks."""
    in_blocks = experts_in_blocks(model, cell.train.precision, gpu.capability)
    return sum(
        6 * (1 - 1 / routed.experts.count) * routed.experts.cost(routed.top_k).macs["ffn"] for routed in in_blocks
    )


def _meta_model(cell: Cell, config: ModelConfig, vocabulary: int) -> Transformer:
    """Build the cell's model, or its dense one, on the meta device.

    Raises UserError for options that do not fit the vocabulary and for a tensor that cannot exist.
    """
    try:
        return meta_model(config, vocabulary)
    except ValueError as error:
        raise UserError(f"cell {cell.run_name}: model.{error}") from None
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise UserError(f"cell {cell.run_name}: model: got a tensor of 2^63 bytes or more, allowed: fewer") from None


def partners(cell_plan: CellPlan, plans: list[CellPlan]) -> dict[str, dict[str, Any]]:
    """Return the nearest other cell in FLOPs, parameters and bytes per token, and the ratio of this cell to it.

    Candidates have the same base and token budget and another family. For FLOPs and bytes they are dense if any dense
    cell qualifies.
    """
    others = [
        other
        for other in plans
        if other is not cell_plan
        and other.cell.model.base == cell_plan.cell.model.base
        and other.tokens == cell_plan.tokens
        and other.cell.model.family != cell_plan.cell.model.family
    ]
    nearest: dict[str, dict[str, Any]] = {}
    for name, measure in MEASURES.items():
        dense = [other for other in others if other.cell.model.family == "dense"]
        candidates = others if name == "params" or not dense else dense
        ratios = [cell_plan.ratio(measure, other.account) for other in candidates]
        if ratios:
            index = min(range(len(ratios)), key=lambda i: max(ratios[i], 1 / ratios[i]))
            nearest[name] = {
                "run": candidates[index].cell.run_name,
                "ratio": ratios[index],
                "equal": abs(ratios[index] - 1) <= EQUAL,
            }
    return nearest
