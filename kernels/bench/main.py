"""Time the kernels next to PyTorch's own operators: `python -m kernels.bench [--device cpu|cuda] [--json] [--out DIR]`.

Every contender runs once per round, each round starts with another one, and ratios are taken within a round, since
machines are noisy. A result is reported only if the contender's own check passed in the same run. On a CPU, one thread
is used and its CPU time is measured, so that other processes matter little; on CUDA, events. The copy bandwidth is
measured on the same clock.
`forward`      weighted bags, against F.embedding_bag
`step`         from the output's gradient to the updated table, with clipping: replay, backward and update together
               (replay happens before the forward pass, but is a cost of the sparse update), against dense backward
               + clip_grad_norm_ + AdamW(fused=True), and against sparse gradients + SparseAdam (another optimizer:
               no weight decay, no clipping, no decay of untouched moments)
`search`       product keys (half_keys = sqrt(rows)), against torch.topk on both sides and on all pairs
`layer`        search and bags, forward and backward without an update, against the layer of a package from PyPI
               (product-key-memory) with the same weights, if it is installed
`reference` is the plain PyTorch path of each, on any device.

`bytes` counts the least traffic: a table row and an output gradient per lookup, and per unique row the compact gradient
twice and values and both moments read and written; a rate above the copy bandwidth means that a cache helps.
`copy_share` is bytes per second over the measured copy bandwidth (read + written). Peak memory is that of a few steps
in a separate process.

There are two sets of cases on a CPU: width 64 with 110,000 lookups per step, tables of 2^14 to 2^20 rows, uniform and
Zipf reads; and widths of 768 to 4096 in bags of 128 with 2^14 rows. `--all` adds tables of up to 2^26 rows that fit in
memory; on CUDA these are always included. `--compile` measures nothing and needs no GPU (kernels.bench.compile).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch

from kernels.bench.cases import Case, Contender, forward, search, seconds_of
from kernels.bench.peers import layers
from kernels.bench.steps import step, stepper


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
    ratio_p20: float | None
    ratio_p50: float | None
    ratio_p80: float | None
    bytes: int
    gb_per_s: float
    copy_share: float
    parts_ms: str
    peak_bytes: int


@dataclass(frozen=True)
class Against:
    """An update by rows next to the dense one: milliseconds, the ratio per round, and peak memory in bytes.

    `search_ms` is the search for the rows, which both need and neither includes. `saved_tables`: by how many times the
    table's size the peak is lower. Peaks are None if they were not measured.
    """

    use: str
    width: int
    rows: int
    lookups: int
    ours_ms: float
    dense_ms: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    search_ms: float | None
    ours_peak: int | None
    dense_peak: int | None
    saved_tables: float | None


QUANTILES = ("p20", "p50", "p80")
PEAK_ROWS, PEAK_STEPS, PEAK_OF = 1 << 20, 3, ("ours", "dense AdamW")
"""Peak memory is measured for tables of at least PEAK_ROWS rows, over PEAK_STEPS steps, of the contenders PEAK_OF."""
ROUNDS, FEWEST_ROUNDS, CASE_SECONDS = 15, 5, 3.0
"""Rounds of a case: ROUNDS, or as many as fit in CASE_SECONDS, but at least FEWEST_ROUNDS."""

STEP_CASES = [Case(64, 1 << power, 110_000, 32, use) for power in (14, 16, 18, 20) for use in ("uniform", "zipf")]
WIDTHS = (768, 1024, 2048, 4096)
CPU_CASES = STEP_CASES + [Case(width, 1 << 14, 128 * 128, 128, "uniform") for width in WIDTHS]
CPU_MORE = [Case(width, 1 << power, 128 * 128, 128, "uniform") for width in WIDTHS for power in range(16, 27, 2)]
CUDA_CASES = [
    Case(width, 1 << power, 4096 * 128, 128, "uniform", "cuda", torch.bfloat16)
    for width in WIDTHS
    for power in range(14, 27, 2)
]


def run(cases: Sequence[Case]) -> Iterator[list[Result]]:
    """Time all cases; for each, yield the results of the contenders whose check passed."""
    for case in cases:
        free = 0.9 * free_bytes(case.device)
        if case.rows_bytes > free:
            note(f"skipped, does not fit in memory: {case}")
            yield []
            continue
        copy = copy_bandwidth(case.device)
        results = list(_measure("forward", case, forward(case), copy))
        results += _measure("step", case, step(case, free), copy)
        results += _measure("search", case, search(case), copy)
        if case.rows_bytes + 2 * case.dense_bytes <= free:
            results += _measure("layer", case, layers(case), copy)
        yield results


def _measure(operator: str, case: Case, contenders: list[Contender], copy: float) -> Iterator[Result]:
    if not contenders:
        return
    seconds: list[list[float]] = [[] for _ in contenders]
    warmup = case.settling if operator == "step" else 1
    for turn in range(warmup):
        _round(case, contenders, turn)
    started = time.perf_counter()
    for turn in range(warmup, warmup + ROUNDS):
        if len(seconds[0]) >= FEWEST_ROUNDS and time.perf_counter() - started > CASE_SECONDS:
            break
        for times, elapsed in zip(seconds, _round(case, contenders, turn), strict=True):
            times.append(elapsed)
    last = case.inputs(warmup + ROUNDS)
    for contender in contenders:
        contender.prove(last)
    for index, (contender, times) in enumerate(zip(contenders, seconds, strict=True)):
        if not contender.correct():
            note(f"wrong result, not reported: {operator} {contender.name} {case}")
            continue
        opponent = None if len(contenders) == 1 else seconds[1 if index == 0 else 0]
        yield _result(operator, case, contender, times, opponent, copy)


def _round(case: Case, contenders: list[Contender], turn: int) -> list[float]:
    """Return the seconds of each contender.

    The order rotates, because the first to read a table finds it in no cache.
    """
    inputs, seconds = case.inputs(turn), [0.0] * len(contenders)
    for place in range(len(contenders)):
        index = (turn + place) % len(contenders)
        seconds[index] = contenders[index].turn(inputs)
    return seconds


def _result(
    operator: str, case: Case, contender: Contender, seconds: list[float], opponent: list[float] | None, copy: float
) -> Result:
    times = quantiles(seconds)
    ratios = None if opponent is None else quantiles([a / b for a, b in zip(seconds, opponent, strict=True)])
    named: dict[str, Any] = {
        name: getattr(case, name) for name in ("device", "use", "width", "rows", "lookups", "bag", "unique")
    }
    for place, name in enumerate(QUANTILES):
        named[f"{name}_ms"] = round(1e3 * times[place], 3)
        named[f"ratio_{name}"] = None if ratios is None else round(ratios[place], 3)
    speed = contender.bytes / times[1]
    is_peak = operator == "step" and contender.name in PEAK_OF and case.rows >= PEAK_ROWS
    return Result(
        operator=operator,
        contender=contender.name,
        **named,
        bytes=contender.bytes,
        gb_per_s=round(speed / 1e9, 2),
        copy_share=round(speed / copy, 3),
        parts_ms=contender.parts(),
        peak_bytes=peak_bytes(case, contender.name) if is_peak else 0,
    )


def against_dense(results: list[Result]) -> list[Against]:
    """Return the update by rows next to the dense one, for every case in which both passed their check."""
    by_case = {(r.operator, r.contender, r.use, r.width, r.rows): r for r in results}
    table = []
    for ours in results:
        at = ours.use, ours.width, ours.rows
        dense, search_ = by_case.get(("step", "dense AdamW", *at)), by_case.get(("search", "ours", *at))
        if (ours.operator, ours.contender) != ("step", "ours") or dense is None:
            continue
        assert ours.ratio_p20 is not None
        assert ours.ratio_p50 is not None
        assert ours.ratio_p80 is not None
        saved = (dense.peak_bytes - ours.peak_bytes) / _table_bytes(ours) if dense.peak_bytes else None
        table.append(
            Against(
                use=ours.use,
                width=ours.width,
                rows=ours.rows,
                lookups=ours.lookups,
                ours_ms=ours.p50_ms,
                dense_ms=dense.p50_ms,
                ratio_p20=ours.ratio_p20,
                ratio_p50=ours.ratio_p50,
                ratio_p80=ours.ratio_p80,
                search_ms=search_.p50_ms if search_ else None,
                ours_peak=ours.peak_bytes or None,
                dense_peak=dense.peak_bytes or None,
                saved_tables=None if saved is None else round(saved, 2),
            )
        )
    return table


def _table_bytes(result: Result) -> int:
    return result.rows * result.width * (4 if result.device == "cpu" else 2)


def peak_bytes(case: Case, contender: str) -> int:
    """Return the peak memory of a few steps of a contender in a separate process: resident, or allocated on CUDA.

    0 where the system does not report it (CPU outside Linux).
    """
    if case.device == "cpu" and sys.platform != "linux":
        return 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, contender))


def _peak(case: Case, name: str) -> int:
    torch.set_num_threads(1)
    before = _kilobytes("self/status", "VmHWM") if case.device == "cpu" else 0
    contender = stepper(case, name)
    for turn in range(PEAK_STEPS):
        contender.turn(case.inputs(turn))
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * (_kilobytes("self/status", "VmHWM") - before)


def _kilobytes(file: str, field: str) -> int:
    """Return a field of a file of /proc (getrusage's peak would start at the parent's)."""
    for text in Path("/proc", file).read_text().splitlines():
        if text.startswith(f"{field}:"):
            return int(text.split()[1])
    raise OSError(f"/proc/{file}: no {field}")


def free_bytes(device: str) -> int:
    """Return available memory; outside Linux, half of a CPU's memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if sys.platform == "linux":
        return 1024 * _kilobytes("meminfo", "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80, linearly interpolated."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return p20, p50, p80


def copy_bandwidth(device: str, size: int = 1 << 26) -> float:
    """Return bytes per second, read + written, of copying `size` float32 values; best of five."""
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def main(arguments: list[str] | None = None) -> int:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description="Time the kernels next to PyTorch's operators."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="folder for kernels-<device>.csv and step-against-dense-<device>.csv")
    parser.add_argument("--rows", type=int, nargs="*", help="only tables of these sizes")
    parser.add_argument("--all", action="store_true", help="every table that fits; every combination to compile")
    parser.add_argument("--compile", action="store_true", help="compile for GPUs instead of measuring")
    parser.add_argument("--shapes", metavar="TEXT", help="with --compile: only shapes that contain this text")
    options = parser.parse_args(arguments)
    if options.compile:
        from kernels.bench import compile as compiler

        if not compiler.chosen(options.all, options.shapes or ""):
            parser.error(f"--shapes: got {options.shapes!r}, allowed: a part of a shape, such as '1.3b' or 'rotary'")
        return compiler.main(options.all, options.json, options.shapes or "")
    if options.shapes is not None:
        parser.error(f"--shapes: got {options.shapes!r}, allowed: only with --compile")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, allowed: cpu (torch sees no CUDA device)")
    every = CUDA_CASES if options.device == "cuda" else CPU_CASES + (CPU_MORE if options.all else [])
    cases = [case for case in every if not options.rows or case.rows in options.rows]
    if not cases:
        sizes = sorted({case.rows for case in every})
        parser.error(f"--rows: got {', '.join(map(str, options.rows))}, allowed: {', '.join(map(str, sizes))}")
    if options.device == "cpu":
        torch.set_num_threads(1)
    results: list[Result] = []
    out = sys.stderr if options.json else sys.stdout
    print(machine(options.device), file=out)
    progress(0, len(cases))
    for done, of_case in enumerate(run(cases), 1):
        results += of_case
        note(*map(line, of_case), to=out)
        progress(done, len(cases))
    table = against_dense(results)
    print(against_table(table), file=out)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / f"kernels-{options.device}.csv", results)
        write_csv(options.out / f"step-against-dense-{options.device}.csv", table)
    if options.json:
        facts = {"machine": machine(options.device), "torch": torch.__version__}
        rows = {"results": [asdict(r) for r in results], "step_against_dense": [asdict(a) for a in table]}
        print(json.dumps(facts | rows))
    return 0


def machine(device: str) -> str:
    """Return the device, for people."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), cpu)
    return f"{cpu}, one thread, torch {torch.__version__}"


def note(*lines: str, to: TextIO | None = None) -> None:
    """Print lines in place of the progress bar, to `to` (stderr if None)."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    for text in lines:
        print(text, file=to or sys.stderr, flush=True)


def progress(done: int, cases: int) -> None:
    """Draw a progress bar, on a terminal only."""
    if sys.stderr.isatty():
        bar = "#" * (30 * done // cases)
        end = "" if done < cases else "\n"
        print(f"\r\033[K[{bar:30}] {done}/{cases} cases", end=end, file=sys.stderr, flush=True)


def line(result: Result) -> str:
    """Return a result for people."""
    where = f"{result.operator:8} {result.contender:15} {result.use:8} rows 2^{math.log2(result.rows):<4.3g}"
    peak = f"  peak {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
    ratio = f"x{result.ratio_p50:.3f} ({result.ratio_p20:.3f}-{result.ratio_p80:.3f})" if result.ratio_p50 else ""
    return (
        f"{where} width {result.width:<5} {result.p50_ms:10.2f} ms ({result.p20_ms:.2f}-{result.p80_ms:.2f})  "
        f"{ratio:22}  {result.gb_per_s:.1f} GB/s {100 * result.copy_share:.0f} % of copy  {result.parts_ms}{peak}"
    )


def against_table(table: list[Against]) -> str:
    """Return the comparison with the dense path for people."""
    head = (
        "\nStep against dense: backward and update by rows over dense backward + clipping + AdamW(fused=True)\n"
        "use       width  rows   lookups   rows, ms  dense, ms  ratio (p20-p80)        search, ms  "
        "peak MiB: rows, dense  tables saved"
    )
    rows = []
    for a in table:
        peaks = (
            ""
            if a.ours_peak is None or a.dense_peak is None
            else (f"{a.ours_peak / 2**20:14.0f} {a.dense_peak / 2**20:8.0f} {a.saved_tables:13.2f}")
        )
        searching = "" if a.search_ms is None else f"{a.search_ms:.1f}"
        rows.append(
            f"{a.use:8} {a.width:6}  2^{math.log2(a.rows):<3.3g} {a.lookups:9} {a.ours_ms:10.1f} {a.dense_ms:10.1f}  "
            f"{a.ratio_p50:.3f} ({a.ratio_p20:.3f}-{a.ratio_p80:.3f})  {searching:>10}  {peaks}"
        )
    return "\n".join([head, *rows])


def write_csv(path: Path, rows: Sequence[Result] | Sequence[Against]) -> None:
    """Write records of one kind as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])] if rows else [])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
