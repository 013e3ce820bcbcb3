"""Which implementation runs."""

import pytest
import torch

from kernels import dispatch


def test_the_device_decides_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.choose(torch.device("cpu")) == "torch"
    assert dispatch.choose(torch.device("cuda")) == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choose(torch.device("cuda")) == "torch"
    assert dispatch.choose(torch.device("cuda"), "triton") == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="allowed: torch, triton"):
        dispatch.choose(torch.device("cpu"))
