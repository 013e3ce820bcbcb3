"""`python -m analysis VERB`: records or tables in; laws, comparisons, figures and reports out.

Heavy modules (pandas, scipy, matplotlib) are imported by the verb that needs them, so that `--help` is fast.
"""

from __future__ import annotations

import errno
import os
import sys

import typer

from analysis.cli import compare, fit, instruments, next_parameter, predict, records
from analysis.errors import InputError

_OTHER = "correct its permissions, or use another path"
UNUSABLE = {errno.ENAMETOOLONG: "use a shorter path", errno.EACCES: _OTHER, errno.EPERM: _OTHER, errno.EROFS: _OTHER}
"""Errors of a path that cannot be used, and what to do."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Scaling laws, comparisons, figures and reports, from run records or from any table of runs. "
        "Exit codes: 0, done; 1, some runs of the grid failed and the others are reported; 2, invalid input."
    ),
)
app.command(epilog=fit.EXAMPLE)(fit.fit)
app.command(epilog=predict.PREDICT)(predict.predict)
app.command(epilog=predict.OPTIMUM)(predict.optimum)
app.command(epilog=predict.SELECT)(predict.select)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.command("next", epilog=next_parameter.EXAMPLE)(next_parameter.next_parameter)
app.command(epilog=instruments.EXAMPLE)(instruments.instruments)
for verb, example in records.VERBS:
    app.command(epilog=f"Example: python -m analysis {example}")(verb)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(
            "python -m analysis", list(sys.argv[1:] if arguments is None else arguments)
        ) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return int(code or 0)
    except typer.Exit as done:
        return int(done.exit_code)
    except InputError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("analysis: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it; discard what Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in UNUSABLE and error.filename is not None:
            print(f"analysis: {error.filename}: {error.strerror}; {UNUSABLE[error.errno]}", file=sys.stderr)
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"analysis: {error.filename or 'stdout'}: cannot be written: {error.strerror}", file=sys.stderr)
        os._exit(2)  # what Python writes of stdout as it ends fails, too
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # typer's usage errors have no public base class; its help, shown when no verb is given, is one of them
        message = error.format_message()
        print(message if "\n" in message else f"analysis: {message}", file=sys.stderr)
        return 2
