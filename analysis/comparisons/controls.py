"""Comparisons of a variant that reads tables with its own controls (`model.control`), paired over seeds.

A control keeps what surrounds a table and takes away what it can learn, so this difference is what the table adds.
"""

from __future__ import annotations

import json

import pandas as pd

from analysis.comparisons.paired import Contrast, compared, first_runs
from analysis.records.grid_data import GridData


def control_contrasts(data: GridData) -> list[Contrast]:
    """Return every variant against each of its controls: same base, data, training and model but for `control`.

    Raises:
        InputError: Two runs of one variant and one seed.
    """
    variants = first_runs(data).reset_index()
    variants = variants[~variants["smaller"]]
    variants = variants.assign(without=[_without_control(model) for model in variants["model"]])
    keys = ["pairing", "train_key", "without"]
    both = variants[variants["control"].isna()].merge(variants[variants["control"].notna()], on=keys)
    sides = pd.DataFrame({"ours": both["position_x"], "theirs": both["position_y"], "control": True})
    return compared(data, sides.sort_values(["ours", "theirs"]).reset_index(drop=True))


def _without_control(model: dict[str, object]) -> str:
    return json.dumps({key: value for key, value in model.items() if key != "control"}, sort_keys=True)
