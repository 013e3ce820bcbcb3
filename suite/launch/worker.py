"""What a job does: take a run's lock, train what is missing, score what is missing, and say how it went.

A job is given the path of a run directory and nothing else; whatever it needs it finds there. Heavy modules are
imported once they are needed: most of a short job would otherwise be spent on importing lm-eval.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from suite.errors import UserError
from suite.launch import background_scoring, branches
from suite.launch.provenance import stale_because, versions
from suite.models import registry
from suite.records import Locked, RunDir

if TYPE_CHECKING:
    from suite.cells import Cell, EvalConfig
    from suite.data import Corpus
    from suite.evaluate.harness import Evaluator
    from suite.evaluate.sandbox import RunCode
    from suite.train.parallel import World

CELL_FACTS = ("cell", "hash", "run")
"""What write_cell itself puts into cell.json; the rest are facts to carry over."""

Outcome = Literal["done", "failed", "locked"]


@dataclass
class Scoring:
    """What scoring may use: local data sets (None: the hub), and a sandbox for programs that models write (None: none).

    Requests are made once and kept for the next run.
    """

    data_root: Path | None = None
    run_code: RunCode | None = None

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator over that data. Raises UserError where it or the sandbox cannot be had."""
        from suite.evaluate.harness import Evaluator
        from suite.evaluate.sandbox import sandbox_of

        return Evaluator(self.data_root, sandbox_of(self.run_code))


def run_cell(run_path: Path, scoring: Scoring | None = None) -> Outcome:
    """Bring the run at `run_path` to its end: train from its newest checkpoint, then score what lacks scores.

    Harmless on a run that is finished, failed, or held by another process ("locked"). A failure is recorded
    with its cause and log, and not raised: other cells carry on.
    """
    run = RunDir(run_path)
    try:
        with run.lock():
            if run.state()["state"] == "failed":
                return "failed"
            return _run(run, scoring or Scoring())
    except Locked:
        return "locked"


def missing_evals(run: RunDir, cell: Cell) -> list[str]:
    """The hashes of the evaluations asked of the cell that have no scores yet."""
    return [config.hash8 for config in cell.evaluate if not run.has_eval(config.hash8)]


def evaluate_run(run_path: Path, asked: tuple[EvalConfig, ...], scoring: Scoring) -> Cell:
    """Score a trained run on what lacks scores, `asked` added to it; gives its cell as it is recorded then.

    Raises UserError for a run that is not trained or not free.
    """
    from suite import data

    run = RunDir(run_path)
    try:
        with run.lock():
            if not run.state().get("trained"):
                raise UserError(f"{run.path}: is not trained to its end, allowed: a run that is")
            recorded = run.read_cell()
            cell = recorded.also_asked(asked)
            score_missing(run, cell, data.prepare(cell.data, cache=cache_of(run)), scoring)
            if cell != recorded:
                # What could not be scored is not asked again by whoever comes next.
                facts = {name: value for name, value in run.read_record().items() if name not in CELL_FACTS}
                run.write_cell(cell, **facts)
            set_done(run)
            return cell
    except Locked:
        raise UserError(f"{run.path}: is being run by another process, allowed: wait for it or stop it") from None


def refuse_unfit(run: RunDir, cell: Cell, scoring: Scoring) -> None:
    """Raise UserError for a task without scores that the run cannot be asked, or whose data is not there."""
    wanted = missing_evals(run, cell)
    if not wanted:
        return
    from suite.evaluate import catalog

    for config in cell.evaluate:
        if config.hash8 in wanted:
            catalog.refuse_unfit(config.tasks, cell.data, scoring.run_code is not None)
            if scoring.data_root is not None:
                catalog.refuse_missing(config, scoring.data_root)


def _run(run: RunDir, scoring: Scoring) -> Outcome:
    cell = run.read_cell()
    if run.state()["state"] == "done" and not missing_evals(run, cell):
        return "done"
    return attempt(run, lambda: _train_and_score(run, cell, scoring))


def attempt(run: RunDir, work: Callable[[], None]) -> Outcome:
    """Do `work` on a run that is held, its state saying so meanwhile and how it ended: "done", or "failed" and why."""
    started = run.state().get("started") or time.time()
    run.set_state("running", started=started, finished=None, log=log_path())
    try:
        work()
    except KeyboardInterrupt:
        run.set_state("pending", cause="interrupted", eta_s=None)
        raise
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        set_failed(run, describe(error))
        return "failed"
    return "done"


def set_failed(run: RunDir, cause: str, **extra: Any) -> None:
    """The run's end without success."""
    run.set_state("failed", cause=cause, finished=time.time(), eta_s=None, **extra)


def set_done(run: RunDir) -> None:
    """The run's end: trained and scored."""
    run.set_state("done", progress=1.0, eta_s=0.0, finished=time.time())


def _train_and_score(run: RunDir, cell: Cell, scoring: Scoring) -> None:
    from suite import data

    refuse_stale_run(run, cell)
    corpus = data.prepare(cell.data, cache=cache_of(run))
    if not run.state().get("trained"):
        from suite.train.loop import train

        begin(run, cell, corpus)
        with background_scoring.scored_beside(run, cell, scoring) as keep:
            train(cell, corpus, run, should_stop=keep)
        run.set_state("running", trained=True)
    score_missing(run, cell, corpus, scoring)
    set_done(run)


def cache_of(run: RunDir) -> Path:
    """Where corpora are prepared for the runs beside this one."""
    return run.path.parent.parent / "cache"


def refuse_stale_run(run: RunDir, cell: Cell) -> None:
    """Raise UserError if other code made what the run has."""
    stale = stale_because(run, cell)
    if stale is not None:
        raise UserError(f"{run.path}: stale: {stale}")


def begin(run: RunDir, cell: Cell, corpus: Corpus) -> None:
    """Record what is about to be trained, from a sibling's checkpoint where there is one; say where it stands."""
    from suite.models.accounting import account
    from suite.train.checkpoint import steps_saved

    accounted = account(cell.model, corpus.vocab_size, cell.data.seq_len).to_json()
    branches.begin(run, cell, account=accounted, versions=versions(), data_fingerprint=corpus.fingerprint)
    print(f"{run.name}: training from step {max(steps_saved(run), default=0)}", file=sys.stderr)


def lacks_scores(run: RunDir, cell: Cell) -> bool:
    """Whether a trained run is still to be scored, or its memory's use recorded."""
    has_memory = registry.family(cell.model.family).has_memory
    return bool(missing_evals(run, cell) or background_scoring.kept(run)) or (
        has_memory and not run.usage_path.exists()
    )


def score_missing(run: RunDir, cell: Cell, corpus: Corpus, scoring: Scoring, world: World | None = None) -> None:
    """Score checkpoints that wait for it, then the final weights on every evaluation that has no scores yet.

    Records how a memory is used, too. The processes of a `world` that are joined hold the model together, and all call
    this.
    """
    from suite.train.parallel import World

    world = world or World()
    background_scoring.score_kept(run, cell, corpus, scoring, world)
    wanted = missing_evals(run, cell)
    lacks_usage = registry.family(cell.model.family).has_memory and not run.usage_path.exists()
    world.wait()  # all have looked before one writes
    if not wanted and not lacks_usage:
        return
    import torch

    from suite.train.checkpoint import load_model, steps_saved

    # The cell's threads here, too: a run that was cut after training scores as one that was not.
    torch.set_num_threads(cell.threads)
    model = load_model(run, cell, corpus, world)
    facts = {"run": run.name, "step": steps_saved(run)[-1]}
    if lacks_usage:
        from suite.evaluate.usage import key_usage

        usage = key_usage(model, corpus, world.size)
        if world.is_first:
            run.write_usage(facts | usage)
    for config in cell.evaluate:
        if config.hash8 in wanted:
            scores = scoring.evaluator.evaluate(model, corpus, config)
            if world.is_first:
                run.write_eval(config.hash8, scores | facts)


def describe(error: BaseException) -> str:
    """A cause in one line: the exception's type and the first line of its message; advice comes behind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def log_path() -> str | None:
    """Where this process' output goes, if submitit started it."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return None
    import submitit

    return str(submitit.JobEnvironment().paths.stdout)
