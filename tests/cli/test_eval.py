"""`suite eval`: what is asked, what is refused in one line, and what is on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Suite

from suite.errors import UserError
from suite.evaluate import sandbox
from suite.evaluate.sandbox import Sandbox

GRID = """
defaults:
  model: {family: dense, base: w32}
  data: {kind: bios, people: 30, questions: 0.5, seq_len: 256, tokenizer: {kind: bytes}}
  train: {batch_rows: 4, epochs: 1, lr: 5e-3}
blocks:
  - axes: {seed: [0, 1]}
"""


@pytest.fixture
def trained(tmp_path: Path, suite: Suite) -> list[str]:
    """The runs of a small grid, one of its two cells trained."""
    (tmp_path / "mine.yaml").write_text(GRID)
    listed = json.loads(suite("sweep", "mine.yaml", "--dry-run", "--json").stdout)["cells"]
    (tmp_path / "cell.json").write_text(json.dumps(listed[0]["config"]))
    assert suite("train", "cell.json").returncode == 0
    return [cell["run"] for cell in listed]


def scores(tmp_path: Path, run: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in (tmp_path / "results" / "runs" / run / "eval").glob("*.json")]


def test_a_grid_is_given_the_scores_it_lacks_and_no_others(tmp_path: Path, suite: Suite, trained: list[str]) -> None:
    told = suite("eval", "mine.yaml", "--tasks", "bios_storage,bios_qa", "--limit", "4", "--json")
    assert told.returncode == 1  # a cell is not trained
    assert f"not trained to their end, so not scored: {trained[1]}" in told.stderr
    cells = json.loads(told.stdout)["cells"]
    assert [cell["run"] for cell in cells] == trained
    (found,) = scores(tmp_path, trained[0])
    assert list(found["tasks"]) == ["bios_storage", "bios_qa"]
    shown = {(row["task"], row["metric"]): row["value"] for row in cells[0]["scores"]}
    metrics = {name: task["metrics"] for name, task in found["tasks"].items()}
    assert shown == {(name, metric): score["value"] for name in metrics for metric, score in metrics[name].items()}
    assert cells[1]["scores"] == []
    (path,) = (tmp_path / "results" / "runs" / trained[0] / "eval").iterdir()
    before = path.stat().st_mtime_ns
    again = suite("eval", trained[0], "--tasks", "bios_storage,bios_qa", "--limit", "4", "--json")
    assert (again.returncode, path.stat().st_mtime_ns) == (0, before)
    assert json.loads(again.stdout)["cells"][0]["scores"] == cells[0]["scores"]
    told = suite("eval", trained[0], "--tasks", "bios_storage,bios_qa", "--limit", "4")
    assert f"{shown['bios_storage', 'nll']:.4f}" in told.stdout


def test_what_cannot_be_scored_is_said_in_a_line_and_not_remembered(
    tmp_path: Path, suite: Suite, trained: list[str]
) -> None:
    record = tmp_path / "results" / "runs" / trained[0] / "cell.json"
    before = record.read_text()
    (tmp_path / "data").mkdir()
    for arguments, expected in (
        (["mine.yaml", "--tasks", "nq_opn"], "evaluate.tasks: got 'nq_opn', did you mean nq_open?"),
        (["mine.yaml", "--tasks", "held_out"], "task held_out"),
        (["mine.yaml", "--tasks", "humaneval"], "allowed: with --run-code only"),
        (["mine.yaml", "--tasks", ","], "--tasks: got ',', allowed: all, or names"),
        (["mine.yaml", "--tasks", "all"], "--tasks: got 'all', allowed: with --oracle only"),
        (["mine.yaml", "--preset", "papr"], "--preset: got 'papr', allowed: paper, quick"),
        (["mine.yaml", "--preset", "quick", "--limit", "3"], "allowed: the preset alone"),
        (["mine.yaml", "--limit", "3"], "--tasks: missing"),
        (["mine.yaml", "--tasks", "piqa", "--data-root", "nowhere"], "--data-root: got nowhere, which is no folder"),
        (["dense-w32-s0-00000000"], "RUN: got 'dense-w32-s0-00000000', allowed: a run's folder or one of"),
        ([trained[1]], f"RUN: got '{trained[1]}', allowed: a run's folder"),
        (["dense"], "RUN|GRID: got 'dense', allowed: a path to a .yaml file or one of "),
        (["dense"], f"; or a run's folder or one of {trained[0]}"),
        ([], "RUN|GRID: got nothing"),
        (["mine.yaml", "--oracle"], "--oracle: got a run"),
    ):
        told = suite("eval", *arguments)
        assert (told.returncode, told.stdout) == (2, ""), told
        assert expected in told.stderr
        assert len(told.stderr.splitlines()) == 1
        assert record.read_text() == before
    told = suite("eval", trained[0], "--tasks", "piqa", "--data-root", "data", "--json")
    assert (told.returncode, told.stdout) == (2, "")
    assert "no baber/piqa/default/validation.jsonl (nor .parquet); get it with: suite eval prefetch" in told.stderr
    assert record.read_text() == before
    assert not scores(tmp_path, trained[0])


def test_nothing_trained_is_a_mistake(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "mine.yaml").write_text(GRID)
    told = suite("eval", "mine.yaml")
    assert told.returncode == 2
    assert "is not trained to its end, allowed: a run that is" in told.stderr


def test_data_cut_short_is_named_by_its_line_and_leaves_no_scores(
    tmp_path: Path, suite: Suite, trained: list[str], real_data: Path
) -> None:
    source = real_data / "baber/piqa/default/validation.jsonl"
    target = tmp_path / "data/baber/piqa/default/validation.jsonl"
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes()[:1000])
    last = target.read_bytes().count(b"\n") + 1
    told = suite("eval", trained[0], "--tasks", "piqa", "--data-root", "data", "--json")
    assert (told.returncode, told.stdout) == (2, "")
    assert f"validation.jsonl:{last}: not whole JSON" in told.stderr
    assert not scores(tmp_path, trained[0])
    target.write_bytes(source.read_bytes())
    # what failed is not asked again
    assert suite("eval", trained[0]).returncode == 0
    asked = ("eval", trained[0], "--tasks", "piqa", "--limit", "3", "--data-root", "data")
    assert suite(*asked).returncode == 0
    assert "scored on other data" not in suite(*asked).stderr
    target.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[5:]))
    assert "piqa: scored on other data than data holds; to score again, delete that file" in suite(*asked).stderr


def test_the_oracle_speaks_json_alone(suite: Suite, real_data: Path) -> None:
    told = suite(
        "eval",
        "--oracle",
        "--tasks",
        "nq_open_qa,humaneval",
        "--limit",
        "3",
        "--data-root",
        real_data,
        "--run-code",
        "rlimits",
        "--json",
    )
    assert told.returncode == 0, told.stderr
    tasks = json.loads(told.stdout)["tasks"]
    perfect = {"oracle": 1.0, "wrong": 0.0, "ceiling": 1.0}
    assert tasks["nq_open_qa"] == {"n": 3, "metrics": {"em": perfect, "f1": perfect}}
    assert tasks["humaneval"] == {"n": 3, "metrics": {"pass@1": perfect}}
    shown = suite("eval", "--oracle", "--tasks", "nq_open_qa", "--limit", "3", "--data-root", real_data)
    assert "1.0000" in shown.stdout


def test_the_oracles_programs_run_wherever_walls_can_be_made(
    suite: Suite, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    asked = ("eval", "--oracle", "--limit", "2", "--data-root", real_data, "--json", "--tasks")
    told = suite(*asked, "mbpp")
    assert json.loads(told.stdout)["tasks"]["mbpp"]["metrics"]["pass@1"]["oracle"] == 1.0
    for kind in ("bubblewrap", "unshare"):
        monkeypatch.setitem(sandbox._COMMANDS, kind, lambda *_: ["/nowhere/bwrap"])
    told = suite(*asked, "mbpp")
    assert (told.returncode, told.stdout) == (2, "")
    assert "neither bubblewrap (/nowhere/bwrap: No such file or directory) nor unshare" in told.stderr
    told = suite(*asked, "all")
    assert "mbpp" not in json.loads(told.stdout)["tasks"]
    assert told.stderr.startswith("suite: left out: humaneval, humaneval_10, mbpp, mbpp_10: --run-code: neither")


def test_what_cannot_be_scored_is_not_trained(tmp_path: Path, suite: Suite) -> None:
    told = suite("eval", "--oracle", "--tasks", "humaneval", "--run-code=chroot")
    assert told.returncode == 2
    assert "--run-code: got 'chroot', allowed: strongest, bubblewrap, unshare, rlimits" in told.stderr
    (tmp_path / "mine.yaml").write_text(GRID)
    asks = ("--set", "evaluate=[{tasks: [humaneval]}]", "--no-report")
    told = suite("sweep", "mine.yaml", *asks)
    assert told.returncode == 2
    assert "task humaneval: runs programs" in told.stderr
    (tmp_path / "data").mkdir()
    asks = ("--set", "evaluate=[{tasks: [piqa]}]", "--no-report", "--data-root", "data")
    told = suite("sweep", "mine.yaml", *asks)
    assert told.returncode == 2
    assert "no baber/piqa/default/validation.jsonl" in told.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_prefetch_of_what_is_there_downloads_nothing(suite: Suite, real_data: Path) -> None:
    told = suite("eval", "prefetch", real_data, "--tasks", "piqa,openbookqa", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == {"folder": str(real_data), "written": []}
    assert "nq_opn" in suite("eval", "prefetch", real_data, "--tasks", "nq_opn").stderr


@pytest.mark.slow
def test_what_evaluation_takes_beside_the_model_is_measured(tmp_path: Path, suite: Suite, real_data: Path) -> None:
    told = suite("bench", "evaluate", "--data-root", real_data, "--json")
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)
    assert [row["measure"] for row in rows] == ["mmlu_build_s", "quick_build_s", "quick_checkpoint_s"]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    assert (tmp_path / "results/bench/evaluate.csv").exists()
    assert suite("bench", "evaluate", "--data-root", "nowhere").returncode == 2
