"""Options that several verbs share, and the lookups and printing behind them."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.grids import Grid
    from suite.launch.scorer import Scorer
    from suite.launch.status import CellStatus


def _results_folder(results: Path) -> Path:
    """Return `results` if it is a folder or can become one. Raises UserError."""
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--results: {results} cannot be a folder, because {existing} is a file")
    return results


GridName = Annotated[str, typer.Argument(metavar="GRID", help="a name in grids/, or a path to a .yaml file")]
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", callback=_results_folder, help="folder of runs and records")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", metavar="DIR", help="local copies of the evaluation data sets (docs/evaluation.md)"),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout; everything else goes to stderr")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="set a field of every cell, e.g. data.path=corpus/; repeatable"),
]
Scales = Annotated[
    list[str] | None,
    typer.Option(
        "--scale", metavar="NAME=FACTOR", help="multiply tokens, batch_rows or half_keys of every cell; repeatable"
    ),
]
Baselines = Annotated[
    list[Path] | None,
    typer.Option(
        "--baseline",
        metavar="FILE.py",
        help="a file that registers a model family (docs/adding-a-baseline.md); repeatable",
    ),
]
RunCodeOption = Annotated[
    str | None,
    typer.Option(
        "--run-code",
        metavar="KIND",
        help="allow tasks that run model-written programs (humaneval, mbpp), in the sandbox KIND: bubblewrap, unshare "
        "or rlimits; strongest: the first of bubblewrap and unshare that works here",
    ),
]
TablePlace = Annotated[
    str | None,
    typer.Option(
        "--table", metavar="PLACE", help="leave value tables in host memory or in the checkpoint's file: host or file"
    ),
]
TableCache = Annotated[
    str | None,
    typer.Option("--cache", metavar="KIND:N%", help="with --table: hold N % of the rows in memory; lru or static"),
]
TablePrefetch = Annotated[
    bool,
    typer.Option("--prefetch", help="with --table: read rows that follow from token ids before their layer runs"),
]
TaskNames = Annotated[
    str | None, typer.Option("--tasks", metavar="A,B", help="tasks by name, separated by commas, or all")
]


@dataclass(frozen=True)
class GridOptions:
    """The options of every verb that reads a grid."""

    results: Results = Path("results")
    set_: Overrides = None
    scale: Scales = None
    baseline: Baselines = None
    as_json: AsJson = False

    def load(self, grid: str, need_data: bool = True) -> Grid:
        """Load a grid by name or path and apply --set, --scale and --baseline.

        Args:
            grid: A name in grids/ or a path.
            need_data: Whether the data files must exist (see `suite.grids.load_grid`).

        Raises:
            UserError: The grid, a baseline or an option is invalid.
        """
        from suite.grids import load_grid
        from suite.rescale import parse_scales, rescale

        factors = parse_scales(self.scale or [])
        return rescale(load_grid(grid, parse_overrides(self.set_), need_data, self.baseline or ()), factors)


def expand_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take a dataclass of options: each field becomes an option of the command.

    Typer reads the options from a function's signature, so the returned function has one in which the dataclass
    parameter is replaced by the fields of the dataclass.
    """
    parameters = inspect.signature(verb, eval_str=True).parameters
    (group,) = (parameter for parameter in parameters.values() if is_dataclass(parameter.annotation))
    fields = inspect.signature(group.annotation, eval_str=True).parameters

    @functools.wraps(verb)
    def command(**arguments: Any) -> None:
        options = group.annotation(**{name: arguments.pop(name) for name in fields})
        verb(**arguments, **{group.name: options})

    own = [parameter for parameter in parameters.values() if parameter.name != group.name]
    flat = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *fields.values())]
    command.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return command


def make_scoring(data_root: Path | None, run_code: str | None, here: bool = True) -> Scorer:
    """Build the settings for scoring from --data-root and --run-code.

    Args:
        data_root: Folder of local evaluation data, if any.
        run_code: Sandbox in which model-written programs may run; None: they may not.
        here: Whether scoring happens on this machine; the sandbox is then tried at once.

    Raises:
        UserError: The sandbox is unknown, or does not work here.
    """
    from suite.evaluate.sandbox import RunCode, sandbox_of
    from suite.launch.scorer import Scorer

    if run_code is not None and run_code not in get_args(RunCode):
        raise UserError(f"--run-code: got {run_code!r}, allowed: {', '.join(get_args(RunCode))}")
    kind = cast("RunCode | None", run_code)
    if here:
        sandbox_of(kind)
    return Scorer(None if data_root is None else data_root.resolve(), kind)


def parse_overrides(settings: list[str] | None) -> dict[str, str]:
    """Parse the values of --set into a mapping from field to value. Raises UserError."""
    overrides = {}
    for setting in settings or []:
        field, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set: {setting!r} has no value; write FIELD=VALUE, for example train.lr=1e-3")
        overrides[field] = value
    return overrides


def parse_tasks(tasks: str | None) -> tuple[str, ...] | None:
    """Parse the value of --tasks; None stands for all tasks, and for an option that is not given. Raises UserError."""
    if tasks is None or tasks.strip() == "all":
        return None
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks: got {tasks!r}, allowed: all, or names separated by commas")
    return names


def find_run(run: str, results: Path) -> Path:
    """Return the folder of a run given by its path or its name. Raises UserError."""
    # Unlike Path.is_file, os.path.isfile is false for a text that is too long for a path.
    path = Path(run) if os.path.isfile(Path(run, "cell.json")) else results / "runs" / run
    if not os.path.isfile(path / "cell.json"):
        from suite.parents import import_hint

        raise UserError(f"RUN: got {run!r}, allowed: {allowed_runs(results)}{import_hint(run)}")
    return path


def allowed_runs(results: Path) -> str:
    """Describe the values allowed for RUN, for an error message."""
    names = sorted(path.parent.name for path in results.glob("runs/*/cell.json"))
    return f"the folder of a run, or one of {', '.join(names) or '(no runs yet)'}"


def check_folders(results: Path, data_root: Path | None, make: bool = True) -> None:
    """Check that the data exists and that results can be written.

    Args:
        results: Folder of results.
        data_root: Folder of evaluation data, if one was given.
        make: Whether to create `results`, and to require that it can be written.

    Raises:
        UserError: A folder is missing, or cannot be created or written.
    """
    if data_root is not None and not data_root.is_dir():
        raise UserError(
            f"--data-root: there is no folder {data_root}; name one with data sets as on the hub, or download "
            f"them: suite data prefetch {data_root} --tasks TASKS"
        )
    try:
        if make:
            results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results: cannot create {results}: {error.strerror}") from None
    if make and not os.access(results, os.W_OK | os.X_OK):
        raise UserError(f"--results: {results} cannot be written; use another folder, or correct its permissions")


def print_one(grid: Grid, results: Path, as_json: bool) -> None:
    """Print the status of a grid of one cell; exit with code 1 if the cell is not done.

    Args:
        grid: A grid of one cell.
        results: The results folder.
        as_json: Whether to print the JSON document.
    """
    from suite.launch.status import grid_status

    statuses = grid_status(results, grid)
    print_statuses(grid, statuses, as_json)
    report_failures(statuses)
    if statuses[0].state != "done":
        raise typer.Exit(1)


def print_statuses(grid: Grid, statuses: list[CellStatus], as_json: bool) -> None:
    """Print the status of every cell, as a table or as the JSON document of `suite status`.

    Args:
        grid: The grid.
        statuses: The status of every cell.
        as_json: Whether to print the JSON document.
    """
    from suite.launch.status import status_json, table

    if as_json:
        print_json(status_json(grid, statuses))
    else:
        print_table(table(grid, statuses))


def report_failures(statuses: list[CellStatus]) -> None:
    """Print the failed cells and their causes on stderr."""
    from suite.launch.status import DAMAGED, failures

    for line in failures(statuses):
        print(line, file=sys.stderr)
    if any(status.state == "failed" and status.note != DAMAGED for status in statuses):
        print("failed cells are not started again without --retry-failed", file=sys.stderr)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=1, allow_nan=False))


def print_table(table: Table) -> None:
    """Print a table on stdout at its full width.

    A terminal that is narrower wraps the lines; rich would truncate the numbers instead.
    """
    from rich.console import Console

    unlimited = Console(width=10_000)
    Console(width=max(Console().width, unlimited.measure(table).maximum)).print(table)


def stderr_console() -> Any:
    """Return a rich console on stderr, for progress."""
    from rich.console import Console

    return Console(stderr=True)
