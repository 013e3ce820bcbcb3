"""AdamW on rows of float32 tables on CPU, in C (native.c): the three passes of reference.py, on one thread.

Results equal the PyTorch path's bit for bit, except for replay with a limit, which agrees to a few roundings; `exact`
checks this on the CPU in use. Row-wise second moments are not supported.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from types import ModuleType

import torch
from torch import Tensor

from kernels.native import call
from kernels.row_adamw import reference
from kernels.row_adamw.history import History, Hyper
from kernels.row_adamw.rows import State

__all__ = ["Blocks", "replay", "sweep", "update"]

BLOCK_ELEMENTS = 1 << 12
"""Square roots taken together: few calls, and all rows of a block stay in a core's caches."""


class Blocks:
    """Scratch memory for square roots, and a gradient of zeros."""

    def __init__(self, state: State) -> None:
        width = state.values_RD.shape[1]
        self.rows = max(1, BLOCK_ELEMENTS // width)
        self.roots_BD = state.mean_RD.new_empty(self.rows, width)
        self.zeros_D = state.mean_RD.new_zeros(width)


class _State(ctypes.Structure):
    """State in native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "mean", "square", "last", "moment", "touched")),
        *((name, ctypes.c_int64) for name in ("floor", "width")),
    ]

    @classmethod
    def of(cls, state: State) -> _State:
        tensors = (*state.tensors, state.last_R, state.moment_R, state.touched_R)
        return cls(*(tensor.data_ptr() for tensor in tensors), state.floor, state.values_RD.shape[1])


class _History(ctypes.Structure):
    """History in native.c."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "factor1", "factor2")),
        ("history", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("length", "start", "now")),
    ]

    @classmethod
    def of(cls, history: History) -> _History:
        hyper, table = history.hyper, history.table
        constants = (hyper.beta1, hyper.beta2, hyper.eps, history.factor1, history.factor2)
        return cls(*constants, table.data_ptr(), table.shape[1], history.start, history.step)


@functools.cache
def _torch_sqrt() -> ctypes.c_void_p:
    """Return the square root of torch.sqrt: MKL's, if torch was built with it, else none (IEEE's)."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).vmsSqrt, ctypes.c_void_p)
    except AttributeError:
        return ctypes.c_void_p(None)


@functools.cache
def exact() -> bool:
    """Return whether the C code equals the PyTorch path bit for bit on this CPU, in one step and two replayed ones.

    Warns once if not: torch's kernels then round in a way that native.c does not know.
    """
    same = all(map(torch.equal, _probe(reference), _probe(sys.modules[__name__])))
    if not same:
        warnings.warn("kernels.row_adamw: the C code is not torch's AdamW here; the PyTorch path is used", stacklevel=2)
    return same


def _probe(ops: ModuleType) -> tuple[Tensor, ...]:
    """Return values and moments after the three passes, from random ones of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 64, 67
    p_RD, m_RD, v_RD, g_RD = (torch.randn(rows, width, generator=generator) for _ in range(4))
    magnitudes_R1 = 10.0 ** torch.linspace(-44, 2, rows).unsqueeze(1)
    square_RD = (v_RD * magnitudes_R1.sqrt()).square()
    zeros_R = torch.zeros(rows, dtype=torch.int32)
    touched_R = torch.ones(rows, dtype=torch.bool)
    state = State(p_RD, m_RD * magnitudes_R1, square_RD, zeros_R, zeros_R.clone(), touched_R)
    history, blocks = History(Hyper(0.9, 0.99, 1e-8, 0.1), torch.float32), ops.Blocks(state)
    every_U, half_U = torch.arange(rows), torch.arange(0, rows, 2)
    for lr in (3e-3, 1e-3):
        history.append(lr)
    ops.replay(state, blocks, every_U, history, None, True)
    history.append(2e-3)
    ops.update(state, blocks, half_U, (g_RD * magnitudes_R1)[half_U], history)
    ops.sweep(state, blocks, half_U, g_RD[half_U], history)
    return state.tensors


def update(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """See reference.update."""
    call(
        "update",
        _State.of(state),
        _History.of(history),
        _torch_sqrt(),
        blocks.roots_BD,
        blocks.rows,
        rows_U,
        grads_UD.contiguous(),
        len(rows_U),
    )


def sweep(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """See reference.sweep."""
    call(
        "sweep",
        _State.of(state),
        _History.of(history),
        _torch_sqrt(),
        blocks.roots_BD,
        blocks.rows,
        rows_U,
        grads_UD.contiguous(),
        len(rows_U),
        blocks.zeros_D,
        len(state.touched_R),
    )


def replay(state: State, blocks: Blocks, rows_U: Tensor, history: History, limit: int | None, moments: bool) -> None:
    """See reference.replay."""
    both = _State.of(state), _History.of(history)
    if limit is None:
        call("replay_every", *both, _torch_sqrt(), blocks.roots_BD, blocks.rows, rows_U, len(rows_U), blocks.zeros_D)
    else:
        call("replay_hoisted", *both, blocks.roots_BD, rows_U, len(rows_U), limit, int(moments))
