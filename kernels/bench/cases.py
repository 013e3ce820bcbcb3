"""The cases of kernels.bench and the contenders that read and search: what is timed, and how results are checked.

Shapes: R table rows, D width, N bags, S rows read per bag.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.product_key import product_key


@dataclass
class Case:
    """A table of `rows` x `width`, read `lookups` times per step in bags; `use`: uniform, or zipf (exponent 1)."""

    width: int
    rows: int
    lookups: int
    bag: int
    use: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    unique: int = field(default=0, init=False)

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        return self.rows * self.width * self.dtype.itemsize

    @property
    def rows_bytes(self) -> int:
        """Bytes of an update by rows: the table, fp32 moments, marks, and at most two gradients of every row."""
        return self.table_bytes + self.rows * (8 * self.width + 9) + 8 * self.width * min(self.rows, self.lookups)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense path: table, gradient and moments of the table's dtype."""
        return 4 * self.table_bytes

    @property
    def settling(self) -> int:
        """Steps after which rows have missed as many steps as they usually do, at most 15."""
        return min(15, 3 + 2 * self.rows // self.lookups)

    @functools.cached_property
    def scattered_R(self) -> Tensor:
        """Rows from the most to the least read."""
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))

    def inputs(self, turn: int) -> Inputs:
        """Return the indices, weights and output gradient of a turn."""
        generator = torch.Generator().manual_seed(turn)
        shape = (self.lookups // self.bag, self.bag)
        uniform_NS = torch.rand(shape, generator=generator, dtype=torch.float64)
        ranks_NS = uniform_NS * self.rows if self.use == "uniform" else self.rows**uniform_NS - 1
        indices_NS = self.scattered_R[ranks_NS.long().clamp(max=self.rows - 1)]
        weights_NS = torch.rand(shape, generator=generator) / self.bag
        grad_ND = torch.randn(shape[0], self.width, generator=generator) / shape[0]
        self.unique = len(indices_NS.unique())
        return Inputs(indices_NS.to(self.device), weights_NS.to(self.device), grad_ND.to(self.device, self.dtype))

    def table(self) -> Tensor:
        """Return the initial values."""
        generator = torch.Generator(self.device).manual_seed(0)
        start = torch.empty(self.rows, self.width, device=self.device).normal_(generator=generator)
        return start.mul_(self.width**-0.5).to(self.dtype)


@dataclass(frozen=True)
class Inputs:
    """The inputs of one turn."""

    indices_NS: Tensor
    weights_NS: Tensor
    grad_ND: Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its package, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Time `work`: CPU time of this thread, so that other processes matter little; on CUDA, events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.thread_time()
    work()
    return time.thread_time() - started


class Contender:
    """One implementation: `turn` returns its seconds; `lap` times its named parts."""

    def __init__(self, name: str, moved: int, device: str) -> None:
        self.name, self.bytes, self.device = name, moved, device
        self._laps: dict[str, list[float]] = {}

    def turn(self, inputs: Inputs) -> float:
        """Run once; returns seconds."""
        raise NotImplementedError

    def prove(self, inputs: Inputs) -> None:
        """Take one more step, for contenders whose turns depend on earlier ones.

        Called with the same inputs for all contenders, after their turns and before `correct`.
        """

    def correct(self) -> bool:
        """Return whether the results are right."""
        raise NotImplementedError

    def parts(self) -> str:
        """Return the median milliseconds of named parts."""
        medians = {name: 1e3 * sorted(laps)[len(laps) // 2] for name, laps in self._laps.items()}
        return " ".join(f"{name}={value:.2f}" for name, value in medians.items())

    def lap(self, name: str, work: Callable[[], object]) -> float:
        """Return the seconds of `work`, recorded under `name`."""
        seconds = seconds_of(work, self.device)
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


def plain_bag(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, sparse: bool = False) -> Tensor:
    """Compute the weighted bag with torch.nn.functional.embedding_bag."""
    weights_NS = weights_NS.to(table_RD.dtype)
    return F.embedding_bag(indices_NS, table_RD, mode="sum", per_sample_weights=weights_NS, sparse=sparse)


def forward(case: Case) -> list[Contender]:
    """Return the contenders of the forward pass: our kernel, F.embedding_bag and the reference."""
    table_RD = case.table()
    sink = RowGradients(table_RD)

    def of(backend: str | None) -> Callable[[Tensor, Inputs], Tensor]:
        return lambda table, at: embedding_bag(table, at.indices_NS, at.weights_NS, sink, backend)

    return [
        Forward("ours", case, table_RD, of(None)),
        Forward("F.embedding_bag", case, table_RD, lambda table, at: plain_bag(table, at.indices_NS, at.weights_NS)),
        Forward("reference", case, table_RD, of("torch")),
    ]


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
        count = max(1, min(8, (1 << 24) // self.half_keys**2))
        few = self.q_NM2W[:count].double()
        halves = torch.einsum("nmhw,mhkw->mhnk", few, self.keys_M2nW.double())
        every = (halves[:, 0].unsqueeze(-1) + halves[:, 1].unsqueeze(-2)).flatten(-2)
        best = every.topk(self.top_k).values
        return torch.allclose(self.scores_MNK[:, :count].double(), best, rtol=1e-4, atol=1e-4) and torch.allclose(
            every.gather(-1, self.rows_MNK[:, :count]), best, rtol=1e-4, atol=1e-4
        )


def _all_pairs(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Search the usual way: torch.topk of both sides and of all top_k * top_k sums."""
    values, keys = (q_NM2W.permute(1, 2, 0, 3) @ keys_M2nW.mT).topk(top_k)
    sums = (values[:, 0].unsqueeze(-1) + values[:, 1].unsqueeze(-2)).flatten(-2)
    scores, chosen = sums.topk(top_k)
    first, second = keys[:, 0].gather(-1, chosen // top_k), keys[:, 1].gather(-1, chosen % top_k)
    return first * keys_M2nW.shape[2] + second, scores


def search(case: Case) -> list[Contender]:
    """Return the contenders of the search: our kernel, all pairs by torch.topk, and the reference.

    Tables have a square number of rows.
    """
    return [
        Search("ours", case, product_key),
        Search("topk, all pairs", case, _all_pairs),
        Search("reference", case, functools.partial(product_key, backend="torch")),
    ]
