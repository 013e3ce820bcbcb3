"""Final scores, and when two of them are the same thing.

Two scores may be compared only if they agree in all of IDENTITY: task and its version, the prompts (by their hash),
few-shot examples, limit, number of documents, the data (by its fingerprint), and the precision of matrix products.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

IDENTITY = ("task", "metric", "version", "prompt_hash", "few_shot", "limit", "n", "data_fingerprint", "precision")
LOSS = "eval/nll"
"""The last evaluation-mode loss of training, as a score."""
NOT_A_SCORE = ("bits_max",)


def without_tables(scores: pd.DataFrame, recorded: pd.DataFrame) -> pd.DataFrame:
    """Return what switching off the tables costs.

    Args:
        scores: The final scores, see `final_scores`.
        recorded: All recorded scores: run, split, IDENTITY, value.

    Returns:
        One row for each of `scores` that was also recorded with tables switched off: its columns, and `off`.
    """
    off = recorded.loc[recorded["split"] == "table_off", ["run", *IDENTITY, "value"]].rename(columns={"value": "off"})
    off = off.drop_duplicates(["run", *IDENTITY], keep="last")
    return scores.merge(off, on=["run", *IDENTITY]) if len(off) else scores.iloc[:0].assign(off=np.array([]))


def final_scores(runs: pd.DataFrame, scores: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Return the final scores of all runs.

    Args:
        runs: One row per run, with its last `eval_loss`.
        scores: All recorded scores: run, split, IDENTITY, value, stderr.
        answers: For each of `scores`, 0 and 1 by question as text, or None.

    Returns:
        One row per run and score: run (position), IDENTITY, value, stderr, answers, `key` (task/metric) and `score`, a
        number that equal identities share, in the order of their keys, LOSS first.
    """
    table = scores.assign(answers=answers["answers"])
    table = table[(table["split"] == "final") & table["value"].notna() & ~table["metric"].isin(NOT_A_SCORE)]
    loss = runs["eval_loss"].dropna()
    task, metric = LOSS.split("/")
    losses = pd.DataFrame({"run": loss.index, "task": task, "metric": metric, "value": loss.to_numpy(float)})
    table = pd.concat([losses, table], ignore_index=True) if len(losses) else table.reset_index(drop=True)
    table = table.reindex(columns=["run", *IDENTITY, "value", "stderr", "answers"])
    table = table.drop_duplicates(["run", *IDENTITY], keep="last", ignore_index=True)
    table = table.assign(key=table["task"] + "/" + table["metric"])
    order = ["loss_first", "key", *IDENTITY[2:]]
    table["loss_first"] = table["key"] != LOSS
    table["score"] = table.groupby(order, dropna=False).ngroup() if len(table) else 0
    return table.drop(columns="loss_first").sort_values(["run", "score"], ignore_index=True)


def identities(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per score identity, by `score`, with a `title` that is unique within its task and metric."""
    unique = scores.drop_duplicates("score").set_index("score").sort_index()[["key", *IDENTITY]]
    several = unique["key"].duplicated(keep=False)
    titles = [
        f"{key} ({setting(*terms)})" if repeated else key
        for key, repeated, *terms in zip(
            unique["key"], several, unique["few_shot"], unique["n"], unique["precision"], strict=True
        )
    ]
    return unique.assign(title=_distinct(titles, unique["prompt_hash"]))


def setting(few_shot: float, n: float, precision: object = "fp32") -> str:
    """Return the settings of a score as text: `5-shot, n=1,838`, with the precision unless it is fp32.

    Args:
        few_shot: Examples in the prompt; NaN if not recorded.
        n: Number of documents; NaN if not recorded.
        precision: Of matrix products; not text if not recorded.
    """
    parts = [] if np.isnan(few_shot) else [f"{few_shot:.0f}-shot"]
    parts += [] if np.isnan(n) else [f"n={n:,.0f}"]
    return ", ".join(parts + reduced(precision)) or "settings not recorded"


def reduced(precision: object) -> list[str]:
    """Return the precision in a list if it is recorded and is not fp32."""
    return [precision] if isinstance(precision, str) and precision != "fp32" else []


def _distinct(titles: list[str], hashes: pd.Series) -> list[str]:
    """Add the start of their prompts' hash to titles that are still equal."""
    repeated = pd.Series(titles).duplicated(keep=False)
    return [
        f"{title} prompts {str(digest)[:6]}" if same else title
        for title, digest, same in zip(titles, hashes, repeated, strict=True)
    ]
