"""Every Triton kernel compiles for A100, H100 and B200 within their limits, without a GPU.

Kernels are compiled by processes of their own: here they are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

MAX_SHARED = 99 << 10
"""Of a block on the devices with the least (sm_86, sm_89)."""
READS_TABLE = ("_bag_kernel", "_dots_kernel", "_select_kernel", "_step_kernel", "_replay_kernel")
"""Kernels whose wide rows must be loaded 16 bytes at a time."""


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
    spilled = row["spill_stores"] + row["spill_loads"]
    assert spilled <= (16 if row["architecture"] == "sm_100" else 0), row
    assert row["shared"] <= MAX_SHARED, row
    assert row["occupancy"] > 0, row
    assert row["basis"] == "predicted"


def test_kernels_of_representative_shapes_compile_within_the_limits_of_all_devices() -> None:
    rows = compiled()
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["kernel"] for row in rows} >= {*READS_TABLE, "_pair_kernel"}
    for row in rows:
        check(row)
        if row["kernel"] in READS_TABLE and "width 2048" in row["shape"]:
            assert row["load_bytes"] == 16, row


@pytest.mark.slow
def test_kernels_of_every_shape_and_option_compile_within_the_limits_of_all_devices() -> None:
    rows = compiled("--all")
    for row in rows:
        check(row)
    assert len(rows) > 1000
