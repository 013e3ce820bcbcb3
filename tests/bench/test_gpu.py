"""The script for one GPU: its rehearsal runs every part on a CPU and writes a file for each."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from suite.bench import gpu
from suite.models import registry

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *options: str, before: str = "") -> str:
    """Rehearse in a process of its own, since triton is imported for the interpreter there."""
    program = f"import sys\n{before}\nfrom suite.bench.gpu import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", program, "--rehearse", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(out)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_rehearsal_writes_a_file_of_every_part(tmp_path: Path) -> None:
    out = rehearse(tmp_path)
    for part in gpu.PARTS:
        with (tmp_path / f"gpu-rehearsal-{part}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows, part
        assert not rows[0].get("note"), (part, rows, out)
        assert all(row.get("correct", "True") == "True" for row in rows), (part, rows)
        if part in ("steps", "large"):
            assert all(int(row["planned_bytes"]) > 0 for row in rows), (part, rows)
        if part == "steps":
            assert {row["family"] for row in rows} == set(registry.families())


def test_parts_without_their_packages_say_so_and_the_others_run(tmp_path: Path) -> None:
    """Without pydantic, models are out of reach and kernels are not."""
    out = rehearse(tmp_path, "--only", "others", "steps", before="sys.modules['pydantic'] = None")
    assert "others: 4 rows" in out
    assert "steps: skipped: not installed: pydantic" in out


def test_a_triton_kernel_of_another_package_is_timed_where_it_is_installed(tmp_path: Path) -> None:
    package = """
    import sys, types
    import torch
    def bags(indices, table, weights):
        return torch.einsum("nsd,ns->nd", table.float()[indices], weights)
    module = types.ModuleType("sparsify.xformers")
    module.embedding_bag_triton = bags
    sys.modules["sparsify.xformers"] = module
    """
    rehearse(tmp_path, "--only", "others", before=textwrap.dedent(package))
    with (tmp_path / "gpu-rehearsal-others.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert float(rows["eai-sparsify (Triton)"]["ms"]) > 0
    assert rows["fbgemm_gpu"]["note"] == "not installed"


def test_no_part_starts_after_the_time(tmp_path: Path) -> None:
    assert "others: not started" in rehearse(tmp_path, "--only", "others", "--minutes", "-1")
