"""`suite bench decode`: every family at every table size, compared with dense."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from suite.baselines import loading
from suite.bench import decoding
from suite.cli.main import app
from suite.errors import UserError
from suite.inference.tables.loading import parse_place
from suite.models import registry
from suite.models.accounting import account


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_every_family_and_table_size_is_compared_with_dense() -> None:
    configs = decoding.configurations("w32", [32, 64])
    speeds = decoding.decode_speeds(configs, batches=[1, 3], context=4, steps=2, rounds=2)
    assert {speed.family for speed in speeds} == set(registry.families())
    assert {(speed.half_keys, speed.batch) for speed in speeds if speed.family == "peer"} == {
        (32, 1),
        (32, 3),
        (64, 1),
        (64, 3),
    }
    for speed in speeds:
        assert speed.ms_p20 <= speed.ms_p50 <= speed.ms_p80
        assert speed.time_ratio_p20 <= speed.time_ratio_p50 <= speed.time_ratio_p80
        assert (speed.threads, speed.clock) == (1, "cpu")
        assert speed.tokens_per_s == pytest.approx(speed.batch / speed.ms_p50 * 1e3, rel=0.01)
        assert speed.memory_rows == (speed.half_keys or 0) ** 2
    dense = next(speed for speed in speeds if speed.family == "dense")
    assert dense.time_ratio_p50 == 1.0
    assert dense.bytes_per_token == account(configs[0], decoding.VOCAB, 4).bytes_per_token


def test_tables_elsewhere_take_turns_warm_and_cold(tmp_path: Path) -> None:
    configs = [config for config in decoding.configurations("w32", [32]) if config.family in ("dense", "pkm")]
    place = parse_place("file", "lru:10%")
    measured = decoding.decode_speeds(configs, [2], context=4, steps=2, rounds=2, place=place, folder=tmp_path)
    assert [(speed.family, speed.table) for speed in measured] == [
        ("dense", "model"),
        ("pkm", "model"),
        ("pkm", "file lru:10%"),
    ]
    plain, stored = measured[1:]
    assert plain.hits is None
    assert plain.cold_ratio_p50 is None
    assert stored.clock == plain.clock == "wall"
    assert stored.cold_ratio_p50 is not None
    assert stored.cold_ratio_p50 > 0
    assert stored.hits is not None
    assert 0 < stored.hits < 1
    read = [stored.device_bytes_per_token, stored.host_bytes_per_token, stored.file_bytes_per_token]
    assert read[1] == 0
    assert read[0] / (read[0] + read[2]) == pytest.approx(stored.hits, rel=0.01)
    assert list(tmp_path.iterdir()) == []


def test_models_are_made_once_for_all_batch_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config for config in decoding.configurations("w32", [32]) if config.family in ("dense", "pkm")]
    made, make = [], decoding._built
    monkeypatch.setattr(decoding, "_built", lambda config, *rest: made.append(config.family) or make(config, *rest))
    place = parse_place("file", "lru:50%")
    measured = decoding.decode_speeds(configs, [1, 3], context=4, steps=2, rounds=2, place=place, folder=tmp_path)
    assert made == ["dense", "pkm", "pkm"]
    assert [speed.batch for speed in measured] == [1] * 3 + [3] * 3
    single = decoding.decode_speeds(configs, [3], context=4, steps=2, rounds=2, place=place, folder=tmp_path)
    reads = [(speed.table, speed.device_bytes_per_token, speed.file_bytes_per_token) for speed in measured[3:]]
    assert [row[0] for row in reads] == [speed.table for speed in single]
    total = single[-1].device_bytes_per_token + single[-1].file_bytes_per_token
    assert sum(reads[-1][1:]) == pytest.approx(total, abs=0.3)


def test_quantised_rows_are_measured_in_the_model_and_elsewhere(tmp_path: Path) -> None:
    configs = [config for config in decoding.configurations("w32", [32]) if config.family in ("dense", "pkm")]
    measured = decoding.decode_speeds(
        configs, [1], context=4, steps=2, rounds=2, place=parse_place("file", None), folder=tmp_path, forms=["int8"]
    )
    assert [(speed.family, speed.table, speed.form) for speed in measured] == [
        ("dense", "model", None),
        ("pkm", "model", None),
        ("pkm", "model", "int8"),
        ("pkm", "file", "int8"),
    ]
    plain, here, there = measured[1:]
    assert plain.device_bytes_per_token is None
    assert (here.device_bytes_per_token, here.file_bytes_per_token) == (there.file_bytes_per_token, 0)
    assert here.cold_ratio_p50 is None
    rows = [here.device_bytes_per_token * 2 / 36, 4 * 32 * 2]  # 2 tokens, each at most heads x top_k rows
    assert rows[0] == int(rows[0]) <= rows[1]


def test_rows_that_follow_from_ids_are_measured_with_and_without_prefetching(tmp_path: Path) -> None:
    families = ("dense", "peer", "engram")
    configs = [config for config in decoding.configurations("w32", [32]) if config.family in families]
    place = parse_place("file", None)
    measured = decoding.decode_speeds(configs, [2], context=4, steps=2, rounds=2, place=place, folder=tmp_path)
    by_name = {(speed.family, speed.table): speed for speed in measured}
    assert set(by_name) == {
        *((family, "model") for family in families),
        ("peer", "file"),
        ("engram", "file"),
        ("engram", "file prefetch"),
    }
    peer, waits, ahead = (by_name[name] for name in (("peer", "file"), ("engram", "file"), ("engram", "file prefetch")))
    for speed in (peer, waits, ahead):
        assert speed.wait_us_per_token is not None
        assert speed.cold_wait_us_per_token is not None
        assert 0 < speed.wait_us_per_token < 1e3 * speed.ms_p80
    assert (peer.prefetch_time_ratio, waits.prefetch_wait_ratio) == (None, None)
    assert ahead.file_bytes_per_token == waits.file_bytes_per_token
    ratios = [ahead.prefetch_time_ratio, ahead.cold_prefetch_time_ratio, ahead.prefetch_wait_ratio]
    assert all(ratio is not None and ratio > 0 for ratio in [*ratios, ahead.cold_prefetch_wait_ratio])


def test_invalid_bases_and_tables_are_refused() -> None:
    with pytest.raises(UserError, match="--base: got 'w7'"):
        decoding.configurations("w7", [32])
    with pytest.raises(UserError, match=r"--half-keys: .*half_keys: got 8, allowed: at least top_k"):
        decoding.configurations("w32", [8])
    done = CliRunner().invoke(app, ["bench", "decode", "--batches", "1,x"])
    assert isinstance(done.exception, UserError)
    assert "--batches: got '1,x'" in str(done.exception)
    done = CliRunner().invoke(app, ["bench", "decode", "--to", "int8,int7"])
    assert "--to: got 'int8,int7', allowed: bf16, int8" in str(done.exception)


@pytest.mark.slow
def test_suite_bench_decode_writes_a_table(tmp_path: Path) -> None:
    arguments = ["bench", "decode", "--base", "w32", "--half-keys", "32", "--batches", "1", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = list(csv.DictReader((tmp_path / "bench" / "decode.csv").open()))
    assert [row["family"] for row in written] == [row["family"] for row in json.loads(done.stdout)]


@pytest.mark.parametrize(
    ("body", "options", "words"),
    [
        ("1 / 0", "pass", r"family mine: line 4: ZeroDivisionError"),
        ("x", "widen: float", r"family mine: widen: got nothing, allowed: "),
    ],
)
def test_an_invalid_baseline_is_refused_before_measuring(body: str, options: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\nfrom suite.models import accounting, registry\n"
        f"class M(nn.Module):\n    def forward(self, x): return {body}\n    def cost(self): return accounting.Cost()\n"
        f"class C(registry.ModelConfig):\n    {options}\n"
        'registry.register(registry.Family("mine", C, lambda c: [M() for _ in range(c.size.layers)]))\n'
    )
    loading.load(path)
    try:
        with pytest.raises(UserError, match=words):
            decoding.configurations("w32", [32])
    finally:
        registry.unregister(["mine"])
