"""A record file that cannot be read fails its run by name; the other runs continue, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweep_processes import TINY, records, suite

from suite.errors import UserError
from suite.grids import load_grid
from suite.launch.preparation import prepare
from suite.launch.status import grid_status
from suite.launch.worker import run_cell
from suite.records import DamagedRecord, RunDir, run_dir

GRID = TINY.replace("[dense, memory_plus]", "[dense], seed: [0, 1]").replace("epochs: 8", "epochs: 1")

DAMAGE = {
    "truncated cell.json": ("cell.json", b'{"cell": {"model"'),
    "empty cell.json": ("cell.json", b""),
    "missing cell.json": ("cell.json", None),
    "cell.json without a cell": ("cell.json", b"{}"),
    "truncated state.json": ("state.json", b'{"state": "do'),
    "empty state.json": ("state.json", b""),
    "state.json that is a list": ("state.json", b"[]"),
    "state.json with an unknown state": ("state.json", b'{"state": "dnoe"}'),
    "empty scores": ("eval/*.json", b""),
    "truncated scores": ("eval/*.json", b'{"tasks": {"bios'),
    "binary scores": ("eval/*.json", b"\x80\x81\xff"),
    "binary train.jsonl": ("train.jsonl", b"\x80\x81\xff\n\xfe\xff\n"),
    "truncated usage.json": ("usage.json", b'{"tables": [{'),
    "state.json with a text as progress": ("state.json", b'{"state": "running", "progress": "half"}'),
    "cell.json with a text as versions": ("cell.json", b'{"cell": {}, "versions": "1"}'),
    "scores without metrics": ("eval/*.json", b'{"tasks": {"bios_storage": {}}}'),
    "train.jsonl without a step": ("train.jsonl", b'{"loss": 1.0}\n'),
    "train.jsonl with NaN": ("train.jsonl", b'{"step": 1, "loss": NaN}\n'),
    "deeply nested train.jsonl": ("train.jsonl", 100_000 * b"[" + b"\n"),
    "damaged job record": ("logs/slurm.json", b"{"),
}
CHECKPOINT = {"truncated checkpoint": ("checkpoints/step-*/state.pt", b"PK")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grid of two cells, and the results where both are done."""
    folder = tmp_path_factory.mktemp("finished")
    grid = folder / "tiny.yaml"
    grid.write_text(GRID)
    for cell in load_grid(str(grid)).cells:
        assert run_cell(prepare(folder / "results", cell).path) == "done"
    return grid, folder / "results"


def damage(run: RunDir, pattern: str, content: bytes | None) -> Path:
    """Replace the file that matches `pattern` (None: delete it); returns its path."""
    path = next(run.path.glob(pattern), run.path / pattern)
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(("pattern", "content"), DAMAGE.values(), ids=DAMAGE.keys())
def test_status_names_the_damaged_file_and_shows_the_other_runs(
    finished: tuple[Path, Path], tmp_path: Path, pattern: str, content: bytes | None
) -> None:
    grid, results = load_grid(str(finished[0])), tmp_path / "results"
    shutil.copytree(finished[1], results)
    path = damage(run_dir(results, grid.cells[0]), pattern, content)
    broken, whole = grid_status(results, grid)
    assert (broken.state, whole.state) == ("failed", "done")
    assert str(path) in str(broken.cause)
    assert "\n" not in str(broken.cause)
    assert any(remedy in str(broken.cause) for remedy in ("restore the file", "delete the file"))


@pytest.mark.parametrize("stray", ["._0badcafe.json", "0badcafe copy.json", ".DS_Store"])
def test_files_beside_the_scores_that_are_no_scores_are_left_alone(
    finished: tuple[Path, Path], tmp_path: Path, stray: str
) -> None:
    grid, results = load_grid(str(finished[0])), tmp_path / "results"
    shutil.copytree(finished[1], results)
    run = run_dir(results, grid.cells[0])
    before = run.read_all().evals.keys()
    (run.path / "eval" / stray).write_bytes(b"\x00\x05\x16\x07")
    assert [status.state for status in grid_status(results, grid)] == ["done", "done"]
    assert run.read_all().evals.keys() == before


@pytest.mark.parametrize(
    "name",
    [
        "truncated cell.json",
        pytest.param("empty state.json", marks=pytest.mark.slow),
        pytest.param("binary scores", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_finishes_the_other_cells_and_leaves_the_damaged_run_as_it_is(
    finished: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    grid, results = tmp_path / "tiny.yaml", tmp_path / "results"
    grid.write_text(finished[0].read_text().replace("seed: [0, 1]", "seed: [0, 2]"))
    shutil.copytree(finished[1], results)
    cells = load_grid(str(grid)).cells
    run = run_dir(results, cells[0])
    path = damage(run, *DAMAGE[name])
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    done = suite("sweep", grid, "--results", results, "--json", "--no-report", "--retry-failed", cwd=tmp_path)
    assert done.returncode == 1
    assert [cell["state"] for cell in json.loads(done.stdout)["cells"]] == ["failed", "done"]
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty cell.json", "missing cell.json", "binary train.jsonl"])
def test_the_report_of_a_sweep_names_the_damaged_file(finished: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    results, grid = tmp_path / "results", finished[0]
    shutil.copytree(finished[1], results)
    path = damage(run_dir(results, load_grid(str(grid)).cells[0]), *DAMAGE[name])
    done = suite("sweep", grid, "--results", results, cwd=tmp_path)
    assert done.returncode == 1
    assert "the report failed" not in done.stderr
    assert str(path) in (results / "grids" / "tiny" / "report.md").read_text()


@pytest.mark.parametrize("name", ["truncated state.json", "empty scores", "truncated checkpoint"])
def test_an_evaluation_of_the_grid_scores_the_other_runs(
    finished: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    results, grid = tmp_path / "results", finished[0]
    shutil.copytree(finished[1], results)
    broken, whole = (run_dir(results, cell) for cell in load_grid(str(grid)).cells)
    path = damage(broken, *(DAMAGE | CHECKPOINT)[name])
    options = ("--tasks", "bios_storage", "--limit", "3", "--results", results, "--json")
    done = suite("eval", grid, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert str(broken.path) in done.stderr
    assert path.name in done.stderr
    assert "Traceback" not in done.stderr
    scored = {cell["run"]: {row["n"] for row in cell["scores"]} for cell in json.loads(done.stdout)["cells"]}
    assert 3 not in scored[broken.name]
    assert len(scored[whole.name]) == 2


@pytest.mark.parametrize("name", ["empty state.json", "empty scores"])
def test_a_damaged_file_that_is_deleted_is_made_again(finished: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    results, cell = tmp_path / "results", load_grid(str(finished[0])).cells[0]
    shutil.copytree(finished[1], results)
    expected, run = records(results), run_dir(results, cell)
    path = damage(run, *DAMAGE[name])
    assert run_cell(run.path) == "failed"
    path.unlink()
    assert run_cell(run.path) == "done"
    assert records(results) == expected


def test_lines_that_cannot_be_read_are_refused_rather_than_dropped_on_resume(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.train_path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 3}\n')
    assert run.last_train_line() == {"step": 3}
    with pytest.raises(DamagedRecord, match=r"train\.jsonl"):
        run.cut_train(1)
    assert run.train_path.read_bytes().count(b"\n") == 3


def test_a_cell_of_another_version_is_refused_by_field(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(GRID)
    run = RunDir(tmp_path)
    run.write_cell(load_grid(str(path)).cells[0])
    record = json.loads(run.cell_path.read_text())
    record["cell"]["train"]["momentum"] = 0.9
    run.cell_path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"cell\.json: train\.momentum") as caught:
        run.read_cell()
    assert "\n" not in str(caught.value)
