"""`suite eval` and `suite data prefetch`: what is scored, what is refused in one line, and what is on stdout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cli_runner import Suite
from invented_rows import TASKS, write_rows

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


def test_a_grid_gets_only_the_scores_that_are_missing(tmp_path: Path, suite: Suite, trained: list[str]) -> None:
    result = suite("eval", "mine.yaml", "--tasks", "bios_storage,bios_qa", "--limit", "4", "--json")
    assert result.returncode == 1  # a cell is not trained
    assert f"{trained[1]}" in result.stderr
    cells = json.loads(result.stdout)["cells"]
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
    result = suite("eval", trained[0], "--tasks", "bios_storage,bios_qa", "--limit", "4")
    assert f"{shown['bios_storage', 'nll']:.4f}" in result.stdout


def test_an_invalid_request_is_one_line_and_leaves_no_trace(tmp_path: Path, suite: Suite, trained: list[str]) -> None:
    record = tmp_path / "results" / "runs" / trained[0] / "cell.json"
    before = record.read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    for arguments, expected in (
        (["mine.yaml", "--tasks", "nq_opn"], "evaluate.tasks: got 'nq_opn', did you mean nq_open?"),
        (["mine.yaml", "--tasks", "held_out"], "task held_out"),
        (["mine.yaml", "--tasks", "humaneval"], "humaneval"),
        (["mine.yaml", "--tasks", ","], "--tasks: got ','"),
        (["mine.yaml", "--tasks", "all"], "--tasks: got 'all'"),
        (["mine.yaml", "--preset", "papr"], "--preset: got 'papr', allowed: paper, quick"),
        (["mine.yaml", "--preset", "quick", "--limit", "3"], "--preset: "),
        (["mine.yaml", "--limit", "3"], "--tasks: missing"),
        (["mine.yaml", "--table-off"], "--tasks: missing"),
        (["mine.yaml", "--tasks", "bios_storage", "--table-off"], f"--table-off: {trained[0]} has no value tables"),
        (["mine.yaml", "--tasks", "piqa", "--data-root", "nowhere"], "--data-root: there is no folder nowhere"),
        (["dense-w32-s0-00000000"], "RUN: got 'dense-w32-s0-00000000', allowed: "),
        ([trained[1]], f"RUN: got '{trained[1]}', allowed: "),
        (["dense"], "RUN|GRID: got 'dense', allowed: a path to a .yaml file or one of "),
        (["dense"], trained[0]),
        (["llama"], "; suite import makes a run of a checkpoint"),
        ([str(tmp_path / "llama")], "; suite import makes a run of a checkpoint"),
        ([], "RUN|GRID: missing"),
        (["mine.yaml", "--oracle"], "--oracle: "),
    ):
        result = suite("eval", *arguments)
        assert (result.returncode, result.stdout) == (2, ""), result
        assert expected in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert record.read_text() == before
    result = suite("eval", trained[0], "--tasks", "piqa", "--data-root", "data", "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no baber/piqa/default/validation.jsonl (nor .parquet); get it with: suite data prefetch" in result.stderr
    assert record.read_text() == before
    assert not scores(tmp_path, trained[0])


def test_a_grid_without_trained_runs_is_refused(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "mine.yaml").write_text(GRID)
    result = suite("eval", "mine.yaml")
    assert result.returncode == 2
    assert "trained" in result.stderr


def test_truncated_data_is_named_by_its_line_and_leaves_no_scores(
    tmp_path: Path, suite: Suite, trained: list[str], real_data: Path
) -> None:
    source = real_data / "baber/piqa/default/validation.jsonl"
    target = tmp_path / "data/baber/piqa/default/validation.jsonl"
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes()[:1000])
    last = target.read_bytes().count(b"\n") + 1
    result = suite("eval", trained[0], "--tasks", "piqa", "--data-root", "data", "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"validation.jsonl:{last}: not JSON" in result.stderr
    assert not scores(tmp_path, trained[0])
    target.write_bytes(source.read_bytes())
    # the failed evaluation was not added to the run
    assert suite("eval", trained[0]).returncode == 0
    arguments = ("eval", trained[0], "--tasks", "piqa", "--limit", "3", "--data-root", "data")
    assert suite(*arguments).returncode == 0
    assert "scored on other data" not in suite(*arguments).stderr
    target.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[5:]))
    assert "piqa: scored on other data" in suite(*arguments).stderr


def test_the_oracle_prints_only_json_on_stdout(suite: Suite, real_data: Path) -> None:
    result = suite(
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
    assert result.returncode == 0, result.stderr
    tasks = json.loads(result.stdout)["tasks"]
    perfect = {"oracle": 1.0, "wrong": 0.0, "ceiling": 1.0}
    assert tasks["nq_open_qa"] == {"n": 3, "metrics": {"em": perfect, "f1": perfect}}
    assert tasks["humaneval"] == {"n": 3, "metrics": {"pass@1": perfect}}
    shown = suite("eval", "--oracle", "--tasks", "nq_open_qa", "--limit", "3", "--data-root", real_data)
    assert "1.0000" in shown.stdout


def test_the_programs_of_the_oracle_run_wherever_a_sandbox_works(
    suite: Suite, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    arguments = ("eval", "--oracle", "--limit", "2", "--data-root", real_data, "--json", "--tasks")
    result = suite(*arguments, "mbpp")
    assert json.loads(result.stdout)["tasks"]["mbpp"]["metrics"]["pass@1"]["oracle"] == 1.0
    for kind in ("bubblewrap", "unshare"):
        monkeypatch.setitem(sandbox._COMMANDS, kind, lambda *_: ["/nowhere/bwrap"])
    result = suite(*arguments, "mbpp")
    assert (result.returncode, result.stdout) == (2, "")
    assert "neither bubblewrap (/nowhere/bwrap: No such file or directory) nor unshare" in result.stderr
    result = suite(*arguments, "all")
    assert "mbpp" not in json.loads(result.stdout)["tasks"]
    assert result.stderr.startswith("suite: left out: humaneval, humaneval_10, mbpp, mbpp_10: --run-code: neither")
    assert {"humaneval", "mbpp"} <= set(json.loads(result.stdout)["left_out"])


def test_the_oracle_names_the_tasks_without_data_and_scores_the_others(suite: Suite, tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    arguments = ("eval", "--oracle", "--data-root", "data", "--run-code", "rlimits", "--json", "--tasks")
    result = suite(*arguments, "all")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report["tasks"]) == set(TASKS)
    assert {"mmlu", "humaneval", "nq_open_nll"} <= set(report["left_out"])
    assert set(report["tasks"]).isdisjoint(report["left_out"])
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"suite: left out: {', '.join(report['left_out'])}: data lacks their data")
    assert line.endswith("suite data prefetch data")
    shutil.rmtree(tmp_path / "data/allenai/winogrande")
    result = suite(*arguments, "winogrande,arc_easy")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no allenai/winogrande/winogrande_xl/validation.jsonl" in result.stderr
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    result = suite(*arguments, "all")
    assert (result.returncode, result.stdout) == (2, "")
    assert "data has the data of no task; get it with: suite data prefetch data" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_task_without_answers_has_a_row_in_the_table_of_the_oracle(suite: Suite, tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    result = suite("eval", "--oracle", "--data-root", "data", "--tasks", "wikitext")
    assert re.search(r"wikitext\W+8\W+", result.stdout)


def test_a_task_that_cannot_be_scored_is_refused_before_training(tmp_path: Path, suite: Suite) -> None:
    result = suite("eval", "--oracle", "--tasks", "humaneval", "--run-code=chroot")
    assert result.returncode == 2
    assert "--run-code: got 'chroot', allowed: strongest, bubblewrap, unshare, rlimits" in result.stderr
    (tmp_path / "mine.yaml").write_text(GRID)
    options = ("--set", "evaluate=[{tasks: [humaneval]}]", "--no-report")
    result = suite("sweep", "mine.yaml", *options)
    assert result.returncode == 2
    assert "task humaneval: runs programs" in result.stderr
    (tmp_path / "data").mkdir()
    options = ("--set", "evaluate=[{tasks: [piqa]}]", "--no-report", "--data-root", "data")
    result = suite("sweep", "mine.yaml", *options)
    assert result.returncode == 2
    assert "no baber/piqa/default/validation.jsonl" in result.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_prefetch_of_complete_data_downloads_nothing(suite: Suite, real_data: Path) -> None:
    result = suite("data", "prefetch", real_data, "--tasks", "piqa,openbookqa", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"folder": str(real_data), "written": []}
    assert "nq_opn" in suite("data", "prefetch", real_data, "--tasks", "nq_opn").stderr


@pytest.mark.slow
def test_the_overhead_of_evaluation_is_measured(tmp_path: Path, suite: Suite, real_data: Path) -> None:
    result = suite("bench", "evaluate", "--data-root", real_data, "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["measure"] for row in rows] == ["mmlu_build_s", "quick_build_s", "quick_checkpoint_s"]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    assert (tmp_path / "results/bench/evaluate.csv").exists()
    assert suite("bench", "evaluate", "--data-root", "nowhere").returncode == 2
