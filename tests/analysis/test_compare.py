"""Paired differences against closed forms, scipy, and grids whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import BITS_MAX, EXPOSURES, curve, write_run
from scipy import stats

from analysis.comparisons import paired, statistics
from analysis.comparisons.controls import control_contrasts
from analysis.comparisons.grid import Comparisons
from analysis.comparisons.paired import Contrast
from analysis.comparisons.trends import trends
from analysis.figures.context import LEGEND
from analysis.figures.context import context as view
from analysis.figures.tables.controls import _ratios, controls_figure
from analysis.records.grid_data import load
from analysis.report.build import write


def find(found: list[Contrast], variant: str, reference: str = "dense", base: str = "w32") -> Contrast:
    return next(c for c in found if (c.variant, c.reference, c.base) == (variant, reference, base))


def test_interval_and_p_equal_scipys_paired_t() -> None:
    a, b = np.array([1.0, 2.0, 4.0, 3.0, 6.0]), np.array([0.5, 2.2, 3.0, 1.0, 4.0])
    ours, theirs = statistics.paired(a - b), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_below_five_pairs_a_point_has_no_interval() -> None:
    few = statistics.paired(np.array([1.0, 2.0, 3.0, 4.0]))
    assert few.mean == 2.5
    assert math.isnan(few.low)
    assert math.isnan(few.p)


def test_holm_is_the_textbook_step_down() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)


def test_sign_test_equals_the_binomial() -> None:
    assert statistics.sign_test(5, 1) == pytest.approx(stats.binomtest(5, 6).pvalue)
    assert math.isnan(statistics.sign_test(4, 0))


def test_headline_contrast_recovers_the_known_ratio(results: Path) -> None:
    contrast = find(paired.contrasts(load(results, "demo")), "memory_plus k64")
    truth = np.log(0.5 * (1 + 0.01 * np.arange(5)))
    assert contrast.log_e50 is not None
    assert contrast.log_e50.mean == pytest.approx(truth.mean(), rel=1e-6)
    assert contrast.log_e50.low == pytest.approx(stats.t.interval(0.95, 4, truth.mean(), stats.sem(truth))[0], rel=1e-6)
    assert contrast.primary
    assert contrast.bound == ""
    assert not contrast.equal_flop
    assert contrast.speed_ratio == pytest.approx(2 / 3)
    assert contrast.log_wall is not None
    assert math.exp(contrast.log_wall.mean) == pytest.approx(1.5 * math.exp(truth.mean()), rel=1e-3)


def test_only_one_contrast_is_primary_and_the_rest_are_adjusted(results: Path) -> None:
    found = paired.contrasts(load(results, "demo"))
    assert sum(c.primary for c in found) == 1
    tested = [c for c in found if not c.primary and not math.isnan(c.p)]
    assert tested
    assert all(c.p_holm >= c.p for c in tested)
    assert math.isnan(find(found, "moe_topk").p)


def test_equal_mac_control_is_a_reference_of_its_own(results: Path) -> None:
    found = paired.contrasts(load(results, "demo"))
    control = find(found, "memory_plus k64", "dense ffn128")
    assert control.equal_flop
    assert control.control
    assert find(found, "dense ffn128").reference == "dense"


@pytest.fixture
def controlled(tmp_path: Path) -> Path:
    """Two table sizes, each with controls that learn at known ratios of exposures, and dense."""
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 30.0 + seed)
        for keys, e50 in ((16, 24.0), (32, 20.0)):
            write_run(tmp_path, "pkm", "w32", seed, e50 + seed, half_keys=keys)
            write_run(tmp_path, "pkm", "w32", seed, 1.25 * (e50 + seed), half_keys=keys, control="one_row")
        write_run(tmp_path, "pkm", "w32", seed, 20.0 + seed, half_keys=32, control="frozen")
    return tmp_path


def test_each_variant_is_compared_with_its_own_controls(controlled: Path) -> None:
    found = control_contrasts(load(controlled, fallback="dense"))
    ratios = {(c.variant, c.reference): round(math.exp(c.log_e50.mean), 6) for c in found if c.log_e50}
    assert ratios == {
        ("pkm k16", "pkm k16 control=one_row"): 0.8,
        ("pkm k32", "pkm k32 control=one_row"): 0.8,
        ("pkm k32", "pkm k32 control=frozen"): 1.0,
    }
    assert all(c.seeds == [0, 1, 2, 3, 4] for c in found)


def test_the_report_says_what_a_table_adds_to_its_controls(controlled: Path) -> None:
    write(load(controlled, fallback="dense"), controlled / "out", controlled / "figures")
    text = (controlled / "out" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| w32 | pkm k16 | pkm k16 control=one_row |"))
    assert "0.8 [0.8, 0.8]" in row.replace("0.800", "0.8")


def test_the_figure_of_controls_has_a_row_per_variant(controlled: Path) -> None:
    data = replace(load(controlled, fallback="dense"), grid="g")
    svg = next(
        path for path in controls_figure(view(Comparisons(data)), controlled) if path.suffix == ".svg"
    ).read_text()
    assert all(f">{text}<" in svg for text in ("w32 pkm k16", "w32 pkm k32", "one_row", "frozen"))
    ratios = _ratios(view(Comparisons(data)))
    one = ratios["w32", "pkm k16 control=one_row"]
    assert one == pytest.approx([1.25 * (24 + seed) / (30 + seed) for seed in range(5)], rel=1e-6)


def test_a_grid_of_many_variants_draws_controls_in_their_own_figure_only(tmp_path: Path) -> None:
    for keys in range(LEGEND // 2 + 1):
        for control in (None, "one_row"):
            write_run(tmp_path, "pkm", "w32", 0, 20.0, half_keys=16 + keys, control=control)
    write_run(tmp_path, "dense", "w32", 0, 20.0)
    drawn = view(Comparisons(load(tmp_path, fallback="dense")))
    assert set(drawn.table["label"]) == {"dense", *(f"pkm k{16 + keys}" for keys in range(LEGEND // 2 + 1))}
    assert "Controls are drawn in their own figure only" in drawn.remark


def test_controls_are_no_table_sizes_in_the_fits(controlled: Path) -> None:
    fitted = trends(load(controlled, fallback="dense"))
    assert {label for fit in fitted for _, label, *_ in fit.points} == {"dense", "pkm k16", "pkm k32"}


def test_bits_are_compared_at_an_exposure_every_run_reached(results: Path) -> None:
    contrast = find(paired.contrasts(load(results, "demo")), "memory_plus k64")
    assert contrast.exposure <= 64
    assert contrast.exposure in EXPOSURES
    assert contrast.bits is not None
    table = load(results, "demo").runs
    pairs = [
        [
            table[(table["label"] == label) & (table["base"] == "w32") & (table["seed"] == seed)]["e50"].item()
            for seed in range(5)
        ]
        for label in ("memory_plus k64", "dense")
    ]
    at = [curve(np.array([contrast.exposure]), e50)[0] for e50 in pairs[0]]
    truth = np.array(at) - np.array([curve(np.array([contrast.exposure]), e50)[0] for e50 in pairs[1]])
    assert contrast.bits.mean == pytest.approx(truth.mean(), rel=1e-6)
    assert contrast.bits_share is not None
    assert contrast.bits_share.mean == pytest.approx(truth.mean() / BITS_MAX, rel=1e-6)


def test_a_censored_reference_gives_a_bound_and_no_interval(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 200.0 if seed == 0 else 50.0)
        write_run(tmp_path, "memory_plus", "w32", seed, 20.0, half_keys=16)
    contrast = find(paired.contrasts(load(tmp_path, fallback="dense")), "memory_plus k16")
    assert contrast.bound == "at most"
    assert contrast.censored == (0, 1)
    assert contrast.log_e50 is not None
    assert math.isnan(contrast.log_e50.low)
    assert math.exp(contrast.log_e50.mean) == pytest.approx((20 / 64) ** 0.2 * (20 / 50) ** 0.8, rel=1e-6)
    assert contrast.decided == (5, 0)
    assert contrast.p == pytest.approx(2 / 2**5)


def test_pairs_whose_direction_is_open_are_not_counted(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 200.0)
        write_run(tmp_path, "memory_plus", "w32", seed, 300.0, half_keys=16)
    contrast = find(paired.contrasts(load(tmp_path, fallback="dense")), "memory_plus k16")
    assert contrast.bound == "unknown"
    assert contrast.decided == (0, 0)
    assert math.isnan(contrast.p)


def test_unfinished_runs_take_no_part(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 20.0)
        write_run(tmp_path, "memory_plus", "w32", seed, 10.0, half_keys=16, state="failed" if seed == 4 else "done")
    contrast = find(paired.contrasts(load(tmp_path, fallback="dense")), "memory_plus k16")
    assert (contrast.planned, contrast.seeds) == (5, [0, 1, 2, 3])
    assert contrast.log_e50 is not None
    assert math.isnan(contrast.log_e50.low)


def test_a_probe_under_a_decaying_learning_rate_is_not_that_of_a_shorter_run(tmp_path: Path) -> None:
    for seed in range(5):
        for family, keys in (("dense", None), ("memory_plus", 16)):
            name = write_run(tmp_path, family, "w32", seed, 20.0, half_keys=keys)
            path = tmp_path / "runs" / name / "cell.json"
            content = json.loads(path.read_text())
            content["cell"]["train"]["schedule"] = "cosine"
            path.write_text(json.dumps(content))
    found = load(tmp_path, fallback="dense")
    contrast = find(paired.contrasts(found), "memory_plus k16")
    assert (contrast.log_e50, contrast.bits) == (None, None)
    assert set(found.runs["e50_state"]) == {"none"}
