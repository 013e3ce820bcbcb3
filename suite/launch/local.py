"""Where jobs run: each is one process of this machine, started through submitit, given a run directory's path."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from suite.launch.scorer import Scorer
from suite.launch.worker import Outcome, run_cell

TIME_LIMIT_MIN = 30 * 24 * 60
"""submitit ends a local job after two minutes unless told otherwise; a cell may train for weeks."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(run_path: Path, scoring: Scorer, threads: int, gpu: int | None) -> submitit.Job[Outcome]:
    """Start `run_cell(run_path, scoring)` in a process of its own and return at once.

    Ctrl-C on a terminal reaches that process, too, and cuts it; so does `stop`.

    Args:
        run_path: the run's directory; logs and submitit's files go to a fresh folder in its `logs`.
        scoring: what its scoring may use.
        threads: CPU threads of the process.
        gpu: the one GPU it may see; None: no GPU.
    """
    # A folder for each start: submitit names files by process id, which comes round again.
    folder = run_path.resolve() / "logs" / uuid.uuid4().hex[:8]
    executor = submitit.LocalExecutor(folder)
    gpus = {} if gpu is None else {"gpus_per_node": 1, "visible_gpus": (gpu,)}
    executor.update_parameters(timeout_min=TIME_LIMIT_MIN, stderr_to_stdout=True, **gpus)
    # submitit's controller, between us and that process, would print a traceback on Ctrl-C: it never sees it.
    with _environment(dict.fromkeys(THREAD_VARIABLES, str(threads))), _interrupts_blocked():
        return executor.submit(_run_stoppable, run_path.resolve(), scoring)


def stop(job: submitit.Job[Outcome]) -> None:
    """Cut a job that was started here: its run resumes from its newest checkpoint. Harmless on one that has ended."""
    if not job.done():
        os.kill(int(job.job_id), signal.SIGTERM)  # the controller passes it on


def _run_stoppable(run_path: Path, scoring: Scorer) -> Outcome:
    """`run_cell`, interrupted by SIGINT and SIGTERM alike (submitit ignores the second), and by one of them only."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return run_cell(run_path, scoring, log=Path(submitit.JobEnvironment().paths.stdout))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started inside have SIGINT blocked, until they say otherwise; ours waits till the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
