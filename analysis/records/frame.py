"""The tidy frame: one row per run x step x task x metric, with the columns of the design and no others.

Rows come from run directories (source `run`) and from published tables (source: the paper). What a run logs
maps to
    training lines   split train   task train            metrics loss (training mode, nats per token), epoch
    probe lines      split probe   task eval             metrics nll (evaluation mode, nats per token), epoch
                                   task bios_<kind>      metrics bits, bits_max, nll, recall
    eval files       split final   task as evaluated     every metric, with stderr
    eval/steps       split steps   the same, of checkpoints on the way
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import InputError
from analysis.records.runs import Run, partners, ratios, read_grids, read_runs
from analysis.records.tables import read_table

COLUMNS = [
    "cell",
    "family",
    "base",
    "seed",
    "half_keys",
    "memory_rows",
    "params_total",
    "params_memory",
    "params_active",
    "flops_per_token",
    "bytes_per_token",
    "tokens",
    "train_flops",
    "wall_s",
    "tokens_per_s",
    "step",
    "split",
    "task",
    "task_version",
    "few_shot",
    "metric",
    "value",
    "stderr",
    "n",
    "run",
    "grids",
    "macs_ratio",
    "params_ratio",
    "predicted_wall_s",
    "source",
    "confidence",
]
TEXT = {
    "cell",
    "family",
    "base",
    "split",
    "task",
    "task_version",
    "metric",
    "run",
    "grids",
    "source",
    "confidence",
}
PUBLISHED = {
    "base_size": "base",
    "model_family": "family",
    "memory_keys": "memory_rows",
    "total_params": "params_total",
}
"""Column names in tables taken from papers -> ours."""


def load(results: Path, grid: str | None = None, published: bool = True) -> pd.DataFrame:
    """The frame of a results folder: its runs (of one grid, if named) and its published tables."""
    grids = read_grids(results)
    parts = [from_runs(read_runs(results, grid), grids)]
    if published:
        parts.append(load_published(results))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def load_published(results: Path) -> pd.DataFrame:
    """All published tables of a results folder, as one frame (empty without any)."""
    parts = [read_published(path) for path in sorted(results.glob("published/*.csv"))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def from_runs(runs: list[Run], grids: dict[str, list[str]]) -> pd.DataFrame:
    """The frame of these runs; `grids` maps a grid to its run names."""
    partner = partners(runs)
    rows: list[dict[str, Any]] = []
    for run in runs:
        member = ";".join(name for name, names in grids.items() if run.name in names)
        relative = ratios(run, partner.get(run.name))
        common = {
            "cell": run.hash,
            "run": run.name,
            "family": run.model["family"],
            "base": run.model["base"],
            "seed": run.cell["seed"],
            "half_keys": run.model.get("half_keys"),
            "memory_rows": run.memory_rows,
            "grids": member,
            "macs_ratio": relative["macs_ratio"],
            "params_ratio": relative["params_ratio"],
            "predicted_wall_s": run.predicted_wall_s,
            "source": "run",
            **{
                key: run.account.get(key)
                for key in ("params_total", "params_memory", "params_active", "flops_per_token", "bytes_per_token")
            },
        }
        rows += [common | row for row in _rows(run)]
    return _typed(pd.DataFrame(rows))


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """What varies within a run: one dictionary per step, task and metric."""
    for line in run.lines:
        at = {key: line.get(key) for key in ("step", "tokens", "train_flops", "wall_s", "tokens_per_s")}
        if "loss" in line:
            yield at | {"split": "train", "task": "train", "metric": "loss", "value": line["loss"]}
            yield at | {"split": "train", "task": "train", "metric": "epoch", "value": line.get("epoch")}
        if "eval_loss" in line:
            yield at | {"split": "probe", "task": "eval", "metric": "nll", "value": line["eval_loss"]}
            yield at | {"split": "probe", "task": "eval", "metric": "epoch", "value": line.get("epoch")}
        for kind, scores in (line.get("probe") or {}).items():
            for metric in ("bits", "bits_max", "nll", "recall"):
                if metric in scores:
                    yield at | {
                        "split": "probe",
                        "task": f"bios_{kind}",
                        "metric": metric,
                        "value": scores[metric],
                        "n": scores.get("n"),
                    }
    end = {key: run.last(key) for key in ("tokens", "train_flops", "wall_s")} | {"tokens_per_s": run.tokens_per_s}
    for evaluation in run.evals:
        yield from (end | {"split": "final"} | score for score in _scores(evaluation))
    for evaluation in run.step_evals:
        tokens = evaluation.get("tokens") or 0
        at = {"split": "steps", "tokens": tokens, "train_flops": tokens * (run.account.get("flops_per_token") or 0)}
        yield from (at | score for score in _scores(evaluation))


def _scores(evaluation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics of an evaluation's tasks."""
    for task, scored in evaluation.get("tasks", {}).items():
        for metric, score in scored.get("metrics", {}).items():
            yield {
                "step": evaluation.get("step"),
                "task": task,
                "metric": metric,
                "task_version": scored.get("version"),
                "few_shot": scored.get("few_shot"),
                "n": scored.get("n"),
                "value": score.get("value"),
                "stderr": score.get("stderr"),
            }


def read_published(path: Path) -> pd.DataFrame:
    """A table of published numbers as a frame; its columns are the frame's or the papers' names for them."""
    table = read_table(path)
    missing = {"source", "task", "metric", "value"} - set(table.columns)
    if missing:
        raise InputError(
            f"{path}: columns {', '.join(sorted(missing))} are missing, needed: source, task, metric, value"
        )
    table = table.rename(columns={key: name for key, name in PUBLISHED.items() if name not in table.columns})
    if "split" not in table.columns:
        table["split"] = "published"
    for column in ("params_total", "tokens"):
        if column in table.columns:
            table[column] = [amount(value) for value in table[column]]
    return _typed(table)


def amount(text: object) -> float:
    """A count as papers write it: 1.3b, 984m, 512k, 1T, 15,000; NaN for anything else."""
    match = re.fullmatch(r"\s*([0-9][0-9,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]?)\s*", str(text).lower())
    if not match:
        return float("nan")
    scale = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]]
    return round(float(match[1].replace(",", "")) * scale, 6)  # 4.1b is no 4,099,999,999.9999995


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Exactly the columns of the frame: text as objects (None where absent), everything else as numbers."""
    table = table.reindex(columns=COLUMNS)
    for column in COLUMNS:
        if column in TEXT:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
            table[column] = [None if value is None else str(value) for value in table[column]]
        else:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table
