"""Log-linear fits: which runs share one, and intervals that cover, however few runs a cell has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_json, write_run

from analysis.comparisons.trends import _interval, trends
from analysis.records.grid_data import load


def write_variant(
    results: Path, family: str, seed: int, e50: float, half_keys: int | None = None, **settings: str | int
) -> None:
    """Write a run with other settings than `write_run` gives, as dotted names with two underscores for the dot."""
    name = write_run(results, family, "w32", seed, e50, half_keys=half_keys)
    path = results / "runs" / name / "cell.json"
    content = json.loads(path.read_text())
    for setting, value in settings.items():
        section, field = setting.split("__")
        content["cell"][section][field] = value
    write_json(path, content)


def test_the_forms_of_a_family_are_not_sizes_of_one_table(tmp_path: Path) -> None:
    gains = {"stem": (0.9, 0.8), "per_layer_embedding": (1.2, 1.4), "value_embedding": (0.6, 0.4)}
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 30.0)
        for form_number, (form, of_sizes) in enumerate(gains.items()):
            for keys, gain in zip((16, 64), of_sizes, strict=True):
                number = 10 * form_number + seed
                write_variant(
                    tmp_path, "token_table", number, 30.0 * gain, keys, model__form=form, train__lr=0.001 * keys
                )
    fits = {fit.variant: fit for fit in trends(load(tmp_path, fallback="dense")) if fit.outcome.startswith("E50")}
    assert set(fits) == {f"token_table form={form}" for form in gains}
    assert {fit.cells for fit in fits.values()} == {3}, "dense and two sizes of one form"
    memory = np.array([0.0, 16.0**2 * 32, 64.0**2 * 32])
    for form, of_sizes in gains.items():
        slope = np.polyfit(np.log1p(memory / 42_000), np.log(30.0 * np.array([1.0, *of_sizes])), 1)[0]
        assert fits[f"token_table form={form}"].estimates["ln(1 + M/N)"][0] == pytest.approx(slope, rel=1e-6)


def test_every_world_has_its_own_fit_with_its_own_reference(tmp_path: Path) -> None:
    for number, world in enumerate((1, 2)):
        for seed in range(2):
            write_variant(tmp_path, "dense", 10 * number + seed, 30.0 * world, data__world=world)
            for keys in (16, 32):
                e50 = 30.0 * world * (1 + keys**2 * 32 / 42_000) ** -0.4
                write_variant(tmp_path, "pkm", 10 * number + seed, e50, keys, data__world=world)
    fits = {fit.variant: fit for fit in trends(load(tmp_path, fallback="dense")) if fit.outcome.startswith("E50")}
    assert set(fits) == {"pkm world=1", "pkm world=2"}
    for fit in fits.values():
        assert (fit.runs, fit.cells) == (6, 3)
        assert fit.estimates["ln(1 + M/N)"][0] == pytest.approx(-0.4, rel=1e-6)


@pytest.mark.parametrize("runs", [2, 5])
def test_ninety_five_percent_intervals_of_a_trend_cover(runs: int) -> None:
    generator, hits = np.random.default_rng(0), 0
    cells = np.repeat(np.arange(6), runs)
    x = np.stack([np.ones(6 * runs), cells], 1)
    for _ in range(2000):
        low, high = _interval(x, x @ [1.0, 0.5] + generator.normal(0, 0.1, len(x)), cells)
        hits += low[1] <= 0.5 <= high[1]
    assert 0.92 <= hits / 2000 <= 0.98
