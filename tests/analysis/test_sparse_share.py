"""One sparse budget divided between tables and experts: which runs are compared, how, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import write_run
from scipy import stats

from analysis.comparisons.destinations.sparse_share import Budget, budgets
from analysis.comparisons.grid import Comparisons
from analysis.figures.context import Missing, context
from analysis.figures.sparse_share import published_losses, sparse_share
from analysis.records.frame import load_published, read_published
from analysis.records.grid_data import load
from analysis.report.blocks import Table
from analysis.report.build import build
from analysis.report.sparse_share import sparse_share_blocks

ROOT = Path(__file__).resolve().parents[2]
ACTIVE = 50_000
FACTORS = {0: 1.0, 25: 0.8, 50: 0.9, 100: 1.3}
"""Share in tables in percent -> E50 relative to experts alone."""


def write(
    root: Path, family: str, seed: int, e50: float, sparse: int, memory: int, keys: int | None = None, **more: Any
) -> str:
    """Write a run whose account has `sparse` parameters that a token does not use, `memory` of them in tables."""
    name = write_run(root, family, "w32", seed, e50, half_keys=keys, **more)
    path = root / "runs" / name / "cell.json"
    record = json.loads(path.read_text())
    record["account"] |= {"params_total": ACTIVE + sparse, "params_active": ACTIVE, "params_memory": memory}
    path.write_text(json.dumps(record))
    return name


def write_budget(root: Path, seeds: int = 5, sparse: int = 100_000) -> None:
    noise = np.random.default_rng(1).normal(0, 0.04, (seeds, len(FACTORS)))
    for seed in range(seeds):
        for at, (share, factor) in enumerate(FACTORS.items()):
            family = {0: "moe_topk", 100: "engram"}.get(share, "engram_moe")
            e50 = 20 * factor * float(np.exp(noise[seed, at]))
            # budgets that differ by up to 1.5 %
            own = sparse + 500 * at
            write(root, family, seed, e50, own, own * share // 100, share or None)


def only(root: Path) -> Budget:
    metric, found = budgets(load(root, fallback="dense"))
    assert metric == "e50"
    (budget,) = found
    return budget


def test_ratios_are_those_of_a_t_test_over_pairs_of_one_seed(tmp_path: Path) -> None:
    write_budget(tmp_path)
    data = load(tmp_path, fallback="dense")
    budget = only(tmp_path)
    assert [round(100 * division.share) for division in budget.divisions] == [*FACTORS]
    assert [division.sparse for division in budget.divisions] == [100_000, 100_500, 101_000, 101_500]
    assert {division.active for division in budget.divisions} == {ACTIVE}
    e50 = data.done.pivot_table(index="seed", columns="label", values="e50")
    for division in budget.divisions[1:]:
        halvings = np.log2(e50[budget.divisions[0].label] / e50[division.label])
        low, high = stats.ttest_1samp(halvings, 0).confidence_interval(0.95)
        gain = division.gain
        assert (gain.mean, gain.low, gain.high, gain.n) == pytest.approx((halvings.mean(), low, high, 5))
        assert -gain.mean == pytest.approx(np.log2(FACTORS[round(100 * division.share)]), abs=0.1)
    table = next(block for block in sparse_share_blocks("e50", [budget]) if isinstance(block, Table))
    ratios = np.log(e50[budget.divisions[1].label] / e50[budget.divisions[0].label])
    low, high = stats.ttest_1samp(ratios, 0).confidence_interval(0.95)
    written = [f"{np.exp(value):.3f}" for value in (ratios.mean(), low, high)]
    assert table.rows[0][3:] == ["0", "50,000", "reference", "5"]
    assert table.rows[1][3:] == ["25", "50,000", f"{written[0]} [{written[1]}, {written[2]}]", "5"]


def test_other_budgets_controls_and_models_without_a_budget_are_no_part_of_it(tmp_path: Path) -> None:
    write_budget(tmp_path)
    labels = [division.label for division in only(tmp_path).divisions]
    for seed in range(5):
        write(tmp_path, "dense", seed, 20.0, 0, 0)
        write(tmp_path, "peer", seed, 20.0, 103_000, 103_000, 7)  # 3 % above the smallest
        write(tmp_path, "engram", seed, 20.0, 101_500, 101_500, 100, control="frozen")
    assert [division.label for division in only(tmp_path).divisions] == labels


def test_a_run_that_never_learned_half_has_no_gain(tmp_path: Path) -> None:
    write_budget(tmp_path, seeds=2)
    write(tmp_path, "moe_topk", 2, 20.0, 100_000, 0)
    write(tmp_path, "engram_moe", 2, 500.0, 100_500, 25_125, 25)
    quarter = only(tmp_path).divisions[1]
    assert (quarter.gain.n, quarter.left_out) == (2, 1)
    assert np.isnan(quarter.gain.low), "two pairs have no interval"


def test_a_budget_without_a_pair_is_no_curve_and_its_table_states_that(tmp_path: Path) -> None:
    for share in (0, 30, 60):
        write(tmp_path, "engram_moe", 0, 20.0 if share == 0 else 500.0, 100_000, 1000 * share, share or None)
    plots = context(Comparisons(load(tmp_path, fallback="dense")))
    with pytest.raises(
        Missing, match=r"no variant of grid .* pair with that of the least share in which both have e50"
    ):
        sparse_share(plots, tmp_path)
    (table,) = (block for block in build(plots, [], []) if isinstance(block, Table) and block.name == "sparse-share")
    assert [row[5:] for row in table.rows] == [
        ["reference", "1"],
        ["–", "0 (1 without a gain)"],
        ["–", "0 (1 without a gain)"],
    ]


def test_two_shares_are_no_curve(tmp_path: Path) -> None:
    for seed in range(5):
        write(tmp_path, "moe_topk", seed, 20.0, 100_000, 0)
        write(tmp_path, "engram", seed, 18.0, 100_000, 99_990, 50)
        write(tmp_path, "pkm", seed, 18.0, 100_000, 100_000, 51)
    plots = context(Comparisons(load(tmp_path, fallback="dense")))
    with pytest.raises(Missing, match=r"no three variants .* equal sparse parameters .* as grids/share.yaml does"):
        sparse_share(plots, tmp_path)
    assert "sparse-share" not in {block.name for block in build(plots, [], []) if isinstance(block, Table)}


def test_without_e50_the_final_loss_is_compared(tmp_path: Path) -> None:
    losses = {0: 3.0, 30: 2.9, 60: 3.2}
    for share, loss in losses.items():
        name = write(tmp_path, "engram_moe", 0, 500.0, 100_000, 1000 * share, share or None)
        folder = tmp_path / "runs" / name
        record = json.loads((folder / "cell.json").read_text())
        record["cell"]["train"]["schedule"] = "cosine"
        (folder / "cell.json").write_text(json.dumps(record))
        (folder / "eval" / "0badcafe.json").unlink()
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        lines[-1]["eval_loss"] = loss
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metric, (budget,) = budgets(load(tmp_path, fallback="dense"))
    assert metric == "eval/nll"
    assert [division.gain.mean for division in budget.divisions] == pytest.approx([0.0, 0.1, -0.2])
    table = next(block for block in sparse_share_blocks(metric, [budget]) if isinstance(block, Table))
    assert [row[5] for row in table.rows] == ["reference", "+0.100", "−0.200"]


def test_a_grid_without_outcomes_has_no_budget(tmp_path: Path) -> None:
    name = write(tmp_path, "moe_topk", 0, 20.0, 100_000, 0, state="failed")
    (tmp_path / "runs" / name / "train.jsonl").write_text("")
    plots = context(Comparisons(load(tmp_path, fallback="dense")))
    with pytest.raises(Missing, match="no finished run"):
        sparse_share(plots, tmp_path)
    assert build(plots, [], [])


def test_the_figure_has_a_line_per_budget_and_the_published_points(tmp_path: Path) -> None:
    write_budget(tmp_path)
    published = read_published(ROOT / "results" / "published" / "engram.csv")
    plots = context(Comparisons(load(tmp_path, published=published, fallback="dense")))
    files = {path.suffix: path for path in sparse_share(plots, tmp_path / "figures")}
    text = files[".svg"].read_text()
    for expected in ("w32, 100,000 sparse parameters", "engram_moe", "arXiv:2601.07372", "published loss"):
        assert expected in text
    alone = context(Comparisons(load(tmp_path, fallback="dense")))
    sparse_share(alone, tmp_path / "figures")
    assert "published" not in files[".svg"].read_text()


def test_published_losses_are_those_of_engrams_figure_3() -> None:
    found = published_losses(load_published(ROOT / "results"))
    assert found["share"].tolist() == [0, 20]
    assert found["value"].tolist() == [1.7248, 1.7109]
    assert published_losses(None).empty
