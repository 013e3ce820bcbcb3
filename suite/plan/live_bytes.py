"""Counts the bytes of tensors that are alive while code runs, on any device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """A context in which the storages that operations allocate are counted.

    `bytes` are those alive now and `peak` the largest value so far. Storages of the `excluded` tensors do not count.
    """

    def __init__(self, *excluded: Tensor) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._storages: dict[int, object] = {tensor.untyped_storage()._cdata: None for tensor in excluded}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not wrap every dispatch for the sake of compiled code."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor):
                self.add(output)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed, once for all tensors that share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def on_free(_: object) -> None:
            self.bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, on_free)
