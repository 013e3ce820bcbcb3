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
        self._sizes: dict[int, int] = {}
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
        self._count(key, storage.nbytes())

        def on_free(_: object) -> None:
            self._count(key, 0)
            del self._storages[key], self._sizes[key]

        self._storages[key] = weakref.ref(storage, on_free)

    def resized(self, tensor: Tensor) -> None:
        """Count the new size of a storage that was resized."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            self._count(storage._cdata, storage.nbytes())
        else:
            self.add(tensor)

    def _count(self, key: int, size: int) -> None:
        self.bytes += size - self._sizes.get(key, 0)
        self.peak = max(self.peak, self.bytes)
        self._sizes[key] = size
