"""The capacity grid: each world holds more bits than its models can store."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from suite.data.sources.bios import BiosData
from suite.data.tokenizers import WordTokenizer
from suite.grids import load_grid
from suite.models.accounting import account

BITS_A_PERSON = sum(math.log2(values) for values in (200, 100, 50, 300, 100, 28))
BITS_A_PARAMETER = 2  # Allen-Zhu and Li, "Physics of Language Models" part 3.3


@pytest.mark.parametrize("grid", ["capacity", "capacity-laptop"])
def test_every_world_has_more_bits_than_any_of_its_models_can_store(grid: str) -> None:
    cells = load_grid(str(Path(__file__).resolve().parents[2] / "grids" / f"{grid}.yaml")).cells
    vocabulary = {}
    for model, data in {(cell.model, cell.data) for cell in cells}:
        assert isinstance(data, BiosData)
        if data.people not in vocabulary:
            vocabulary[data.people] = WordTokenizer.of(data.synthetic_world().vocabulary_texts()).vocab_size
        parameters = account(model, vocabulary[data.people], data.seq_len).params_total
        assert data.people * BITS_A_PERSON >= BITS_A_PARAMETER * parameters, model
    assert {cell.train.epochs for cell in cells} == {100, 1000}
