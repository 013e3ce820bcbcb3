"""One training step of rank 0 of a planned mesh, on fake tensors: the bytes it holds and sends.

    python -m suite.plan.dry_run.rank_zero < request.json > measurements.json

The model is built, sharded and trained by the code that trains real ones.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from suite.plan.dry_run import cuda_guard

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Measurements:
    """What rank 0 holds and sends in one step, in bytes.

    Attributes:
        weights: Its parameters, tables included.
        even_weights: All parameters outside tables, divided evenly among all processes, and its columns of tables.
        state: Weights and optimizer state before the step.
        peak: The most that is allocated at any time.
        pass_weights: All parameters outside tables, in the dtypes in which they are gathered.
        sent: Bytes that it sends, by kind of collective.
        calls: Collectives, by kind.
        cpu_s: CPU seconds of the measurement.
    """

    weights: int
    even_weights: float
    state: int
    peak: int
    pass_weights: int
    sent: dict[str, int]
    calls: dict[str, int]
    cpu_s: float


def measure(request: dict[str, Any]) -> Measurements:
    """Build the model of a request and take a step; see `report.request`."""
    import torch

    from suite.cells import Cell
    from suite.models.document_attention import Documents
    from suite.models.usage import Reads
    from suite.plan.dry_run.fake_gpu import DEVICE, install, recording
    from suite.train.optim import Optimizer
    from suite.train.parallel import Parallel, World
    from suite.train.sharding import build_sharded, sum_statistics

    cell, gpus, rows = Cell.model_validate(request["cell"]), request["gpus"], request["micro_rows"]
    install(gpus, request["capability"])
    shape, precision = (rows, cell.data.seq_len), cell.train.precision
    world = World(0, gpus, Parallel(memory_parallel=request["table_shards"]), True, DEVICE)
    with recording() as (recorder, live):
        model = build_sharded(cell.model, request["vocabulary"], cell.seed, world, precision, fresh=())
        optimizer, reads = Optimizer(model, cell.train), Reads(model)
        optimizer.state()
        weights = sum(_local_bytes(parameter) for parameter in model.parameters())
        state = live.bytes
        tokens_BT = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        documents = Documents(torch.zeros(64, dtype=torch.int32, device=DEVICE), cell.data.seq_len)
        model.train()
        reads.start()
        recorder.traffic.sent.clear()
        recorder.traffic.calls.clear()
        for _ in range(request["accumulate"]):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                loss = model.loss(model.hidden(tokens_BT, torch.zeros_like(tokens_BT), documents=documents), tokens_BT)
            for weight, value in model.auxiliary_losses().values():
                loss = loss + weight * value
            loss.backward()
        optimizer.set_lr(1.0)
        optimizer.step()
        sum_statistics(model, world)
        model.after_step()
        peak = live.peak
    tables = {id(table.weight) for table in model.memory_tables()}
    even = sum(parameter.nbytes / (1 if id(parameter) in tables else gpus) for parameter in model.parameters())
    traffic = recorder.traffic
    return Measurements(
        weights,
        even,
        state,
        peak,
        _pass_weights(model, precision),
        dict(traffic.sent),
        dict(traffic.calls),
        time.process_time(),
    )


def _local_bytes(parameter: nn.Parameter) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.nbytes)


def _pass_weights(model: Any, precision: str) -> int:
    """Return the bytes of the weights outside tables as a pass gathers them."""
    from suite.models.precision import holds_matrices_only

    tables = {id(table.weight) for table in model.memory_tables()}
    narrow = {
        id(parameter)
        for layer in model.layers
        for module in layer.modules()
        if precision == "bf16" and holds_matrices_only(module)
        for parameter in module.parameters()
    }
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    return sum(parameter.numel() * (2 if id(parameter) in narrow else 4) for parameter in parameters)


if __name__ == "__main__":
    cuda_guard.load()
    json.dump(asdict(measure(json.load(sys.stdin))), sys.stdout)
