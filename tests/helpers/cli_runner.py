"""The command line as a function."""

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    """The exit code of a command and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Suite = Callable[..., Result]
