"""A training step on a GPU launches few kernels, waits for none, and passes nothing that CUDA would refuse.

The GPU is simulated (tests/helpers/simulated_cuda.py) in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from suite.models import registry

MEMORY = {"half_keys": 8, "top_k": 2, "memory_heads": 1, "tie_embeddings": False}
"""A step reads most rows: their gradients are a buffer of the whole table, and the update is a sweep."""
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "dense": ({"model": {"family": "dense", "tie_embeddings": False}}, 409),
    "moe": ({"model": {"family": "moe", "tie_embeddings": False}}, 553),
    "moe_topk": ({"model": {"family": "moe_topk", "tie_embeddings": False}}, 601),
    "pkm": ({"model": {"family": "pkm", **MEMORY}}, 532),
    "peer": ({"model": {"family": "peer", **MEMORY}}, 607),
    "memory_plus": ({"model": {"family": "memory_plus", **MEMORY}}, 786),
    "memory_plus, dense optimizer": (
        {"model": {"family": "memory_plus", **MEMORY}, "train": {"table_optimizer": "dense"}},
        694,
    ),
    "memory_plus, few rows read": ({"model": {"family": "memory_plus", **MEMORY, "half_keys": 100}}, 831),
    "ngram_embedding": ({"model": {"family": "ngram_embedding", "table_rows": 1001, "order_tables": 2}}, 482),
    "ultramem_v2": ({"model": {"family": "ultramem_v2", "half_keys": 32, "top_k": 2}}, 1321),
    "engram": ({"model": {"family": "engram", "head_rows": 1000, "hash_heads": 2}}, 741),
    "engram_moe": ({"model": {"family": "engram_moe", "head_rows": 1000, "hash_heads": 2}}, 933),
    "token_table": ({"model": {"family": "token_table"}}, 472),
}
"""Cases, and the launches of their steps when each layer cast its own weights and read its own counts.

`token_table` came when counts were no longer read by the host; its number is of that time, and lower by those reads.
`engram_moe` came later, too: its step launches what `engram` and `moe_topk` add to `dense`, then 741 + 601 - 409.
"""


def trained(kind: str = "rows", **options: Any) -> dict[str, Any]:
    """Return settings that train a part of a model; rows by TF-IDF unless `options` say otherwise."""
    return {"init_from": "parent", "trainable": {"kind": kind, **options}}


SGD = {"table_optimizer": "sgd", "value_lr": 1.0}
LAZY, FP32 = {"value_lazy": True}, {"precision": "fp32"}
SEPARATE = {**MEMORY, "share": False}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "dense fp32": ({"model": {"family": "dense", "tie_embeddings": False}, "train": FP32}, 259),
    "dense fp32, grouped heads": (
        {"model": {"family": "dense", "tie_embeddings": False, "kv_heads": 1}, "train": FP32},
        275,
    ),
    "moe_topk fp32": ({"model": {"family": "moe_topk", "router": "softmax"}, "train": FP32}, 613),
    "sgd": ({"model": {"family": "memory_plus", **SEPARATE}, "train": SGD}, 501),
    "sgd, few rows read": ({"model": {"family": "memory_plus", **SEPARATE, "half_keys": 100}, "train": SGD}, 501),
    "muon": ({"model": {"family": "memory_plus", **MEMORY}, "train": {"matrix_optimizer": "muon"}}, 1127),
    "muon, stacks": ({"model": {"family": "moe_topk"}, "train": {"matrix_optimizer": "muon"}}, 5222),
    "lora": ({"model": {"family": "memory_plus", **MEMORY}, "train": trained(kind="lora", rank=2)}, 853),
    "rows, sgd": ({"model": {"family": "memory_plus", **MEMORY}, "train": SGD | trained(top=3, score="random")}, 413),
    "rows by tfidf": ({"model": {"family": "memory_plus", **MEMORY}, "train": LAZY | trained(top=3)}, 395),
    "experts by tfidf": ({"model": {"family": "moe_topk"}, "train": LAZY | trained(top=1)}, 862),
    "dense, rarely logged": ({"model": {"family": "dense", "tie_embeddings": False}, "train": {"log_every": 50}}, 230),
    "pkm, two layers": ({"model": {"family": "pkm", **MEMORY, "placement": [1, 3]}}, 320),
    "memory_plus, eight layers": (
        {"model": {"family": "memory_plus", **MEMORY, "layers": 8, "placement": [0, 2, 4, 6]}},
        702,
    ),
    "moe_topk, eight layers": ({"model": {"family": "moe_topk", "layers": 8}}, 838),
    "rows, few rows read": (
        {"model": {"family": "memory_plus", **SEPARATE, "half_keys": 100}, "train": LAZY | trained(top=3, score="tf")},
        441,
    ),
}
"""Cases that did not exist then, or whose weights were not cast, and the launches that were counted when they came."""
MAX_WAITS = 2
IN_HOST_MEMORY = {
    "pkm": 1,
    "peer": 1,
    "memory_plus": 3,
    "ultramem_v2": 4,
    "ngram_embedding": 1,
    "engram": 2,
    "token_table": 3,
}
"""Cases that run with tables in host memory, too, and how often a step reads tables at other rows than before."""


def count(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the loss, the launches and the waits of a step of each case, counted in one process."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler for the guard of the simulated device")
    helpers = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, "-W", "ignore", "count_launches.py", str(folder), json.dumps(cases)]
    done = subprocess.run(command, cwd=helpers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return count({name: case for name, (case, _) in CASES.items()}, tmp_path_factory.mktemp("waits"))


@pytest.fixture(scope="module")
def other_counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return count({name: case for name, (case, _) in OTHERS.items()}, tmp_path_factory.mktemp("waits"))


@pytest.fixture(scope="module")
def host_counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    host = {name: CASES[name][0] | {"train": {"table_device": "host"}} for name in IN_HOST_MEMORY}
    return count(host, tmp_path_factory.mktemp("waits"))


def waits(counted: dict[str, Any]) -> int:
    return sum(times for *_, times in counted["waits"])


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_at_most_twice_and_launches_two_thirds_of_what_it_did(name: str, counts: dict[str, Any]) -> None:
    assert waits(counts[name]) <= MAX_WAITS, counts[name]["waits"]
    assert counts[name]["launches"] <= CASES[name][1] * 2 / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_waits_at_most_twice_and_launches_no_more_than_when_it_was_counted(
    name: str, other_counts: dict[str, Any]
) -> None:
    assert waits(other_counts[name]) <= MAX_WAITS, other_counts[name]["waits"]
    assert other_counts[name]["launches"] <= OTHERS[name][1]


def test_every_family_is_counted() -> None:
    counted = {case["model"]["family"] for case, _ in CASES.values()}
    assert counted == set(registry.families())


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_HOST_MEMORY)
def test_tables_in_host_memory_give_the_same_loss_and_wait_once_a_read_and_once_for_gradients(
    name: str, counts: dict[str, Any], host_counts: dict[str, Any]
) -> None:
    # The simulated device raises if an operation uses a table in host memory together with a tensor of its own, and a
    # gradient that is used before the host has waited for it is NaN.
    host = host_counts[name]
    assert host["loss"] == counts[name]["loss"]
    assert waits(host) - waits(counts[name]) == IN_HOST_MEMORY[name] + 1, host["waits"]
