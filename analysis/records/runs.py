"""Run directories as objects, and one row per run: accounts, ratios to the dense partner, E50.

Exposures: in a `bios` world every epoch holds each fact once, so a run's `epoch` counts exposures.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.records.shipped import shipped
from analysis.records.tables import read_json, read_lines

EQUAL = 0.05
"""Largest deviation of a ratio from 1 that is still called equal."""
GRID_FOLDERS = (Path("grids"), shipped("grids"))
"""Where a grid is found by its name."""
BITS_PER_PERSON = 39.6116
"""Entropy of a person's attributes in a `bios` world: sum of log2 of 200, 100, 50, 300, 100 and 28 values."""
BITS_PER_PARAMETER = 2.0
"""What a dense model can store, about (Allen-Zhu and Li, Physics of Language Models part 3.3)."""
SHAPE = ("layers", "dim", "heads", "kv_heads", "ffn_hidden")
PARAMS = ("params_total", "params_active", "params_memory", "params_embedding")


@dataclass(frozen=True)
class Run:
    """What one run directory holds; `missing` runs are named by a grid but have no directory yet."""

    name: str
    cell: dict[str, Any]
    hash: str
    account: dict[str, Any]
    versions: dict[str, Any]
    lines: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    state: dict[str, Any]
    usage: dict[str, Any]
    predicted_wall_s: float | None = None
    step_evals: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations of checkpoints on the way."""

    @property
    def model(self) -> dict[str, Any]:
        """The cell's model block."""
        return self.cell["model"]

    @property
    def is_dense_base(self) -> bool:
        """Whether this is the plain dense model of its base size: the partner of every ratio."""
        return self.model["family"] == "dense" and not self.reshaped

    @property
    def reshaped(self) -> bool:
        """Whether the cell overrides the shape of its base size, as dense controls of equal MACs do."""
        return any(self.model.get(field) is not None for field in SHAPE)

    @property
    def pairing(self) -> str:
        """What two runs must share to be compared: base size and data."""
        data = {key: value for key, value in self.cell["data"].items() if key != "path"}
        return json.dumps([self.model["base"], data], sort_keys=True)

    @property
    def steady(self) -> bool:
        """Whether the learning rate was constant after warm-up, so that a probe on the way stands for a shorter run."""
        return (self.cell.get("train") or {}).get("schedule", "constant") == "constant"

    @property
    def memory_rows(self) -> int:
        """Distinct rows of the memory table: half_keys squared, 0 without a memory."""
        return int(self.model.get("half_keys") or 0) ** 2

    @property
    def training(self) -> list[dict[str, Any]]:
        """The logging lines of training (training-mode loss)."""
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def table_use(self) -> pd.DataFrame:
        """Key usage in training, one row per logging step, the mean over tables: tokens, used and never_read (shares of
        rows), kl_bits."""
        rows = []
        for line in self.lines:
            for table in line.get("usage", {}).get("tables", []):
                never = table.get("never_read")
                share = float("nan") if never is None else never / table["rows"]
                use = {"used": table["used"], "never_read": share, "kl_bits": table["kl_bits"]}
                rows.append({"tokens": line["tokens"], **use})
        frame = pd.DataFrame(rows, columns=["tokens", "used", "never_read", "kl_bits"], dtype=float)
        return frame.groupby("tokens", as_index=False).mean()

    @cached_property
    def probes(self) -> pd.DataFrame:
        """One row per probe: step, tokens, epoch, train_flops, wall_s, eval_loss, and `<kind>_<metric>`
        columns."""
        rows = []
        for line in self.lines:
            if "probe" not in line and "eval_loss" not in line:
                continue
            row = {key: line.get(key) for key in ("step", "tokens", "epoch", "train_flops", "wall_s", "eval_loss")}
            for kind, scores in (line.get("probe") or {}).items():
                row |= {f"{kind}_{metric}": value for metric, value in scores.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def bits_max(self) -> float:
        """N H of the people the storage probes ask about, in bits; NaN without such probes."""
        probes = self.probes
        return float(probes["storage_bits_max"].dropna().iloc[-1]) if "storage_bits_max" in probes else float("nan")

    @property
    def tokens_per_s(self) -> float:
        """Median training speed over the logged steps, in tokens per second; NaN before the first line."""
        speeds = [line["tokens_per_s"] for line in self.training if line.get("tokens_per_s")]
        return float(np.median(speeds)) if speeds else float("nan")

    def last(self, key: str) -> float:
        """The last value a line of train.jsonl gives for `key`; NaN if none does."""
        values = [line[key] for line in self.lines if line.get(key) is not None]
        return float(values[-1]) if values else float("nan")


def read_run(folder: Path, predicted_wall_s: float | None = None) -> Run:
    """A run directory, with what a plan predicted for it; files that are not there yet count as empty, malformed ones
    are an InputError."""
    content = read_json(folder / "cell.json")
    cell = content.get("cell")
    if not isinstance(cell, dict) or not {"model", "data", "seed"} <= cell.keys():
        raise InputError(f"{folder / 'cell.json'}: field cell: needs model, data and seed")
    train = cell.get("train") or {}
    if "optimizer" in train:  # the name of the field in older records
        train["table_optimizer"] = train.pop("optimizer")
    state = read_json(folder / "state.json") if (folder / "state.json").exists() else {"state": "pending"}
    return Run(
        name=folder.name,
        cell=cell,
        hash=str(content.get("hash", folder.name.rsplit("-", 1)[-1])),
        account=content.get("account") or {},
        versions=content.get("versions") or {},
        lines=read_lines(folder / "train.jsonl"),
        evals=[read_json(path) for path in sorted(folder.glob("eval/*.json"))],
        state=state,
        usage=read_json(folder / "usage.json") if (folder / "usage.json").exists() else {},
        predicted_wall_s=predicted_wall_s,
        step_evals=[read_json(path) for path in sorted(folder.glob("eval/steps/*.json"))],
    )


def read_grids(results: Path) -> dict[str, list[str]]:
    """Grid name -> run names, from results/grids/*/grid.json."""
    grids = {}
    for path in sorted(results.glob("grids/*/grid.json")):
        content = read_json(path)
        if not isinstance(content.get("runs"), list):
            raise InputError(f"{path}: field runs: allowed: a list of run names")
        grids[str(content.get("grid", path.parent.name))] = [str(run) for run in content["runs"]]
    return grids


def read_source(results: Path, grid: str) -> str:
    """What makes `suite sweep` go on with the grid: its name, or its path, scales, and the baselines its runs keep."""
    path = Path(str(read_json(results / "grids" / grid / "grid.json").get("source", grid)))
    runs = read_grids(results)[grid]
    known = any((folder / path.name).resolve() == path.resolve() for folder in GRID_FOLDERS)
    scales = re.findall(r"-([a-z_]+)-x([^-]+(?:-\d+)?)", grid.removeprefix(path.stem))
    kept = {
        one.read_bytes(): one
        for one in sorted(results.glob("runs/*/baseline.py"), reverse=True)
        if one.parent.name in runs
    }
    given = [path.stem if known else str(path), *(f"--scale={name}={factor}" for name, factor in scales)]
    return shlex.join([*given, *(f"--baseline={one}" for one in kept.values())])


def read_runs(results: Path, grid: str | None = None) -> list[Run]:
    """All runs under `results`, or those of one grid that have a directory, in the grid's order."""
    folders = {path.parent.name: path.parent for path in sorted(results.glob("runs/*/cell.json"))}
    if grid is not None:
        grids = read_grids(results)
        if grid not in grids:
            known = ", ".join(grids) or "none yet"
            raise InputError(
                f"{results / 'grids'}: grid {grid!r} has no records (make them: suite sweep {grid}); known: {known}"
            )
        folders = {name: folders[name] for name in grids[grid] if name in folders}
    if not folders:
        raise InputError(f"{results / 'runs'}: no runs here; make some: suite sweep {grid or 'smoke'}")
    predicted = read_plans(results)
    return [read_run(folder, predicted.get(folder.name)) for folder in folders.values()]


def read_plans(results: Path) -> dict[str, float]:
    """Run name -> seconds of training that results/plans/*.json predict; runs planned on several kinds of GPU left
    out."""
    found: dict[str, list[float]] = {}
    for path in sorted(results.glob("plans/*.json")):
        for cell in read_json(path).get("cells", []):
            if cell.get("gpus"):
                found.setdefault(str(cell["run"]), []).append(3600 * float(cell["gpu_hours"]) / float(cell["gpus"]))
    return {name: seconds[0] for name, seconds in found.items() if len(seconds) == 1}


def missing_runs(results: Path, grid: str) -> list[str]:
    """Runs the grid names that have no directory."""
    return [name for name in read_grids(results)[grid] if not (results / "runs" / name / "cell.json").exists()]


@dataclass(frozen=True)
class Crossing:
    """Where a curve first reaches a level. `state`: reached; censored (not by the last point); early (at
    the first)."""

    value: float
    state: str


def crossing(epochs: np.ndarray, values: np.ndarray, level: float) -> Crossing:
    """First exposure at which `values` reach `level`, linear in log exposure between the two probes around
    it.

    A curve that ends below the level is censored at its last exposure; one that starts at or above it has
    only an upper bound, its first exposure. A first point at exposure 0 is joined linearly, where a
    logarithm has no value.
    """
    above = np.flatnonzero(values >= level)
    if len(above) == 0:
        return Crossing(float(epochs[-1]) if len(epochs) else float("nan"), "censored")
    after = int(above[0])
    if after == 0:
        return Crossing(float(epochs[0]), "early")
    low, high = float(epochs[after - 1]), float(epochs[after])
    share = float((level - values[after - 1]) / (values[after] - values[after - 1]))
    if low <= 0:
        return Crossing(low + share * (high - low), "reached")
    return Crossing(float(low * (high / low) ** share), "reached")


def at_exposure(epochs: np.ndarray, values: np.ndarray, epoch: float) -> float:
    """The curve at one exposure, linear in log exposure between probes; NaN outside them."""
    if len(epochs) == 0 or not (epochs[0] <= epoch * (1 + 1e-9) and epoch <= epochs[-1] * (1 + 1e-9)):
        return float("nan")
    positive = epochs > 0
    return float(np.interp(np.log(epoch), np.log(epochs[positive]), values[positive]))


def e50(run: Run) -> Crossing:
    """E50: the exposures at which storage bits reach half of N H; Crossing(nan, "none") without storage probes, or
    where the learning rate decays, so that what was learned by then is no shorter run's."""
    if "storage_bits" not in run.probes or not run.steady:
        return Crossing(float("nan"), "none")
    probes = run.probes.dropna(subset=["storage_bits"])
    if probes.empty:
        return Crossing(float("nan"), "none")
    return crossing(probes["epoch"].to_numpy(float), probes["storage_bits"].to_numpy(float), run.bits_max / 2)


def regime(runs: list[Run]) -> str:
    """What the `bios` worlds of these runs can show, in a sentence: learning speed or capacity; empty without any."""
    worlds = [run for run in runs if run.cell["data"].get("kind") == "bios" and run.account.get("params_total")]
    if not worlds:
        return ""
    density = [run.cell["data"]["people"] * BITS_PER_PERSON / run.account["params_total"] for run in worlds]
    if max(density) < BITS_PER_PARAMETER:
        return "Worlds hold fewer bits than the dense model could store: this measures learning speed, not capacity."
    return f"Worlds hold {min(density):.2g} to {max(density):.2g} bits per parameter (a dense model stores about 2)."


def labels(runs: list[Run]) -> dict[str, str]:
    """Run name -> the name of its variant: the family, its table or width, and what else varies within
    family and base."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model["family"], run.model["base"]), []).append(run)
    named = {}
    for (family, _), members in groups.items():
        options = [
            _flat({key: value for key, value in run.cell.items() if key not in ("seed", "evaluate")}) for run in members
        ]
        keys = sorted({key for option in options for key in option})
        varying = [key for key in keys if len({json.dumps(option.get(key)) for option in options}) > 1]
        for run, option in zip(members, options, strict=True):
            parts = [family]
            parts += [f"k{run.model['half_keys']}"] if run.model.get("half_keys") else []
            parts += [f"ffn{run.model['ffn_hidden']}"] if run.model.get("ffn_hidden") else []
            parts += [
                f"{key.split('.')[-1]}={option.get(key)}"
                for key in varying
                if key not in ("model.half_keys", "model.ffn_hidden")
            ]
            named[run.name] = " ".join(parts)
    return named


def _flat(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, without paths (they are no part of identity)."""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "path":
            flat[prefix + key] = value
    return flat


def partners(runs: list[Run]) -> dict[str, Run]:
    """Run name -> a dense run of the same base and data without an override of its shape (same training if
    there is one)."""
    dense: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_dense_base and run.account:
            dense.setdefault(run.pairing, []).append(run)
    found = {}
    for run in runs:
        candidates = dense.get(run.pairing, [])
        alike = [other for other in candidates if other.cell.get("train") == run.cell.get("train")]
        if candidates:
            found[run.name] = (alike or candidates)[0]
    return found


def ratios(run: Run, partner: Run | None) -> dict[str, float]:
    """MACs per token, total parameters and bytes read per token, each relative to the partner; NaN without
    one."""
    fields = {"macs_ratio": "macs_total", "params_ratio": "params_total", "bytes_ratio": "bytes_per_token"}
    nothing = float("nan")
    if partner is None or not run.account:
        return dict.fromkeys(fields, nothing)
    return {
        name: run.account[field] / partner.account[field]
        if run.account.get(field) and partner.account.get(field)
        else nothing
        for name, field in fields.items()
    }


def summary(runs: list[Run]) -> pd.DataFrame:
    """One row per run: identity, label, state, account, ratios, speed, how far it got, and E50.

    e50 is an exposure; e50_state says reached, censored (e50 is then the last exposure, a lower bound),
    early (an upper bound) or none (no storage probes).
    """
    named, partner = labels(runs), partners(runs)
    rows = []
    for run in runs:
        half = e50(run)
        probes = run.probes
        reached = half.state == "reached"
        rows.append(
            {
                "run": run.name,
                "cell": run.hash,
                "label": named[run.name],
                "family": run.model["family"],
                "base": run.model["base"],
                "seed": run.cell["seed"],
                "half_keys": run.model.get("half_keys"),
                "memory_rows": run.memory_rows,
                "ffn_hidden": run.model.get("ffn_hidden"),
                "reshaped": run.reshaped,
                "pairing": run.pairing,
                "train_key": json.dumps(run.cell.get("train"), sort_keys=True),
                "state": run.state.get("state"),
                "cause": run.state.get("cause"),
                **{key: run.account.get(key) for key in PARAMS},
                "macs": run.account.get("macs_total"),
                "bytes_per_token": run.account.get("bytes_per_token"),
                **ratios(run, partner.get(run.name)),
                "tokens_per_s": run.tokens_per_s,
                "wall_s": run.last("wall_s"),
                "tokens": run.last("tokens"),
                "train_flops": run.last("train_flops"),
                "epoch": run.last("epoch"),
                "eval_loss": run.last("eval_loss"),
                "e50": half.value,
                "e50_state": half.state,
                "bits_max": run.bits_max,
                "wall_to_e50": _at_crossing(probes, half.value, "wall_s") if reached else float("nan"),
                "flops_to_e50": _at_crossing(probes, half.value, "train_flops") if reached else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def _at_crossing(probes: pd.DataFrame, epoch: float, key: str) -> float:
    """Wall-clock or FLOPs at an exposure: both grow linearly with tokens, so linear in exposure."""
    known = probes.dropna(subset=[key])
    return float(np.interp(epoch, known["epoch"].to_numpy(float), known[key].to_numpy(float)))
