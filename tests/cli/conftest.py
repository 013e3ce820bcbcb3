"""The command line in this process, in a folder of the test."""

import sys
from pathlib import Path

import pytest
import torch
from cli_runner import Suite, Told

from suite.cli.main import main

torch.set_num_threads(1)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Suite:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str | Path) -> Told:
        monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        return Told(code if isinstance(code, int) else 0, *capfd.readouterr())

    return call
