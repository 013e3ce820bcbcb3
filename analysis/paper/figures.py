"""The figures and tables of "Memory Layers at Scale" from its published numbers, and from our runs that match.

A run matches a published number if its model is the paper's of that base, family and table rows (in the ablations: the
variant) without other options, and if the task and metric are the same; the tokens that it saw are stated next to it. A
widened dense model, a Memory+ that keeps its feed-forward and the like match nothing.
Every published number carries the first letter of its confidence: A (two or more transcriptions agree, or the paper's
text), B (one transcription), C (read off a figure).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.figures import style
from analysis.paper import equivalent_sizes
from analysis.paper.tables import LETTERS, TRAPS, draw_tables, tables
from analysis.records.published import printed_as
from analysis.records.runs.table import COLUMNS, positions, read_store, run_table
from analysis.records.scores import LOSS, final_scores
from analysis.records.shipped import published_folder
from analysis.records.store import unnest
from analysis.records.tables import number, read_table
from analysis.records.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLES = ("figure1", "table1", "table2_8b", "ablations")
BASES = ("134m", "373m", "720m", "1.3b")
SHAPES = {
    "134m": (12, 768, 4),
    "373m": (24, 1024, 8),
    "720m": (22, 1536, 8),
    "1.3b": (22, 2048, 8),
    "8b": (32, 4096, 8),
}
"""Base -> layers, width, and layers from one memory of Memory+ to the next."""
EXPERTS = {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}
FAMILIES = ("dense", "moe", "peer", "pkm", "memory_plus")
HALF_KEYS = {None: 1024, 64: 4096, 256: 2048, 2048: 724}
"""Ablations: width of a value -> half keys; None: the model's width. 724 x 724 is as near to 512k as a square comes."""
OFFSET = 0.11
"""Between the families of a base, as a share of the distance to the next base."""
FILLS = ("full", "left", "bottom", "right", "top")
KEY_DIM = "key_dim={} (sum of both sub-keys)"
PANELS = (
    ("nq_open", "exact_match", "NQ, exact match, %"),
    ("triviaqa", "f1", "TriviaQA, F1, %"),
    ("nq_open", "nll", "NQ, answer NLL"),
    ("triviaqa", "nll", "TriviaQA, answer NLL"),
)


def published(results: Path) -> pd.DataFrame:
    """Return the paper's numbers, as committed in results/published, with `letter`, the first of their confidence."""
    paths = [published_folder(results) / f"memory_layers_{name}.csv" for name in TABLES]
    table = pd.concat([read_table(path) for path in paths], ignore_index=True)
    return table.assign(letter=table["confidence"].str[0], note=table["note"].fillna(""))


def ours(results: Path) -> pd.DataFrame:
    """Return the final scores of our runs of the paper's models, one row per run and score, under the paper's names of
    tasks and variants."""
    columns = ["run", "family", "base", "memory_rows", "plain", "variant", "tokens", "task", "metric", "value"]
    try:
        store = read_store(results, None, COLUMNS)
    except InputError:
        return pd.DataFrame(columns=columns)
    runs, _ = run_table(store, {})
    position = positions(runs, len(store))
    scores = final_scores(runs, unnest(store, "scores", position), unnest(store, "answers", position))
    runs = runs[~runs["smaller"] & runs["family"].isin(FAMILIES) & runs["base"].isin(SHAPES)]
    models = list(runs["model"])
    named = pd.Series([variants(model) for model in models], index=runs.index, dtype=object)
    runs = runs.assign(plain=[not own_options(model) for model in models], variant=named)
    scores = pd.concat([_one_setting(scores[scores["key"] != LOSS]), _recent_losses(runs)])
    return scores.merge(runs, left_on="run", right_index=True, suffixes=("_position", ""))[columns].reset_index(
        drop=True
    )


def _one_setting(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one score of each task of the paper per run: on the most questions, with the most examples of
    those, and in fp32 if it was scored in several precisions.

    Where two tasks are one in the paper, lm-eval's own counts: it is the released template's.
    """
    names = [printed_as(task, metric) for task, metric in zip(scores["task"], scores["metric"], strict=True)]
    named = scores.assign(
        own=[task.endswith("_qa") for task in scores["task"]],
        task=[task for task, _ in names],
        metric=[metric for _, metric in names],
        full=scores["precision"] == "fp32",
    )
    order = ["own", "limit", "n", "few_shot", "full"]
    ordered = named.sort_values(order, ascending=[False, True, True, True, True], na_position="last", kind="stable")
    return ordered.drop_duplicates(["run", "task", "metric"], keep="last")[["run", "task", "metric", "value"]]


def _recent_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean training loss of the last logged steps, since a single step's loss is noisy."""
    losses = runs["recent_loss"].dropna()
    return pd.DataFrame({"run": losses.index, "task": "train", "metric": "nll", "value": losses.to_numpy(float)})


def own_options(model: dict[str, Any]) -> dict[str, Any]:
    """Return the options, other than table rows, by which a model differs from the paper's of its family and base."""
    layers, width, stride = SHAPES[model["base"]]
    middle, plus = layers // 2, model["family"] == "memory_plus"
    papers = {
        "top_k": 32,
        "memory_heads": 4,
        "share": True,
        "experts": EXPERTS.get(model["base"]),
        "value_dim": width,
        "k_dim": width // 2 if plus else 256,
        "placement": [middle - stride, middle, middle + stride] if plus else [middle],
    }
    options = {name: value for name, value in model.items() if name not in ("family", "base", "half_keys")}
    return {name: value for name, value in options.items() if value is not None and value != papers.get(name, False)}


def variants(model: dict[str, Any]) -> tuple[str, ...]:
    """Return what tables 3 and 4 call a model of the 373m base; nothing if they do not have it."""
    if model["base"] != "373m" or model["family"] not in ("pkm", "memory_plus"):
        return ()
    own = own_options(model)
    if model["half_keys"] != HALF_KEYS.get(own.get("value_dim")):
        return ()
    if model["family"] == "memory_plus":
        return ("+swilu",) if own == {"placement": [12], "k_dim": 256} else ()
    if not own:
        return ("PK layers 12", "PK base", "v_dim=1024", KEY_DIM.format(256))
    if len(own) > 1:
        return ()
    ((option, value),) = own.items()
    names = {
        "placement": f"PK layers {','.join(map(str, value))}" if option == "placement" else "",
        "k_dim": KEY_DIM.format(value),
        "value_dim": f"v_dim={value}",
        "scalar_gate": "+gated",
        "sink": "+softmax sink",
        "random_rows": "+random values",
    }
    return (names[option],) if option in names else ()


def draw(results: Path, folder: Path) -> dict[str, list[Path]]:
    """Draw figure 1, figure 4, the four tables, and equivalent sizes of several papers: name -> files.

    Raises:
        InputError: There are no published numbers.
    """
    theirs, mine = published(results), ours(results)
    files = {
        "figure1": _figure1(theirs, mine, folder),
        "accuracy-base-size": _figure4(theirs, mine, folder),
    }
    files |= draw_tables(theirs, mine, folder)
    page = folder / "tables.md"
    write_text(page, tables(theirs, mine))
    sizes = equivalent_sizes.equivalent_sizes(results)
    sizes_page = folder / "equivalent-sizes.md"
    write_text(sizes_page, equivalent_sizes.page(sizes))
    drawn = {"published-equivalent-size": [*equivalent_sizes.draw(sizes, folder), sizes_page]}
    return files | {"tables": [page]} | drawn


def _figure1(theirs: pd.DataFrame, mine: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw scores of the 1.3b base against memory rows."""
    shown = _shown(mine[(mine["base"] == "1.3b") & mine["family"].isin(["dense", "pkm", "memory_plus"])], PANELS)
    with style.figure(1, 4, width=11.0, height=3.0) as (drawn, axes):
        for axis, (task, metric, title) in zip(axes, PANELS, strict=True):
            scale = 1 if metric == "nll" else 100
            axis.margins(y=0.12)  # room for letters
            part = theirs[(theirs["task"] == task) & (theirs["metric"] == metric)]
            curve = part[part["table"] == "Figure 1"].sort_values("memory_rows")
            _line(axis, curve, scale, "dense", "published, figure 1")
            plus = part[(part["table"] == "Table 1") & (part["family"] == "memory_plus") & (part["base"] == "1.3b")]
            axis.plot(
                [_place(rows) for rows in plus["memory_rows"]],
                plus["value"] * scale,
                "x",
                color="#D55E00",
                label="published, table 1: Memory+ (A)",
            )
            for value in part[part["table"] == "Figure 1 (dashed)"]["value"]:
                axis.axhline(
                    value * scale,
                    color="#777777",
                    linestyle="--",
                    linewidth=1,
                    label="Llama 2 7B, 2T tokens, published (C)",
                )
            matching = shown[(shown["task"] == task) & (shown["metric"] == metric)]
            _ours(axis, matching, lambda row: _place(row["memory_rows"]), scale)
            axis.set_xticks([18, 20, 22, 24, 26], ["0", "2$^{20}$", "2$^{22}$", "2$^{24}$", "2$^{26}$"])
            axis.set_xlabel("memory rows, 1.3b base, 1T tokens")
            axis.set_title(title, loc="left")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "figure1", f"{LETTERS} {TRAPS} Source: arXiv:2412.09764{_also(shown)}.")


def _figure4(theirs: pd.DataFrame, mine: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw scores against the base's size, from table 1; tables of about 2^20 rows."""
    at = {base: index for index, base in enumerate(BASES)}
    shown = _shown(mine[mine["base"].isin(BASES) & (mine["memory_rows"] <= 2**20)], PANELS[:2])
    families = [family for family in style.COLOURS if family in set(theirs["family"][theirs["table"] == "Table 1"])]
    offset = {family: OFFSET * (number - (len(families) - 1) / 2) for number, family in enumerate(families)}
    with style.figure(1, 2, width=7.6, height=3.4) as (drawn, axes):
        for axis, (task, metric, title) in zip(axes, PANELS[:2], strict=True):
            part = theirs[(theirs["table"] == "Table 1") & (theirs["task"] == task) & (theirs["metric"] == metric)]
            part = part[part["base"].isin(BASES) & (part["memory_rows"] <= 2**20)]
            axis.margins(y=0.12)  # room for letters
            for family in families:
                rows = part[part["family"] == family]
                rows = rows.assign(place=rows["base"].map(at) + offset[family]).sort_values("place")
                axis.plot(
                    rows["place"],
                    rows["value"] * 100,
                    color=style.COLOURS[family],
                    mfc="white",
                    ls=":",
                    lw=1,
                    marker=style.MARKERS[family],
                    label=f"{family}, published",
                )
                _letters(axis, rows["place"], rows["value"] * 100, rows["letter"])
            matching = shown[(shown["task"] == task) & (shown["metric"] == metric)]
            _ours(axis, matching, lambda row: at[row["base"]] + offset[row["family"]], 100)
            axis.set_xticks(list(at.values()), list(at))
            axis.set_xlabel("base, 1T tokens")
            axis.set_title(title, loc="left")
        style.legend_above(drawn, axes)
        note = (
            f"{LETTERS} Numbers of table 1; the values of the paper's figure 4 are not available, nor any of the 720m "
            "base or of 373m Memory. Families of a base are side by side; dotted lines guide the eye. Mixtures: "
            "expert choice in training, top-1 in evaluation. Source: arXiv:2412.09764"
        )
        return style.save(drawn, folder, "accuracy-base-size", f"{note}{_also(shown)}.")


def _shown(mine: pd.DataFrame, panels: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """Return our scores that have a panel, of the paper's models."""
    mine = mine[mine["plain"].astype(bool)]
    in_panels = [mine["task"].eq(task) & mine["metric"].eq(metric) for task, metric, _ in panels]
    return mine[np.logical_or.reduce(in_panels)]


def _also(mine: pd.DataFrame) -> str:
    return f"; filled or half filled: our runs ({mine['run'].nunique()}), tokens in the legend" if len(mine) else ""


def _place(rows: float) -> float:
    """Return log2 of the rows; no rows stand two steps before 2^20."""
    return 18.0 if rows == 0 else len(bin(int(rows))) - 3


def _line(axis: Axes, rows: pd.DataFrame, scale: float, look: str, label: str) -> None:
    place = [_place(count) for count in rows["memory_rows"]]
    axis.plot(place, rows["value"] * scale, color=style.COLOURS[look], marker="o", mfc="white", label=f"{label} (C)")
    vanilla = rows[rows["family"] == "pkm"]
    axis.plot(
        [_place(count) for count in vanilla["memory_rows"]],
        vanilla["value"] * scale,
        "o",
        mfc="white",
        color=style.COLOURS["pkm"],
        markersize=8,
        label="this point is vanilla Memory",
    )
    _letters(axis, pd.Series(place), rows["value"] * scale, rows["letter"])


def _letters(axis: Axes, places: pd.Series, values: pd.Series, letters: pd.Series) -> None:
    """Write a letter below each point."""
    for place, value, letter in zip(places, values, letters, strict=True):
        axis.annotate(
            letter,
            (place, value),
            xytext=(0, -11),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color="#444444",
        )


def _ours(axis: Axes, rows: pd.DataFrame, place: Callable[[Any], float], scale: float) -> None:
    """Draw our runs: one legend entry per family and budget, filled at the largest budget, half filled at others."""
    budgets = sorted(rows["tokens"].unique(), reverse=True)
    for key, group in rows.groupby(["family", "tokens"]):
        family, tokens = cast(tuple[str, float], key)
        axis.plot(
            [place(row) for row in group.to_dict("records")],
            group["value"] * scale,
            linestyle="none",
            marker=style.MARKERS[family],
            color=style.COLOURS[family],
            markerfacecoloralt="white",
            fillstyle=FILLS[budgets.index(tokens) % len(FILLS)],
            label=f"{family}, ours, {number(tokens / 1e9)}b tokens",
        )
