"""A sweep on several GPUs of one machine: a cell that needs more than one is trained by a process for each."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from event_log import EventLog
from sweep_processes import TINY, suite
from tiny_cells import tiny_cell

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch import local
from suite.launch.checks.memory import Launch, MemoryCheck
from suite.launch.executor import Options
from suite.launch.local import LocalExecutor, visible_gpus
from suite.launch.preparation import prepare
from suite.launch.scorer import Scorer
from suite.launch.slurm.executor import SlurmExecutor
from suite.launch.sweep import Sweep
from suite.launch.worker import run_cell
from suite.plan import plan as planning
from suite.plan.gpus import Gpu
from suite.records import run_dir
from suite.train.parallel import Parallel


class Divided(MemoryCheck):
    """Memory of which a cell needs that of as many GPUs as its seed states."""

    def __init__(self) -> None:
        super().__init__(float("inf"), "this machine")

    def launch(self, cell: Cell) -> Launch:
        return Launch(cell.seed, Parallel(memory_parallel=cell.seed))


def grid_of(*cells: Cell, folder: Path) -> Grid:
    path = folder / "grid.yaml"
    path.touch()
    return Grid("grid", path, cells)


def losses(results: Path, cell: Cell) -> list[float]:
    return [line["loss"] for line in run_dir(results, cell).train_lines() if "loss" in line]


def test_two_processes_of_a_sweep_train_a_cell_with_the_losses_of_one(tmp_path: Path) -> None:
    cell, results, log = tiny_cell("memory_plus", seed=2, epochs=0.5), tmp_path / "results", EventLog()
    grid = grid_of(cell, folder=tmp_path)
    executor = LocalExecutor(grid, results, Scorer(), 2, ("0", "1"), log.event, Divided())
    (status,) = Sweep(grid, results, executor, log).run()
    assert status.state == "done", status.cause
    assert f"started: {cell.run_name} in 2 processes" in log.events
    (output,) = run_dir(results, cell).path.glob("logs/*/*.out")
    assert run_dir(results, cell).state()["log"] == str(output.resolve())
    assert run_cell(prepare(tmp_path / "alone", cell).path) == "done"
    assert losses(results, cell) == pytest.approx(losses(tmp_path / "alone", cell), rel=2e-3)


class Sleeping(LocalExecutor):
    """Its processes do nothing until they end."""

    def _start(self, cell: Cell, launch: Launch, devices: Sequence[str]) -> local._Job:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        processes = [subprocess.Popen(command) for _ in range(launch.processes)]
        return local._Job(processes, devices, run_dir(self.results, cell).path)


def end(executor: LocalExecutor, cell: Cell) -> None:
    for process in executor._jobs[cell.run_name].processes:
        process.kill()
        process.wait()


def test_cells_start_in_order_as_their_gpus_become_free(tmp_path: Path) -> None:
    cells = [tiny_cell(seed=seed) for seed in (1, 2, 3, 4)]  # as many GPUs as the seed states
    executor = Sleeping(grid_of(*cells, folder=tmp_path), tmp_path, Scorer(), 4, "abcd", memory=Divided())
    one, two, three, four = cells
    try:
        assert executor.room() == 4
        executor.submit(cells)
        assert [job.devices for job in executor._jobs.values()] == [["a"], ["b", "c"]]
        assert executor.room() == 0
        end(executor, one)
        assert list(executor.poll(cells)) == [one.run_name]
        assert list(executor._jobs) == [two.run_name], "the third needs three, and two are free"
        end(executor, two)
        executor.poll(cells)
        assert executor._jobs[three.run_name].devices == ["a", "b", "c"]
        executor.cancel()
        assert executor.poll([three, four])[four.run_name].max_starts is None
    finally:
        executor.cancel(at_once=True)


def test_cells_share_gpus_only_if_more_are_requested_at_once(tmp_path: Path) -> None:
    cells = [tiny_cell(seed=1, batch_rows=rows) for rows in (4, 8, 16)]
    executor = Sleeping(grid_of(*cells, folder=tmp_path), tmp_path, Scorer(), 3, "ab", memory=Divided())
    try:
        executor.submit(cells)
        assert [job.devices for job in executor._jobs.values()] == [["a"], ["b"], ["a"]]
    finally:
        executor.cancel(at_once=True)


def test_the_processes_of_a_cell_end_with_the_first_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = ("import sys; sys.exit(3)", "import time; time.sleep(600)")
    job = local._Job([subprocess.Popen([sys.executable, "-c", text]) for text in commands], "ab", Path())
    job.processes[0].wait()
    assert job.poll() is None, "the other process may be about to record the failure"
    monkeypatch.setattr(local, "PEERS_S", 0.0)
    deadline = time.monotonic() + 60
    while (code := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert code == 3


def test_a_cell_gets_the_mesh_of_its_plan_if_one_gpu_is_too_small(tmp_path: Path) -> None:
    cell = tiny_cell("memory_plus", batch_rows=8)
    cell = cell.model_copy(update={"model": cell.model.model_copy(update={"half_keys": 128})})
    needed = MemoryCheck(float("inf"), "a GPU").needed(cell)
    assert needed is not None
    limit = 0.8 * needed
    grid = grid_of(cell, folder=tmp_path)
    (planned,) = planning.plan(grid, planning.Assumptions(Gpu("a GPU", limit, 1, 1, 1, 1, per_node=4), 1), tmp_path)
    assert planned.mesh is not None
    check = MemoryCheck(limit, "a GPU", gpus=4)
    assert check.problem(cell) is None
    launch = check.launch(cell)
    assert (launch.processes, launch.parallel.memory_parallel) == (planned.mesh.gpus, planned.mesh.table_shards)
    assert launch.parallel.accumulate == planned.mesh.accumulate
    assert MemoryCheck(1.1 * needed, "a GPU", gpus=4).launch(cell) == Launch()
    assert "does not fit on 4 GPUs" in str(MemoryCheck(1e3, "a GPU", gpus=4).problem(cell))
    assert "needs about" in str(MemoryCheck(limit, "a GPU").problem(cell))


def test_gpus_are_named_as_the_environment_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8932f937")
    assert visible_gpus() == ["5", "GPU-8932f937"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_gpus_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    grid = tmp_path / "tiny.yaml"
    grid.write_text(TINY)
    refused = suite("sweep", grid, "--gpus", "2", "--results", tmp_path / "results", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--gpus: got 2, allowed: a machine with GPUs" in refused.stderr
    with pytest.raises(UserError, match="--gpus: applies to --executor local"):
        SlurmExecutor.create(Options(grid_of(folder=tmp_path), tmp_path, Scorer(), gpus=2))
