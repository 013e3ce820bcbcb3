"""The figures and tables of "Memory Layers at Scale" from its published numbers, and from our runs that match.

A run matches a published number if base, family and table rows (in the ablations: the variant) are the paper's and the
task and metric are the same; how many tokens it saw is said beside it. Every published number carries the first letter
of its confidence: A (two or more transcriptions agree, or the paper's text), B (one transcription), C (read off a
figure).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from analysis import style
from analysis.errors import InputError
from analysis.paper_tables import LETTERS, TRAPS, draw_tables, tables
from analysis.runs import Run, read_runs
from analysis.tables import number, read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLES = ("figure1", "table1", "table2_8b", "ablations")
BASES = ("134m", "373m", "720m", "1.3b")
BESIDE = 0.11
"""Between the families of a base, as a share of the way to the next."""
METRICS = {"em": "exact_match", "pass_at_1": "pass@1"}
"""Names of metrics in our evaluations -> in the published tables."""
PANELS = (
    ("nq_open", "exact_match", "NQ, exact match, %"), ("triviaqa", "f1", "TriviaQA, F1, %"),
    ("nq_open", "nll", "NQ, answer NLL"), ("triviaqa", "nll", "TriviaQA, answer NLL"),
)  # fmt: skip


def published(results: Path) -> pd.DataFrame:
    """The paper's numbers, as committed in results/published, with `letter`, the first of their confidence."""
    paths = [results / "published" / f"memory_layers_{name}.csv" for name in TABLES]
    table = pd.concat([read_table(path) for path in paths], ignore_index=True)
    return table.assign(letter=table["confidence"].str[0], note=table["note"].fillna(""))


def ours(results: Path) -> pd.DataFrame:
    """Our runs' final scores, one row per run and score, under the paper's names of tasks and variants."""
    try:
        runs = read_runs(results)
    except InputError:
        runs = []
    rows = [row for run in runs for row in _scores(run)]
    columns = ["run", "family", "base", "memory_rows", "variant", "tokens", "task", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def _scores(run: Run) -> list[dict[str, Any]]:
    common = {"run": run.name, "family": run.model["family"], "base": run.model["base"],
              "memory_rows": run.memory_rows, "variant": variants(run.model), "tokens": run.last("tokens")}  # fmt: skip
    rows = []
    for evaluation in run.evals:
        for task, scored in evaluation.get("tasks", {}).items():
            name = task.removesuffix("_nll").removesuffix("_qa")
            for metric, score in scored.get("metrics", {}).items():
                rows.append(common | {"task": name, "metric": METRICS.get(metric, metric), "value": score["value"]})
    return rows


def variants(model: dict[str, Any]) -> tuple[str, ...]:
    """What tables 3 and 4 call a model of the 373m base; nothing if they do not have it."""
    if model["base"] != "373m" or model["family"] not in ("pkm", "memory_plus"):
        return ()
    placement = tuple(model.get("placement") or ((12,) if model["family"] == "pkm" else (4, 12, 20)))
    k_dim = model.get("k_dim") or (256 if model["family"] == "pkm" else 512)
    set_ = {name for name in ("scalar_gate", "sink", "random_rows", "qk_norm", "query_batchnorm", "keep_ffn")
            if model.get(name)} | {"value_dim" for _ in [0] if model.get("value_dim")}  # fmt: skip
    if model["family"] == "memory_plus":
        return ("+swilu",) if placement == (12,) and k_dim == 256 and not set_ else ()
    if placement != (12,):
        return (f"PK layers {','.join(map(str, placement))}",) if k_dim == 256 and not set_ else ()
    if set_:
        names = {"scalar_gate": "+gated", "sink": "+softmax sink", "random_rows": "+random values",
                 "value_dim": f"v_dim={model.get('value_dim')}"}  # fmt: skip
        return tuple(names[name] for name in set_ if name in names) if len(set_) == 1 and k_dim == 256 else ()
    key = f"key_dim={k_dim} (sum of both sub-keys)"
    return ("PK layers 12", "PK base", "v_dim=1024", key) if k_dim == 256 else (key,)


def draw(results: Path, folder: Path) -> dict[str, list[Path]]:
    """Figure 1, figure 4 and the four tables: name -> files. InputError if the published numbers are not there."""
    theirs, mine = published(results), ours(results)
    files = {
        "figure1": _figure1(theirs, mine, folder),
        "accuracy-base-size": _figure4(theirs, mine, folder),
    }
    files |= draw_tables(theirs, mine, folder)
    page = folder / "tables.md"
    page.write_text(tables(theirs, mine))
    return files | {"tables": [page]}


def _figure1(theirs: pd.DataFrame, mine: pd.DataFrame, folder: Path) -> list[Path]:
    """Scores of the 1.3b base against memory rows."""
    shown = _shown(mine[mine["base"] == "1.3b"], PANELS)
    with style.figure(1, 4, width=11.0, height=3.0) as (drawn, axes):
        for axis, (task, metric, title) in zip(axes, PANELS, strict=True):
            scale = 1 if metric == "nll" else 100
            axis.margins(y=0.12)  # room for letters
            part = theirs[(theirs["task"] == task) & (theirs["metric"] == metric)]
            curve = part[part["table"] == "Figure 1"].sort_values("memory_rows")
            _line(axis, curve, scale, "dense", "published, figure 1")
            plus = part[(part["table"] == "Table 1") & (part["family"] == "memory_plus") & (part["base"] == "1.3b")]
            axis.plot([_place(rows) for rows in plus["memory_rows"]], plus["value"] * scale, "x", color="#D55E00",
                      label="published, table 1: Memory+ (A)")  # fmt: skip
            for value in part[part["table"] == "Figure 1 (dashed)"]["value"]:
                axis.axhline(value * scale, color="#777777", linestyle="--", linewidth=1,
                             label="Llama 2 7B, 2T tokens, published (C)")  # fmt: skip
            matching = shown[(shown["task"] == task) & (shown["metric"] == metric)]
            _ours(axis, matching, lambda row: _place(row["memory_rows"]), scale)
            axis.set_xticks([18, 20, 22, 24, 26], ["0", "2$^{20}$", "2$^{22}$", "2$^{24}$", "2$^{26}$"])
            axis.set_xlabel("memory rows, 1.3b base, 1T tokens")
            axis.set_title(title, loc="left")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "figure1", f"{LETTERS} {TRAPS} Source: arXiv:2412.09764{_also(shown)}.")


def _figure4(theirs: pd.DataFrame, mine: pd.DataFrame, folder: Path) -> list[Path]:
    """Scores against the base's size, from table 1; tables of about 2^20 rows."""
    at = {base: index for index, base in enumerate(BASES)}
    shown = _shown(mine[mine["base"].isin(BASES) & (mine["memory_rows"] <= 2**20)], PANELS[:2])
    families = [family for family in style.COLOURS if family in set(theirs["family"][theirs["table"] == "Table 1"])]
    beside = {family: BESIDE * (number - (len(families) - 1) / 2) for number, family in enumerate(families)}
    with style.figure(1, 2, width=7.6, height=3.4) as (drawn, axes):
        for axis, (task, metric, title) in zip(axes, PANELS[:2], strict=True):
            part = theirs[(theirs["table"] == "Table 1") & (theirs["task"] == task) & (theirs["metric"] == metric)]
            part = part[part["base"].isin(BASES) & (part["memory_rows"] <= 2**20)]
            axis.margins(y=0.12)  # room for letters
            for family in families:
                rows = part[part["family"] == family]
                rows = rows.assign(place=rows["base"].map(at) + beside[family]).sort_values("place")
                axis.plot(rows["place"], rows["value"] * 100, color=style.COLOURS[family], mfc="white", ls=":", lw=1,
                          marker=style.MARKERS[family], label=f"{family}, published")  # fmt: skip
                _letters(axis, rows["place"], rows["value"] * 100, rows["letter"])
            matching = shown[(shown["task"] == task) & (shown["metric"] == metric)]
            _ours(axis, matching, lambda row: at[row["base"]] + beside.get(row["family"], 0.0), 100)
            axis.set_xticks(list(at.values()), list(at))
            axis.set_xlabel("base, 1T tokens")
            axis.set_title(title, loc="left")
        style.legend_above(drawn, axes)
        note = (
            f"{LETTERS} Numbers of table 1; the values of the paper's figure 4 were not found, nor any of the 720m "
            "base or of 373m Memory. Families of a base stand side by side; dotted lines lead the eye. Mixtures: "
            "expert choice in training, top-1 in evaluation. Source: arXiv:2412.09764"
        )
        return style.save(drawn, folder, "accuracy-base-size", f"{note}{_also(shown)}.")


def _shown(mine: pd.DataFrame, panels: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """Our scores that have a panel."""
    asked = [mine["task"].eq(task) & mine["metric"].eq(metric) for task, metric, _ in panels]
    return mine[np.logical_or.reduce(asked)]


def _also(mine: pd.DataFrame) -> str:
    return f"; filled: our runs ({mine['run'].nunique()}), tokens in the legend" if len(mine) else ""


def _place(rows: float) -> float:
    """log2 of the rows; no rows stand two steps before 2^20."""
    return 18.0 if rows == 0 else len(bin(int(rows))) - 3


def _line(axis: Axes, rows: pd.DataFrame, scale: float, look: str, label: str) -> None:
    place = [_place(count) for count in rows["memory_rows"]]
    axis.plot(place, rows["value"] * scale, color=style.COLOURS[look], marker="o", mfc="white", label=f"{label} (C)")
    vanilla = rows[rows["family"] == "pkm"]
    axis.plot([_place(count) for count in vanilla["memory_rows"]], vanilla["value"] * scale, "o", mfc="white",
              color=style.COLOURS["pkm"], markersize=8, label="this point is vanilla Memory")  # fmt: skip
    _letters(axis, pd.Series(place), rows["value"] * scale, rows["letter"])


def _letters(axis: Axes, places: pd.Series, values: pd.Series, letters: pd.Series) -> None:
    """A letter below each point."""
    for place, value, letter in zip(places, values, letters, strict=True):
        axis.annotate(letter, (place, value), xytext=(0, -11), textcoords="offset points", ha="center", fontsize=6,
                      color="#444444")  # fmt: skip


def _ours(axis: Axes, rows: pd.DataFrame, place: Callable[[Any], float], scale: float) -> None:
    """Our runs: filled marks, one legend entry per family and budget."""
    for key, group in rows.groupby(["family", "tokens"]):
        family, tokens = cast(tuple[str, float], key)
        axis.plot([place(row) for row in group.to_dict("records")], group["value"] * scale, linestyle="none",
                  marker=style.MARKERS.get(family, "X"), color=style.COLOURS.get(family, style.SPARE[0]),
                  label=f"{family}, ours, {number(tokens / 1e9)}b tokens")  # fmt: skip
