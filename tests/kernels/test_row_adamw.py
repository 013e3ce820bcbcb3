"""Row-wise AdamW against torch.optim.AdamW on the dense gradient."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.embedding_bag import RowGradients, embedding_bag
from kernels.row_adamw import RowAdamW
from kernels.row_adamw.noise import Noise

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

ON_CPU = ["torch", "native"]


class Dense:
    """torch's single-tensor AdamW on a table with dense gradients."""

    def __init__(self, table: torch.Tensor, betas: tuple[float, float], decay: float) -> None:
        self.table = torch.nn.Parameter(table.clone())
        self.adamw = torch.optim.AdamW(
            [self.table], lr=1.0, betas=betas, weight_decay=decay, foreach=False, fused=False
        )

    def step(self, rows: torch.Tensor, grads: torch.Tensor, lr: float) -> None:
        self.table.grad = torch.zeros_like(self.table)
        self.table.grad[rows] = grads
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()


def history(seed: int, steps: int, rows: int, width: int, share: float) -> list[tuple[Any, Any, float]]:
    """Random steps: rows (some never, some often), gradients of many magnitudes, a changing learning rate."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.rand(rows, generator=generator) ** 4
    found = []
    for step in range(steps):
        touched = (torch.rand(rows, generator=generator) < popularity * share * 5).nonzero().squeeze(1)
        scale = 10 ** (torch.rand(len(touched), 1, generator=generator) * 6 - 5)
        grads = torch.randn(len(touched), width, generator=generator) * scale
        found.append((touched, grads, 1e-2 * (1 + step % 7) / (1 + step / 50)))
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 60),
    width=st.sampled_from([1, 3, 8, 33]),
    share=st.sampled_from([0.02, 0.2, 1.0]),
    decay=st.sampled_from([0.0, 0.1]),
    path=st.sampled_from(["auto", "replay", "sweep"]),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.5, 0.9)]),
    backend=st.sampled_from(ON_CPU),
)
def test_every_read_and_the_flushed_table_equal_dense_adamw_bit_for_bit(
    seed: int, rows: int, width: int, share: float, decay: float, path: Any, betas: tuple[float, float], backend: str
) -> None:
    torch.set_num_threads(1)
    start = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    dense, table = Dense(start, betas, decay), start.clone()
    sink = RowGradients(table)
    ours = RowAdamW(table, sink, betas=betas, weight_decay=decay, replay_limit=None, path=path, backend=backend)
    for touched, grads, lr in history(seed, 120, rows, width, share):
        ours.before_read(touched)
        assert torch.equal(table[touched], dense.table.detach()[touched])
        sink.add(touched, grads.clone())
        ours.step(lr)
        dense.step(touched, grads, lr)
    ours.flush()
    assert torch.equal(table, dense.table.detach())
    state = dense.adamw.state[dense.table]
    assert torch.equal(ours.state_dict()["m"], state["exp_avg"])
    assert torch.equal(ours.state_dict()["v"], state["exp_avg_sq"])


@pytest.mark.parametrize(
    ("backend", "dtype", "allowed"),
    [("torch", torch.float64, 1e-14), ("torch", torch.float32, 3e-6), ("native", torch.float32, 3e-6)],
)
def test_limited_replay_is_dense_adamw_up_to_rounding(backend: str, dtype: torch.dtype, allowed: float) -> None:
    """To 1e-14 in float64; in float32, to the roundings of p in dense AdamW, one per missed step."""
    start = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    dense, table = Dense(start, (0.9, 0.95), 0.1), start.clone()
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "path": "replay", "backend": backend}
    ours = RowAdamW(table, sink := RowGradients(table), **options)
    for touched, grads, lr in history(5, 240, 40, 8, 0.05):
        ours.before_read(touched)
        sink.add(touched, grads.to(dtype))
        ours.step(lr)
        dense.step(touched, grads.to(dtype), lr)
    saved = ours.state_dict()
    assert (table - dense.table.detach()).abs().max() < allowed
    state = dense.adamw.state[dense.table]
    torch.testing.assert_close(saved["m"], state["exp_avg"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(saved["v"], state["exp_avg_sq"], rtol=1e-4, atol=1e-18)


@pytest.mark.parametrize("limit", [4, 300])
def test_c_truncates_replay_as_pytorch_does(limit: int) -> None:
    """Gaps beyond the limit and beyond the tabulated powers; reads without a gradient in between."""
    tables = [torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) for _ in ON_CPU]
    options: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.1, "replay_limit": limit, "path": "replay"}
    saved = []
    for table, backend in zip(tables, ON_CPU, strict=True):
        ours = RowAdamW(table, sink := RowGradients(table), **options, backend=backend)
        for step in range(620):
            row = torch.tensor([0 if step in (0, 400) else 1 if step in (1, 610) else 2 + step % 3])
            ours.before_read(row)
            if step in (8, 500):
                ours.before_read(torch.tensor([0, 1]))
            sink.add(row, torch.ones(1, 3))
            ours.step(1e-3 * (1 + step % 5))
        saved.append(ours.state_dict())
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-6)
    for moment in ("m", "v"):
        torch.testing.assert_close(saved[0][moment], saved[1][moment], rtol=1e-5, atol=1e-30)
    assert torch.equal(saved[0]["touched"], saved[1]["touched"])


@pytest.mark.parametrize(("limit", "allowed"), [(256, 1e-8), (128, 1e-3), (16, None)])
def test_truncated_replay_is_within_its_bound(limit: int, allowed: float | None) -> None:
    """In units of the mean update of rows read; a limit of 16 is far too low and must exceed the bound."""
    start = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    tables = [start.clone(), start.clone()]
    sinks = [RowGradients(table) for table in tables]
    exact, cut = (
        RowAdamW(table, sink, betas=(0.9, 0.95), weight_decay=0.1, replay_limit=given)
        for table, sink, given in zip(tables, sinks, (None, limit), strict=True)
    )
    moved, count = 0.0, 0
    for touched, grads, lr in history(1, 600, 40, 8, 0.005):
        before = tables[0][touched].clone()
        for adamw, sink in ((exact, sinks[0]), (cut, sinks[1])):
            adamw.before_read(touched)
            sink.add(touched, grads.double())
            adamw.step(lr)
        moved += (tables[0][touched] - before).abs().sum().item()
        count += before.numel()
    exact.flush()
    cut.flush()
    error = (tables[0] - tables[1]).abs().max().item() / (moved / count)
    if allowed is None:
        assert error > 1e-2
    else:
        assert error < allowed


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_saved_state_continues_bit_for_bit(backend: str) -> None:
    start = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    steps = history(3, 60, 30, 4, 0.1)

    def fresh(table: torch.Tensor) -> tuple[RowAdamW, RowGradients]:
        sink = RowGradients(table)
        return RowAdamW(table, sink, weight_decay=0.1, replay_limit=None, backend=backend), sink

    def run(adamw: RowAdamW, sink: RowGradients, part: list[tuple[Any, Any, float]]) -> None:
        for touched, grads, lr in part:
            adamw.before_read(touched)
            sink.add(touched, grads.clone())
            adamw.step(lr)

    whole = start.clone()
    adamw, sink = fresh(whole)
    run(adamw, sink, steps)
    cut = start.clone()
    first, first_sink = fresh(cut)
    run(first, first_sink, steps[:25])
    second, second_sink = fresh(cut)
    second.load_state_dict(first.state_dict())
    run(second, second_sink, steps[25:])
    adamw.flush()
    second.flush()
    assert torch.equal(whole, cut)
    assert torch.equal(adamw.state_dict()["v"], second.state_dict()["v"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_of_a_row_that_was_not_read_is_refused(backend: str) -> None:
    table = torch.zeros(100, 2)
    sink = RowGradients(table)
    adamw = RowAdamW(table, sink, backend=backend)
    for rows in ([1], [2]):
        adamw.before_read(torch.tensor([1]))
        sink.add(torch.tensor(rows), torch.ones(1, 2))
        if rows == [1]:
            adamw.step(0.1)
    with pytest.raises(AssertionError, match="was not read"):
        adamw.step(0.1)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_step_without_reads_is_still_a_step(backend: str) -> None:
    start = torch.randn(5, 3)
    dense, table = Dense(start, (0.9, 0.999), 0.1), start.clone()
    ours = RowAdamW(table, RowGradients(table), weight_decay=0.1, replay_limit=None, backend=backend)
    empty = torch.zeros(0, dtype=torch.int64)
    for _ in range(3):
        ours.before_read(empty)
        ours.step(1e-2)
        dense.step(empty, torch.zeros(0, 3), 1e-2)
    ours.flush()
    assert torch.equal(table, dense.table.detach())


def _train(table: torch.Tensor, steps: int = 80, **options: Any) -> RowAdamW:
    ours = RowAdamW(table, sink := RowGradients(table), weight_decay=0.1, **options)
    for touched, grads, lr in history(7, steps, len(table), table.shape[1], 0.05):
        ours.before_read(touched)
        sink.add(touched, grads.clone())
        ours.step(lr)
    ours.flush()
    return ours


def test_a_master_copy_follows_the_float32_table() -> None:
    full = torch.randn(30, 4, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    low = full.bfloat16()
    _train(full)
    ours = _train(low, low_precision="master")
    assert torch.equal(ours.state.values_RD, full)
    assert torch.equal(low, full.bfloat16())
    assert ours.bytes_per_row == 4 * (8 + 4) + 9


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """Steps of 1e-4 at 1.0 are far below a bfloat16 step (2^-8 below 1, 2^-7 above)."""
    gone = {}
    for mode in ("nearest", "stochastic"):
        table = torch.ones(1, 4096, dtype=torch.bfloat16)
        ours = RowAdamW(table, sink := RowGradients(table), weight_decay=0.0, low_precision=mode)
        for _ in range(100):
            ours.before_read(torch.tensor([0]))
            sink.add(torch.tensor([0]), torch.ones(1, 4096))
            ours.step(1e-4)
        gone[mode] = 1 - table.float().mean().item()
    assert gone["nearest"] == 0
    assert gone["stochastic"] == pytest.approx(1e-2, rel=0.05)


@pytest.mark.parametrize("path", ["replay", "sweep"])
def test_a_row_wise_second_moment_is_that_of_the_mean_square(path: Any) -> None:
    """If all squares in a row are equal, both second moments are the same; the memory is one column."""
    tables = [torch.zeros(6, 4), torch.zeros(6, 4)]
    steps = [torch.randn(2, 1).expand(2, 4) for _ in range(20)]
    for table, rowwise in zip(tables, (False, True), strict=True):
        ours = RowAdamW(table, sink := RowGradients(table), row_second_moment=rowwise, path=path)
        for step, grads in enumerate(steps):
            rows = torch.tensor([step % 2, 3 + step % 3])
            ours.before_read(rows)
            sink.add(rows, grads.clone())
            ours.step(1e-2)
        ours.flush()
    torch.testing.assert_close(*tables)
    assert ours.bytes_per_row == 4 * (4 + 1) + 9


def test_rows_not_read_do_not_move_with_lazy() -> None:
    start = torch.randn(100, 4)
    table = start.clone()
    ours = RowAdamW(table, sink := RowGradients(table), lazy=True)
    for row in (1, 2):
        ours.before_read(torch.tensor([row]))
        sink.add(torch.tensor([row]), torch.ones(1, 4))
        ours.step(1e-2)
        if row == 1:
            moved = table[1].clone()
    ours.flush()
    assert torch.equal(table[1], moved)
    assert torch.equal(table[3:], start[3:])


def test_weight_decay_of_one_and_invalid_options_are_refused() -> None:
    table = torch.zeros(3, 2)
    sink = RowGradients(table)
    with pytest.raises(ValueError, match="lr \\* weight_decay"):
        RowAdamW(table, sink, weight_decay=1.0).step(1.0)
    with pytest.raises(ValueError, match="replay_limit"):
        RowAdamW(table, sink, replay_limit=0)
    with pytest.raises(ValueError, match="bfloat16"):
        RowAdamW(table, sink, low_precision="stochastic")


@pytest.mark.parametrize("limit", [None, 256])
def test_rows_read_without_a_gradient_and_read_again(limit: int | None) -> None:
    """A read may update the values alone; what is read always equals dense AdamW."""
    start = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense, table = Dense(start, (0.9, 0.95), 0.1), start.clone()
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "path": "replay", "replay_limit": limit}
    ours = RowAdamW(table, sink := RowGradients(table), **options)
    everything = torch.arange(50)
    for step, (touched, grads, lr) in enumerate(history(2, 60, 50, 4, 0.05)):
        if step % 7 == 3:
            ours.before_read(everything[step % 2 :: 2].clone())
            torch.testing.assert_close(table[step % 2 :: 2], dense.table.detach()[step % 2 :: 2], rtol=0, atol=1e-13)
        if step == 40:
            ours.flush()
        ours.before_read(touched)
        sink.add(touched, grads.double())
        ours.step(lr)
        dense.step(touched, grads.double(), lr)
    saved = ours.state_dict()
    torch.testing.assert_close(table, dense.table.detach(), rtol=0, atol=1e-13)
    state = dense.adamw.state[dense.table]
    torch.testing.assert_close(saved["m"], state["exp_avg"], rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(saved["v"], state["exp_avg_sq"], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("path", ["replay", "sweep", "auto"])
@pytest.mark.parametrize(("width", "decay", "limit"), [(5, 0.1, None), (8, 0.0, 256), (3, 0.1, 256)])
def test_triton_is_dense_adamw_within_a_few_roundings(path: Any, width: int, decay: float, limit: int | None) -> None:
    """At every read and after the flush: within 4 float32 roundings of the values, 1e-5 of the moments."""
    start = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    dense, table = Dense(start, (0.9, 0.95), decay), start.clone()
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": decay, "path": path, "replay_limit": limit}
    ours = RowAdamW(table, sink := RowGradients(table), **options, backend="triton")
    for touched, grads, lr in history(4, 16, 8, width, 0.2):
        ours.before_read(touched)
        torch.testing.assert_close(table[touched], dense.table.detach()[touched], rtol=5e-7, atol=1e-6)
        sink.add(touched, grads.clone())
        ours.step(lr)
        dense.step(touched, grads, lr)
    saved = ours.state_dict()
    torch.testing.assert_close(table, dense.table.detach(), rtol=5e-7, atol=1e-6)
    state = dense.adamw.state[dense.table]
    torch.testing.assert_close(saved["m"], state["exp_avg"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(saved["v"], state["exp_avg_sq"], rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize("path", ["replay", "sweep"])
@pytest.mark.parametrize("options", [{"row_second_moment": True}, {"low_precision": "master"}, {"lazy": True}])
def test_triton_follows_the_options_as_pytorch_does(path: Any, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "low_precision" in options else torch.float32
    tables = [torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2)]
    for table, backend in zip(tables, ("torch", "triton"), strict=True):
        torch.manual_seed(0)
        _train(table, **options, path=path, backend=backend, steps=12)
    torch.testing.assert_close(*tables, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_factor_of_clipping_is_applied_once(backend: str, share: float) -> None:
    """Left to the step, or by reading the norm before it; with few and with most rows read."""
    tables = [torch.randn(10, 6, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for table, applied_before in zip(tables, (False, True), strict=True):
        torch.manual_seed(0)
        leaf = table.requires_grad_()
        sink = RowGradients(leaf)
        ours = RowAdamW(leaf, sink, weight_decay=0.1, backend=backend)
        for _ in range(3):
            indices, weights = torch.randint(int(10 * share), (30, 2)), torch.randn(30, 2)
            ours.before_read(indices)
            embedding_bag(leaf, indices, weights, sink, backend).square().sum().backward()
            norm = sink.norm()
            sink.scale_(torch.tensor(0.3))
            if applied_before:
                torch.testing.assert_close(sink.norm(), 0.3 * norm)
            ours.step(1e-2)
        ours.flush()
    torch.testing.assert_close(
        *tables, rtol=1e-6 if backend == "triton" else 0, atol=1e-6 if backend == "triton" else 0
    )


def test_triton_truncates_replay_as_pytorch_does() -> None:
    """Rows that missed more than the limit, in float64, where both agree to rounding."""
    tables = [torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for _ in range(2)]
    for table, backend in zip(tables, ("torch", "triton"), strict=True):
        ours = RowAdamW(table, sink := RowGradients(table), replay_limit=4, path="replay", backend=backend)
        for row in (0, 1, 1, 2, 1, 1, 3, 1, 0, 1, 1, 1):
            ours.before_read(torch.tensor([row]))
            sink.add(torch.tensor([row]), torch.ones(1, 3, dtype=torch.float64))
            ours.step(1e-2)
        ours.flush()
    torch.testing.assert_close(*tables, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("path", ["replay", "sweep"])
def test_triton_rounds_stochastically_as_pytorch_does(path: Any) -> None:
    """Both draw the same noise; few values lie so close to a threshold that a rounding before it decides."""
    start = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = [start.clone() for _ in range(2)]
    for table, backend in zip(tables, ("torch", "triton"), strict=True):
        sink, options = RowGradients(table), {"path": path, "low_precision": "stochastic", "first_column": 64}
        ours = RowAdamW(table, sink, backend=backend, **options)
        for step, (rows, grads, lr) in enumerate(history(3, 6, 40, 64, 0.2)):
            ours.before_read(rows)
            sink.add(rows, grads.float())
            ours.step(lr + step)
        ours.flush()
    assert tables[0].ne(start).float().mean() > 0.9
    assert tables[0].ne(tables[1]).float().mean() < 1e-3


def test_the_noise_of_rounding_is_uniform_and_independent() -> None:
    """Of 2^20 draws, by column, row and step; the bounds are five standard deviations."""
    rows = torch.arange(1 << 10)
    first, second = (Noise(0).bits(rows, 1 << 10, step).double() / (1 << 16) for step in (7, 8))
    assert first.mean().item() == pytest.approx(0.5, abs=5 / 12**0.5 / 2**10)
    assert first.var().item() == pytest.approx(1 / 12, rel=5 * 0.9 / 2**10)
    for other in (second, first.roll(1, 0), first.roll(1, 1), Noise(1).bits(rows, 1 << 10, 7) / (1 << 16)):
        correlation = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 5 / 2**10
    assert Noise(0, first_column=3).bits(rows, 5, 7).equal(Noise(0).bits(rows, 8, 7)[:, 3:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"low_precision": "stochastic"}, {"replay_limit": None}])
def test_a_replayed_row_does_not_depend_on_the_rows_replayed_with_it(backend: str, options: dict[str, Any]) -> None:
    """Replicas of a table read different rows, and stay equal bit for bit."""
    dtype = torch.bfloat16 if options.get("low_precision") else torch.float32
    start = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = [start.clone() for _ in range(2)]
    for table, parts in zip(tables, (1, 40), strict=True):
        sink = RowGradients(table)
        ours = RowAdamW(table, sink, path="replay", weight_decay=0.1, backend=backend, **options)
        for rows, grads, lr in history(2, 12, 40, 8, 0.1):
            ours.before_read(rows)
            sink.add(rows, grads.float())
            ours.step(lr)
        for rows in torch.arange(40).chunk(parts):
            ours.before_read(rows)
    assert torch.equal(*tables)
