"""Score trained runs together, so that requests are prepared once for all models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.cells import EvalConfig
from suite.errors import UserError
from suite.launch.scorer import Scorer
from suite.launch.worker import evaluate_run, refuse_unfit
from suite.records import RunDir

FACTS = ("few_shot", "n", "cut")
"""Fields of a task that are listed with its scores."""


def score_runs(
    runs: Iterable[tuple[RunDir, tuple[EvalConfig, ...]]], scorer: Scorer, log: Callable[[str], None]
) -> list[str]:
    """Add the missing scores to every trained run.

    Scores that were written before a failure or a KeyboardInterrupt stay.

    Args:
        runs: Runs, each with evaluations to add to those of its cell.
        scorer: Settings for scoring.
        log: Called with a line before each run.

    Returns:
        The names of the runs that are not trained.

    Raises:
        UserError: No run is trained, or as `evaluate_run`.
    """
    requested = [*runs]
    trained = [(run, added) for run, added in requested if run.state().get("trained")]
    if not trained:
        raise UserError(f"{requested[0][0].path}: is not trained to its end; continue it with suite train")
    for run, added in trained:
        refuse_unfit(run, run.read_cell().with_evaluations(added), scorer)
    for number, (run, added) in enumerate(trained, start=1):
        log(f"scoring {run.name} ({number} of {len(trained)})")
        evaluate_run(run.path, added, scorer)
    return [run.name for run, _ in requested if not run.state().get("trained")]


def scores_of(run: RunDir, configs: Iterable[EvalConfig]) -> list[dict[str, Any]]:
    """Return the scores that a run has of evaluations, one row per metric of each task; members of a group separately.

    Returns:
        [{"eval", "task", "table_off", "precision", "few_shot", "n", "cut", "metric", "value", "stderr"}]; "eval" is the
        evaluation's hash.
    """
    rows = []
    for config in dict.fromkeys(configs):
        if run.has_eval(config.hash8):
            tasks = run.read_eval(run.path / "eval" / f"{config.hash8}.json")["tasks"]
            for name in config.tasks:
                facts = {"eval": config.hash8, "task": name, "table_off": config.table_off}
                facts["precision"] = config.precision
                facts |= {key: tasks[name][key] for key in FACTS}
                rows += [{**facts, "metric": metric, **score} for metric, score in tasks[name]["metrics"].items()]
    return rows


def of_other_data(run: RunDir, configs: Iterable[EvalConfig], data_root: Path) -> list[str]:
    """Return one line for each evaluation whose scores were made from other data than `data_root` holds now.

    Args:
        run: The run.
        configs: Evaluations; those without scores are skipped.
        data_root: The folder of evaluation data.
    """
    from suite.evaluate import catalog

    lines = []
    for config in dict.fromkeys(configs):
        path = run.path / "eval" / f"{config.hash8}.json"
        if path.exists():
            tasks = run.read_eval(path)["tasks"]
            now = catalog.fingerprints(config, data_root)
            changed = [name for name, fingerprint in now.items() if tasks[name]["data_fingerprint"] != fingerprint]
            if changed:
                lines.append(
                    f"{path}: {', '.join(changed)}: scored on other data than {data_root} holds; "
                    "to score again, delete that file"
                )
    return lines
