"""A pytest plugin: every kernel launch of interpreted tests goes to the file RECORDED_LAUNCHES, ready to be compiled.

A line of JSON per launch: module, kernel and arguments. A tensor is its dtype and whether it is aligned to 16 bytes. Of
an integer that is not a constant, only what Triton specializes on is recorded: 1, a multiple of 16, or neither.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def describe(value: Any, is_constant: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, int | float | None):
        specialized = is_constant or isinstance(value, bool) or not isinstance(value, int) or value == 1
        return value if specialized else 16 if value % 16 == 0 else 3
    return {"type": value.name}


@pytest.fixture(autouse=True, scope="session")
def recorded_launches() -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    interpret, lines = InterpretedFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        parameters = inspect.signature(self.fn).parameters
        values = {**dict(zip(parameters, args, strict=False)), **kwargs}
        described = {
            name: describe(value, name not in parameters or "constexpr" in str(parameters[name].annotation))
            for name, value in values.items()
        }
        lines.add(json.dumps([self.fn.__module__, self.fn.__name__, described], sort_keys=True))
        return interpret(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = run
    yield
    InterpretedFunction.run = interpret
    Path(os.environ["RECORDED_LAUNCHES"]).write_text("\n".join(sorted(lines)))
