"""The dense model of equal outcome (N_eq) for published sparse models that have several dense ones next to them.

Dense models of one source, task, metric and number of tokens form a curve, linear in the logarithm of the parameters.
The parameters at which it has the outcome of a sparse model are that model's N_eq. Curves are not extended: beyond
their ends N_eq is only known to lie above or below. The sources have one run of each and no intervals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.comparisons.destinations.next_parameter import crossing
from analysis.comparisons.direction import lower_is_better
from analysis.figures import style
from analysis.records.shipped import published_folder
from analysis.records.tables import markdown, number, read_table

KINDS = {
    r"dense": "dense",
    r"moe": "moe",
    r"peer": "peer",
    r"memory\+": "memory_plus",
    r"memory|pkm": "pkm",
    r"ultramem": "ultramem",
}
"""What a model's name in its paper contains -> family; the first that matches."""


@dataclass(frozen=True)
class Outcome:
    """A number that a source gives for dense and sparse models.

    Attributes:
        file: Its file in results/published.
        tables: Tables of the source that are read; their models are comparable.
        task: As in that file.
        metric: As in that file.
        title: Of the panel.
    """

    file: str
    tables: tuple[str, ...]
    task: str
    metric: str
    title: str


MEMORY_LAYERS = ("Table 1", "Table 2")
OUTCOMES = (
    Outcome("memory_layers_table1", MEMORY_LAYERS, "nq_open", "exact_match", "Memory Layers:\nNQ, exact match"),
    Outcome("memory_layers_table1", MEMORY_LAYERS, "triviaqa", "f1", "Memory Layers:\nTriviaQA, F1"),
    Outcome("ultramem", ("Table 1",), "triviaqa", "score", "UltraMem:\nTriviaQA"),
    Outcome("ultramem", ("Table 1",), "ValLoss", "loss", "UltraMem:\nvalidation loss"),
    Outcome("sparse_memory_lm", ("steps 1 and cloud",), "Wikipedia validation", "ppl", "re133:\nWikipedia perplexity"),
)
CAUTION = (
    "N_eq: parameters of a dense model of equal outcome, from the dense models of the same source at equal tokens, "
    "linear in the logarithm of the parameters (perplexities as their logarithm). One run each in the sources; no "
    "interval. Arrows: better than the largest dense model, or worse than the smallest. The 8b dense model of Memory "
    "Layers has another data mix and tokenizer than the smaller ones, on which N_eq above 1.3b depends."
)


def equivalent_sizes(results: Path) -> pd.DataFrame:
    """Return the N_eq of every published sparse model of OUTCOMES.

    Args:
        results: The folder of results; its published numbers, or the shipped ones.

    Returns:
        One row per outcome and model: `outcome` (its position), `model`, `base`, `family`, `params_total`, `letter` (of
        its confidence), `n_eq` in parameters, and `side`: "" for a crossing, "above" or "below" if the curve ends at
        `n_eq` before it has that outcome.
    """
    rows = []
    for position, outcome in enumerate(OUTCOMES):
        numbers = _numbers(outcome, results)
        dense = numbers[numbers["family"] == "dense"].sort_values("params_total")
        sizes, values = np.log(dense["params_total"].to_numpy(float)), dense["outcome"].to_numpy(float)
        for model in numbers[numbers["family"] != "dense"].to_dict("records"):
            side = "above" if model["outcome"] > values.max() else "below" if model["outcome"] < values.min() else ""
            end = {"above": sizes[-1], "below": sizes[0]}
            at = end[side] if side else crossing(sizes, values, model["outcome"])
            assert at is not None, "between the curve's least and greatest values it has a crossing"
            named = {name: model[name] for name in ("model", "base", "family", "params_total", "letter")}
            rows.append({"outcome": position, **named, "n_eq": float(np.exp(at)), "side": side})
    return pd.DataFrame(rows)


def _numbers(outcome: Outcome, results: Path) -> pd.DataFrame:
    """Return the models of one outcome: largest is best, with family and confidence; at the commonest token count."""
    folder = published_folder(results)
    files = [outcome.file]
    if outcome.tables == MEMORY_LAYERS:
        files.append("memory_layers_table2_8b")
    table = pd.concat([read_table(folder / f"{file}.csv") for file in files], ignore_index=True)
    chosen = table[table["table"].isin(outcome.tables) & (table["task"] == outcome.task)]
    chosen = chosen[(chosen["metric"] == outcome.metric) & chosen["params_total"].notna()]
    if chosen["tokens"].notna().any():
        chosen = chosen[chosen["tokens"] == chosen["tokens"].mode().iloc[0]]
    value = chosen["value"].to_numpy(float)
    if outcome.metric == "ppl":
        value = np.log(value)
    return chosen.assign(
        outcome=-value if lower_is_better(outcome.metric) else value,
        family=[_family(name) for name in chosen["model"]],
        letter=chosen["confidence"].str[0],
    )


def _family(model: str) -> str:
    return next((family for text, family in KINDS.items() if re.search(text, model, re.IGNORECASE)), "other")


def page(sizes: pd.DataFrame) -> str:
    """Return the table of `equivalent_sizes` as Markdown."""
    headers = ["source and outcome", "model", "base", "parameters", "N_eq", "N_eq / parameters"]
    rows = []
    for row in sizes.to_dict("records"):
        sign = {"": "", "above": "> ", "below": "< "}[row["side"]]
        share = row["n_eq"] / row["params_total"]
        title = OUTCOMES[row["outcome"]].title.replace("\n", " ")
        counts = [f"{number(row['params_total'] / 1e9)}b", f"{sign}{number(row['n_eq'] / 1e9)}b"]
        rows.append([title, f"{row['model']} ({row['letter']})", row["base"], *counts, f"{sign}{number(share)}"])
    return f"# Published equivalent sizes\n\n{CAUTION}\n\n{markdown(headers, rows, left=3)}\n"


def draw(sizes: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw N_eq against the parameters of each model, a panel per outcome.

    Args:
        sizes: As `equivalent_sizes` returns them.
        folder: Where the files are written.

    Returns:
        PNG, PDF and SVG.
    """
    looks = style.looks([(family, family) for family in sizes["family"]])
    arrows = {"above": ("^", 1.7), "below": ("v", 1 / 1.7)}
    with style.figure(1, len(OUTCOMES), width=11.0, height=3.0, sharex=True, sharey=True) as (drawn, axes):
        for position, (axis, outcome) in enumerate(zip(axes, OUTCOMES, strict=True)):
            part = sizes[sizes["outcome"] == position]
            for (family, side), group in part.groupby(["family", "side"], sort=False):
                look = looks[str(family)]
                axis.plot(group["params_total"], group["n_eq"], look.marker, color=look.color, label=str(family))
                if side in arrows:
                    arrow, distance = arrows[str(side)]
                    axis.plot(group["params_total"], group["n_eq"] * distance, arrow, color=look.color, markersize=3)
            span = np.array([part["n_eq"].min(), part["params_total"].max()])
            axis.plot(span, span, color="#888888", linewidth=0.8, label="as good as dense of its size")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("parameters")
            axis.set_title(outcome.title, loc="left")
        axes[0].set_ylabel("N_eq: parameters of a\ndense model of equal outcome")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "published-equivalent-size", CAUTION)
