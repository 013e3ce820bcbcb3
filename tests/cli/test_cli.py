"""The `suite` command: its exit codes, and what goes to stdout and to stderr."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cli_runner import Suite

VERBS = (
    "sweep",
    "cancel",
    "plan",
    "status",
    "train",
    "cells",
    "runs",
    "runs delete",
    "runs prune",
    "export",
    "import",
    "quantise",
    "baselines",
    "fields",
    "data prepare",
    "data prefetch",
    "eval",
    "bench step",
    "bench kernels",
    "bench decode",
    "bench evaluate",
)
CELL = """
model: {family: dense, base: w32}
data: {kind: bios, people: 30}
train: {batch_rows: 4, epochs: 1, lr: 5e-3, checkpoint_every: 5}
"""
SHOTS = CELL.replace("30}", "30, questions: 0.5}") + "evaluate: [{tasks: [bios_choice], num_fewshot: 200}]\n"
MANY_SHOTS = "evaluate=[{tasks: [bios_choice], num_fewshot: 2000}]"
LONG = 300 * "x"
"""Longer than the name of a file may be."""
GRID = f"defaults:{CELL.replace(chr(10), chr(10) + '  ')}\nblocks:\n  - axes: {{seed: [0, 1]}}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, suite: Suite) -> None:
    shown = suite(*verb.split(), "--help")
    assert shown.returncode == 0
    assert f"Example: suite {verb}" in shown.stdout
    assert "--json" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["status", "smok"], "GRID: got 'smok', did you mean smoke?, allowed: "),
        (["sweep", "smoke", "--set", "train.lr"], "--set: 'train.lr'"),
        (["sweep", "smoke", "--set", "train.lr=fast"], "train.lr: got 'fast', allowed: a valid number"),
        (["sweep", "smoke", "--set", "train.lrr=1", "--dry-run"], "train.lrr: unknown field, did you mean lr?"),
        (["sweep", "smoke", "--set", "evaluate=[{tasks: [bios_qaa]}]", "--dry-run"], "did you mean bios_qa?"),
        (["train", "shots.yaml"], "shots.yaml: task bios_choice: num_fewshot: got 200, allowed: at most "),
        (["plan", "smoke", "--set", "evaluate=[{tasks: [bios_qaa]}]"], "did you mean bios_qa?"),
        (
            ["plan", "smoke", "--set", MANY_SHOTS],
            "smoke.yaml: task bios_choice: num_fewshot: got 2000, allowed: at most",
        ),
        (["bench", "records", "--results", "/dev/null"], "--results: /dev/null"),
        (["bench", "step", "--results", "/dev/null"], "--results: /dev/null"),
        (["sweep", "smoke", "--data-root", "nowhere"], "--data-root: there is no folder nowhere"),
        (["sweep", "smoke", "--results", "/dev/null/here"], "--results: /dev/null/here"),
        (["status", "smoke", "--results", "/dev/null"], "--results: /dev/null"),
        (["plan", "smoke", "--results", "/proc/here"], "/proc/here/cache/"),
        (["plan", "smoke", "--price", "inf"], "--price: got inf"),
        (["plan", "paper-8b", "--set", "model.dim=1000000000000"], "model: got a tensor"),
        (["plan", "paper-memory-scaling", "--scale", "half_keys=1e6"], "model: got a tensor"),
        (["sweep", "smoke", "--no-wait"], "--no-wait: "),
        (["sweep", "smoke", "--executor", "slurm", "--jobs", "2"], "--jobs: "),
        (["eval", "prefetch", "data"], "renamed to suite data prefetch"),
        (["train", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["eval", "missing"], "GRID: got 'missing'"),
        (["sweep", "smoke", "--jobs", "0"], "suite: --jobs: got 0, allowed: at least 1"),
        (["sweep", "smoke", "--gpus", "0.5"], "suite: --gpus: got 0.5, allowed: a valid integer"),
        (["plan", "smoke", "--nodes", "-1"], "suite: --nodes: got -1, allowed: at least 1"),
        (["plan", "smoke", "--utilisation", "2"], "suite: --utilisation: got 2, allowed: at most 1"),
        (["eval", "smoke", "--limit", "0"], "suite: --limit: got 0, allowed: at least 1"),
        (["bench", "records", "--runs", "0"], "suite: --runs: got 0, allowed: at least 1"),
        (["import", "folder", "--seq-len", "1"], "suite: --seq-len: got 1, allowed: at least 2"),
        (["plan", "smoke", "--price", "much"], "suite: --price: got much, allowed: a valid number"),
        (["sweeep", "smoke"], "No such command 'sweeep'"),
        (["status", "smoke", "--jsonn"], "suite: No such option"),
        (["plan"], "suite: Missing argument 'GRID'"),
        (["status", LONG], "GRID: got 'xxx"),
        (["status", f"{LONG}.yaml"], "GRID: got 'xxx"),
        (["eval", LONG], "GRID: got 'xxx"),
        (["export", LONG, "--to", "exported"], "RUN: got 'xxx"),
        (["cells", "smoke", "--set", f"train.init_from={LONG}"], "train.init_from: got 'xxx"),
        (["cells", "smoke", "--set", f"data.tokenizer={{kind: file, path: {LONG}}}"], "data.tokenizer.path: got 'xxx"),
        (["sweep", "smoke", "--executor", "slurm", "--profile", LONG], "--profile: got 'xxx"),
        (["cells", "smoke", "--results", LONG], "xxx: File name too long; use a shorter path"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(arguments: list[str], expected: str, suite: Suite) -> None:
    Path("shots.yaml").write_text(SHOTS)
    result = suite(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["status", "smok"], "suite: GRID: got 'smok'"), (["plan", "smoke", "--set", MANY_SHOTS], "suite: ")],
)
def test_the_installed_command_prints_only_the_mistake(arguments: list[str], expected: str, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("suite"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(expected)
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_task_is_refused_before_training(tmp_path: Path, suite: Suite) -> None:
    result = suite("sweep", "smoke", "--set", "evaluate=[{tasks: [nq_opn]}]")
    assert result.returncode == 2
    assert "evaluate.tasks: got 'nq_opn', did you mean nq_open?, allowed: " in result.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_without_arguments_help_is_shown(suite: Suite) -> None:
    result = suite()
    assert result.returncode == 2
    assert "Commands:" in result.stdout + result.stderr


def test_the_version_is_that_of_the_distribution(suite: Suite) -> None:
    result = suite("--version")
    assert (result.returncode, result.stdout) == (0, f"next-parameter {version('next-parameter')}\n")


@pytest.mark.parametrize("verb", ["sweep", "train", "eval"])
def test_run_code_needs_a_value(verb: str, suite: Suite) -> None:
    result = suite(verb, "smoke", "--run-code")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--run-code" in result.stderr


def test_a_dry_run_lists_the_cells_and_writes_nothing(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "mine.yaml").write_text(GRID)
    listed = suite("sweep", "mine.yaml", "--dry-run", "--json")
    assert listed.returncode == 0
    document = json.loads(listed.stdout)
    assert [cell["config"]["seed"] for cell in document["cells"]] == [0, 1]
    assert {cell["state"] for cell in document["cells"]} == {"pending"}
    for cell in document["cells"]:
        assert re.fullmatch(rf"dense-w32-s\d-{cell['cell']}", cell["run"])
        assert cell["run"] in suite("sweep", "mine.yaml", "--dry-run").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_one_cell_is_trained_listed_and_reused(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "cell.yaml").write_text(CELL)
    trained = suite("train", "cell.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    (cell,) = json.loads(trained.stdout)["cells"]
    assert (cell["state"], cell["progress"], cell["eta_s"], cell["cause"]) == ("done", 1.0, 0.0, None)
    assert cell["variant"] == {}
    (tmp_path / "mine.yaml").write_text(GRID)
    result = suite("status", "mine.yaml", "--json")
    assert result.returncode == 0
    states = {found["run"]: found["state"] for found in json.loads(result.stdout)["cells"]}
    assert states.pop(cell["run"]) == "done"
    assert list(states.values()) == ["pending"]
    again = suite("train", tmp_path / "results" / "runs" / cell["run"] / "cell.json", "--json")
    assert json.loads(again.stdout)["cells"][0]["run"] == cell["run"]
    scored = suite("eval", cell["run"], "--tasks", "bios_storage", "--limit", "5", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["cells"][0]["headline"].endswith("of bits stored")


def test_the_families_are_listed_with_their_options(suite: Suite) -> None:
    families = json.loads(suite("baselines", "--json").stdout)["families"]
    assert {"dense", "moe", "moe_topk", "pkm", "memory_plus"} <= families.keys()
    assert "half_keys" in families["memory_plus"]["options"]
    assert "half_keys" not in families["dense"]["options"]


def test_a_plan_prints_nothing_on_stderr_when_triton_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, triton; from suite.cli.main import main; sys.argv = ['suite', 'plan', 'smoke', '--json']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
