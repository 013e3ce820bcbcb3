"""Ctrl-C while a command starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("package", ["analysis", "suite"])
def test_an_interruption_of_imports_is_one_line(package: str, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    done = subprocess.run(
        [sys.executable, "-m", package, "report"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs with it ignored
    )
    assert (done.returncode, done.stderr) == (130, f"{package}: interrupted\n")
