"""Scores of a run's checkpoints during training, computed by another process so that training does not wait.

Between steps the training process retains each checkpoint that is due: hard links in the run's `to_score/step-N`, which
take no space until the trainer drops its own files. The other process scores retained checkpoints, oldest first, and
ends when its standard input is closed, which the system does when training dies. Checkpoints that are not scored by the
end of training are scored then. The last checkpoint is not retained: it gets the run's own scores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from suite.launch.scorer import Scorer, cache_of
from suite.records import RunDir
from suite.train.checkpoint import load_model, steps_saved
from suite.train.parallel import World

if TYPE_CHECKING:
    from suite.cells import Cell, EvalConfig
    from suite.data.corpus import Corpus

POLL_S = 0.2
NICENESS = 10


@contextmanager
def scored_in_background(run: RunDir, cell: Cell, scorer: Scorer) -> Iterator[Callable[[], None]]:
    """Yield a function for training to call between steps: it retains the checkpoints that are due.

    The scoring process starts with the first retained checkpoint. It is killed if training is interrupted or fails.

    Args:
        run: The run in training.
        cell: Its cell, with the evaluations to score.
        scorer: Settings for scoring.
    """
    process: subprocess.Popen[bytes] | None = None

    def retain() -> None:
        nonlocal process
        if retain_due(run, cell) and process is None:
            settings = (scorer.data_root or "", scorer.run_code or "")
            # A separate session, which Ctrl-C does not reach: the process ends when its standard input is closed.
            process = subprocess.Popen(
                [sys.executable, "-m", "suite.launch.background_scoring", run.path, *settings],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                start_new_session=True,
            )

    try:
        yield retain
    except BaseException:
        if process is not None:
            process.kill()  # its score files are whole, and unscored checkpoints stay retained
        raise
    finally:
        if process is not None:
            process.communicate()


def retain_due(run: RunDir, cell: Cell) -> bool:
    """Retain the saved checkpoints that are due and lack scores; returns whether any are waiting to be scored."""
    every = cell.train.evaluate_every
    if every is None or not of_checkpoints(cell):
        return False
    for step in steps_saved(run):
        folder = retained_folder(run) / f"step-{step}"
        if step % every or folder.exists() or not _lacks_scores(run, cell, step):
            continue
        temporary = folder.with_name(f".step-{step}")
        shutil.rmtree(temporary, ignore_errors=True)
        source = run.checkpoints / folder.name
        shutil.copytree(source, temporary / "checkpoints" / folder.name, copy_function=os.link)
        temporary.rename(folder)
    return bool(retained_steps(run))


def retained_folder(run: RunDir) -> Path:
    """Return the folder of checkpoints that wait to be scored."""
    return run.path / "to_score"


def retained_steps(run: RunDir) -> list[int]:
    """Return the steps whose checkpoints wait to be scored, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in retained_folder(run).glob("step-*"))


def score_retained(
    run: RunDir,
    cell: Cell,
    corpus: Corpus,
    scorer: Scorer,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Score the retained checkpoints, into eval/steps/<hash8>-<step>.json, and drop them.

    Args:
        run: The run, in training or trained.
        cell: Its cell, with the evaluations to score.
        corpus: The cell's corpus.
        scorer: Settings for scoring.
        world: The processes that hold the model together, all of which call this.
        should_stop: Called between checkpoints.
    """
    while not should_stop():
        waiting = retained_steps(run) if world.is_first else []  # training may have added some
        step = int(world.total(waiting[0] if waiting else 0)[0])
        if not step:
            return
        folder = retained_folder(run) / f"step-{step}"
        wanted = [config for config in of_checkpoints(cell) if not run.has_eval(step_name(config.hash8, step))]
        world.wait()  # every process has looked before one of them writes
        model = load_model(RunDir(folder), cell, corpus, world)
        tokens = step * cell.train.batch_rows * cell.data.seq_len
        for config in wanted:
            scores = scorer.evaluator.evaluate(model, corpus, config)
            if world.is_first:
                facts = {"run": run.name, "step": step, "tokens": tokens}
                run.write_eval(step_name(config.hash8, step), scores | facts)
        world.wait()
        if world.is_first:
            shutil.rmtree(folder)


def of_checkpoints(cell: Cell) -> list[EvalConfig]:
    """Return the evaluations of checkpoints; tables are switched off in finished runs only."""
    return [config for config in cell.evaluate if not config.table_off]


def step_name(hash8: str, step: int) -> str:
    """Return the name of an evaluation's scores at a step, for `RunDir.write_eval`."""
    return f"steps/{hash8}-{step}"


def _lacks_scores(run: RunDir, cell: Cell, step: int) -> bool:
    return any(not run.has_eval(step_name(config.hash8, step)) for config in of_checkpoints(cell))


def main(run_path: str, data_root: str, run_code: str) -> None:
    """Score a run's retained checkpoints until standard input ends.

    Args:
        run_path: The run directory.
        data_root: The folder of evaluation data; empty: the hub.
        run_code: The sandbox for programs that models write; empty: none.
    """
    import torch

    from suite.data.corpus import prepare

    os.nice(NICENESS)
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    run = RunDir(Path(run_path))
    cell = run.read_cell()
    torch.set_num_threads(cell.threads)
    scorer = Scorer(Path(data_root) if data_root else None, run_code or None)  # type: ignore[arg-type]
    corpus = prepare(cell.data, cache=cache_of(run))
    while True:
        score_retained(run, cell, corpus, scorer, World(), ended.is_set)
        if ended.wait(POLL_S):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
