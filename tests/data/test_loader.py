"""The order of rows: one stream for any number of processes. Packing is compared with loops that follow its docs."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.data import seeded_random
from suite.data.corpus import prepare
from suite.data.loader import Loader
from suite.data.packing import DocumentPacking, Packing, WindowPacking
from suite.data.shards import Round
from suite.data.sources.bios import BiosData

EOT = 0
LENGTHS = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=30), min_size=1, max_size=3)


def made_up(lengths: list[int]) -> Round:
    """Return documents of these lengths, end of text included, whose other tokens are all different."""
    tokens, starts = [], [0]
    for length in lengths:
        tokens += [EOT, *range(len(tokens) + 1, len(tokens) + length)]
        starts.append(len(tokens))
    return Round(np.array(tokens, dtype=np.uint16), np.array(starts, dtype=np.int64))


def documents_of(r: Round) -> list[tuple[int, ...]]:
    return [tuple(r.tokens[a:b].tolist()) for a, b in zip(r.starts[:-1], r.starts[1:], strict=True)]


def rows_of(packing: Packing, epoch: int) -> list[tuple[list[int], list[int], list[int]]]:
    columns = packing.rows(epoch, 0, packing.rows_per_epoch)
    return [tuple(column[i].tolist() for column in columns) for i in range(packing.rows_per_epoch)]


@given(LENGTHS, st.integers(7, 20), st.integers(0, 5))
@settings(deadline=None)
def test_document_rows_hold_every_document_whole_exactly_once(
    lengths: list[list[int]], seq_len: int, epoch: int
) -> None:
    rounds = [made_up(of_round) for of_round in lengths]
    packing = DocumentPacking(rounds, seq_len, EOT, seed=3)
    stride = seq_len - max(max(of_round) for of_round in lengths) + 1
    assert packing.rows_per_epoch == -(-max(sum(of_round) for of_round in lengths) // stride)
    documents, position = [], 0
    for index, (tokens, targets, segments) in enumerate(rows_of(packing, epoch)):
        assert segments == sorted(segments)
        assert segments[0] == 0
        for segment in sorted(set(segments)):
            own = [t for t, s in zip(tokens, segments, strict=True) if s == segment]
            goal = [t for t, s in zip(targets, segments, strict=True) if s == segment]
            if goal[0] == -100:  # the padding at a row's end
                assert segment == segments[-1]
                assert set(goal) == {-100}
                assert set(own) == {EOT}
                continue
            assert goal == [*own[1:], EOT]
            assert index * stride <= position < (index + 1) * stride, (
                "a row holds the documents that start in its stride"
            )
            position += len(own)
            documents.append(tuple(own))
    assert Counter(documents) == Counter(documents_of(rounds[epoch % len(rounds)]))


@given(LENGTHS, st.integers(2, 20), st.integers(0, 5))
@settings(deadline=None)
def test_windows_split_the_stream_without_loss(lengths: list[list[int]], seq_len: int, epoch: int) -> None:
    rounds = [made_up(lengths[0])]
    stream = rounds[0].tokens.tolist()
    packing = WindowPacking(rounds, seq_len, EOT, seed=3)
    expected = []
    for begin in range(0, len(stream), seq_len):
        own = stream[begin : begin + seq_len]
        goal = ([*stream[begin + 1 : begin + seq_len + 1], EOT])[: len(own)]
        segments, segment = [], 0
        for token in own:
            segment += token == EOT
            segments.append(segment)
        pad = seq_len - len(own)
        expected.append((own + [EOT] * pad, goal + [-100] * pad, segments + [segment + 1] * pad))
    assert sorted(rows_of(packing, epoch)) == sorted(expected)


def loader(seed: int = 0, batch_rows: int = 12, packing: type = DocumentPacking) -> Loader:
    rng = np.random.default_rng(0)
    rounds = [made_up(rng.integers(3, 12, 100).tolist()) for _ in range(2)]
    return Loader(packing(rounds, 30, EOT, seed), batch_rows)


@pytest.mark.parametrize("packing", [DocumentPacking, WindowPacking])
@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_a_step_is_the_same_for_any_number_of_processes(packing: type, world_size: int) -> None:
    whole = loader(packing=packing)
    shared = [loader(packing=packing) for _ in range(world_size)]
    for step in (0, 1, 2, 7, 8, 3):  # crosses epochs, and goes back as a resumed run does
        batch = whole.batch(step)
        parts = [each.batch(step, rank, world_size) for rank, each in enumerate(shared)]
        for name in ("tokens_BT", "targets_BT", "segments_BT"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert joined.dtype == torch.int64
            assert torch.equal(getattr(batch, name), joined)


def test_steps_of_any_size_follow_the_stream_of_epochs() -> None:
    small, large = loader(batch_rows=1), loader(batch_rows=5)
    rows = [small.batch(step).tokens_BT for step in range(100)]
    for step in range(20):
        assert torch.equal(large.batch(step).tokens_BT, torch.cat(rows[5 * step : 5 * step + 5]))
    assert small.epoch_at(small.rows_per_epoch) == 1.0
    assert large.epoch_at(20) == pytest.approx(100 / large.rows_per_epoch)


def test_epochs_and_seeds_differ_in_order() -> None:
    packings = [DocumentPacking([made_up([5] * 50)], 20, EOT, seed) for seed in (0, 0, 1)]
    first, same, other = (packing.rows(0, 0, 10)[0] for packing in packings)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, packings[0].rows(1, 0, 10)[0])


def test_processes_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="12 rows cannot be divided"):
        loader().batch(0, 0, 5)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader().batch(0, 2, 2)


def test_an_epoch_of_bios_is_one_exposure_of_every_fact(tmp_path: Path) -> None:
    corpus = prepare(BiosData(kind="bios", people=30, questions=0.5, seq_len=64), tmp_path)
    assert corpus.world is not None
    loaded = corpus.loader(seed=4, batch_rows=1)
    for epoch in range(6):
        read = []
        for row in range(epoch * loaded.rows_per_epoch, (epoch + 1) * loaded.rows_per_epoch):
            batch = loaded.batch(row)
            tokens, targets = batch.tokens_BT[0].tolist(), batch.targets_BT[0].tolist()
            used = [token for token, target in zip(tokens, targets, strict=True) if target != -100]
            starts = [i for i, token in enumerate(used) if token == corpus.tokenizer.eot_id] + [len(used)]
            read += [corpus.tokenizer.decode(used[a:b]) for a, b in itertools.pairwise(starts)]
        assert sorted(read) == sorted(corpus.world.documents(epoch % 4))


def test_the_order_of_a_seed_is_pinned(tmp_path: Path) -> None:
    # A resumed run must read the same tokens: a change here invalidates every unfinished run.
    batch = prepare(BiosData(kind="bios", people=50, world=3), tmp_path).loader(11, 8).batch(5)
    content = b"".join(t.numpy().tobytes() for t in (batch.tokens_BT, batch.targets_BT, batch.segments_BT))
    assert hashlib.sha256(content).hexdigest()[:16] == "56b23f5ceb24d3e1"


@given(st.integers(1, 3000), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_a_shuffle_is_a_permutation_computed_element_by_element(count: int, seed: int) -> None:
    whole = seeded_random.shuffled(np.arange(count), count, seed)
    assert sorted(whole.tolist()) == list(range(count))
    some = np.arange(count)[:: max(1, count // 7)]
    assert np.array_equal(seeded_random.shuffled(some, count, seed), whole[some])


def test_a_shuffle_of_more_rows_than_fit_in_memory_needs_little_memory() -> None:
    count = 10**12
    places = seeded_random.shuffled(np.arange(1000), count, 5)
    assert len(set(places.tolist())) == 1000
    assert places.min() >= 0
    assert places.max() < count
    assert places.mean() == pytest.approx(count / 2, rel=0.1)


def test_shuffles_are_uniform_over_places_and_over_neighbours() -> None:
    # The place of item 0 and the distance of item 1 from it are uniform over many seeds (chi-square).
    places = np.array([seeded_random.shuffled(np.arange(2), 12, seed) for seed in range(6000)])
    for values in (places[:, 0], (places[:, 1] - places[:, 0]) % 12 - 1):
        counts = np.bincount(values, minlength=12)
        kinds = np.count_nonzero(counts)
        expected = len(places) / kinds
        assert kinds in (11, 12)
        assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 40


def test_the_shuffle_is_pinned() -> None:
    # A resumed run must read the same rows.
    assert seeded_random.shuffled(np.arange(8), 1000, 11, 0).tolist() == [744, 156, 201, 885, 488, 440, 700, 260]
