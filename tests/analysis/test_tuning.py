"""The choice of a tuning grid: the best mean over seeds, its neighbours, and edges named."""

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
from run_folders import write_json, write_run

from analysis.comparisons.choosing.tuning import AXES, choices, table
from analysis.records.grid_data import load


def run(family: str, seed: int, share: float, **train: Any) -> dict[str, Any]:
    group = {"family": family, "variant": family, "base": "w32"}
    return group | {"seed": seed, **dict.fromkeys(AXES, float("nan")), **train, "share": share}


def test_the_best_mean_over_seeds_is_chosen_not_the_best_run() -> None:
    runs = [run("dense", 0, 0.9, lr=1.0), run("dense", 1, 0.1, lr=1.0)]
    runs += [run("dense", seed, share, lr=lr) for lr, share in ((2.0, 0.6), (4.0, 0.4)) for seed in (0, 1)]
    (choice,) = choices(pd.DataFrame(runs))
    assert (choice.setting, choice.share, choice.edges, choice.runs) == ({"lr": 2.0}, 0.6, (), 6)
    assert choice.worst_neighbour == 0.4


def test_a_best_value_at_the_end_of_its_axis_is_named_and_two_point_axes_have_no_inside() -> None:
    shares = {(1.0, 0.0): 0.1, (2.0, 0.0): 0.2, (4.0, 0.0): 0.5, (4.0, 0.1): 0.3}
    runs = [
        run("pkm", 0, share, lr=0.1, value_lr=value_lr, value_weight_decay=decay)
        for (value_lr, decay), share in shares.items()
    ]
    (choice,) = choices(pd.DataFrame(runs))
    assert choice.setting == {"lr": 0.1, "value_lr": 4.0, "value_weight_decay": 0.0}
    assert choice.edges == ("value_lr",)
    assert choice.worst_neighbour == 0.2


def test_forms_of_a_family_are_chosen_separately(tmp_path: Path) -> None:
    best = {"stem": 0.01, "value_embedding": 0.02}
    for seed, (form, lr) in enumerate(itertools.product(best, best.values())):
        e50 = 20.0 if lr == best[form] else 30.0
        name = write_run(tmp_path, "token_table", "w32", seed, e50, stop_past=False)
        path = tmp_path / "runs" / name / "cell.json"
        content = json.loads(path.read_text())
        content["cell"]["model"]["form"] = form
        content["cell"]["train"]["lr"] = lr
        write_json(path, content)
    by_variant = {choice.variant: choice for choice in choices(table(load(tmp_path, fallback="dense")))}
    assert {name: choice.setting["lr"] for name, choice in by_variant.items()} == {
        f"token_table form={form}": lr for form, lr in best.items()
    }
    assert [choice.runs for choice in by_variant.values()] == [2, 2]
