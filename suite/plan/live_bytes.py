"""The bytes of tensors alive while code runs: on any device, or on the meta device without computing shapes twice."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Layouts = dict[Hashable, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
"""An operation and what it is given -> shape, strides and dtype of the tensor it makes."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is on, and those still alive.

    Storages of `known` tensors are left out.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: dict[int, object] = {tensor.untyped_storage()._cdata: None for tensor in known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would wrap every call for the sake of compiled code, at the cost of the call itself."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:  # a tensor of a storage there is
            return func(*args, **(kwargs or {}))
        result = self.compute(func, args, kwargs or {})
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.add(made)
        return result

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result."""
        return func(*args, **kwargs)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def freed(_: object) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


class MetaLiveBytes(LiveBytes):
    """For the meta device: an operation met before is answered with an empty tensor of the layout it gave then.

    torch finds the layouts of most operations in Python, at ten times the cost. Only operations that make a new tensor
    are answered so. `layouts` keeps the answers, for as long as the caller wants them.
    """

    def __init__(self, layouts: Layouts, *known: Tensor) -> None:
        super().__init__(*known)
        self._layouts = layouts

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An empty tensor of the layout that is known for such arguments, else the operation's own result."""
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        key = func, _described(args), _described(kwargs.items()) if kwargs else ()
        layout = self._layouts.get(key)
        if layout is not None:
            return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta and not _shares_storage(result, args):
            self._layouts[key] = tuple(result.shape), result.stride(), result.dtype
        return result


def _described(given: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments as something to look up: of tensors what decides the layout of a result."""
    return tuple(
        [
            (part.shape, part.stride(), part.dtype, part.device)
            if isinstance(part, Tensor)
            else _described(part)
            if isinstance(part, tuple | list)
            else part
            for part in given
        ]
    )


def _shares_storage(result: Tensor, args: Any) -> bool:
    """Whether a result is one of the tensors it was made of, under another shape."""
    if isinstance(args, Tensor):
        return args.untyped_storage()._cdata == result.untyped_storage()._cdata
    return isinstance(args, tuple | list) and any(_shares_storage(result, part) for part in args)
