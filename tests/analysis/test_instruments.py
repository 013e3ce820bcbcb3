"""Instruments on the same runs: which measurements are compared, their noise, and whether they order variants alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import BITS_MAX, write_json, write_run
from scipy import stats

from analysis.cli.main import main
from analysis.comparisons.choosing.instruments import agreement, measurements, noise, orders
from analysis.errors import InputError
from analysis.records.grid_data import load

ROWS, LENGTH, PER_EXPOSURE = 8, 64, 100
"""Rows of a step, tokens of a row, and steps per exposure of the synthetic runs."""
DECAY = 0.25


def branch(results: Path, family: str, seed: int, budget: int, raw: float, annealed: float, averaged: float) -> None:
    """Write a wsd run of `budget` exposures whose raw share is `raw` times the exposure until its rate decays."""
    name = write_run(results, family, "w32", seed, 1e9 + budget)
    folder = results / "runs" / f"{name}-{budget}"
    (results / "runs" / name).rename(folder)
    record = json.loads((folder / "cell.json").read_text())
    tokens = budget * PER_EXPOSURE * ROWS * LENGTH
    schedule = {"schedule": "wsd", "decay": DECAY, "tokens": tokens, "epochs": None, "branches": [8, 16, 32]}
    record["cell"]["train"] |= schedule
    write_json(folder / "cell.json", record)
    lines = []
    for exposure in (1, 2, 4, 8, 12, 16, 24, 32):
        if exposure > budget:
            continue
        is_last = exposure == budget
        line: dict[str, Any] = {"step": exposure * PER_EXPOSURE, "epoch": float(exposure), "eval_loss": 1.0}
        line |= {"tokens": exposure * PER_EXPOSURE * ROWS * LENGTH, "train_flops": 1.0, "wall_s": 1.0}
        share = annealed if is_last else raw
        line["probe"] = {"storage": scores(share * exposure)}
        line["averaged"] = {"eval_loss": 1.0, "probe": {"storage": scores(averaged * exposure)}}
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))


def scores(share: float) -> dict[str, float]:
    return {"bits": share * BITS_MAX, "bits_max": BITS_MAX, "nll": 1.0, "recall": 0.5, "n": 10}


def test_every_instrument_measures_the_same_runs_at_the_same_exposures(tmp_path: Path) -> None:
    for seed in (0, 1):
        for budget in (8, 16, 32):
            branch(tmp_path, "dense", seed, budget, 0.02 + seed / 1000, 0.03 + seed / 1000, 0.025)
            if (seed, budget) != (1, 16):
                branch(tmp_path, "moe", seed, budget, 0.01, 0.02, 0.015)
    table = measurements(load(tmp_path, None, "dense"))
    values = table[table["at"] != "e50"].set_index(["variant", "seed", "at", "instrument"])["value"].to_dict()
    expected = {}
    for variant, (raw, annealed, averaged), seeds in (
        ("dense", (0.02, 0.03, 0.025), (0, 1)),
        ("moe", (0.01, 0.02, 0.015), (0, 1)),
    ):
        for seed in seeds:
            shift = seed / 1000 if variant == "dense" else 0.0
            for at in (8, 16):  # the longest branch has no raw probe at its end
                if (variant, seed, at) != ("moe", 1, 16):
                    shares = {"raw": raw + shift, "annealed": annealed + shift, "averaged": averaged}
                    expected |= {(variant, seed, str(at), name): share * at for name, share in shares.items()}
    assert values == pytest.approx(expected)
    # raw and averaged shares reach one half within the steady part of the longest branch for dense alone
    assert set(table.loc[table["at"] == "e50", "variant"]) == {"dense"}


def test_one_instrument_alone_is_refused(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 8.0)
    with pytest.raises(InputError, match="no run was measured by two instruments"):
        measurements(load(tmp_path, None, "dense"))


def synthetic(runs: int = 12) -> pd.DataFrame:
    """Two variants whose averaged values have half of the noise of the raw ones, correlated with it."""
    draws = np.random.default_rng(3)
    rows = []
    for variant, level in (("dense", 0.30), ("moe", 0.36)):
        shared, own = draws.normal(0, 0.02, runs), draws.normal(0, 0.02, runs)
        for name, values in (("raw", level + shared + own), ("averaged", level + 0.5 * shared + 0.5 * own[::-1])):
            place = {"base": "w32", "people": 300, "variant": variant, "at": "8", "instrument": name}
            rows += [{**place, "seed": seed, "value": value} for seed, value in enumerate(values)]
    return pd.DataFrame(rows)


def test_the_pooled_standard_deviation_and_its_interval() -> None:
    table = synthetic()
    found = {item.instrument: item for item in noise(table)}
    for name in ("raw", "averaged"):
        parts = [part["value"].to_numpy() for _, part in table[table["instrument"] == name].groupby("variant")]
        variance = np.mean([part.var(ddof=1) for part in parts])
        interval = np.sqrt(22 * variance / stats.chi2.ppf([0.975, 0.025], 22))
        item = found[name]
        assert (item.sd, item.low, item.high) == pytest.approx((np.sqrt(variance), *interval))
        between = np.var([part.mean() for part in parts], ddof=1) - variance / 12
        assert item.separation == pytest.approx(np.sqrt(between / variance))
    assert found["averaged"].ratio == pytest.approx(found["averaged"].sd / found["raw"].sd)


def test_the_interval_of_a_ratio_is_that_of_the_test_of_pitman_and_morgan() -> None:
    table = synthetic()
    table = table[table["variant"] == "dense"]
    item = next(item for item in noise(table) if item.instrument == "averaged")
    raw, averaged = (table.loc[table["instrument"] == name, "value"].to_numpy() for name in ("raw", "averaged"))
    for end in (item.ratio_low, item.ratio_high):  # at an end of the interval the test has p = 0.05
        scaled = averaged / end
        assert stats.pearsonr(raw + scaled, raw - scaled).pvalue == pytest.approx(0.05)


def test_orders_are_paired_over_seeds_and_contradictions_are_counted() -> None:
    table = synthetic()
    reverse = table["instrument"].eq("averaged") & table["variant"].eq("moe")
    flipped = table.assign(value=table["value"].where(~reverse, table["value"] - 0.12))
    for case, contradicted in ((table, 0), (flipped, 1)):
        compared = orders(case)
        raw = next(order for order in compared if order.instrument == "raw")
        wide = case[case["instrument"] == "raw"].pivot_table(index="seed", columns="variant", values="value")
        expected = stats.ttest_rel(wide["dense"], wide["moe"])
        assert raw.difference.mean == pytest.approx((wide["dense"] - wide["moe"]).mean())
        assert raw.difference.p == pytest.approx(expected.pvalue)
        (item,) = agreement(compared)
        assert (item.pairs, item.alike, item.contradicted) == (1, 1 - contradicted, contradicted)


def test_the_verb_prints_tables_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        for family, shift in (("dense", 0.0), ("moe", 0.004)):
            for budget in (8, 16, 32):
                branch(tmp_path, family, seed, budget, 0.02 + shift + seed / 1000, 0.03 + seed / 900, 0.02 + shift)
    names = [path.name for path in sorted((tmp_path / "runs").iterdir())]
    write_json(tmp_path / "grids" / "g" / "grid.json", {"grid": "g", "runs": names})
    command = ["instruments", "--results", str(tmp_path), "--grid", "g"]
    assert main([*command, "--csv", str(tmp_path / "all.csv")]) == 0
    text = capsys.readouterr().out
    assert "| w32 | 300 | 8 exposures | annealed | 2 | 6 |" in text
    assert "averaged: orders" in text
    written = pd.read_csv(tmp_path / "all.csv")
    assert len(written) == len(measurements(load(tmp_path, "g", "dense")))
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {item["instrument"] for item in document["noise"]} == {"raw", "averaged", "annealed"}
    assert len(document["agreement"]) == 2
