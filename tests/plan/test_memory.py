"""The predicted memory of a training step, compared with the live bytes of a real one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cells import corpus_of

from suite.baselines import loading
from suite.cells import Cell
from suite.models import head_loss, registry
from suite.models.accounting import meta_model
from suite.models.moe import RoutedExperts
from suite.models.product_key import MemoryPlusConfig
from suite.plan.activation_memory import StepTracer
from suite.plan.fused_attention import Precision
from suite.plan.live_bytes import LiveBytes
from suite.plan.step_memory import TableState
from suite.plan.table_state import table_state
from suite.records import RunDir
from suite.train.loop import Trainer
from suite.train.tables import host as host_tables

SMALL = {"half_keys": 64, "top_k": 8}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense", "base": "w32"},
    "dense w128 tied": {"family": "dense", "base": "w128", "tie_embeddings": True},
    "moe": {"family": "moe", "base": "w32", "experts": 16},
    "moe_topk": {"family": "moe_topk", "base": "w32", "shared_experts": 1},
    "moe_topk softmax": {"family": "moe_topk", "base": "w32", "router": "softmax"},
    "pkm": {"family": "pkm", "base": "w32", **SMALL},
    "memory_plus": {"family": "memory_plus", "base": "w32", **SMALL},
    "memory_plus large": {"family": "memory_plus", "base": "w64", "half_keys": 256, "top_k": 8},
    "pkm large": {"family": "pkm", "base": "w64", "half_keys": 256, "top_k": 8},
    "memory_plus keep_ffn": {"family": "memory_plus", "base": "w32", **SMALL, "keep_ffn": True},
    "pkm batchnorm": {"family": "pkm", "base": "w32", **SMALL, "query_batchnorm": True},
    "peer": {"family": "peer", "base": "w48", **SMALL},
    "ultramem_v2": {"family": "ultramem_v2", "base": "w32", "half_keys": 32, "top_k": 8},
    "peer frozen": {"family": "peer", "base": "w48", **SMALL, "control": "frozen"},
    "pkm one_row": {"family": "pkm", "base": "w32", **SMALL, "control": "one_row"},
    "pkm shuffled": {"family": "pkm", "base": "w32", **SMALL, "control": "shuffled"},
    "memory_plus dense": {"family": "memory_plus", "base": "w32", **SMALL, "control": "dense"},
    "hashed_ngram": {"family": "hashed_ngram", "base": "w32"},
    "ngram_embedding": {"family": "ngram_embedding", "base": "w32", "table_rows": 1001},
    "token_table stem": {"family": "token_table", "base": "w32"},
    "token_table tails": {"family": "token_table", "base": "w48", "form": "per_layer_embedding", "row_width": 16},
    "token_table values": {"family": "token_table", "base": "w48", "form": "value_embedding"},
    "engram": {"family": "engram", "base": "w32", "head_rows": 300},
    "engram v4.1": {"family": "engram", "base": "w48", "form": "v4.1", "head_rows": 300},
    "engram_moe": {"family": "engram_moe", "base": "w32", "head_rows": 300},
}


@pytest.fixture(autouse=True)
def _example() -> Iterator[None]:
    """Register the baseline of the documentation."""
    before = set(registry.families())
    loading.load(Path(__file__).resolve().parents[2] / "docs" / "hashed_ngram.py")
    yield
    registry.unregister(set(registry.families()) - before)


@pytest.mark.parametrize(
    ("name", "accumulate", "tables"),
    [
        *((name, 1, {}) for name in MODELS),
        ("dense", 2, {}),
        ("moe_topk", 2, {}),
        ("memory_plus large", 2, {}),
        ("memory_plus large", 1, {"table_optimizer": "dense"}),
        ("memory_plus large", 2, {"table_optimizer": "dense"}),
        ("peer", 1, {"table_optimizer": "dense"}),
        ("peer frozen", 1, {"table_optimizer": "dense"}),
        *(("memory_plus large", 1, {"value_precision": kind}) for kind in ("bf16", "bf16_master", "bf16_stochastic")),
        ("memory_plus large", 1, {"value_second_moment": "row"}),
        ("pkm large", 2, {"value_second_moment": "row", "value_precision": "bf16_master"}),
        ("peer", 1, {"value_second_moment": "row", "value_precision": "bf16"}),
        *((name, 1, {"table_device": "host"}) for name in ("memory_plus large", "peer", "engram", "token_table stem")),
        ("memory_plus large", 2, {"table_device": "host", "value_precision": "bf16"}),
        ("peer frozen", 1, {"table_device": "host"}),
    ],
)
def test_prediction_is_within_ten_percent_of_the_peak_of_a_real_step(
    name: str, accumulate: int, tables: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    cell = Cell.model_validate(
        {
            "model": MODELS[name],
            "data": {"kind": "bios", "people": 60, "questions": 0.5},
            "train": {"batch_rows": 10, "epochs": 9.0, "lr": 5e-3, "accumulate": accumulate, **tables},
        }
    )
    corpus = corpus_of(cell, cache)
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    trainer.train_step()
    loads = watch_busiest(trainer.model, 10 // accumulate * cell.data.seq_len)
    reads = watch_reads(trainer.model)
    live = LiveBytes()
    moments = [tensor for state in trainer.optimizer.adamw.state.values() for tensor in state.values()]
    for adamw in trainer.optimizer.rows.values():
        moments += [value for value in vars(adamw.state).values() if isinstance(value, torch.Tensor)]
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
        live.add(tensor)
    with live:
        trainer.reads.start()
        trainer.train_step()
    uniform = [rows * -math.expm1(-lookups / rows) for lookups, _, rows in reads]
    use = sum(distinct for _, distinct, _ in reads) / sum(uniform) if reads else 1.0
    model = meta_model(cell.model, corpus.vocab_size)
    # A plan has one load for all layers. What layers save adds up, so their mean gives the memory of a micro-batch.
    per_micro_batch = np.reshape(loads or [1.0] * accumulate, (accumulate, -1)).mean(1)
    traced = StepTracer(model, cell.data.seq_len, busiest=per_micro_batch.max()).parts(10 // accumulate)
    predicted = traced.step(micro_batches=accumulate, state=table_state(cell.train), use=use)
    assert predicted.whole == pytest.approx(live.peak, rel=0.1)
    if not predicted.host:
        assert predicted.weights == sum(parameter.nbytes for parameter in trainer.model.parameters())


def test_experts_in_blocks_are_predicted_for_gpus_without_grouped_products(cache: Path, tmp_path: Path) -> None:
    """A CPU computes the blocks here, as such a GPU would."""
    cell = Cell.model_validate(
        {
            "model": {"family": "moe_topk", "base": "w64", "experts": 16},
            "data": {"kind": "bios", "people": 60, "questions": 0.5},
            "train": {"batch_rows": 10, "epochs": 9.0, "lr": 5e-3},
        }
    )
    corpus = corpus_of(cell, cache)
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    for module in trainer.model.modules():
        if isinstance(module, RoutedExperts):
            module.experts.routed = module.experts.in_blocks  # type: ignore[method-assign]
    trainer.train_step()
    live = LiveBytes()
    moments = [tensor for state in trainer.optimizer.adamw.state.values() for tensor in state.values()]
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
        live.add(tensor)
    with live:
        trainer.train_step()
    peaks = {
        capability: StepTracer(meta_model(cell.model, corpus.vocab_size), cell.data.seq_len, capability=capability)
        .parts(10)
        .step()
        .whole
        for capability in (8, None)
    }
    assert peaks[8] == pytest.approx(live.peak, rel=0.1)
    assert peaks[None] < 0.9 * live.peak


def test_an_average_of_the_weights_adds_four_bytes_to_every_trained_weight(cache: Path, tmp_path: Path) -> None:
    steps = []
    for share in (None, 0.1):
        cell = Cell.model_validate(
            {
                "model": MODELS["engram"],
                "data": {"kind": "bios", "people": 60, "questions": 0.5},
                "train": {"batch_rows": 10, "epochs": 9.0, "lr": 5e-3, "probes": 2, "probe_average": share},
            }
        )
        corpus = corpus_of(cell, cache)
        traced = StepTracer(meta_model(cell.model, corpus.vocab_size), cell.data.seq_len).parts(10)
        steps.append(traced.step(state=table_state(cell.train)))
    average = Trainer(cell, corpus, RunDir(tmp_path)).average
    assert average is not None
    held = sum(tensor.nbytes for tensor in average.tensors.values())
    assert steps[1].whole - steps[0].whole == steps[1].moments - steps[0].moments == held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_prediction_holds_for_a_large_vocabulary_whose_logits_never_exist_whole(
    tied: bool, precision: Precision, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", 1 << 18)
    cell = Cell.model_validate(
        {
            "model": {"family": "dense", "base": "w32", "tie_embeddings": tied},
            "data": {"kind": "bios", "people": 60},
            "train": {"batch_rows": 2, "epochs": 9.0, "lr": 5e-3, "precision": precision},
        }
    )
    corpus = corpus_of(cell, cache)
    corpus.vocab_size = 20_000
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    trainer.train_step()
    live = LiveBytes()
    moments = [tensor for state in trainer.optimizer.adamw.state.values() for tensor in state.values()]
    for tensor in (*trainer.model.parameters(), *moments):
        live.add(tensor)
    with live:
        trainer.train_step()
    traced = StepTracer(meta_model(cell.model, 20_000), cell.data.seq_len, precision).parts(2)
    assert traced.step().peak == pytest.approx(live.peak, rel=0.1)
    logits = 4 * 2 * cell.data.seq_len * 20_000
    assert live.peak - 16 * sum(parameter.numel() for parameter in trainer.model.parameters()) < logits


def watch_busiest(model: torch.nn.Module, tokens: int) -> list[float]:
    """Record, for each call of a mixture, the load of its busiest expert over the mean; shapes do not determine it."""
    seen: list[float] = []
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            mean = tokens * module.top_k / module.experts.count
            module.experts.register_forward_pre_hook(
                lambda _, args, mean=mean: seen.append(args[1].flatten().bincount().max().item() / mean)
            )
    return seen


def watch_reads(model: torch.nn.Module) -> list[tuple[int, int, int]]:
    """Record the lookups, the distinct rows and the rows of the table for every read."""
    seen: list[tuple[int, int, int]] = []
    for table in model.memory_tables():
        rows = len(table.weight)
        table.before_read.append(
            lambda ids, rows=rows: seen.append((ids.numel(), len(set(ids.flatten().tolist())), rows))
        )
    return seen


def test_sharding_divides_state_but_not_activations() -> None:
    parts = StepTracer(meta_model(MemoryPlusConfig(**MODELS["memory_plus large"]), 500), 128).parts(4)
    whole, sharded = parts.step(), parts.step(rest_shards=4, value_shards=4)
    assert sharded.weights == whole.weights / 4
    assert whole.moments / 4 < sharded.moments < whole.moments / 3  # the state of rows is not divided
    lookups = sum(sum(part.lookups) for part in parts.parts)
    assert sharded.saved == whole.saved + 3 * 8 * lookups  # every process orders the reads of all four
    assert whole.weights + whole.moments < whole.peak
    assert sharded.peak < whole.peak


def test_the_memory_of_a_huge_table_is_predicted_without_allocating_it() -> None:
    huge = MemoryPlusConfig(family="memory_plus", base="1.3b", half_keys=8192)
    step = StepTracer(meta_model(huge, 32000), 512, "bf16").parts(1).step()
    assert step.weights / 4 == pytest.approx(138747.7e6, rel=1e-6)
    assert step.moments == 2 * step.weights + 9 * 2**26


def test_a_table_in_host_memory_needs_none_of_the_device_but_for_copies_of_rows() -> None:
    config = MemoryPlusConfig(family="memory_plus", base="1.3b", half_keys=4096)
    parts = StepTracer(meta_model(config, 32000), 512, "bf16").parts(1)
    (rows, width), lookups = parts.tables[0], [sum(part.lookups) for part in parts.parts]
    device, host = parts.step(), parts.step(state=TableState(host=True))
    assert device.host == 0
    assert host.weights == device.weights - 4 * rows * width
    assert host.moments == device.moments - (8 * width + 9) * rows
    copies = [4 * width * rows * -math.expm1(-count / rows) for count in lookups]
    assert host.saved == pytest.approx(device.saved + sum(copies), rel=1e-3)
    table = (12 * width + 9) * rows
    in_use = host.host - host.pinned
    assert table + sum(copies) < in_use < table + 3.1 * sum(copies)  # gradients, their pieces and sums
    assert host.peak < device.peak - table + sum(copies)


def test_rows_of_a_frozen_table_in_host_memory_are_copied_like_those_of_a_trained_one() -> None:
    trained, frozen = (
        StepTracer(meta_model(config, 32000), 512, "bf16").parts(1)
        for control in (None, "frozen")
        for config in [MemoryPlusConfig(family="memory_plus", base="1.3b", half_keys=4096, control=control)]
    )
    saved = []
    for parts in (trained, frozen):
        device, host = parts.step(), parts.step(state=TableState(host=True))
        assert host.weights == device.weights - 4 * 2**24 * 2048
        saved.append(host.saved - device.saved)
    assert saved[0] > 0
    assert saved[1] == pytest.approx(saved[0])
    assert host.host == 4 * 2**24 * 2048 + 2**29  # pinned: nearly 2^16 rows of one read
    assert host.moments == device.moments


@pytest.mark.parametrize(
    ("name", "value"), [("memory_plus large", "fp32"), ("memory_plus large", "bf16"), ("peer", "fp32")]
)
def test_pinned_buffers_of_tables_in_host_memory_are_those_of_a_real_step(
    name: str, value: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU makes the same copies as a GPU, without pinning them.

    A plan knows the mean size of reads alone; here all have the same next power of two.
    """
    cell = Cell.model_validate(
        {
            "model": MODELS[name],
            "data": {"kind": "bios", "people": 60, "questions": 0.5},
            "train": {
                "batch_rows": 6,
                "epochs": 9.0,
                "lr": 5e-3,
                "accumulate": 2,
                "table_device": "host",
                "value_precision": value,
            },
        }
    )
    corpus = corpus_of(cell, cache)
    trainer = Trainer(cell, corpus, RunDir(tmp_path))
    rows: list[int] = []
    gradients: list[int] = []
    copied, send = host_tables.copied_rows, host_tables.Transfers.send

    def copied_and_noted(*arguments: Any) -> torch.Tensor:
        copy = copied(*arguments)
        rows.append(copy.nbytes)
        return copy

    def sent_and_noted(transfers: host_tables.Transfers, to: Any, rows_U: torch.Tensor, sums_UD: torch.Tensor) -> None:
        gradients.append(sums_UD.nbytes)
        send(transfers, to, rows_U, sums_UD)

    monkeypatch.setattr(host_tables, "copied_rows", copied_and_noted)
    monkeypatch.setattr(host_tables.Transfers, "send", sent_and_noted)
    reads = watch_reads(trainer.model)
    trainer.train_step()
    uniform = [count * -math.expm1(-lookups / count) for lookups, _, count in reads]
    use = sum(distinct for _, distinct, _ in reads) / sum(uniform)
    parts = StepTracer(meta_model(cell.model, corpus.vocab_size), cell.data.seq_len).parts(3)
    predicted = parts.step(micro_batches=2, state=table_state(cell.train), use=use)

    def rounded(size: int) -> int:
        return 1 << (size - 1).bit_length()

    tables = len(trainer.model.memory_tables())  # peer reads both of its tables at the same rows
    at_once = max(sum(map(rounded, rows[start : start + tables])) for start in range(0, len(rows), tables))
    assert len({rounded(size) for size in gradients}) == 1
    assert predicted.pinned == pytest.approx(at_once + sum(map(rounded, gradients)) - sum(gradients), rel=0.1)
