"""The record files of one run directory as plain values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from analysis.errors import InputError
from analysis.records.knowledge import KNOWLEDGE, RETENTION, read_knowledge
from analysis.records.tables import read_json, read_lines

SCALARS = {
    "cell": True,
    "hash": True,
    "account": True,
    "versions": True,
    "state": True,
    "cause": True,
    "usage_used": False,
    "usage_kl_bits": False,
    "tokens_per_s": False,
    "cpu_share": False,
    "tokens": False,
    "epoch": False,
    "train_flops": False,
    "wall_s": False,
    "eval_loss": False,
    "recent_loss": False,
}
"""Column -> whether it is text. `cell`, `account` and `versions` are JSON; `tokens` to `eval_loss` are the last values
logged; `recent_loss` is the mean training loss of the last RECENT lines."""
AT = ("step", "tokens", "epoch", "train_flops", "wall_s", "tokens_per_s")
LISTS = {
    "lines": (*AT, "loss", "eval_loss", "averaged_eval_loss"),
    "probes": ("line", "kind", "bits", "bits_max", "nll", "recall", "n"),
    "table_use": ("tokens", "used", "never_read", "kl_bits"),
    "hit_rates": ("share", "static", "lru"),
    "scores": (
        "split",
        "step",
        "tokens",
        "task",
        "metric",
        "version",
        "few_shot",
        "limit",
        "n",
        "prompt_hash",
        "data_fingerprint",
        "precision",
        "value",
        "stderr",
    ),
    "answers": ("answers",),
    "knowledge": KNOWLEDGE,
    "retention": RETENTION,
    "smaller_tables": ("source", "form", "kept_rows", "bytes", "source_bytes", "loss", "source_loss", "stderr"),
}
"""List column -> its fields. `lines`: train.jsonl; `probes`: the scores of a probe line, one entry per kind, `line` its
position in `lines`, and the kind of averaged weights begins with AVERAGED; `table_use`: means over tables; `hit_rates`:
of caches of a share of the rows, means over tables; `answers`: one entry per score; `knowledge` and `retention`: see
analysis.records.knowledge; `smaller_tables`: one entry for a run that suite quantise made, `source` the name of the
trained run, `stderr` the paired standard error of the difference of the two losses."""
RECENT = 10
AVERAGED = "averaged_"
"""Beginning of what was measured of the average of a run's weights."""
DAMAGED = "damaged"
"""State of a run with a record file that cannot be read."""

RECORDS = re.compile(r"(cell|state|usage)\.json|train\.jsonl|eval/[0-9a-f]{8}\.json|eval/steps/[0-9a-f]{8}-\d+\.json")
"""Names of the record files in a run directory."""


@dataclass
class Row:
    """One run: its scalars, and the entries of its lists as tuples."""

    name: str
    scalars: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[tuple[Any, ...]]] = field(default_factory=lambda: {name: [] for name in LISTS})


def is_record(name: str) -> bool:
    """Return whether the file of this name in a run directory is a record; copies and files of others are not."""
    return RECORDS.fullmatch(name) is not None


def read_run(folder: Path) -> Row:
    """Return the records of a run directory; one with an unreadable file is marked as damaged and has no lists."""
    row = Row(folder.name)
    try:
        _read_cell(row, folder)
        _read_state(row, folder)
        _read_usage(row, folder / "usage.json")
        _read_training(row, read_lines(folder / "train.jsonl"))
        for scores, split in (("eval", "final"), ("eval/steps", "steps")):
            for path in sorted((folder / scores).glob("*.json")):
                if is_record(f"{scores}/{path.name}"):
                    _read_scores(row, path, split)
    except (InputError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        cause = str(error) if isinstance(error, InputError) else f"{folder}: {type(error).__name__}: {error}"
        scalars = {name: row.scalars.get(name) for name in ("cell", "hash", "account", "versions")}
        return Row(folder.name, {**scalars, "state": DAMAGED, "cause": cause})
    return row


def _read_cell(row: Row, folder: Path) -> None:
    content = read_json(folder / "cell.json")
    cell = content.get("cell")
    if not isinstance(cell, dict) or not {"model", "data", "seed"} <= cell.keys():
        raise InputError(f"{folder / 'cell.json'}: field cell: needs model, data and seed")
    if not {"family", "base"} <= cell["model"].keys():
        raise InputError(f"{folder / 'cell.json'}: field cell.model: needs family and base")
    row.scalars["cell"] = json.dumps(cell)
    row.scalars["hash"] = str(content.get("hash", folder.name.rsplit("-", 1)[-1]))
    row.scalars["account"] = json.dumps(content.get("account") or {})
    row.scalars["versions"] = json.dumps(content.get("versions") or {}, sort_keys=True)
    if tables := content.get("tables"):
        loss = tables["loss"]
        sizes = tables.get("kept_rows"), tables["bytes"], tables["source_bytes"]
        numbers = (_number(value) for value in (*sizes, loss["value"], loss["reference"], loss["stderr"]))
        row.lists["smaller_tables"].append((content["started_from"]["run"], tables["form"], *numbers))


def _read_state(row: Row, folder: Path) -> None:
    path = folder / "state.json"
    state = read_json(path) if path.exists() else {"state": "pending"}
    row.scalars["state"] = str(state.get("state"))
    row.scalars["cause"] = None if state.get("cause") is None else str(state["cause"])


def _read_usage(row: Row, path: Path) -> None:
    usage = read_json(path) if path.exists() else {}
    if rates := usage.get("hit_rates"):
        for position, share in enumerate(rates["shares"]):
            means = (fmean(table[policy][position] for table in rates["tables"]) for policy in ("static", "lru"))
            row.lists["hit_rates"].append((_number(share), *means))
    if tables := usage.get("tables"):
        row.scalars["usage_used"] = fmean(table["used"] for table in tables)
        row.scalars["usage_kl_bits"] = fmean(table["kl_bits"] for table in tables)


def _read_training(row: Row, lines: list[dict[str, Any]]) -> None:
    for position, line in enumerate(lines):
        if line.get("step") is None:
            raise InputError(f"train.jsonl: line {position + 1}: has no step")
        averaged = line.get("averaged") or {}
        line[f"{AVERAGED}eval_loss"] = averaged.get("eval_loss")
        row.lists["lines"].append(tuple(_number(line.get(key)) for key in LISTS["lines"]))
        for prefix, scored in (("", line), (AVERAGED, averaged)):
            for kind, scores in (scored.get("probe") or {}).items():
                values = (_number(scores.get(key)) for key in LISTS["probes"][2:])
                row.lists["probes"].append((float(position), prefix + kind, *values))
        if tables := line.get("usage", {}).get("tables"):
            never = [table["never_read"] / table["rows"] for table in tables if table.get("never_read") is not None]
            means = (fmean(table["used"] for table in tables), fmean(never) if never else None)
            row.lists["table_use"].append(
                (_number(line["tokens"]), *means, fmean(table["kl_bits"] for table in tables))
            )
    row.lists["knowledge"], row.lists["retention"] = read_knowledge(lines)
    for key in ("tokens", "epoch", "train_flops", "wall_s", "eval_loss"):
        row.scalars[key] = next((line[key] for line in reversed(lines) if line.get(key) is not None), None)
    training = [line for line in lines if line.get("loss") is not None]
    for key in ("tokens_per_s", "cpu_share"):
        logged = [line[key] for line in training if line.get(key)]
        row.scalars[key] = median(logged) if logged else None
    row.scalars["recent_loss"] = fmean(line["loss"] for line in training[-RECENT:]) if training else None


def _read_scores(row: Row, path: Path, split: str) -> None:
    evaluation = read_json(path)
    if (evaluation.get("eval") or {}).get("table_off"):
        split = "table_off"
    common = (split, _number(evaluation.get("step")), _number(evaluation.get("tokens")))
    settings = evaluation.get("eval") or {}
    limit, precision = _number(settings.get("limit")), settings.get("precision", "fp32")
    for task, scored in evaluation.get("tasks", {}).items():
        version = None if scored.get("version") is None else str(scored["version"])
        n, few_shot = _number(scored.get("n")), _number(scored.get("few_shot"))
        hashes = (scored.get("prompt_hash"), scored.get("data_fingerprint"))
        answers = scored.get("answers") or {}
        for metric, score in scored.get("metrics", {}).items():
            values = (_number(score.get("value")), _number(score.get("stderr")))
            row.lists["scores"].append(
                (*common, task, metric, version, few_shot, limit, n, *hashes, precision, *values)
            )
            row.lists["answers"].append((answers.get(metric),))


def _number(value: Any) -> float | None:
    """Return a JSON number as a float."""
    if value is None or type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"got {value!r}, allowed: a number")
    return float(value)
