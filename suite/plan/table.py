"""Plans as tables and notes, with the measurements of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, display_name
from suite.inference.tables.stores import SOURCES
from suite.plan.gpus import CPU, is_device
from suite.plan.plan import MEASURES, Assumptions, CellPlan
from suite.records import run_dir


def measured(results: Path, cell: Cell, gpu: str) -> dict[str, float] | None:
    """Return what the cell's finished run took on a device like the planned one; None without such a run.

    A run with a damaged record file does not count as finished.

    Args:
        results: The results folder.
        cell: The cell.
        gpu: The name of the planned GPU.

    Returns:
        Seconds of training, tokens per second and peak bytes.
    """
    run = run_dir(results, cell)
    if run.damage() is not None or not run.cell_path.exists() or not is_device(gpu, run.read_record().get("device")):
        return None
    lines = [line for line in run.train_lines() if "memory_bytes" in line] if run.path.exists() else []
    if not lines or run.state()["state"] != "done":
        return None
    return {key: lines[-1][key] for key in ("wall_s", "tokens_per_s", "memory_bytes")}


def plan_table(name: str, plans: list[CellPlan], assumed: Assumptions) -> Table:
    """Lay out plans as a table with one row per cell: size, work (also relative to dense), mesh, memory and hours, and
    what decoding a token reads.

    Args:
        name: The grid's name.
        plans: The plans of its cells.
        assumed: The assumptions of the plan.

    Returns:
        The table.
    """
    sources = [source for source in SOURCES if any(cell_plan.bytes_by_source[source] for cell_plan in plans)]
    table = Table(title=f"{name} on {assumed.gpu.name}", title_justify="left")
    device = "CPU" if assumed.gpu.name == CPU else "GPU"
    for column, justify in (
        ("run", "left"),
        ("params", "right"),
        ("MACs/dense", "right"),
        ("FLOPs", "right"),
        (f"{device}s", "right"),
        (f"GB/{device}", "right"),
        (f"{device}-hours", "right"),
        ("days", "right"),
        ("cost", "right"),
        ("table GB/step", "right"),
        ("table hours", "right"),
        *((f"{source} kB/token", "right") for source in sources),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for cell_plan in plans:
        mesh = cell_plan.mesh
        table.add_row(
            escape(display_name(cell_plan.cell.run_name, cell_plan.variant)),
            _millions(cell_plan.account.params_total),
            f"{cell_plan.ratio(MEASURES['flops'], cell_plan.dense):.3f}",
            f"{cell_plan.total_flops:.2e}",
            "none" if mesh is None else str(mesh.gpus),
            "" if mesh is None else f"{mesh.memory.peak / 1e9:.3g}",
            _rounded(cell_plan.gpu_hours),
            "" if cell_plan.days is None else _rounded(cell_plan.days),
            f"${_rounded(cell_plan.gpu_hours * assumed.price)}",
            _rounded(cell_plan.table_bytes_per_step / 1e9) if cell_plan.table_bytes_per_step else "",
            _rounded(cell_plan.table_hours) if cell_plan.table_bytes_per_step else "",
            *(_rounded(cell_plan.bytes_by_source[source] / 1e3) for source in sources),
        )
    return table


def _millions(parameters: int) -> str:
    """Format a number of parameters in millions, with a decimal place or, below one million, three digits."""
    millions = parameters / 1e6
    return f"{millions:,.1f}m" if millions >= 1 else f"{millions:.3g}m"


def _rounded(value: float) -> str:
    """Format numbers of 100 and more as whole numbers, others with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def partners_table(plans: list[CellPlan]) -> Table:
    """Return a table of each cell's nearest other cells and the ratios to them; `=` marks those within 5 %."""
    table = Table(title="nearest other cells, and the ratio of this cell to them (=: within 5 %)", title_justify="left")
    for column in ("run", *(f"in {measure}" for measure in MEASURES)):
        table.add_column(column)
    for cell_plan in plans:
        table.add_row(cell_plan.cell.run_name, *(_partner(cell_plan.partners.get(measure)) for measure in MEASURES))
    return table


def _partner(partner: dict[str, Any] | None) -> str:
    if partner is None:
        return ""
    return f"{partner['run']} {partner['ratio']:.3f}{' =' if partner['equal'] else ''}"


def plan_notes(plans: list[CellPlan], document: dict[str, Any]) -> list[str]:
    """Return lines with the totals, the assumptions and, for cells that do not fit, the reason and a remedy."""
    totals, assumed = document["totals"], document["assumed"]
    if assumed["gpu"]["name"] == CPU:
        lines = [
            f"total: {_rounded(totals['gpu_hours'])} hours of one cell at a time on the CPU of this machine, at the"
            " speed of its finished runs; evaluation is not included"
        ]
    else:
        lines = _gpu_notes(totals, assumed)
    if assumed_vocabulary := [plan for plan in plans if plan.vocabulary_is_assumed]:
        first = assumed_vocabulary[0]
        lines.append(
            f"vocabulary assumed in {len(assumed_vocabulary)} cells: {first.cell.data.tokenizer.path} does not exist,"
            f" so its entries are taken to be those of the base ({first.vocabulary:,} for {first.cell.model.base})"
        )
    lines += [
        f"{cell_plan.cell.run_name}: {cell_plan.mesh.memory.host / 1e9:,.3g} GB of host memory hold its tables and"
        " their moments; GPU-hours do not include copying rows nor updating them on the CPU"
        for cell_plan in plans
        if cell_plan.mesh is not None and cell_plan.mesh.memory.host
    ]
    device = assumed["gpu"]["name"]
    lines += [
        _predicted_and_measured(cell, device) for cell in document["cells"] if cell.get("measured") and cell["gpus"]
    ]
    unfit = [cell_plan for cell_plan in plans if cell_plan.why]
    if unfit:
        hours = _rounded(sum(cell_plan.gpu_hours for cell_plan in unfit))
        lines.append(f"cells that do not fit account for {hours} GPU-hours of the total:")
    lines += [
        f"{cell_plan.cell.run_name}: does not fit: {cell_plan.why}; what would fit: {cell_plan.would_fit}"
        for cell_plan in unfit
    ]
    return lines


def _gpu_notes(totals: dict[str, Any], assumed: dict[str, Any]) -> list[str]:
    return [
        f"total: {_rounded(totals['gpu_hours'])} GPU-hours, ${_rounded(totals['cost'])}, "
        f"{totals['total_flops']:.2e} FLOPs",
        f"assumed: {assumed['utilisation']:.0%} of {assumed['gpu']['flops'] / 1e12:.0f} TFLOPS, "
        f"${assumed['price']:g} per hour, "
        f"{assumed['usable_memory']:.0%} of {assumed['gpu']['memory'] / 1e9:.0f} GB usable; {_links(assumed['gpu'])};"
        " GPU-hours do not include reading and updating tables (table hours, at full memory bandwidth)",
        "days: on the fewest GPUs that hold the cell; more (`gpus` in a profile or a grid's `launch`) take less time",
    ]


def _links(gpu: dict[str, Any]) -> str:
    """Return the assumed speeds of links."""
    return (
        f"a GPU sends {gpu['link'] / 1e9:.0f} GB/s within a node of {gpu['per_node']} and"
        f" {gpu['network'] / 1e9:.0f} GB/s between nodes; it gathers weights while it computes"
    )


def _predicted_and_measured(cell: dict[str, Any], device: str) -> str:
    """Return a cell's prediction and the measurements of its run on such a device."""
    measurements, seconds = cell["measured"], 3600 * cell["gpu_hours"] / cell["gpus"]
    devices, owner = (
        ("the CPU of this machine", "process") if device == CPU else (f"{cell['gpus']} of these GPUs", "GPU")
    )
    return (
        f"{cell['run']}: predicted {seconds:.3g} s and {cell['memory_per_gpu'] / 1e9:.3g} GB on {devices}; its run "
        f"took {measurements['wall_s']:.3g} s and {measurements['memory_bytes'] / 1e9:.3g} GB (memory of its {owner})"
    )
