"""Key usage logged in training, compared with counted reads."""

from pathlib import Path

import numpy as np
import pytest
from tiny_cells import corpus_of, tiny_cell

from suite.records import RunDir
from suite.train.loop import Trainer


def usage_lines(folder: Path) -> list[dict]:
    return [line for line in RunDir(folder).train_lines() if "usage" in line]


def test_logged_steps_have_the_reads_and_the_rows_never_read(cache: Path, tmp_path: Path) -> None:
    cell = tiny_cell("memory_plus", log_every=3, accumulate=2)
    trainer = Trainer(cell, corpus_of(cell, cache), RunDir(tmp_path))
    seen: dict[int, list[np.ndarray]] = {}
    (table,) = trainer.model.memory_tables()
    table.before_read.append(lambda indices: seen.setdefault(trainer.step + 1, []).append(indices.flatten().numpy()))
    trainer.run_to_end()
    lines = usage_lines(tmp_path)
    assert [line["step"] for line in lines] == [*range(3, trainer.steps, 3), trainer.steps]
    for line in lines:
        (of_table,) = line["usage"]["tables"]
        of_step = np.concatenate(seen[line["step"]])
        assert of_table["reads"] == len(of_step) == 3 * 4 * 128 * 4 * 4
        assert of_table["used"] == len(np.unique(of_step)) / 256
        so_far = np.concatenate([np.concatenate(seen[step]) for step in range(1, line["step"] + 1)])
        assert of_table["never_read"] == 256 - len(np.unique(so_far))
    assert len(lines[0]["usage"]["layers"]) == 3


@pytest.mark.parametrize("family", ["dense", "moe_topk"])
def test_models_without_a_memory_log_no_usage(family: str, cache: Path, tmp_path: Path) -> None:
    cell = tiny_cell(family, epochs=1.0)
    Trainer(cell, corpus_of(cell, cache), RunDir(tmp_path)).run_to_end()
    assert usage_lines(tmp_path) == []


def test_dense_gradients_leave_never_read_null(cache: Path, tmp_path: Path) -> None:
    cell = tiny_cell("pkm", epochs=1.0, table_optimizer="dense")
    Trainer(cell, corpus_of(cell, cache), RunDir(tmp_path)).run_to_end()
    assert all(line["usage"]["tables"][0]["never_read"] is None for line in usage_lines(tmp_path))
