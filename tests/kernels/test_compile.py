"""Every Triton kernel compiles for A100, H100 and B200 within their limits, without a GPU.

Kernels are compiled by processes of their own: here they are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from kernels.bench.launches import calls, pairwise

MAX_SHARED = 99 << 10
"""Of a block on the devices with the least (sm_86, sm_89)."""
READS_ROWS = ("_bag_kernel", "_dots_kernel", "_sums_kernel", "_step_kernel", "_select_kernel")
"""Kernels that load rows in their innermost loop. `_replay_kernel` loads them before its loop over steps."""
CONVERTS = ("_step_kernel", "_replay_kernel")
"""Kernels that turn numbers of steps into floats. A division of integers also turns a float into an integer, F2I."""
WIDE = 256
"""Values of a row from which on every thread loads 16 bytes at a time, in any dtype."""
MAX_VARIANTS = 3
"""Of a kernel over a run: what is compiled in the middle of one stops it for seconds."""


def run(*arguments: str) -> str:
    """What a Python process prints in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(*options: str) -> list[dict[str, Any]]:
    document = json.loads(run("-m", "kernels.bench", "--compile", "--json", *options))
    assert document["failures"] == []
    return document["kernels"]


def check(row: dict[str, Any]) -> None:
    """The limits that every compiled kernel keeps."""
    assert max(row["spill_stores"], row["spill_loads"]) <= (8 if row["architecture"] == "sm_100" else 0), row
    assert row["shared"] <= MAX_SHARED, row
    assert row["occupancy"] > 0, row
    assert not any(name.startswith("F2I") for name in row["conversions"]), row
    assert row["conversions"] == [] or row["kernel"] in CONVERTS, row
    assert row["basis"] == "predicted"


def check_loads(row: dict[str, Any]) -> None:
    """Every thread loads 16 bytes at a time: of wide rows, and of the scores of half keys."""
    width = re.search(r"width (\d+)", row["shape"])
    if width is not None and int(width[1]) >= WIDE:
        assert row["widest_load" if row["kernel"] == "_replay_kernel" else "load_bytes"] == 16, row
    if row["kernel"] == "_select_kernel" and "half keys" in row["shape"]:
        assert row["load_bytes"] == 16, row


def test_triton_kernels_of_every_shape_and_every_option_compile_within_the_limits_of_all_devices() -> None:
    rows = compiled()
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["kernel"] for row in rows} == {*READS_ROWS, "_pair_kernel", "_replay_kernel", "_rotate_kernel"}
    for row in rows:
        check(row)
        check_loads(row)


def test_each_two_settings_are_compiled_together() -> None:
    factors = (range(10), range(4), range(2), range(2), range(2), range(3))
    chosen = pairwise(*factors)
    assert set(chosen) <= set(product(*factors))
    for first, second in combinations(range(len(factors)), 2):
        assert {(row[first], row[second]) for row in chosen} == set(product(factors[first], factors[second]))
    assert len(chosen) < 60 < len(list(product(*factors)))


def test_the_selection_is_a_part_of_all_calls() -> None:
    selected, every = ([(call.shape, call.architecture) for call in calls(every)] for every in (False, True))
    assert set(selected) <= set(every)
    assert len(set(every)) == len(every)


STEPS = """
import json, sys, torch
from kernels.bench.ahead_of_time import capture
from kernels.bench.launches import take_steps
dtype, update = json.loads(sys.argv[1])
with capture(90) as launches:
    take_steps(2000, torch.zeros(40, 16, dtype=getattr(torch, dtype)), update, 500)
print(json.dumps(sorted({(launch.kernel, launch.variant) for launch in launches})))
"""

BATCHES = """
import json, sys, torch
from kernels.bench.ahead_of_time import capture
from kernels.embedding_bag import triton as bags
from kernels.product_key import triton as search
from kernels.rotary import triton as rotary
dtype = getattr(torch, json.loads(sys.argv[1]))
with capture(90) as launches:
    for tokens in (1, 2, 15, 16, 17, 63, 64, 100, 128, 1000):
        q_NM2W, keys_M2nW = torch.zeros(tokens, 2, 2, 8, dtype=dtype), torch.zeros(2, 2, 40, 8)
        search.search(q_NM2W, keys_M2nW, 8)
        indices_NS, weights_NS = torch.arange(tokens * 16).view(tokens, 16) % 30, torch.zeros(tokens, 16)
        table_RD, x_ND = torch.zeros(30, 16, dtype=dtype), torch.zeros(tokens, 16, dtype=dtype)
        bags.bag(table_RD, indices_NS, weights_NS, dtype)
        bags.dots(table_RD, indices_NS, x_ND)
        bags.row_sums(x_ND, weights_NS, bags.group_by_row(indices_NS, 30), torch.float32)
        angle_TI = torch.zeros(tokens, 8)
        rotary.rotate(torch.zeros(1, tokens, 32, dtype=dtype), angle_TI, angle_TI, 1)
print(json.dumps(sorted({(launch.kernel, launch.variant) for launch in launches})))
"""


@pytest.mark.parametrize(
    ("program", "settings"),
    [
        (STEPS, ("bfloat16", {"path": "replay", "low_precision": "stochastic"})),
        (STEPS, ("float32", {"path": "replay", "row_second_moment": True})),
        (STEPS, ("float32", {"path": "sweep"})),
        (BATCHES, "float32"),
        (BATCHES, "bfloat16"),
    ],
)
def test_a_run_compiles_few_variants_of_a_kernel(program: str, settings: object) -> None:
    """Over 2,000 steps with flushes, and over batches of many sizes."""
    variants = Counter(kernel for kernel, _ in json.loads(run("-c", program, json.dumps(settings))))
    assert variants
    assert max(variants.values()) <= MAX_VARIANTS, variants


@pytest.mark.slow
def test_triton_kernels_of_every_combination_compile_within_the_limits_of_all_devices() -> None:
    rows = compiled("--all")
    for row in rows:
        check(row)
        check_loads(row)
    assert len(rows) > 1000


COMPILE_RECORDED = """
import importlib, json, sys
import torch, triton.language as tl
from kernels.bench.ahead_of_time import DEVICES, capture
from kernels.bench.prediction import predict

def argument(value):
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return tl.dtype(value["type"])
    size = 64 // getattr(torch, value["tensor"]).itemsize
    return torch.zeros(size + 1, dtype=getattr(torch, value["tensor"]))[0 if value["aligned"] else 1 :]

rows = {}
for line in open(sys.argv[1]):
    module, kernel, arguments = json.loads(line)
    for architecture in DEVICES:
        with capture(architecture) as launches:
            getattr(importlib.import_module(module), kernel)[(1,)](**{k: argument(v) for k, v in arguments.items()})
        rows[launches[0].variant] = vars(predict(launches[0], line.strip()))
print(json.dumps(list(rows.values())))
"""


def compile_launches_of_tests(selection: str, folder: Path) -> list[dict[str, Any]]:
    """Run the interpreted tests that `selection` names, and compile whatever they launched for all devices."""
    here, recorded = Path(__file__).parent, folder / "launches.json"
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "RECORDED_LAUNCHES": str(recorded), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "record_launches", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", selection, str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return json.loads(run("-c", COMPILE_RECORDED, str(recorded)))


@pytest.mark.slow
def test_whatever_the_tests_of_the_operators_launch_compiles(tmp_path: Path) -> None:
    rows = compile_launches_of_tests("triton", tmp_path)
    for row in rows:
        check(row)
    assert {row["kernel"] for row in rows} == {*READS_ROWS, "_pair_kernel", "_replay_kernel", "_rotate_kernel"}
