"""The command line in this process, in a folder of the test."""

import sys
from pathlib import Path

import pytest
import torch
from cli_runner import Result, Suite

from suite.cli.main import main

torch.set_num_threads(1)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Suite:
    """Return the command line as a function that runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main()
        code = exited.value.code
        return Result(code if isinstance(code, int) else 0, *capfd.readouterr())

    return call
