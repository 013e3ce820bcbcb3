"""The product-key search in Triton: half scores live in registers, a block of keys at a time.

`_half_kernel` scores a block of tokens against one head's half keys, block by block, and keeps a running top_k: the
[N, n] scores are never in memory. `_pair_kernel` picks the top_k among the pairs that can be. Ranking is by one
int64: the score's bits, made to rise with it, above the inverted position, so that ties go to the lower position.
Backward is two weighted bags over the half keys (kernels.embedding_bag): sums in fixed order.

Shapes: N tokens, M heads, W half of a key's width, n half keys, K rows kept, P candidate pairs; B block.
float64 queries are searched by reference.py. Products are float32 (no TF32): exact ranking costs tensor-core speed.
Tested under TRITON_INTERPRET=1 only. Not measured or run on a GPU yet: block sizes are guesses, and selecting by
top_k rounds of a maximum may well be slower than a sort there.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.embedding_bag import triton as bags
from kernels.embedding_bag.reference import group_by_row
from kernels.product_key import reference

TOKENS = 16
"""Tokens of a program; the least that tl.dot takes."""
KEYS = 64
"""Half keys scored at a time."""
NONE = tl.constexpr(-(1 << 63))
"""Below the rank of every score."""


@triton.jit
def _rank(scores, positions):
    """One int64 per score: rises with the score, falls with the position."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)  # minus zero ties with zero
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (0xFFFFFFFF - positions.to(tl.int64))


@triton.jit
def _position(rank):
    return 0xFFFFFFFF - (rank & 0xFFFFFFFF)


@triton.jit
def _score(rank):
    rising = (rank >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _merge(best, more, top_k: tl.constexpr, BLOCK_K: tl.constexpr):
    """The top_k of both, best first; columns from top_k on hold NONE."""
    slots = tl.arange(0, BLOCK_K)[None, :]
    merged = tl.full(best.shape, NONE, tl.int64)
    for slot in range(top_k):
        first = tl.maximum(tl.max(best, 1), tl.max(more, 1))[:, None]
        merged = tl.where(slots == slot, first, merged)
        best = tl.where(best == first, NONE, best)
        more = tl.where(more == first, NONE, more)
    return merged


@triton.jit
def _half_kernel(
    q,
    keys,
    out_scores,
    out_keys,
    tokens,
    half_keys: tl.constexpr,
    width,
    top_k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One of 2M sides (head, half): q [2M, N, W], keys [2M, n, W], out [2M, N, K].
    side = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    given = token < tokens
    places = (side * tokens + token)[:, None] * width + column[None, :]
    q_BW = tl.load(q + places, mask=given[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
    best = tl.full((BLOCK_N, BLOCK_K), NONE, tl.int64)
    for start in range(0, half_keys, BLOCK_H):
        key = start + tl.arange(0, BLOCK_H)
        places = (side * half_keys + key)[None, :] * width + column[:, None]
        inside = (key < half_keys)[None, :] & (column < width)[:, None]
        keys_WH = tl.load(keys + places, mask=inside, other=0.0).to(tl.float32)
        rank = _rank(tl.dot(q_BW, keys_WH, input_precision="ieee"), key[None, :])
        best = _merge(best, tl.where((key < half_keys)[None, :], rank, NONE), top_k, BLOCK_K)
    slot = tl.arange(0, BLOCK_K)
    places = (side * tokens + token)[:, None] * top_k + slot[None, :]
    inside = given[:, None] & (slot < top_k)[None, :]
    tl.store(out_scores + places, _score(best), mask=inside)
    tl.store(out_keys + places, _position(best).to(tl.int32), mask=inside)


@triton.jit
def _pair_kernel(
    half_scores,
    half_ids,
    firsts,
    seconds,
    rows,
    scores,
    tokens,
    half_keys,
    pairs,
    top_k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Halves [M, 2, N, K] and pairs of ranks [P] to rows and scores [M, N, K].
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    given = token < tokens
    pair = tl.arange(0, BLOCK_P)
    first_N = ((head * 2) * tokens + token) * top_k
    second_N = ((head * 2 + 1) * tokens + token) * top_k
    first_P = tl.load(firsts + pair, mask=pair < pairs, other=0)
    second_P = tl.load(seconds + pair, mask=pair < pairs, other=0)
    inside = given[:, None] & (pair < pairs)[None, :]
    sums = tl.load(half_scores + first_N[:, None] + first_P[None, :], mask=inside, other=0.0)
    sums += tl.load(half_scores + second_N[:, None] + second_P[None, :], mask=inside, other=0.0)
    ranks = tl.where((pair < pairs)[None, :], _rank(sums, pair[None, :]), NONE)
    best = _merge(tl.full((BLOCK_N, BLOCK_K), NONE, tl.int64), ranks, top_k, BLOCK_K)
    slot = tl.arange(0, BLOCK_K)
    inside = given[:, None] & (slot < top_k)[None, :]
    chosen = tl.where((slot < top_k)[None, :], _position(best), 0)
    first = tl.load(half_ids + first_N[:, None] + tl.load(firsts + chosen), mask=inside, other=0)
    second = tl.load(half_ids + second_N[:, None] + tl.load(seconds + chosen), mask=inside, other=0)
    places = (head * tokens + token)[:, None] * top_k + slot[None, :]
    tl.store(rows + places, first.to(tl.int64) * half_keys + second.to(tl.int64), mask=inside)
    tl.store(scores + places, _score(best), mask=inside)


def search(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As reference.search."""
    if q_NM2W.dtype == torch.float64:
        return reference.search(q_NM2W, keys_M2nW, top_k)
    (tokens, heads, _, width), half_keys = q_NM2W.shape, keys_M2nW.shape[2]
    device = q_NM2W.device
    half_scores = torch.empty(heads, 2, tokens, top_k, dtype=torch.float32, device=device)
    half_ids = torch.empty(heads, 2, tokens, top_k, dtype=torch.int32, device=device)
    rows_MNK = torch.empty(heads, tokens, top_k, dtype=torch.int64, device=device)
    scores_MNK = torch.empty(heads, tokens, top_k, dtype=torch.float32, device=device)
    if tokens == 0:
        return rows_MNK, scores_MNK
    blocks, block_k = triton.cdiv(tokens, TOKENS), triton.next_power_of_2(top_k)
    _half_kernel[(blocks, 2 * heads)](
        q_NM2W.permute(1, 2, 0, 3).contiguous(),
        keys_M2nW.contiguous(),
        half_scores,
        half_ids,
        tokens,
        half_keys,
        width,
        top_k,
        BLOCK_N=TOKENS,
        BLOCK_H=KEYS,
        BLOCK_W=max(16, triton.next_power_of_2(width)),
        BLOCK_K=block_k,
    )
    first_P, second_P = reference.pairs(top_k).to(device)
    _pair_kernel[(blocks, heads)](
        half_scores,
        half_ids,
        first_P.contiguous(),
        second_P.contiguous(),
        rows_MNK,
        scores_MNK,
        tokens,
        half_keys,
        len(first_P),
        top_k,
        BLOCK_N=TOKENS,
        BLOCK_P=triton.next_power_of_2(len(first_P)),
        BLOCK_K=block_k,
    )
    return rows_MNK, scores_MNK


def search_backward(grad_MNK: Tensor, rows_MNK: Tensor, q_NM2W: Tensor, keys_M2nW: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.search_backward, deterministic: half keys of all heads as one table of 2Mn rows."""
    (tokens, heads, _, width), half_keys, wide = q_NM2W.shape, keys_M2nW.shape[2], grad_MNK.dtype
    halves_M2NK = torch.stack((rows_MNK // half_keys, rows_MNK % half_keys), 1)
    sides_M2 = torch.arange(2 * heads, device=rows_MNK.device).view(heads, 2)
    indices_SK = (halves_M2NK + sides_M2[..., None, None] * half_keys).flatten(0, 2)
    weights_SK = grad_MNK.unsqueeze(1).expand(halves_M2NK.shape).flatten(0, 2)
    table_RW = keys_M2nW.reshape(-1, width)
    grad_q_SW = bags.bag(table_RW, indices_SK, weights_SK, wide)
    groups = group_by_row(indices_SK, len(table_RW))
    sums_UW = bags.row_sums(q_NM2W.permute(1, 2, 0, 3).reshape(-1, width), weights_SK, groups, wide)
    grad_keys_RW = torch.zeros(table_RW.shape, dtype=wide, device=table_RW.device)
    grad_keys_RW.index_copy_(0, groups.rows_U, sums_UW)
    return grad_q_SW.view(heads, 2, tokens, width).permute(2, 0, 1, 3), grad_keys_RW.view(keys_M2nW.shape)
