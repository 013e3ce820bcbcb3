"""Plans as tables and notes, with the measurements of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, display_name
from suite.plan.plan import MEASURES, Assumptions, CellPlan
from suite.records import run_dir


def measured(results: Path, cell: Cell) -> dict[str, float] | None:
    """Return seconds of training, tokens per second and peak bytes of the cell's finished run; None without one."""
    run = run_dir(results, cell)
    lines = [line for line in run.train_lines() if "memory_bytes" in line] if run.path.exists() else []
    if not lines or run.state()["state"] != "done":
        return None
    return {key: lines[-1][key] for key in ("wall_s", "tokens_per_s", "memory_bytes")}


def plan_table(name: str, plans: list[CellPlan], assumed: Assumptions) -> Table:
    """Return a table with one row per cell: size, work (also relative to dense), mesh, memory and hours."""
    table = Table(title=f"{name} on {assumed.gpu.name}", title_justify="left")
    for column, justify in (
        ("run", "left"),
        ("params", "right"),
        ("MACs/dense", "right"),
        ("FLOPs", "right"),
        ("GPUs", "right"),
        ("GB/GPU", "right"),
        ("GPU-hours", "right"),
        ("days", "right"),
        ("cost", "right"),
        ("table GB/step", "right"),
        ("table hours", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for one in plans:
        mesh = one.mesh
        table.add_row(
            escape(display_name(one.cell.run_name, one.variant)),
            f"{one.account.params_total / 1e6:,.1f}m",
            f"{one.ratio(MEASURES['flops'], one.dense):.3f}",
            f"{one.total_flops:.2e}",
            "none" if mesh is None else str(mesh.gpus),
            "" if mesh is None else f"{mesh.memory.peak / 1e9:.3g}",
            _rounded(one.gpu_hours),
            "" if one.days is None else _rounded(one.days),
            f"${_rounded(one.gpu_hours * assumed.price)}",
            _rounded(one.table_bytes_per_step / 1e9) if one.table_bytes_per_step else "",
            _rounded(one.table_hours) if one.table_bytes_per_step else "",
        )
    return table


def _rounded(value: float) -> str:
    """Format numbers of 100 and more as whole numbers, others with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def partners_table(plans: list[CellPlan]) -> Table:
    """Return a table of each cell's nearest other cells and the ratios to them; `=` marks those within 5 %."""
    table = Table(title="nearest other cells, and the ratio of this cell to them (=: within 5 %)", title_justify="left")
    for column in ("run", *(f"in {measure}" for measure in MEASURES)):
        table.add_column(column)
    for one in plans:
        table.add_row(one.cell.run_name, *(_partner(one.partners.get(measure)) for measure in MEASURES))
    return table


def _partner(partner: dict[str, Any] | None) -> str:
    if partner is None:
        return ""
    return f"{partner['run']} {partner['ratio']:.3f}{' =' if partner['equal'] else ''}"


def plan_notes(plans: list[CellPlan], document: dict[str, Any]) -> list[str]:
    """Return lines with the totals, the assumptions and, for cells that do not fit, the reason and a remedy."""
    totals, assumed = document["totals"], document["assumed"]
    lines = [
        f"total: {_rounded(totals['gpu_hours'])} GPU-hours, ${_rounded(totals['cost'])}, "
        f"{totals['total_flops']:.2e} FLOPs",
        f"assumed: {assumed['utilisation']:.0%} of {assumed['gpu']['flops'] / 1e12:.0f} TFLOPS, "
        f"${assumed['price']:g} per hour, "
        f"{assumed['usable_memory']:.0%} of {assumed['gpu']['memory'] / 1e9:.0f} GB usable;"
        " GPU-hours do not include reading and updating tables (table hours, at full memory bandwidth)",
        "days: on the fewest GPUs that hold the cell; more (`gpus` in a profile or a grid's `launch`) take less",
    ]
    lines += [_predicted_and_measured(entry) for entry in document["cells"] if entry.get("measured") and entry["gpus"]]
    unfit = [one for one in plans if one.why]
    if unfit:
        hours = _rounded(sum(one.gpu_hours for one in unfit))
        lines.append(f"of the total, {hours} GPU-hours belong to cells that do not fit:")
    lines += [f"{one.cell.run_name}: does not fit: {one.why}; what would fit: {one.would_fit}" for one in unfit]
    return lines


def _predicted_and_measured(entry: dict[str, Any]) -> str:
    """Return a cell's prediction and the measurements of its run, which may be from another machine."""
    took, seconds = entry["measured"], 3600 * entry["gpu_hours"] / entry["gpus"]
    return (
        f"{entry['run']}: predicted {seconds:.3g} s and {entry['memory_per_gpu'] / 1e9:.3g} GB on {entry['gpus']} of "
        f"these GPUs; its run took {took['wall_s']:.3g} s and {took['memory_bytes'] / 1e9:.3g} GB "
        "(memory of its GPU, or of the process on a CPU)"
    )
