"""Effects of two-level settings: half of the runs against the other half, with the interval of a paired t-test."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import BITS_MAX, write_json, write_run
from scipy import stats

from analysis.cli.main import main
from analysis.comparisons.choosing.effects import Effect, effects
from analysis.errors import InputError
from analysis.records.grid_data import load


def write(results: Path, seed: int, share: float, **train: Any) -> None:
    """Write a run of the given training settings that has stored `share` at its last probe."""
    name = write_run(results, "dense", "w32", seed, 30.0)
    folder = results / "runs" / f"{name}-{len(list((results / 'runs').iterdir()))}"
    (results / "runs" / name).rename(folder)
    record = json.loads((folder / "cell.json").read_text())
    record["cell"]["train"] |= train
    write_json(folder / "cell.json", record)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    next(line for line in reversed(lines) if "probe" in line)["probe"]["storage"]["bits"] = share * BITS_MAX
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_settings(results: Path) -> dict[tuple[str, ...], Effect]:
    return {effect.settings: effect for effect in effects(load(results, fallback="dense"))}


def test_one_setting_has_the_interval_of_a_paired_t_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    low, high = rng.uniform(0.2, 0.4, 6), rng.uniform(0.3, 0.6, 6)
    for seed in range(6):
        write(tmp_path, seed, low[seed], lr=0.001)
        write(tmp_path, seed, high[seed], lr=0.002)
    (effect,) = by_settings(tmp_path).values()
    test = stats.ttest_rel(high, low)
    interval = test.confidence_interval()
    assert (effect.settings, effect.levels) == (("train.lr",), ((0.001, 0.002),))
    np.testing.assert_allclose(
        [effect.difference.mean, effect.difference.low, effect.difference.high, effect.difference.p],
        [np.mean(high - low), interval.low, interval.high, test.pvalue],
        rtol=1e-9,
    )


def test_a_half_fraction_of_five_settings_gives_their_effects_and_interactions(tmp_path: Path) -> None:
    names = ("lr", "value_lr", "value_weight_decay", "warmup", "decay")
    true = {("train.lr",): 0.12, ("train.warmup",): -0.07, ("train.decay", "train.lr"): 0.05}
    for seed, signs in itertools.product((0, 1), itertools.product((-1, 1), repeat=4)):
        signs = (*signs, int(np.prod(signs)))
        sign = {f"train.{name}": value for name, value in zip(names, signs, strict=True)}
        share = (
            0.4 + 0.03 * seed + sum(size / 2 * np.prod([sign[name] for name in term]) for term, size in true.items())
        )
        share += 1e-6 * np.sin(97 * seed + sum(2**at * value for at, value in enumerate(signs)))
        write(tmp_path, seed, float(share), **{name: 2.0 + value for name, value in zip(names, signs, strict=True)})
    by_term = by_settings(tmp_path)
    assert len(by_term) == 5 + 10
    means = {term: effect.difference.mean for term, effect in by_term.items()}
    expected = {term: true.get(term, 0.0) for term in by_term}
    assert means == pytest.approx(expected, abs=1e-5)
    assert set(true) == {term for term, effect in by_term.items() if abs(effect.difference.mean) > 1e-3}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([{"lr": lr} for lr in (1.0, 2.0, 3.0)], ("train.lr", "3 levels")),
        ([{"lr": 1.0, "warmup": 1}, {"lr": 2.0, "warmup": 2}], ("train.lr", "train.warmup", "independently")),
        ([{"lr": 1.0}], ("no setting varies",)),
    ],
)
def test_designs_without_separable_effects_are_refused(
    tmp_path: Path, settings: list[dict[str, Any]], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, setting in itertools.product((0, 1), settings):
        write(tmp_path, seed, 0.3 + 0.01 * seed, **setting)
    with pytest.raises(InputError) as refused:
        by_settings(tmp_path)
    assert all(word in str(refused.value) for word in words)
    assert main(["effects", "--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_table_explains_an_interaction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The effect of the rate is 0.1 at a short warmup and 0.3 at a long one: 0.2 on average, and half of 0.2 more."""
    for seed, (lr, warmup) in itertools.product((0, 1, 2), itertools.product((0, 1), repeat=2)):
        noise = 1e-6 * np.sin(31 * seed + 7 * lr + 3 * warmup)
        write(tmp_path, seed, 0.2 + 0.1 * lr + 0.2 * lr * warmup + noise, lr=1.0 + lr, warmup=1 + warmup)
    assert main(["effects", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[1]: line.split(" | ")[2:5] for line in lines if line.startswith("| dense")}
    assert rows["train.lr"] == ["1.0", "2.0", "+20.0 [+20.0, +20.0] points"]
    assert rows["train.lr x train.warmup"] == ["", "", "+10.0 [+10.0, +10.0] points"]
    assert lines[-1] == "`a x b`: half of how much the effect of `a` rises from the low to the high level of `b`."
