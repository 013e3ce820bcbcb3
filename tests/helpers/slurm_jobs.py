"""Sweeps on the Slurm that answers `sinfo`, as people start them and look at them."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from sweep_processes import TINY, start_sweep, suite

from suite.records import RunDir

PROFILE = "{time: 20, warning_s: 30, max_jobs: 4, max_eval_jobs: 4, refresh_s: 1.5}\n"
DENSE = TINY.replace("[dense, memory_plus]", "[dense]")
UNSCORED = DENSE.replace("  evaluate: [{tasks: [bios_storage], limit: 20}]\n", "")
LONG = UNSCORED.replace("epochs: 8", "epochs: 40").replace("log_every: 1", "log_every: 20")
LONG = LONG.replace("checkpoint_every: 2", "checkpoint_every: 10")

LAUNCHERS: list[subprocess.Popen[str]] = []
"""Sweeps in the background; one that a failing test leaves would submit its jobs again."""


def answers() -> bool:
    """Whether there is a Slurm."""
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def slurm(*command: str) -> str:
    """Return the output of a command of Slurm."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(folder: Path, text: str, name: str = "tiny") -> Path:
    """A grid's file."""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def on_slurm(grid: Path, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep of the grid to its end, with the profile next to the grid's file."""
    where = ("--results", results, "--executor", "slurm", "--profile", grid.parent / "cpu.yaml")
    return suite("sweep", grid, *where, *options, cwd=grid.parent, patience_s=7200)


def start_on_slurm(grid: Path, results: Path) -> subprocess.Popen[str]:
    """Run the same sweep in the background, with its output in sweep.log next to the grid's file."""
    launcher = start_sweep(grid, results, "--executor", "slurm", "--profile", str(grid.parent / "cpu.yaml"))
    LAUNCHERS.append(launcher)
    return launcher


def until(what: Callable[[], object], patience_s: float = 600.0) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def job_of(run: RunDir, stage: str = "train") -> str:
    """The newest job of a run."""
    return str(json.loads((run.path / "logs" / "slurm.json").read_text())[stage]["job"])


def log_of(run: RunDir) -> str:
    """What the run's training wrote."""
    return Path(json.loads((run.path / "logs" / "slurm.json").read_text())["train"]["log"]).read_text()


def node_of(run: RunDir) -> str:
    """The node its training is on."""
    return slurm("squeue", "--noheader", "--format=%N", "--job", job_of(run))


def urgent(node: str, command: str) -> str:
    """A job for which those of the partitions `low` and `spare` must leave a node."""
    where = ("--partition=high", "--exclusive", f"--nodelist={node}", "--job-name=tiny-report", "--output=/dev/null")
    return slurm("sbatch", "--parsable", *where, f"--wrap={command}")


def resume_nodes() -> None:
    """What an operator does: a node that was lost is drained when it is found to still run what it was lost with."""
    for node in slurm("sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N").split():
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
    time.sleep(1)
