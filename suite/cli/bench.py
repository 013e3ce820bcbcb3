"""`suite bench`: speeds measured on this machine, as tables and CSV files. Arguments in, tables out; no logic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    invoke_without_command=True, rich_markup_mode=None, help="Measure speeds on this machine, into results/bench/."
)

HalfKeys = Annotated[str | None, typer.Option(metavar="N,N..", help="sides of the tables; default: the grid's")]
GridName = Annotated[str, typer.Option("--grid", help="the grid whose models train")]
Results = Annotated[Path, typer.Option("--results", metavar="DIR", help="where tables are written, in bench/")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]


@app.callback()
def every(context: typer.Context) -> None:
    """Measure speeds on this machine, into results/bench/; without a verb, those of training steps.

    Example: suite bench step --grid laptop
    """
    if context.invoked_subcommand is None:
        step()


@app.command()
def step(
    grid: GridName = "laptop",
    half_keys: HalfKeys = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Speed and peak memory of whole training steps, every model of a grid's first base, beside dense.

    Models with a table are trained by rows and with the dense optimizer. The models take turns; ratios to dense are
    taken within a turn, since other work on the machine slows both.

    Example: suite bench step --grid laptop --half-keys 32,128,512
    """
    from suite.bench import training
    from suite.grids import load_grid
    from suite.yaml_input import whole_numbers

    sides = whole_numbers(half_keys, "--half-keys") if half_keys else ()
    models = training.contenders(load_grid(grid).cells, sides)
    rows = training.rows(training.step_speeds(models, results / "cache"))
    _show(rows, results / "bench" / "step.csv", as_json)


@app.command()
def kernels(
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="default: cuda where there is one")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="only tables of that many rows; may be repeated")] = None,
    every: Annotated[bool, typer.Option("--all", help="on CPU too: every table that memory holds")] = False,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Every kernel beside torch's own, each checked before its time is reported (`python -m kernels.bench`).

    Example: suite bench kernels --device cpu --rows 16384
    """

    from kernels.bench import main

    arguments = ["--out", str(results / "bench"), *(["--json"] if as_json else [])]
    arguments += ["--device", device] if device else []
    arguments += ["--all"] if every else []
    arguments += ["--rows", *map(str, rows)] if rows else []
    raise typer.Exit(main.main(arguments))


@app.command()
def decode(
    base: Annotated[str, typer.Option(help="the base shape")] = "w128",
    half_keys: Annotated[str, typer.Option(metavar="N,N..", help="sides of the product-key tables")] = "32,128,512",
    batches: Annotated[str, typer.Option(metavar="B,B..", help="sequences decoded together")] = "1,8,64",
    context: Annotated[int, typer.Option(min=1, help="tokens read before the clock starts")] = 64,
    baseline: Annotated[list[Path] | None, typer.Option("--baseline", help="a file that registers a family")] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Milliseconds and tokens per second of decoding, every family by batch and table size.

    Example: suite bench decode --base w128 --half-keys 32,512 --batches 1,64
    """
    from suite.baselines import loading
    from suite.bench import decoding
    from suite.yaml_input import whole_numbers

    loading.load_all(baseline or ())
    configs = decoding.configurations(base, whole_numbers(half_keys, "--half-keys"))
    rows = decoding.rows(decoding.decode_speeds(configs, whole_numbers(batches, "--batches"), context))
    _show(rows, results / "bench" / "decode.csv", as_json)


@app.command()
def evaluate(
    data_root: Annotated[Path, typer.Option("--data-root", metavar="DIR", help="evaluation data in hub layout")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Seconds that evaluation takes beside the model: building MMLU and the quick preset, and per further checkpoint.

    Example: suite bench evaluate --data-root data/eval
    """
    from suite.bench import evaluation

    rows = [
        {"measure": name, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
        for name, (seconds, cpu_seconds) in evaluation.overhead(data_root).items()
    ]
    _show(rows, results / "bench" / "evaluate.csv", as_json)


@app.command()
def records(
    runs: Annotated[int, typer.Option(min=1, help="finished runs to read, at least")] = 10_000,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="make the runs here, or use them, and keep them")
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """CPU time and peak memory of status, dry run, frame and report on a folder of many synthetic finished runs.

    Example: suite bench records --runs 10000
    """
    import tempfile

    from suite.bench.records import record_costs

    with tempfile.TemporaryDirectory(prefix="suite-records-") as temporary:
        rows = record_costs(folder or Path(temporary), runs)
    _show(rows, results / "bench" / "records.csv", as_json)


def _show(rows: list[dict[str, Any]], path: Path, as_json: bool) -> None:
    """The rows as CSV in a file, and as JSON or a table on stdout."""
    import csv
    import io

    from suite.atomic import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{path}: {len(rows)} rows", file=sys.stderr)
    from rich.table import Table

    from suite.cli.options import print_table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    print_table(table)
