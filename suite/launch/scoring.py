"""Scoring trained runs together: requests are made once and asked of every model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.cells import EvalConfig
from suite.errors import UserError
from suite.launch.scorer import Scorer
from suite.launch.worker import evaluate_run, refuse_unfit
from suite.records import RunDir

FACTS = ("few_shot", "n", "cut")
"""What is told of a task beside its scores."""


def score_runs(
    runs: Iterable[tuple[RunDir, tuple[EvalConfig, ...]]], scoring: Scorer, tell: Callable[[str], None]
) -> list[str]:
    """Give every trained run the scores it lacks of the evaluations beside it; gives the runs that are not trained.

    Whatever was whole before a failure or a KeyboardInterrupt stays. Raises UserError where no run is trained, and as
    `evaluate_run`.
    """
    asked_of = [*runs]
    trained = [(run, asked) for run, asked in asked_of if run.state().get("trained")]
    if not trained:
        raise UserError(f"{asked_of[0][0].path}: is not trained to its end, allowed: a run that is")
    for run, asked in trained:
        refuse_unfit(run, run.read_cell().with_evaluations(asked), scoring)
    for number, (run, asked) in enumerate(trained, start=1):
        tell(f"scoring {run.name} ({number} of {len(trained)})")
        evaluate_run(run.path, asked, scoring)
    return [run.name for run, _ in asked_of if not run.state().get("trained")]


def scores_of(run: RunDir, asked: Iterable[EvalConfig]) -> list[dict[str, Any]]:
    """The scores that a run has of evaluations: a row for each metric of each task asked for, a group's members apart.

    Returns:
        [{"eval", "task", "few_shot", "n", "cut", "metric", "value", "stderr"}]; "eval" is the evaluation's hash.
    """
    rows = []
    for config in dict.fromkeys(asked):
        if run.has_eval(config.hash8):
            tasks = json.loads((run.path / "eval" / f"{config.hash8}.json").read_text())["tasks"]
            for name in config.tasks:
                facts = {"eval": config.hash8, "task": name, **{key: tasks[name][key] for key in FACTS}}
                rows += [{**facts, "metric": metric, **score} for metric, score in tasks[name]["metrics"].items()]
    return rows


def of_other_data(run: RunDir, asked: Iterable[EvalConfig], data_root: Path) -> list[str]:
    """A line for each evaluation whose scores were made from other data than is in `data_root` now."""
    from suite.evaluate import catalog

    lines = []
    for config in dict.fromkeys(asked):
        path = run.path / "eval" / f"{config.hash8}.json"
        if path.exists():
            tasks = json.loads(path.read_text())["tasks"]
            now = catalog.fingerprints(config, data_root)
            changed = [name for name, fingerprint in now.items() if tasks[name]["data_fingerprint"] != fingerprint]
            if changed:
                lines.append(
                    f"{path}: {', '.join(changed)}: scored on other data than {data_root} holds; "
                    "to score again, delete that file"
                )
    return lines
