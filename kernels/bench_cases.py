"""The contenders of kernels.bench: what is timed, on which inputs, and how each proves itself right.

Shapes: R table rows, D width, N bags, S rows read per bag.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.product_key import product_key
from kernels.row_adamw import RowAdamW

BETAS, EPS, DECAY, RATE, CLIP = (0.9, 0.95), 1e-8, 0.1, 1e-3, 1.0


@dataclass
class Case:
    """A table of `rows` x `width`, read `lookups` times a step in bags; `use`: uniform, or zipf (exponent 1)."""

    width: int
    rows: int
    lookups: int
    bag: int
    use: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    unique: int = field(default=0, init=False)

    @property
    def dense_bytes(self) -> int:
        """Table, gradient and fp32 moments of the dense path, and the same of ours."""
        return self.rows * self.width * (3 * self.dtype.itemsize + 16)

    def inputs(self, turn: int) -> Inputs:
        """Indices, weights and output gradient of a turn."""
        generator = torch.Generator().manual_seed(turn)
        shape = (self.lookups // self.bag, self.bag)
        uniform_NS = torch.rand(shape, generator=generator, dtype=torch.float64)
        ranks_NS = uniform_NS * self.rows if self.use == "uniform" else self.rows**uniform_NS - 1
        scattered = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))
        indices_NS = scattered[ranks_NS.long().clamp(max=self.rows - 1)]
        weights_NS = torch.rand(shape, generator=generator) / self.bag
        grad_ND = torch.randn(shape[0], self.width, generator=generator) / shape[0]
        self.unique = len(indices_NS.unique())
        return Inputs(indices_NS.to(self.device), weights_NS.to(self.device), grad_ND.to(self.device, self.dtype))

    def table(self) -> Tensor:
        """Initial values."""
        generator = torch.Generator(self.device).manual_seed(0)
        start = torch.empty(self.rows, self.width, device=self.device).normal_(generator=generator)
        return start.mul_(self.width**-0.5).to(self.dtype)


@dataclass(frozen=True)
class Inputs:
    """What one turn computes on."""

    indices_NS: Tensor
    weights_NS: Tensor
    grad_ND: Tensor


class Contender:
    """One way to do it: `turn` gives its seconds; parts are named by `lap`."""

    def __init__(self, name: str, moved: int, device: str) -> None:
        self.name, self.bytes, self.device = name, moved, device
        self._laps: dict[str, list[float]] = {}

    def turn(self, inputs: Inputs) -> float:
        """Do it once."""
        raise NotImplementedError

    def correct(self) -> bool:
        """Whether what was computed is right."""
        raise NotImplementedError

    def parts(self) -> str:
        """Median milliseconds of named parts."""
        medians = {name: 1e3 * sorted(laps)[len(laps) // 2] for name, laps in self._laps.items()}
        return " ".join(f"{name}={value:.2f}" for name, value in medians.items())

    def lap(self, name: str, work: Callable[[], object]) -> float:
        """Seconds that `work` takes, kept under `name`."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            started = time.thread_time()
            work()
            seconds = time.thread_time() - started
        self._laps.setdefault(name, []).append(seconds)
        return seconds


class Forward(Contender):
    """A bag's forward pass, checked against float64 on 16 bags."""

    def __init__(self, name: str, case: Case, table_RD: Tensor, read: Callable[[Tensor, Inputs], Tensor]) -> None:
        super().__init__(name, case.lookups * case.width * case.dtype.itemsize, case.device)
        self.table_RD, self.read = table_RD, read

    def turn(self, inputs: Inputs) -> float:
        self.inputs = inputs
        with torch.no_grad():
            return self.lap("read", self._read)

    def _read(self) -> None:
        self.out_ND = self.read(self.table_RD, self.inputs)

    def correct(self) -> bool:
        rows_NSD = self.table_RD[self.inputs.indices_NS[:16]].double()
        expected_ND = torch.einsum("ns,nsd->nd", self.inputs.weights_NS[:16].double(), rows_NSD)
        off = 1e-5 if self.table_RD.dtype == torch.float32 else 1e-2
        return torch.allclose(self.out_ND[:16].double(), expected_ND, rtol=off, atol=off / 10)


def _plain(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, sparse: bool = False) -> Tensor:
    weights_NS = weights_NS.to(table_RD.dtype)
    return F.embedding_bag(indices_NS, table_RD, mode="sum", per_sample_weights=weights_NS, sparse=sparse)


def forward(case: Case) -> list[Contender]:
    """Ours and F.embedding_bag."""
    table_RD = case.table()
    sink = RowGradients(table_RD)
    return [
        Forward("ours", case, table_RD, lambda table, at: embedding_bag(table, at.indices_NS, at.weights_NS, sink)),
        Forward("F.embedding_bag", case, table_RD, lambda table, at: _plain(table, at.indices_NS, at.weights_NS)),
    ]


class RowStep(Contender):
    """Grouping, replay, backward and update by rows; its table must end as the dense contender's, `dense_RD`."""

    def __init__(self, case: Case, settled: bool) -> None:
        super().__init__("ours", _step_bytes(case), case.device)
        self.table_RD = torch.nn.Parameter(case.table())
        self.sink = RowGradients(self.table_RD)
        self.adamw = RowAdamW(self.table_RD, self.sink, betas=BETAS, eps=EPS, weight_decay=DECAY)
        if settled:
            self.adamw.load_state_dict(_moments(case) | {"touched": torch.ones(case.rows, dtype=torch.bool)})
        self.dense_RD: Tensor | None = None

    def turn(self, inputs: Inputs) -> float:
        weights_NS = inputs.weights_NS.clone().requires_grad_()
        group = self.lap("group", lambda: self.sink.groups(inputs.indices_NS))
        replay = self.lap("replay", lambda: self.adamw.before_read(inputs.indices_NS))
        out_ND = embedding_bag(self.table_RD, inputs.indices_NS, weights_NS, self.sink)
        backward = self.lap("backward", lambda: out_ND.backward(inputs.grad_ND))
        return group + replay + backward + self.lap("update", self._update)

    def _update(self) -> None:
        self.sink.clip_(CLIP)
        self.adamw.step(RATE)

    def correct(self) -> bool:
        self.adamw.flush()
        return self.dense_RD is not None and _same(self.table_RD, self.dense_RD)


class DenseStep(Contender):
    """Dense backward, clip_grad_norm_ and fused AdamW; or sparse gradients and SparseAdam."""

    def __init__(self, case: Case, settled: bool, sparse: bool = False) -> None:
        super().__init__("SparseAdam" if sparse else "dense AdamW", _step_bytes(case), case.device)
        self.table_RD, self.sparse = torch.nn.Parameter(case.table()), sparse
        self.optimizer: torch.optim.Optimizer
        if sparse:
            self.optimizer = torch.optim.SparseAdam([self.table_RD], lr=RATE, betas=BETAS, eps=EPS)
            return
        self.optimizer = torch.optim.AdamW(
            [self.table_RD], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        if not settled:
            return
        saved = _moments(case)
        self.optimizer.state[self.table_RD] = {
            "step": torch.tensor(float(saved["step"]), device=case.device),
            "exp_avg": saved["m"].to(case.dtype),
            "exp_avg_sq": saved["v"].to(case.dtype),
        }

    def turn(self, inputs: Inputs) -> float:
        weights_NS = inputs.weights_NS.clone().requires_grad_()
        out_ND = _plain(self.table_RD, inputs.indices_NS, weights_NS, self.sparse)
        backward = self.lap("backward", lambda: out_ND.backward(inputs.grad_ND))
        clip = 0.0 if self.sparse else self.lap("clip", self._clip)
        return backward + clip + self.lap("update", self._update)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_([self.table_RD], CLIP)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def correct(self) -> bool:
        return bool(torch.isfinite(self.table_RD).all())


def step(case: Case) -> list[Contender]:
    """Ours, dense, and (float32 tables of at most 2^20 rows) SparseAdam, all as after many steps."""
    ours, dense = RowStep(case, settled=True), DenseStep(case, settled=True)
    ours.dense_RD = dense.table_RD
    small = case.rows <= 1 << 20 and case.dtype == torch.float32
    return [ours, dense, *([stepper(case, 2, settled=True)] if small else [])]


def stepper(case: Case, index: int, settled: bool) -> Contender:
    """One of them alone; not settled: from the start, with nothing else in memory."""
    if index == 0:
        return RowStep(case, settled)
    return DenseStep(case, settled, sparse=index == 2)


def _moments(case: Case) -> dict[str, Any]:
    """As after many steps, so that no row is new: gradients of 1e-5, bias corrections near one."""
    generator = torch.Generator(case.device).manual_seed(1)
    m_RD = torch.randn(case.rows, case.width, generator=generator, device=case.device) * 1e-6
    return {"step": 400, "m": m_RD, "v": torch.full_like(m_RD, 1e-10)}


def _same(ours_RD: Tensor, dense_RD: Tensor) -> bool:
    """Within a hundredth of an update for float32; a bfloat16 table rounds at other steps than ours."""
    difference_RD = (ours_RD.detach() - dense_RD.detach()).abs()
    return bool(difference_RD.max() < (1e-2 * RATE if ours_RD.dtype == torch.float32 else 3e-2))


def _step_bytes(case: Case) -> int:
    """See kernels.bench; unique rows as of the first turn."""
    case.inputs(0)
    read = case.lookups * case.width * (case.dtype.itemsize + 4)
    return read + case.unique * case.width * (2 * 4 + 2 * (case.dtype.itemsize + 8))


class Search(Contender):
    """Top 32 (or fewer) rows of half_keys^2, checked by their sums."""

    def __init__(self, name: str, case: Case, find: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
        self.half_keys, self.top_k = math.isqrt(case.rows), min(32, case.bag)
        tokens = case.lookups // case.bag
        super().__init__(name, 4 * tokens * (case.width + 3 * self.top_k), case.device)
        generator = torch.Generator(case.device).manual_seed(2)
        half = case.width // 4
        self.q_NM2W = torch.randn(tokens, 1, 2, half, generator=generator, device=case.device)
        self.keys_M2nW = torch.randn(1, 2, self.half_keys, half, generator=generator, device=case.device)
        self.find = find

    def turn(self, inputs: Inputs) -> float:
        return self.lap("search", self._find)

    def _find(self) -> None:
        self.rows_MNK, self.scores_MNK = self.find(self.q_NM2W, self.keys_M2nW, self.top_k)

    def correct(self) -> bool:
        few = self.q_NM2W[:8].double()
        halves = torch.einsum("nmhw,mhkw->mhnk", few, self.keys_M2nW.double())
        every = (halves[:, 0].unsqueeze(-1) + halves[:, 1].unsqueeze(-2)).flatten(-2)
        best = every.topk(self.top_k).values
        return torch.allclose(self.scores_MNK[:, :8].double(), best, rtol=1e-4, atol=1e-4) and torch.allclose(
            every.gather(-1, self.rows_MNK[:, :8]), best, rtol=1e-4, atol=1e-4
        )


def _all_pairs(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The usual way: torch.topk of both sides and of all top_k * top_k sums."""
    values, keys = (q_NM2W.permute(1, 2, 0, 3) @ keys_M2nW.mT).topk(top_k)
    sums = (values[:, 0].unsqueeze(-1) + values[:, 1].unsqueeze(-2)).flatten(-2)
    scores, chosen = sums.topk(top_k)
    first, second = keys[:, 0].gather(-1, chosen // top_k), keys[:, 1].gather(-1, chosen % top_k)
    return first * keys_M2nW.shape[2] + second, scores


def search(case: Case) -> list[Contender]:
    """Ours and the usual way."""
    return [Search("ours", case, product_key), Search("topk, all pairs", case, _all_pairs)]
