"""Checks and measurements on one GPU in eight minutes: `python -m suite.bench.gpu`, or `make gpu`.

Parts run in the order of their use, and each writes its file as it ends, gpu-<device>-<part>.csv, so an interruption
loses nothing. Correctness comes first. A part that cannot run writes a line with the reason, and the next one starts.

The kernels' parts (correct, search, kernels, others) need torch, triton and numpy. Parts that run models (steps, large,
resume, compile, decode) need pydantic, tokenizers and pyyaml too, and so do two checks of `correct`, which leaves them
out without these. What is missing is listed before anything runs. `--rehearse` runs every part on a CPU at tiny sizes,
with the Triton kernels in the interpreter: it tests the script, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MINUTES = 8.0
OUT = Path("results/reference")
Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """Where and how large: `rehearsal` is tiny and on a CPU."""

    device: str
    rehearsal: bool


def correct(setting: Setting) -> Iterator[Row]:
    """Compare every Triton kernel, attention of packed documents and routed experts with their references."""
    from suite.bench import gpu_checks

    yield from gpu_checks.rows(setting.device, setting.rehearsal)
    if absent := missing(MODELS_NEED):
        yield {"operator": "document attention, experts", "note": f"not run: not installed: {', '.join(absent)}"}
        return
    from suite.bench import gpu_model_checks

    yield from gpu_model_checks.rows(setting.device, setting.rehearsal)


def kernels(setting: Setting) -> Iterator[Row]:
    """Time bags, steps and the search next to PyTorch's operators, as a share of the copy bandwidth."""
    import torch

    from kernels.bench.cases import Case
    from kernels.bench.main import run

    if setting.rehearsal:
        cases = [Case(16, 256, 64, 4, "uniform")]
    else:
        shapes = ((2048, 1 << 20, torch.bfloat16), (2048, 1 << 20, torch.float32), (768, 1 << 20, torch.bfloat16))
        cases = [Case(width, rows, 16_384 * 128, 128, "uniform", "cuda", dtype) for width, rows, dtype in shapes]
    for results in run(cases):
        yield from map(asdict, results)


def search(setting: Setting) -> Iterator[Row]:
    """Time the search next to a matrix product with torch.topk, at the widths and tables of the models."""
    from suite.bench import gpu_checks

    yield from gpu_checks.search_rows(setting.device, setting.rehearsal)


def others(setting: Setting) -> Iterator[Row]:
    """Time the weighted bags of public packages, where they are installed."""
    from suite.bench import gpu_checks

    yield from gpu_checks.other_rows(setting.device, setting.rehearsal)


def steps(setting: Setting) -> Iterator[Row]:
    """Time training steps of every family."""
    yield from _models().steps(setting.device, setting.rehearsal)


def large(setting: Setting) -> Iterator[Row]:
    """Time training steps of memory_plus-1.3b and dense-1.3b, with peak memory."""
    yield from _models().large(setting.device, setting.rehearsal)


def resume(setting: Setting) -> Iterator[Row]:
    """Continue a saved run and compare its losses with those of the run itself."""
    yield from _models().resume(setting.device, setting.rehearsal)


def compiled(setting: Setting) -> Iterator[Row]:
    """Time training steps with train.compile."""
    yield from _models().compiled(setting.device, setting.rehearsal)


def decode(setting: Setting) -> Iterator[Row]:
    """Time the generation of tokens."""
    yield from _models().decode(setting.device, setting.rehearsal)


def _models() -> Any:
    from suite.bench import gpu_models

    return gpu_models


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "correct": correct,
    "search": search,
    "kernels": kernels,
    "others": others,
    "steps": steps,
    "large": large,
    "resume": resume,
    "compile": compiled,
    "decode": decode,
}
"""The parts in the order in which they run."""
KERNELS_NEED = {"torch": "torch", "triton": "triton", "numpy": "numpy"}
MODELS_NEED = {"pydantic": "pydantic", "tokenizers": "tokenizers", "pyyaml": "yaml"}
"""Packages, and the modules by which they are found."""
OF_KERNELS = ("correct", "search", "kernels", "others")
"""The parts that need KERNELS_NEED alone; the others need MODELS_NEED as well."""


def missing(packages: dict[str, str]) -> list[str]:
    """Return which packages are not installed."""
    return [package for package, module in packages.items() if importlib.util.find_spec(module) is None]


def lacking(parts: list[str]) -> dict[str, str]:
    """Return the packages that parts lack, as text, by part; parts that lack none are left out."""
    for_kernels, for_models = missing(KERNELS_NEED), missing(MODELS_NEED)
    needed = {part: for_kernels if part in OF_KERNELS else for_kernels + for_models for part in parts}
    return {part: ", ".join(packages) for part, packages in needed.items() if packages}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if one failed, lacks a package, or a result is wrong, 2 without a device, else 0."""
    parser = argparse.ArgumentParser(prog="python -m suite.bench.gpu", description="Measure the project on one GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start no part after this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU: tests the script")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of the files; default {OUT}")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if part in options.only]
    lack = lacking(parts)
    for packages in dict.fromkeys(lack.values()):
        without = ", ".join(part for part in parts if lack.get(part) == packages)
        print(f"gpu: not installed: {packages}; install it to run: {without}", file=sys.stderr, flush=True)
    if len(lack) == len(parts):
        return 1
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("gpu: got no CUDA device, allowed: a machine with one, or --rehearse", file=sys.stderr)
        return 2
    setting = Setting("cpu" if options.rehearse else "cuda", options.rehearse)
    name = "rehearsal" if options.rehearse else _slug(torch.cuda.get_device_name())
    out = options.out or (Path("results/bench") if options.rehearse else OUT)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / f"gpu-{name}-machine.csv", [_machine(setting)])
    started, failed = time.monotonic(), bool(lack)
    for part in parts:
        if part in lack:
            _write(out / f"gpu-{name}-{part}.csv", [{"note": f"not run: not installed: {lack[part]}"}])
            continue
        if time.monotonic() - started > 60 * options.minutes:
            print(f"{part}: not started, {options.minutes:g} minutes are over", flush=True)
            continue
        rows, failure = _rows(PARTS[part], setting)
        wrong = [row for row in rows if row.get("correct") is False]
        failed = failed or bool(wrong) or failure is not None
        _write(out / f"gpu-{name}-{part}.csv", rows or [{"note": failure or "nothing to measure"}])
        for row in (row for row in rows if row in wrong or "note" in row):
            print(f"{part}: {'wrong' if row in wrong else 'note'}: {_text(row)}", flush=True)
        outcome = failure or f"{len(rows)} rows" + (f", {len(wrong)} wrong" if wrong else "")
        print(f"{part}: {outcome}, {time.monotonic() - started:.0f} s in all", flush=True)
    return int(failed)


def _rows(part: Callable[[Setting], Iterator[Row]], setting: Setting) -> tuple[list[Row], str | None]:
    """Return the rows of a part, and why it did not finish; what it measured before that stays."""
    rows: list[Row] = []
    try:
        for row in part(setting):
            rows.append(row)
    except Exception as error:  # one part must not cost the others the device
        return rows, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return rows, None


def _text(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if value is not None and name != "correct")


def _machine(setting: Setting) -> Row:
    import torch
    import triton

    cuda = (
        {}
        if setting.rehearsal
        else {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
        }
    )
    return {"rehearsal": setting.rehearsal, "torch": torch.__version__, "triton": triton.__version__, **cuda}


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _write(path: Path, rows: list[Row]) -> None:
    """Write the rows; a column that some rows lack is empty there."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
