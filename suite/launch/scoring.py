"""Scoring trained runs together: requests are made once and asked of every model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from suite.cells import EvalConfig
from suite.errors import UserError
from suite.launch.worker import Scoring, also_asked, evaluate_run, refuse_unfit
from suite.records import RunDir


def score_runs(
    runs: Iterable[tuple[RunDir, tuple[EvalConfig, ...]]], scoring: Scoring, tell: Callable[[str], None]
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
        refuse_unfit(run, also_asked(run.read_cell(), asked), scoring)
    for number, (run, asked) in enumerate(trained, start=1):
        tell(f"scoring {run.name} ({number} of {len(trained)})")
        evaluate_run(run.path, asked, scoring)
    return [run.name for run, _ in asked_of if not run.state().get("trained")]
