"""The script for one GPU: its rehearsal runs every part on a CPU and writes a file for each."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from suite.bench import gpu, gpu_model_checks
from suite.models import registry

ROOT = Path(__file__).parents[2]


def rehearse(
    out: Path, *options: str, before: str = "", packages: Path | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Rehearse in a process of its own, since triton is imported for the interpreter there.

    Args:
        out: Folder of the files.
        options: Further options of the script.
        before: A program that runs before it.
        packages: A folder with the only packages that are installed; None: all are.
        fails: Whether the script is to fail.
    """
    program = f"import sys\n{before}\nfrom suite.bench.gpu import main\nsys.exit(main(sys.argv[1:]))"
    alone = [] if packages is None else ["-S"]
    command = [sys.executable, *alone, "-W", "ignore", "-c", program, "--rehearse", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(out)}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == int(fails), done.stdout + done.stderr[-2000:]
    return done


def installed_alone(folder: Path, *names: str) -> Path:
    """Fill a folder with links to some installed packages and to those that they require, and return it."""
    required, found = list(names), set()
    while required:
        name = canonicalize_name(required.pop())
        try:
            package = distribution(name)
        except PackageNotFoundError:  # such as what another platform needs
            continue
        if name in found:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in package.requires or ()]
        required += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return folder


def rows_of(folder: Path, part: str) -> list[dict[str, str]]:
    with (folder / f"gpu-rehearsal-{part}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def with_kernels_packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Rehearse where torch, triton and numpy alone are installed; the folder of the files and both outputs."""
    out = tmp_path_factory.mktemp("kernels")
    packages = installed_alone(tmp_path_factory.mktemp("packages"), *gpu.KERNELS_NEED)
    done = rehearse(out, packages=packages, fails=True)
    return out, done.stdout, done.stderr


def test_kernels_parts_need_torch_triton_and_numpy_alone(with_kernels_packages: tuple[Path, str, str]) -> None:
    folder, out, _ = with_kernels_packages
    assert set(gpu.OF_KERNELS) == {"correct", "search", "kernels", "others"}
    for part in gpu.OF_KERNELS:
        rows = rows_of(folder, part)
        assert len(rows) > 1, (part, rows, out)
        assert all(row.get("correct") in (None, "", "True") for row in rows), (part, rows)


def test_other_parts_say_what_they_lack_before_any_part_runs(with_kernels_packages: tuple[Path, str, str]) -> None:
    folder, out, errors = with_kernels_packages
    models = [part for part in gpu.PARTS if part not in gpu.OF_KERNELS]
    lacking = "not installed: pydantic, tokenizers, pyyaml"
    assert errors.strip() == f"gpu: {lacking}; install it to run: {', '.join(models)}"
    for part in models:
        assert rows_of(folder, part) == [{"note": f"not run: {lacking}"}]
        assert f"{part}:" not in out
    notes = [row for row in rows_of(folder, "correct") if row["note"]]
    assert [row["note"] for row in notes] == [f"not run: {lacking}"]


def test_models_parts_alone_end_before_they_start_without_their_packages(tmp_path: Path) -> None:
    """Nothing is imported or written: that takes a moment, not the time of a GPU."""
    absent = "for name in ('torch', 'pydantic'): sys.modules[name] = None"
    done = rehearse(tmp_path, "--only", "steps", "decode", before=absent, fails=True)
    assert done.stderr == "gpu: not installed: torch, pydantic; install it to run: steps, decode\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_models_parts_need_few_packages_more(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    installed_alone(packages, *gpu.KERNELS_NEED, *gpu.MODELS_NEED)
    assert not (packages / "rich").exists()
    models = [part for part in gpu.PARTS if part not in gpu.OF_KERNELS]
    done = rehearse(tmp_path, "--only", *models, packages=packages)
    for part in models:
        rows = rows_of(tmp_path, part)
        assert rows, part
        assert not any(row.get("note") for row in rows), (part, rows, done.stdout)
        assert all(row.get("correct") in (None, "", "True") for row in rows), (part, rows)
        if part in ("steps", "large"):
            assert all(int(row["planned_bytes"]) > 0 for row in rows), (part, rows)
    assert {row["family"] for row in rows_of(tmp_path, "steps")} == set(registry.families())
    graphs = [row for row in rows_of(tmp_path, "compile") if row["compile"] == "True"]
    assert {row["family"] for row in graphs} == {"dense", "memory_plus"}
    for row in graphs:
        assert (int(row["graphs"]) > 0, row["graph_breaks"], row["traced_later"]) == (True, "0", "0")


def test_a_model_that_breaks_its_graphs_is_wrong(tmp_path: Path) -> None:
    breaks = """
    import torch
    from suite.models.transformer import Block
    plain = Block.forward
    def forward(self, *args, **options):
        torch._dynamo.graph_break()
        torch._dynamo.graph_break()
        torch._dynamo.graph_break()
        torch._dynamo.graph_break()
        return plain(self, *args, **options)
    Block.forward = forward
    """
    done = rehearse(tmp_path, "--only", "compile", before=textwrap.dedent(breaks), fails=True)
    assert done.stdout.count("4 graph breaks, allowed: 3") == 2
    rows = rows_of(tmp_path, "compile")
    assert [row["correct"] for row in rows if row["compile"] == "True"] == ["False", "False"]


CHECKS_OF_MODELS = {"attention, mask", "attention, variable length", "experts, in blocks", "experts, grouped"}


def test_a_rehearsal_checks_attention_and_experts_and_names_what_it_leaves_out() -> None:
    rows = list(gpu_model_checks.rows("cpu", rehearsal=True))
    assert {row["operator"] for row in rows} == CHECKS_OF_MODELS
    left_out = {(row["operator"], row["note"]) for row in rows if "correct" not in row}
    assert left_out == {("attention, variable length", "not run: its kernel needs CUDA")}
    assert all(row["correct"] for row in rows if "correct" in row), rows


SIMULATED = """
import json, simulated_cuda
simulated_cuda.install()
from suite.bench import gpu_model_checks
with simulated_cuda.Device():
    print(json.dumps(list(gpu_model_checks.rows("cuda", True))))
"""


def test_checks_that_a_cpu_leaves_out_run_on_a_simulated_gpu() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler for the guard of the simulated device")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", SIMULATED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert not any("note" in row for row in rows)
    assert all(row["correct"] for row in rows), rows
    assert {row["operator"] for row in rows} == CHECKS_OF_MODELS


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
    rows = {row["contender"]: row for row in rows_of(tmp_path, "others")}
    assert float(rows["eai-sparsify (Triton)"]["ms"]) > 0
    assert rows["fbgemm_gpu"]["note"] == "not installed"


def test_no_part_starts_after_the_time(tmp_path: Path) -> None:
    assert "others: not started" in rehearse(tmp_path, "--only", "others", "--minutes", "-1").stdout
