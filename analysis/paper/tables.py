"""Tables 1 to 4 of "Memory Layers at Scale", as Markdown and drawn: the published numbers, with ours next to them.

Every published number carries the first letter of its confidence, see analysis.paper.figures.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd

from analysis.figures import style
from analysis.records.tables import markdown, number

NAMES = {
    "nq_open": "NQ",
    "triviaqa": "TQA",
    "hotpotqa": "HotpotQA",
    "piqa": "PIQA",
    "openbookqa": "OBQA",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
}
SCORES = (
    ("Table 1", "Table 1", ["nq_open", "triviaqa", "piqa", "openbookqa", "hotpotqa"]),
    (
        "Table 2, 8b",
        "Table 2",
        ["hellaswag", "hotpotqa", "humaneval", "mbpp", "mmlu", "nq_open", "openbookqa", "piqa", "triviaqa"],
    ),
)
ABLATIONS = (
    ("Table 3, left: placement", "Table 3 left"),
    ("Table 3, right: variants", "Table 3 right"),
    ("Table 4, left: value width", "Table 4 left"),
    ("Table 4, right: key width", "Table 4 right"),
)
COUNTED = "*: the total is our arithmetic, not printed."
TRAPS = (
    "Traps: the 2^20 point of the printed curve is the vanilla Memory row of table 1, not Memory+ (crosses: table 1's "
    "Memory+). The printed total of Memory+ with 2^20 rows, 3.377b, looks copied from the Memory row: counted, 3.368b. "
    "TriviaQA at 2^24 reads 59.0 in the figure, 58.67 in table 1."
)
ABLATION_NOTE = (
    "A public note warns that rows of tables 3 and 4 may be misaligned where text is extracted from the PDF; the "
    "budget of the paper's runs is not stated. Train NLL of ours is the mean loss of the last ten logged steps."
)
LETTERS = "Letters: A two transcriptions agree, B one, C read off the figure (+-0.1 points, +-0.03 NLL)."


@dataclass(frozen=True)
class Table:
    """A table of the paper: its title, column headers and cells."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def tables(theirs: pd.DataFrame, mine: pd.DataFrame) -> str:
    """Return tables 1 to 4 as Markdown: the published number with its letter, and ours where runs match."""
    text = [
        '# Tables of "Memory Layers at Scale" (arXiv:2412.09764)\n',
        f"{LETTERS} Scores in %; NLL in nats. `–`: not found. Ours, where a run matches: value (n runs, tokens).\n",
    ]
    for parts in filled(theirs, mine).values():
        for part in parts:
            text += [f"## {part.title}\n", markdown(part.heads, part.rows)]
    return "\n".join([*text, f"{COUNTED} {TRAPS}\n", f"{ABLATION_NOTE}\n"])


def draw_tables(theirs: pd.DataFrame, mine: pd.DataFrame, folder: Path) -> dict[str, list[Path]]:
    """Draw each table of the paper as a figure, and return its files by name.

    Args:
        theirs: The published numbers.
        mine: The final scores of matching runs.
        folder: Where the figures are written.
    """
    tables = filled(theirs, mine)
    return {name: _draw(name, parts, len(mine) > 0, folder) for name, parts in tables.items()}


def filled(theirs: pd.DataFrame, mine: pd.DataFrame) -> dict[str, list[Table]]:
    """Return `table1` to `table4`, each as one table or as its left and its right one."""
    tables: dict[str, list[Table]] = {}
    for title, name, wanted in SCORES:
        tables[name.lower().replace(" ", "")] = [_scores_table(title, theirs[theirs["table"] == name], mine, wanted)]
    for title, start in ABLATIONS:
        part = theirs[theirs["table"].str.startswith(start)]
        tables.setdefault(f"table{start.split()[1]}", []).append(_ablation_table(title, part, mine))
    return tables


def _draw(name: str, parts: list[Table], with_ours: bool, folder: Path) -> list[Path]:
    """Return the parts under each other, each cell as in Markdown."""
    from matplotlib.transforms import Bbox

    heights = [len(part.rows) + 2 for part in parts]
    widths = [[max(map(len, column)) + 2 for column in zip(part.heads, *part.rows, strict=True)] for part in parts]
    size = {"width": max(5.0, 0.08 * max(map(sum, widths))), "height": 0.2 * sum(heights)}
    with style.figure(len(parts), 1, **size, height_ratios=heights) as (drawn, axes):
        for axis, part, shares in zip(axes, parts, widths, strict=True):
            axis.axis("off")
            axis.set_title(part.title, loc="left")
            table = axis.table(
                part.rows,
                colLabels=part.heads,
                colWidths=[width / sum(shares) for width in shares],
                cellLoc="right",
                edges="horizontal",
                bbox=Bbox.unit(),
            )
            table.auto_set_font_size(False)
            table.set_fontsize(7)
            for (row, column), cell in table.get_celld().items():
                cell.set_edgecolor("#dddddd")
                cell.set_text_props(ha="left" if column == 0 else "right", weight="bold" if row == 0 else "normal")
        more = {"table1": f" {COUNTED} {TRAPS}", "table3": f" {ABLATION_NOTE}", "table4": f" {ABLATION_NOTE}"}
        note = f"{LETTERS} Scores in %, NLL in nats; –: not found.{more.get(name, '')} Source: arXiv:2412.09764"
        return style.save(drawn, folder, name, f"{note}; ours: value (n runs, tokens)." if with_ours else f"{note}.")


def _scores_table(title: str, part: pd.DataFrame, mine: pd.DataFrame, wanted: list[str]) -> Table:
    rows = []
    keys = ["base", "family", "model", "memory_rows", "tokens"]
    mine = mine[mine["plain"].astype(bool)]
    for values, group in part.groupby(keys, sort=False, dropna=False):
        base, family, model, count, tokens = cast(tuple[str, str, str, float, float], values)
        matching, same = (
            table[(table["base"] == base) & (table["family"] == family) & (table["memory_rows"] == count)]
            for table in (mine, part)
        )
        # Of rows that differ in the budget alone, a run belongs to the nearest.
        matching = matching.loc[[_nearest(same["tokens"], seen) == tokens for seen in matching["tokens"]]]
        cells = [_cell(group[group["task"] == task], matching[matching["task"] == task], 100) for task in wanted]
        counted = COUNTED[0] if group["note"].str.contains("our arithmetic").any() else ""
        rows.append([f"{base} {model}", number(count), _size(group) + counted, f"{number(tokens / 1e9)}b", *cells])
    return Table(title, ["model", "rows", "parameters", "tokens", *(NAMES[task] for task in wanted)], rows)


def _nearest(budgets: pd.Series, tokens: float) -> float:
    return float(min(budgets, key=lambda budget: abs(math.log(budget / tokens))))


def _size(group: pd.DataFrame) -> str:
    """Return the total as a number, or as it is printed where that is none."""
    total, printed = group["params_total"].iloc[0], re.search(r"printed total: ([^;]+)", group["note"].iloc[0])
    return printed[1] if printed else f"{number(total / 1e6)}m"


def _ablation_table(title: str, part: pd.DataFrame, mine: pd.DataFrame) -> Table:
    rows = []
    for model, group in part.groupby("model", sort=False):
        matching = mine[[model in names for names in mine["variant"]]] if len(mine) else mine
        nll = matching[matching["metric"] == "nll"]
        cells = [
            _cell(group[group["task"] == task], nll[nll["task"] == task], 1)
            for task in ("train", "nq_open", "triviaqa")
        ]
        rows.append([str(model), number(group["memory_rows"].iloc[0]), *cells])
    return Table(title, ["model (373m)", "rows", "train NLL", "NQ NLL", "TQA NLL"], rows)


def _cell(printed: pd.DataFrame, mine: pd.DataFrame, scale: float) -> str:
    """Return `7.76 A`, and ours behind it for the same metric, by budget."""
    if printed.empty:
        return "–"
    row = printed.iloc[0]
    same = mine[mine["metric"] == row["metric"]]
    own = [
        f"; ours {runs['value'].mean() * scale:.2f} ({len(runs)}, {number(cast(float, tokens) / 1e9)}b)"
        for tokens, runs in same.groupby("tokens", dropna=False)
    ]
    return f"{row['value'] * scale:.2f} {row['letter']}{''.join(own)}"
