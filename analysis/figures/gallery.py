"""Every figure of a grid, in the report's order: what these runs allow is drawn, the rest is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from analysis.figures import learning
from analysis.figures.isoflop import isoflops_of_grid
from analysis.figures.scene import Missing, Scene, has_bits, no_bits, scene
from analysis.figures.scores import SCORE_FIGURES
from analysis.figures.variants import CELL_FIGURES
from analysis.records.runs import Run

Draw = Callable[[Scene, Path], list[Path]]

CAPTIONS = {
    "bits-exposures": "Bits learned against exposures, by family",
    "memory-rows": "E50 and answer NLL against memory rows, with dense and MoE as references",
    "bits-compute": "Bits learned against training FLOPs and wall-clock",
    "loss-curves": "Loss in evaluation mode against training tokens",
    "base-size": "E50 and answer NLL against base size",
    "cost": "What is reached against training FLOPs and bytes read per token",
    "isoflop": "IsoFLOP parabolas of dense, and the compute-optimal sizes",
    "compute-multiplier": "Compute multiplier at E50",
    "trend-fit": "Fits against table and base size, with residuals and the held-out cell",
    "key-usage": "How evenly the memory's rows are read",
    "key-usage-training": "How the use of the memory's rows changes in training",
    "final-scores": "Final scores",
    "scores-rows": "Final scores against memory rows, with published points",
    "scores-base": "Final scores against base size",
    "scores-cost": "Final scores against training FLOPs and bytes read per token",
    "plan": "Predicted against measured wall-clock",
}


def draw(
    runs: list[Run], grid: str, folder: Path, published: pd.DataFrame | None = None, source: str | None = None
) -> tuple[dict[str, list[Path]], list[str]]:
    """Every figure the runs allow, name -> files; and for each that is missing a line with what it needs."""
    found = scene(runs, grid, published, source)
    if found.table.empty:
        return {}, [f"all figures: no run of grid {grid} is done; run: suite sweep {found.source}"]
    panels: list[tuple[str, Draw, bool]] = [
        ("bits-exposures", learning.bits_against_exposures, True),
        ("memory-rows", learning.against_rows, True),
        ("bits-compute", learning.bits_against_compute, True),
        ("loss-curves", learning.loss_curves, False),
    ]
    drawn: dict[str, list[Path]] = {}
    missing: list[str] = []
    for name, function, needs_bits in [
        *panels,
        *((name, function, False) for name, function in [*CELL_FIGURES, *SCORE_FIGURES]),
        ("isoflop", isoflops_of_grid, False),
    ]:
        try:
            if needs_bits and not has_bits(found):
                raise Missing(no_bits(found))
            drawn[name] = function(found, folder)
        except Missing as reason:
            missing.append(f"{name}: {reason}")
    return drawn, missing
