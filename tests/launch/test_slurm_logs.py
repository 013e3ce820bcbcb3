"""The end of a Slurm job as read from its log."""

from pathlib import Path

import pytest

from suite.launch.slurm import queue

EXCEEDED = "slurmstepd-node1: error: StepId=66.0 exceeded memory limit (313778176 > 157286400), being killed"
STEP = [
    "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
    "slurmstepd-node1: error: Exceeded job memory limit",
    "slurmstepd-node1: error: *** STEP 66.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***",
    "srun: error: node1: task 0: Killed",
    "srun: Terminating StepId=66.0",
]


@pytest.mark.parametrize(
    "lines",
    [
        [EXCEEDED, *STEP],
        [*STEP, EXCEEDED],
        ["slurmstepd: error: Detected 1 oom-kill event(s) in StepId=66.0.", *STEP[:1], *STEP[2:], "", "", "last"],
        STEP,
    ],
)
def test_a_memory_kill_is_recognized_wherever_slurm_reports_it(tmp_path: Path, lines: list[str]) -> None:
    log = tmp_path / "job.out"
    log.write_text("\n".join(["step 100 loss 2.31"] * 200 + lines) + "\n")
    assert queue.with_memory_kills("FAILED", log) == "OUT_OF_MEMORY"


def test_a_failure_long_after_a_memory_kill_is_only_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    log.write_text("\n".join([EXCEEDED, *STEP, *["step 100 loss 2.31"] * 100, "ValueError: no data"]) + "\n")
    assert queue.with_memory_kills("FAILED", log) == "FAILED"
    assert queue.with_memory_kills("TIMEOUT", None) == "TIMEOUT"
