"""torch's compiler: kept out of operations on the meta device, and there for whoever wants it."""

from __future__ import annotations

import subprocess
import sys


def run_python(code: str) -> str:
    """What a process of its own prints: this one may have torch's compiler already."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


BEGIN = """
import sys, torch
from suite.models.compiler import without_compiler
assert "torch._dynamo" not in sys.modules
"""


def test_operations_on_the_meta_device_do_not_import_torchs_compiler() -> None:
    code = """
x = torch.ones(3, 1, device="meta")
with without_compiler():
    y = (x + torch.ones(4, dtype=torch.int64, device="meta")).softmax(-1).cos()
    y.bfloat16().mean()
print(y.shape, y.dtype, "torch._dynamo" in sys.modules)
x.sub(1)
print("torch._dynamo" in sys.modules)
"""
    assert run_python(BEGIN + code).splitlines() == ["torch.Size([3, 4]) torch.float32 False", "True"]


def test_whoever_asks_the_compiler_for_more_gets_the_real_one() -> None:
    code = """
with without_compiler():
    torch.ones(3, device="meta").add(1)
    import torch._dynamo
    print(torch._dynamo.is_compiling())
    from torch._dynamo import config
    print(config.__name__)
print(sys.modules["torch._dynamo"].__file__ is not None)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).tolist())
"""
    assert run_python(BEGIN + code).splitlines() == ["False", "torch._dynamo.config", "True", "[1.0, 1.0]"]


def test_a_function_that_is_to_be_disabled_is_left_to_the_real_compiler() -> None:
    code = """
with without_compiler():
    torch.ones(3, device="meta").add(1)
    assert sys.modules["torch._dynamo"].__class__.__name__ == "_Compiler"
    factory = torch.compiler.disable(recursive=False)
    disabled = torch.compiler.disable(lambda x: x + 1)
print(factory(lambda x: x + 2)(torch.zeros(1)).tolist(), disabled(torch.zeros(1)).tolist())
print(sys.modules["torch._dynamo"].is_dynamo_supported() is not None)
"""
    assert run_python(BEGIN + code).splitlines() == ["[2.0] [1.0]", "True"]


def test_functions_called_without_the_compiler_still_compile() -> None:
    code = """
with without_compiler():
    torch.ones(3, device="meta").add(1)
torch.compile(lambda x: torch.add(x, 1), backend="eager", fullgraph=True)(torch.zeros(2, device="meta"))
print(torch.compile(lambda x: (x + 1).softmax(-1), backend="eager", fullgraph=True)(torch.zeros(2)).tolist())
"""
    assert run_python(BEGIN + code).splitlines() == ["[0.5, 0.5]"]


def test_the_compiler_stays_where_it_was_imported_before() -> None:
    code = """
import torch._dynamo
real = torch._dynamo
with without_compiler():
    assert sys.modules["torch._dynamo"] is real
print(sys.modules["torch._dynamo"] is real)
"""
    assert run_python(BEGIN + code).splitlines() == ["True"]
