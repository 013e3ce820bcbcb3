"""Profiles of clusters, and how cells become arrays under a cap: what needs no Slurm to be seen."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import load_grid
from suite.launch.slurm.profile import Profile, load_profile
from suite.launch.slurm.resources import Shape, scoring_shape, shapes
from suite.launch.slurm.submit import Entry, batches, shares
from suite.records import RunDir

EXAMPLE = Path(__file__).parents[2] / "clusters" / "example.yaml"


def test_the_example_is_a_profile_and_names_every_field() -> None:
    assert load_profile(str(EXAMPLE)).time == 24 * 60
    for field in Profile.model_fields:
        assert f"{field}:" in EXAMPLE.read_text()


@pytest.mark.parametrize(
    ("written", "minutes"),
    # As sbatch's manual reads them: minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on.
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
def test_times_are_read_as_slurm_writes_them(tmp_path: Path, written: str, minutes: int) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f'time: "{written}"\n')
    assert load_profile(str(path)).time == minutes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("partitoin: gpu\n", "partitoin"),
        ("time: soon\n", "time: got 'soon'"),
        ("max_jobs: 0\n", "max_jobs: got 0"),
        ("{time: 1, warning_s: 300}\n", "warning_s: got 300, allowed: less than time, 60 seconds"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_name_the_default_is_taken_and_missed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = r"--profile: got none, and there is no clusters/default\.yaml, allowed: .*example"
    with pytest.raises(UserError, match=missing):
        load_profile(None)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "default.yaml").write_text("time: 7\n")
    assert load_profile(None).time == 7


def test_a_grids_launch_is_above_the_profile() -> None:
    assert (
        load_profile(str(EXAMPLE), {"gpus": 16, "time": "30"}).model_dump().items() >= {"gpus": 16, "time": 30}.items()
    )


def test_only_what_fits_no_gpu_is_scored_where_it_trained_unless_the_profile_says_so(tmp_path: Path) -> None:
    training = Shape(nodes=8, tasks=8, gpus=8)
    dense, *_, memory = load_grid("paper-8b", need_data=False).cells  # 8e9 and 77e9 weights of 4 bytes, on 80 GB

    def shape(cell: Cell, **said: bool) -> Shape:
        return scoring_shape(Profile(gpus_per_node=8, **said), cell, training, tmp_path)

    assert shape(dense) == shape(memory, score_together=False) == Shape(gpus=1, cpus=dense.threads)
    assert shape(memory) == shape(dense, score_together=True) == training


def test_a_job_gets_the_share_of_a_nodes_memory_that_its_gpus_are_of_the_nodes(tmp_path: Path) -> None:
    grid, profile = load_grid("paper-8b", need_data=False), Profile(gpus_per_node=8, mem_gb=800)
    dense, *_, memory = grid.cells
    asked = shapes(grid, [dense, memory], profile, tmp_path)
    assert [(one.nodes, one.gpus, one.mem_gb) for one in asked] == [(1, 4, 400.0), (8, 8, 800.0)]
    assert scoring_shape(profile, dense, asked[0], tmp_path).mem_gb == 100.0
    assert [one.mem_gb for one in shapes(grid, [dense], Profile(mem_gb=8), tmp_path)] == [8]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(8, 100))
def test_shares_of_a_cap_are_at_least_one_and_never_more_than_it(sizes: list[int], cap: int) -> None:
    given_ = shares(sizes, cap)
    assert min(given_) >= 1
    assert sum(given_) == min(cap, sum(sizes))
    assert all(share <= size for share, size in zip(given_, sizes, strict=True))


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 6), st.integers(1, 6), st.integers(2, 5))
def test_every_cell_is_in_one_array_and_lanes_keep_the_caps(
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
    # Arrays of a lane follow each other: what runs at once is one array of each.
    assert sum({lane: batch.cap for lane, batch in arrays}.values()) <= max_jobs
    assert sum({lane: batch.eval_cap for lane, batch in arrays}.values()) <= max_eval_jobs
