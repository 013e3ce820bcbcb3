"""Cluster profiles, and how cells become arrays with a limit of concurrent jobs; needs no Slurm."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import load_grid
from suite.launch.scorer import Scorer
from suite.launch.slurm.executor import SlurmExecutor
from suite.launch.slurm.profile import Profile, load_profile, refuse_unfit_launch
from suite.launch.slurm.resources import Shape, scoring_shape, shapes
from suite.launch.slurm.submit import Entry, batches, environment, shares
from suite.records import RunDir

EXAMPLE = Path(__file__).parents[2] / "clusters" / "example.yaml"


def test_the_example_profile_is_valid_and_explains_every_field() -> None:
    assert load_profile(str(EXAMPLE)).time == 24 * 60
    for field in Profile.model_fields:
        assert f"{field}:" in EXAMPLE.read_text()


def test_jobs_with_gpus_run_with_expandable_segments() -> None:
    assert "export PYTORCH_ALLOC_CONF=expandable_segments:True" in environment(Shape(gpus=8))
    assert not [line for line in environment(Shape(gpus=0)) if "ALLOC" in line]


@pytest.mark.parametrize(
    ("time", "minutes"),
    # The formats of sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on.
    [
        ("90", 90),
        ("90:00", 90),
        ("90:30", 91),
        ("2:30:00", 150),
        ("1-00", 1440),
        ("1-6:30", 1830),
        ("2-01:00:30", 2941),
    ],
)
def test_times_are_read_in_every_format_of_slurm(tmp_path: Path, time: str, minutes: int) -> None:
    path = tmp_path / "mine.yaml"
    for written in (time, f'"{time}"'):
        path.write_text(f"time: {written}\n")
        assert load_profile(str(path)).time == minutes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu\n", "partitoin"),
        ("time: soon\n", "time: got 'soon'"),
        ("max_jobs: 0\n", "max_jobs: got 0"),
        ("{time: 1, warning_s: 300}\n", "warning_s: got 300, allowed: less than time, 60 seconds"),
    ],
)
def test_an_invalid_field_is_reported_in_one_line_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_profile_is_used_and_reported_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = r"--profile: .*clusters/default\.yaml, allowed: .*example"
    with pytest.raises(UserError, match=missing):
        load_profile(None)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "default.yaml").write_text("time: 7\n")
    assert load_profile(None).time == 7


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"partitoin": "gpu"}, r"grids/mine\.yaml: launch\.partitoin: unknown field, did you mean partition"),
        ({"time": 30, "gpus": -1}, r"launch\.gpus: got -1"),
    ],
)
def test_a_launch_section_is_checked_without_a_cluster(launch: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_unfit_launch(launch, Path("grids/mine.yaml"))


def test_a_short_time_of_a_launch_section_is_left_to_the_warning_of_the_profile() -> None:
    refuse_unfit_launch({"time": 1, "partition": "gpu"}, Path("grids/mine.yaml"))


def test_the_launch_block_of_a_grid_overrides_the_profile() -> None:
    assert (
        load_profile(str(EXAMPLE), {"gpus": 16, "time": "30"}).model_dump().items() >= {"gpus": 16, "time": 30}.items()
    )


def test_only_models_that_do_not_fit_on_one_gpu_are_scored_as_trained_unless_the_profile_overrides_it(
    tmp_path: Path,
) -> None:
    training = Shape(nodes=8, tasks=8, gpus=8)
    dense, *_, memory = load_grid("paper-8b", need_data=False).cells  # 8e9 and 77e9 weights of 4 bytes, on 80 GB

    def shape(cell: Cell, **overrides: bool) -> Shape:
        return scoring_shape(Profile(gpus_per_node=8, **overrides), cell, training, tmp_path)

    assert shape(dense) == shape(memory, score_together=False) == Shape(gpus=1, cpus=dense.threads)
    assert shape(memory) == shape(dense, score_together=True) == training


def test_a_job_gets_a_share_of_a_nodes_memory_in_proportion_to_its_gpus(tmp_path: Path) -> None:
    grid, profile = load_grid("paper-8b", need_data=False), Profile(gpus_per_node=8, mem_gb=800)
    dense, *_, memory = grid.cells
    training = shapes(grid, [dense, memory], profile, tmp_path)
    assert [(one.nodes, one.gpus, one.mem_gb) for one in training] == [(1, 4, 400.0), (8, 8, 800.0)]
    assert scoring_shape(profile, dense, training[0], tmp_path).mem_gb == 100.0
    assert [one.mem_gb for one in shapes(grid, [dense], Profile(mem_gb=8), tmp_path)] == [8]


def test_a_cell_that_needs_more_than_the_memory_of_its_job_is_not_submitted(tmp_path: Path) -> None:
    grid = load_grid("smoke")
    dense, *_ = grid.cells
    small, large, default = (
        SlurmExecutor(grid, tmp_path, Profile(mem_gb=mem_gb), Scorer()) for mem_gb in (0.1, 8, None)
    )
    assert "a job of the profile (mem_gb) has 0.1 GB" in str(small.unfit(dense))
    assert large.unfit(dense) is None
    assert default.unfit(dense) is None
    assert SlurmExecutor(grid, tmp_path, Profile(mem_gb=0.1, gpus_per_node=1), Scorer()).unfit(dense) is None


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(8, 100))
def test_shares_are_at_least_one_and_do_not_exceed_the_cap_in_total(sizes: list[int], cap: int) -> None:
    caps = shares(sizes, cap)
    assert min(caps) >= 1
    assert sum(caps) == min(cap, sum(sizes))
    assert all(share <= size for share, size in zip(caps, sizes, strict=True))


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 6), st.integers(1, 6), st.integers(2, 5))
def test_every_cell_is_in_one_array_and_lanes_respect_the_caps(
    kinds: list[int], max_jobs: int, max_eval_jobs: int, max_array: int
) -> None:
    entries = [
        Entry(RunDir(Path(str(number))), Shape(tasks=1 + kind // 2), Shape() if kind % 2 else None)
        for number, kind in enumerate(kinds)
    ]
    profile = Profile(max_jobs=max_jobs, max_eval_jobs=max_eval_jobs, max_array=max_array)
    arrays = batches(entries, profile)
    assert sorted(entry.run.name for _, batch in arrays for entry in batch.entries) == sorted(
        entry.run.name for entry in entries
    )
    assert all(len(batch.entries) <= max_array for _, batch in arrays)
    assert all(len({(entry.shape, entry.scoring) for entry in batch.entries}) == 1 for _, batch in arrays)
    # The arrays of a lane run one after the other, so at most one array of each lane runs at once.
    assert sum({lane: batch.cap for lane, batch in arrays}.values()) <= max_jobs
    assert sum({lane: batch.eval_cap for lane, batch in arrays}.values()) <= max_eval_jobs
