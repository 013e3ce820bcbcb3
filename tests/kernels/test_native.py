"""The C library: compiled once by concurrent processes; without a compiler, PyTorch is used."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernels import dispatch, native, row_adamw
from kernels.embedding_bag import RowGradients

PROGRAM = "import torch; from kernels import dispatch; print(dispatch.choose(torch.zeros(1)))"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no library loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    for name in ("available", "library"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_processes_that_compile_at_the_same_time_leave_one_library(fresh: Path) -> None:
    pipe = subprocess.PIPE
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate() == ("native\n", "")
    (found,) = files(fresh)
    made = found.stat().st_mtime_ns
    assert native.available()
    assert files(fresh) == [found]
    assert found.stat().st_mtime_ns == made


def test_without_a_compiler_pytorch_is_used_and_native_by_name_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    with warnings.catch_warnings(action="error"):
        assert dispatch.choose(torch.zeros(1)) == "torch"
    with pytest.raises(native.Unavailable) as error:
        dispatch.choose(torch.zeros(1), "native")
    assert str(error.value) == "kernel backend native: no C compiler 'no-such-cc' (CC names another)"


@pytest.mark.parametrize("compiler", ["false", "true", f"{os.environ.get('CC', 'cc')} -mno-such-flag"])
def test_a_failing_compiler_causes_a_warning(compiler: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`true` succeeds and writes nothing."""
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=r"^kernel backend native: .*; the PyTorch path is used$"):
        assert dispatch.choose(torch.zeros(1)) == "torch"
    assert files(fresh) == []


def test_without_a_home_folder_pytorch_is_used_with_a_warning(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an account, as in some containers: `Path.home` then finds nothing without HOME."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.warns(UserWarning, match=r"no home folder for the library; set XDG_CACHE_HOME; the PyTorch path"):
        assert dispatch.choose(torch.zeros(1)) == "torch"


def test_c_code_that_differs_from_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.zeros(3, 2)
    assert row_adamw.RowAdamW(table, RowGradients(table))._ops is row_adamw.native
    monkeypatch.setattr(row_adamw.native, "exact", row_adamw.native.exact.__wrapped__)
    monkeypatch.setattr(torch.Tensor, "lerp_", lambda self, end, weight: self.mul_(1 - weight).add_(end, alpha=weight))
    with pytest.warns(UserWarning, match="not torch's AdamW"):
        adamw = row_adamw.RowAdamW(table, RowGradients(table))
    assert adamw._ops.__name__ == "kernels.row_adamw.reference"
