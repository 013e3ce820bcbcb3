"""The product-key search against scoring every row, and its gradients against autograd in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.product_key import native, product_key, reference

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
    """Whole numbers make many ties, and exact sums: the order of ties is then checked too."""
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
    """The rows in the promised order, by sorting Python tuples."""
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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    half_keys=st.sampled_from([1, 8, 24, 33, 130, 600]),
    top_k=st.sampled_from([1, 3, 8, 32]),
    step=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_c_finds_the_rows_and_scores_of_the_pytorch_path_bit_for_bit(
    seed: int, half_keys: int, top_k: int, step: float
) -> None:
    """Half scores are rounded to multiples of `step` (0: not), so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(6, 2, 2, 3, generator=generator), torch.randn(2, 2, half_keys, 3, generator=generator)
    if step:
        q, keys = (q / step).round() * step, keys.round()
    results = [ops.search(q, keys, min(top_k, half_keys)) for ops in (native, reference)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_of_the_paper_are_119_and_never_lose_a_winner() -> None:
    assert reference.pairs(32).shape == (2, 119)
    scores = torch.randn(20, 2, 3, 64, dtype=torch.float64)
    rows, sums = reference.combine(scores, 32)
    full = (scores[:, 0].unsqueeze(-1) + scores[:, 1].unsqueeze(-2)).flatten(-2)
    torch.testing.assert_close(sums, full.topk(32).values)
    torch.testing.assert_close(full.gather(-1, rows), sums)


@pytest.mark.parametrize("width", [3, 40, 300])
def test_the_best_are_those_of_a_stable_sort(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without numpy; among few distinct values, so that ties straddle the last place."""
    values = torch.randint(-3, 3, (50, width)).float()
    values += torch.linspace(0, 0.5, width) * (torch.arange(50)[:, None] % 2)
    values[0] = -0.0
    expected = (-values).sort(dim=-1, stable=True).indices[:, :3]
    assert torch.equal(reference.best(values, 3), expected)
    assert torch.equal(reference.best(values[1::2], 3), expected[1::2])
    monkeypatch.setattr(reference, "numpy", None)
    assert torch.equal(reference.best(values, 3), expected)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k: got 5"):
        product_key(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 4, 2), 5)
