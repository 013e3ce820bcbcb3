"""How fast the kernels are, beside torch's own: `python -m kernels.bench [--device cpu|cuda] [--json] [--out DIR]`.

Every competitor takes its turn in every round, and ratios are taken within a round: machines are noisy. A result is
given only if the competitor's own check passed in the same run. On CPU one thread is used and its CPU time is
measured, so that other processes count little; on CUDA, events. What is measured:
`forward`      weighted bags, against F.embedding_bag
`step`         from the output's gradient to the updated table, with clipping: replay, backward and update together
               (replay happens before the forward pass, but is the price of a sparse update), against dense backward
               + clip_grad_norm_ + AdamW(fused=True), and against sparse gradients + SparseAdam (another optimizer:
               no weight decay, no clipping, no decay of untouched moments)
`search`       product keys (half_keys = sqrt(rows)), against torch.topk on both sides and on all pairs

`bytes` counts what must move: a table row and an output gradient once per lookup, and per unique row the compact
gradient twice and values and both moments in and out; more than the copy bandwidth means that a cache helps.
`copy_share` is bytes per second over the measured copy
bandwidth (read + written). Nothing has been measured on CUDA yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kernels.bench_cases import Case, Contender, forward, search, step, stepper


@dataclass(frozen=True)
class Result:
    """One contender in one case; times in milliseconds, ratios to the case's first opponent, per round."""

    operator: str
    contender: str
    device: str
    use: str
    width: int
    rows: int
    lookups: int
    bag: int
    unique: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    bytes: int
    gb_per_s: float
    copy_share: float
    parts_ms: str
    peak_bytes: int


QUANTILES = ("p20", "p50", "p80")
PEAK_ROWS = 1 << 20
"""Peak memory is measured for tables of at least this many rows."""

CPU_CASES = [Case(64, 1 << power, 110_000, 32, use) for power in (14, 16, 18, 20) for use in ("uniform", "zipf")]
"""Width 64 and 110,000 lookups a step."""
CUDA_CASES = [
    Case(width, 1 << power, tokens * 128, 128, "uniform", dtype=torch.bfloat16)
    for width in (768, 1024, 2048, 4096)
    for power in range(14, 27, 2)
    for tokens in (4096,)
]
"""Bags of 128 in bfloat16; those that do not fit are left out."""


def run(cases: list[Case], rounds: int, warmup: int) -> Iterator[Result]:
    """Time all cases; results of contenders whose check passed, in order."""
    for case in cases:
        device = torch.device(case.device)
        if device.type == "cuda" and 1.5 * case.dense_bytes > torch.cuda.mem_get_info()[0]:
            print(f"left out, does not fit: {case}", file=sys.stderr)
            continue
        copy = copy_bandwidth(device)
        for operator, make in (("forward", forward), ("step", step), ("search", search)):
            yield from _measure(operator, case, make(case), rounds, warmup, copy)


def _measure(
    operator: str, case: Case, contenders: list[Contender], rounds: int, warmup: int, copy: float
) -> Iterator[Result]:
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(warmup + rounds):
        inputs = case.inputs(turn)
        for contender, found in zip(contenders, seconds, strict=True):
            elapsed = contender.turn(inputs)
            if turn >= warmup:
                found.append(elapsed)
    for index, (contender, found) in enumerate(zip(contenders, seconds, strict=True)):
        if not contender.correct():
            print(f"wrong, not reported: {operator} {contender.name} {case}", file=sys.stderr)
            continue
        opponent = seconds[1] if index == 0 else seconds[0]
        ratios = quantiles([a / b for a, b in zip(found, opponent, strict=True)])
        times = quantiles(found)
        speed = contender.bytes / times[1]
        named: dict[str, Any] = {
            name: getattr(case, name) for name in ("device", "use", "width", "rows", "lookups", "bag", "unique")
        }
        named |= {f"{name}_ms": round(1e3 * value, 3) for name, value in zip(QUANTILES, times, strict=True)}
        named |= {f"ratio_{name}": round(value, 3) for name, value in zip(QUANTILES, ratios, strict=True)}
        speed = contender.bytes / times[1]
        yield Result(
            operator=operator,
            contender=contender.name,
            **named,
            bytes=contender.bytes,
            gb_per_s=round(speed / 1e9, 2),
            copy_share=round(speed / copy, 3),
            parts_ms=contender.parts(),
            peak_bytes=peak_bytes(case, index)
            if operator == "step" and case.rows >= PEAK_ROWS and sys.platform == "linux"
            else 0,
        )


def peak_bytes(case: Case, contender: int) -> int:
    """The most memory that five steps of a contender take, in a process of its own: resident, or CUDA-allocated.

    0 where the system does not say (CPU outside Linux).
    """
    if case.device == "cpu" and sys.platform != "linux":
        return 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, contender))


def _peak(case: Case, index: int) -> int:
    torch.set_num_threads(1)
    before = _resident_peak()
    contender = stepper(case, index, settled=False)
    for turn in range(5):
        contender.turn(case.inputs(turn))
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident_peak() - before


def _resident_peak() -> int:
    """Of this process in bytes, as Linux counts it (getrusage's would start at the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status: no VmHWM")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, linearly interpolated."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return p20, p50, p80


def copy_bandwidth(device: torch.device, size: int = 1 << 26) -> float:
    """Bytes per second, read + written, of copying `size` float32 values; best of five."""
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    best = math.inf
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time the kernels beside torch's own.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="folder for kernels-<device>.csv")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="*", help="only tables of these sizes")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, allowed: cpu (torch sees no CUDA device)")
    if given.device == "cpu":
        torch.set_num_threads(1)
    every = CPU_CASES if given.device == "cpu" else CUDA_CASES
    cases = [case for case in every if not given.rows or case.rows in given.rows]
    results = []
    for result in run(cases, given.rounds, warmup=15):
        results.append(result)
        print(line(result), file=sys.stderr if given.json else sys.stdout, flush=True)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        write_csv(given.out / f"kernels-{given.device}.csv", results)
    if given.json:
        print(json.dumps({"torch": torch.__version__, "results": [asdict(result) for result in results]}))
    return 0


def line(result: Result) -> str:
    """A result for people."""
    where = f"{result.operator:8} {result.contender:15} {result.use:8} rows 2^{math.log2(result.rows):<4.3g}"
    peak = f"  peak {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
    return (
        f"{where} width {result.width:<5} {result.p50_ms:10.2f} ms ({result.p20_ms:.2f}-{result.p80_ms:.2f})  "
        f"x{result.ratio_p50:.3f} ({result.ratio_p20:.3f}-{result.ratio_p80:.3f})  {result.gb_per_s:.1f} GB/s "
        f"{100 * result.copy_share:.0f} % of copy  {result.parts_ms}{peak}"
    )


def write_csv(path: Path, results: list[Result]) -> None:
    """All results as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


if __name__ == "__main__":
    sys.exit(main())
