"""`suite quantise`: a smaller copy of a trained run, scored next to it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suite.cli.options import (
    AsJson,
    DataRoot,
    Results,
    RunCodeOption,
    check_folders,
    find_run,
    make_scoring,
    print_json,
    print_table,
)
from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.cells import Cell
    from suite.launch.scorer import Scorer
    from suite.records import RunDir


def quantise(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the name of a run in DIR/runs, or its path")],
    to: Annotated[str | None, typer.Option("--to", metavar="FORM", help="bf16, int8, int4, fp8 or nf4")] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="N%", help="retain the N % of rows that training text reads most")
    ] = None,
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Make a run with smaller tables from a trained run, and score it: bytes, loss, and every task of the run.

    --to rounds rows; --keep drops those that training text reads least, which then read as zeros.
    Nothing is trained. The new run is in the same folder as the trained one. Scores are compared with those of the
    trained run on the same documents, with paired standard errors.

    Example: suite quantise pkm-w32-k128-s0-0a1b2c3d --to int8
    """
    from suite.inference.tables.forms import FORMS
    from suite.launch.derived import quantise as quantising
    from suite.records import RunDir

    if to is None and keep is None:
        raise UserError("--to or --keep: missing; give a form, a share of rows, or both")
    if to is not None and to not in FORMS:
        raise UserError(f"--to: got {to!r}, allowed: {', '.join(FORMS)}")
    share = None if keep is None else _share(keep)
    check_folders(results, data_root)
    source = RunDir(find_run(run, results).resolve())
    cell = source.read_cell()
    if not cell.model.has_tables:
        raise UserError(f"RUN: got {source.name}, which has no value tables, allowed: a run of a family with tables")
    if cell.source is not None:
        raise UserError(
            f"RUN: got {source.name}, itself made by suite quantise, allowed: its source {cell.source.run_name}"
        )
    if not source.state().get("trained"):
        raise UserError(f"{source.path}: is not trained to its end; continue it with suite train")
    smaller = cell.model_copy(update={"quantised": to, "kept_rows": share})
    made = _make(source.path.parent.parent, smaller, make_scoring(data_root, run_code))
    document = quantising.summary(made, made.read_cell())
    if as_json:
        print_json(document)
    else:
        of_all = document["bytes"] / document["source_bytes"]
        print(f"{document['run']}: {document['bytes']:,} bytes of tables, {of_all:.1%} of {document['source_bytes']:,}")
        print_table(_table(document))


def _share(keep: str) -> float:
    """Return the share of rows that is retained."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", keep)
    if match is None or not 0 < float(match[1]) < 100:
        raise UserError(f"--keep: got {keep!r}, allowed: N%, with N above 0 and below 100")
    return float(match[1]) / 100


def _make(results: Path, cell: Cell, scoring: Scorer) -> RunDir:
    """Make and score the run; exit code 1 if that fails, and 130 after an interruption."""
    from suite.grids import Grid
    from suite.launch import preparation
    from suite.launch.checks import cells
    from suite.launch.interruption import Interruption
    from suite.launch.worker import run_cell
    from suite.records import Locked, run_dir

    cells.refuse_unfit_cells(Grid(cell.run_name, results, (cell,)), results, scoring)
    run = run_dir(results, cell)
    preparation.retry_failed(results, [cell])
    interruption = Interruption()
    try:
        if not run.state().get("trained"):
            preparation.prepare(results, cell)
        with interruption.on_signals():
            outcome = run_cell(run.path, scoring, interruption)
    except Locked as error:
        raise UserError(f"{error}; wait for it or stop it") from None
    except KeyboardInterrupt:
        print("suite: stopped; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    if outcome != "done":
        cause = run.state().get("cause") if outcome == "failed" else "locked by another process"
        print(f"suite: {run.path}: {outcome}: {cause}", file=sys.stderr)
        raise typer.Exit(1)
    return run


def _table(document: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "metric", "source", "difference", "stderr")
    for task, metrics in ({"(text)": {"loss": document["loss"]}} | document["tasks"]).items():
        for metric, values in metrics.items():
            numbers = (values[name] for name in ("reference", "difference", "stderr"))
            table.add_row(task, metric, *("-" if number is None else f"{number:.6g}" for number in numbers))
    return table
