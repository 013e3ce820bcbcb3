"""Scores of a run's checkpoints while it trains, made by another process: training does not wait for them.

Between steps the training process keeps a checkpoint that is due: hard links to it in `to_score/step-N` of the run, so
that it costs no room until the trainer drops its own. The other process scores what is kept, oldest first, with
requests made once, and ends when its standard input does, which the system sees to when training dies. What it has not
come to by the end of training is scored then. The last checkpoint is not kept: it gets the run's own scores.
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

from suite.records import RunDir
from suite.train.checkpoint import load_model, steps_saved

if TYPE_CHECKING:
    from suite.cells import Cell
    from suite.data import Corpus
    from suite.launch.worker import Scoring
    from suite.train.parallel import World

POLL_S = 0.2
NICENESS = 10


@contextmanager
def scored_beside(run: RunDir, cell: Cell, scoring: Scoring) -> Iterator[Callable[[], bool]]:
    """Gives what training is to ask between steps; its answer, whether to stop, is always no."""
    job: subprocess.Popen[bytes] | None = None

    def keep() -> bool:
        nonlocal job
        if keep_due(run, cell) and job is None:
            means = (scoring.data_root or "", scoring.run_code or "")
            # A session of its own: Ctrl-C is for training, and the end of standard input tells it.
            job = subprocess.Popen(
                [sys.executable, "-m", "suite.launch.background_scoring", run.path, *means],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                start_new_session=True,
            )
        return False

    try:
        yield keep
    except BaseException:
        if job is not None:
            job.kill()  # what it has written is whole, what it has not done is kept
        raise
    finally:
        if job is not None:
            job.communicate()


def keep_due(run: RunDir, cell: Cell) -> bool:
    """Keep the checkpoints that are there, are due, and have no scores; whether any wait to be scored."""
    every = cell.train.evaluate_every
    if every is None or not cell.evaluate:
        return False
    for step in steps_saved(run):
        folder = folder_of(run) / f"step-{step}"
        if step % every or folder.exists() or not _lacking(run, cell, step):
            continue
        beside = folder.with_name(f".step-{step}")
        shutil.rmtree(beside, ignore_errors=True)
        source = run.checkpoints / folder.name
        shutil.copytree(source, beside / "checkpoints" / folder.name, copy_function=os.link)
        beside.rename(folder)
    return bool(kept(run))


def folder_of(run: RunDir) -> Path:
    """Where the checkpoints that wait to be scored are kept."""
    return run.path / "to_score"


def kept(run: RunDir) -> list[int]:
    """The steps whose checkpoints wait to be scored, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder_of(run).glob("step-*"))


def score_kept(
    run: RunDir,
    cell: Cell,
    corpus: Corpus,
    scoring: Scoring,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Score what waits, into eval/steps/<hash8>-<step>.json; `should_stop` is asked between checkpoints.

    All processes of a `world` that are joined call this.
    """
    while not should_stop():
        waiting = kept(run) if world.is_first else []  # more may come meanwhile
        step = int(world.total(waiting[0] if waiting else 0)[0])
        if not step:
            return
        folder = folder_of(run) / f"step-{step}"
        wanted = [config for config in cell.evaluate if not run.has_eval(step_name(config.hash8, step))]
        world.wait()  # all have looked before one writes
        model = load_model(RunDir(folder), cell, corpus, world)
        tokens = step * cell.train.batch_rows * cell.data.seq_len
        for config in wanted:
            scores = scoring.evaluator.evaluate(model, corpus, config)
            if world.is_first:
                facts = {"run": run.name, "step": step, "tokens": tokens}
                run.write_eval(step_name(config.hash8, step), scores | facts)
        world.wait()
        if world.is_first:
            shutil.rmtree(folder)


def step_name(hash8: str, step: int) -> str:
    """The name of an evaluation's scores at a step, as `RunDir.write_eval` takes it."""
    return f"steps/{hash8}-{step}"


def _lacking(run: RunDir, cell: Cell, step: int) -> bool:
    return any(not run.has_eval(step_name(config.hash8, step)) for config in cell.evaluate)


def main(run_path: str, data_root: str, run_code: str) -> None:
    """Score what is kept of a run until standard input ends."""
    import torch

    from suite import data
    from suite.launch.worker import Scoring, cache_of
    from suite.train.parallel import World

    os.nice(NICENESS)
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    run = RunDir(Path(run_path))
    cell = run.read_cell()
    torch.set_num_threads(cell.threads)
    scoring = Scoring(Path(data_root) if data_root else None, run_code or None)  # type: ignore[arg-type]
    corpus = data.prepare(cell.data, cache=cache_of(run))
    while True:
        score_kept(run, cell, corpus, scoring, World(), ended.is_set)
        if ended.wait(POLL_S):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
