"""Verbs that read run records: frame, figures, report, tuning, effects, paper and kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.cli.options import REFERENCE, AsJson, FigureFolder, Grid, Reference, Results, print_json

if TYPE_CHECKING:
    from analysis.records.grid_data import GridData

FAILED = 10
"""Most failed runs that are named on the terminal."""


def frame(
    results: Results = Path("results"),
    grid: Grid = None,
    reference: Reference = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write a .csv, .jsonl or .parquet file")] = None,
    as_json: AsJson = False,
) -> int:
    """Write the frame, one row per run, step, task and metric, to a file, or to stdout as CSV or JSON.

    Published numbers are rows, too: source is `run` in the rows of runs. docs/records.md explains every column.

    Example: python -m analysis frame --grid laptop --out frame.parquet
    """
    from analysis.records.csv_text import csv_chunks
    from analysis.records.frame import load
    from analysis.records.tables import check_target, write

    if out is not None:
        check_target(out)
    loaded = load(results, grid, reference or REFERENCE)
    if out is not None:
        rows = write(out, lambda: loaded.table, loaded.tables)
        print(f"{out}: {rows} rows", file=sys.stderr)
    elif as_json:
        print(loaded.table.to_json(orient="records"))
    else:
        for number, part in enumerate(loaded.tables()):
            sys.stdout.writelines(chunk.decode() for chunk in csv_chunks(part, header=number == 0))
    for run, cause in loaded.left_out.itertuples(index=False):
        print(f"left out: {run}: {cause}", file=sys.stderr)
    return 1 if len(loaded.left_out) else 0


def figures(
    results: Results = Path("results"),
    grid: Grid = None,
    reference: Reference = None,
    out: FigureFolder = None,
    as_json: AsJson = False,
) -> int:
    """Draw every figure of a grid and list the missing ones with the reason."""
    from analysis.comparisons.grid import Comparisons
    from analysis.figures.context import context
    from analysis.figures.gallery import draw

    documents = []
    for name, data in _grids(results, grid, reference):
        plots = context(Comparisons(data))
        drawn, missing = draw(plots, out or _figures(results) / name)
        paths = {figure: [str(path) for path in files] for figure, files in drawn.items()}
        documents.append({"grid": name, "figures": paths, "missing": missing})
        _log([*(files[0] for files in paths.values()), *(plots.notes_on_missing if missing else [])], missing)
    if as_json:
        print(json.dumps(documents))
    return 0


def report(
    results: Results = Path("results"),
    grid: Grid = None,
    reference: Reference = None,
    out: FigureFolder = None,
    as_json: AsJson = False,
) -> int:
    """Draw the figures of a grid and write its report; exit code 1 if any of its runs failed or is damaged."""
    from analysis.report.build import write

    documents = []
    for name, data in _grids(results, grid, reference):
        document = write(data, results / "grids" / name, out or _figures(results) / name)
        documents.append(document)
        _log([document["report"], document["page"]], [])
        if document["missing"]:
            names = ", ".join(line.partition(":")[0] for line in document["missing"])
            print(f"figures not drawn: {names}; the report states what each needs", file=sys.stderr)
    if as_json:
        print(json.dumps(documents))
    failed = [name for document in documents for name in document["failed"]]
    if failed:
        names = ", ".join(failed[:FAILED]) + (f" and {len(failed) - FAILED} more" if len(failed) > FAILED else "")
        print(f"{len(failed)} runs failed: {names}; causes are in the report", file=sys.stderr)
    return 1 if failed else 0


def _grids(results: Path, grid: str | None, reference: str | None) -> Iterator[tuple[str, GridData]]:
    """Yield the records of the named grid, or of every grid."""
    from analysis.records.frame import load_published
    from analysis.records.grid_data import grids_of, load

    for name in grids_of(results, grid):
        yield name, load(results, name, reference, load_published(results), fallback=REFERENCE)


def tuning(
    results: Results = Path("results"),
    grid: Grid = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write a Markdown file")] = None,
    as_json: AsJson = False,
) -> int:
    """Print the best settings of each variant in a tuning grid, whether they are interior, and all settings tried."""
    from analysis.comparisons.choosing.tuning import choices, markdown, table
    from analysis.records.grid_data import load
    from analysis.records.writing import write_text

    scored = table(load(results, grid, fallback=REFERENCE))
    if as_json:
        print_json([asdict(choice) for choice in choices(scored)])
    elif out is not None:
        write_text(out, markdown(scored), "--out")
    else:
        print(markdown(scored), end="")
    return 0


def effects(results: Results = Path("results"), grid: Grid = None, as_json: AsJson = False) -> int:
    """Print what each two-level setting of a factorial grid does to the bits stored, and interactions of two."""
    from analysis.comparisons.choosing import effects as factorial
    from analysis.records.grid_data import load

    estimated = factorial.effects(load(results, grid, fallback=REFERENCE))
    if as_json:
        print_json([asdict(effect) for effect in estimated])
    else:
        print(factorial.markdown(estimated), end="")
    return 0


def paper(results: Results = Path("results"), out: FigureFolder = None, as_json: AsJson = False) -> int:
    """Draw the figures and tables of "Memory Layers at Scale": published numbers and matching runs."""
    from analysis.paper.figures import draw

    folder = out or _figures(results) / "paper"
    files = {name: [str(path) for path in paths] for name, paths in draw(results, folder).items()}
    _log([paths[0] for paths in files.values()], [])
    if as_json:
        print(json.dumps(files))
    return 0


def kernels(results: Results = Path("results"), out: FigureFolder = None, as_json: AsJson = False) -> int:
    """Draw the rooflines of the kernels from the measurements in DIR/bench."""
    from analysis.figures.roofline import draw

    drawn, missing = draw(results / "bench", out or _figures(results) / "bench")
    files = {name: [str(path) for path in paths] for name, paths in drawn.items()}
    _log([paths[0] for paths in files.values()], missing)
    if as_json:
        print(json.dumps({"figures": files, "missing": missing}))
    return 0


def _figures(results: Path) -> Path:
    """Return the default folder of figures: next to the results they are drawn from."""
    return results.parent / "figures"


def _log(written: list[str], missing: list[str]) -> None:
    for line in [*written, *(f"missing: {line}" for line in missing)]:
        print(line, file=sys.stderr)


VERBS = (
    (frame, "frame --grid laptop --out laptop.csv"),
    (figures, "figures --grid laptop"),
    (report, "report --grid laptop"),
    (tuning, "tuning --grid tune-laptop --out tune.md"),
    (effects, "effects --grid rates"),
    (paper, "paper --out figures/paper"),
    (kernels, "kernels --results results"),
)
