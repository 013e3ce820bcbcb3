"""A plan for people, and what finished runs say to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, display_name
from suite.plan.plan import MEASURES, Assumptions, CellPlan
from suite.records import run_dir


def measured(results: Path, cell: Cell) -> dict[str, float] | None:
    """What a run of the cell that is done took: seconds of training, tokens a second, peak bytes; None without one."""
    run = run_dir(results, cell)
    lines = [line for line in run.train_lines() if "memory_bytes" in line] if run.path.exists() else []
    if not lines or run.state()["state"] != "done":
        return None
    return {key: lines[-1][key] for key in ("wall_s", "tokens_per_s", "memory_bytes")}


def plan_table(name: str, plans: list[CellPlan], assumed: Assumptions) -> Table:
    """One row a cell: size, work and that over the base's dense model, mesh, memory, hours."""
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
    """Whole numbers from 100, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def partners_table(plans: list[CellPlan]) -> Table:
    """Each cell's nearest other in FLOPs, parameters and bytes, and this cell over it; `=` where within 5 %."""
    table = Table(title="nearest other cells, and this cell over them (=: within 5 %)", title_justify="left")
    for column in ("run", *(f"in {measure}" for measure in MEASURES)):
        table.add_column(column)
    for one in plans:
        table.add_row(one.cell.run_name, *(_partner(one.partners.get(measure)) for measure in MEASURES))
    return table


def _partner(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['run']} {found['ratio']:.3f}{' =' if found['equal'] else ''}"


def plan_notes(plans: list[CellPlan], document: dict[str, Any]) -> list[str]:
    """The sums, the assumptions, and for each cell that fits nowhere why, and what would make it fit."""
    totals, assumed = document["totals"], document["assumed"]
    lines = [
        f"total: {_rounded(totals['gpu_hours'])} GPU-hours, ${_rounded(totals['cost'])}, "
        f"{totals['total_flops']:.2e} FLOPs",
        f"assumed: {assumed['utilisation']:.0%} of {assumed['gpu']['flops'] / 1e12:.0f} TFLOPS, "
        f"${assumed['price']:g} an hour, "
        f"{assumed['usable_memory']:.0%} of {assumed['gpu']['memory'] / 1e9:.0f} GB usable;"
        " reading and updating tables (table hours, of all GPUs at full memory bandwidth) is not in the GPU-hours",
        "days: on the fewest GPUs that hold the cell; more (`gpus` in a profile or a grid's `launch`) take less long",
    ]
    lines += [_against(entry) for entry in document["cells"] if entry.get("measured") and entry["gpus"]]
    unfit = [one for one in plans if one.why]
    if unfit:
        hours = _rounded(sum(one.gpu_hours for one in unfit))
        lines.append(f"of the total, {hours} GPU-hours are of cells that do not fit:")
    lines += [f"{one.cell.run_name}: does not fit: {one.why}; what would do: {one.would_fit}" for one in unfit]
    return lines


def _against(entry: dict[str, Any]) -> str:
    """A cell's prediction beside what its run took, on whatever machine that ran."""
    took, seconds = entry["measured"], 3600 * entry["gpu_hours"] / entry["gpus"]
    return (
        f"{entry['run']}: predicted {seconds:.3g} s and {entry['memory_per_gpu'] / 1e9:.3g} GB on {entry['gpus']} of "
        f"these GPUs; its run took {took['wall_s']:.3g} s and {took['memory_bytes'] / 1e9:.3g} GB "
        "(of its GPU, or of the process on a CPU)"
    )
