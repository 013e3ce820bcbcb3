# ruff: noqa: E402 (torch must be imported after the guard is loaded)
"""A CUDA device without a GPU: counts kernel launches and host waits by line, and refuses what CUDA refuses.

    install()                                  # in a process of its own: it replaces parts of torch
    with Device() as device:
        ...                                    # code that uses torch.device("cuda", 0)
    device.launches, device.waits              # Counters of (operation, file:line)

Its tensors have device cuda:0, and their values are in CPU memory. So the code under test takes its GPU path: dispatch
selects Triton, whose kernels run in the interpreter, and autocast("cuda") is active. Every operation that is not a view
or an allocation is one launch. A wait is an operation after which the host needs a value or a size from the device, and
a copy from or to memory that is not pinned. What is copied to pinned memory without blocking is NaN, or the smallest
integer, there until the host next waits. Operations on tensors of both devices, and kernels with CPU tensors, raise.

Not simulated: the time of anything, streams, memory limits, and what a CUDA kernel computes differently.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from suite.plan.dry_run import cuda_guard

cuda_guard.load()

import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations whose second argument is a list of indices; a mask among them is turned into positions by the host."""
COPIES = {aten._to_copy.default, aten.copy_.default}
NO_LAUNCH = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten._local_scalar_dense.default,
}
OWN_KERNELS = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
"""Operations that have a CUDA kernel and a decomposition, which a CPU build would use for CUDA tensors."""


class Refused(RuntimeError):
    """What CUDA or Triton would refuse."""


class DeviceTensor(torch.Tensor):
    """A tensor on cuda:0; `values` holds its values."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        made.values = values.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"DeviceTensor({self.values!r})"

    def tolist(self) -> Any:
        CURRENT.wait("tolist")
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise Refused("a tensor on cuda:0 has no numpy array")

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)


class Device(TorchDispatchMode):
    """The counters of the code that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()

    def launch(self, name: str) -> None:
        self.launches[name, _place()] += 1

    def wait(self, name: str) -> None:
        self.waits[name, _place()] += 1
        for target, values in _under_way:
            target.copy_(values)
        _under_way.clear()

    def __enter__(self) -> Device:
        global CURRENT
        CURRENT = self
        super().__enter__()
        return self

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode, composite operations arrive whole.
        if torch.is_inference_mode_enabled() and operation.name().removeprefix("aten::") not in OWN_KERNELS:
            with self:
                done = operation.decompose(*args, **(kwargs or {}))
            if done is not NotImplemented:
                return done
        return execute(operation, args, kwargs or {})


CURRENT = Device()
_pinned: dict[int, torch.Tensor] = {}
_under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
"""Copies to pinned memory for which the host has not waited: targets and values."""


def _place() -> str:
    """Return the innermost line of the project that runs, without its tests."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parts[len(ROOT.parts)] != "tests" and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


def _values(x: Any) -> Any:
    return x.values if isinstance(x, DeviceTensor) else x


def _is_host(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)


def execute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and count what CUDA would do."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
    wanted = kwargs.get("device") and torch.device(kwargs["device"]).type
    if not on_device and wanted != "cuda":
        if not kwargs.get("pin_memory"):
            return operation(*args, **kwargs)
        return _remember(operation(*args, **{**kwargs, "pin_memory": False}))
    if on_device and operation not in COPIES | INDEXING and any(_is_host(x) and x.dim() for x in tensors):
        raise Refused(f"{operation}: tensors on cuda:0 and cpu ({_place()})")
    _count(operation, args, kwargs, wanted)
    if operation is aten.copy_.default and _is_pinned(args[0]) and not _is_blocking(operation, args, kwargs):
        _under_way.append((args[0], _values(args[1]).clone()))
        return args[0].fill_(torch.nan if args[0].is_floating_point() else torch.iinfo(args[0].dtype).min)
    arguments, options = tree_map(_values, (args, kwargs))
    if wanted:
        options["device"] = "cpu"
    options.pop("pin_memory", None)
    out = STAND_INS.get(operation, operation)(*arguments, **options)
    if operation is aten._to_copy.default and wanted == "cpu":
        return out
    # What an operation changed in place keeps its identity.
    known = {id(x.values): x for x in on_device} | {id(x): x for x in tensors if _is_host(x)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else DeviceTensor(x)

    return tree_map(wrapped, out)


def _count(operation: Any, args: Any, kwargs: dict[str, Any], wanted: str | None) -> None:
    name = operation.name().removeprefix("aten::")
    if operation in WAITS:
        CURRENT.wait(name)
    elif operation is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        CURRENT.wait("repeat_interleave without output_size")
    elif operation in INDEXING:
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                CURRENT.wait("index with a mask")
            if _is_host(index) and index.dim():
                CURRENT.wait("index on the host")
    elif operation in COPIES:
        target, source = (args[0], args[1]) if operation is aten.copy_.default else (None, args[0])
        to_device = wanted == "cuda" if target is None else isinstance(target, DeviceTensor)
        from_device = isinstance(source, DeviceTensor)
        blocking = _is_blocking(operation, args, kwargs)
        if from_device and (wanted == "cpu" or (_is_host(target) and (blocking or not _is_pinned(target)))):
            CURRENT.wait("copy to the host")
        elif not from_device and to_device and (blocking or not _is_pinned(source)):
            CURRENT.wait("copy from memory that is not pinned, or blocking")
    if operation not in NO_LAUNCH and not operation.is_view:
        CURRENT.launch(name)


def _is_blocking(operation: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy waits until it is done."""
    return not (kwargs.get("non_blocking") or (operation is aten.copy_.default and len(args) > 2 and args[2]))


def _is_pinned(x: Any) -> bool:
    return _is_host(x) and x.untyped_storage().data_ptr() in _pinned


def _remember(pinned: torch.Tensor) -> torch.Tensor:
    """Note that the memory of a tensor is pinned."""
    _pinned[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


def _rms_norm_backward(grad: Any, x: Any, shape: Any, scale: Any, weight: Any, mask: Any) -> Any:
    """Return the gradients of aten._fused_rms_norm, which has no CPU kernel."""
    wide = grad if weight is None else grad * weight
    normed = x * scale
    grad_x = scale * (wide - normed * (wide * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), None if weight is None else (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _bmm(one: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.bmm(one.to(out_dtype), other.to(out_dtype))


def _by_document(q: Any, k: Any, v: Any, offsets: Any) -> torch.Tensor:
    """Return causal attention within documents, one after the other."""
    parts = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        one = (part[begin:end].transpose(0, 1) for part in (q, k, v))
        parts.append(_host_attention(*one, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


def _varlen(
    q: Any,
    k: Any,
    v: Any,
    offsets: Any,
    key_offsets: Any,
    longest: int,
    longest_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
) -> Any:
    for part in (q, k, v):
        if part.dtype not in (torch.float16, torch.bfloat16) or part.stride(-1) != 1:
            raise Refused(f"variable-length attention of {part.dtype} with strides {part.stride()}")
    # What follows computes attention to earlier tokens of a document alone, at the usual scale.
    assert is_causal or list(window_size or ()) == [-1, 0]
    assert scale is None
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert torch.equal(offsets, key_offsets)
    assert max(offsets.diff().tolist()) <= min(longest, longest_key)
    unused = torch.zeros(2, dtype=torch.uint64)
    return _by_document(q, k, v, offsets), torch.zeros(q.shape[1], q.shape[0]), unused


def _varlen_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, offsets: Any, *_: Any, **__: Any) -> Any:
    """Return the gradients of `_by_document` by the formula, in float32; autograd is off in here."""
    heads, kv_heads, scale = q.shape[1], k.shape[1], q.shape[2] ** -0.5
    grads: list[list[torch.Tensor]] = [[], [], []]
    for begin, end in itertools.pairwise(offsets.tolist()):
        dy, queries, keys, values = (part[begin:end].float().transpose(0, 1) for part in (grad, q, k, v))
        keys, values = (part.repeat_interleave(heads // kv_heads, 0) for part in (keys, values))
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = (queries @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        d_weights = dy @ values.mT
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        d_keys, d_values = d_scores.mT @ queries, weights.mT @ dy
        grads[0].append((d_scores @ keys).transpose(0, 1))
        for kind, part in ((1, d_keys), (2, d_values)):
            grads[kind].append(part.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1))
    return tuple(torch.cat(parts).to(q.dtype) for parts in grads)


_host_attention = F.scaled_dot_product_attention
STAND_INS: dict[Any, Any] = {
    torch.ops.torch_attn._varlen_attn.default: _varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten.bmm.dtype: _bmm,
}
"""What has a CUDA kernel alone."""


def install() -> None:
    """Let this process believe that it has a GPU."""
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda *_: 0,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "a simulated device",
        "manual_seed_all": lambda *_: None,
        "synchronize": lambda *_: CURRENT.wait("synchronize"),
        "current_stream": lambda *_: _Stream(),
    }
    for name, replacement in cuda.items():
        setattr(torch.cuda, name, replacement)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[assignment]
    torch.Tensor.is_pinned = lambda self, *_: _is_pinned(self)  # type: ignore[assignment]
    torch.Generator = _HostGenerator  # type: ignore[misc,assignment]
    torch.tensor = _made_on_host(torch.tensor)
    torch.as_tensor = _made_on_host(torch.as_tensor)
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name in OWN_KERNELS:
        library.impl(name, _never)
    install.library = library  # type: ignore[attr-defined]  # registrations end with the object
    import torch.nn.utils.clip_grad as clip_grad

    clip_grad._has_foreach_support = lambda tensors, device: True  # it names the exact types that have it
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    _hook_triton()


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("a DeviceTensor never reaches a CUDA kernel")


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if not _is_host(tensor):
        raise Refused("only memory of the host can be pinned")
    return _remember(tensor.clone())


class _Stream:
    """The only stream of the device."""

    def synchronize(self) -> None:
        CURRENT.wait("synchronize")


class _HostGenerator(torch.Generator):
    """A generator that takes a CUDA device and draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> _HostGenerator:
        return super().__new__(cls, "cpu")


def _made_on_host(make: Any) -> Any:
    def made(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> torch.Tensor:
        if isinstance(data, DeviceTensor):
            return data.to(dtype=dtype or data.dtype, device=device or CUDA)
        with _disable_current_modes():
            tensor = make(data, dtype=dtype, **options)
        return tensor if device is None else tensor.to(device)

    return made


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Replace scaled_dot_product_attention, whose choice of kernels is made in C++ by the device."""
    if not isinstance(q, DeviceTensor):
        return _host_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (part.to(torch.get_autocast_dtype("cuda")) for part in (q, k, v))
    if enable_gqa and (attn_mask is not None or q.dtype == torch.float32):
        raise Refused("grouped heads with a mask or in fp32: only the math kernel takes them on every device")
    return _Attention.apply(q, k, v, attn_mask, is_causal, enable_gqa)


class _Attention(torch.autograd.Function):
    """One launch forward and one backward."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, grouped: bool) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.options = {"attn_mask": _values(mask), "is_causal": causal, "enable_gqa": grouped}
        CURRENT.launch("attention")
        with _disable_current_modes():
            return DeviceTensor(_host_attention(*map(_values, (q, k, v)), **ctx.options))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        CURRENT.launch("attention_backward")
        with _disable_current_modes(), torch.enable_grad():
            parts = [_values(part).detach().requires_grad_() for part in ctx.saved_tensors]
            out = _host_attention(*parts, **ctx.options)
            grads = torch.autograd.grad(out, parts, _values(grad))
        return (*map(DeviceTensor, grads), None, None, None)


def _select(
    _: Any, half_scores: Any, best_scores: Any, best_keys: Any, start: int, chunk: int, *__: Any, **___: Any
) -> None:
    """Do what _select_kernel of the product-key search does, for chunks that hold all tokens."""
    assert start == 0
    assert chunk == best_keys.shape[1]
    keys = half_scores.sort(dim=-1, descending=True, stable=True).indices[..., : best_keys.shape[2]]
    best_keys.copy_(keys)
    if best_scores is not None:
        best_scores.copy_(half_scores.gather(-1, keys))


def _pair(_: Any, best_scores: Any, best_keys: Any, ranks: Any, *more: Any, **__: Any) -> None:
    """Do what _pair_kernel of the product-key search does."""
    rows, scores, _tokens, half_keys = more[:4]
    first, second = ranks.long()
    sums = best_scores[0::2].index_select(-1, first) + best_scores[1::2].index_select(-1, second)
    chosen = sums.sort(dim=-1, descending=True, stable=True).indices[..., : scores.shape[-1]]
    scores.copy_(sums.gather(-1, chosen))
    one, two = (keys.long() for keys in (best_keys[0::2], best_keys[1::2]))
    rows.copy_(one.gather(-1, first[chosen]) * half_keys + two.gather(-1, second[chosen]))


KERNEL_STAND_INS: dict[str, Any] = {"_select_kernel": _select, "_pair_kernel": _pair}
"""Kernels whose sorting networks would take the interpreter minutes."""


def _hook_triton() -> None:
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, x in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            if _is_host(x):
                raise Refused(f"{self.fn.__name__}: {name} is a CPU tensor ({_place()})")
        CURRENT.launch(f"triton {self.fn.__name__}")
        with _disable_current_modes():
            run = KERNEL_STAND_INS.get(self.fn.__name__, launch)
            return run(self, *map(_values, args), **{name: _values(x) for name, x in kwargs.items()})

    interpreter.GridExecutor.__call__ = counted
