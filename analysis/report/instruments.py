"""Instruments compared on the same runs, as tables and sentences for the terminal."""

from __future__ import annotations

import math

import pandas as pd

from analysis.comparisons.choosing.instruments import E50, Noise, Order, agreement, noise, orders
from analysis.comparisons.statistics import MIN_PAIRS
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval


def instrument_blocks(table: pd.DataFrame) -> list[Block]:
    """Return the tables of noise and of orders, and what they say; `table` is that of `measurements`."""
    compared = orders(table)
    headers = ["base", "people", "at", "instrument", "variants", "runs", "sd", "ratio to raw", "separation"]
    rows = [_noise_row(item) for item in noise(table)]
    blocks: list[Block] = [Table(headers, rows, left=4, name="instruments-noise")]
    headers = ["base", "people", "at", "first", "second", "instrument", "first - second", "pairs"]
    blocks.append(Table(headers, [_order_row(order) for order in compared], left=6, name="instruments-orders"))
    for item in agreement(compared):
        blocks.append(
            Text(
                f"{item.instrument}: orders {item.alike} of {item.pairs} pairs of variants as raw probes do; decides"
                f" {item.decided}, raw probes {item.decided_raw}; {item.contradicted} are decided by both in opposite"
                " directions."
            )
        )
    note = (
        "sd: standard deviation between seeds of the share of bits stored (of ln E50 at e50), pooled over variants,"
        " with its 95 % interval; ratio to raw: with the interval of Pitman and Morgan; separation: standard deviation"
        " between variants over sd. Differences are paired over seeds, with 95 % t-intervals from"
        f" {MIN_PAIRS} pairs on; a pair is decided if its interval excludes 0. Points of one run are not independent."
    )
    return [*blocks, Text(note)]


def _noise_row(item: Noise) -> list[object]:
    return [
        item.base,
        _people(item.people),
        _point(item.at),
        item.instrument,
        item.variants,
        item.runs,
        f"{number(item.sd, 3)} [{number(item.low, 3)}, {number(item.high, 3)}]",
        _ratio(item),
        "–" if math.isnan(item.separation) else number(item.separation, 3),
    ]


def _ratio(item: Noise) -> str:
    if math.isnan(item.ratio):
        return "–"
    interval = "" if math.isnan(item.ratio_low) else f" [{number(item.ratio_low, 3)}, {number(item.ratio_high, 3)}]"
    return number(item.ratio, 3) + interval


def _order_row(order: Order) -> list[object]:
    place = [order.base, _people(order.people), _point(order.at), order.first, order.second, order.instrument]
    return [*place, with_interval(order.difference, sign=True), order.difference.n]


def _people(people: float) -> str:
    return "–" if math.isnan(people) else f"{people:,.0f}"


def _point(at: str) -> str:
    return "ln E50" if at == E50 else f"{at} exposures"
