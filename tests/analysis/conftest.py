"""A whole grid to analyse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_folders import write_json, write_run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A whole laptop-like grid `demo`: five seeds of dense and memory_plus, fewer of the rest, one
    failure."""
    root = tmp_path / "results"
    noise = np.random.default_rng(0).normal(0, 0.05, 5)
    names = []
    for seed in range(5):
        wobble = float(np.exp(noise[seed]))
        names.append(write_run(root, "dense", "w32", seed, 30 * wobble))
        for keys, gain in ((16, 0.9), (32, 0.7), (64, 0.5)):
            shift = 1 + 0.01 * seed
            names.append(write_run(root, "memory_plus", "w32", seed, 30 * wobble * gain * shift, half_keys=keys))
        names.append(write_run(root, "dense", "w32", seed, 27 * wobble, ffn_hidden=128))
    for seed in range(3):
        names.append(write_run(root, "moe", "w32", seed, 40.0))
        names.append(write_run(root, "moe_topk", "w32", seed, 25.0 + seed))
        names.append(write_run(root, "pkm", "w32", seed, 24.0 + seed, half_keys=32))
        names.append(write_run(root, "dense", "w64", seed, 12.0 + seed))
        names.append(write_run(root, "memory_plus", "w64", seed, 9.0 + seed, half_keys=64))
    names.append(write_run(root, "moe", "w32", 3, 40.0, state="failed", last=8.0))
    names.append("pkm-w32-k64-s9-00000000")
    sides = [[name for name in names if name.startswith(start)] for start in ("memory_plus-w32-k64-", "dense-w32-s")]
    contrast = {"metric": "e50", "treatment": sides[0], "reference": sides[1][::2]}
    grid = {"grid": "demo", "source": "grids/demo.yaml", "runs": names, "contrast": contrast}
    write_json(root / "grids" / "demo" / "grid.json", grid)
    return root
