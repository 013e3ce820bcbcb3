"""The product-key search against scoring every row, and its gradients against autograd in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.product_key import best, native, product_key, reference
from suite.plan.live_bytes import LiveBytes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

BACKENDS = ["torch", "native", "triton"]


def every_row(q: Tensor, keys: Tensor) -> Tensor:
    """Scores of all n*n rows, [M, N, n*n]."""
    halves = torch.einsum("nmhw,mhkw->mhnk", q, keys)
    return (halves[:, 0].unsqueeze(-1) + halves[:, 1].unsqueeze(-2)).flatten(-2)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([0, 1, 5]),
    heads=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 3, 8]),
    half_keys=st.sampled_from([8, 9, 70]),
    top_k=st.sampled_from([1, 2, 5, 8]),
    integers=st.booleans(),
)
def test_rows_scores_and_gradients_are_those_of_scoring_every_row(
    backend: str, seed: int, tokens: int, heads: int, width: int, half_keys: int, top_k: int, integers: bool
) -> None:
    """Integers give many ties and exact sums, so that the order of ties can be checked too."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, 2, width, generator=generator)
    keys = torch.randn(heads, 2, half_keys, width, generator=generator)
    if integers:
        q, keys = q.round(), keys.round()
    q, keys = q.requires_grad_(), keys.requires_grad_()
    rows, scores = product_key(q, keys, top_k, backend)
    assert rows.shape == scores.shape == (heads, tokens, top_k)
    q64, keys64 = (part.detach().double().requires_grad_() for part in (q, keys))
    full = every_row(q64, keys64)
    if integers:
        assert torch.equal(rows, by_rank(q64, keys64, top_k))
    best = full.sort(-1, descending=True).values[..., :top_k]
    torch.testing.assert_close(scores.double(), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full.gather(-1, rows), scores.double(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(scores.shape, generator=generator)
    scores.backward(grad)
    full.gather(-1, rows).backward(grad.double())
    for ours, theirs in ((q, q64), (keys, keys64)):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def by_rank(q: Tensor, keys: Tensor, top_k: int) -> Tensor:
    """The rows in the documented order, by sorting Python tuples."""
    halves = torch.einsum("nmhw,mhkw->mnhk", q, keys).tolist()
    found = []
    for head in halves:
        found.append([])
        for first, second in head:
            one, two = (sorted(range(len(side)), key=lambda k, side=side: (-side[k], k)) for side in (first, second))
            pairs = sorted((-(first[i] + second[j]), a, b, i, j) for a, i in enumerate(one) for b, j in enumerate(two))
            found[-1].append([i * len(first) + j for *_, i, j in pairs[:top_k]])
    return torch.tensor(found, dtype=torch.int64).reshape(len(halves), len(q), top_k)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_queries_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    q, keys = torch.randn(4, 2, 2, 16).to(dtype), torch.randn(2, 2, 12, 16).to(dtype)
    _, scores = product_key(q, keys, 4, backend)
    assert scores.dtype == torch.float32
    expected = every_row(q.double(), keys.double()).sort(-1, descending=True).values[..., :4]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def hard_to_rank(half_keys: int) -> Tensor:
    """Half scores [S, 1, n]: random, with ties, zeros of both signs, infinities and denormals, falling."""
    random = torch.randn(half_keys, generator=torch.Generator().manual_seed(half_keys))
    extremes = random.clone()
    extremes[::7], extremes[1::7], extremes[3::5], extremes[4::5] = float("inf"), float("-inf"), 1e-42, -1e-42
    rows = (random, (random * 2).round() / 2, torch.where(random < 0, 0.0, -0.0), extremes)
    return torch.stack((*rows, random.sort(descending=True).values, -random)).unsqueeze(1)


@pytest.mark.parametrize(("half_keys", "top_k"), [(1, 1), (33, 3), (70, 20), (300, 32), (1100, 8)])
def test_triton_selects_and_pairs_as_the_reference_does(half_keys: int, top_k: int) -> None:
    """Bit for bit: groups that are not full, several blocks of groups, and a top_k that is no power of two."""
    from kernels.product_key import triton

    scores_SCn = hard_to_rank(half_keys)
    best_scores_SNK = torch.empty(len(scores_SCn), 1, top_k)
    best_keys_SNK = torch.empty(len(scores_SCn), 1, top_k, dtype=torch.int32)
    triton.select(scores_SCn, 0, best_scores_SNK, best_keys_SNK)
    expected_SCK = reference.best(scores_SCn, top_k)
    assert torch.equal(best_keys_SNK.long(), expected_SCK)
    assert torch.equal(best_scores_SNK, scores_SCn.gather(-1, expected_SCK))
    results = triton.combine(best_scores_SNK, best_keys_SNK, half_keys)
    for ours, theirs in zip(results, reference.combine(scores_SCn.unflatten(0, (-1, 2)), top_k), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (33, 3), (200, 5), (300, 65)])
def test_the_best_of_a_row_are_those_of_sorting_pairs_of_value_and_position(
    backend: str, width: int, count: int
) -> None:
    values = hard_to_rank(width).squeeze(1)
    rows = [sorted(range(width), key=lambda at, row=row: (-row[at], at))[:count] for row in values.tolist()]
    not_contiguous = values.mT.contiguous().mT.requires_grad_()
    assert best(not_contiguous, count, backend).tolist() == rows
    assert reference.best_by_sort(values, count).tolist() == rows


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_of_other_dtypes_are_ranked_in_float32(backend: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 1.0 + 2.0**-40, 2.0, -0.0, 0.0]], dtype=dtype)
    assert best(values, 5, backend).tolist() == [[2, 0, 1, 3, 4]]
    assert best(values[:0], 2, backend).shape == (0, 2)


def test_more_than_the_values_of_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"count: got 4, allowed: 1 to the values of a row \(3\)"):
        best(torch.zeros(2, 3), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_scores_by_parts_are_those_of_float32_products(dtype: torch.dtype) -> None:
    """Within the error bound of a float32 product of that width, which is no power of two."""
    from kernels.product_key import triton

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 2, 2, 45, generator=generator).to(dtype)
    keys = torch.randn(2, 2, 40, 45, generator=generator) * 10.0 ** torch.linspace(-6, 2, 40).view(-1, 1)
    rows, scores = triton.search(q, keys, 8)
    exact, terms = every_row(q.double(), keys.double()), every_row(q.double().abs(), keys.double().abs())
    assert ((exact.gather(-1, rows) - scores).abs() <= 45 * 2**-24 * terms.gather(-1, rows)).all()
    torch.testing.assert_close(scores.double(), exact.topk(8).values, rtol=1e-5, atol=1e-4)


def test_parts_of_a_number_add_up_to_it() -> None:
    from kernels.product_key import triton

    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-30, 30, 100)
    x[0], x[1], x[2] = float("inf"), float("-inf"), -0.0
    assert torch.equal(triton.split(x, [0, 1, 2]).view(3, 100).float().sum(0), x)


def test_triton_searches_chunks_of_tokens_as_it_does_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.product_key import triton

    q, keys = torch.randn(7, 2, 2, 4).bfloat16(), torch.randn(2, 2, 50, 4)
    whole = triton.search(q, keys, 5)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 4 * 2 * 2 * 50 * 3)  # three tokens
    for parts, at_once in zip(triton.search(q, keys, 5), whole, strict=True):
        torch.testing.assert_close(parts, at_once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "times_keys"), [(torch.bfloat16, 4.3), (torch.float32, 5.6)])
def test_memory_of_a_search_does_not_grow_with_the_tokens(
    dtype: torch.dtype, times_keys: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16,384 tokens and 8,192 half keys have 4.3 GB of half scores, of which 32 MiB are held.

    The peak is that of the keys' parts while they are made, or a chunk with them; the results are larger than neither.
    """
    from kernels.product_key import triton

    sizes = []

    def products(q_SCV: Tensor, keys_SVn: Tensor) -> Tensor:
        scores_SCn = torch.empty(*q_SCV.shape[:2], keys_SVn.shape[2], device="meta")
        sizes.append(scores_SCn.nbytes)
        return scores_SCn

    class NoLaunch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: None

    monkeypatch.setattr(triton, "products", products)  # meta tensors are not on CUDA, where products are not copied
    monkeypatch.setattr(triton, "_select_kernel", NoLaunch())
    monkeypatch.setattr(triton, "_pair_kernel", NoLaunch())
    keys = torch.empty(4, 2, 8192, 512, device="meta")
    peaks = []
    for tokens in (1024, 16384):
        q = torch.empty(tokens, 4, 2, 512, dtype=dtype, device="meta")
        with LiveBytes(q, keys) as live:
            results = triton.search(q, keys, 32)
        peaks.append(live.peak)
        assert sum(sizes) == 4 * tokens * 8 * 8192
        assert max(sizes) == 32 << 20
        sizes.clear()
        del results
    assert peaks[0] == peaks[1] < times_keys * keys.nbytes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    half_keys=st.sampled_from([1, 8, 24, 33, 130, 600]),
    top_k=st.sampled_from([1, 3, 8, 32]),
    step=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_c_returns_the_rows_and_scores_of_the_pytorch_path_bit_for_bit(
    seed: int, half_keys: int, top_k: int, step: float
) -> None:
    """Half scores are rounded to multiples of `step` (unless 0), so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(6, 2, 2, 3, generator=generator), torch.randn(2, 2, half_keys, 3, generator=generator)
    if step:
        q, keys = (q / step).round() * step, keys.round()
    results = [ops.search(q, keys, min(top_k, half_keys)) for ops in (native, reference)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_papers_119_pairs_contain_every_best_row() -> None:
    assert reference.pairs(32).shape == (2, 119)
    scores = torch.randn(20, 2, 3, 64, dtype=torch.float64)
    rows, sums = reference.combine(scores, 32)
    full = (scores[:, 0].unsqueeze(-1) + scores[:, 1].unsqueeze(-2)).flatten(-2)
    torch.testing.assert_close(sums, full.topk(32).values)
    torch.testing.assert_close(full.gather(-1, rows), sums)


@pytest.mark.parametrize("width", [3, 40, 300])
def test_selection_equals_a_stable_sort(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without numpy; few distinct values, so that values tie for the last place."""
    values = torch.randint(-3, 3, (50, width)).float()
    values += torch.linspace(0, 0.5, width) * (torch.arange(50)[:, None] % 2)
    values[0] = -0.0
    expected = (-values).sort(dim=-1, stable=True).indices[:, :3]
    assert torch.equal(reference.best(values, 3), expected)
    assert torch.equal(reference.best(values[1::2], 3), expected[1::2])
    monkeypatch.setattr(reference, "numpy", None)
    assert torch.equal(reference.best(values, 3), expected)


def test_a_top_k_above_the_half_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k: got 5"):
        product_key(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 4, 2), 5)
