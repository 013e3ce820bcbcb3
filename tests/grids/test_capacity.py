"""The capacity grids: each world holds more bits than dense models store (Allen-Zhu and Li, part 3.3)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from suite.data.sources.bios import BiosData
from suite.data.tokenizers import WordTokenizer
from suite.grids import load_grid
from suite.models.accounting import account

BITS_A_PERSON = sum(math.log2(values) for values in (200, 100, 50, 300, 100, 28))


@pytest.mark.parametrize(
    ("grid", "epochs", "bits_a_parameter"),
    [("capacity", {100, 1000}, 2.0), ("capacity-laptop", {100}, 1.2)],  # published: 2 after 1,000, 1 after 100
)
def test_every_world_has_more_bits_than_a_model_stores_at_the_published_rate(
    grid: str, epochs: set[int], bits_a_parameter: float
) -> None:
    cells = load_grid(str(Path(__file__).resolve().parents[2] / "grids" / f"{grid}.yaml")).cells
    vocabulary = {}
    for model, data in {(cell.model, cell.data) for cell in cells}:
        assert isinstance(data, BiosData)
        if data.people not in vocabulary:
            vocabulary[data.people] = WordTokenizer.of(data.synthetic_world().vocabulary_texts()).vocab_size
        parameters = account(model, vocabulary[data.people], data.seq_len).params_total
        assert data.people * BITS_A_PERSON >= bits_a_parameter * parameters, model
    assert {cell.train.epochs for cell in cells} == epochs
