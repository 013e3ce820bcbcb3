"""Weighted bags of rows against dense autograd in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch
from kernels.embedding_bag import LatestGroups, RowGradients, embedding_bag, embedding_dot, native, reference

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

BACKENDS = ["torch", "native", "triton"]
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN, so that missing writes show."""
    real, real_new = torch.empty, torch.Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(real(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(real_new(*args, **kwargs)))


def case(rows: int, width: int, bags: int, size: int, dtype: torch.dtype, seed: int = 0, hot: bool = False) -> Any:
    """A table, indices (all the same row if hot), weights and an output gradient."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator).to(dtype)
    indices = torch.randint(rows, (bags, size), generator=generator)
    indices = torch.full_like(indices, rows - 1) if hot else indices
    weights = torch.randn(bags, size, generator=generator)
    grad = torch.randn(bags, width, generator=generator)
    return table, indices, weights.to(dtype) if dtype == torch.float64 else weights, grad.to(dtype)


def dense(rows: int, gradients: RowGradients) -> Tensor:
    """The compact gradients as a table; their rows must be unique."""
    rows_U, sums_UD = gradients.merged()
    assert torch.equal(rows_U, rows_U.unique())
    return torch.zeros(rows, sums_UD.shape[1], dtype=torch.float64).index_copy_(0, rows_U, sums_UD.double())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.sampled_from([1, 7, 40]),
    width=st.sampled_from([1, 5, 32, 96]),
    bags=st.sampled_from([0, 1, 6]),
    size=st.sampled_from([0, 1, 3, 9]),
    dtype=st.sampled_from(list(EPS)),
)
def test_outputs_and_gradients_equal_dense_autograd(
    backend: str, seed: int, rows: int, width: int, bags: int, size: int, dtype: torch.dtype
) -> None:
    check(*case(rows, width, bags, size, torch.float32 if backend == "native" else dtype, seed), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [96, 192, 768])
def test_all_lookups_may_read_one_row(backend: str, width: int) -> None:
    check(*case(5, width, 7, 11, torch.float32, hot=True), backend)


def check(table: Tensor, indices: Tensor, weights: Tensor, grad: Tensor, backend: str) -> None:
    """Bag and dot, outputs and every gradient, against float64 autograd on the gathered rows."""
    tolerance = {"rtol": EPS[table.dtype], "atol": EPS[table.dtype] * 10}
    table64, weights64, x64 = (part.double().detach().clone().requires_grad_() for part in (table, weights, grad))
    out64 = torch.einsum("ns,nsd->nd", weights64, table64[indices])
    out64.backward(grad.double())
    leaf, weights_leaf = (part.detach().clone().requires_grad_() for part in (table, weights))
    sink = RowGradients(leaf)
    out = embedding_bag(leaf, indices, weights_leaf, sink, backend)
    assert out.dtype == table.dtype
    torch.testing.assert_close(out.double(), out64.detach(), **tolerance)
    out.backward(grad)
    assert leaf.grad is None
    assert weights_leaf.grad is not None
    torch.testing.assert_close(weights_leaf.grad.double(), weights64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(len(table), sink), table64.grad, rtol=1e-4, atol=1e-4)

    table64.grad = None
    dots64 = torch.einsum("nd,nsd->ns", x64, table64[indices])
    dots64.backward(weights.double())
    x, sink = grad.detach().clone().requires_grad_(), RowGradients(leaf)
    dots = embedding_dot(leaf, indices, x, sink, backend)
    torch.testing.assert_close(dots.double(), dots64.detach(), rtol=1e-4, atol=1e-4)
    dots.backward(weights.to(dots.dtype))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, **tolerance)
    torch.testing.assert_close(dense(len(table), sink), table64.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lookups", [1, 4, 5, 37, 130])
@pytest.mark.parametrize("reads", ["one row", "three rows", "random rows", "every row once"])
def test_triton_row_sums_do_not_depend_on_where_chunks_end(
    lookups: int, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of four lookups, so that the parts of a row are summed over up to four levels."""
    from kernels.embedding_bag import triton

    monkeypatch.setattr(triton, "CHUNK", 4)
    monkeypatch.setattr(triton, "LOOKUPS", 2)
    generator = torch.Generator().manual_seed(lookups)
    distinct = {"one row": 1, "three rows": 3, "random rows": 20}.get(reads, lookups)
    indices = torch.randint(distinct, (lookups, 1), generator=generator) * 2
    indices = torch.arange(lookups).unsqueeze(1) if reads == "every row once" else indices
    source, weights = torch.randn(lookups, 5, generator=generator), torch.randn(lookups, 1, generator=generator)
    groups = reference.group_by_row(indices, 300)
    expected = reference.row_sums(source.double(), weights.double(), groups, torch.float64)
    sorted_lookups, unique = triton.group_by_row(indices, 300), len(groups.rows_U)
    rows, sums = triton.row_sums(source, weights, sorted_lookups, torch.float32)
    assert rows.tolist() == [*groups.rows_U.tolist(), *[300] * (lookups - unique)]
    torch.testing.assert_close(sums[:unique].double(), expected, rtol=1e-5, atol=1e-5)
    assert (sums[unique:] == 0).all()
    buffer, is_read = torch.ones(300, 5), torch.zeros(300, dtype=torch.bool)
    triton.add_row_sums(source, weights, sorted_lookups, buffer, is_read)
    assert torch.equal(is_read.nonzero().squeeze(1), groups.rows_U)
    torch.testing.assert_close(buffer[groups.rows_U].double(), expected + 1, rtol=1e-5, atol=1e-5)
    unread = torch.ones(300, dtype=torch.bool).index_fill_(0, groups.rows_U, False)
    assert (buffer[unread] == 1).all()


def test_triton_adds_to_one_buffer_once_most_rows_are_read() -> None:
    """Two reads of few rows, one of most, another of few: the same gradients as merged pieces, norm and scale too."""
    table = torch.randn(20, 6)
    sinks = {backend: RowGradients(table) for backend in ("torch", "triton")}
    for backend, sink in sinks.items():
        torch.manual_seed(0)
        leaf = table.clone().requires_grad_()
        for rows in (3, 5, 20, 4):
            indices, weights = torch.randint(rows, (15, 4)), torch.randn(15, 4)
            embedding_bag(leaf, indices, weights, sink, backend).square().sum().backward()
    ours, theirs = sinks["triton"], sinks["torch"]
    torch.testing.assert_close(ours.norm(), theirs.norm())
    ours.scale_(0.5)
    theirs.scale_(0.5)
    rows, sums, is_read, scale = ours.placed()
    assert rows is None
    assert is_read is not None
    assert scale is not None
    assert len(sums) == len(table)
    assert torch.equal(is_read.nonzero().squeeze(1), theirs.merged()[0])
    torch.testing.assert_close(sums[is_read] * scale, theirs.merged()[1])
    torch.testing.assert_close(ours.merged()[1], theirs.merged()[1])


def test_triton_merges_reads_of_few_rows_without_knowing_how_many() -> None:
    table = torch.randn(200, 6)
    sinks = {backend: RowGradients(table) for backend in ("torch", "triton")}
    for backend, sink in sinks.items():
        torch.manual_seed(0)
        leaf = table.clone().requires_grad_()
        for rows in (3, 5, 20):
            indices, weights = torch.randint(rows, (8, 4)), torch.randn(8, 4)
            embedding_bag(leaf, indices, weights, sink, backend).square().sum().backward()
    ours, theirs = sinks["triton"], sinks["torch"]
    torch.testing.assert_close(ours.norm(), theirs.norm())
    rows, sums, is_read, _ = ours.placed()
    assert is_read is None
    assert rows is not None
    used = rows < 200
    assert torch.equal(rows[used], theirs.merged()[0])
    assert (sums[~used] == 0).all()
    torch.testing.assert_close(sums[used], theirs.merged()[1])
    assert torch.equal(ours.merged()[0], theirs.merged()[0])
    torch.testing.assert_close(ours.merged()[1], theirs.merged()[1])


@pytest.mark.parametrize("table_rows", [20, 200])
def test_triton_keeps_the_gradients_of_some_rows_without_knowing_how_many(table_rows: int) -> None:
    """In a buffer of the whole table and in places; gradients added later count, too."""
    table = torch.randn(table_rows, 6)
    is_kept = torch.arange(table_rows) % 3 == 0
    sinks = {backend: RowGradients(table) for backend in ("torch", "triton")}
    for backend, sink in sinks.items():
        torch.manual_seed(0)
        leaf = table.clone().requires_grad_()
        for step in range(3):
            if step == 2:
                sink.scale_(0.5)
                sink.keep(is_kept)
            indices, weights = torch.randint(20, (8, 4)), torch.randn(8, 4)
            embedding_bag(leaf, indices, weights, sink, backend).square().sum().backward()
        sink.keep(is_kept)
    ours, theirs = sinks["triton"], sinks["torch"]
    torch.testing.assert_close(ours.norm(), theirs.norm())
    assert (ours.placed().rows_P is None) == (table_rows == 20)
    assert torch.equal(ours.merged()[0], theirs.merged()[0])
    assert is_kept[ours.merged()[0]].all()
    torch.testing.assert_close(ours.merged()[1], theirs.merged()[1])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 40, 1 << 11, (1 << 11) + 1, 1 << 22, 1 << 40]),
    lookups=st.sampled_from([0, 1, 7, 300]),
    distinct=st.sampled_from([1, 3, 1 << 30]),
    seed=st.integers(0, 999),
)
def test_lookups_are_grouped_as_by_a_stable_sort(rows: int, lookups: int, distinct: int, seed: int) -> None:
    indices = torch.randint(rows, (lookups,), generator=torch.Generator().manual_seed(seed)) % distinct
    indices[::7] = rows - 1
    for ours, theirs in zip(native.group_by_row(indices, rows), reference.group_by_row(indices, rows), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40])
@pytest.mark.parametrize("trained", [True, False])
def test_an_index_out_of_range_is_refused(backend: str, wrong: int, trained: bool) -> None:
    table, indices, weights, grad = case(5, 4, 3, 2, torch.float32)
    indices[1, 1] = wrong
    table.requires_grad_(trained)
    for read, other in ((embedding_bag, weights), (embedding_dot, grad)):
        with pytest.raises((IndexError, RuntimeError), match=r"range|index_size"):
            read(table, indices, other, RowGradients(table), backend)


def test_rows_that_are_not_read_may_be_nan() -> None:
    table, indices, weights, grad = case(40, 33, 4, 3, torch.float32)
    unread = torch.ones(40, dtype=torch.bool)
    unread[indices] = False
    table[unread] = float("nan")
    table[indices] = torch.randn(4, 3, 33)
    check(table, indices, weights, grad, "native")


def test_gradients_of_layers_and_micro_batches_add_up_as_in_autograd() -> None:
    """Bit for bit, in the order of the backward passes; three layers, two micro-batches."""
    table = torch.randn(12, 8)
    sink, total = RowGradients(table), torch.zeros(12, 8)
    for _ in range(6):
        rows = torch.randperm(12)[:5].sort().values
        sums = torch.randn(5, 8)
        total[rows] += sums
        sink.add(rows, sums)
    rows_U, sums_UD = sink.merged()
    assert torch.equal(torch.zeros(12, 8).index_copy_(0, rows_U, sums_UD), total)
    assert rows_U.tolist() == sorted(set(rows_U.tolist()))


def test_clipping_equals_torchs_on_the_dense_gradient() -> None:
    table = torch.nn.Parameter(torch.zeros(50, 4))
    rows, sums = torch.tensor([3, 30]), torch.randn(2, 4) * 10
    sink = RowGradients(table)
    sink.add(rows, sums.clone())
    table.grad = torch.zeros(50, 4).index_copy_(0, rows, sums)
    norm = torch.nn.utils.clip_grad_norm_([table], 1.0)
    torch.testing.assert_close(sink.clip_(1.0), norm)
    torch.testing.assert_close(sink.merged()[1], table.grad[rows])


def test_the_backward_pass_repeats_bit_for_bit() -> None:
    table, indices, weights, grad = case(9, 33, 40, 16, torch.float32)
    results = []
    for _ in range(2):
        leaf = table.clone().requires_grad_()
        sink = RowGradients(leaf)
        embedding_bag(leaf, indices, weights, sink).backward(grad)
        results.append(sink.merged()[1])
    assert torch.equal(*results)


def test_a_replay_of_other_rows_between_forward_and_backward_is_allowed() -> None:
    table, indices, weights, grad = case(20, 4, 3, 2, torch.float32)
    leaf = table.clone().requires_grad_()
    weights.requires_grad_()
    out = embedding_bag(leaf, indices, weights, RowGradients(leaf))
    others = torch.ones(20, dtype=torch.bool)
    others[indices] = False
    with torch.no_grad():
        leaf[others] += 1.0
    out.backward(grad)
    assert weights.grad is not None
    expected = torch.einsum("nd,nsd->ns", grad, table[indices])
    torch.testing.assert_close(weights.grad, expected)


def test_an_unknown_backend_is_refused() -> None:
    table, indices, weights, _ = case(2, 2, 1, 1, torch.float32)
    with pytest.raises(ValueError, match="allowed: native, torch, triton"):
        embedding_bag(table, indices, weights, RowGradients(table), backend="cuda")


def test_lookups_of_one_row_in_many_chunks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.embedding_bag import triton

    monkeypatch.setattr(triton, "CHUNK", 4)
    table, indices, weights, grad = case(6, 5, 9, 11, torch.float32)
    indices[:, :8] = 3
    check(table, indices, weights, grad, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31_elements_are_read(backend: str, tmp_path: Path) -> None:
    """In a sparse file."""
    width, dtype = 1024, torch.float32 if backend == "native" else torch.float16
    rows = (1 << 31) // width + 3
    table = torch.from_file(str(tmp_path / "table"), shared=True, size=rows * width, dtype=dtype).view(rows, width)
    table[rows - 1] = 2.0
    table[1] = 1.0
    indices, weights = torch.tensor([[rows - 1, 1]]), torch.tensor([[1.0, 10.0]])
    table.requires_grad_()
    weights.requires_grad_()
    sink = RowGradients(table)
    out = embedding_bag(table, indices, weights, sink, backend)
    assert out.unique().tolist() == [12.0]
    out.backward(torch.ones_like(out))
    assert weights.grad is not None
    assert weights.grad.tolist() == [[2.0 * width, width]]
    assert sink.merged()[0].tolist() == [1, rows - 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tables_that_share_groups_have_the_gradients_of_tables_of_their_own(backend: str) -> None:
    """Two tables are read at the same rows, which are grouped once, and a shorter one at rows of its own."""
    tables, shared = (torch.randn(90, 4), torch.randn(90, 8), torch.randn(70, 4)), LatestGroups()
    sinks = [RowGradients(table, shared) for table in tables]
    own = [RowGradients(table) for table in tables]
    for _ in range(2):
        indices, others = torch.randint(60, (5, 3)), torch.randint(60, (5, 3))
        read = (indices, indices, others)
        ops = dispatch.module("embedding_bag", backend)
        assert sinks[0].groups(indices, ops) is sinks[1].groups(indices, ops)
        assert sinks[2].groups(indices, ops) is not sinks[0].groups(indices, ops)
        for of_tables in (sinks, own):
            outs = [
                embedding_bag(table.clone().requires_grad_(), rows, torch.ones(5, 3), sink, backend)
                for table, rows, sink in zip(tables, read, of_tables, strict=True)
            ]
            torch.cat(outs, 1).square().sum().backward()
    for ours, theirs in zip(sinks, own, strict=True):
        for part, expected in zip(ours.merged(), theirs.merged(), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_replicas_sum_gradients_over_the_rows_that_any_has_read(share: float) -> None:
    """Compact or in a buffer of the whole table, by the rows alone; a factor is applied before."""
    generator = torch.Generator().manual_seed(0)
    sinks, dense_RD = [], torch.zeros(50, 4)
    for factor in (1.0, 0.5):
        sinks.append(RowGradients(torch.zeros(50, 4)))
        for _ in range(2):
            rows = (torch.rand(50, generator=generator) < share / 2).nonzero().squeeze(1)
            sums = torch.randn(len(rows), 4, generator=generator)
            sinks[-1].add(rows, sums.clone())
            dense_RD[rows] += factor * sums
        sinks[-1].scale_(factor)
    union = (sinks[0].is_read() | sinks[1].is_read()).nonzero().squeeze(1)
    first, second = (sink.spread(union) for sink in sinks)
    first.add_(second)
    rows, sums = sinks[0].merged()
    assert rows.equal(union)
    assert first.shape == ((50, 4) if share == 0.9 else (len(union), 4))
    torch.testing.assert_close(torch.zeros(50, 4).index_copy_(0, rows, sums), dense_RD)


class NoWaits(TorchDispatchMode):
    """Refuses operations whose results the host would have to read from a device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refused = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        assert operation not in refused, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("table_rows", [50, 400])
def test_replicas_on_a_gpu_sum_gradients_without_waiting(table_rows: int) -> None:
    """Few or most rows, by the lookups of both replicas; each reads other rows."""
    table = torch.randn(table_rows, 4)
    sinks, expected = [], torch.zeros(table_rows, 4, dtype=torch.float64)
    for first in (0, 15):
        ours, theirs = RowGradients(table), RowGradients(table)
        for _ in range(2):
            indices, weights = first + torch.randint(30, (5, 4)), torch.randn(5, 4)
            for sink, backend in ((ours, "triton"), (theirs, "torch")):
                embedding_bag(table.clone().requires_grad_(), indices, weights, sink, backend).square().sum().backward()
        sinks.append(ours)
        expected += dense(table_rows, theirs)
    with NoWaits():
        is_read = sinks[0].is_read() | sinks[1].is_read()
        rows = sinks[0].rows_to_share(is_read, replicas=2)
        one, other = (sink.spread(rows) for sink in sinks)
        one.add_(other)
    assert len(one) == (table_rows if table_rows == 50 else 2 * 40)
    torch.testing.assert_close(dense(table_rows, sinks[0]), expected, rtol=1e-5, atol=1e-5)
