"""`python -m analysis frame|fit|compare|figures|report|tuning|paper|kernels`: records or tables in, laws, figures out.

Exit codes: 0 done; 1 some runs of the grid failed, the rest is reported; 2 the input is wrong, said in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from analysis.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; gives the exit code."""
    try:
        options = _parser().parse_args(arguments)
        code = int(options.verb(options))
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analysis: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as `head`, has had enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """An option that cannot be read is one line, as any other fault of the input is."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from analysis.comparisons import table_file
    from analysis.fits import fitting

    own = {"fit": fitting.add_options, "compare": table_file.add_options}
    outputs = {
        "frame": "the frame as .csv, .jsonl or .parquet",
        "tuning": "a Markdown file",
        "fit": "with --data: the table with columns predicted and fitted, as .csv, .jsonl or .parquet",
        **dict.fromkeys(("figures", "report", "paper", "kernels"), "the figures' folder"),
    }
    parser = _Parser(prog="python -m analysis", description=__doc__)
    common = _Parser(add_help=False)
    common.add_argument("--results", type=Path, default=Path("results"), help="folder of runs/ and grids/")
    common.add_argument("--grid", help="one grid by name; otherwise all runs")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    verbs = parser.add_subparsers(required=True, metavar="frame|fit|compare|figures|report|tuning|paper|kernels")
    for name, function, words, example in (
        (
            "frame",
            frame,
            "the tidy frame; --out FILE.csv, .jsonl or .parquet",
            "--grid laptop --out laptop.csv",
        ),
        (
            "fit",
            fit,
            "a law fitted to any table of runs; or, without --law, the fits of a grid's outcomes",
            '--law chinchilla --data runs.csv --columns "N=params,D=tokens,L=loss" --json',
        ),
        (
            "compare",
            compare,
            "families of any table of runs against a reference",
            '--data runs.csv --columns "family=family,cell=size,seed=seed,C=flops,y=loss" --json',
        ),
        (
            "figures",
            figures,
            "the figures of a grid; --out is their folder",
            "--grid laptop",
        ),
        (
            "report",
            report,
            "figures and report.md of a grid; --out is the figures' folder",
            "--grid laptop",
        ),
        (
            "tuning",
            tuning,
            "what a tuning grid chose, as Markdown; --out FILE.md",
            "--grid tune-laptop --out tune.md",
        ),
        (
            "paper",
            paper,
            "the paper's figures and tables, published numbers and matching runs; --out is their folder",
            "--out figures/paper",
        ),
        (
            "kernels",
            kernels,
            "the kernels' rooflines from RESULTS/bench; --out is their folder",
            "--results results",
        ),
    ):
        verb = verbs.add_parser(
            name,
            parents=[common],
            help=words,
            description=words,
            epilog=f"Example: python -m analysis {name} {example}",
        )
        verb.set_defaults(verb=function)
        if name in outputs:
            verb.add_argument("--out", type=Path, help=outputs[name])
        if name in own:
            own[name](verb)
    return parser


def frame(options: argparse.Namespace) -> int:
    """Write the frame to a file, or to stdout as CSV or JSON."""
    from analysis.records.frame import load
    from analysis.records.tables import write_table

    table = load(options.results, options.grid)
    if options.out is not None:
        write_table(table, options.out)
        print(f"{options.out}: {len(table)} rows", file=sys.stderr)
    elif options.json:
        print(table.to_json(orient="records"))
    else:
        table.to_csv(sys.stdout, index=False)
    return 0


def fit(options: argparse.Namespace) -> int:
    """A law on a file (--law, --data, --columns), or the fits of one grid's outcomes."""
    if options.law is not None or options.data is not None:
        from analysis.fits.fitting import main as fit_file

        return fit_file(options, _finite)
    if options.out is not None:
        raise InputError("--out: only with --law, --data and --columns")
    from analysis.comparisons.trends import trends
    from analysis.records.runs import read_runs

    found = trends(read_runs(options.results, options.grid))
    if options.json:
        print(json.dumps(_finite({"grid": options.grid, "fits": [asdict(trend) for trend in found]})))
        return 0
    for trend in found:
        print(f"{trend.outcome}, {trend.family}: {trend.runs} runs, {trend.cells} cells")
        for term, (estimate, low, high) in trend.estimates.items():
            known = "no interval: cells of one run" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
            print(f"  {term}: {estimate:.4g} {known}")
        open_terms, score = ", ".join(trend.not_identified) or "none", "too few cells"
        if trend.held_out:
            score = f"{trend.held_out['cell']}, relative error {float(trend.held_out['relative_error']):+.2%}"
        print(f"  not identified: {open_terms}; held out: {score}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Families of a file against a reference: paired differences and compute multipliers."""
    from analysis.comparisons.table_file import main as compare_file

    return compare_file(options, _finite)


def figures(options: argparse.Namespace) -> int:
    """Draw every figure of the grids asked for, and say what is missing."""
    from analysis.figures.gallery import draw
    from analysis.records.frame import load_published
    from analysis.records.runs import read_runs, read_source
    from analysis.report.build import grids

    documents = []
    for grid in grids(options.results, options.grid):
        runs, folder = read_runs(options.results, grid), options.out or _figures(options) / grid
        source = read_source(options.results, grid)
        drawn, missing = draw(runs, grid, folder, load_published(options.results), source)
        paths = {name: [str(path) for path in files] for name, files in drawn.items()}
        documents.append({"grid": grid, "figures": paths, "missing": missing})
        for line in [*(files[0] for files in paths.values()), *(f"missing: {line}" for line in missing)]:
            print(line, file=sys.stderr)
    if options.json:
        print(json.dumps(documents))
    return 0


def report(options: argparse.Namespace) -> int:
    """Figures and report of the grids asked for; 1 if any of their runs failed."""
    from analysis.report.build import grids, write

    documents = []
    for grid in grids(options.results, options.grid):
        document = write(options.results, grid, options.out or _figures(options) / grid)
        documents.append(document)
        for line in [document["report"], document["page"], *(f"missing: {line}" for line in document["missing"])]:
            print(line, file=sys.stderr)
    if options.json:
        print(json.dumps(documents))
    failed = [name for document in documents for name in document["failed"]]
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}; causes are in the report", file=sys.stderr)
    return 1 if failed else 0


def _figures(options: argparse.Namespace) -> Path:
    """Where figures go unless --out says: a folder beside the results they are drawn from."""
    folder: Path = options.results.parent / "figures"
    return folder


def tuning(options: argparse.Namespace) -> int:
    """The best setting of each family of a tuning grid, whether it is interior, and every setting tried."""
    from analysis.comparisons.tuning import choices, markdown
    from analysis.records.runs import read_runs

    runs = read_runs(options.results, options.grid)
    if options.json:
        print(json.dumps(_finite([asdict(choice) for choice in choices(runs)])))
    elif options.out is not None:
        try:
            options.out.write_text(markdown(runs))
        except OSError as error:
            raise InputError(f"--out {options.out}: cannot be written: {error.strerror}") from None
    else:
        print(markdown(runs), end="")
    return 0


def paper(options: argparse.Namespace) -> int:
    """The figures and tables of "Memory Layers at Scale", its numbers and ours."""
    from analysis.paper.figures import draw

    folder = options.out or _figures(options) / "paper"
    files = {name: [str(path) for path in paths] for name, paths in draw(options.results, folder).items()}
    for paths in files.values():
        print(paths[0], file=sys.stderr)
    if options.json:
        print(json.dumps(files))
    return 0


def kernels(options: argparse.Namespace) -> int:
    """The kernels' speed beside copy bandwidth, from what was measured on any machine."""
    from analysis.figures.roofline import draw

    drawn, missing = draw(options.results / "bench", options.out or _figures(options) / "bench")
    files = {name: [str(path) for path in paths] for name, paths in drawn.items()}
    for line in [*(paths[0] for paths in files.values()), *(f"missing: {line}" for line in missing)]:
        print(line, file=sys.stderr)
    if options.json:
        print(json.dumps({"figures": files, "missing": missing}))
    return 0


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null, so that the document is JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
