"""How memories are used: rows read and evenness of reads, hit rates of caches, and the loss of smaller tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.figures import style
from analysis.figures.context import SIDE_BY_SIDE, Context, Missing
from analysis.figures.learning import LINES, QUANTILES
from analysis.figures.marks import dot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def usage_figure(context: Context, folder: Path) -> list[Path]:
    """Draw the share of rows read and unevenness of reads, of every model with a table; the mean over a run's
    tables."""
    runs = context.table[context.table["usage_used"].notna()]
    groups = [(str(base), label, group) for base in context.bases for label, group in context.variants(base)]
    groups = [(base, label, group.loc[group.index.isin(runs.index)]) for base, label, group in groups]
    groups = [item for item in groups if len(item[2])]
    if not groups:
        raise Missing(
            f"no usage.json in grid {context.grid}; suite sweep {context.source} writes it for models with a memory"
        )
    used = [(f"{base} {label}", label, 100 * group["usage_used"].to_numpy(float)) for base, label, group in groups]
    uneven = [(f"{base} {label}", label, group["usage_kl_bits"].to_numpy(float)) for base, label, group in groups]
    names = style.row_names([f"{text} (n={len(values)})" for text, _, values in used])
    height = 1.3 + style.row_height(names) * len(used)
    with style.figure(1, 2, width=7.0, height=height, sharey=True) as (drawn, axes):
        for axis, rows, xlabel in zip(
            axes, (used, uneven), ("rows read at all, %", "KL from even use, bits"), strict=True
        ):
            for position, (_, label, values) in enumerate(rows):
                dot(axis, position, values, context.looks[label], sideways=True)
            axis.set_yticks(range(len(rows)), names)
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.set_xlabel(xlabel)
        note = "Reads of the finished model over a fixed sample of training text, mean over its tables. " + SIDE_BY_SIDE
        return style.save(drawn, folder, "key-usage", context.note(note))


PANELS = (
    ("used", 100, "rows read by a step, %"),
    ("never_read", 100, "rows no step has read, %"),
    ("kl_bits", 1, "KL from even use, bits"),
)


def usage_in_training(context: Context, folder: Path) -> list[Path]:
    """Draw rows read, rows never read and unevenness of reads against training tokens, a row of panels per base."""
    use = context.data.table_use
    by_base = {
        base: [
            (label, part) for label, group in context.variants(base) if len(part := use[use["run"].isin(group.index)])
        ]
        for base in context.bases
    }
    by_base = {base: variants for base, variants in by_base.items() if variants}
    if not by_base:
        raise Missing(
            f"no usage in train.jsonl of grid {context.grid}; suite sweep {context.source} writes it for memories"
        )
    with style.figure(len(by_base), len(PANELS), width=7.4, height=2.5 * len(by_base), sharex="row") as (drawn, axes):
        for row, (base, variants) in enumerate(by_base.items()):
            for axis, (key, factor, ylabel) in zip(axes[len(PANELS) * row :], PANELS, strict=False):
                for label, part in variants:
                    _over_training(axis, context, label, part.assign(y=factor * part[key]))
                style.log_axis(axis)
                axis.set_ylim(bottom=0)
                axis.set_xlabel("training tokens")
                axis.set_ylabel(ylabel)
                axis.set_title(f"base {base}", loc="left")
        style.legend_above(drawn, axes)
        note = (
            "Reads of single training steps, mean over tables. A step reads at most as many rows as it looks up, and "
            "fewer lookups look less even. Thick: mean over seeds as far as all of them ran; thin: single runs, or, of "
            f"more than {LINES} runs, a band with the middle 80 % of them; n: number of runs."
        )
        return style.save(drawn, folder, "key-usage-training", context.note(note))


def hit_rates(context: Context, folder: Path) -> list[Path]:
    """Draw the share of reads that a cache has against its size, a row of panels per base: static and LRU."""
    rates = context.data.hit_rates
    groups = {base: [*context.variants(base)] for base in context.bases}
    parts = {
        base: [(label, rates[rates["run"].isin(group.index)]) for label, group in variants]
        for base, variants in groups.items()
    }
    by_base = {base: variants for base, rows in parts.items() if (variants := [row for row in rows if len(row[1])])}
    if not by_base:
        raise Missing(
            f"no hit rates in usage.json of grid {context.grid}; suite sweep {context.source} writes them, "
            "and suite eval RUN where an older usage.json is deleted"
        )
    policies = {"static": "hits, most read rows, %", "lru": "hits, LRU, %"}
    with style.figure(len(by_base), 2, width=7.0, height=2.5 * len(by_base), sharey=True) as (drawn, axes):
        for row, (base, variants) in enumerate(by_base.items()):
            for axis, (policy, ylabel) in zip(axes[2 * row :], policies.items(), strict=False):
                for label, part in variants:
                    look, mean = context.looks[label], 100 * part.groupby("share")[policy].mean()
                    axis.plot(
                        100 * mean.index,
                        mean,
                        color=look.color,
                        linestyle=look.linestyle,
                        alpha=look.alpha,
                        marker=".",
                        label=context.legend(label),
                    )
                style.log_axis(axis)
                axis.set_ylim(0, 100)
                axis.set_xlabel("rows in the cache, %")
                axis.set_ylabel(ylabel)
                axis.set_title(f"base {base}", loc="left")
        style.legend_above(drawn, axes)
        note = (
            "Reads of the finished model for text outside of the sample that chose the static rows, mean over runs and "
            "tables. The LRU cache starts empty and also counts repeated reads within a token and a batch."
        )
        return style.save(drawn, folder, "hit-rates", context.note(note))


FORM_MARKERS = {"as trained": "o", "bf16": "s", "int8": "D", "fp8": "^", "int4": "v", "nf4": "P"}
LINEAR_PERCENT = 0.01
"""Changes of loss up to this many percent are drawn on a linear scale, larger ones on a logarithmic one."""


def table_bytes(context: Context, folder: Path) -> list[Path]:
    """Draw the loss, and its change from that of the trained run, against the bytes of the tables, a row of panels per
    base."""
    runs = context.data.done
    tables = context.data.smaller_tables
    tables = tables[tables["run"].isin(runs.index)]
    tables = tables.join(runs[["base", "family", "trained_label"]], on="run")
    if tables.empty:
        raise Missing(
            f"no run with smaller tables in grid {context.grid}; add quantised or kept_rows to it, then: "
            f"suite sweep {context.source}"
        )
    pairs = tables.drop_duplicates("trained_label")
    looks = style.looks(list(zip(pairs["family"], pairs["trained_label"], strict=True)))
    bases = [base for base in context.bases if base in set(tables["base"])]
    with style.figure(len(bases), 2, width=7.0, height=2.9 * len(bases)) as (drawn, axes):
        for row, base in enumerate(bases):
            left, right = panels = axes[2 * row : 2 * row + 2]
            right.set_yscale("symlog", linthresh=LINEAR_PERCENT)
            for label, part in tables[tables["base"] == base].groupby("trained_label", sort=False):
                _against_bytes(left, right, looks[str(label)], f"{label} (n={part['source'].nunique()})", part)
            right.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
            for axis, ylabel in zip(panels, ("loss, nats/token", "change of loss, %"), strict=True):
                style.log_axis(axis)
                axis.set_xlabel("bytes of all tables")
                axis.set_ylabel(ylabel)
                axis.set_title(f"base {base}", loc="left")
        for form in [form for form in FORM_MARKERS if form == "as trained" or form in set(tables["form"])]:
            axes[0].plot([], [], FORM_MARKERS[form], color=style.PLAIN.color, label=form)
        style.legend_above(drawn, axes)
        note = (
            "Loss in evaluation mode. Solid: all rows, in smaller forms; dotted: only the rows that training text "
            "reads most, with their share in %. Marks: mean over seeds; n: number of trained runs. Bars on the right: "
            "the paired standard error of a run's change over texts, mean over seeds; faint: single runs. The change "
            f"is linear up to {LINEAR_PERCENT:g} % and logarithmic beyond."
        )
        return style.save(drawn, folder, "table-bytes", context.note(note))


def with_trained(tables: pd.DataFrame) -> pd.DataFrame:
    """Return runs with smaller tables and, once each, the trained runs that they were made from.

    Columns that are added: `share` of the rows that is retained, and the `change` of the loss with its paired standard
    error (`error`), in percent.
    """
    trained = tables.drop_duplicates("source")
    trained = trained.assign(bytes=trained["source_bytes"], loss=trained["source_loss"], stderr=0.0)
    points = pd.concat([trained.assign(form="as trained", kept_rows=1.0), tables], ignore_index=True)
    return points.assign(
        form=points["form"].fillna("as trained"),
        share=points["kept_rows"].fillna(1.0),
        change=100 * (points["loss"] / points["source_loss"] - 1),
        error=100 * points["stderr"] / points["source_loss"],
    )


def _against_bytes(left: Axes, right: Axes, look: style.Look, label: str, part: pd.DataFrame) -> None:
    """Draw the runs made from those of one variant: one line of forms, and one of dropped rows for each form.

    Args:
        left: Where the loss is drawn.
        right: Where its change is drawn.
        look: The look of the variant.
        label: Its legend entry.
        part: Its runs with smaller tables.
    """
    points = with_trained(part)
    means = points.groupby(["form", "share"])[["bytes", "loss", "change", "error"]].mean().reset_index()
    dropped = means[means["share"] < 1]["form"].unique()
    lines = [("-", means[means["share"] == 1]), *((":", means[means["form"] == form]) for form in dropped)]
    for axis, y in ((left, "loss"), (right, "change")):
        axis.plot([], [], color=look.color, alpha=look.alpha, label=label)
        for linestyle, line in lines:
            line = line.sort_values("bytes")
            axis.plot(line["bytes"], line[y], color=look.color, linestyle=linestyle, alpha=look.alpha, linewidth=1)
        axis.plot(points["bytes"], points[y], "_", color=look.color, alpha=0.4)
        for point in means.to_dict("records"):
            error = point["error"] if axis is right else 0.0
            marks: dict[str, Any] = {"color": look.color, "marker": FORM_MARKERS[point["form"]], "alpha": look.alpha}
            axis.errorbar(point["bytes"], point[y], yerr=error or None, capsize=2.5, markersize=4, **marks)
            if point["share"] < 1:
                axis.annotate(
                    f"{100 * point['share']:g}",
                    (point["bytes"], point[y]),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=6,
                    color="#555555",
                )


def _over_training(axis: Axes, context: Context, label: str, part: pd.DataFrame) -> None:
    """Draw the runs of one variant, and their mean at the tokens that all of them logged."""
    look, runs = context.looks[label], part["run"].nunique()
    by_tokens = part.groupby("tokens")["y"]
    shared = by_tokens.size() == runs
    mean = by_tokens.mean()[shared]
    if runs > LINES:
        low, high = (by_tokens.quantile(share)[shared] for share in QUANTILES)
        axis.fill_between(mean.index, low, high, color=look.color, alpha=0.15, linewidth=0)
    else:
        for _, run in part.groupby("run"):
            axis.plot(run["tokens"], run["y"], color=look.color, alpha=0.18, linewidth=0.6)
    axis.plot(
        mean.index,
        mean,
        color=look.color,
        linestyle=look.linestyle,
        alpha=look.alpha,
        label=context.legend(label),
    )
