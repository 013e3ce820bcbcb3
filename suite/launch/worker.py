"""What a job does: hold a run's lock, train what is missing, score what is missing, and record how it ended.

A job is given the path of a run directory; everything else it needs is there. Heavy modules are imported where they
are needed: importing lm-eval takes longer than training a small cell.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from suite.atomic import write_text
from suite.errors import DiskFull, UserError
from suite.launch import background_scoring, branches
from suite.launch.derived import quantise
from suite.launch.interruption import Interruption
from suite.launch.preparation import train_lost_end_again
from suite.launch.provenance import device_name, stale_because, versions
from suite.launch.scorer import Scorer, cache_of, missing_evals
from suite.launch.scoring import needs_scoring, score_missing, set_done
from suite.records import Locked, RunDir
from suite.train.parallel import Parallel, World, process_group

if TYPE_CHECKING:
    from suite.cells import Cell
    from suite.data.corpus import Corpus

INTERRUPTED = "interrupted"
"""The cause of a pending run that was stopped by a signal."""
DISK_FULL = os.EX_IOERR
"""The exit code of a process that found no space for a file of its run; the run is pending."""

Outcome = Literal["done", "failed", "locked"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FIRST_CAUSE_S = 2.0
"""Seconds that the first process waits for another process to record the cause of its failure."""


def run_cell(
    run_path: Path,
    scorer: Scorer | None = None,
    interruption: Interruption | None = None,
    log: Path | None = None,
) -> Outcome:
    """Bring the run at `run_path` to its end: train from its newest checkpoint, then add the missing scores.

    Does nothing to a run that is finished, failed, damaged, or held by another process ("locked"). A failure is
    recorded with its cause and not raised, so that other cells continue.

    Args:
        run_path: The run directory, with a cell.json.
        scorer: Settings for scoring; None: the defaults.
        interruption: Once it is requested, training ends its step, saves a checkpoint and stops; None: never.
        log: The file that this process writes its output to, for the run's state.

    Raises:
        KeyboardInterrupt: The run was interrupted; it is pending and can be resumed.
        DiskFull: There is no space for a file of the run, which is pending and can be resumed.
    """
    run = RunDir(run_path)
    interruption = interruption or Interruption()
    try:
        with run.lock():
            if (outcome := _standing(run)) is not None:
                return outcome
            cell = run.read_cell()
            return attempt(
                run, lambda: _train_and_score(run, cell, scorer or Scorer(), interruption), interruption, log
            )
    except Locked:
        return "locked"


def run_cell_together(
    run_path: Path,
    world: World,
    scorer: Scorer | None = None,
    interruption: Interruption | None = None,
    log: Path | None = None,
) -> Outcome:
    """Do what `run_cell` does, in all processes of a world, for instance those of torchrun.

    All of them call it. The first holds the run's lock and writes the records; they stop after the same step.

    Args:
        run_path: The run directory, with a cell.json.
        world: The processes.
        scorer: Settings for scoring; None: the defaults.
        interruption: Once it is requested in any process, training saves and stops in all; None: never.
        log: The file that the processes write their output to, for the run's state.

    Raises:
        KeyboardInterrupt: The run was interrupted; it is pending and can be resumed.
        Exception: What failed in this process; the run has failed, with the cause that was recorded first.
    """
    run, interruption = RunDir(run_path), interruption or Interruption()
    with ExitStack() as stack:
        outcome: Outcome | None = None
        if world.is_first:
            try:
                stack.enter_context(run.lock())
                outcome = _standing(run)
            except Locked:
                outcome = "locked"
        number = world.total(0 if outcome is None else 1 + OUTCOMES.index(outcome))[0]
        if number:
            return OUTCOMES[int(number) - 1]
        cell = run.read_cell()
        if world.is_first:
            started = run.state().get("started") or time.time()
            run.set_state("running", started=started, finished=None, log=None if log is None else str(log))
        try:
            _train_and_score_together(run, cell, world, scorer or Scorer(), interruption)
        except BaseException as error:
            if isinstance(error, DiskFull):
                if world.is_first:
                    _wait_for_space(run, error)
                raise
            is_stopped = isinstance(error, KeyboardInterrupt) or interruption.requested
            if is_stopped and world.is_first and run.state()["state"] == "running":
                run.set_state("pending", cause=INTERRUPTED, eta_s=None)
            if is_stopped:
                raise KeyboardInterrupt from None
            if world.is_first:
                time.sleep(FIRST_CAUSE_S)  # the others fail as a consequence of the first failure, which has the cause
            first_is_alive = world.is_first or run.is_locked()  # otherwise it was killed, and the run can be resumed
            if isinstance(error, Exception) and first_is_alive and run.state()["state"] == "running":
                set_failed(run, describe(error))
            raise
    return "done"


def _standing(run: RunDir) -> Outcome | None:
    """Return how a run ended, whose lock this process holds; None if something is left to do."""
    if (damage := run.damage()) is not None:
        print(damage, file=sys.stderr)
        return "failed"
    state = run.state()["state"]
    if state == "failed":
        return "failed"
    return "done" if state == "done" and not missing_evals(run, run.read_cell()) else None


def _train_and_score_together(
    run: RunDir, cell: Cell, world: World, scorer: Scorer, interruption: Interruption
) -> None:
    from suite.train.loop import train

    if world.is_first and needs_scoring(run, cell):
        train_lost_end_again(run)
    is_trained = world.any(world.is_first and bool(run.state().get("trained")))
    if cell.source is not None and not is_trained:
        raise UserError(f"{run.path}: several processes cannot quantise a run; suite quantise does it in one")
    corpus = prepare_together(
        run, cell, world, (lambda corpus: None) if is_trained else partial(begin, run, cell, scorer=scorer)
    )
    if not is_trained:
        with interruption.deferred():

            def should_stop() -> bool:
                if world.is_first:
                    background_scoring.retain_due(run, cell)  # scored at the end of training
                return interruption.requested

            if train(cell, corpus, run, world, should_stop) != "done":
                raise KeyboardInterrupt
        if world.is_first:
            run.set_state("running", trained=True)
    score_missing(run, cell, corpus, scorer, world)
    if world.is_first:
        set_done(run)


def prepare_together(
    run: RunDir, cell: Cell, world: World, then: Callable[[Corpus], None] = lambda corpus: None
) -> Corpus:
    """Return the run's corpus, which the first process prepares before the others read it.

    Args:
        run: The run.
        cell: Its cell.
        world: The processes, all of which call this.
        then: Called by the first process with the corpus, before the others read it.

    Raises:
        UserError: The run is stale, or its data cannot be used.
    """
    from suite.data.corpus import prepare

    if world.is_first:
        refuse_stale_run(run, cell)
        corpus = prepare(cell.data, cache=cache_of(run))
        then(corpus)
    world.wait()
    return corpus if world.is_first else prepare(cell.data, cache=cache_of(run))


def attempt(
    run: RunDir, work: Callable[[], None], interruption: Interruption | None = None, log: Path | None = None
) -> Outcome:
    """Do `work` on a run whose lock is held, and record in its state that it runs and how it ended.

    Args:
        run: The run.
        work: Raises an exception if it fails.
        interruption: An exception after it was requested is an interruption, whatever its type: torch turns a
            KeyboardInterrupt inside of a write into a RuntimeError.
        log: The file with the output of this process.

    Returns:
        "done", or "failed" with the cause in the state.

    Raises:
        KeyboardInterrupt: `work` was interrupted; the run is pending.
        DiskFull: There is no space for a file of the run, which is pending.
    """
    started = run.state().get("started") or time.time()
    run.set_state("running", started=started, finished=None, log=None if log is None else str(log))
    try:
        work()
    except DiskFull as error:
        _wait_for_space(run, error)
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or (interruption is not None and interruption.requested):
            run.set_state("pending", cause=INTERRUPTED, eta_s=None)
            raise KeyboardInterrupt from None
        if not isinstance(error, Exception):
            raise
        if not isinstance(error, UserError):
            traceback.print_exc()
        set_failed(run, describe(error))
        return "failed"
    return "done"


def _wait_for_space(run: RunDir, error: DiskFull) -> None:
    """Leave the run pending: the cell is not at fault, and resumes once there is space."""
    with suppress(DiskFull):  # without space for its state the run stays "running" without a lock, which is pending
        run.set_state("pending", cause=str(error), eta_s=None)


def set_failed(run: RunDir, cause: str, **extra: Any) -> None:
    """Record that the run failed."""
    run.set_state("failed", cause=cause, finished=time.time(), eta_s=None, **extra)


def _train_and_score(run: RunDir, cell: Cell, scorer: Scorer, interruption: Interruption) -> None:
    from suite.data.corpus import prepare

    refuse_stale_run(run, cell)
    if cell.imported is not None and not run.state().get("trained"):
        raise UserError(f"{run.path}: its checkpoint is not complete; suite import completes it")
    corpus = prepare(cell.data, cache=cache_of(run))
    if needs_scoring(run, cell):
        train_lost_end_again(run)
    if not run.state().get("trained"):
        if cell.source is not None:
            quantise.make(run, cell, corpus)
        else:
            begin(run, cell, corpus, scorer)
            _train(run, cell, corpus, scorer, interruption)
            run.set_state("running", trained=True, progress=1.0, eta_s=None)
    if interruption.requested:
        raise KeyboardInterrupt
    score_missing(run, cell, corpus, scorer)
    set_done(run)


def _train(run: RunDir, cell: Cell, corpus: Corpus, scorer: Scorer, interruption: Interruption) -> None:
    """Train to the end. Raises KeyboardInterrupt after an interruption, once a step has ended and is saved."""
    from suite.train.loop import train

    with background_scoring.scored_in_background(run, cell, scorer) as retain_due, interruption.deferred():

        def should_stop() -> bool:
            retain_due()
            return interruption.requested

        if train(cell, corpus, run, should_stop=should_stop) != "done":
            raise KeyboardInterrupt


def refuse_stale_run(run: RunDir, cell: Cell) -> None:
    """Raise UserError if the run's weights were made by other code."""
    stale = stale_because(run, cell)
    if stale is not None:
        raise UserError(
            f"{run.path} was made by other code or defaults ({stale}); move it away to train the cell again, or use "
            "the code that made it"
        )


def begin(run: RunDir, cell: Cell, corpus: Corpus, scorer: Scorer) -> None:
    """Write cell.json before training, and start from a sibling's checkpoint if there is one.

    Args:
        run: The run.
        cell: Its cell.
        corpus: Its corpus.
        scorer: Settings for scoring.

    Raises:
        UserError: The run's parent cannot be used, settings do not suit the device or the length of the run, or the
            tokenizer cannot encode the texts that are to be scored.
    """
    from suite.launch.checks.settings import refuse_tf32_without_gpu, refuse_unfit_settings
    from suite.models.accounting import account
    from suite.train.finetuning import parent
    from suite.train.loop import total_steps

    refuse_tf32_without_gpu(cell)
    loader = corpus.loader(cell.seed, cell.train.batch_rows)
    refuse_unfit_settings(cell, total_steps(cell.train, loader, cell.data.seq_len))
    if corpus.tokenizer.loses_text:
        scorer.refuse_lost_parts(cell, corpus)
    facts = {
        "account": account(cell.model, corpus.vocab_size, cell.data.seq_len).to_json(),
        "versions": versions(),
        "device": device_name(),
        "data_fingerprint": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.fingerprint,
    }
    branches.begin(run, cell, **facts, **parent.facts(run, cell, corpus))
    write_text(run.tokenizer_path, corpus.tokenizer.to_json())


def describe(error: BaseException) -> str:
    """Return a cause in one line: the exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main(run_path: str, log: str, data_root: str, run_code: str, parallel: str | None = None) -> None:
    """Run a cell in this process, which a sweep has started; exit code 130 after an interruption.

    Args:
        run_path: The run directory.
        log: The file that this process writes its output to.
        data_root: The folder of evaluation data; empty: the hub.
        run_code: The sandbox for programs that models write; empty: none.
        parallel: How the processes of the environment divide the cell, as JSON; None: this process trains it alone.
    """
    interruption, path = Interruption(), Path(run_path)
    scorer = Scorer(Path(data_root) if data_root else None, run_code or None)  # type: ignore[arg-type]
    with interruption.on_signals():
        try:
            if parallel is None:
                run_cell(path, scorer, interruption, Path(log))
            else:
                with process_group(Parallel.model_validate_json(parallel)) as world:
                    run_cell_together(path, world, scorer, interruption, Path(log))
        except DiskFull as error:
            print(error, file=sys.stderr)
            sys.exit(DISK_FULL)
        except UserError as error:  # recorded in the run's state
            sys.exit(str(error))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
