"""The product-key search in PyTorch: the reference on any device.

The scores of all half keys exist for one chunk of tokens at a time.

Shapes: N tokens, M heads, W half of a key's width, n half keys, K rows selected per head, P candidate pairs, C tokens
of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

try:
    import numpy
except ImportError:  # optional: torch's own selection, used instead, is slower on a CPU
    numpy = None  # type: ignore[assignment]

CHUNK_SCORES = 1 << 20
"""Half scores per chunk: 4 MiB in float32."""
CHUNK_SCORES_GPU = 1 << 27
CHUNKS_ON_META = 4
"""Chunks on the meta device, unless they would exceed a GPU's: there every chunk takes the same time, however long."""
SORTED_WHOLE = 128
"""Rows of at most this many values are cheaper to sort than to select from (measured at 20 to 1,024 values)."""


def pairs(top_k: int) -> Tensor:
    """Return the ranks (from 0) of the pairs that can be among the top_k sums, [2, P] int64: (i+1)(j+1) <= top_k.

    A pair ranks after the (i+1)(j+1) - 1 others that are at least as good in both halves, so no other pair can be among
    them. For top_k 32 these are 119 of 1,024 pairs.
    """
    return torch.tensor([(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]).T


def search(q_NM2W: Tensor, keys_M2nW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return (rows_MNK int64, scores_MNK), best first.

    Args:
        q_NM2W: Half queries of any float dtype.
        keys_M2nW: Half keys of any float dtype.
        top_k: Rows per head.
    """
    tokens, heads = q_NM2W.shape[:2]
    wide = torch.float64 if q_NM2W.dtype == torch.float64 else torch.float32
    keys_M2Wn = keys_M2nW.to(wide).mT
    rows_MNK = torch.empty(heads, tokens, top_k, dtype=torch.int64, device=q_NM2W.device)
    scores_MNK = torch.empty(heads, tokens, top_k, dtype=wide, device=q_NM2W.device)
    for part in chunks(q_NM2W, keys_M2nW):
        scores_M2Cn = q_NM2W[part].to(wide).permute(1, 2, 0, 3) @ keys_M2Wn
        rows_MNK[:, part], scores_MNK[:, part] = combine(scores_M2Cn, top_k)
    return rows_MNK, scores_MNK


def combine(scores_M2Cn: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top_k of all n*n sums of a first and a second half score: rows i*n + j and their sums, best first."""
    best_M2CK = best(scores_M2Cn, top_k)
    ranked_M2CK = scores_M2Cn.gather(-1, best_M2CK)
    first_P, second_P = pairs(top_k).to(scores_M2Cn.device)
    sums_MCP = ranked_M2CK[:, 0].index_select(-1, first_P) + ranked_M2CK[:, 1].index_select(-1, second_P)
    chosen_MCK = best(sums_MCP, top_k)
    first_MCK = best_M2CK[:, 0].gather(-1, first_P[chosen_MCK])
    second_MCK = best_M2CK[:, 1].gather(-1, second_P[chosen_MCK])
    return first_MCK * scores_M2Cn.shape[-1] + second_MCK, sums_MCP.gather(-1, chosen_MCK)


def search_backward(grad_MNK: Tensor, rows_MNK: Tensor, q_NM2W: Tensor, keys_M2nW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys, in the dtype of the scores' gradients.

    Args:
        grad_MNK: Gradients of the scores, float32 or float64.
        rows_MNK: The rows, as `search` returns them.
        q_NM2W: Half queries of any float dtype.
        keys_M2nW: Half keys of any float dtype.
    """
    wide = grad_MNK.dtype
    half_keys = keys_M2nW.shape[2]
    halves_M2NK = torch.stack((rows_MNK // half_keys, rows_MNK % half_keys), 1)
    keys_wide_M2nW = keys_M2nW.to(wide)
    grad_q_NM2W = torch.empty_like(q_NM2W, dtype=wide)
    grad_keys_M2nW = torch.zeros_like(keys_M2nW, dtype=wide)
    for part in chunks(q_NM2W, keys_M2nW):
        halves_M2CK = halves_M2NK[:, :, part]
        grad_M2Cn = grad_MNK.new_zeros(*halves_M2CK.shape[:-1], half_keys)
        grad_M2Cn.scatter_add_(-1, halves_M2CK, grad_MNK[:, None, part].expand(halves_M2CK.shape))
        grad_q_NM2W[part] = (grad_M2Cn @ keys_wide_M2nW).permute(2, 0, 1, 3)
        grad_keys_M2nW += grad_M2Cn.mT @ q_NM2W[part].to(wide).permute(1, 2, 0, 3)
    return grad_q_NM2W, grad_keys_M2nW


def chunks(q_NM2W: Tensor, keys_M2nW: Tensor) -> Iterator[slice]:
    """Yield slices of tokens whose half scores exist at the same time."""
    kind, side = q_NM2W.device.type, keys_M2nW.shape[:3].numel()
    limit = CHUNK_SCORES if kind in ("cpu", "meta") else CHUNK_SCORES_GPU
    if kind == "meta":
        limit = min(max(limit, len(q_NM2W) * side // CHUNKS_ON_META), CHUNK_SCORES_GPU)
    step = max(1, limit // side)
    return (slice(start, start + step) for start in range(0, len(q_NM2W), step))


def best(values: Tensor, count: int) -> Tensor:
    """Return positions of the `count` largest along the last dimension, best first, the lower position first in ties.

    Values are ranked in float32. torch.topk does not define the order of ties and is slow on a CPU. Short rows are
    sorted; in long ones, the count-th largest value is found first, and only the values not below it are sorted.
    """
    if values.is_meta:  # only shapes: the selection depends on values
        return values.new_empty(*values.shape[:-1], count, dtype=torch.int64)
    width = values.shape[-1]
    flat = values.float().reshape(-1, width)
    if width > SORTED_WHOLE:
        places = _flat_nonzero(flat >= _nth_largest(flat, count))
        if len(places) == len(flat) * count:  # otherwise values tie for the last place
            found = places.remainder_(width).view(-1, count)
            order = _ranking(flat.gather(-1, found))
            return found.gather(-1, order).view(*values.shape[:-1], count)
    return _ranking(flat)[:, :count].reshape(*values.shape[:-1], count)


def best_by_sort(values: Tensor, count: int) -> Tensor:
    """Return what `best` returns, by torch's stable sort of whole rows, which reads no value on the host."""
    rising = values.float() + 0.0  # + 0.0: minus zero ties with zero
    return rising.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _flat_nonzero(flat: Tensor) -> Tensor:
    """Return positions of the true elements in the flattened tensor, int64."""
    if numpy is not None and flat.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero(flat.numpy()))
    return flat.reshape(-1).nonzero().squeeze(1)


def _nth_largest(flat: Tensor, count: int) -> Tensor:
    """Return the count-th largest of each row, [rows, 1]."""
    if numpy is not None and flat.device.type == "cpu":
        place = flat.shape[-1] - count
        return torch.from_numpy(numpy.partition(flat.numpy(), place, axis=-1)[:, place : place + 1])
    return flat.topk(count, dim=-1).values[:, -1:]


def _ranking(flat: Tensor) -> Tensor:
    """Return the positions of each row's values, largest first, the lower position first in ties (NaN counts as
    largest)."""
    if numpy is None or flat.device.type != "cpu":
        return flat.sort(dim=-1, descending=True, stable=True).indices
    # Unique integers: the value's bits, made to fall as the value rises, above the position.
    bits = (flat + 0.0).view(torch.int32)  # + 0.0: minus zero ties with zero
    falling = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).bitwise_not_()
    unique = falling.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(flat.shape[-1]))
    unique.numpy().sort(axis=-1)
    return unique.bitwise_and_(0xFFFFFFFF)
