"""`suite eval`: score trained runs, test the tasks themselves, fetch their data. Arguments in, tables out; no logic."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from suite.cli.options import (
    AsJson,
    Baselines,
    DataRoot,
    Overrides,
    Results,
    RunCodeOption,
    RunsCode,
    Scales,
    allowed_runs,
    check_folders,
    load,
    print_json,
    print_statuses,
    print_table,
    run_path,
    scoring_of,
)
from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.cells import EvalConfig
    from suite.grids import Grid
    from suite.records import RunDir


class _Eval(TyperGroup):
    """`suite eval RUN` is `suite eval score RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does, with the verb put in where it was left out."""
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["score", *args])


app = typer.Typer(cls=_Eval, rich_markup_mode=None, help="Score trained runs on what they have no scores for yet.")

TaskNames = Annotated[str | None, typer.Option("--tasks", metavar="all|A,B", help="tasks by name, divided by commas")]


@app.command(cls=RunsCode)
def score(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN|GRID", help="a run's name in DIR/runs, its path, or a grid")
    ] = None,
    tasks: TaskNames = None,
    preset: Annotated[str | None, typer.Option(help="a set of evaluations: paper or quick")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in the prompt; default: the task's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="score only the first documents of each task")] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="no run: a model that knows every answer, and one that is always wrong")
    ] = False,
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    results: Results = Path("results"),
    set_: Overrides = None,
    scale: Scales = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained run, or all of a grid, on what has no scores yet: what was asked of it, and what is asked here.

    `suite eval prefetch DIR` downloads what the tasks read, for machines without network.

    Example: suite eval laptop --preset quick --data-root data/eval
    """
    check_folders(results, data_root)
    scoring = scoring_of(data_root, run_code)
    if oracle:
        if target is not None or preset is not None or num_fewshot is not None:
            raise UserError("--oracle: got a run, a preset or examples with it, allowed: --tasks and --limit")
        _oracle(tasks, data_root, run_code, limit, as_json)
        return
    if target is None:
        raise UserError("RUN|GRID: got nothing, allowed: a run, a grid, or --oracle")
    asked = _asked(tasks, preset, num_fewshot, limit)
    grid, runs, results = _runs(target, results, set_, scale, baseline)
    from suite.launch.scoring import of_other_data, score_runs, scores_of
    from suite.launch.status import grid_status, status_json

    # Set here, so that one started in the background of a script can be stopped, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        wanted = [(run, cell.also_asked(asked).evaluate) for run, cell in zip(runs, grid.cells, strict=True)]
        untrained = score_runs(wanted, scoring, lambda text: print(text, file=sys.stderr))
    except KeyboardInterrupt:
        print("suite: stopped; the scores that are whole stay, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    if data_root is not None:
        for run, evaluations in wanted:
            for line in of_other_data(run, evaluations, data_root):
                print(f"suite: {line}", file=sys.stderr)
    statuses = grid_status(results, grid)
    scores = {run.name: scores_of(run, evaluations) for run, evaluations in wanted}
    if as_json:
        document = status_json(grid, statuses)
        cells = [cell | {"scores": scores[cell["run"]]} for cell in document["cells"]]
        print_json(document | {"cells": cells})
    else:
        print_statuses(grid, statuses, as_json=False)
        print_table(_scores_table(scores))
    if untrained:
        print(f"not trained to their end, so not scored: {', '.join(untrained)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def prefetch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what becomes --data-root")],
    tasks: TaskNames = None,
    as_json: AsJson = False,
) -> None:
    """Download what the tasks read and DIR lacks, in the hub's layout, for machines without network.

    Example: suite eval prefetch data/eval --tasks nq_open,mmlu
    """
    from suite.evaluate.prefetch import prefetch

    if folder.exists() and not folder.is_dir():
        raise UserError(f"DIR: got {folder}, which is a file, allowed: a folder")
    written = [str(path) for path in prefetch(folder, _names(tasks))]
    if as_json:
        print_json({"folder": str(folder), "written": written})
    else:
        print("\n".join(written) or f"{folder} lacks nothing")


def _names(tasks: str | None) -> tuple[str, ...] | None:
    """The tasks of `--tasks`; None for all, and where the option is not given."""
    if tasks is None or tasks.strip() == "all":
        return None
    found = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not found:
        raise UserError(f"--tasks: got {tasks!r}, allowed: all, or names divided by commas")
    return found


def _asked(tasks: str | None, preset: str | None, num_fewshot: int | None, limit: int | None) -> tuple[EvalConfig, ...]:
    """The evaluations that the options ask for; none: what was asked of the cells."""
    from suite.cells import EvalConfig
    from suite.evaluate import presets

    if preset is not None:
        if tasks is not None or num_fewshot is not None or limit is not None:
            raise UserError("--preset: got --tasks, --num-fewshot or --limit with it, allowed: the preset alone")
        return presets.preset(preset)
    if tasks is None:
        if num_fewshot is not None or limit is not None:
            raise UserError("--tasks: missing, allowed: tasks for --num-fewshot and --limit to hold for")
        return ()
    names = _names(tasks)
    if names is None:
        raise UserError("--tasks: got 'all', allowed: with --oracle only; for a run, names or --preset")
    return (EvalConfig(tasks=names, num_fewshot=num_fewshot, limit=limit),)


def _runs(
    target: str, results: Path, set_: list[str] | None, scale: list[str] | None, baseline: list[Path] | None
) -> tuple[Grid, list[RunDir], Path]:
    """A run as a grid of one cell, or a grid; their runs, and the folder of results."""
    from suite.grids import Grid, find_grid
    from suite.launch.status import run_dir
    from suite.records import RunDir

    # a run's name ends in its hash, a grid is a word or a file
    if Path(target, "cell.json").is_file() or re.search(r"-[0-9a-f]{8}$", target):
        run = RunDir(run_path(target, results).resolve())
        return Grid(run.name, run.path, (run.read_cell(),)), [run], run.path.parent.parent
    try:
        find_grid(target)
    except UserError as error:
        raise UserError(f"RUN|{error}; or {allowed_runs(results)}") from None
    grid = load(target, set_, scale, baseline)
    return grid, [run_dir(results, cell) for cell in grid.cells], results


def _oracle(tasks: str | None, data_root: Path | None, run_code: str | None, limit: int | None, as_json: bool) -> None:
    from suite.evaluate import oracle
    from suite.evaluate.sandbox import sandbox_of
    from suite.evaluate.tasks import code

    names, sandbox = _names(tasks), None
    if names is None or not code.TASKS.keys().isdisjoint(names):
        try:
            # these programs come with the data, no model writes them: walls are enough, no leave is needed
            sandbox = sandbox_of(run_code or "strongest")  # type: ignore[arg-type]
        except UserError as error:
            if names is not None or run_code is not None:
                raise
            print(f"suite: left out: {', '.join(code.TASKS)}: {error}", file=sys.stderr)
    report = oracle.run(names, data_root, sandbox=sandbox, limit=limit)
    if as_json:
        print_json(report)
    else:
        print_table(_oracle_table(report))


def _scores_table(scores: dict[str, list[dict[str, Any]]]) -> Table:
    from rich.table import Table

    table = Table("run", "task", "few-shot", "n", "cut", "metric", "value", "stderr")
    for run, rows in scores.items():
        for row in rows:
            numbers = ("-" if row[key] is None else f"{row[key]:.4f}" for key in ("value", "stderr"))
            counts = (str(row[key]) for key in ("few_shot", "n", "cut"))
            table.add_row(run, row["task"], *counts, row["metric"], *numbers)
    return table


def _oracle_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "n", "metric", "oracle", "wrong", "ceiling")
    for name, task in report["tasks"].items():
        for metric, values in task["metrics"].items():
            numbers = (f"{values[key]:.4f}" for key in ("oracle", "wrong", "ceiling"))
            table.add_row(name, str(task["n"]), metric, *numbers)
    return table
