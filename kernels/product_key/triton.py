"""The product-key search in Triton: scores on tensor cores, then exact selection by sorting networks.

A chunk of tokens at a time, so that its half scores stay in the second-level cache:
`half_scores`     products of queries and half keys, by the matrix library
`_select_kernel`  the top_k half keys of every token and side
and then, for all tokens together,
`_pair_kernel`    the top_k among the pairs that can be (reference.pairs)

Scores. Tensor cores multiply bfloat16 exactly and sum in float32. A float32 number is the sum of three bfloat16
numbers, so the products of the parts, all terms of one longer sum, are as exact as a float32 product.

Selection. A candidate is one int64: the score's bits, made to rise with the score, above the inverted position. No two
are equal, so ties go to the lower position. Groups of 16 neighbours are ranked first, by their highest score: a key
outside the top_k best groups has at least one key of each of them before it. Then the groups of four within those are
ranked in the same way, and then the keys within these.

Backward is two weighted bags over the half keys (kernels.embedding_bag): sums in fixed order.

Shapes: N tokens, C tokens of a chunk, M heads, W width of a half key, n half keys, K rows kept, P candidate pairs,
T parts of a number; B blocks of these in kernels.
Queries and keys must be finite: the product of an infinity and the parts of a number is not a number.
float64 queries are searched by reference.py. Checked in Triton's interpreter and by compiling; not run on a device yet.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.embedding_bag import triton as bags
from kernels.product_key import reference

CHUNK_BYTES = 32 << 20
"""Half scores of a chunk of tokens; the second-level caches have 40 MiB (A100), 50 MiB (H100) and more."""
GROUPS = 64
"""Groups of 16 half keys that a program ranks at a time, unless top_k needs more."""
MOST_SELECTED = 64
"""More are found by sorting whole rows; larger sorting networks are not among those that are compiled in tests."""
NONE = tl.constexpr(-(1 << 63))
"""Below every candidate."""
LOWEST = tl.constexpr(-(1 << 31))
"""Not above any score."""

PARTS_BFLOAT16 = ((0, 0), (0, 1), (0, 2))
"""Products of a bfloat16 query's only part with the three parts of a float32 key."""
PARTS_FLOAT32 = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
"""Of two float32 numbers; what is left out is below the last bit of the product."""


@triton.jit
def _rising(scores):
    """Return an int32 per score that orders as the scores do; minus zero is zero."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _candidate(rising, positions):
    """Return one int64: rises with the score, falls with the position."""
    return (rising.to(tl.int64) << 32) | (0xFFFFFFFF - positions.to(tl.int64))


@triton.jit
def _position(candidates):
    return 0xFFFFFFFF - (candidates & 0xFFFFFFFF)


@triton.jit
def _score(candidates):
    rising = (candidates >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _highest_of_four(row, first, half_keys: tl.constexpr):
    """Return the highest _rising of keys first to first + 3 of a row of scores, for a block of any shape; LOWEST of
    none."""
    key = tl.expand_dims(first, -1) + tl.arange(0, 4)
    inside = key < half_keys
    rising = tl.where(inside, _rising(tl.load(row + key, mask=inside, other=0.0)), LOWEST)
    return tl.max(rising, len(rising.shape) - 1)


@triton.jit(do_not_specialize=["start", "chunk", "tokens"])
def _select_kernel(
    half_scores,
    best_scores,
    best_keys,
    start,
    chunk,
    tokens,
    half_keys: tl.constexpr,
    top_k: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Of one token and side: half_scores [2M, C, n] to best_scores (unless None) and best_keys [2M, N, K], tokens from
    # `start` on.
    token = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1).to(tl.int64)
    row = half_scores + (side * chunk + token) * half_keys
    best = tl.full((1, BLOCK_K), NONE, tl.int64)
    for start_group in range(0, tl.cdiv(half_keys, 16), BLOCK_G):
        group = (start_group + tl.arange(0, BLOCK_G))[None, :]
        highest = _highest_of_four(row, group * 16, half_keys)
        for part in tl.static_range(4, 16, 4):
            highest = tl.maximum(highest, _highest_of_four(row, group * 16 + part, half_keys))
        candidates = tl.where(group * 16 < half_keys, _candidate(highest, group), NONE)
        # `best` rises and the new ones fall, so the larger of each two are the best of both, and need only be merged.
        best = tl.bitonic_merge(tl.maximum(best, tl.topk(candidates, BLOCK_K)), 1, False)
    group = (_position(best) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]  # of four, in the best groups of 16
    inside = (best != NONE)[:, :, None] & (group * 4 < half_keys)
    candidates = tl.where(inside, _candidate(_highest_of_four(row, group * 4, half_keys), group), NONE)
    best = tl.topk(tl.reshape(candidates, (1, BLOCK_K * 4)), BLOCK_K)
    key = (_position(best) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    inside = (best != NONE)[:, :, None] & (key < half_keys)
    candidates = tl.where(inside, _candidate(_rising(tl.load(row + key, mask=inside, other=0.0)), key), NONE)
    best = tl.topk(tl.reshape(candidates, (1, BLOCK_K * 4)), BLOCK_K)
    slot = tl.arange(0, BLOCK_K)[None, :]
    places = (side * tokens + start + token) * top_k + slot
    if best_scores is not None:
        tl.store(best_scores + places, _score(best), mask=slot < top_k)
    tl.store(best_keys + places, _position(best), mask=slot < top_k)


@triton.jit(do_not_specialize=["tokens"])
def _pair_kernel(
    best_scores,
    best_keys,
    pair_ranks,
    rows,
    scores,
    tokens,
    half_keys: tl.constexpr,
    pairs: tl.constexpr,
    top_k: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Of one token and head: best_scores and best_keys [M, 2, N, K], pair_ranks [2, P] to rows and scores [M, N, K].
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = (head * 2 * tokens + token) * top_k
    second = first + tokens.to(tl.int64) * top_k
    pair = tl.arange(0, BLOCK_P)[None, :]
    inside = pair < pairs
    sums = tl.load(best_scores + first + tl.load(pair_ranks + pair, mask=inside, other=0), mask=inside, other=0.0)
    ranks = tl.load(pair_ranks + pairs + pair, mask=inside, other=0)
    sums += tl.load(best_scores + second + ranks, mask=inside, other=0.0)
    best = tl.topk(tl.where(inside, _candidate(_rising(sums), pair), NONE), BLOCK_K)
    slot = tl.arange(0, BLOCK_K)[None, :]
    inside = slot < top_k
    chosen = tl.where(inside, _position(best), 0)
    one = tl.load(best_keys + first + tl.load(pair_ranks + chosen), mask=inside, other=0)
    two = tl.load(best_keys + second + tl.load(pair_ranks + pairs + chosen), mask=inside, other=0)
    places = (head * tokens + token) * top_k + slot
    tl.store(rows + places, one.to(tl.int64) * half_keys + two, mask=inside)
    tl.store(scores + places, _score(best), mask=inside)


def search(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See reference.search."""
    if q_NM2W.dtype == torch.float64:
        return reference.search(q_NM2W, keys_M2nW, top_k)
    (tokens, heads), half_keys = q_NM2W.shape[:2], keys_M2nW.shape[2]
    parts = PARTS_BFLOAT16 if q_NM2W.dtype == torch.bfloat16 else PARTS_FLOAT32
    keys_SnV = split(keys_M2nW.flatten(0, 1), [of_key for _, of_key in parts])
    best_scores_SNK = torch.empty(2 * heads, tokens, top_k, dtype=torch.float32, device=q_NM2W.device)
    best_keys_SNK = torch.empty(2 * heads, tokens, top_k, dtype=torch.int32, device=q_NM2W.device)
    chunk = max(1, CHUNK_BYTES // (4 * 2 * heads * half_keys))
    for start in range(0, tokens, chunk):
        q_SCW = q_NM2W[start : start + chunk].permute(1, 2, 0, 3).flatten(0, 1)
        scores_SCn = products(split(q_SCW, [of_query for of_query, _ in parts]), keys_SnV.mT)
        select(scores_SCn, start, best_scores_SNK, best_keys_SNK)
        del scores_SCn  # before the next chunk's are made
    return combine(best_scores_SNK, best_keys_SNK, half_keys)


def split(x: Tensor, wanted: list[int]) -> Tensor:
    """Return the parts of x as bfloat16, side by side in the last dimension: [..., W] to [..., T*W].

    Part 0 is x rounded, part 1 the rounded rest, and so on; three hold all bits of a float32 number. Infinities are
    all in part 0.
    """
    parts: list[Tensor] = []
    rest = x
    for part in range(max(wanted) + 1):
        if part:
            rest = torch.where(parts[-1].isfinite(), rest - parts[-1], 0.0)
        parts.append(rest.bfloat16())
    return torch.cat([parts[part] for part in wanted], -1)


def products(q_SCV: Tensor, keys_SVn: Tensor) -> Tensor:
    """Compute batched products of bfloat16 numbers, summed and returned in float32."""
    if q_SCV.is_cuda:
        return torch.bmm(q_SCV, keys_SVn, out_dtype=torch.float32)
    return torch.bmm(q_SCV.float(), keys_SVn.float())


def best(values: Tensor, count: int) -> Tensor:
    """See reference.best."""
    if count > MOST_SELECTED:
        return reference.best_by_sort(values, count)
    flat_1Cn = values.float().contiguous().view(1, -1, values.shape[-1])
    positions_1CK = torch.empty(1, flat_1Cn.shape[1], count, dtype=torch.int64, device=values.device)
    if flat_1Cn.numel():
        select(flat_1Cn, 0, None, positions_1CK)
    return positions_1CK.view(*values.shape[:-1], count)


def select(scores_SCn: Tensor, start: int, best_scores_SNK: Tensor | None, best_keys_SNK: Tensor) -> None:
    """Select the best half keys of a chunk of tokens, best first, written at [:, start : start + C] as integers."""
    (sides, chunk, half_keys), (_, tokens, top_k) = scores_SCn.shape, best_keys_SNK.shape
    block_k = _power_of_2(top_k)
    _select_kernel[(chunk, sides)](
        scores_SCn,
        best_scores_SNK,
        best_keys_SNK,
        start,
        chunk,
        tokens,
        half_keys,
        top_k,
        BLOCK_G=max(block_k, min(GROUPS, _power_of_2(half_keys // 16))),
        BLOCK_K=block_k,
        num_warps=1,
    )


def combine(best_scores_SNK: Tensor, best_keys_SNK: Tensor, half_keys: int) -> tuple[Tensor, Tensor]:
    """Return rows and scores of the best pairs, both [M, N, K], from the best half keys of both sides."""
    sides, tokens, top_k = best_scores_SNK.shape
    rows_MNK = torch.empty(sides // 2, tokens, top_k, dtype=torch.int64, device=best_scores_SNK.device)
    scores_MNK = torch.empty(sides // 2, tokens, top_k, dtype=torch.float32, device=best_scores_SNK.device)
    pairs_2P = _pairs(top_k, best_scores_SNK.device)
    if tokens:
        _pair_kernel[(tokens, sides // 2)](
            best_scores_SNK,
            best_keys_SNK,
            pairs_2P,
            rows_MNK,
            scores_MNK,
            tokens,
            half_keys,
            pairs_2P.shape[1],
            top_k,
            BLOCK_P=max(_power_of_2(pairs_2P.shape[1]), _power_of_2(top_k)),
            BLOCK_K=_power_of_2(top_k),
            num_warps=1,
        )
    return rows_MNK, scores_MNK


@functools.cache
def _pairs(top_k: int, device: torch.device) -> Tensor:
    """Return reference.pairs as int32 on the device, where it stays: copying it for every search would stop the
    host."""
    return reference.pairs(top_k).to(device, torch.int32).contiguous()


def _power_of_2(count: int) -> int:
    """Return the least power of two from `count` on, at least 2: Triton's sorting networks take no less."""
    return max(2, triton.next_power_of_2(count))


def search_backward(grad_MNK: Tensor, rows_MNK: Tensor, q_NM2W: Tensor, keys_M2nW: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.search_backward; deterministic: half keys of all heads as one table of 2Mn rows."""
    (tokens, heads, _, width), half_keys, wide = q_NM2W.shape, keys_M2nW.shape[2], grad_MNK.dtype
    halves_M2NK = torch.stack((rows_MNK // half_keys, rows_MNK % half_keys), 1)
    sides_M2 = torch.arange(2 * heads, device=rows_MNK.device).view(heads, 2)
    indices_SK = (halves_M2NK + sides_M2[..., None, None] * half_keys).flatten(0, 2)
    weights_SK = grad_MNK.unsqueeze(1).expand(halves_M2NK.shape).flatten(0, 2)
    table_RW = keys_M2nW.reshape(-1, width)
    grad_q_SW = bags.bag(table_RW, indices_SK, weights_SK, wide)
    sorted_L, order_L = indices_SK.flatten().int().sort(stable=True)
    grad_keys_RW = torch.zeros(table_RW.shape, dtype=wide, device=table_RW.device)
    source_SW = q_NM2W.permute(1, 2, 0, 3).reshape(-1, width)
    bags.sum_sorted(source_SW, weights_SK, order_L, sorted_L.long(), grad_keys_RW, adds=False)
    return grad_q_SW.view(heads, 2, tokens, width).permute(2, 0, 1, 3), grad_keys_RW.view(keys_M2nW.shape)
