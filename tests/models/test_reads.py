"""Counts of reads and their measures, compared with loops in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from suite import models
from suite.models.peer import PeerConfig
from suite.models.product_key import MemoryPlusConfig
from suite.models.transformer import Transformer
from suite.models.usage import Reads, measures, overlap

VOCAB = 50


def by_hand(counts: np.ndarray) -> dict[str, float]:
    """Compute the measures of counts of reads row by row."""
    reads, entropy = int(counts.sum()), 0.0
    for count in counts.tolist():
        entropy -= count / reads * math.log2(count / reads) if count else 0.0
    return {
        "rows": len(counts),
        "reads": reads,
        "used": (counts > 0).mean(),
        "dead": int((counts == 0).sum()),
        "entropy_bits": entropy,
        "kl_bits": math.log2(len(counts)) - entropy,
    }


some_counts = arrays.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, 9)).filter(np.any)


@given(some_counts)
def test_measures_are_those_of_a_loop_over_rows(counts: np.ndarray) -> None:
    assert measures(torch.from_numpy(counts)) == pytest.approx(by_hand(counts), abs=1e-12)


def test_divergence_is_zero_for_uniform_reads_and_maximal_for_one_row() -> None:
    even = measures(torch.full((64,), 3))
    assert even == {"rows": 64, "reads": 192, "used": 1.0, "dead": 0, "entropy_bits": 6.0, "kl_bits": 0.0}
    one = torch.zeros(64, dtype=torch.int64)
    one[5] = 7
    assert measures(one) == {"rows": 64, "reads": 7, "used": 1 / 64, "dead": 63, "entropy_bits": 0.0, "kl_bits": 6.0}


def test_overlap_is_one_for_equal_use_and_zero_for_disjoint_rows() -> None:
    a, b, c = torch.tensor([2, 2, 0, 0]), torch.tensor([4, 4, 0, 0]), torch.tensor([0, 0, 1, 2])
    assert overlap(a, b) == 1.0
    assert overlap(a, c) == overlap(c, a) == 0.0
    assert overlap(torch.tensor([3, 1, 0, 0]), torch.tensor([0, 2, 1, 1])) == 0.25


def usage_and_rows(model: Transformer, steps: int) -> tuple[dict, list[np.ndarray]]:
    """Return the result of Reads over some forward passes, and the rows of every read of the first table."""
    reads, seen = Reads(model), []
    model.memory_tables()[0].before_read.append(lambda indices_NS: seen.append(indices_NS.numpy()))
    tokens_BT = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    model(tokens_BT)  # not counted yet
    seen.clear()
    reads.start()
    for step in range(steps):
        model((tokens_BT + step) % VOCAB)
    usage = reads.finish()
    model(tokens_BT)  # not counted any more
    assert reads.finish() == {}
    return usage, seen[: steps * len(model.memory_layers())]


def test_layers_heads_and_tables_are_counted_separately() -> None:
    config = MemoryPlusConfig(family="memory_plus", base="w32", half_keys=16, top_k=4, memory_heads=2)
    model = models.build(config, VOCAB, seed=0)
    usage, seen = usage_and_rows(model, steps=2)
    layers = list(model.memory_layers())
    assert len(layers) == 3
    counts = {layer: np.zeros((2, 256), np.int64) for layer in layers}
    for number, rows_NS in enumerate(seen):
        for head in range(2):
            np.add.at(counts[layers[number % 3]][head], rows_NS[:, 4 * head : 4 * (head + 1)], 1)
    for layer in layers:
        of_layer = usage["layers"][str(layer)]
        entropies = of_layer.pop("head_entropy_bits")
        assert entropies == pytest.approx([by_hand(counts_R)["entropy_bits"] for counts_R in counts[layer]])
        assert of_layer == pytest.approx(by_hand(counts[layer].sum(0)))
    (table,) = usage["tables"]
    assert table.pop("layers") == layers
    shares = {layer: counts[layer].sum(0) / counts[layer].sum() for layer in layers}
    expected = {
        f"{one}-{other}": np.minimum(shares[one], shares[other]).sum()
        for one in layers
        for other in layers
        if one < other
    }
    assert table.pop("overlap") == pytest.approx(expected)
    assert table == pytest.approx(by_hand(sum(counts[layer].sum(0) for layer in layers)))


def test_rows_of_two_tables_that_are_read_together_count_once() -> None:
    model = models.build(PeerConfig(family="peer", base="w32", half_keys=16, top_k=4), VOCAB, seed=0)
    usage, seen = usage_and_rows(model, steps=1)
    (table,) = usage["tables"]
    assert table["reads"] == seen[0].size == 60 * 4 * 4
    assert table["overlap"] == {}


def test_detach_removes_the_hooks() -> None:
    config = MemoryPlusConfig(family="memory_plus", base="w32", half_keys=16, top_k=4)
    model = models.build(config, VOCAB, seed=0)
    Reads(model).detach()
    assert all(table.before_read == [] for table in model.memory_tables())
    assert all(not layer._forward_pre_hooks for layer in model.memory_layers().values())
