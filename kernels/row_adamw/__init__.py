"""AdamW for tables of which a step reads few rows: only those rows are updated, and no value differs.

    sink = RowGradients(table)                  # filled by kernels.embedding_bag's backward passes
    adamw = RowAdamW(table, sink, weight_decay=0.1)
    adamw.before_read(indices)                  # before every read: replays what these rows have missed
    ...                                         # forward, backward
    sink.clip_(1.0)                             # exact global norm over compact rows
    adamw.step(lr)                              # updates the rows with gradients, clears the sink
    adamw.flush()                               # before the table is read as a whole

Dense AdamW moves every row at every step: moments decay, weight decay and the decaying mean act on rows without
gradient too. Here a row that was not read keeps the step it is at, and `before_read` makes up for what it missed,
at the learning rates and bias corrections of those steps. Whatever is read, and the table after a flush, is what
dense AdamW would have there:
- replay_limit=None: bit for bit torch.optim.AdamW(foreach=False) in float32 (PyTorch and C);
- replay_limit=J (default 256): a few roundings apart for gaps up to J steps (square roots and powers of the betas
  taken once per gap); beyond, the mean's tail is dropped: about 1e-9 of a mean update at J=256, 6e-5 at 128.
When most rows are read at every step, one sweep over the table, fed by compact gradients, is cheaper than replay;
it is bit for bit as well. `path` says which; "auto" decides by the share of rows read (SWEEP_SHARE).

Options, off by default, with their memory per row beside the table's own D values (float32 moments: 8D + 9 bytes):
  low_precision="master"      bfloat16/float16 tables keep a float32 copy            + 4D
  low_precision="stochastic"  bfloat16 tables are rounded stochastically             + 0
  row_second_moment=True      one second moment per row, of the mean square          - 4D + 4
  lazy=True                   no replay (LazyAdam): untouched rows do not move; not dense AdamW (71-79 % of the mean
                              update apart in a simulation)                          + 0

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
from kernels.row_adamw.rows import State

__all__ = ["RowAdamW"]

SWEEP_SHARE = 0.15
"""Sweep when at least this share of the rows has gradients. Measured where both cost the same on one CPU thread,
uniform use, width 64, at 2^14, 2^16 and 2^18 rows: in C 0.17, 0.18 and 0.22 with every step replayed (0.06 and 0.11 at
width 32), 0.20, 0.30 and 0.25 with the default limit; in PyTorch 0.11, 0.16 and 0.26. Not measured on a GPU."""
FLUSH_ROWS = 1 << 18
"""Rows looked at together in a flush."""


class RowAdamW:
    """AdamW over one table [R, D] of any float dtype, updated in place; see the module for what it promises.

    replay_limit: most steps replayed for a row, None for all. path: "replay" or "sweep" for every step, or "auto".
    `before_read` must have seen every row that has a gradient since the last step (an AssertionError otherwise:
    its gradient would be that of an outdated row). State is on the table's device, and unseen by autograd.
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
        backend: str | None = None,
    ) -> None:
        if replay_limit is not None and replay_limit < 1:
            raise ValueError(f"replay_limit: got {replay_limit}, allowed: None or at least 1")
        if low_precision == "stochastic" and table_RD.dtype != torch.bfloat16:
            raise ValueError(f"low_precision='stochastic': got a table of {table_RD.dtype}, allowed: torch.bfloat16")
        self.table_RD, self.gradients = table_RD.detach(), gradients
        self.replay_limit, self.path, self.lazy = replay_limit, path, lazy
        self.state = _new_state(self.table_RD, low_precision, row_second_moment, seed)
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
        """Memory held per row beside the table itself."""
        state = self.state
        held = [state.mean_RD, state.square_RX, state.last_R, state.moment_R, state.touched_R]
        held += [state.values_RD] if self.has_master else []
        return sum(tensor.nbytes for tensor in held) // len(state.last_R)

    @torch.no_grad()
    def before_read(self, indices: Tensor) -> None:
        """Replay what the rows about to be read have missed; int64 indices of any shape, repeats allowed."""
        if self._current:
            return
        self._catch_up(self.gradients.groups(indices).rows_U, moments=False)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW step at rate `lr` with the sink's gradients, zero for the other rows; clears the sink."""
        rows_U, sums, where = self._take_gradients()
        done = self._current or bool((self.state.last(rows_U) == self.steps).all())
        assert done, "a row has a gradient but was not read since the last step"
        is_sweep = self._sweep_pays(len(rows_U))
        if is_sweep:
            self.flush()
        elif self.lazy:
            self.state.floor = self.steps
        self.history.append(lr)
        run = self._ops.sweep if is_sweep else self._ops.update
        run(self.state, self._blocks, rows_U, sums, self.history, **where)
        self._publish(None if is_sweep else rows_U)
        if is_sweep:
            self._all_done()
        self.gradients.clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Replay what any row has missed: afterwards the table is what dense AdamW would hold."""
        if self._current:
            return
        state = self.state
        for start in range(0, len(state.last_R), FLUSH_ROWS):
            part = slice(start, start + FLUSH_ROWS)
            behind = (state.moment_R[part] < self.steps).logical_and_(state.touched_R[part])
            behind.logical_or_(state.last_R[part] < self.steps)
            self._catch_up(behind.nonzero().squeeze(1) + start, moments=True)
        self._all_done()

    def state_dict(self) -> dict[str, Any]:
        """Flushes; step count, moments, rows ever touched, master copy and random state where there are any."""
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
        if state.noise is not None:
            saved["noise"] = state.noise.get_state()
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a saved state; the table itself is loaded by its owner."""
        state = self.state
        state.mean_RD.copy_(saved["m"])
        state.square_RX.copy_(saved["v"])
        state.touched_R.copy_(saved["touched"])
        if self.has_master:
            state.values_RD.copy_(saved["master"])
        if state.noise is not None:
            state.noise.set_state(saved["noise"])
        self.history.restart(int(saved["step"]))
        self._all_done()

    def _take_gradients(self) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Rows, gradients and further arguments of `update` and `sweep`: Triton's read gradients where they are."""
        if hasattr(self._ops, "READS_IN_PLACE"):
            rows_U, sums, slots_U, scale = self.gradients.placed()
            return rows_U, sums, {"slots_U": slots_U, "scale": scale}
        return *self.gradients.merged(), {}

    def _sweep_pays(self, rows: int) -> bool:
        if self.lazy or self.path != "auto":
            return self.path == "sweep" and not self.lazy
        return rows >= SWEEP_SHARE * len(self.state.last_R)

    @property
    def _current(self) -> bool:
        """No row has missed a step (or missing steps is meant)."""
        return self.state.floor == self.steps or self.lazy

    def _catch_up(self, rows_U: Tensor, moments: bool) -> None:
        if rows_U.numel():
            self._ops.replay(self.state, self._blocks, rows_U, self.history, self.replay_limit, moments)
            self._publish(rows_U)

    def _all_done(self) -> None:
        self.state.floor = self.steps
        self.history.restart(self.steps)

    def _publish(self, rows_U: Tensor | None) -> None:
        """Write the master copy's values to the table: those rows, or all."""
        if self.has_master and rows_U is None:
            self.table_RD.copy_(self.state.values_RD)
        elif self.has_master:
            self.table_RD[rows_U] = self.state.values_RD[rows_U].to(self.table_RD.dtype)


def _new_state(table_RD: Tensor, low_precision: str, row_second_moment: bool, seed: int) -> State:
    rows, width = table_RD.shape
    wide = torch.float64 if table_RD.dtype == torch.float64 else torch.float32
    needs_master = low_precision == "master" and table_RD.dtype != wide
    stochastic = low_precision == "stochastic"
    return State(
        values_RD=table_RD.to(wide, copy=True) if needs_master else table_RD,
        mean_RD=table_RD.new_zeros(rows, width, dtype=wide),
        square_RX=table_RD.new_zeros(rows, 1 if row_second_moment else width, dtype=wide),
        last_R=table_RD.new_zeros(rows, dtype=torch.int32),
        moment_R=table_RD.new_zeros(rows, dtype=torch.int32),
        touched_R=table_RD.new_zeros(rows, dtype=torch.bool),
        noise=torch.Generator(table_RD.device).manual_seed(seed) if stochastic else None,
    )


def _implementation(values_RD: Tensor, full_moments: bool, backend: str | None) -> ModuleType:
    name = dispatch.choose(values_RD, backend, full_moments and values_RD.is_contiguous())
    return dispatch.module("row_adamw", "torch" if name == "native" and not native.exact() else name)
