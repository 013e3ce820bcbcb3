"""Cells trained by several real processes, launched by torchrun and connected through gloo.

As a script under torchrun: `parallel_jobs.py JOBS CACHE` with a JSON list of jobs (see `Job`), which the same processes
train one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.baselines import loading
from suite.cells import Cell
from suite.data.corpus import prepare

if TYPE_CHECKING:
    from suite.models.transformer import Transformer

TINY = {"base": "w32", "layers": 2, "dim": 16, "heads": 2, "kv_heads": 2, "ffn_hidden": 32}
MEMORY = {"half_keys": 16, "top_k": 4, "memory_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"experts": 4},
    "moe_topk": {"experts": 4, "top_k": 2, "shared_experts": 1},
    "moe_topk softmax": {"experts": 4, "top_k": 2, "router": "softmax"},
    "pkm": MEMORY,
    "pkm batchnorm": MEMORY | {"query_batchnorm": True},
    "memory_plus": MEMORY | {"placement": (0, 1), "qk_norm": True},
    "peer": MEMORY,
    "peer frozen": MEMORY | {"control": "frozen"},
    "memory_plus shuffled": MEMORY | {"control": "shuffled", "placement": (0, 1)},
    "ultramem_v2": MEMORY | {"value_dim": 8, "k_dim": 8},
    "ngram_embedding": {"table_rows": 41, "order_tables": 2},
    "token_table stem": {"form": "stem"},
    "token_table tails": {"form": "per_layer_embedding", "row_width": 8},
    "token_table values": {"form": "value_embedding"},
    # The signed root magnifies rounding near zero: with it, weights of one process differ by 2e-9 after 20 steps when
    # micro-batches change the order of sums; with a sigmoid, by 1e-15.
    "engram": {"head_rows": 30, "hash_heads": 2, "placement": (0, 1), "zero_kernel": False, "gate": "sigmoid"},
    "engram_moe": {
        "head_rows": 30,
        "hash_heads": 2,
        "placement": (0, 1),
        "gate": "sigmoid",
        "experts": 4,
        "top_k": 2,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "memory_plus large": MEMORY | {"half_keys": 260, "placement": (0, 1)},
    "pkm sparse": {"half_keys": 160, "top_k": 2, "memory_heads": 2},
    "pkm tiny": {"half_keys": 24, "top_k": 2, "memory_heads": 1},
    "moe_topk odd": {"experts": 3, "top_k": 2},
    "dense tied": {"tie_embeddings": True},
}
"""Tables of which a step reads few rows, so that steps are replayed; experts that two processes do not divide; a matrix
with two gradients."""
WITH_MEMORY = [case for case in FAMILIES if case.split()[0] not in ("dense", "moe", "moe_topk")]


@dataclass(frozen=True)
class Job:
    """A cell to train in a folder until step `stop_at`, at which rank `stopping_rank` requests a stop; 0: to the end.

    With `score`, the trained run is scored instead. `baseline` is the file of an external family. `logits_at_once`
    replaces the number of logits that exist at the same time; 0: the default.
    """

    cell: dict[str, Any]
    folder: str
    memory_parallel: int = 1
    checkpoint_activations: bool = False
    stop_at: int = 0
    stopping_rank: int = 0
    dtype: str = "float64"
    score: bool = False
    baseline: str = ""
    logits_at_once: int = 0


def cell_of(case: str, steps: int, rows: int = 8, seq_len: int = 64, **train: Any) -> Cell:
    """Return a cell of a few narrow layers that takes `steps` steps."""
    options = {**FAMILIES, **OTHERS}[case]
    fields = {
        "batch_rows": rows,
        "tokens": steps * rows * seq_len,
        "lr": 5e-3,
        "warmup": 3,
        "clip": 0.5,
        "log_every": 1,
        "checkpoint_every": 1000,
        **train,
    }
    return Cell.model_validate(
        {
            "model": {"family": case.split()[0], **TINY, **options},
            "data": {"kind": "bios", "people": 40, "questions": 0.5, "seq_len": seq_len},
            "train": fields,
        }
    )


def job(cell: Cell, folder: Path, **options: Any) -> Job:
    """Return a job that trains the cell in the folder."""
    return Job(cell.model_dump(mode="json"), str(folder), **options)


def run_jobs(jobs: list[Job], cache: Path, processes: int, scratch: Path, **variables: str) -> None:
    """Run the jobs in `processes` processes (0: in one process without a process group) with these variables set."""
    path = scratch / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        [*launch, __file__, str(path), str(cache)], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]


def main(jobs: list[Job], cache: Path) -> None:
    import torch

    from suite.launch.scorer import Scorer
    from suite.launch.scoring import score_missing
    from suite.models import head_loss
    from suite.records import RunDir
    from suite.train.loop import Trainer
    from suite.train.parallel import Parallel, World, process_group

    at_once = head_loss.LOGITS_AT_ONCE
    with process_group() as processes:
        for job in jobs:
            head_loss.LOGITS_AT_ONCE = job.logits_at_once or at_once
            torch.set_default_dtype(getattr(torch, job.dtype))
            if job.baseline:
                loading.load(Path(job.baseline))
            parallel = Parallel(memory_parallel=job.memory_parallel, checkpoint_activations=job.checkpoint_activations)
            world = World(processes.rank, processes.size, parallel, processes.distributed, processes.device)
            cell, run = Cell.model_validate(job.cell), RunDir(Path(job.folder))
            run.path.mkdir(parents=True, exist_ok=True)
            world.wait()
            if job.score:
                score_missing(run, cell, prepare(cell.data, cache), Scorer(), world)
                continue
            trainer = Trainer(cell, prepare(cell.data, cache), run, world)
            outcome = trainer.run_to_end(
                lambda: 0 < job.stop_at <= trainer.step and world.rank == job.stopping_rank  # noqa: B023
            )
            assert outcome == ("interrupted" if job.stop_at else "done")
            if world.distributed:
                assert_replicas_are_equal(trainer.model)
            if cell.train.compile:
                assert_compiled_whole()


def assert_replicas_are_equal(model: Transformer) -> None:
    """Processes that hold the same columns of a table hold the same values, bit for bit."""
    import torch.distributed as dist

    for table in model.memory_tables():
        for reduce in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            extreme = table.weight.detach().clone()
            dist.all_reduce(extreme, reduce, group=table.replicas)
            assert extreme.equal(table.weight)


def assert_compiled_whole() -> None:
    """Something was compiled in this process, and no graph was broken."""
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    counters.clear()


if __name__ == "__main__":
    main([Job(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2]))
