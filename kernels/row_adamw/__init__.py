"""AdamW for tables of which a step reads few rows: it updates only those, with the values of dense AdamW.

    sink = RowGradients(table)                  # filled by kernels.embedding_bag's backward passes
    adamw = RowAdamW(table, sink, weight_decay=0.1)
    adamw.before_read(indices)                  # before every read: replays what these rows have missed
    ...                                         # forward, backward
    sink.clip_(1.0)                             # exact global norm over compact rows
    adamw.step(lr)                              # updates the rows with gradients, clears the sink
    adamw.flush()                               # before the table is read as a whole

Dense AdamW changes every row at every step: moments decay, and weight decay and the decaying mean act on rows without
a gradient too. Here, a row that is not read stays at its last step, and `before_read` replays the missed steps with
their learning rates and bias corrections. Every row read, and the table after a flush, equals dense AdamW's:
- replay_limit=None: bit for bit torch.optim.AdamW(foreach=False) in float32 (PyTorch and C);
- replay_limit=J (default 256): up to a few roundings for gaps of at most J steps (square roots and powers of the betas
  are taken once per gap); for longer gaps the tail of the mean is dropped: about 1e-9 of a mean update at J=256, 6e-5
  at 128.
If most rows are read at every step, a sweep over the whole table is cheaper than replay, and as exact. `path` selects
one of them; "auto" decides by the share of rows read (SWEEP_SHARE).

Options, off by default, and their memory per row, in addition to the table's D values (float32 moments: 8D + 9 bytes):
  low_precision="master"      bfloat16/float16 tables keep a float32 copy            + 4D
  low_precision="stochastic"  bfloat16 tables are rounded stochastically             + 0
  row_second_moment=True      one second moment per row, of the mean square          - 4D + 4
  lazy=True                   no replay (LazyAdam): rows that are not read do not move; differs from dense AdamW (by
                              71-79 % of the mean update in a simulation)            + 0

Shapes: R table rows, D width, U rows with gradients.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import dispatch
from kernels.embedding_bag import RowGradients
from kernels.row_adamw import native
from kernels.row_adamw.history import History, Hyper
from kernels.row_adamw.noise import Noise
from kernels.row_adamw.rows import State

__all__ = ["RowAdamW"]

SWEEP_SHARE = 0.15
"""Sweep if at least this share of the rows has gradients. Both cost the same, on one CPU thread with uniform reads at
width 64 and 2^14, 2^16 and 2^18 rows, at shares of 0.17, 0.18 and 0.22 in C with every step replayed (0.06 and 0.11 at
width 32), 0.20, 0.30 and 0.25 with the default limit, and 0.11, 0.16 and 0.26 in PyTorch. Not measured on a GPU."""
FLUSH_ROWS = 1 << 18
"""Rows checked together in a flush."""


class RowAdamW:
    """AdamW over one table [R, D] of any float dtype, updated in place; see the module's description.

    `before_read` must have been called with every row that gets a gradient; otherwise `step` raises an AssertionError,
    because the gradient would be that of an outdated row. The state is on the table's device.

    Args:
        table_RD: The table.
        gradients: Where backward passes put its row gradients.
        betas, eps, weight_decay: As of torch.optim.AdamW.
        replay_limit: Most steps replayed for a row; None: all.
        path: "replay" or "sweep" at every step, or "auto".
        low_precision, row_second_moment, lazy: The options above.
        seed, first_column: Of stochastic rounding (noise.py): the place of the first column where the table's columns
            are divided.
        backend: Overrides kernels.dispatch.
    """

    def __init__(
        self,
        table_RD: Tensor,
        gradients: RowGradients,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        replay_limit: int | None = 256,
        path: Literal["auto", "replay", "sweep"] = "auto",
        low_precision: Literal["nearest", "stochastic", "master"] = "nearest",
        row_second_moment: bool = False,
        lazy: bool = False,
        seed: int = 0,
        first_column: int = 0,
        backend: str | None = None,
    ) -> None:
        if replay_limit is not None and replay_limit < 1:
            raise ValueError(f"replay_limit: got {replay_limit}, allowed: None or at least 1")
        if low_precision == "stochastic" and table_RD.dtype != torch.bfloat16:
            raise ValueError(f"low_precision='stochastic': got a table of {table_RD.dtype}, allowed: torch.bfloat16")
        self.table_RD, self.gradients = table_RD.detach(), gradients
        self.replay_limit, self.path, self.lazy = replay_limit, path, lazy
        self.state = _new_state(self.table_RD, low_precision, row_second_moment, Noise(seed, first_column))
        self.history = History(Hyper(*betas, eps, weight_decay), self.state.mean_RD.dtype)
        self.has_master = self.state.values_RD is not self.table_RD
        self._ops = _implementation(self.state.values_RD, not row_second_moment, backend)
        self._blocks = self._ops.Blocks(self.state)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.history.step

    @property
    def never_read(self) -> int:
        """Rows that never had a gradient."""
        return int(self.state.touched_R.logical_not().sum())

    @property
    def bytes_per_row(self) -> int:
        """Memory of the optimizer per row, in addition to the table."""
        state = self.state
        held = [state.mean_RD, state.square_RX, state.last_R, state.moment_R, state.touched_R]
        held += [state.values_RD] if self.has_master else []
        return sum(tensor.nbytes for tensor in held) // len(state.last_R)

    @torch.no_grad()
    def before_read(self, indices: Tensor) -> None:
        """Replay the steps that these rows have missed; int64 indices of any shape, duplicates allowed."""
        if self._current:
            return
        if self._on_device:
            lookups = self.gradients.groups(indices, dispatch.module("embedding_bag", "triton"))
            self._replay_on_device(lookups.rows_L)
        else:
            self._catch_up(self.gradients.groups(indices, dispatch.module("embedding_bag", "torch")).rows_U, False)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one AdamW step at rate `lr` with the sink's gradients, zero for the other rows; clears the sink."""
        gradients = self.gradients.placed() if self._on_device else self.gradients.merged()
        rows_U = gradients[0]
        # The device alone knows how many rows were read; there are at most as many as places.
        rows = len(self.state.last_R) if rows_U is None else min(len(rows_U), len(self.state.last_R))
        if rows_U is not None and not self._on_device:
            done = self._current or bool((self.state.last(rows_U) == self.steps).all())
            assert done, "a row has a gradient but was not read since the last step"
        is_sweep = self._sweep_pays(rows)
        if is_sweep:
            self.flush()
        elif self.lazy:
            self.state.floor = self.steps
        self.history.append(lr)
        run = self._ops.sweep if is_sweep else self._ops.update
        run(self.state, self._blocks, *((gradients,) if self._on_device else gradients), self.history)
        self._publish(None if is_sweep else rows_U)
        if is_sweep:
            self._all_done()
        self.gradients.clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Replay all missed steps: the table then equals dense AdamW's."""
        if self._current:
            return
        state = self.state
        if self._on_device:
            self._replay_on_device(None)
            self._all_done()
            return
        for start in range(0, len(state.last_R), FLUSH_ROWS):
            part = slice(start, start + FLUSH_ROWS)
            behind = (state.moment_R[part] < self.steps).logical_and_(state.touched_R[part])
            behind.logical_or_(state.last_R[part] < self.steps)
            self._catch_up(behind.nonzero().squeeze(1) + start, moments=True)
        self._all_done()

    def state_dict(self) -> dict[str, Any]:
        """Flush, then return step count, moments, rows ever updated, and the master copy if there is one."""
        self.flush()
        state = self.state
        saved: dict[str, Any] = {
            "step": self.steps,
            "m": state.mean_RD,
            "v": state.square_RX,
            "touched": state.touched_R,
        }
        if self.has_master:
            saved["master"] = state.values_RD
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a saved state; the table itself is loaded by its owner."""
        state = self.state
        state.mean_RD.copy_(saved["m"])
        state.square_RX.copy_(saved["v"])
        state.touched_R.copy_(saved["touched"])
        if self.has_master:
            state.values_RD.copy_(saved["master"])
        self.history.restart(int(saved["step"]))
        self._all_done()

    def _sweep_pays(self, rows: int) -> bool:
        if self.lazy or self.path != "auto":
            return self.path == "sweep" and not self.lazy
        return rows >= SWEEP_SHARE * len(self.state.last_R)

    @property
    def _current(self) -> bool:
        """No row has missed a step, or missed steps are not replayed (lazy)."""
        return self.state.floor == self.steps or self.lazy

    @property
    def _on_device(self) -> bool:
        """Whether the implementation leaves the number of rows that were read on the device."""
        return hasattr(self._ops, "READS_IN_PLACE")

    def _replay_on_device(self, rows_L: Tensor | None) -> None:
        """Replay what these rows have missed (None: all rows); they ascend and may repeat."""
        self._ops.replay(self.state, self._blocks, rows_L, self.history, self.replay_limit)
        self._publish(rows_L)

    def _catch_up(self, rows_U: Tensor, moments: bool) -> None:
        if rows_U.numel():
            self._ops.replay(self.state, self._blocks, rows_U, self.history, self.replay_limit, moments)
            self._publish(rows_U)

    def _all_done(self) -> None:
        self.state.floor = self.steps
        self.history.restart(self.steps)

    def _publish(self, rows_U: Tensor | None) -> None:
        """Write the master copy's values to the table: those of rows_U, or all."""
        if self.has_master and rows_U is None:
            self.table_RD.copy_(self.state.values_RD)
        elif self.has_master:
            assert rows_U is not None
            if self._on_device:  # unused places hold the row R, and a row that repeats gets one value
                rows_U = rows_U.long().clamp(max=len(self.table_RD) - 1)
            self.table_RD[rows_U] = self.state.values_RD[rows_U].to(self.table_RD.dtype)


def _new_state(table_RD: Tensor, low_precision: str, row_second_moment: bool, noise: Noise) -> State:
    rows, width = table_RD.shape
    wide = torch.float64 if table_RD.dtype == torch.float64 else torch.float32
    needs_master = low_precision == "master" and table_RD.dtype != wide
    return State(
        values_RD=table_RD.to(wide, copy=True) if needs_master else table_RD,
        mean_RD=table_RD.new_zeros(rows, width, dtype=wide),
        square_RX=table_RD.new_zeros(rows, 1 if row_second_moment else width, dtype=wide),
        last_R=table_RD.new_zeros(rows, dtype=torch.int32),
        moment_R=table_RD.new_zeros(rows, dtype=torch.int32),
        touched_R=table_RD.new_zeros(rows, dtype=torch.bool),
        noise=noise if low_precision == "stochastic" else None,
    )


def _implementation(values_RD: Tensor, full_moments: bool, backend: str | None) -> ModuleType:
    name = dispatch.choose(values_RD, backend, full_moments and values_RD.is_contiguous())
    return dispatch.module("row_adamw", "torch" if name == "native" and not native.exact() else name)
