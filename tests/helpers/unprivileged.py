"""Running Python as a user who may not read every file, which root otherwise may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

needs_permissions = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root reads everything, and setpriv is not installed"
)


def run(program: str, *arguments: object) -> str:
    """Return what a program prints when closed files are closed to it."""
    dropped = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*dropped, sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
