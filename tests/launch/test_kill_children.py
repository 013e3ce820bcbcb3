"""Kill -9 of a run that starts from another: parent first, and the records of an undisturbed sweep."""

from pathlib import Path

import pytest
from test_kill import assert_equal_sweeps, finish, killed_sweeps

GRID = """
defaults:
  model: {base: w32, family: memory_plus, half_keys: 16, top_k: 4}
  data: {kind: bios, people: 30, questions: 0.5}
  train: {batch_rows: 4, epochs: 2, lr: 5e-3, log_every: 1, checkpoint_every: 2}
parents:
  pretrained: {train: {batch_rows: 4, epochs: 2}}
blocks:
  - set:
      data: {kind: new_people, facts: 24, seq_len: 16}
      train: {init_from: pretrained, batch_rows: 4, epochs: 1, probe_every: 5, value_lazy: true}
    axes:
      train.trainable: [{kind: rows, top: 3, background: 4}, {kind: lora, rank: 2}]
"""


@pytest.mark.slow
def test_killed_children_leave_the_records_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "children.yaml"
    grid.write_text(GRID)
    expected = finish(grid, tmp_path / "undisturbed")
    kills = [("worker", "training", 0.1), ("launcher", "training", 0.2), ("worker", "training", 0.4)]
    for results in killed_sweeps(grid, tmp_path, kills):
        assert_equal_sweeps(expected, results)
