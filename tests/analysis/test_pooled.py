"""A contrast over several worlds: mean of paired log ratios, its interval, and whether worlds agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import BITS_MAX, EXPOSURES, curve, write_json, write_run
from scipy import stats

from analysis.comparisons.destinations.next_parameter import steps
from analysis.comparisons.grid import Comparisons
from analysis.comparisons.pooled import pooled
from analysis.figures.context import context
from analysis.records.grid_data import load
from analysis.report.blocks import to_markdown
from analysis.report.build import build

RATIOS = {300: [0.80, 0.85, 0.83, 0.78], 1500: [0.95, 0.90, 1.02, 0.97, 0.99]}


def grid_of(results: Path, ratios: dict[int, list[float]], metric: str = "e50") -> None:
    """Write one world per number of people; seed by seed memory_plus needs `ratio` times dense's exposures."""
    sides: dict[str, list[str]] = {"dense": [], "memory_plus": []}
    for people, of_seeds in ratios.items():
        for seed, ratio in enumerate(of_seeds):
            for family, e50 in (("dense", 10.0 + seed), ("memory_plus", (10.0 + seed) * ratio)):
                name = write_run(results, family, "w32", seed, e50, half_keys=16 if family != "dense" else None)
                target = results / "runs" / f"{name}-{people}"
                (results / "runs" / name).rename(target)
                record = json.loads((target / "cell.json").read_text())
                record["cell"]["data"] |= {"people": people, "world": people}
                record["cell"]["train"]["lr"] = people / 1e5
                write_json(target / "cell.json", record)
                sides[family].append(target.name)
    contrast = {"metric": metric, "treatment": sides["memory_plus"], "reference": sides["dense"], "over": "data.people"}
    runs = sides["dense"] + sides["memory_plus"]
    write_json(results / "grids" / "g" / "grid.json", {"grid": "g", "runs": runs, "contrast": contrast})


def test_worlds_count_equally_and_the_interval_is_that_of_welch(tmp_path: Path) -> None:
    grid_of(tmp_path, RATIOS)
    result = pooled(load(tmp_path, "g"))
    assert result is not None
    logs = [np.log(values) for values in RATIOS.values()]
    assert [world.value for world in result.worlds] == ["300", "1500"]
    assert [world.log_ratio.mean for world in result.worlds] == pytest.approx([own.mean() for own in logs])
    # The mean of two independent means is half of a Welch difference between one sample and the negative other.
    welch = stats.ttest_ind(logs[0], -logs[1], equal_var=False)
    interval = welch.confidence_interval(0.95)
    found = result.log_ratio
    assert (found.mean, found.low, found.high) == pytest.approx(
        (np.mean([own.mean() for own in logs]), interval.low / 2, interval.high / 2)
    )
    assert found.p == pytest.approx(welch.pvalue)
    assert result.same_p == pytest.approx(stats.ttest_ind(*logs, equal_var=False).pvalue)


def test_a_world_with_open_pairs_leaves_no_estimate_over_all(tmp_path: Path) -> None:
    grid_of(tmp_path, RATIOS | {600: [0.9, 900.0]})
    result = pooled(load(tmp_path, "g"))
    assert result is not None
    assert [(world.value, world.open) for world in result.worlds] == [("300", 0), ("600", 1), ("1500", 0)]
    assert np.isnan(result.log_ratio.mean)
    # Shares are compared all the same, at the last exposure that both runs of every pair of a world reached.
    of_world = []
    for people, of_seeds in (RATIOS | {600: [0.9, 900.0]}).items():
        world = next(world for world in result.worlds if world.value == str(people))
        dense = [10.0 + seed for seed in range(len(of_seeds))]
        ends = np.concatenate([dense, np.multiply(dense, of_seeds)])
        probes = [EXPOSURES[np.searchsorted(EXPOSURES, e50) :][:2] for e50 in ends]
        last = min(past[-1] if len(past) else EXPOSURES[-1] for past in probes)
        assert world.exposure == pytest.approx(last)
        shares = [curve(np.array([last]), e50)[0] / BITS_MAX for e50 in ends]
        differences = np.subtract(shares[len(dense) :], shares[: len(dense)])
        assert world.share.mean == pytest.approx(differences.mean())
        of_world.append(differences.mean())
    assert result.share.mean == pytest.approx(np.mean(of_world))
    page = to_markdown(build(context(Comparisons(load(tmp_path, "g"))), [], []), tmp_path)
    assert "no estimate over all worlds, because in 1 pairs a run did not reach half" in page


def test_the_report_and_next_keep_worlds_of_one_base_apart(tmp_path: Path) -> None:
    grid_of(tmp_path, RATIOS)
    data = load(tmp_path, "g")
    page = to_markdown(build(context(Comparisons(data)), [], []), tmp_path)
    ratio = np.exp(np.mean([np.log(values).mean() for values in RATIOS.values()]))
    assert f"memory_plus against dense over people 300, 1500 (9 pairs): {ratio:.3f} [" in page
    assert [step.base for step in steps(data, "e50")] == ["w32, 300 people", "w32, 1,500 people"]


def test_e50_averaged_reads_the_probes_of_averaged_weights(tmp_path: Path) -> None:
    grid_of(tmp_path, RATIOS, metric="e50_averaged")
    for path in tmp_path.glob("runs/memory_plus*/train.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "probe" in line:  # what the average of the weights has stored is known two times as well
                double = {**line["probe"]["storage"], "bits": 2 * line["probe"]["storage"]["bits"]}
                line["averaged"] = {"eval_loss": 1.0, "probe": {"storage": double}}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in tmp_path.glob("runs/dense*/train.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "probe" in line:
                line["averaged"] = {"eval_loss": line["eval_loss"], "probe": line["probe"]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load(tmp_path, "g")
    result = pooled(data)
    assert result is not None
    # A curve is 0.5 + 0.4 ln(x / e50), clipped, so twice the bits are one half at e50 exp(-0.25 / 0.4).
    expected = np.mean([np.log(values).mean() for values in RATIOS.values()]) - 0.25 / 0.4
    assert result.log_ratio.mean == pytest.approx(expected, abs=0.1)
    page = to_markdown(build(context(Comparisons(data)), [], []), tmp_path)
    assert "All probes are of averaged weights." in page
