"""Every figure of a grid, in the report's order: what the runs allow is drawn, the rest is listed with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from analysis.figures import learning
from analysis.figures.context import Context, Missing
from analysis.figures.isoflop import isoflops_of_grid
from analysis.figures.knowledge.drawing import learning_against_forgetting, retention, rows_touched
from analysis.figures.next_parameter import against_size, at_equal_time, next_parameter
from analysis.figures.scores import SCORE_FIGURES
from analysis.figures.sparse_share import sparse_share
from analysis.figures.style import FORMATS
from analysis.figures.tables.controls import controls_figure
from analysis.figures.variants import CELL_FIGURES

Draw = Callable[[Context, Path], list[Path]]

CAPTIONS = {
    "bits-exposures": "Bits learned against exposures, by family",
    "memory-rows": "E50 and answer NLL against memory rows, with models without a table as references",
    "controls": "E50 of each variant with a table and of its controls, relative to the reference",
    "bits-compute": "Bits learned against training FLOPs and wall-clock",
    "loss-curves": "Loss in evaluation mode against training tokens",
    "base-size": "E50 and answer NLL against base size",
    "cost": "What is reached against training FLOPs and bytes read per token",
    "isoflop": "IsoFLOP parabolas of the reference, and the compute-optimal sizes",
    "compute-multiplier": "Compute multiplier at E50",
    "trend-fit": "Fits against table and base size, with residuals and the held-out variant",
    "key-usage": "How evenly the memory's rows are read",
    "key-usage-training": "Use of the memory's rows over training",
    "hit-rates": "Hit rate of a cache of rows against its size",
    "table-bytes": "Loss against the bytes of smaller tables",
    "final-scores": "Final scores",
    "scores-rows": "Final scores against memory rows, with published points",
    "scores-base": "Final scores against base size",
    "next-parameter": "Gain over the base against what each destination adds",
    "equivalent-size": "Size of a wider reference of equal gain against parameters",
    "sparse-share": "Outcome against the share of one sparse budget that is in tables",
    "equal-time": "Loss at equal wall-clock time",
    "scores-cost": "Final scores against training FLOPs and bytes read per token",
    "learning-forgetting": "New facts: bits gained against what is forgotten, with the hull of each method",
    "retention": "New facts: gain retained after further facts",
    "rows-touched": "New facts: table rows updated",
    "plan": "Predicted against measured wall-clock",
}


FIGURES: list[tuple[str, Draw, bool]] = [
    ("bits-exposures", learning.bits_against_exposures, True),
    ("memory-rows", learning.against_rows, True),
    ("controls", controls_figure, True),
    ("bits-compute", learning.bits_against_compute, True),
    ("loss-curves", learning.loss_curves, False),
    *((name, function, False) for name, function in [*CELL_FIGURES, *SCORE_FIGURES]),
    ("isoflop", isoflops_of_grid, False),
    ("next-parameter", next_parameter, False),
    ("equivalent-size", against_size, False),
    ("sparse-share", sparse_share, False),
    ("equal-time", at_equal_time, False),
    ("learning-forgetting", learning_against_forgetting, False),
    ("retention", retention, False),
    ("rows-touched", rows_touched, False),
]
"""Name, function, and whether it needs storage probes."""


def draw(context: Context, folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Draw every figure that the runs allow, and remove those of an earlier call that they no longer allow.

    Returns:
        Name -> files, and for each missing figure a line with what it needs.
    """
    drawn: dict[str, list[Path]] = {}
    missing: list[str] = []
    for name, function, needs_bits in FIGURES:
        try:
            if context.table.empty:
                raise Missing(f"no run of grid {context.grid} is finished: suite sweep {context.source}")
            if needs_bits and not context.data.has_bits:
                raise Missing(context.no_bits())
            drawn[name] = function(context, folder)
        except Missing as reason:
            missing.append(f"{name}: {reason}")
            for kind in FORMATS:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return drawn, missing
