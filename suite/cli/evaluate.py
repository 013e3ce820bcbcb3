"""`suite eval`: score trained runs, or test the tasks themselves."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from suite.cli.options import (
    DataRoot,
    GridOptions,
    RunCodeOption,
    TableCache,
    TablePlace,
    TablePrefetch,
    TaskNames,
    allowed_runs,
    check_folders,
    expand_options,
    find_run,
    make_scoring,
    parse_tasks,
    print_json,
    print_statuses,
    print_table,
)
from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.cells import Cell, EvalConfig
    from suite.grids import Grid
    from suite.launch.scorer import Scorer
    from suite.records import RunDir

    Wanted = list[tuple[RunDir, Cell]]


@expand_options
def evaluate(
    options: GridOptions,
    target: Annotated[
        str | None, typer.Argument(metavar="RUN|GRID", help="the name of a run in DIR/runs, its path, or a grid")
    ] = None,
    tasks: TaskNames = None,
    preset: Annotated[str | None, typer.Option(help="a set of evaluations: paper or quick")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples in the prompt; default: as each task defines")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="score only the first N documents of each task")] = None,
    table_off: Annotated[
        bool,
        typer.Option("--table-off", help="read every row of value tables as zeros; scores are recorded separately"),
    ] = False,
    precision: Annotated[
        str, typer.Option(help="of matrix products: fp32, tf32 (GPUs only) or bf16; scores are recorded separately")
    ] = "fp32",
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle", help="test the tasks: score a model that knows every answer and one that is always wrong"
        ),
    ] = False,
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    table: TablePlace = None,
    cache: TableCache = None,
    prefetch: TablePrefetch = False,
) -> None:
    """Score a trained run, or all runs of a grid, on the evaluations that have no scores yet.

    These are the evaluations of the cells and those of --tasks or --preset. Nothing is trained. On a machine without
    a network, give local copies of the data with --data-root (see `suite data prefetch`).

    Example: suite eval laptop --preset quick --data-root data/eval
    """
    check_folders(options.results, data_root)
    scoring = make_scoring(data_root, run_code)
    if table is not None or cache is not None or prefetch:
        from suite.inference.tables.loading import parse_place

        scoring.place = parse_place(table, cache, prefetch)
    if oracle:
        changes = table_off or precision != "fp32" or scoring.place
        if target is not None or preset is not None or num_fewshot is not None or changes:
            raise UserError(
                "--oracle: scores no run; leave out RUN, --preset, --num-fewshot, --table-off, --precision and --table"
            )
        _score_oracle(tasks, data_root, run_code, limit, options.as_json)
        return
    if target is None:
        raise UserError("RUN|GRID: missing; give a run, a grid, or --oracle")
    extra = _extra_evaluations(tasks, preset, num_fewshot, limit, table_off, precision)
    grid, runs, results = _find_runs(target, options)
    without_tables = [cell.run_name for cell in grid.cells if not cell.model.has_tables] if table_off else []
    if table_off and len(without_tables) == len(grid.cells):
        raise UserError(f"--table-off: {without_tables[0]} has no value tables")
    if scoring.place is not None and not any(cell.model.has_tables for cell in grid.cells):
        raise UserError(f"--table: {grid.cells[0].run_name} has no value tables")
    if prefetch:
        _refuse_unknown_rows(grid)
    damaged = {run.name: damage for run in runs if (damage := run.damage()) is not None}
    wanted = [
        (run, cell.with_evaluations(() if cell.run_name in without_tables else extra))
        for run, cell in zip(runs, grid.cells, strict=True)
        if run.name not in damaged
    ]
    if not wanted:
        raise UserError(next(iter(damaged.values())))
    for damage in damaged.values():
        print(f"suite: not scored: {damage}", file=sys.stderr)
    if without_tables:
        print(f"suite: no tables to switch off: {', '.join(without_tables)}", file=sys.stderr)
    untrained, unscored = _score(wanted, scoring)
    _print_scores(grid, results, wanted, options.as_json)
    if untrained:
        print(f"not scored, because training is not finished: {', '.join(untrained)}", file=sys.stderr)
    if untrained or unscored or damaged:
        raise typer.Exit(1)


def _refuse_unknown_rows(grid: Grid) -> None:
    """Raise UserError if the rows that a model of the grid reads are not known before its layers run."""
    from suite.inference.tables.prefetch import refusal, rows_follow_ids
    from suite.models.accounting import meta_model

    for cell in grid.cells:
        if cell.model.has_tables and not rows_follow_ids(meta_model(cell.model, cell.data.vocabulary())):
            raise UserError(f"--{refusal(cell.model.family)}")


def _extra_evaluations(
    tasks: str | None, preset: str | None, num_fewshot: int | None, limit: int | None, table_off: bool, precision: str
) -> tuple[EvalConfig, ...]:
    """The evaluations that the options name, in addition to those of the cells."""
    from suite.cells import EvalConfig
    from suite.evaluate import presets

    allowed = get_args(EvalConfig.model_fields["precision"].annotation)
    if precision not in allowed:
        raise UserError(f"--precision: got {precision!r}, allowed: {', '.join(allowed)}")
    changes: dict[str, Any] = {"table_off": table_off, "precision": precision}
    if preset is not None:
        if tasks is not None or num_fewshot is not None or limit is not None:
            raise UserError("--preset: sets the tasks itself; leave out --tasks, --num-fewshot and --limit")
        return tuple(config.model_copy(update=changes) for config in presets.preset(preset))
    if tasks is None:
        if num_fewshot is not None or limit is not None or table_off or precision != "fp32":
            raise UserError(
                "--tasks: missing; --num-fewshot, --limit, --table-off and --precision apply to the tasks that it names"
            )
        return ()
    names = parse_tasks(tasks)
    if names is None:
        raise UserError("--tasks: got 'all', allowed: names (all is for --oracle), or use --preset")
    return (EvalConfig(tasks=names, num_fewshot=num_fewshot, limit=limit, **changes),)


def _find_runs(target: str, options: GridOptions) -> tuple[Grid, list[RunDir], Path]:
    """Return the grid (of one cell, if `target` is a run), its runs, and the folder of results."""
    from suite.grids import Grid, find_grid
    from suite.records import RunDir, run_dir

    # The name of a run ends in its hash; that of a grid does not.
    if os.path.isfile(Path(target, "cell.json")) or re.search(r"-[0-9a-f]{8}$", target):
        run = RunDir(find_run(target, options.results).resolve())
        return Grid(run.name, run.path, (run.read_cell(),)), [run], run.path.parent.parent
    try:
        find_grid(target)
    except UserError as error:
        from suite.parents import import_hint

        raise UserError(f"RUN|{error}; or {allowed_runs(options.results)}{import_hint(target)}") from None
    grid = options.load(target)
    return grid, [run_dir(options.results, cell) for cell in grid.cells], options.results


def _score(wanted: Wanted, scoring: Scorer) -> tuple[list[str], list[str]]:
    """Score what has no scores yet; see `score_runs`."""
    from suite.launch.scoring import of_other_data, score_runs

    # A shell starts background jobs with SIGINT ignored; this lets them be interrupted, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        left_out = score_runs(wanted, scoring, lambda text: print(text, file=sys.stderr))
    except KeyboardInterrupt:
        print("suite: interrupted; complete scores are saved, and the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    if scoring.data_root is not None:
        for run, cell in wanted:
            for line in of_other_data(run, cell.evaluate, scoring.data_root):
                print(f"suite: {line}", file=sys.stderr)
    return left_out


def _print_scores(grid: Grid, results: Path, wanted: Wanted, as_json: bool) -> None:
    from suite.launch.scoring import scores_of
    from suite.launch.status import grid_status, status_json

    statuses = grid_status(results, grid)
    scores = {run.name: scores_of(run, cell.evaluate) for run, cell in wanted}
    if as_json:
        document = status_json(grid, statuses)
        cells = [cell | {"scores": scores.get(cell["run"], [])} for cell in document["cells"]]
        print_json(document | {"cells": cells})
    else:
        print_statuses(grid, statuses, as_json=False)
        print_table(_scores_table(scores))


def _score_oracle(
    tasks: str | None, data_root: Path | None, run_code: str | None, limit: int | None, as_json: bool
) -> None:
    from suite.evaluate import oracle
    from suite.evaluate.sandbox import sandbox_of
    from suite.evaluate.task_list import TASKS

    names, sandbox = parse_tasks(tasks), None
    left_out: list[str] = []
    running = [name for name, task in TASKS.items() if task.programs is not None]
    if names is None or not set(running).isdisjoint(names):
        try:
            # These programs are the reference solutions of the data, so they need no permission, only a sandbox.
            sandbox = sandbox_of(run_code or "strongest")  # type: ignore[arg-type]
        except UserError as error:
            if names is not None or run_code is not None:
                raise
            left_out += running
            print(f"suite: left out: {', '.join(running)}: {error}", file=sys.stderr)
    if names is None:
        names, absent = oracle.every_task(data_root, run_code=sandbox is not None)
        left_out += absent
        if absent:
            remedy = f"{data_root} lacks their data; get it with: suite data prefetch {data_root}"
            print(f"suite: left out: {', '.join(absent)}: {remedy}", file=sys.stderr)
    report = oracle.run(names, data_root, sandbox=sandbox, limit=limit) | {"left_out": left_out}
    if as_json:
        print_json(report)
    else:
        print_table(_oracle_table(report))


def _scores_table(scores: dict[str, list[dict[str, Any]]]) -> Table:
    from rich.table import Table

    table = Table("run", "task", "few-shot", "n", "cut", "metric", "value", "stderr")
    for run, rows in scores.items():
        for row in rows:
            counts = [str(row[key]) for key in ("few_shot", "n", "cut")]
            numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("value", "stderr")]
            terms = {"table off": row["table_off"], row["precision"]: row["precision"] != "fp32"}
            changed = ", ".join(term for term, applies in terms.items() if applies)
            task = f"{row['task']} ({changed})" if changed else row["task"]
            table.add_row(run, task, *counts, row["metric"], *numbers)
    return table


def _oracle_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "n", "metric", "oracle", "wrong", "ceiling")
    for name, task in report["tasks"].items():
        if not task["metrics"]:
            table.add_row(name, str(task["n"]), *["-"] * 4)
        for metric, values in task["metrics"].items():
            numbers = [f"{values[key]:.4f}" for key in ("oracle", "wrong", "ceiling")]
            table.add_row(name, str(task["n"]), metric, *numbers)
    return table
