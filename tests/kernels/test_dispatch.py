"""The choice of an operator's implementation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch

ON_CUDA: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
"""The attributes of a CUDA tensor that the choice depends on."""


def test_device_and_dtype_decide_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    narrow, low = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)
    assert dispatch.choose(narrow) == "native"
    assert dispatch.choose(narrow, native_takes=False) == "torch"
    assert dispatch.choose(low) == "torch"
    assert dispatch.choose(narrow.to("meta")) == "torch"
    assert dispatch.choose(ON_CUDA) == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choose(narrow) == "torch"
    assert dispatch.choose(ON_CUDA) == "torch"
    assert dispatch.choose(ON_CUDA, "triton") == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="got 'cuda', allowed: native, torch, triton"):
        dispatch.choose(narrow)


def test_native_by_name_refuses_tensors_it_does_not_support() -> None:
    assert dispatch.choose(torch.zeros(2), "native") == "native"
    for tensor in (torch.zeros(2, dtype=torch.float64), ON_CUDA):
        with pytest.raises(ValueError, match=r"native: got torch.float\d\d on c\w+, allowed: contiguous torch.float32"):
            dispatch.choose(tensor, "native")
