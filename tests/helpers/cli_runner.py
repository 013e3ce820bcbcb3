"""The command line as a function."""

from collections.abc import Callable
from typing import NamedTuple


class Told(NamedTuple):
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Suite = Callable[..., Told]
