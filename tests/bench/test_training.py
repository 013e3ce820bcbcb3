"""`suite bench step`: every table optimizer of every table, and its peak memory."""

from pathlib import Path

import pytest
from tiny_cells import tiny_cell

from suite.bench.training import contenders, step_speeds
from suite.errors import UserError


def test_tables_are_measured_with_both_optimizers(cache: Path) -> None:
    cells = [tiny_cell("memory_plus"), tiny_cell("dense"), tiny_cell("memory_plus", seed=1)]
    models = contenders(cells, half_keys=[16, 256])
    measured = [
        (cell.model.family, getattr(cell.model, "half_keys", None), cell.train.table_optimizer) for cell in models
    ]
    plus = [("memory_plus", n, optimizer) for n in (16, 256) for optimizer in ("row_wise", "dense")]
    assert measured == [("dense", None, "row_wise"), *plus]
    speeds = step_speeds(models, cache, rounds=1, steps=1)
    assert [speed.optimizer for speed in speeds] == [None, "row_wise", "dense", "row_wise", "dense"]
    assert [speed.memory_rows for speed in speeds] == [0, 256, 256, 65536, 65536]
    assert all(speed.step_ms > 0 and speed.tokens_per_s > 0 for speed in speeds)
    table_bytes = 65536 * 32 * 4
    by_rows, densely = speeds[3].peak_bytes, speeds[4].peak_bytes
    assert by_rows > 3 * table_bytes  # rows and both moments
    assert densely - by_rows > table_bytes / 2  # the dense gradient minus the compact one


def test_by_default_tables_have_the_size_of_the_cell() -> None:
    assert [cell.model.half_keys for cell in contenders([tiny_cell("pkm")])] == [16, 16]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"--half-keys: got 2, allowed: at least top_k \(4\)"):
        contenders([tiny_cell("pkm")], half_keys=[2])
