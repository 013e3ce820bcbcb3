"""What several verbs of the command line share: options, finding grids and runs, printing."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand

from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.grids import Grid
    from suite.launch.status import CellStatus
    from suite.launch.worker import Scoring


def _folder(results: Path) -> Path:
    """As it is, if it is a folder or can become one. Raises UserError."""
    there = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--results: got {results}, but {there} is a file, allowed: a folder")
    return results


GridName = Annotated[str, typer.Argument(metavar="GRID", help="a name in grids/, or a path to a .yaml file")]
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", callback=_folder, help="where runs and records live")
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", help="local data sets for evaluation, in hub layout")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="set a field of every cell, e.g. data.path=corpus/"),
]
Scales = Annotated[
    list[str] | None,
    typer.Option("--scale", metavar="NAME=FACTOR", help="multiply tokens, batch_rows or half_keys of every cell"),
]
Baselines = Annotated[
    list[Path] | None,
    typer.Option("--baseline", metavar="FILE.py", help="a file that registers a family (docs/adding-a-baseline.md)"),
]
RunCodeOption = Annotated[
    str | None,
    typer.Option(
        "--run-code",
        metavar="[KIND]",
        help="run programs that models write (humaneval, mbpp): in bubblewrap, unshare or rlimits; without KIND, in "
        "the strongest that works here",
    ),
]


class RunsCode(TyperCommand):
    """A verb with --run-code, whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does, the value filled in where the next word is not a kind."""
        from suite.evaluate.sandbox import RunCode

        for place, word in reversed([*enumerate(args)]):
            if word == "--run-code" and args[place + 1 : place + 2] not in [[kind] for kind in get_args(RunCode)]:
                args.insert(place + 1, "strongest")
        return super().parse_args(ctx, args)


def scoring_of(data_root: Path | None, run_code: str | None, here: bool = True) -> Scoring:
    """What scoring may use; where it is done `here`, a sandbox that does not work is refused now. Raises UserError."""
    from suite.evaluate.sandbox import RunCode, sandbox_of
    from suite.launch.worker import Scoring

    if run_code is not None and run_code not in get_args(RunCode):
        raise UserError(f"--run-code: got {run_code!r}, allowed: {', '.join(get_args(RunCode))}")
    checked = cast("RunCode | None", run_code)
    if here:
        sandbox_of(checked)
    return Scoring(None if data_root is None else data_root.resolve(), checked)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for cyclic garbage, now or as Python ends: among torch's objects it is a sixth of a plan's time."""
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(_freeze)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _freeze() -> None:
    """Not with triton, which would report what is left as leaks."""
    if "triton" not in sys.modules:
        gc.freeze()


def load(
    grid: str,
    settings: list[str] | None,
    scales: list[str] | None = None,
    baselines: list[Path] | None = None,
    need_data: bool = True,
) -> Grid:
    """The grid of a name or a path, changed as --set and --scale say. Raises UserError."""
    from suite.grids import load_grid
    from suite.rescale import parse_scales, scaled

    factors = parse_scales(scales or [])
    return scaled(load_grid(grid, overrides(settings), need_data, baselines or ()), factors)


def overrides(settings: list[str] | None) -> dict[str, str]:
    """--set's values by field."""
    found = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set: got {setting!r}, allowed: field=value, e.g. train.lr=1e-3")
        found[path] = value
    return found


def run_path(run: str, results: Path) -> Path:
    """The folder of a run given by its path or its name. Raises UserError."""
    path = Path(run) if Path(run, "cell.json").is_file() else results / "runs" / run
    if not (path / "cell.json").is_file():
        raise UserError(f"RUN: got {run!r}, allowed: {allowed_runs(results)}")
    return path


def allowed_runs(results: Path) -> str:
    """What may stand for a run, in words."""
    known = sorted(path.parent.name for path in results.glob("runs/*/cell.json"))
    return f"a run's folder or one of {', '.join(known) or '(no runs yet)'}"


def check_folders(results: Path, data_root: Path | None, make: bool = True) -> None:
    """Raise UserError for data that is not there, or results that cannot be written; they are made if asked."""
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root: got {data_root}, which is no folder, allowed: a folder of data sets")
    try:
        if make:
            results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results: got {results}: {error.strerror}, allowed: a folder to write in") from None


def print_one(grid: Grid, results: Path, as_json: bool) -> None:
    """How a single cell stands; exit code 1 if it is not done."""
    from suite.launch.status import grid_status

    statuses = grid_status(results, grid)
    print_statuses(grid, statuses, as_json)
    complain_of_failures(statuses)
    if statuses[0].state != "done":
        raise typer.Exit(1)


def print_statuses(grid: Grid, statuses: list[CellStatus], as_json: bool) -> None:
    """How cells stand: a table, or the document of `suite status --json`."""
    from suite.launch.status import status_json, table

    if as_json:
        print_json(status_json(grid, statuses))
    else:
        print_table(table(grid, statuses))


def complain_of_failures(statuses: list[CellStatus]) -> None:
    """The failed cells with their causes, on stderr."""
    from suite.launch.status import failures

    lines = failures(statuses)
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("failed cells are left alone until --retry-failed", file=sys.stderr)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=1, allow_nan=False))


def print_table(table: Table) -> None:
    """A table on stdout."""
    from rich.console import Console

    # As wide as the table is: a terminal that is narrower wraps lines, where rich would cut numbers.
    wide = Console(width=10_000)
    Console(width=max(Console().width, wide.measure(table).maximum)).print(table)


def console() -> Any:
    """Where progress is shown: stderr."""
    from rich.console import Console

    return Console(stderr=True)
