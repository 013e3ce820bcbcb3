"""Sweeps as people start them: a process of their own, watched from outside through files and the process table."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from times import TIMES

from suite.records import RunDir

TINY = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 30, questions: 0.5}
  train: {batch_rows: 4, epochs: 8, lr: 5e-3, warmup: 3, probes: 3, log_every: 1, checkpoint_every: 2}
  evaluate: [{tasks: [bios_storage], limit: 20}]
families:
  memory_plus: {model: {half_keys: 16, top_k: 4}}
blocks:
  - axes: {model.family: [dense, memory_plus]}
"""

NOT_RECORDS = re.compile(r"^(logs/|\.lock$|checkpoints/|to_score/)|(^|/)\.[^/]+\.\d+$")
"""The last one is what a kill in the middle of a write leaves next to the file."""
TIMES_AND_PROCESSES = re.compile(
    rf'"({"|".join(sorted(TIMES))}|heartbeat|pid|host|started|finished|log)": ("[^"]*"|[^,\n}}]*)'
)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def suite(*arguments: str | Path, cwd: Path, patience_s: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line, run to its end."""
    command = [sys.executable, "-m", "suite.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=patience_s)


def start_sweep(grid: Path, results: Path, *options: str) -> subprocess.Popen[str]:
    """Start a sweep in the background, in a separate process group as on a terminal, with its output in sweep.log."""
    command = [
        sys.executable,
        "-m",
        "suite.cli.main",
        "sweep",
        str(grid),
        "--results",
        str(results),
        "--no-report",
        *options,
    ]
    with (grid.parent / "sweep.log").open("a") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=log, text=True, start_new_session=True)


def runs_of(results: Path) -> list[RunDir]:
    return [RunDir(path) for path in sorted(results.glob("runs/*"))]


def parent(pid: int) -> int | None:
    """The parent of a living process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else int(after_name[1])


def records(results: Path) -> dict[str, str]:
    """Every record below `results` by its path, times and process ids blanked out."""
    return dict(_records(results))


def _records(results: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((results / "grids").glob("*/*.json")):
        yield path.relative_to(results).as_posix(), path.read_text()
    for run in runs_of(results):
        for path in sorted(run.path.rglob("*")):
            name = path.relative_to(run.path).as_posix()
            if path.is_file() and not NOT_RECORDS.match(name):
                yield f"{run.name}/{name}", TIMES_AND_PROCESSES.sub(r'"\1": *', path.read_text())


def final_weights(results: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The last checkpoint's weights of every run."""
    found = {}
    for run in runs_of(results):
        last = max(run.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        found[run.name] = torch.load(last / "state.pt", weights_only=True)["model"]
    return found


def state_of(run: RunDir) -> str:
    return str(json.loads(run.state_path.read_text())["state"]) if run.state_path.exists() else "pending"
