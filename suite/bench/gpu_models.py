"""Parts of `suite.bench.gpu` that train and run models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from suite.bench.decoding import configurations, decode_speeds
from suite.cells import Cell
from suite.data.corpus import prepare
from suite.models.accounting import account
from suite.plan.one_process import training_bytes
from suite.records import RunDir
from suite.train.loop import Trainer
from suite.train.parallel import World

Row = dict[str, object]
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {},
    "moe_topk": {},
    "pkm": {"half_keys": 1024},
    "peer": {"half_keys": 1024},
    "memory_plus": {"half_keys": 1024},
    "ultramem_v2": {"half_keys": 256},
    "ngram_embedding": {"table_rows": 262147},
    "engram": {"head_rows": 1 << 16},
    "engram_moe": {"head_rows": 1 << 16},
    "token_table": {},
}
"""The families that are trained, and their options."""
TINY = {"half_keys": 16, "table_rows": 1009, "head_rows": 300}
"""Sizes of tables in a rehearsal, which reads two rows with one head where the family has `half_keys`."""
DECODED = ("dense", "moe", "moe_topk", "pkm", "peer", "memory_plus")
MAX_BREAKS = 3
"""Graph breaks of a model under train.compile."""
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets."""


def cell_of(
    family: str, base: str, rehearsal: bool, train: dict[str, Any] | None = None, half_keys: int | None = None
) -> Cell:
    """Return a cell on synthetic text: 8 rows of 4096 tokens per step, or a few short ones.

    Args:
        family: The family.
        base: The base size.
        rehearsal: Whether to make a tiny cell for a rehearsal.
        train: Further fields of `train`.
        half_keys: Other half keys than those of FAMILIES, for families that have them.
    """
    options = FAMILIES[family]
    if rehearsal:
        options = {name: TINY[name] for name in options}
        options |= {"top_k": 2, "memory_heads": 1} if "half_keys" in options else {}
    elif half_keys is not None and "half_keys" in options:
        options = {"half_keys": half_keys}
    model = {"family": family, "base": "w32" if rehearsal else base, **options}
    data = {"kind": "bios", "people": 20 if rehearsal else 5000, "seq_len": 32 if rehearsal else 4096}
    fields = {"batch_rows": 2 if rehearsal else 8, "epochs": 50.0, "lr": 1e-4, "log_every": 1000}
    precision = {} if rehearsal else {"precision": "bf16"}
    return Cell.model_validate({"model": model, "data": data, "train": {**fields, **precision, **(train or {})}})


@contextmanager
def trainer_of(cell: Cell, device: str, folder: Path | None = None) -> Iterator[Trainer]:
    """Yield a trainer, in a run directory that is removed after the context unless a folder is given.

    Args:
        cell: The cell to train.
        device: The device.
        folder: Where the run directory is made; None: a temporary folder.
    """
    cache = Path.home() / ".cache" / "gpu-bench"
    with TemporaryDirectory() as temporary:
        run = RunDir((folder or Path(temporary)) / "run")
        run.path.mkdir(exist_ok=True)
        yield Trainer(cell, prepare(cell.data, cache), run, World(device=torch.device(device)))


def measure(cell: Cell, device: str, steps: int) -> Row:
    """Return the speed of `steps` training steps after two others, and the planned and measured peak memory of all.

    Args:
        cell: The cell.
        device: The device.
        steps: Number of steps.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with trainer_of(cell, device) as trainer:
        for _ in range(2):
            trainer.train_step()
        graphs = counters["stats"]["unique_graphs"]
        _wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            loss = trainer.train_step()["loss"]
        _wait(device)
        seconds = (time.perf_counter() - started) / steps
        tokens, vocabulary = cell.train.batch_rows * cell.data.seq_len, trainer.corpus.vocab_size
    row: Row = {
        "family": cell.model.family,
        "base": cell.model.base,
        "compile": cell.train.compile,
        "step_ms": round(1e3 * seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "loss": loss,
        "planned_bytes": round(training_bytes(cell, vocabulary, {}, where="peak")),
    }
    if cell.train.compile:
        row |= {"graphs": graphs, "traced_later": counters["stats"]["unique_graphs"] - graphs}
    if device == "cuda":
        name, flops = torch.cuda.get_device_name(), account(cell.model, vocabulary, cell.data.seq_len).flops_per_token
        peak = next((value for part, value in PEAK_BF16.items() if part in name), None)
        row |= {
            "mfu": None if peak is None else round(tokens * flops / seconds / peak, 3),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }
    return row


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def steps(device: str, rehearsal: bool) -> Iterator[Row]:
    """Measure every family at 134m."""
    for family in FAMILIES:
        yield measure(cell_of(family, "134m", rehearsal), device, 1 if rehearsal else 10)


def large(device: str, rehearsal: bool) -> Iterator[Row]:
    """Measure dense-1.3b and memory_plus-1.3b with 2^20 rows, one row of the batch at a time."""
    for family in ("dense", "memory_plus"):
        cell = cell_of(family, "1.3b", rehearsal, {"accumulate": 2 if rehearsal else 4})
        yield measure(cell, device, 1 if rehearsal else 5)


def resume(device: str, rehearsal: bool) -> Iterator[Row]:
    """Take two steps, save, take two more; then resume and take those two again."""
    for family in ("dense", "memory_plus"):
        cell = cell_of(family, "134m", rehearsal, {"log_every": 1}, half_keys=256)
        with TemporaryDirectory() as folder:
            with trainer_of(cell, device, Path(folder)) as trainer:
                for _ in range(2):
                    trainer.train_step()
                trainer.save()
                whole = [trainer.train_step()["loss"] for _ in range(2)]
            with trainer_of(cell, device, Path(folder)) as trainer:
                resumed = [trainer.train_step()["loss"] for _ in range(2)]
        largest = max(abs(float(a or 0.0) - float(b or 0.0)) for a, b in zip(whole, resumed, strict=True))
        yield {"family": family, "loss": whole[-1], "difference": largest, "correct": largest <= 1e-3}


def compiled(device: str, rehearsal: bool) -> Iterator[Row]:
    """Measure dense and memory_plus with and without train.compile; a rehearsal traces, and compiles nothing.

    A row is wrong if the model breaks more than MAX_BREAKS graphs, or if anything is traced after the first steps.
    """
    for family, compiles in product(("dense", "memory_plus"), (False, True)):
        torch._dynamo.reset()
        counters.clear()
        cell = cell_of(family, "134m", rehearsal, {"compile": compiles})
        with _tracing_alone() if rehearsal else nullcontext():
            row = measure(cell, device, 1 if rehearsal else 10)
        if compiles:
            row |= {"backend": "none, traced alone" if rehearsal else "inductor"}
            row |= within_limits(int(str(row["graphs"])), int(str(row["traced_later"])))
        yield row


def within_limits(graphs: int, traced_later: int) -> Row:
    """Return the graph breaks since the counters were cleared, and what is wrong with a compiled model.

    Args:
        graphs: Its graphs after the first steps.
        traced_later: Graphs that later steps added.
    """
    breaks = sum(counters["graph_break"].values())
    problems = []
    if graphs == 0:
        problems.append("no graph was compiled")
    if breaks > MAX_BREAKS:
        problems.append(f"{breaks} graph breaks, allowed: {MAX_BREAKS}")
    if traced_later:
        problems.append(f"{traced_later} graphs compiled after the first steps, allowed: 0")
    return {"graph_breaks": breaks, "correct": not problems, **({"note": "; ".join(problems)} if problems else {})}


@contextmanager
def _tracing_alone() -> Iterator[None]:
    """Let torch.compile run the graphs that it traces as they are."""
    compile_graphs = torch.compile
    torch.compile = partial(compile_graphs, backend="eager")
    try:
        yield
    finally:
        torch.compile = compile_graphs


def decode(device: str, rehearsal: bool) -> Iterator[Row]:
    """Time the generation of tokens, next to dense."""
    configs = configurations("w32" if rehearsal else "134m", [32 if rehearsal else 1024])
    configs = [config for config in configs if config.family in DECODED]
    if rehearsal:
        configs = configs[:2]
    speeds = decode_speeds(configs, [1] if rehearsal else [1, 32], steps=2 if rehearsal else 16, rounds=1)
    yield from map(asdict, speeds)
