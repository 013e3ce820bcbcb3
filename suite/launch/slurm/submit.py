"""Submit cells to Slurm through submitit: arrays for training and evaluation, then a report job.

The elements of an array request the same resources; each evaluation waits for its training, and the report for all
jobs. The number of jobs at once is limited over all arrays together.
"""

from __future__ import annotations

import shlex
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.branches import must_wait
from suite.launch.report import report_command, write_report
from suite.launch.scorer import Scorer
from suite.launch.scoring import needs_scoring
from suite.launch.slurm.job import CellJob, Stage
from suite.launch.slurm.profile import Profile
from suite.launch.slurm.queue import record_job, record_report
from suite.launch.slurm.resources import Shape, scoring_shape, shapes
from suite.records import GRIDS, RunDir, run_dir

MAX_DEATHS = 3
"""How often the process of a job may be killed; before that, the job's own script requeues it."""


@dataclass(frozen=True)
class Entry:
    """A cell to submit: its run, and the resources of its training and scoring; None if a stage is not needed."""

    run: RunDir
    shape: Shape | None
    scoring: Shape | None


@dataclass(frozen=True)
class Batch:
    """Cells whose jobs form one array per stage, and how many jobs of each stage may run at once."""

    entries: tuple[Entry, ...]
    cap: int
    eval_cap: int


@dataclass(frozen=True)
class Submission:
    """One call of sbatch: its script, and the ids of its jobs (none in a dry run)."""

    script: str
    jobs: tuple[str, ...] = ()


class _Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also return a script without submitting it."""

    @classmethod
    def affinity(cls) -> int:
        # So that scripts can be written without Slurm.
        return 1

    def script(self, count: int) -> str:
        """Return the exact batch script of `count` jobs."""
        if count > 1:
            self.parameters["map_count"] = count
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


class Submitter:
    """Submits jobs for a grid; with `dry`, it only collects the scripts in `sent`."""

    def __init__(
        self, grid: Grid, results: Path, profile: Profile, scorer: Scorer | None = None, dry: bool = False
    ) -> None:
        self.grid, self.results, self.profile, self.dry = grid, results, profile, dry
        self.scorer = scorer or Scorer()
        self.sent: list[Submission] = []

    @property
    def folder(self) -> Path:
        """The folder of the scripts, pickles and logs of this grid's jobs."""
        return jobs_folder(self.results, self.grid)

    def entries(self, cells: Sequence[Cell]) -> list[Entry]:
        """Return the stages that the cells need. Raises UserError for a cell that does not fit on the cluster."""
        planned = shapes(self.grid, cells, self.profile, self.results / "cache")
        entries = []
        for cell, shape in zip(cells, planned, strict=True):
            run = run_dir(self.results, cell)
            scored = needs_scoring(run, cell)
            trained = bool(run.state().get("trained"))
            scoring = scoring_shape(self.profile, cell, shape, self.results / "cache") if scored else None
            entries.append(Entry(run, None if trained else shape, scoring))
        return entries

    def submit(self, cells: Sequence[Cell], report: bool, alive: Sequence[str] = ()) -> dict[str, list[str]]:
        """Submit the stages that the cells need.

        Args:
            cells: Cells whose run directories are prepared.
            report: Whether to submit a report job, too.
            alive: Jobs of other cells that the report waits for.

        Returns:
            Run name -> its jobs; the report job under "report".
        """
        jobs: dict[str, list[str]] = {}
        after: list[str] = []
        for wave in _waves(cells, self.results):
            sent = self._wave(self.entries(wave), after)
            after = [job for ids in sent.values() for job in ids]
            jobs |= sent
        if report:
            jobs["report"] = [self._report([job for ids in jobs.values() for job in ids] + [*alive])]
        return jobs

    def _wave(self, entries: list[Entry], after: list[str]) -> dict[str, list[str]]:
        jobs: dict[str, list[str]] = {entry.run.name: [] for entry in entries}
        lanes: dict[int, list[str]] = {}
        for lane, batch in batches(entries, self.profile):
            before = after + lanes.get(lane, [])
            trained = self._stage(batch, "train", before, [], jobs) if batch.entries[0].shape else []
            scored = self._stage(batch, "evaluate", before, trained, jobs) if batch.entries[0].scoring else []
            lanes[lane] = trained + scored
        return jobs

    def _stage(
        self, batch: Batch, stage: Stage, after: list[str], behind: list[str], jobs: dict[str, list[str]]
    ) -> list[str]:
        shape = batch.entries[0].shape if stage == "train" else batch.entries[0].scoring
        assert shape is not None
        waits = _afterany(after) + _behind(behind)
        cap = batch.cap if stage == "train" else batch.eval_cap
        sent = self._array([entry.run for entry in batch.entries], stage, shape, waits, cap)
        for entry, job in zip(batch.entries, sent, strict=True):
            jobs[entry.run.name].append(job)
        return sent

    def score_retained(self, cells: Sequence[Cell], cap: int) -> dict[str, str]:
        """Submit the scoring of retained checkpoints, at most `cap` jobs at once; returns the job of each run."""
        groups: dict[Shape, list[RunDir]] = {}
        for entry in self.entries(cells):
            if entry.scoring is not None:
                groups.setdefault(entry.scoring, []).append(entry.run)
        jobs: dict[str, str] = {}
        for shape, runs in groups.items():
            jobs |= zip([run.name for run in runs], self._array(runs, "score", shape, [], cap), strict=True)
        return jobs

    def _array(self, runs: Sequence[RunDir], stage: Stage, shape: Shape, waits: list[str], cap: int) -> list[str]:
        """Submit one stage of runs with equal resources; returns its jobs."""
        calls = [CellJob(run.path.resolve(), stage, self.scorer, shape.parallel) for run in runs]
        sent = self._send(calls, self._parameters(shape, f"{self.grid.name}-{stage}", waits, cap))
        for run, (job, log) in zip(runs, sent, strict=True):
            if not self.dry:
                record_job(run, stage, job, log)
        return [job for job, _ in sent]

    def _report(self, after: list[str]) -> str:
        shape = Shape(cpus=1)
        name = f"{self.grid.name}-report"
        call = Report(self.grid.name, self.results.resolve())
        parameters = self._parameters(shape, name, _afterany(after), 1)
        ((job, log),) = self._send([call], parameters)
        if not self.dry:
            record_report(self.folder, job, log)
        return job

    def _send(self, calls: Sequence[Any], parameters: dict[str, Any]) -> list[tuple[str, Path]]:
        """Call sbatch once; returns the id and log of each job."""
        folder = self.folder / uuid.uuid4().hex[:8]
        executor = _Executor(folder, max_num_timeout=self.profile.max_cuts)
        executor.update_parameters(**parameters, teardown=_teardown(folder))
        if self.dry:
            number = len(self.sent) + 1
            self.sent.append(Submission(executor.script(len(calls))))
            made_up = [str(number)] if len(calls) == 1 else [f"{number}_{index}" for index in range(len(calls))]
            return [(job, folder) for job in made_up]
        try:
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            lines = [line for line in str(error).splitlines() if "sbatch" in line] or [str(error)]
            raise UserError(f"sbatch: {lines[-1].strip().removeprefix('sbatch: ')}") from None
        sent = [(str(job.job_id), Path(job.paths.stdout)) for job in jobs]
        self.sent.append(Submission(executor.script(len(calls)), tuple(job for job, _ in sent)))
        return sent

    def _parameters(self, shape: Shape, name: str, waits: list[str], cap: int) -> dict[str, Any]:
        """Return the parameters for submitit, without those that the profile leaves to the cluster."""
        profile = self.profile
        requested = {
            "job_name": name,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "time": profile.time,
            "nodes": shape.nodes,
            "ntasks_per_node": shape.tasks,
            "cpus_per_task": shape.cpus,
            "gpus_per_node": shape.gpus or None,
            "mem": None if shape.mem_gb is None else f"{round(shape.mem_gb * 1024)}M",
            "signal_delay_s": profile.warning_s,
            "array_parallelism": cap,
            "dependency": ",".join(waits) or None,
            "stderr_to_stdout": True,
            # Without this, the other processes would wait for one that died.
            "srun_args": ["--kill-on-bad-exit=1"],
            "setup": [*profile.setup, *environment(shape)],
            "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **profile.sbatch},
        }
        return {field: value for field, value in requested.items() if value is not None}


class Report:
    """The report job."""

    def __init__(self, grid: str, results: Path) -> None:
        self.grid, self.results = grid, results

    def __call__(self) -> None:
        """Fit and draw. Raises RuntimeError if no new report was written."""
        print(shlex.join(report_command(self.results, self.grid)), flush=True)
        if not write_report(self.results, self.grid):
            raise RuntimeError(f"the report of {self.grid} failed; its output is above")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Start again after a requeue."""
        return submitit.helpers.DelayedSubmission(self)


def jobs_folder(results: Path, grid: Grid) -> Path:
    """Return the folder of the scripts, pickles and logs of a grid's jobs."""
    return (results / GRIDS / grid.name / "slurm").resolve()


def environment(shape: Shape) -> list[str]:
    """Return shell lines that set the environment of a job's processes.

    Since Slurm 22.05 srun does not inherit its number of cores from the job. Row gradients change their size at every
    step: without expandable segments they fragment the memory that PyTorch's allocator holds on a GPU.
    """
    lines = [f"export OMP_NUM_THREADS={shape.cpus}", "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]
    return [*lines, "export PYTORCH_ALLOC_CONF=expandable_segments:True"] if shape.gpus else lines


def _teardown(folder: Path) -> list[str]:
    """Return shell lines after srun: requeue a job whose process was killed (kill -9, out of memory), a few times.

    submitit requeues a job that was warned, and Slurm one whose node was lost.
    """
    deaths = f"{shlex.quote(str(folder))}/$SLURM_JOB_ID.deaths"
    return [
        "code=$?",
        f'if [ "$code" -gt 128 ] && [ "$code" -lt 255 ] && echo "$code" >> {deaths} && '
        f'[ "$(wc -l < {deaths})" -lt {MAX_DEATHS} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]


def batches(entries: Sequence[Entry], profile: Profile) -> list[tuple[int, Batch]]:
    """Group the entries into arrays of equal resources, each with its lane and its share of the caps.

    If there are more arrays than jobs at once, some share a lane, in which each waits for the one before it.
    """
    groups: dict[tuple[Shape | None, Shape | None], list[Entry]] = {}
    for entry in entries:
        if entry.shape is not None or entry.scoring is not None:
            groups.setdefault((entry.shape, entry.scoring), []).append(entry)
    arrays = [
        tuple(group[first : first + profile.max_array])
        for group in groups.values()
        for first in range(0, len(group), profile.max_array)
    ]
    lanes = max(1, min(len(arrays), profile.max_jobs, profile.max_eval_jobs))
    sizes = [max((len(array) for array in arrays[lane::lanes]), default=0) for lane in range(lanes)]
    caps, eval_caps = shares(sizes, profile.max_jobs), shares(sizes, profile.max_eval_jobs)
    return [
        (number % lanes, Batch(array, caps[number % lanes], eval_caps[number % lanes]))
        for number, array in enumerate(arrays)
    ]


def shares(sizes: Sequence[int], cap: int) -> list[int]:
    """Divide `cap` among lanes of these sizes: at least one each, at most its size, at most `cap` in total."""
    caps = [1] * len(sizes)
    for _ in range(cap - len(sizes)):
        largest = max(range(len(sizes)), key=lambda lane: sizes[lane] / caps[lane])
        if caps[largest] >= sizes[largest]:
            break
        caps[largest] += 1
    return caps


def _waves(cells: Sequence[Cell], results: Path) -> Iterable[list[Cell]]:
    """Return the cells in order: those that start from another cell's checkpoint come in a later wave."""
    left = list(cells)
    while left:
        waiting = [cell for cell in left if must_wait(cell, run_dir(results, cell), left)]
        yield [cell for cell in left if cell not in waiting] if len(waiting) < len(left) else left
        left = waiting if len(waiting) < len(left) else []


def _afterany(jobs: Iterable[str]) -> list[str]:
    """Return a dependency on the end of jobs; each array is named once."""
    arrays = sorted({job.partition("_")[0] for job in jobs}, key=int)
    return [f"afterany:{':'.join(arrays)}"] if arrays else []


def _behind(jobs: Sequence[str]) -> list[str]:
    """Return a dependency on success: of each array element on the same element of the other array."""
    if not jobs:
        return []
    array, is_array, _ = jobs[0].partition("_")
    return [f"{'aftercorr' if is_array else 'afterok'}:{array}"]
