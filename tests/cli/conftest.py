"""The command line in this process, in a folder of the test."""

import os
import sys
from pathlib import Path

import pytest
import torch
from running import Suite, Told

from suite.cli.main import main

os.environ["HF_HUB_OFFLINE"] = "1"
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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real evaluation sets; tests that need it are skipped where it is absent."""
    shared = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "eval").is_dir():
        pytest.skip(f"no evaluation data in {shared / 'eval'} (set SHARED_DATA)")
    return shared / "eval"
