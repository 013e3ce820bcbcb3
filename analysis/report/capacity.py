"""Bits per parameter, where worlds hold more bits than a dense model stores in 100 exposures."""

from __future__ import annotations

import numpy as np

from analysis.comparisons.statistics import MIN_PAIRS, paired
from analysis.records.grid_data import GridData
from analysis.records.regime import AFTER_100_EXPOSURES, BITS_PER_PERSON
from analysis.records.tables import number
from analysis.report.blocks import Block, Heading, Table, Text
from analysis.report.formatting import with_interval


def capacity_blocks(data: GridData) -> list[Block]:
    """Return bits stored per parameter at the end of each variant's runs; nothing for smaller worlds."""
    runs = data.done
    held = runs["people"].astype(float) * BITS_PER_PERSON / runs["params_total"]
    runs = runs.assign(held=held)[(held >= AFTER_100_EXPOSURES) & runs["bits_max"].notna()]
    if runs.empty:
        return []
    at = runs.index.to_numpy(int)
    share = data.stored_share[runs.index]
    runs = runs.assign(exposures=data.curves("epoch").last_x()[at], share=share, density=share * runs["held"])
    rows: list[list[object]] = []
    for (base, label), group in runs.groupby(["base", "label"], sort=False):
        params, densities = float(group["params_total"].iloc[0]), group["density"].to_numpy(float)
        stored = [number(100 * float(np.mean(group["share"]))), with_interval(paired(densities))]
        world = number(float(group["held"].iloc[0]))
        rows.append([base, label, len(group), number(group["exposures"].max()), f"{params:,.0f}", world, *stored])
    headers = ["base", "variant", "runs", "exposures", "parameters", "world holds", "stored, %", "bits per parameter"]
    note = (
        "Bits of the world (attributes, storage templates) that the model has stored at its last probe, over all "
        "parameters, those of embeddings and tables included; the share of the probed people is taken for all. No "
        "model can store more than its world holds, in bits per parameter of the model. "
        f"Intervals from {MIN_PAIRS} runs on. Published for dense models: about 1 after 100 exposures and 2 after "
        "1,000 (Allen-Zhu and Li, Physics of Language Models part 3.3)."
    )
    return [Heading("Bits per parameter"), Table(headers, rows, left=2, name="capacity"), Text(note)]
