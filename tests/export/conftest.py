"""Exports are loaded by transformers as in a process of their own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from suite.models import registry


@pytest.fixture
def isolated_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread and a module cache of the test's own; unload its modules and unregister its baselines."""
    torch.set_num_threads(1)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(registry.families())
    yield
    registry.unregister(set(registry.families()) - before)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
