"""Prints the launches and host waits of a training step on a simulated GPU, as JSON by case.

python count_launches.py FOLDER '{"case": {"model": {...}, "train": {...}}}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import simulated_cuda
import torch
from simulated_cuda import Device

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.records import RunDir
from suite.train.loop import Trainer
from suite.train.parallel import World

simulated_cuda.install()


def counted(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train two steps, the first of which fills caches, and return what the second did."""
    train = {"batch_rows": 1, "epochs": 2.0, "lr": 1e-3, "precision": "bf16", "log_every": 1, **case.get("train", {})}
    data = {"kind": "bios", "people": 20, "seq_len": 16}
    cell = Cell.model_validate({"model": {"base": "w32", **case["model"]}, "data": data, "train": train})
    folder.mkdir()
    with Device() as device:
        trainer = Trainer(
            cell, prepare(cell.data, folder.parent / "corpora"), RunDir(folder), World(device=simulated_cuda.CUDA)
        )
        trainer.train_step()
        device.clear()
        loss = trainer.train_step()["loss"]
        counts = {
            "launches": sum(device.launches.values()),
            "waits": [[*key, times] for key, times in device.waits.items()],
        }
        if cell.model.kv_heads is not None:
            _evaluate(trainer)
    return {"loss": loss, **counts}


@torch.no_grad()
def _evaluate(trainer: Trainer) -> None:
    """Read rows as an evaluation in fp32 does, without a mask."""
    tokens_BT = torch.zeros(2, 16, dtype=torch.int64).to(simulated_cuda.CUDA)
    assert trainer.model.eval().hidden(tokens_BT).isfinite().all()


if __name__ == "__main__":
    root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: counted(case, root / str(number)) for number, (name, case) in enumerate(cases.items())}))
