"""Rank 0 of a world that does not exist, on a GPU that does not: a fake process group and fake CUDA tensors.

Fake tensors have shapes, dtypes and a device, but no storage. Collectives of the fake process group return at once.
`install` replaces what torch and triton would do on the device; it is called in a separate process.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined, assignment, method-assign, misc"
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_param_group
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from suite.models.memory_table import MemoryTable
from suite.plan.live_bytes import LiveBytes
from suite.train import sharding

DEVICE = torch.device("cuda", 0)
FACTORS: dict[str, float] = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}
"""Bytes that a process sends, relative to (n - 1) / n of the largest tensor of a collective of n processes."""
COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
}


class _Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Do nothing."""

    wait = synchronize = record

    def query(self) -> bool:
        """Return True."""
        return True


class _Stream:
    """A stream without work."""

    device, device_index, stream_id = DEVICE, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Do nothing."""

    wait_event = synchronize = wait_stream

    def record_event(self, *_: Any) -> _Event:
        """Return an event."""
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def install(processes: int, capability: int) -> None:
    """Become rank 0 of a world of fake processes, each with a fake GPU.

    Args:
        processes: Number of processes.
        capability: Major compute capability of the GPUs.
    """
    stream = _Stream()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (capability, 0),
        "set_device": lambda *_: None,
        "_lazy_init": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Stream, torch.Event = _Stream, _Event
    Tensor.pin_memory = lambda tensor, *_: tensor
    Tensor.record_stream = lambda *_: None
    nn.Module.to_empty = _to_empty(nn.Module.to_empty)
    sharding.init_device_mesh = _outside(sharding.init_device_mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    F.scaled_dot_product_attention = _memory_efficient
    _skip_triton()


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Call the kernel that a GPU uses for fp32; without a GPU torch would choose the one that stores all scores."""
    assert not options.get("enable_gqa"), "on CUDA the model repeats grouped heads"
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, compute_log_sumexp=True, is_causal=options["is_causal"])[0]


def _skip_triton() -> None:
    """Let Triton kernels do nothing when they are launched; their outputs are allocated by their callers."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda *_, **__: None


def _outside(make_mesh: Callable[..., Any]) -> Callable[..., Any]:
    """Make device meshes of real tensors: torch reads their values."""

    def make(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            mesh = make_mesh(*arguments, **options)
            for name in mesh.mesh_dim_names or ():
                mesh.get_group(name)
                mesh.get_local_rank(name)
            return mesh

    return make


def _to_empty(original: Callable[..., Any]) -> Callable[..., Any]:
    """Allocate tables separately: torch would swap their fake tensors, to which FSDP holds references."""

    def to_empty(model: nn.Module, *, device: torch.device, recurse: bool = True) -> nn.Module:
        tables = [module for module in model.modules() if isinstance(module, MemoryTable)]
        weights = [table._parameters.pop("weight") for table in tables]
        original(model, device=device, recurse=recurse)
        for table, weight in zip(tables, weights, strict=True):
            assert weight is not None
            table.weight = nn.Parameter(torch.empty(weight.shape, device=device), weight.requires_grad)
        return model

    return to_empty


@dataclass
class Traffic:
    """Bytes by kind of collective: those sent by this process, and how often it was called."""

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, arguments: Any) -> None:
        """Count a collective by the name of its operator, and its arguments."""
        kind = COLLECTIVES[name]
        leaves = tree_leaves(arguments)
        size = max(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
        group = next(x for x in leaves if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        processes = dist.ProcessGroup.unbox(group).size()
        self.sent[kind] += round(FACTORS[kind] * size * (processes - 1) / processes)
        self.calls[kind] += 1


class Recorder(TorchDispatchMode):
    """Counts collectives, and returns constants where the host would read a value or a size from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace == "c10d" and name in COLLECTIVES:
            self.traffic.add(name, (args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return 1.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten.nonzero.default and args[0].device == DEVICE:  # at most: all places
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        return func(*args, **(kwargs or {}))


class GpuBytes(LiveBytes):
    """Counts tensors on the GPU alone, and this process's part of sharded ones.

    Before it is sharded, the model is on the meta device.
    """

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed, if it is on the GPU."""
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if tensor.device == DEVICE:
            super().add(tensor)


@contextmanager
def recording() -> Iterator[tuple[Recorder, LiveBytes]]:
    """Run code on fake tensors; yield what was sent, and the bytes that are alive."""
    live, recorder = GpuBytes(), Recorder()
    for module in (fsdp_param, fsdp_param_group):  # FSDP frees gathered weights without an operation
        for name in ("alloc_storage", "free_storage"):
            if hasattr(module, name):
                setattr(module, name, _resizing(getattr(module, name), live))
    with FakeTensorMode(allow_non_fake_inputs=True), live, recorder:
        yield recorder, live


def _resizing(resize: Callable[[Tensor], None], live: LiveBytes) -> Callable[[Tensor], None]:
    def resized(tensor: Tensor) -> None:
        resize(tensor)
        live.resized(tensor)

    return resized
