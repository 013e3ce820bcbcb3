"""The `suite` command: reads arguments, calls the library, prints. Heavy modules load once a verb needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from suite.cli import bench, evaluate, sweep
from suite.cli.options import (
    AsJson,
    Baselines,
    DataRoot,
    GridName,
    Overrides,
    Results,
    RunCodeOption,
    RunsCode,
    Scales,
    check_folders,
    complain_of_failures,
    console,
    load,
    overrides,
    print_json,
    print_one,
    print_statuses,
    print_table,
    run_path,
    scoring_of,
    uncollected,
)
from suite.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, evaluate and compare models: where should the next parameter go?",
)
data_app = typer.Typer(no_args_is_help=True, help="Corpora: prepare what cells train on.")
app.command(cls=RunsCode)(sweep.sweep)
app.command()(sweep.cancel)
app.add_typer(data_app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")


def main() -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        print(f"suite: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # typer's own complaints have no public base class; its help, where arguments are missing, is one of them.
        said = error.format_message()
        print(said if "\n" in said else f"suite: {said}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


@app.command()
@uncollected()
def plan(
    grid: GridName,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200")] = "h100",
    nodes: Annotated[int | None, typer.Option(min=1, help="most nodes of 8 GPUs; default: as many as it takes")] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="share of the GPU's peak FLOPs reached")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="dollars per GPU-hour; default: an assumed one")] = None,
    results: Results = Path("results"),
    set_: Overrides = None,
    scale: Scales = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Count what a grid takes before it runs: parameters, FLOPs, memory, GPU-hours, cost, partners.

    Nothing is trained; results/plans/ keeps the plan.

    Example: suite plan paper-fixed-memory --gpu h100
    """
    from suite.atomic import write_json
    from suite.plan import plan as planning
    from suite.plan.table import measured, partners_table, plan_notes, plan_table

    loaded = load(grid, set_, scale, baseline, need_data=False)
    assumed = planning.assumptions(gpu, nodes, utilisation, price)
    check_folders(results, None)
    plans = planning.plan(loaded, assumed, results / "cache")
    document = planning.document(loaded, plans, assumed)
    for entry, cell in zip(document["cells"], loaded.cells, strict=True):
        entry["measured"] = measured(results, cell)
    write_json(results / "plans" / f"{loaded.name}-{gpu}.json", document)
    if as_json:
        print_json(document)
    else:
        print_table(plan_table(loaded.name, plans, assumed))
        print_table(partners_table(plans))
        print("\n".join(plan_notes(plans, document)))


@app.command()
def status(
    grid: GridName,
    results: Results = Path("results"),
    set_: Overrides = None,
    scale: Scales = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Show how a grid's cells stand: state, progress, ETA, and why the failed ones failed.

    Example: suite status laptop --json
    """
    from suite.launch.slurm import queue
    from suite.launch.status import grid_status, run_dir

    loaded = load(grid, set_, scale, baseline)
    runs = [run_dir(results, cell) for cell in loaded.cells]
    statuses = queue.with_slurm(grid_status(results, loaded), runs)
    print_statuses(loaded, statuses, as_json)
    complain_of_failures(statuses)


@app.command(cls=RunsCode)
def train(
    cell: Annotated[Path, typer.Argument(metavar="CELL", help="a cell.json, or a YAML file with a cell's fields")],
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    results: Results = Path("results"),
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate one cell here, in this process, from where it stands.

    Example: suite train results/runs/dense-w32-s0-0a1b2c3d/cell.json
    """
    from suite.grids import Grid, load_cell
    from suite.launch import sweep as launch
    from suite.launch.worker import run_cell
    from suite.records import Locked

    loaded = load_cell(cell, baseline or ())
    check_folders(results, data_root)
    scoring = scoring_of(data_root, run_code)
    launch.refuse_stale(results, [loaded])
    launch.retry_failed(results, [loaded])
    launch.refuse_unfit_tasks(Grid(loaded.run_name, cell, (loaded,)), results, scoring)
    try:
        run = launch.prepare(results, loaded)
    except Locked as error:
        raise UserError(f"{error}; allowed: wait for it or stop it") from None
    run_cell(run.path, scoring)
    print_one(Grid(run.name, cell, (loaded,)), results, as_json)


@app.command("export")
def export_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name in DIR/runs, or its path")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="a new folder")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Write a run's newest weights as transformers loads them: safetensors, config, tokenizer.

    A dense model is a LlamaForCausalLM; the others bring their modelling files (trust_remote_code=True).

    Example: suite export dense-w32-s0-0a1b2c3d --to exported
    """
    from suite.data import prepare
    from suite.export.export import export
    from suite.records import RunDir
    from suite.train.checkpoint import load_model

    record = RunDir(run_path(run, results))
    cell = record.read_cell()
    corpus = prepare(cell.data, record.path.parent.parent / "cache")
    try:
        model = load_model(record, cell, corpus)
    except FileNotFoundError as error:
        raise UserError(f"RUN: {error}, allowed: a run that has saved one") from None
    files = export(model, to, corpus, cell.data.seq_len)
    if as_json:
        print_json({"run": record.name, "files": [str(path) for path in files]})
    else:
        print(f"{to}: {len(files)} files")


@app.command()
def baselines(baseline: Baselines = None, as_json: AsJson = False) -> None:
    """List the model families and the options each one takes.

    Example: suite baselines
    """
    from suite.baselines import loading
    from suite.cli.families import families, families_table

    loading.load_all(baseline or ())
    if as_json:
        print_json(families())
    else:
        print_table(families_table())


@data_app.command("prepare")
def data_prepare(
    grid: Annotated[str, typer.Argument(metavar="GRID_OR_CELL", help="a grid as for sweep, or a cell's file")],
    results: Results = Path("results"),
    set_: Overrides = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize the data of a grid's cells, each corpus once, into DIR/cache.

    Killed or cut off, it goes on where it stood when the same command is given again.

    Example: suite data prepare factbook --set data.path=corpus/
    """
    from suite.data.preparing import prepare_all, table
    from suite.grids import load_grid_or_cell

    loaded = load_grid_or_cell(grid, overrides(set_), baseline or ())
    try:
        reports = prepare_all(loaded.cells, results / "cache", console())
    except KeyboardInterrupt:
        print("suite: stopped; the same command goes on where it stood", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"grid": loaded.name, "corpora": reports})
    else:
        print_table(table(reports))


if __name__ == "__main__":
    main()
