"""Keeping torch's compiler out of what only asks for shapes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def without_compiler() -> Iterator[None]:
    """Operations on the meta device without the import of torch's compiler, which takes longer than to plan a grid.

    Their kernels import it when first called, only to be marked as not to be compiled (torch/_compile.py). Those called
    in here are not marked. Whatever else is asked of the compiler is answered by the real one.
    """
    if _Compiler.NAME in sys.modules:
        yield
        return
    sys.modules[_Compiler.NAME] = stand_in = _Compiler(_Compiler.NAME)
    try:
        yield
    finally:
        if sys.modules.get(_Compiler.NAME) is stand_in:
            del sys.modules[_Compiler.NAME]


class _Compiler(ModuleType):
    """Stands for torch's compiler until more is asked of it than to leave a function alone."""

    NAME = "torch._dynamo"

    def disable(self, *args: Any, **kwargs: Any) -> Any:
        """As torch/_compile.py calls it: the function as it is. Any other call is for the real compiler."""
        if args and callable(args[0]) and kwargs == {"wrapping": False}:
            return args[0]
        return self.__getattr__("disable")(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.NAME) is self:
            del sys.modules[self.NAME]
        return getattr(importlib.import_module(self.NAME), name)
