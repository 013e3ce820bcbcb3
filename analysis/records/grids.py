"""Grids and plans as a sweep recorded them: which runs belong together, and what is compared."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import InputError
from analysis.records.shipped import shipped
from analysis.records.tables import read_json

E50_AVERAGED = "e50_averaged"
"""Metric of a contrast in the E50 of averaged weights."""
GRID_FOLDERS = (Path("grids"), shipped("grids"))
"""Where a grid is found by its name."""


@dataclass(frozen=True)
class Contrast:
    """The primary contrast.

    Attributes:
        metric: e50, eval/nll or TASK/METRIC.
        treatment: Names of the runs on one side.
        reference: Names of the runs on the other side.
        over: Field over whose values it is taken; None: both sides are one variant.
        averaged: Whether probes are those of the average of the weights (e50_averaged in the grid's file).
    """

    metric: str
    treatment: tuple[str, ...]
    reference: tuple[str, ...]
    over: str | None = None
    averaged: bool = False


@dataclass(frozen=True)
class Recorded:
    """A grid's record: its runs in order, and its primary contrast where it declares one."""

    runs: list[str]
    contrast: Contrast | None = None


def read_grids(results: Path) -> dict[str, Recorded]:
    """Return the record of each grid by name, from results/grids/*/grid.json."""
    return dict(_read(path) for path in sorted(results.glob("grids/*/grid.json")))


def read_grid(results: Path, grid: str) -> Recorded:
    """Return the record of one grid.

    Raises:
        InputError: It has none.
    """
    path = results / "grids" / grid / "grid.json"
    if os.path.isfile(path):  # unlike Path.is_file, false for a text that is too long for a path
        return _read(path)[1]
    names = [path.parent.name for path in sorted(results.glob("grids/*/grid.json"))]
    raise InputError(
        f"{results / 'grids'}: grid {grid!r} has no records; {_remedy(grid, names)}"
        f"grids with records: {', '.join(names) or 'none yet'}"
    )


def _remedy(grid: str, recorded: Sequence[str]) -> str:
    """Return how a grid gets records, or the name that was meant; empty if no grid has such a name.

    Args:
        grid: The name that was given; no grid of this name has records.
        recorded: Names of the grids that have records.
    """
    files = sorted({path.stem for folder in GRID_FOLDERS for path in folder.glob("*.yaml")})
    if grid in files:
        return f"suite sweep {grid} makes them; "
    close = difflib.get_close_matches(grid, [*recorded, *files], n=1)
    if not close:
        return ""
    sweep = "" if close[0] in recorded else f" suite sweep {close[0]} makes its records;"
    return f"did you mean {close[0]}?{sweep} "


def _read(path: Path) -> tuple[str, Recorded]:
    content = read_json(path)
    if not isinstance(content.get("runs"), list):
        raise InputError(f"{path}: field runs: allowed: a list of run names")
    declared = content.get("contrast")
    try:
        contrast = declared and _contrast(declared)
    except (KeyError, TypeError):
        raise InputError(f"{path}: field contrast: needs metric, treatment and reference") from None
    return str(content.get("grid", path.parent.name)), Recorded([str(run) for run in content["runs"]], contrast or None)


def _contrast(declared: Mapping[str, Any]) -> Contrast:
    metric, averaged = str(declared["metric"]), declared["metric"] == E50_AVERAGED
    sides = tuple(declared["treatment"]), tuple(declared["reference"])
    return Contrast("e50" if averaged else metric, *sides, declared.get("over"), averaged)


def read_source(results: Path, grid: str) -> str:
    """Return the arguments with which `suite sweep` continues the grid: name or path, and options.

    The options of `read_baselines` come in addition.
    """
    record = read_json(results / "grids" / grid / "grid.json")
    path = Path(str(record.get("source", grid)))
    is_named = any((folder / path.name).resolve() == path.resolve() for folder in GRID_FOLDERS)
    return shlex.join([path.stem if is_named else str(path), *map(str, record.get("arguments", []))])


def read_baselines(results: Path, grid: str) -> str:
    """Return the options that name the baseline files of the grid's runs, each content once; empty without any."""
    runs = set(read_grid(results, grid).runs)
    files = {
        file.read_bytes(): file
        for file in sorted(results.glob("runs/*/baseline.py"), reverse=True)
        if file.parent.name in runs
    }
    return shlex.join(f"--baseline={file}" for file in files.values())


def read_plans(results: Path) -> dict[str, float]:
    """Run name -> seconds of training predicted by results/plans/*.json.

    A prediction counts for runs that were trained on the planned device, and if the cell was planned for one of them.
    """
    seconds: dict[str, list[float]] = {}
    for path in sorted(results.glob("plans/*.json")):
        plan = read_json(path)
        gpu = str(plan.get("assumed", {}).get("gpu", {}).get("name", ""))
        for cell in plan.get("cells", []):
            if cell.get("gpus") and _is_trained_on(results / "runs" / str(cell["run"]) / "cell.json", gpu):
                seconds.setdefault(str(cell["run"]), []).append(3600 * float(cell["gpu_hours"]) / float(cell["gpus"]))
    return {name: predictions[0] for name, predictions in seconds.items() if len(predictions) == 1}


def _is_trained_on(path: Path, gpu: str) -> bool:
    """Return whether a run's record names the planned device: `NVIDIA H100 80GB HBM3` is an `H100 SXM 80 GB`."""
    try:
        device = read_json(path).get("device")
    except InputError:  # without a run, or damaged, which is reported where runs are read
        return False
    return bool(gpu) and isinstance(device, str) and gpu.split()[0].lower() in device.lower()
