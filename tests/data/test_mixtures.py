"""Mixtures: weights count tokens, exactly within a block; the order is a function of seed and step alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import suite.models  # noqa: F401  (registers the families)
from suite.cells import Cell
from suite.data.corpus import prepare
from suite.data.loader import Loader
from suite.data.packing import MIXTURE_BLOCK, MixturePacking, WindowPacking, quotas
from suite.data.reader import is_held_out
from suite.data.shards import Round
from suite.data.sources.mixture import MixtureData
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError

EOT = 0
BYTES = TokenizerConfig(kind="bytes")


def part(number: int, tokens: int) -> Round:
    """Return a corpus whose tokens encode their part and their position."""
    stream = 1 + number * 20_000 + np.arange(tokens, dtype=np.int64) % 20_000
    return Round(stream.astype(np.uint32), np.array([0, tokens], dtype=np.int64))


def mixture(weights: list[float], seed: int = 0, seq_len: int = 10, rows: tuple[int, ...] = (30, 70, 11)) -> Loader:
    packings = [
        WindowPacking([part(n, count * seq_len)], seq_len, EOT, seed, part=n)
        for n, (count, _) in enumerate(zip(rows, weights, strict=False))
    ]
    return Loader(MixturePacking(packings, weights, seed), batch_rows=12)


def sources_of(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0] - 1) // 20_000).tolist()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas_match_the_weights_within_a_row_and_fill_the_block(weights: list[float]) -> None:
    rows = quotas(weights)
    assert rows.sum() == MIXTURE_BLOCK
    assert np.abs(rows - MIXTURE_BLOCK * np.array(weights) / sum(weights)).max() < 1


def test_weights_count_tokens_in_every_block() -> None:
    loader = mixture([0.7, 0.25, 0.05])
    for block in range(2):
        count = Counter()
        for step in range(block * MIXTURE_BLOCK // 12 + 1, (block + 1) * MIXTURE_BLOCK // 12):
            count.update(sources_of(loader.batch(step).tokens_BT))
        total = count.total()
        assert total > MIXTURE_BLOCK - 24
        assert [count[n] / total for n in range(3)] == pytest.approx([0.7, 0.25, 0.05], abs=0.002)


def test_short_ranges_of_rows_are_mixed() -> None:
    loader = mixture([0.5, 0.5])
    counts = [Counter(sources_of(loader.batch(step).tokens_BT))[0] for step in range(50)]
    assert np.mean(counts) == pytest.approx(6, abs=0.8)
    assert len(set(counts)) > 3, "the order is random, not alternating"


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(0, MIXTURE_BLOCK // 4))
def test_every_part_is_read_epoch_by_epoch_in_its_own_order(seed: int, first: int) -> None:
    # Counts rows from the beginning of the mixture, which independently determines the next row of each part.
    weights, rows = [0.6, 0.3, 0.1], (30, 70, 11)
    loader = mixture(weights, seed, rows=rows)
    alone = [Loader(WindowPacking([part(n, r * 10)], 10, EOT, seed, part=n), 1) for n, r in enumerate(rows)]
    packing = loader._packing
    labels, _ = packing.sources(0, first + 40)
    seen = Counter(labels[:first].tolist())
    read = Loader(packing, batch_rows=1)
    for row in range(first, first + 40):
        source = int(labels[row])
        for name in ("tokens_BT", "targets_BT", "segments_BT"):
            assert torch.equal(getattr(read.batch(row), name), getattr(alone[source].batch(seen[source]), name))
        seen[source] += 1


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_the_order_does_not_depend_on_the_number_of_processes(world_size: int) -> None:
    for step in (0, 3, 832, 833, 834, 2500):  # blocks end within steps 833 and 2500
        whole = mixture([3, 1, 1]).batch(step)
        parts = [mixture([3, 1, 1]).batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(whole.tokens_BT, torch.cat([p.tokens_BT for p in parts]))
        assert torch.equal(whole.targets_BT, torch.cat([p.targets_BT for p in parts]))


def test_seeds_differ_in_the_order_of_a_mixture() -> None:
    first, same, other = (mixture([1, 1], seed).batch(0).tokens_BT for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def write(path: Path, word: str, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> MixtureData:
    parts = {
        "web": {"kind": "text", "path": write(tmp_path / "web.jsonl", "web", 400), "weight": 3.0},
        "books": {"kind": "text", "path": write(tmp_path / "books.jsonl", "book", 200), "weight": 1.0},
    }
    return MixtureData.model_validate({"kind": "mixture", "parts": parts, "seq_len": 16, "tokenizer": BYTES})


def test_a_mixture_is_prepared_part_by_part_and_shares_their_folders(config: MixtureData, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    corpus = prepare(config, cache)
    web = TextData(kind="text", path=config.parts["web"].path, tokenizer=BYTES)
    assert prepare(web, cache).parts[0].folder in [part.folder for part in corpus.parts]
    assert sum(path.is_dir() for path in cache.iterdir()) == 2
    batch = corpus.loader(seed=1, batch_rows=400).batch(0)
    rows = [corpus.tokenizer.decode(row.tolist()) for row in batch.tokens_BT]
    assert sum("web" in row for row in rows) / 400 == pytest.approx(0.75, abs=0.07)
    expected = [f"{word} {i}" for word, count in (("book", 200), ("web", 400)) for i in range(count)]
    assert sorted(corpus.held_out) == sorted(text for text in expected if is_held_out(text, 0.05))
    assert {text.split()[0] for text in corpus.held_out[:2]} == {"book", "web"}, "parts alternate"


def test_fingerprints_depend_on_contents_and_weights_not_on_the_order_of_names(
    config: MixtureData, tmp_path: Path
) -> None:
    first = prepare(config, tmp_path).fingerprint
    swapped = config.model_copy(update={"parts": dict(reversed(config.parts.items()))})
    assert prepare(swapped, tmp_path).fingerprint == first
    heavier = config.parts["web"].model_copy(update={"weight": 4.0})
    changed = config.model_copy(update={"parts": {**config.parts, "web": heavier}})
    assert prepare(changed, tmp_path).fingerprint != first


def cell(data: MixtureData) -> Cell:
    return Cell.model_validate(
        {
            "model": {"family": "dense", "base": "w32"},
            "data": data.model_dump(mode="json"),
            "train": {"batch_rows": 4, "tokens": 1000, "lr": 1e-3},
        }
    )


def test_the_hash_of_a_cell_depends_on_the_contents_and_weights_of_parts(config: MixtureData, tmp_path: Path) -> None:
    identified = config.identified()
    first = cell(identified).hash8
    Path(config.parts["web"].path).rename(tmp_path / "moved.jsonl")
    moved = config.parts["web"].model_copy(update={"path": str(tmp_path / "moved.jsonl")})
    assert cell(config.model_copy(update={"parts": {**config.parts, "web": moved}}).identified()).hash8 == first
    swapped = identified.model_copy(update={"parts": dict(reversed(identified.parts.items()))})
    assert cell(swapped).hash8 == first
    heavier = identified.parts["web"].model_copy(update={"weight": 4.0})
    assert cell(identified.model_copy(update={"parts": {**identified.parts, "web": heavier}})).hash8 != first
    assert Cell.model_validate_json(cell(identified).model_dump_json()) == cell(identified)


def test_a_missing_part_is_named(config: MixtureData, tmp_path: Path) -> None:
    missing = config.parts["web"].model_copy(update={"path": str(tmp_path / "gone.jsonl")})
    with pytest.raises(UserError, match=r"^data\.parts\.web\.path: got '.*gone\.jsonl', which does not exist"):
        config.model_copy(update={"parts": {**config.parts, "web": missing}}).identified()


def test_invalid_mixtures_are_refused_by_field(config: MixtureData) -> None:
    light = config.parts["web"].model_copy(update={"weight": 1e-5})
    for update, complaint in (
        (
            {"tokenizer": TokenizerConfig(kind="bpe", vocab_size=400)},
            r"data\.tokenizer\.kind: got 'bpe', allowed: file, bytes",
        ),
        ({"parts": {**config.parts, "web": light}}, r"data\.parts\.web\.weight: got 1e-05, allowed: at least 1/10000"),
    ):
        with pytest.raises(ValidationError, match=complaint):
            cell(config.model_copy(update=update))
