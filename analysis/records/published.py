"""Tables of numbers taken from papers, put into the frame's columns.

    python -m analysis.records.published SOURCE TARGET


What changes: families, tasks and metrics get our names, scores out of 100 become shares as lm-eval gives them, and
counts become plain numbers. The paper's name of a model stays in `model`, its table in `table`, and what matters for
comparisons in `note`; source and confidence are copied unchanged.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

from analysis.records.frame import amount
from analysis.records.tables import read_table

COLUMNS = [
    "source",
    "table",
    "model",
    "family",
    "base",
    "half_keys",
    "memory_rows",
    "params_total",
    "tokens",
    "task",
    "few_shot",
    "metric",
    "value",
    "confidence",
    "note",
]
PAPER = "arXiv:2412.09764"
TASKS = {
    "NQ": "nq_open",
    "TQA": "triviaqa",
    "TriviaQA": "triviaqa",
    "HotpotQA": "hotpotqa",
    "PIQA": "piqa",
    "OBQA": "openbookqa",
    "HellaSwag": "hellaswag",
    "MMLU": "mmlu",
    "HumanEval": "humaneval",
    "MBPP": "mbpp",
}
SHARES = {
    "exact_match": "exact_match",
    "EM": "exact_match",
    "F1": "f1",
    "accuracy": "acc",
    "acc": "acc",
    "pass@1": "pass@1",
}
"""Metrics that papers print as percentages -> lm-eval's name of the share."""
OURS = {"em": "exact_match"}
"""Metrics of our tasks that have another name here."""
FAMILIES = [
    (r"dense", "dense"),
    (r"MoE-EC", "moe"),
    (r"PEER", "peer"),
    (r"Memory\+|\+swilu", "memory_plus"),
    (r"Memory |PK |\+|key_dim|v_dim", "pkm"),
]
"""Beginning of a model's name in "Memory Layers at Scale" -> our family. "+swilu" is Memory+'s projection."""

COPIED_TOTAL = "total looks copied from the vanilla row: counted, it is 3.368b"
VANILLA_POINT = "first step of the curve: equals the vanilla Memory row of table 1, not Memory+ (13.68 / 42.89)"
OTHER_READING = "the figure reads 59.0, table 1 says 58.67"
MISALIGNED = "a public note warns that text extraction from the PDF can misalign the rows of this table"


NO_TASK = "none"
"""Task of a number that measures no task, such as the size of a table."""


def normalise(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as collected (source, table, base_size, model_family, memory_keys, ...) in COLUMNS."""
    table = table.assign(task=table["task"].fillna(NO_TASK))
    # Some sources print accuracies as shares: then no value of a task is above 1.
    largest = table.groupby(["source", "table", "task", "metric"], dropna=False)["value"].transform("max")
    return pd.DataFrame(
        [_row(row, bool(is_share)) for row, is_share in zip(table.to_dict("records"), largest <= 1, strict=True)],
        columns=COLUMNS,
    )


def _row(row: dict, is_share: bool) -> dict[str, object]:
    ours = str(row["source"]).startswith(PAPER)
    model, total, tokens = str(row["model_family"]), _text(row["total_params"]), _text(row["tokens"])
    metric, few_shot = _metric(str(row["metric"]))
    rows = amount(_text(row["memory_keys"]).removesuffix(".0"))
    side = round(rows**0.5) if rows == rows else 0
    return {
        "source": row["source"],
        "table": row["table"],
        "model": model,
        "base": _text(row["base_size"]) or None,
        "family": _family(model) if ours else "dense" if model.lower().startswith("dense") else model,
        "half_keys": side if side and side * side == rows else None,
        "memory_rows": rows,
        "params_total": amount(total.removesuffix(" (derived)")),
        "tokens": amount(tokens),
        "task": TASKS.get(str(row["task"]), row["task"]),
        "few_shot": few_shot,
        "metric": SHARES.get(metric, metric),
        "value": round(row["value"] / 100, 6) if metric in SHARES and not is_share else row["value"],
        "confidence": row["confidence"],
        "note": "; ".join(_notes(row, model, total, tokens)) or None,
    }


def _metric(text: str) -> tuple[str, int | None]:
    """Split `acc 5-shot` into (acc, 5); a metric without a count of examples stays as it is."""
    match = re.fullmatch(r"(\S+) (\d+)-shot", text)
    return (match[1], int(match[2])) if match else (text, None)


def _family(model: str) -> str:
    return next((family for pattern, family in FAMILIES if re.match(pattern, model)), model)


def _notes(row: dict, model: str, total: str, tokens: str) -> list[str]:
    """Return what matters for comparing this number with others."""
    notes = []
    if total.endswith("(derived)"):
        notes.append("total is our arithmetic, not printed")
    elif total and amount(total) != amount(total):
        notes.append(f"printed total: {total}")
    for name, text in (("tokens", tokens), ("memory", _text(row["memory_keys"]))):
        if text and amount(text) != amount(text):
            notes.append(f"{name}: {text}")
    if str(row["source"]).startswith(PAPER):
        notes += _traps(row, model, total)
    return notes


def _traps(row: dict, model: str, total: str) -> list[str]:
    """Return what is wrong, or may be, with a number of "Memory Layers at Scale" as printed."""
    table, here = str(row["table"]), (row["task"], row["metric"], row["memory_keys"])
    holds = {
        COPIED_TOTAL: table == "Table 1" and model == "Memory+" and total == "3.377b",
        VANILLA_POINT: table.startswith("Figure 1") and model.startswith("Memory (vanilla"),
        OTHER_READING: table in ("Table 1", "Figure 1") and here == ("TQA", "F1", 2**24),
        MISALIGNED: table.startswith(("Table 3", "Table 4")),
    }
    return [note for note, applies in holds.items() if applies]


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)


def printed_as(task: str, metric: str) -> tuple[str, str]:
    """Return the task and metric of one of our evaluations as they are called in these tables: triviaqa_qa, em ->
    triviaqa, exact_match."""
    return task.removesuffix("_nll").removesuffix("_qa"), OURS.get(metric, metric)


def main(source: Path, target: Path) -> None:
    """Normalise every table of scores in `source`; tables of settings have no tasks and are left out."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.csv")):
        table = read_table(path)
        if "task" in table.columns:
            normalise(table).to_csv(target / path.name, index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
