"""`suite bench`: speeds measured on this machine, as tables and CSV files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from suite.cli.options import (
    AsJson,
    Baselines,
    Results,
    TableCache,
    TablePlace,
    check_folders,
    print_json,
    print_table,
)
from suite.errors import UserError

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

HalfKeys = Annotated[
    str | None, typer.Option(metavar="N,N..", help="half keys of the tables; default: those of the grid")
]
EvalData = Annotated[
    Path,
    typer.Option("--data-root", metavar="DIR", help="local copies of the evaluation data sets (docs/evaluation.md)"),
]
GridOption = Annotated[str, typer.Option("--grid", metavar="GRID", help="the grid whose models are trained")]


@app.callback()
def bench(context: typer.Context) -> None:
    """Measure speeds on this machine and write them to results/bench/; without a verb, the speed of training steps.

    Example: suite bench step --grid laptop
    """
    if context.invoked_subcommand is None:
        step()


@app.command()
def step(
    grid: GridOption = "laptop",
    half_keys: HalfKeys = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Measure speed and peak memory of whole training steps, for every model of a grid's first base.

    Models with a table are measured with the row-wise and with the dense optimizer. The models take turns, and ratios
    to dense are taken within a turn, because other work on the machine slows both.

    Example: suite bench step --grid laptop --half-keys 32,128,512
    """
    from suite.bench import training
    from suite.grids import load_grid
    from suite.yaml_input import whole_numbers

    sides = whole_numbers(half_keys, "--half-keys") if half_keys else ()
    check_folders(results, None)
    models = training.contenders(load_grid(grid).cells, sides)
    rows = training.rows(training.step_speeds(models, results / "cache"))
    _show(rows, results / "bench" / "step.csv", as_json)


@app.command()
def kernels(
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="default: cuda if there is one")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="only tables of this many rows; repeatable")] = None,
    every: Annotated[bool, typer.Option("--all", help="every table that fits; every combination to compile")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="compile for GPUs instead of measuring")] = False,
    shapes: Annotated[
        str | None, typer.Option(metavar="TEXT", help="with --compile: only shapes that contain this text")
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Compare every kernel with PyTorch's operators; a kernel is timed only if its results are correct.

    With --compile, compile the Triton kernels for A100, H100 and B200 instead, without a GPU: registers, spills, shared
    memory, and the share of the memory bandwidth that these predict.

    `python -m kernels.bench` does the same without the rest of this package.

    Example: suite bench kernels --device cpu --rows 16384
    """
    from kernels.bench import main

    check_folders(results, None)
    arguments = ["--out", str(results / "bench"), *(["--json"] if as_json else [])]
    arguments += ["--device", device] if device else []
    arguments += ["--all"] if every else []
    arguments += ["--compile"] if compiled else []
    arguments += ["--shapes", shapes] if shapes is not None else []
    arguments += ["--rows", *map(str, rows)] if rows else []
    raise typer.Exit(main.main(arguments))


@app.command()
def decode(
    base: Annotated[str, typer.Option(help="the base shape")] = "w128",
    half_keys: Annotated[str, typer.Option(metavar="N,N..", help="half keys of the tables")] = "32,128,512",
    batches: Annotated[str, typer.Option(metavar="B,B..", help="batch sizes")] = "1,8,64",
    context: Annotated[int, typer.Option(min=1, help="tokens read before the measurement")] = 64,
    table: TablePlace = None,
    cache: TableCache = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORM,FORM..", help="forms of rows: bf16, int8, int4, fp8 or nf4")
    ] = None,
    baseline: Baselines = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Measure milliseconds and tokens per second of decoding, for every family, batch size and table size.

    With --to, models with tables are also measured with rows of each form. With --table, they are also measured with
    their tables there (in these forms), warm and cold, in the same rounds, with the hits of the cache, the bytes of
    rows per token by source, and the time in which layers wait for rows; models whose rows follow from token ids also
    with prefetching. Each of these models first writes a file with its tables to DIR/bench, which is removed at the
    end: fp32 rows without --to, up to tens of gigabytes with many half keys.

    Example: suite bench decode --base w128 --half-keys 32,512 --batches 1,64
    """
    from suite.baselines import loading
    from suite.bench import decoding
    from suite.inference.tables.forms import FORMS
    from suite.inference.tables.loading import parse_place
    from suite.yaml_input import whole_numbers

    loading.load_all(baseline or ())
    check_folders(results, None)
    place, folder = parse_place(table, cache), results / "bench"
    forms = [form for form in FORMS if to is not None and form in to.split(",")]
    if to is not None and set(to.split(",")) != set(forms):
        raise UserError(f"--to: got {to!r}, allowed: {', '.join(FORMS)}, separated by commas")
    configs = decoding.configurations(base, whole_numbers(half_keys, "--half-keys"))
    sizes = whole_numbers(batches, "--batches")
    folder.mkdir(parents=True, exist_ok=True)
    rows = decoding.rows(decoding.decode_speeds(configs, sizes, context, place=place, folder=folder, forms=forms))
    _show(rows, results / "bench" / "decode.csv", as_json)


@app.command()
def evaluate(
    data_root: EvalData,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Measure the seconds that evaluation takes in addition to the model itself.

    These are the time to build the requests of MMLU and of the quick preset, and to score one more checkpoint.

    Example: suite bench evaluate --data-root data/eval
    """
    from suite.bench import evaluation

    check_folders(results, None)
    rows = [
        {"measure": name, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
        for name, (seconds, cpu_seconds) in evaluation.overhead(data_root).items()
    ]
    _show(rows, results / "bench" / "evaluate.csv", as_json)


@app.command()
def records(
    runs: Annotated[int, typer.Option(min=1, help="minimum number of finished runs")] = 10_000,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="folder of the runs, which are retained for reuse")
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Measure CPU time and peak memory of status, dry run, frame and report on many synthetic finished runs.

    Example: suite bench records --runs 10000
    """
    import tempfile

    from suite.bench.records import record_costs

    check_folders(results, None)
    with tempfile.TemporaryDirectory(prefix="suite-records-") as temporary:
        rows = record_costs(folder or Path(temporary), runs)
    _show(rows, results / "bench" / "records.csv", as_json)


def _show(rows: list[dict[str, Any]], path: Path, as_json: bool) -> None:
    """Write the rows to a CSV file and print them, as JSON or as a table."""
    import csv
    import io

    from suite.atomic import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    if as_json:
        print_json(rows)
        return
    print(f"{path}: {len(rows)} rows", file=sys.stderr)
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    print_table(table)
