"""A table of every compiled Triton kernel, without a GPU: `python -m kernels.bench --compile [--shapes TEXT] [--json]`.

The work is divided among PROCESSES processes, each of them this file run as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.bench.ahead_of_time import capture
from kernels.bench.launches import Call, calls
from kernels.bench.prediction import Compiled, predict

__all__ = ["main"]

PROCESSES = 2
"""Number of processes that compile at the same time."""


@dataclass(frozen=True)
class Failure:
    """A call that did not compile, and the compiler's last line."""

    shape: str
    architecture: str
    error: str


def chosen(every: bool, shapes: str) -> list[Call]:
    """Return the calls whose shape contains a text.

    Args:
        every: All combinations of settings instead of a selection.
        shapes: The text.
    """
    return [call for call in calls(every) if shapes in call.shape]


def compile_all(every: bool, shapes: str) -> Iterator[list[Compiled] | Failure]:
    """Return what each of the `chosen` calls compiles to, in their order.

    Args:
        every: All combinations of settings instead of a selection.
        shapes: A text that their shapes contain.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "kernels.bench.compile"]
    count = len(chosen(every, shapes))
    shares = range(min(PROCESSES, count))
    settings = [json.dumps({"every": every, "shapes": shapes, "share": share}) for share in shares]
    workers = [
        subprocess.Popen([*command, text], stdout=subprocess.PIPE, env=environment, text=True) for text in settings
    ]
    try:
        for nth in range(count):
            output = workers[nth % PROCESSES].stdout
            assert output is not None
            text = output.readline()
            if not text:
                raise RuntimeError("a process that compiles has ended early; its error stands above")
            result = json.loads(text)
            yield Failure(**result) if isinstance(result, dict) else [Compiled(**row) for row in result]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def work(every: bool, shapes: str, share: int) -> None:
    """Compile one process's share of the calls and print one line of JSON for each.

    Args:
        every: All combinations of settings instead of a selection.
        shapes: A text that their shapes contain.
        share: The number of the process.
    """
    for call in chosen(every, shapes)[share::PROCESSES]:
        result = compile_call(call)
        rows = asdict(result) if isinstance(result, Failure) else [asdict(row) for row in result]
        print(json.dumps(rows), flush=True)


def compile_call(call: Call) -> list[Compiled] | Failure:
    """Run one call; each compiled variant once."""
    try:
        with capture(call.architecture) as launches:
            call.run()
    except Exception as error:  # whatever the compiler raises is the result
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        return Failure(call.shape, f"sm_{call.architecture}", text[-1])
    variants = {launch.variant: launch for launch in launches}
    return [predict(launch, call.shape) for launch in variants.values()]


def main(every: bool, as_json: bool, shapes: str = "") -> int:
    """Print the table, or one JSON document; 1 where something did not compile."""
    rows: list[Compiled] = []
    failures: list[Failure] = []
    if not as_json:
        print(heading())
    for result in compile_all(every, shapes):
        if isinstance(result, Failure):
            failures.append(result)
            print(f"did not compile: {result.shape} on {result.architecture}: {result.error}", file=sys.stderr)
            continue
        rows += result
        if not as_json:
            print(*map(line, result), sep="\n", flush=True)
    if as_json:
        print(json.dumps(document(rows, failures)))
    return 1 if failures else 0


def document(rows: Sequence[Compiled], failures: Sequence[Failure]) -> dict[str, Any]:
    """Return the JSON document: compiler version, compiled variants, calls that failed."""
    import triton

    return {
        "triton": triton.__version__,
        "kernels": [asdict(row) for row in rows],
        "failures": [asdict(failure) for failure in failures],
    }


def heading() -> str:
    """Return the table's first line."""
    return (
        f"{'kernel':20} {'arch':6} {'regs':>4} {'spills':>11} {'shared':>7} {'warps':>5} {'load':>4} {'occupancy':>9} "
        f"{'in flight/needed, KiB':>21} {'roof, predicted':>15}  shape"
    )


def line(row: Compiled) -> str:
    """Format one compiled variant as a row of the table."""
    spills = f"{row.spill_stores}/{row.spill_loads}"
    flight = f"{row.in_flight / 1024:.0f}/{row.needed / 1024:.0f}"
    return (
        f"{row.kernel:20} {row.architecture:6} {row.registers:4} {spills:>11} {row.shared:7} {row.warps:5} "
        f"{row.load_bytes:4} {row.occupancy:9.0%} {flight:>21} {row.roof_share:15.0%}  {row.shape}"
    )


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
