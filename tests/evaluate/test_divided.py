"""Scoring divided over several processes gives the scores of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from naive_scoring import sharpened

from suite import models
from suite.cells import EvalConfig
from suite.data.corpus import Corpus
from suite.evaluate.harness import evaluate
from suite.models import registry

PROGRAM = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from naive_scoring import sharpened
from suite import models
from suite.data.corpus import prepare
from suite.cells import EvalConfig
from suite.data.sources.bios import BiosData
from suite.evaluate.harness import evaluate
from suite.models import registry
from suite.train.parallel import Parallel, World
from suite.train.sharding import build_sharded
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
corpus = prepare(BiosData(**json.loads({data!r})), folder / f"cache-{{rank}}")
config = registry.family("memory_plus").config(**json.loads({model!r}))
if {sharded}:
    world = World(rank, 2, Parallel(memory_parallel=2), distributed=True, device=torch.device("cpu"))
    model = build_sharded(config, corpus.vocab_size, 0, world, "fp32")
else:
    model = models.build(config, corpus.vocab_size, 0)
scores = evaluate(sharpened(model), corpus, EvalConfig(tasks={tasks!r}, limit=15))
(folder / f"scores-{{rank}}.json").write_text(json.dumps(scores))
torch.distributed.destroy_process_group()
"""
TASKS = ("bios_storage", "bios_qa", "bios_choice")


MODEL = {"family": "memory_plus", "base": "w32", "half_keys": 16, "top_k": 4}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated model", "sharded model"])
def test_two_processes_give_the_scores_of_one(sharded: bool, bios: Corpus, tmp_path: Path) -> None:
    program = PROGRAM.format(
        tests=str(Path(__file__).parents[1] / "helpers"),
        data=bios.config.model_dump_json(),
        model=json.dumps(MODEL),
        sharded=sharded,
        tasks=TASKS,
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    whole = sharpened(models.build(registry.family("memory_plus").config(**MODEL), bios.vocab_size, 0))
    alone = json.loads(json.dumps(evaluate(whole, bios, EvalConfig(tasks=TASKS, limit=15))))
    for rank in range(2):
        together = json.loads((tmp_path / f"scores-{rank}.json").read_text())
        for name, task in alone["tasks"].items():
            shared = together["tasks"][name]
            assert {key: shared[key] for key in task if key != "metrics"} == {
                key: task[key] for key in task if key != "metrics"
            }
            for metric, value in task["metrics"].items():
                assert shared["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-5)
