"""Local sweeps: a failing cell does not affect others, nothing runs twice, and runs are resumed or refused."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from event_log import EventLog
from sweep_processes import TINY, records, runs_of, start_sweep, state_of, suite
from times import TIMES

from suite.cells import EvalConfig
from suite.errors import UserError
from suite.grids import load_grid
from suite.launch.local import LocalExecutor
from suite.launch.preparation import archive_stale, prepare, refuse_stale
from suite.launch.scorer import Scorer
from suite.launch.scoring import evaluate_run
from suite.launch.status import cell_status
from suite.launch.sweep import Sweep
from suite.launch.worker import describe, run_cell
from suite.records import RunDir

FAST = TINY.replace("  evaluate: [{tasks: [bios_storage], limit: 20}]\n", "").replace("epochs: 8", "epochs: 2")
DENSE = FAST.replace("[dense, memory_plus]", "[dense]")


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def test_a_failing_cell_is_named_with_its_cause_and_the_others_finish(tmp_path: Path) -> None:
    # Rows too short for the longest document: this is known only when the data is prepared, so only this cell fails.
    text = FAST + "  - axes: {model.family: [dense], data.seq_len: [9]}\n"
    grid, results = write(tmp_path, text), tmp_path / "results"
    done = suite("sweep", grid, "--results", results, "--json", "--no-report", cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [cell["state"] for cell in document["cells"]] == ["done", "done", "failed"]
    failed = document["cells"][2]
    assert "data.seq_len: got 9" in failed["cause"]
    assert failed["run"] in done.stderr
    assert failed["cause"] in done.stderr
    assert Path(failed["log"]).is_file()
    assert "Traceback" not in done.stderr
    before = records(results)
    again = suite("sweep", grid, "--results", results, "--json", "--no-report", cwd=tmp_path)
    assert again.returncode == 1
    assert "started: " not in again.stderr
    assert records(results) == before


def test_two_concurrent_sweeps_train_every_run_once(tmp_path: Path) -> None:
    grid, results = write(tmp_path, FAST), tmp_path / "results"
    first, second = start_sweep(grid, results), start_sweep(grid, results)
    assert (first.wait(timeout=300), second.wait(timeout=300)) == (0, 0)
    for run in runs_of(results):
        logs = [log.read_text() for log in run.path.glob("logs/*/*.out")]
        assert sum("training from step 0" in log for log in logs) == 1
        steps = [line["step"] for line in run.train_lines() if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        assert state_of(run) == "done"


def test_a_killed_worker_is_started_again(tmp_path: Path) -> None:
    grid, results = write(tmp_path, DENSE.replace("epochs: 2", "epochs: 30")), tmp_path / "results"
    sweep = start_sweep(grid, results)
    deadline = time.monotonic() + 120
    while not any(run.train_lines() for run in runs_of(results)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (run,) = runs_of(results)
    os.kill(run.state()["pid"], signal.SIGKILL)
    assert sweep.wait(timeout=300) == 0
    assert "interrupted: " + run.name in (tmp_path / "sweep.log").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grid of one cell and the results where it is done."""
    folder = tmp_path_factory.mktemp("finished")
    grid = write(folder, DENSE)
    run = prepare(folder / "results", load_grid(str(grid)).cells[0])
    assert run_cell(run.path) == "done"
    return grid, folder / "results"


def test_a_cell_in_two_grids_is_trained_once_and_a_new_evaluation_retrains_nothing(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, results = finished
    (run,) = runs_of(results)
    lines, record = run.train_path.read_bytes(), run.read_record()
    other = write(tmp_path, DENSE.replace("families:", "  evaluate: [{tasks: [bios_storage], limit: 5}]\nfamilies:"))
    grid = load_grid(str(other))
    assert cell_status(results, grid.cells[0]).state == "pending"
    listener = EventLog()
    (status,) = Sweep(grid, results, LocalExecutor(grid, results, Scorer(), slots=1), listener).run()
    assert status.state == "done"
    assert status.run == run.name
    assert run.train_path.read_bytes() == lines
    assert run.has_eval(grid.cells[0].evaluate[0].hash8)
    evaluations = record["cell"].pop("evaluate")
    new_record = run.read_record()
    assert new_record["cell"].pop("evaluate") != evaluations
    assert new_record == record


def test_a_damaged_last_checkpoint_is_trained_again_before_new_scores(tmp_path: Path) -> None:
    grid = load_grid(str(write(tmp_path, DENSE)))
    run = prepare(tmp_path, grid.cells[0])
    assert run_cell(run.path) == "done"
    lines = [line | dict.fromkeys(TIMES, 0) for line in run.train_lines()]
    last = max(run.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    weights = (last / "state.pt").read_bytes()
    (last / "state.pt").write_bytes(weights[: len(weights) // 2])
    evaluation = EvalConfig(tasks=("bios_storage",), limit=5)
    with pytest.raises(UserError, match=r"the checkpoint of the last step, \d+, is damaged or missing; suite train"):
        evaluate_run(run.path, (evaluation,), Scorer())
    assert not run.has_eval(evaluation.hash8)
    prepare(tmp_path, grid.cells[0].with_evaluations((evaluation,)))
    assert run_cell(run.path) == "done"
    assert run.read_eval(run.path / "eval" / f"{evaluation.hash8}.json")["step"] == lines[-1]["step"]
    assert [line | dict.fromkeys(TIMES, 0) for line in run.train_lines()] == lines
    state, whole = (torch.load(path, weights_only=True) for path in (last / "state.pt", io.BytesIO(weights)))
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=0, atol=0)


def test_a_run_made_by_other_code_is_refused_and_archived_on_request(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    grid, _ = finished
    cells = load_grid(str(grid)).cells
    run = prepare(tmp_path, cells[0])
    assert run_cell(run.path) == "done"
    run.write_cell(cells[0], account={}, versions={"code": "0123456789ab"})
    refused = suite("sweep", grid, "--results", tmp_path, "--no-report", cwd=tmp_path)
    assert refused.returncode == 2
    assert "made by code 0123456789ab" in refused.stderr
    assert "--rerun-stale" in refused.stderr
    assert cell_status(tmp_path, cells[0]).note.startswith("stale")  # type: ignore[union-attr]
    (archived,) = archive_stale(tmp_path, cells)
    assert archived.parent == tmp_path / "stale"
    refuse_stale(tmp_path, cells)
    assert not run.path.exists()


def test_an_interrupted_run_is_pending_and_a_locked_one_is_running(tmp_path: Path) -> None:
    cell = load_grid(str(write(tmp_path, DENSE))).cells[0]
    run = prepare(tmp_path, cell)
    run.set_state("running", progress=0.25)
    interrupted = cell_status(tmp_path, cell)
    assert (interrupted.state, interrupted.progress) == ("pending", 0.25)
    assert "interrupted" in str(interrupted.note)
    with run.lock():
        assert cell_status(tmp_path, cell).state == "running"
        assert run_cell(run.path) == "locked"
    run.set_state("failed", cause="ValueError: no")
    assert cell_status(tmp_path, cell).cause == "ValueError: no"
    assert run_cell(run.path) == "failed"


def test_the_status_of_a_missing_run_is_pending_and_creates_no_files(tmp_path: Path) -> None:
    cell = load_grid(str(write(tmp_path, DENSE))).cells[0]
    status = cell_status(tmp_path / "results", cell)
    assert (status.state, status.progress, status.cause) == ("pending", 0.0, None)
    assert not (tmp_path / "results").exists()
    assert RunDir(tmp_path / "results" / "runs" / cell.run_name).name == status.run


def test_a_cause_is_the_type_and_first_line_of_the_error() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA ...\n")
    assert describe(error) == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert describe(KeyError()) == "KeyError"
