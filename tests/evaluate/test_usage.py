"""Key usage compared with counts by a loop."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from suite import models
from suite.cells import Cell
from suite.data.corpus import Corpus, prepare
from suite.evaluate.usage import key_usage
from suite.inference.tables.popularity import BATCH_ROWS, BATCHES


def cell(family: str, **options: object) -> Cell:
    return Cell.model_validate(
        {
            "model": {"family": family, "base": "w32", **options},
            "data": {"kind": "bios", "people": 30},
            "train": {"batch_rows": 4, "epochs": 1.0, "lr": 1e-3},
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(cell("dense").data, Path(tmp_path_factory.mktemp("usage")))


def test_counts_of_layers_and_shared_tables_equal_a_loop(corpus: Corpus) -> None:
    model = models.build(cell("memory_plus", half_keys=16, top_k=4).model, corpus.vocab_size, seed=0).eval()
    usage = key_usage(model, corpus)
    seen: list[torch.Tensor] = []
    (table,) = model.memory_tables()
    assert table.before_read == []
    table.before_read.append(lambda indices_NS: seen.append(indices_NS))
    layers = list(model.memory_layers())
    counts: dict[int, Counter[int]] = {layer: Counter() for layer in layers}
    with torch.no_grad():
        for step in range(BATCHES):
            batch = corpus.loader(0, BATCH_ROWS).batch(step)
            seen.clear()
            model(batch.tokens_BT, batch.segments_BT)
            for layer, indices_NS in zip(layers, seen, strict=True):
                counts[layer].update(indices_NS.flatten().tolist())
    assert usage["tokens"] == BATCHES * BATCH_ROWS * 128
    for layer in layers:
        layer_usage = usage["layers"][str(layer)]
        assert layer_usage["reads"] == sum(counts[layer].values()) == usage["tokens"] * 4 * 4
        assert layer_usage["used"] == len(counts[layer]) / 256
    (shared,) = usage["tables"]
    assert shared["layers"] == layers
    assert shared["used"] == len(set().union(*counts.values())) / 256


def test_the_share_that_is_read_grows_with_every_batch_and_ends_at_one(corpus: Corpus) -> None:
    model = models.build(cell("pkm", half_keys=8, top_k=4).model, corpus.vocab_size, seed=0)
    shares: list[float] = []
    key_usage(model, corpus, on_progress=shares.append)
    assert shares == [number / (2 * BATCHES) for number in range(1, 2 * BATCHES + 1)]  # two texts of equal length


def test_a_model_without_a_memory_has_no_usage(corpus: Corpus) -> None:
    assert key_usage(models.build(cell("dense").model, corpus.vocab_size, seed=0), corpus) == {}
