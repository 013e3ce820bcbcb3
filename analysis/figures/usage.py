"""How memories are used: rows read and evenness of reads, of the finished models and over training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.scene import BESIDE, Missing, Scene, dot
from analysis.records.runs import Run


def usage_figure(found: Scene, folder: Path) -> list[Path]:
    """Share of rows read and unevenness of reads, of every model with a table; the mean over a run's tables."""
    used: list[tuple[str, str, np.ndarray]] = []
    uneven: list[tuple[str, str, np.ndarray]] = []
    for base in found.bases:
        for label, runs in found.variants(base):
            known = [tables for run in runs if (tables := run.usage.get("tables"))]
            if known:
                shares = [100 * float(np.mean([table["used"] for table in tables])) for tables in known]
                bits = [float(np.mean([table["kl_bits"] for table in tables])) for tables in known]
                used.append((f"{base} {label}", label, np.array(shares)))
                uneven.append((f"{base} {label}", label, np.array(bits)))
    if not used:
        raise Missing(
            f"no usage.json in grid {found.grid}; suite sweep {found.source} writes it for models with a memory"
        )
    with style.figure(1, 2, width=7.0, height=1.3 + 0.3 * len(used), sharey=True) as (drawn, axes):
        for axis, rows, words in zip(
            axes, (used, uneven), ("rows read at all, %", "KL from even use, bits"), strict=True
        ):
            for position, (_, label, values) in enumerate(rows):
                dot(axis, position, values, found.looks[label], sideways=True)
            axis.set_yticks(range(len(rows)), [f"{text} (n={len(values)})" for text, _, values in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.set_xlabel(words)
        note = "Reads of the finished model over a fixed sample of training text, mean over its tables. " + BESIDE
        return style.save(drawn, folder, "key-usage", found.note(note))


PANELS = (
    ("used", 100, "rows read by a step, %"),
    ("never_read", 100, "rows no step has read, %"),
    ("kl_bits", 1, "KL from even use, bits"),
)


def usage_in_training(found: Scene, folder: Path) -> list[Path]:
    """Rows read, rows never read and unevenness of reads against training tokens, a line of panels per base."""
    known = {base: variants for base in found.bases if (variants := _recorded(found, base))}
    if not known:
        raise Missing(
            f"no usage in train.jsonl of grid {found.grid}; suite sweep {found.source} writes it for memories"
        )
    with style.figure(len(known), len(PANELS), width=7.4, height=2.5 * len(known), sharex="row") as (drawn, axes):
        for row, (base, variants) in enumerate(known.items()):
            for axis, (key, factor, words) in zip(axes[len(PANELS) * row :], PANELS, strict=False):
                for label, tables in variants:
                    look = found.looks[label]
                    for table in tables:
                        axis.plot(table["tokens"], factor * table[key], color=look.color, alpha=0.18, linewidth=0.6)
                    mean = _mean(tables)
                    axis.plot(
                        mean["tokens"],
                        factor * mean[key],
                        color=look.color,
                        linestyle=look.linestyle,
                        alpha=look.alpha,
                        label=found.named(label),
                    )
                style.log_axis(axis)
                axis.set_ylim(bottom=0)
                axis.set_xlabel("training tokens")
                axis.set_ylabel(words)
                axis.set_title(f"base {base}", loc="left")
        style.legend_above(drawn, axes)
        note = (
            "Reads of single training steps, mean over tables; a step reads no more rows than it looks up, and fewer "
            "lookups look less even. Thick: mean over seeds as far as all of them ran; thin: single runs; n: number of "
            "runs."
        )
        return style.save(drawn, folder, "key-usage-training", found.note(note))


def _recorded(found: Scene, base: str) -> list[tuple[str, list[pd.DataFrame]]]:
    """The variants of a base whose runs recorded their use of tables, with what they recorded."""
    variants = [(label, _tables(runs)) for label, runs in found.variants(base)]
    return [(label, tables) for label, tables in variants if tables]


def _tables(runs: list[Run]) -> list[pd.DataFrame]:
    return [run.table_use for run in runs if len(run.table_use)]


def _mean(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The mean over runs at the tokens that all of them recorded."""
    every = pd.concat(tables).groupby("tokens")
    return every.mean()[every.size() == len(tables)].reset_index()
