"""The contenders of kernels.bench that update a table: by rows, by dense AdamW, by SparseAdam.

Each takes one more step at the end, which must move a sample of rows as float64 arithmetic does. A table updated by
rows must also equal the dense contender's.

Shapes: R table rows, D width, N bags, S rows read per bag, U unique rows read, C rows checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.bench.cases import Case, Contender, Inputs, plain_bag
from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.row_adamw import RowAdamW

BETAS, EPS, DECAY, RATE, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0
CHECKED_ROWS, CHECKED_ELEMENTS = 32, 1 << 24
SMALL_ROWS = 1 << 20
"""The reference and SparseAdam are timed up to this many rows."""


class Rows(NamedTuple):
    """Some rows' values and moments in float64, and the steps taken."""

    p_CD: Tensor
    m_CD: Tensor
    v_CD: Tensor
    step: int


class Step(Contender):
    """From an output's gradient to an updated table."""

    def __init__(self, name: str, case: Case) -> None:
        super().__init__(name, _step_bytes(case), case.device)
        self.case, self.table_RD = case, torch.nn.Parameter(case.table())
        self.moved_right = True

    def rows(self, rows_C: Tensor) -> Rows:
        """Return the state of some rows."""
        raise NotImplementedError

    def expected(self, before: Rows, grads_CD: Tensor) -> Tensor:
        """Return their values after one more step: AdamW's, Loshchilov and Hutter 2019, algorithm 2."""
        step = before.step + 1
        m_CD = BETAS[0] * before.m_CD + (1 - BETAS[0]) * grads_CD
        v_CD = BETAS[1] * before.v_CD + (1 - BETAS[1]) * grads_CD.square()
        m_CD, v_CD = m_CD / (1 - BETAS[0] ** step), v_CD / (1 - BETAS[1] ** step)
        return (1 - RATE * DECAY) * before.p_CD - RATE * m_CD / (v_CD.sqrt() + EPS)

    def prove(self, inputs: Inputs) -> None:
        read_U = inputs.indices_NS.unique()
        unread = torch.ones(self.case.rows, dtype=torch.bool, device=read_U.device).index_fill_(0, read_U, False)
        rows_C = torch.cat((read_U[:CHECKED_ROWS], unread.nonzero().squeeze(1)[:CHECKED_ROWS]))
        before, grads_CD = self.rows(rows_C), _gradients(inputs, rows_C, read_U)
        self.turn(inputs)
        rtol, atol = (0.0, 1e-2 * RATE) if self.case.dtype == torch.float32 else (2**-7, RATE)
        self.moved_right = torch.allclose(self.rows(rows_C).p_CD, self.expected(before, grads_CD), rtol, atol)


class RowStep(Step):
    """Grouping, replay, backward and update by rows; its table must equal the dense contender's, `dense_RD`."""

    def __init__(self, case: Case, settled: bool, backend: str | None = None) -> None:
        super().__init__("reference" if backend else "ours", case)
        self.backend, self.sink = backend, RowGradients(self.table_RD)
        self.adamw = RowAdamW(self.table_RD, self.sink, betas=BETAS, eps=EPS, weight_decay=DECAY, backend=backend)
        if settled:
            self.adamw.load_state_dict(_moments(case) | {"touched": torch.ones(case.rows, dtype=torch.bool)})
        self.dense_RD: Tensor | None = None

    def turn(self, inputs: Inputs) -> float:
        weights_NS = inputs.weights_NS.clone().requires_grad_()
        group = self.lap("group", lambda: self.sink.groups(inputs.indices_NS))
        replay = self.lap("replay", lambda: self.adamw.before_read(inputs.indices_NS))
        out_ND = embedding_bag(self.table_RD, inputs.indices_NS, weights_NS, self.sink, self.backend)
        backward = self.lap("backward", lambda: out_ND.backward(inputs.grad_ND))
        return group + replay + backward + self.lap("update", self._update)

    def _update(self) -> None:
        self.sink.clip_(CLIP)
        self.adamw.step(RATE)

    def rows(self, rows_C: Tensor) -> Rows:
        saved = self.adamw.state_dict()  # flushes
        return Rows(_wide(self.table_RD, rows_C), _wide(saved["m"], rows_C), _wide(saved["v"], rows_C), saved["step"])

    def correct(self) -> bool:
        self.adamw.flush()
        return self.moved_right and (self.dense_RD is None or _same(self.table_RD, self.dense_RD))


class TorchStep(Step):
    """A step with an optimizer of torch that has Adam's moments."""

    optimizer: torch.optim.Optimizer

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def rows(self, rows_C: Tensor) -> Rows:
        state = self.optimizer.state[self.table_RD]
        m_CD, v_CD = _wide(state["exp_avg"], rows_C), _wide(state["exp_avg_sq"], rows_C)
        return Rows(_wide(self.table_RD, rows_C), m_CD, v_CD, int(state["step"]))

    def correct(self) -> bool:
        return self.moved_right


class DenseStep(TorchStep):
    """Dense backward, clip_grad_norm_ and fused AdamW."""

    def __init__(self, case: Case, settled: bool) -> None:
        super().__init__("dense AdamW", case)
        self.optimizer = torch.optim.AdamW(
            [self.table_RD], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        if settled:
            saved = _moments(case)
            self.optimizer.state[self.table_RD] = {
                "step": torch.tensor(float(saved["step"]), device=case.device),
                "exp_avg": saved["m"].to(case.dtype),
                "exp_avg_sq": saved["v"].to(case.dtype).contiguous(),
            }

    def turn(self, inputs: Inputs) -> float:
        weights_NS = inputs.weights_NS.clone().requires_grad_()
        out_ND = plain_bag(self.table_RD, inputs.indices_NS, weights_NS)
        backward = self.lap("backward", lambda: out_ND.backward(inputs.grad_ND))
        return backward + self.lap("clip", self._clip) + self.lap("update", self._update)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_([self.table_RD], CLIP)


class SparseStep(TorchStep):
    """Sparse gradients and torch's SparseAdam: no clipping, no weight decay, no change of other rows."""

    def __init__(self, case: Case) -> None:
        super().__init__("SparseAdam", case)
        self.optimizer = torch.optim.SparseAdam([self.table_RD], lr=RATE, betas=BETAS, eps=EPS)

    def turn(self, inputs: Inputs) -> float:
        weights_NS = inputs.weights_NS.clone().requires_grad_()
        out_ND = plain_bag(self.table_RD, inputs.indices_NS, weights_NS, sparse=True)
        return self.lap("backward", lambda: out_ND.backward(inputs.grad_ND)) + self.lap("update", self._update)

    def expected(self, before: Rows, grads_CD: Tensor) -> Tensor:
        step, is_read_C1 = before.step + 1, grads_CD.ne(0).any(1, keepdim=True)
        m_CD = BETAS[0] * before.m_CD + (1 - BETAS[0]) * grads_CD
        v_CD = BETAS[1] * before.v_CD + (1 - BETAS[1]) * grads_CD.square()
        rate = RATE * (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
        return before.p_CD - is_read_C1 * rate * m_CD / (v_CD.sqrt() + EPS)


def step(case: Case, free_bytes: float) -> list[Contender]:
    """Return our contender and, if they fit in memory, dense AdamW, the reference and SparseAdam (float32).

    All but SparseAdam start as after many steps.
    """
    ours, small = RowStep(case, settled=True), case.rows <= SMALL_ROWS and case.dtype == torch.float32
    if case.rows_bytes + case.dense_bytes > free_bytes:
        return [ours]
    dense = DenseStep(case, settled=True)
    ours.dense_RD = dense.table_RD
    if not small or 3 * case.rows_bytes + case.dense_bytes > free_bytes:
        return [ours, dense]
    reference = RowStep(case, settled=True, backend="torch")
    reference.dense_RD = dense.table_RD
    return [ours, dense, reference, SparseStep(case)]


def stepper(case: Case, name: str) -> Contender:
    """Return one contender from its first step, with nothing else in memory."""
    if name == "dense AdamW":
        return DenseStep(case, settled=False)
    if name == "SparseAdam":
        return SparseStep(case)
    return RowStep(case, settled=False, backend="torch" if name == "reference" else None)


def _moments(case: Case) -> dict[str, Any]:
    """Set the state to that after many steps, so that no row is new: gradients of 1e-5, bias corrections near one."""
    generator = torch.Generator(case.device).manual_seed(1)
    m_RD = torch.empty(case.rows, case.width, device=case.device).normal_(generator=generator).mul_(1e-6)
    return {"step": 400, "m": m_RD, "v": m_RD.new_tensor(1e-10).expand_as(m_RD)}


def _wide(tensor_RD: Tensor, rows_C: Tensor) -> Tensor:
    return tensor_RD.detach()[rows_C].double()


def _gradients(inputs: Inputs, rows_C: Tensor, read_U: Tensor) -> Tensor:
    """Return the clipped gradients of some rows, float64; the norm is that of all rows read, `read_U` ascending."""
    (size, width), wide = (inputs.indices_NS.shape[1], inputs.grad_ND.shape[1]), torch.float64
    every_UD = torch.zeros(len(read_U), width, device=read_U.device)
    of_rows_CD = torch.zeros(len(rows_C), width, dtype=wide, device=read_U.device)
    together = max(1, CHECKED_ELEMENTS // (size * width))
    whole = inputs.indices_NS, inputs.weights_NS, inputs.grad_ND
    for indices_BS, weights_BS, grad_BD in zip(*(tensor.split(together) for tensor in whole), strict=True):
        shared_BSD = weights_BS.unsqueeze(2) * grad_BD.float().unsqueeze(1)
        every_UD.index_add_(0, torch.searchsorted(read_U, indices_BS.flatten()), shared_BSD.flatten(0, 1))
        shares_CB = torch.where(indices_BS == rows_C.view(-1, 1, 1), weights_BS.to(wide), 0.0).sum(2)
        of_rows_CD += shares_CB @ grad_BD.to(wide)
    return of_rows_CD * min(1.0, CLIP / (float(every_UD.norm()) + 1e-6))


def _same(ours_RD: Tensor, dense_RD: Tensor) -> bool:
    """Return whether both agree within a hundredth of an update (float32).

    A bfloat16 table gets more room, since ours rounds at other steps.
    """
    difference_RD = (ours_RD.detach() - dense_RD.detach()).abs()
    return bool(difference_RD.max() < (1e-2 * RATE if ours_RD.dtype == torch.float32 else 3e-2))


def _step_bytes(case: Case) -> int:
    """See kernels.bench; unique rows as of the first turn."""
    case.inputs(0)
    read = case.lookups * case.width * (case.dtype.itemsize + 4)
    return read + case.unique * case.width * (2 * 4 + 2 * (case.dtype.itemsize + 8))
