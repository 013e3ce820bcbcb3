"""The `suite` command: parses arguments, calls the library and prints. Each verb imports what it needs when it runs."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from suite.atomic import FULL
from suite.cli import bench, cells, data, evaluate, quantise, runs, sweep, train
from suite.cli.options import (
    AsJson,
    Baselines,
    GridName,
    GridOptions,
    Results,
    check_folders,
    expand_options,
    find_run,
    print_json,
    print_statuses,
    print_table,
    report_failures,
)
from suite.errors import DiskFull, UserError, allowed_by

_OTHER = "correct its permissions, or use another path"
UNUSABLE = {errno.ENAMETOOLONG: "use a shorter path", errno.EACCES: _OTHER, errno.EPERM: _OTHER, errno.EROFS: _OTHER}
"""Errors of a path that cannot be used, and what to do."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, evaluate and compare models: where should the next parameter go?",
)
app.command()(sweep.sweep)
app.command()(cells.cells)
app.command()(train.train)


def main() -> NoReturn:
    """Run the command line; a mistake of the user is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # as all files, whatever the locale
    try:
        if sys.argv[1:3] == ["eval", "prefetch"]:
            raise UserError("eval prefetch: renamed to suite data prefetch")
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        print(f"suite: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in UNUSABLE and error.filename is not None:
            print(f"suite: {error.filename}: {error.strerror}; {UNUSABLE[error.errno]}", file=sys.stderr)
            sys.exit(2)
        if error.errno not in FULL:
            raise
        print(f"suite: {error.filename or 'stdout'}: cannot be written: {error.strerror}; free space", file=sys.stderr)
        os._exit(2)  # what Python writes of stdout as it ends fails, too
    except Exception as error:
        # Typer's usage errors have no public base class. One of them is the help that is shown without arguments.
        if not hasattr(error, "format_message"):
            raise
        message = _usage_error(error)
        print(message if "\n" in message else f"suite: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


def _usage_error(error: Any) -> str:
    """Return typer's message; for the value of an option, the option, the value and what is allowed."""
    cause, options = error.__cause__, getattr(getattr(error, "param", None), "opts", [])
    if not isinstance(cause, ValidationError) or not options or not options[0].startswith("--"):
        return str(error.format_message())
    detail = cause.errors()[0]
    return f"{options[0]}: got {detail['input']}, allowed: {allowed_by(detail['msg'])}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"next-parameter {version('next-parameter')}")
        raise typer.Exit()


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train, evaluate and compare models: where should the next parameter go?"""


@app.command()
@expand_options
def plan(
    grid: GridName,
    options: GridOptions,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="GPU",
            help="a100, h100, h200, a .yaml file (docs/planning.md), or cpu: this machine, from its finished runs",
        ),
    ] = "h100",
    nodes: Annotated[int | None, typer.Option(min=1, help="maximum nodes of 8 GPUs; default: no limit")] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="assumed share of the GPU's peak FLOP/s")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="dollars per GPU-hour; default: an assumed price")] = None,
    table: Annotated[
        str | None, typer.Option("--table", metavar="PLACE", help="tables in decoding: host or file; default: device")
    ] = None,
    dry_run_mesh: Annotated[
        bool, typer.Option("--dry-run-mesh", help="trace a step of rank 0 of every mesh on fake tensors")
    ] = False,
) -> None:
    """Estimate a grid before it runs: parameters, FLOPs, memory, GPU-hours, cost, and which cells match in size.

    Nothing is trained; data is read only where the number of tokens depends on it. The plan is saved in DIR/plans/.
    With --dry-run-mesh, the first process of every mesh of several GPUs takes a step on fake tensors, and the bytes
    that it holds and sends are shown next to the plan's. It needs a C++ compiler and about 15 CPU seconds a mesh.

    Example: suite plan paper-fixed-memory --gpu h100
    """
    from suite.atomic import write_json
    from suite.inference.tables.loading import PLACES
    from suite.launch.checks.cells import refuse_unfit_evaluations
    from suite.launch.checks.memory import host_limit
    from suite.launch.preparation import refuse_other_file
    from suite.plan import plan as planning
    from suite.plan import this_machine
    from suite.plan.dry_run.report import dry_run_table, dry_runs_of
    from suite.plan.gpus import CPU
    from suite.plan.table import measured, partners_table, plan_notes, plan_table

    if table not in (None, *PLACES):
        raise UserError(f"--table: got {table!r}, allowed: {', '.join(PLACES)}")
    loaded = options.load(grid, need_data=False)
    if table is not None and not any(cell.model.has_tables for cell in loaded.cells):
        raise UserError(f"--table: got {table!r}, allowed: a grid with value tables, which {loaded.name} has not")
    check_folders(options.results, None, make=False)
    refuse_unfit_evaluations(loaded, options.results)
    measured_speeds = this_machine.speeds(options.results) if gpu.lower() == CPU else None
    if measured_speeds is None:
        assumptions = planning.assumptions(gpu, nodes, utilisation, price, table)
    else:
        device = this_machine.cpu(measured_speeds, host_limit())
        assumptions = planning.Assumptions(device, nodes=1, utilisation=1.0, table=table)
    path = options.results / "plans" / f"{loaded.name}-{Path(gpu).stem.lower()}.json"
    refuse_other_file(path, loaded)
    plans = planning.plan(loaded, assumptions, options.results / "cache")
    if measured_speeds is not None:
        plans = this_machine.with_speeds(plans, measured_speeds)
    document = planning.document(loaded, plans, assumptions) | {"file": str(loaded.source.resolve())}
    for entry, cell in zip(document["cells"], loaded.cells, strict=True):
        entry["measured"] = measured(options.results, cell, assumptions.gpu.name)
    dry_runs = dry_runs_of(plans, assumptions.gpu.capability) if dry_run_mesh else {}
    for entry in document["cells"]:
        if entry["run"] in dry_runs:
            entry["dry_run"] = dry_runs[entry["run"]].to_json()
    try:
        write_json(path, document)
    except OSError as error:  # for instance a colleague's folder, which may only be read
        print(f"suite: the plan is not saved: {path}: {error.strerror}", file=sys.stderr)
    except DiskFull as error:
        print(f"suite: the plan is not saved: {error}", file=sys.stderr)
    if options.as_json:
        print_json(document)
    else:
        print_table(plan_table(loaded.name, plans, assumptions))
        print_table(partners_table(plans))
        if dry_runs:
            print_table(dry_run_table(dry_runs))
        print("\n".join(plan_notes(plans, document)))


@app.command()
@expand_options
def status(grid: GridName, options: GridOptions) -> None:
    """Show the state, progress and remaining time of a grid's cells, and why the failed ones failed.

    Example: suite status laptop --json
    """
    from suite.launch.executor import executor_classes
    from suite.launch.status import grid_status
    from suite.records import run_dir

    loaded = options.load(grid)
    runs = [run_dir(options.results, cell) for cell in loaded.cells]
    statuses = grid_status(options.results, loaded)
    for kind in executor_classes():
        statuses = kind.with_jobs(statuses, runs)
    print_statuses(loaded, statuses, options.as_json)
    report_failures(statuses)


@app.command("export")
def export_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the name of a run in DIR/runs, or its path")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="a new folder")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Write the weights of a run in the format of transformers: safetensors, config and tokenizer.

    Those of a trained run are those of its last step; of another run, those of its newest checkpoint. A dense
    model loads as LlamaForCausalLM. Exports of other families include their modelling files
    (trust_remote_code=True).

    Example: suite export dense-w32-s0-0a1b2c3d --to exported
    """
    from suite.export.export import export
    from suite.launch.scoring import corpus_of
    from suite.records import RunDir
    from suite.train.checkpoint import final_step, load_model

    record = RunDir(find_run(run, results))
    cell = record.read_cell()
    corpus = corpus_of(record, cell)
    model = load_model(record, cell, corpus, step=final_step(record))
    files = export(model, to, corpus, cell.data.seq_len, cell.quantised, cell.kept_rows)
    if as_json:
        print_json({"run": record.name, "files": [str(path) for path in files]})
    else:
        print(f"{to}: {len(files)} files")


@app.command("import")
def import_run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="config.json, safetensors and a tokenizer")],
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="longest text scored at once; default: the checkpoint's maximum")
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Make a run from a Llama-style checkpoint in the format of transformers.

    The run is marked as not trained here. It can be evaluated, exported, and named by train.init_from.

    Example: suite import checkpoints/llama-2-7b
    """
    from suite.export.importing import differences, import_checkpoint

    check_folders(results, None)
    run = import_checkpoint(folder, results, seq_len)
    for other, fields in differences(run).items():
        print(
            f"{other} has the same weights, but is another run; fields that differ: {', '.join(fields)}",
            file=sys.stderr,
        )
    if as_json:
        print_json({"run": run.name, "path": str(run.path), "imported": run.read_cell().imported})
    else:
        print(run.name)


@app.command()
def baselines(baseline: Baselines = None, as_json: AsJson = False) -> None:
    """List the model families and the options of each.

    Example: suite baselines
    """
    from suite.baselines import loading
    from suite.cli.families import families, families_table

    loading.load_all(baseline or ())
    if as_json:
        print_json(families())
    else:
        print_table(families_table())


@app.command()
def fields(
    prefix: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help="list only these fields, e.g. train or data.tokenizer")
    ] = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """List the fields that a cell may set: type, default, meaning, and whether they are part of a run's identity.

    A change of a field that is part of the identity makes another run; a change of any other does not.

    Example: suite fields train
    """
    from suite.baselines import loading
    from suite.cli.fields import fields_json, fields_table, list_fields

    loading.load_all(baseline or ())
    chosen = list_fields(prefix)
    if as_json:
        print_json(fields_json(chosen))
    else:
        print_table(fields_table(chosen))


app.command()(sweep.cancel)
app.command("eval")(evaluate.evaluate)
app.command()(quantise.quantise)
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.add_typer(bench.app, name="bench")

if __name__ == "__main__":
    main()
