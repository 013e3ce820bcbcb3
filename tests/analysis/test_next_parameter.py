"""Where the next parameter goes: gains per doubling, who leads where, and the equivalent size."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from analysis.cli.main import main
from analysis.comparisons.destinations.next_parameter import (
    AXES,
    Step,
    equivalent_size,
    leads,
    metric_of,
    per_doubling,
    steps,
)
from analysis.comparisons.direction import arrow, lower_is_better
from analysis.comparisons.grid import Comparisons
from analysis.errors import InputError
from analysis.figures.context import Missing, context
from analysis.figures.next_parameter import against_size, at_equal_time, next_parameter
from analysis.records.grid_data import load
from analysis.records.grids import Contrast
from analysis.report.next_parameter import lead_sentences, next_blocks


def step(destination: str, doublings: float, gains: dict[int, float]) -> Step:
    cost = dict.fromkeys(AXES, doublings)
    return Step("w32", destination, f"{destination} x{doublings}", dict.fromkeys(AXES, 2**doublings), cost, gains, 0)


def seeds(mean: float, spread: float = 0.1) -> dict[int, float]:
    return {seed: mean + spread * (seed - 2) for seed in range(5)}


def test_gain_per_doubling_is_the_slope_of_each_step() -> None:
    first, second, free = step("moe", 1.0, seeds(0.5)), step("moe", 3.0, seeds(1.5)), step("moe", 3.01, seeds(1.6))
    rates = per_doubling([first, second, free], "params")
    assert rates[0] is not None
    assert rates[0].mean == pytest.approx(0.5)
    # 0.1 * the standard deviation of -2..2, over the root of five pairs, times the t quantile of four degrees
    assert rates[0].high - rates[0].mean == pytest.approx(0.1 * np.sqrt(2.5 / 5) * 2.776445)
    assert rates[1] is not None
    assert rates[1].mean == pytest.approx(0.5)
    assert rates[1].high == pytest.approx(rates[1].low), "the spread of both steps is of the same seeds"
    assert rates[2] is None, "a step that adds 0.7 % has no slope"


def test_the_leader_is_compared_at_equal_costs_only_where_both_were_measured() -> None:
    noise = {seed: (0.01 if seed % 2 else -0.01) for seed in range(5)}
    low = step("moe", 2.0, seeds(0.4))
    high = step("memory_plus", 1.0, {seed: value + 0.5 + noise[seed] for seed, value in seeds(0.2, 0.05).items()})
    (lead,) = leads([low, high], "params")
    assert lead.doublings == 1.0
    assert (lead.leader, lead.runner_up, lead.decided) == ("memory_plus", "moe", True)
    assert lead.difference.mean == pytest.approx(0.5 - 0.002)
    (sentence,) = lead_sentences([lead], "parameters")
    assert sentence.startswith("at 2 times the parameters memory_plus gains most (+0.498 [")


def test_no_leader_is_declared_within_noise_or_with_few_pairs() -> None:
    gains = [seeds(0.1, 0.2), dict(enumerate(reversed(seeds(0.12, 0.2).values())))]
    (close,) = leads([step("a", 1.0, gains[0]), step("b", 1.0, gains[1])], "params")
    assert not close.decided
    assert "no destination" in lead_sentences([close], "parameters")[0]
    few = leads([step("a", 1.0, {0: 0.1, 1: 0.1}), step("b", 1.0, {0: 2.0, 1: 2.1})], "params")
    assert not few[0].decided
    assert "2 pairs are too few" in lead_sentences(few, "parameters")[0]
    assert "no two destinations" in lead_sentences(leads([step("a", 1.0, seeds(1))], "params"), "parameters")[0]


def test_equivalent_size_inverts_the_curve_of_the_wider_reference() -> None:
    wider = [step("dense wider", 1.0, seeds(0.4)), step("dense wider", 2.0, seeds(0.8))]
    ours = step("pkm", 5.0, {seed: gain + 0.1 for seed, gain in seeds(0.4).items()})
    beyond = step("peer", 5.0, seeds(3.0))
    sizes = equivalent_size([*wider, ours, beyond], "dense")
    assert set(sizes) == {ours.label}
    # both curves shift equally with the seed, so every seed gives 1 + 0.1 / 0.4 doublings
    assert sizes[ours.label].mean == pytest.approx(1.25)


def test_steps_of_a_grid_are_paired_by_seed_with_their_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 20.0 + seed)
        write_run(tmp_path, "memory_plus", "w32", seed, (20.0 + seed) / 2, half_keys=16)
        write_run(tmp_path, "memory_plus", "w32", seed, (20.0 + seed) / 4, half_keys=64)
    write_run(tmp_path, "moe", "w32", 0, 500.0)
    data = load(tmp_path, fallback="dense")
    by_label = {item.label: item for item in steps(data, metric_of(data, None))}
    small, large, moe = (by_label[name] for name in ("memory_plus k16", "memory_plus k64", "moe"))
    assert small.gain.mean == pytest.approx(1.0, abs=0.05)
    assert large.gain.mean == pytest.approx(2.0, abs=0.05)
    assert small.doublings["params"] == pytest.approx(np.log2((50_000 + 256 * 32) / 50_000))
    assert (moe.gain.n, moe.left_out) == (0, 1)
    with pytest.raises(InputError, match="--metric: got 'piqa/acc', allowed: e50"):
        metric_of(data, "piqa/acc")
    declared = replace(data, grid="g", contrast=Contrast("piqa/acc", (), ()))
    with pytest.raises(InputError, match="no finished run of grid g has piqa/acc, the metric of its contrast"):
        metric_of(declared, None)

    figures = tmp_path / "figures"
    assert main(["next", "--results", str(tmp_path), "--figure", str(figures), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    gains = {item["variant"]: item["gain"]["mean"] for item in document["bases"][0]["steps"]}
    assert gains["memory_plus k64"] == pytest.approx(2.0, abs=0.05)
    assert (figures / "next-parameter.png").stat().st_size > 10_000
    assert main(["next", "--results", str(tmp_path)]) == 0
    assert "| w32 | memory_plus | memory_plus k64 |" in capsys.readouterr().out
    assert main(["next", "--results", str(tmp_path), "--by", "euros"]) == 2
    assert "--by: got 'euros', allowed: params" in capsys.readouterr().err


def test_figures_at_equal_gain_and_at_equal_time(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 20.0 + seed)
        write_run(tmp_path, "memory_plus", "w32", seed, (20.0 + seed) / 1.5, half_keys=16)
    plots = context(Comparisons(load(tmp_path, fallback="dense")))
    assert {path.suffix for path in at_equal_time(plots, tmp_path)} == {".png", ".pdf", ".svg"}
    with pytest.raises(Missing, match=r"wider dense model of its base; add dense with a larger model.ffn_hidden"):
        against_size(plots, tmp_path)
    for seed in range(5):
        name = write_run(tmp_path, "dense", "w32", seed, (20.0 + seed) / 2, ffn_hidden=200)
        path = tmp_path / "runs" / name / "cell.json"
        record = json.loads(path.read_text())
        record["account"]["params_total"] *= 2
        path.write_text(json.dumps(record))
    drawn = against_size(context(Comparisons(load(tmp_path, fallback="dense"))), tmp_path)
    assert "memory_plus k16, w32 (n=5)" in next(path for path in drawn if path.suffix == ".svg").read_text()


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_training_time_is_drawn_only_if_the_machine_was_steady(slowdown: float, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 20.0)
        name = write_run(tmp_path, "memory_plus", "w32", seed, 10.0, half_keys=16)
    path = tmp_path / "runs" / name / "train.jsonl"
    path.write_text(path.read_text().replace('"tokens_per_s": 20000.0', f'"tokens_per_s": {20_000 / slowdown}'))
    drawn = next_parameter(context(Comparisons(load(tmp_path, fallback="dense"))), tmp_path)
    text = next(path for path in drawn if path.suffix == ".svg").read_text()
    assert ("training time per" in text) is (slowdown == 1.0)
    assert ("unsteady" in text) is (slowdown != 1.0)


def test_without_any_gain_there_is_no_figure(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", "w32", 0, 20.0)
    write_run(tmp_path, "moe", "w32", 0, 500.0)
    data = load(tmp_path, fallback="dense")
    with pytest.raises(Missing, match=r"has a pair with dense in which both have e50; with more train.epochs"):
        next_parameter(context(Comparisons(data)), tmp_path)
    for axis in ("time", "macs"):
        texts = [str(block) for block in next_blocks(data, [], "e50", axis)]
        assert any("how steady the machine was" in text for text in texts) is (axis == "time"), "every variant ran once"


def test_scores_improve_in_the_direction_that_their_task_declares() -> None:
    entry = re.compile(r"metric: (\w+),[^}]*higher_is_better: (true|false)")
    files = sorted((Path(__file__).parents[2] / "suite" / "evaluate" / "tasks").glob("*.yaml"))
    declared = {found for file in files for found in entry.findall(file.read_text())}
    scores = {(metric, higher) for metric, higher in declared if not metric.endswith("_se") and metric != "bits_max"}
    assert {"nll_min", "bits_per_byte", "recall"} <= {metric for metric, _ in scores}
    for metric, higher in scores:
        assert lower_is_better(f"task/{metric}") is (higher == "false"), metric
    assert (arrow("bios_storage/bits_max"), arrow("piqa/acc"), arrow("eval/nll")) == ("", " ↑", " ↓")
