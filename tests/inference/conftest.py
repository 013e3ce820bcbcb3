"""A small float64 model whose predictions differ between tokens."""

from __future__ import annotations

import pytest
from naive_scoring import VOCAB, sharpened

from suite import models
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharpened(models.build(ModelConfig(family="dense", base="w32"), VOCAB, seed=3)).double()
