"""The `suite` command: its exit codes, and what goes to stdout and to stderr."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import Suite

VERBS = (
    "sweep",
    "cancel",
    "plan",
    "status",
    "train",
    "export",
    "baselines",
    "data prepare",
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
        (["sweep", "smoke", "--set", "train.lr"], "--set: got 'train.lr', allowed: field=value"),
        (["sweep", "smoke", "--set", "train.lr=fast"], "train.lr: got 'fast', allowed: a valid number"),
        (["sweep", "smoke", "--set", "train.lrr=1", "--dry-run"], "train.lrr: unknown field, did you mean lr?"),
        (["sweep", "smoke", "--set", "evaluate=[{tasks: [bios_qaa]}]", "--dry-run"], "did you mean bios_qa?"),
        (["sweep", "smoke", "--data-root", "nowhere"], "--data-root: got nowhere, which is no folder"),
        (["sweep", "smoke", "--results", "/dev/null/here"], "--results: got /dev/null/here, but /dev/null is a file"),
        (
            ["status", "smoke", "--results", "/dev/null"],
            "--results: got /dev/null, but /dev/null is a file, allowed: a folder",
        ),
        (["plan", "smoke", "--results", "/proc/here"], "--results: got /proc/here: No such file"),
        (["plan", "smoke", "--price", "inf"], "--price: got inf, allowed: dollars an hour, 0 or more"),
        (["plan", "paper-8b", "--set", "model.dim=1000000000000"], "got a tensor of 2^63 bytes or more"),
        (["plan", "paper-memory-scaling", "--scale", "half_keys=1e6"], "got a tensor of 2^63 bytes or more"),
        (["sweep", "smoke", "--no-wait"], "--no-wait: got it with --executor local, allowed: with --executor slurm"),
        (["sweep", "smoke", "--executor", "slurm", "--jobs", "2"], "--jobs: got 2 with --executor slurm, allowed: "),
        (["train", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["eval", "missing"], "GRID: got 'missing'"),
        (["sweep", "smoke", "--jobs", "0"], "suite: Invalid value for '--jobs'"),
        (["plan", "smoke", "--price", "much"], "suite: Invalid value for '--price'"),
        (["sweeep", "smoke"], "No such command 'sweeep'"),
        (["status", "smoke", "--jsonn"], "suite: No such option"),
        (["plan"], "suite: Missing argument 'GRID'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], expected: str, suite: Suite) -> None:
    told = suite(*arguments)
    assert told.returncode == 2
    assert told.stdout == ""
    assert expected in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_the_installed_command_says_no_more_than_the_mistake() -> None:
    command = Path(sys.executable).with_name("suite")
    told = subprocess.run([command, "status", "smok"], capture_output=True, text=True, timeout=300)
    assert told.returncode == 2
    assert told.stderr.startswith("suite: GRID: got 'smok'")
    assert len(told.stderr.splitlines()) == 1


def test_a_task_nobody_knows_is_refused_before_anything_trains(tmp_path: Path, suite: Suite) -> None:
    told = suite("sweep", "smoke", "--set", "evaluate=[{tasks: [nq_opn]}]")
    assert told.returncode == 2
    assert "evaluate.tasks: got 'nq_opn', did you mean nq_open?, allowed: " in told.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_without_arguments_there_is_help(suite: Suite) -> None:
    told = suite()
    assert told.returncode == 2
    assert "Train and evaluate what a grid is missing" in told.stdout + told.stderr


def test_a_dry_run_lists_the_cells_and_leaves_nothing_behind(tmp_path: Path, suite: Suite) -> None:
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


def test_one_cell_is_trained_here_shown_and_found_again(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "cell.yaml").write_text(CELL)
    trained = suite("train", "cell.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    (cell,) = json.loads(trained.stdout)["cells"]
    assert (cell["state"], cell["progress"], cell["eta_s"], cell["cause"]) == ("done", 1.0, 0.0, None)
    assert cell["variant"] == {}
    (tmp_path / "mine.yaml").write_text(GRID)
    told = suite("status", "mine.yaml", "--json")
    assert told.returncode == 0
    states = {found["run"]: found["state"] for found in json.loads(told.stdout)["cells"]}
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


def test_a_process_that_has_triton_ends_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, triton; from suite.cli.main import main; sys.argv = ['suite', 'plan', 'smoke', '--json']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
